"""The command line as `python -m anystep`, the form in which torchrun starts it."""

import sys

from anystep.cli import main

sys.exit(main())

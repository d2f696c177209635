"""Every method on one yardstick: the same network, data, optimizer and compute.

`plan` says what is compared, `budget` how many steps a run may take, `comparison` trains what is
missing, `judging` measures a model, `statements` holds the paper's statements against the
scores, `report` writes it all down.
"""

from anystep.compare.comparison import Comparison
from anystep.compare.plan import CompareConfig, Entry
from anystep.compare.report import write_report

__all__ = ["CompareConfig", "Comparison", "Entry", "write_report"]

"""Formats in which a model leaves anystep, one file each, found by file name.

A format is a frozen dataclass of its options, derived from `Export`: `anystep export NAME RUN OUT`
reads them from the command line and calls `write`. Adding a format adds a file and no line
elsewhere. What a format needs beyond the core is imported in `write`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from anystep.arguments import Where


@dataclass(frozen=True)
class Export(ABC):
    """Base of every format; its docstring's first line is the format's help.

    Attributes:
        model: a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub.
        out: what to write.
    """

    PACKAGE: ClassVar[str] = "anystep.export"
    model: Where
    out: Where

    @abstractmethod
    def write(self) -> str:
        """Write `out`; returns what can be done with it, in a line or two.

        Raises:
            UserError: this model cannot be had in this format, or something stands in the way.
        """


BASE = Export

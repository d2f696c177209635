"""Find the silent mistakes of a run, before it is trained or after.

A rule is a function of a `Case` that yields a line for each fault: what is wrong, and what to do
about it. Adding a rule adds a function under `@rule` to a module of this package, or a module.
What training refuses anyway needs none.
"""

import importlib
from typing import NamedTuple

from anystep.doctor.case import RULES as RULES
from anystep.doctor.case import Case as Case
from anystep.doctor.case import open_case as open_case
from anystep.registry import names

for _module in names(__name__):
    importlib.import_module(f"{__name__}.{_module}")


class Finding(NamedTuple):
    """A fault, and the rule that found it."""

    rule: str
    line: str


def examine(case: Case) -> list[Finding]:
    """All that the rules find."""
    return [Finding(rule.__name__, line) for rule in RULES for line in rule(case)]

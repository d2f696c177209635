"""What is compared: methods, seeds, budget, and the choices a sweep decides between."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from anystep.errors import UserError
from anystep.objectives import Objective
from anystep.presets import objective
from anystep.registry import names

TEACHER = "flow_matching"  # the method that trains teachers
SIZED = "shortcut"  # the method that is trained at several sizes
FILE_NAME = str.maketrans({"(": " ", ")": " ", "/": " ", "_": "-"})


class Split(NamedTuple):
    """How a two-phase method divides its budget.

    Attributes:
        teacher: share that trains the teacher.
        pairs: share that makes pairs, for a method that needs them.
        pair_steps: sampling steps of a pair.
    """

    teacher: float = 0.0
    pairs: float = 0.0
    pair_steps: int = 0


class Choice(NamedTuple):
    """What a sweep chooses: a learning rate, and a split for a method with a teacher."""

    rate: float
    split: Split


def splits(method: Objective) -> tuple[Split, ...]:
    """The splits that are tried for a method, the first of them at each rate."""
    if method.PAIRS:
        return Split(1 / 2, 1 / 4, 16), Split(1 / 3, 1 / 3, 16), Split(1 / 2, 1 / 4, 32)
    if method.TEACHER != "none":
        return Split(1 / 2), Split(1 / 3), Split(2 / 3)
    return (Split(),)


class Entry(NamedTuple):
    """One run of the comparison.

    Attributes:
        method: its name.
        seed: its seed.
        variant: "" for a method in one phase, else "inside" (teacher, pairs and student share
            the budget) or "free" (the teacher costs nothing).
        size: factor on the width of the network.
    """

    method: str
    seed: int
    variant: str = ""
    size: float = 1.0

    @property
    def label(self) -> str:
        """How a report calls it, without its seed."""
        words = [self.variant] if self.variant else []
        words += [f"size {self.size:g}"] if self.size != 1 else []
        return self.method + (f" ({', '.join(words)})" if words else "")

    @property
    def key(self) -> str:
        """How its files are called."""
        return "-".join(f"{self.label} seed{self.seed}".translate(FILE_NAME).split())


@dataclass(frozen=True)
class CompareConfig:
    """What is compared.

    Attributes:
        methods: names, or variants such as shortcut/paper.
        seeds: the seeds of the runs.
        budget: forward-equivalents of a run; 0 is what shortcut spends in the preset.
        steps: sampling steps at which models are judged.
        n: samples judged at each.
        rates: learning rates of the sweep, as factors of the preset's.
        sizes: widths, as factors of the preset's, at which shortcut is trained besides, for as
            many steps, to see what model size does; none by default.
        out: folder of the report, with `scores/` (what is finished) and `runs/` (the models).
        device: auto, cpu or cuda.
    """

    methods: tuple[str, ...] = tuple(names(Objective.PACKAGE))
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 0
    steps: tuple[int, ...] = (1, 2, 4, 8, 32, 128)
    n: int = 2048
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    sizes: tuple[float, ...] = ()
    out: Path = Path("runs/compare")
    device: str = "auto"

    def __post_init__(self) -> None:
        # Files are called by either name; labels and statements know one.
        methods = tuple(dict.fromkeys(name.replace("-", "_") for name in self.methods))
        object.__setattr__(self, "methods", methods)
        for method in methods:
            objective(method)
        if not methods or not self.seeds or not self.rates or not self.steps:
            raise UserError("name at least one of methods, seeds, rates and steps")
        if min(self.steps) < 1 or min(self.seeds) < 0:
            raise UserError("steps must be at least 1 and seeds at least 0")
        if self.budget < 0 or self.n < 10 or min((*self.rates, *self.sizes, 1.0)) <= 0:
            raise UserError("budget must be at least 0, n at least 10, rates and sizes positive")
        if self.sizes and (SIZED not in methods or 1 in self.sizes):
            raise UserError(f"sizes are other than 1, and go with the method {SIZED}")

    def entries(self) -> Iterator[Entry]:
        """All runs, seed by seed, teachers first."""
        for seed in self.seeds:
            for method in sorted(self.methods, key=lambda name: name != TEACHER):
                two_phase = objective(method).TEACHER != "none"
                for variant in ("inside", "free") if two_phase else ("",):
                    yield Entry(method, seed, variant)
            for size in self.sizes:
                yield Entry(SIZED, seed, size=size)

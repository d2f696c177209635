"""What is examined: a run's config, its data and the metrics it wrote."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from anystep import checkpoint
from anystep.config import TrainConfig
from anystep.data import Loaded, seeded
from anystep.data.pairs import Pairs
from anystep.doctor.probe import Asked, ask
from anystep.errors import UserError
from anystep.registry import from_json
from anystep.spec import ModelSpec

EXAMPLES, NUMBERS = 4096, 2**22  # at most so many examples are looked at, and numbers in them
MIN_EXAMPLES = 16


@dataclass(frozen=True)
class Case:
    """A run, trained or to be trained.

    Attributes:
        config: the run.
        data: what it trains on; None when that could not be read.
        metrics: the lines of its metrics.jsonl, if it has been trained.
        teacher: what its teacher may be asked; None when there is none, or it could not be read.
        pairs: how its pairs were made, as pairs.json says; empty when it has none.
    """

    config: TrainConfig
    data: Loaded | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    teacher: ModelSpec | None = None
    pairs: Mapping[str, Any] | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        """What the network may be asked after training."""
        return self.spec_of(1.0 if self.data is None else self.data.train.guidance)

    def spec_of(self, guidance: float) -> ModelSpec:
        """The spec, had the data been made with this strength of guidance."""
        base = ModelSpec(num_classes=1)  # of data that cannot be read: that there may be classes
        if self.data is not None:
            data = self.data.train
            base = ModelSpec(data.shape, data.num_classes, data=data.scale, vae=data.vae)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a spec warns of, a rule finds
            return self.config.objective.spec(replace(base, guidance=guidance))

    @cached_property
    def asked(self) -> Asked:
        """What the objective asks its networks in a training step."""
        return ask(self.config, self.spec)

    @cached_property
    def x1(self) -> Tensor | None:
        """Training examples (B, *shape) as the network sees them."""
        if self.data is None:
            return None
        data = self.data.train
        fit = max(NUMBERS // math.prod(data.shape), MIN_EXAMPLES)
        stored = data.feed(min(fit, EXAMPLES), self.config.seed)(0)
        return data.draw(stored.x, seeded(self.config.seed, 0))


class Rule(Protocol):
    """A function that yields a line for each fault it finds."""

    __name__: str

    def __call__(self, case: Case) -> Iterator[str]:
        """The faults of a case."""


RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Make a function one of the rules."""
    RULES.append(function)
    return function


def open_case(config: TrainConfig, metrics: Sequence[Mapping[str, Any]] = ()) -> Case:
    """The case of a config, with its data, teacher and pairs where they can be read."""
    data, teacher, pairs = None, None, None
    try:
        data = config.data.load()
        pairs = config.data.info() if isinstance(config.data, Pairs) else None
    except (UserError, OSError) as error:
        warnings.warn(f"the data are not examined: {error}", stacklevel=2)
    if config.teacher is not None:
        try:
            info = checkpoint.read_info(checkpoint.find_model(config.teacher))
            teacher = from_json(ModelSpec, info["spec"])
        except (UserError, OSError) as error:
            warnings.warn(f"the teacher is not examined: {error}", stacklevel=2)
    return Case(config, data, metrics, teacher, pairs)

"""Training objectives, one file a method, found by file name.

An objective is a frozen dataclass of hyperparameters, called once a training step as

    objective(models, batch, progress, generator) -> Loss

It draws everything from `generator`, never changes its inputs, and returns the loss of every
example; reduction, gradients and logging are the training loop's. See docs/add-an-objective.md.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from anystep.spec import ModelSpec, Network


class Models(NamedTuple):
    """The networks of a run: the one trained, its target EMA, and a teacher.

    `ema` is None when the objective's `target_ema` is None, `teacher` unless there is one.
    """

    net: Network
    ema: Network | None = None
    teacher: Network | None = None


class Batch(NamedTuple):
    """x1 (B, *shape), cond (B,) or None, and x0 (B, *shape) when pairs are given."""

    x1: Tensor
    cond: Tensor | None = None
    x0: Tensor | None = None


class Loss(NamedTuple):
    """The loss of every example (B,), and scalars to report.

    A metric without examples in this batch is NaN and left out of averages.
    """

    per_example: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Objective(ABC):
    """Base of every objective."""

    PACKAGE: ClassVar[str] = "anystep.objectives"

    @property
    def target_ema(self) -> float | None:
        """Decay of the EMA network that makes targets; None when none is needed."""
        return None

    @abstractmethod
    def spec(self, base: ModelSpec) -> ModelSpec:
        """What a network trained by this objective may be asked; `base` describes the data."""

    @abstractmethod
    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The loss of a batch; `progress` in [0, 1) is the share of the run that is done."""


BASE = Objective


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each example: (B, *shape), (B, *shape) -> (B,)."""
    return (prediction - target).square().flatten(1).mean(1)


def group_means(per_example: Tensor, group: Tensor, labels: list[str]) -> dict[str, Tensor]:
    """The mean of `per_example` (B,) in each group: NaN where it is empty, inf where not finite.

    Args:
        per_example: (B,).
        group: (B,) indices into `labels`.
        labels: a name a group.
    """
    zeros = torch.zeros(len(labels), dtype=per_example.dtype, device=per_example.device)
    finite = per_example.detach().nan_to_num(torch.inf, torch.inf)
    total = zeros.index_add(0, group, finite)
    count = zeros.index_add(0, group, torch.ones_like(total[group]))
    return dict(zip(labels, (total / count).unbind(), strict=True))


def noise_like(x1: Tensor, generator: torch.Generator) -> Tensor:
    """x0 ~ N(0, I) shaped like x1."""
    return torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)


def uniform_times(
    n: int, generator: torch.Generator, like: Tensor, grid: Tensor | int | None = None
) -> Tensor:
    """Times (n,) in [0, 1): uniform, or on the multiples of 1/grid when a grid is given.

    Args:
        n: how many.
        generator: source of the draw.
        like: a tensor whose device and dtype the times take.
        grid: number of grid steps, for all rows or one a row (n,).
    """
    t = torch.rand(n, generator=generator, device=like.device, dtype=like.dtype)
    return t if grid is None else (t * grid).floor() / grid

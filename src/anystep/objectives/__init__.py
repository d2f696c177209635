"""Training objectives, one file a method, found by file name.

An objective is a frozen dataclass of hyperparameters, called once a training step as

    objective(models, batch, progress, generator) -> Loss

It draws everything from `generator`, never changes its inputs, and returns the loss of every
example; reduction, gradients and logging are the training loop's. Networks are asked the true
step; a `Model` around a network translates it to what its spec allows. See
docs/add-an-objective.md.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from anystep.errors import UserError
from anystep.spec import ModelSpec, Network, finest_level


class Models(NamedTuple):
    """The networks of a run: the one trained, its target EMA, and a teacher.

    `ema` is None when the objective's `target_ema` is None, `teacher` unless there is one.
    """

    net: Network
    ema: Network | None = None
    teacher: Network | None = None

    @property
    def target(self) -> Network:
        """The network that makes targets: the EMA, or the network itself without one."""
        return self.net if self.ema is None else self.ema


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
    """Base of every objective.

    Attributes:
        PACKAGE: where objectives are found.
        TEACHER: whether there is a trained network to learn from: "none", "optional" or
            "required". Its weights start the student (`start`).
        PAIRS: whether batches must hold x0.
        BIAS: the field along which a bias of the method vanishes and the order at which it
            does, if the exact u is not a fixed point; `tests/test_objectives.py` measures it.
    """

    PACKAGE: ClassVar[str] = "anystep.objectives"
    TEACHER: ClassVar[Literal["none", "optional", "required"]] = "none"
    PAIRS: ClassVar[bool] = False
    BIAS: ClassVar[tuple[str, int] | None] = None

    @property
    def target_ema(self) -> float | None:
        """Decay of the EMA network that makes targets; None when none is needed."""
        return None

    @property
    def phases(self) -> int:
        """Into how many equal phases a run is cut.

        With each, the warm-up of the EMAs and the schedule of the rate start again.
        """
        return 1

    @property
    def keep_optimizer(self) -> bool:
        """Whether the optimizer's moments outlive a phase."""
        return True

    def phase(self, progress: float) -> int:
        """The phase, from 0, at `progress` in [0, 1)."""
        return int(progress * self.phases + 1e-9)  # k / steps may be rounded down

    @abstractmethod
    def spec(self, base: ModelSpec) -> ModelSpec:
        """What a network trained by this objective may be asked; `base` describes the data."""

    def check_teacher(self, teacher: ModelSpec) -> None:
        """Raise `UserError` unless the objective can learn from a model of this spec.

        Here: one that knows the velocity of the linear path at d = 0.
        """
        if teacher.predicts != "u" or teacher.path != "linear" or teacher.sampler != "euler":
            raise UserError(
                f"a teacher must be a velocity model of the linear path, such as flow_matching; "
                f"this one predicts {teacher.predicts} on the {teacher.path} path and is sampled "
                f"by {teacher.sampler}"
            )
        if not teacher.knows_velocity:
            raise UserError("this teacher was not trained at d = 0, where its velocity is asked")

    @staticmethod
    def check_guidance(teacher: ModelSpec, guidance: float) -> None:
        """Raise `UserError` unless a teacher can be guided at d = 0 with this strength."""
        if guidance != 1 and finest_level(teacher.finest) not in teacher.null_levels:
            raise UserError(
                f"guidance {guidance} needs a teacher trained with label_dropout, "
                "so that it knows its null label"
            )

    def start(self, models: Models) -> None:
        """Before the first step: student := teacher, where there is one."""
        if models.teacher is not None:
            copy_weights(models.teacher, models.net)

    def advance(self, models: Models, progress: float) -> None:  # noqa: B027 - most have no phases
        """At the start of every later phase, before its first step."""

    @abstractmethod
    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The loss of a batch; `progress` in [0, 1) is the share of the run that is done."""


BASE = Objective


def copy_weights(source: Network | None, to: Network | None) -> None:
    """To := source, for two modules of the same shape."""
    assert isinstance(source, nn.Module) and isinstance(to, nn.Module)
    to.load_state_dict(source.state_dict())


def check_decay(decay: float | None) -> None:
    """Raise `UserError` unless the decay of a target EMA is in [0, 1), or None."""
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"target_ema must be in [0, 1) or None, not {decay}")


def check_bound(name: str, bound: float | None) -> None:
    """Raise `UserError` unless the bound called `name` is positive, or None."""
    if bound is not None and not bound > 0:
        raise UserError(f"{name} must be positive or None, not {bound}")


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

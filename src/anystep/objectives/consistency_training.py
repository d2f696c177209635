"""Consistency training: neighbouring points of a noisy path must point to the same data.

    L = E w || u(x_t, t, 1 - t) - sg[ (f(x_s, s) - x_t) / (1 - t) ] ||^2,    s = t + 1/N
    f(x, t) = x + (1 - t) u(x, t, 1 - t),    x_t and x_s from the same x0 and x1

f carries any point of a path to its end; at s = 1 it is the data themselves. The number N of
bins grows during training. Neighbours are joined by the noisy v = x1 - x0 instead of its mean,
which leaves a bias of O(1/N^2) in the mean of the f of a target. The pseudo-Huber loss looks for
its median until errors are smaller than c; that bias is O(1/N) where v is skewed.

Two ways to grow N: "double" is the shortcut authors' (1, 2, 4 ... M/2 in log2 M equal phases),
"ict" doubles from 10 up to M in equal phases as iCT does from 10 to 1280. `loss` is the squared
error, whose square in terms of f is weighted by 1 / (1 - t)^2, or iCT's pseudo-Huber loss
sqrt(|error|^2 + c^2) - c with c = 0.00054 sqrt(D), applied to f and weighted by N.

Source: Song et al., "Consistency Models" (arXiv 2303.01469), algorithm 3; Song and Dhariwal,
"Improved Techniques" (arXiv 2310.14189) for iCT, without its lognormal times, which are made for
another path; the authors' code of arXiv 2410.12557 for the velocity form.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    check_decay,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.objectives._endpoint import endpoint_target
from anystep.path import interpolate
from anystep.spec import ModelSpec, finest_level

ICT_BINS = 10  # the number of bins from which iCT starts
ICT_HUBER = 0.00054  # c / sqrt(D)


def pseudo_huber(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """sqrt(|weight (prediction - target)|^2 + c^2) - c: (B, *shape), (B, *shape), (B,) -> (B,)."""
    error = (prediction - target).flatten(1)
    c = ICT_HUBER * math.sqrt(error.shape[1])
    return ((weight**2 * error.square().sum(1)) + c**2).sqrt() - c


@dataclass(frozen=True)
class ConsistencyTraining(Objective):
    """Consistency training.

    Attributes:
        M: the number of bins grows to M/2 ("double") or M ("ict"); a power of two.
        bins: how the number of bins grows.
        loss: the error that is minimised.
        target_ema: decay of the EMA that makes targets; None uses the network itself, as iCT.
    """

    VARIANTS: ClassVar[dict[str, Callable[[], "ConsistencyTraining"]]]
    BIAS: ClassVar[tuple[str, int] | None] = ("M", 2)

    M: int = 128
    bins: Literal["double", "ict"] = "double"
    loss: Literal["squared", "pseudo_huber"] = "squared"
    target_ema: float | None = 0.95

    def __post_init__(self) -> None:
        if finest_level(self.M) < 1:
            raise UserError("consistency training needs M of at least 2")
        check_decay(self.target_ema)

    @classmethod
    def authors(cls) -> "ConsistencyTraining":
        """As the authors' code does."""
        return cls(target_ema=0.999)

    @classmethod
    def ict(cls) -> "ConsistencyTraining":
        """With the schedule, loss and targets of iCT."""
        return cls(bins="ict", loss="pseudo_huber", target_ema=None)

    def spec(self, base: ModelSpec) -> ModelSpec:
        """D is always 0; sampled by going to the end and back."""
        return replace(
            base,
            step_input="zero",
            finest=self.M,
            levels=(finest_level(self.M),),
            null_levels=(),
            sampler="consistency",
        )

    def bins_at(self, progress: float) -> int:
        """N at `progress` in [0, 1)."""
        if self.bins == "double":
            return 1 << int(progress * finest_level(self.M) + 1e-9)
        doublings = max(math.ceil(math.log2(self.M / ICT_BINS)), 0)
        return min(ICT_BINS << int(progress * (doublings + 1) + 1e-9), self.M)

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The error of every example."""
        x1, bins = batch.x1, self.bins_at(progress)
        x0 = noise_like(x1, generator) if batch.x0 is None else batch.x0
        t = uniform_times(len(x1), generator, x1, bins)
        x_t, s = interpolate(x0, x1, t), t + 1 / bins
        x_s = interpolate(x0, x1, s)
        target = endpoint_target(models.target, x_s, s, x_t, t, batch.cond)
        u = models.net(x_t, t, 1 - t, batch.cond)
        if self.loss == "squared":
            per_example = squared_error(u, target)
        else:
            per_example = bins * pseudo_huber(u, target, 1 - t)
        metrics = {"loss/consistency": per_example.detach().mean()}
        return Loss(per_example, metrics | {"bins": torch.full((), float(bins), device=x1.device)})


ConsistencyTraining.VARIANTS = {
    "authors": ConsistencyTraining.authors,
    "ict": ConsistencyTraining.ict,
}

"""Diffusion: predict the noise on a variance-preserving path.

    L = E || eps(x_t, t) - x0 ||^2,    t ~ U(0, 1),  x_t = sigma(t) x0 + alpha(t) x1

t covers all of [0, 1]; the paths of `anystep.path` leave a little signal at t = 0, without which
the data could not be told from the predicted noise. There one-step sampling divides the error of
that prediction by alpha = 0.016 (cosine) or 0.007 (linear), so DDIM bounds the predicted data.

Source: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), equation 14;
Nichol and Dhariwal (arXiv 2102.09672) for the cosine; Song et al. (arXiv 2010.02502) for DDIM.
The shortcut paper compares with it; the authors' code does not have it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from anystep.guidance import check_label_dropout, drop_condition, null_condition
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    check_bound,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.path import PathName, interpolate
from anystep.spec import ModelSpec, finest_level


@dataclass(frozen=True)
class Diffusion(Objective):
    """Noise prediction.

    Attributes:
        M: the number of steps for which good samples are claimed.
        schedule: how alpha rises from noise to data.
        label_dropout: share of labels replaced by the null label, which allows guidance.
        bound: magnitude to which samplers bound predicted data; None is 1 for images in [-1, 1]
            and no bound for other data.
    """

    M: int = 128
    schedule: Literal["cosine", "linear"] = "cosine"
    label_dropout: float = 0.1
    bound: float | None = None

    def __post_init__(self) -> None:
        finest_level(self.M)
        check_label_dropout(self.label_dropout)
        check_bound("bound", self.bound)

    @property
    def path(self) -> PathName:
        """The path that the schedule names."""
        return "vp-cosine" if self.schedule == "cosine" else "vp-linear"

    def spec(self, base: ModelSpec) -> ModelSpec:
        """The noise, on this path, whatever the step; sampled by DDIM."""
        finest = (finest_level(self.M),)
        return replace(
            base,
            predicts="noise",
            path=self.path,
            step_input="zero",
            finest=self.M,
            levels=finest,
            null_levels=finest if self.label_dropout and base.num_classes else (),
            sampler="ddim",
            bound=1.0 if self.bound is None and base.data == "[-1, 1]" else self.bound,
            claims=(self.M // 4, None),
        )

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example."""
        x1 = batch.x1
        x0 = noise_like(x1, generator) if batch.x0 is None else batch.x0
        t = uniform_times(len(x1), generator, x1)
        null = null_condition(models.net, batch.cond)
        cond = drop_condition(batch.cond, null, self.label_dropout, generator)
        noise = models.net(interpolate(x0, x1, t, self.path), t, torch.zeros_like(t), cond)
        per_example = squared_error(noise, x0)
        return Loss(per_example, {"loss/noise": per_example.detach().mean()})

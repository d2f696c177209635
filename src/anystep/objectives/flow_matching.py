"""Flow matching: regress u(x_t, t, 0) on v = x1 - x0.

    L = E || u(x_t, t, 0) - (x1 - x0) ||^2,    t ~ U(0, 1),  x_t = (1 - t) x0 + t x1

The minimum is E[v | x_t], the velocity of the probability-flow ODE. The network is asked d = 0
here and at every sampling step.

Source: Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747); Liu et al.
(arXiv 2209.03003). The shortcut authors' `naive` baseline draws t from the multiples of 1/128
(`grid_times`) and multiplies x0 by 1 - (1 - 1e-5) t, which is left out here.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anystep.guidance import check_label_dropout, drop_condition, null_condition
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.path import interpolate, velocity
from anystep.spec import ModelSpec, finest_level


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Flow matching.

    Attributes:
        M: finest number of steps; with `grid_times`, t is a multiple of 1/M.
        label_dropout: share of labels replaced by the null label, which allows guidance.
        grid_times: draw t from the grid instead of uniformly.
    """

    M: int = 128
    label_dropout: float = 0.1
    grid_times: bool = False

    def __post_init__(self) -> None:
        finest_level(self.M)
        check_label_dropout(self.label_dropout)

    def spec(self, base: ModelSpec) -> ModelSpec:
        """D is always 0; any number of steps; guidance allowed where labels were dropped."""
        finest = (finest_level(self.M),)
        null = finest if self.label_dropout and base.num_classes else ()
        return replace(
            base,
            step_input="zero",
            finest=self.M,
            levels=finest,
            null_levels=null,
            claims=(self.M // 4, None),
        )

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example."""
        x1 = batch.x1
        x0 = noise_like(x1, generator) if batch.x0 is None else batch.x0
        t = uniform_times(len(x1), generator, x1, self.M if self.grid_times else None)
        null = null_condition(models.net, batch.cond)
        cond = drop_condition(batch.cond, null, self.label_dropout, generator)
        u = models.net(interpolate(x0, x1, t), t, torch.zeros_like(t), cond)
        per_example: Tensor = squared_error(u, velocity(x0, x1))
        return Loss(per_example, {"loss/flow": per_example.detach().mean()})

"""Reflow: flow matching on the pairs (noise, sample) that a teacher makes.

    L = E || u(x_t, t, 0) - (x1 - x0) ||^2,    x1 = the teacher's sample from x0,  t ~ U(0, 1)

Paths between such pairs hardly cross, so the student's are straighter and take fewer steps. The
student starts from the teacher. `anystep pairs` makes pairs; any paired data will do, then
without a teacher. A student's own pairs make the next round (2-rectified, 3-rectified flow).

Source: Liu et al., "Flow Straight and Fast" (arXiv 2209.03003), algorithm 1. The shortcut paper
makes 50,000 pairs of 128 steps; the authors' code has no generator of pairs.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from anystep.objectives import Batch, Loss, Models, Objective, squared_error, uniform_times
from anystep.path import interpolate, velocity
from anystep.spec import ModelSpec, finest_level


@dataclass(frozen=True)
class Reflow(Objective):
    """Reflow.

    Attributes:
        M: finest number of steps; nothing depends on it but what the student may be asked.
    """

    TEACHER: ClassVar[Literal["none", "optional", "required"]] = "optional"
    PAIRS: ClassVar[bool] = True

    M: int = 128

    def __post_init__(self) -> None:
        finest_level(self.M)

    def spec(self, base: ModelSpec) -> ModelSpec:
        """D is always 0; guidance with which the pairs were made is baked in."""
        finest = (finest_level(self.M),)
        return replace(
            base,
            step_input="zero",
            finest=self.M,
            levels=finest,
            null_levels=(),
            guided_levels=finest if base.guidance != 1 else (),
        )

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example."""
        x1, x0 = batch.x1, batch.x0
        assert x0 is not None
        t = uniform_times(len(x1), generator, x1)
        u = models.net(interpolate(x0, x1, t), t, torch.zeros_like(t), batch.cond)
        per_example = squared_error(u, velocity(x0, x1))
        return Loss(per_example, {"loss/reflow": per_example.detach().mean()})

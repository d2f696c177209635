"""Consistency distillation: the two ends of a teacher's step must point to the same data.

    L = E || u(x_t, t, 1 - t) - sg[ (f(x_s, s) - x_t) / (1 - t) ] ||^2,    t = k/M,  s = t + 1/M
    x_s = x_t + 1/M u_teacher(x_t, t, 0),    f(x, t) = x + (1 - t) u(x, t, 1 - t)

f is asked of an EMA of the student, which starts from the teacher. The teacher's Euler step leaves
a bias of O(1/M^2) in the f of a target.

Source: Song et al., "Consistency Models" (arXiv 2303.01469), algorithm 2; the authors' code of
arXiv 2410.12557 for the velocity form. `ConsistencyDistillation.authors()` has its constants. As
there, labels are not dropped; guidance, which it does not have, is that of the teacher's step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anystep.guidance import guided, null_condition
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    check_bound,
    check_decay,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.objectives._endpoint import endpoint_target
from anystep.path import interpolate, step
from anystep.spec import ModelSpec, Network, Sampler, finest_level


@torch.no_grad()
def teacher_step(
    teacher: Network,
    x_t: Tensor,
    t: Tensor,
    d: float,
    cond: Tensor | None,
    *,
    guidance: float = 1.0,
    null_cond: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """One Euler step of size d of the teacher's flow from x_t (B, *shape) at t (B,).

    Args:
        teacher: asked d = 0.
        x_t: (B, *shape).
        t: (B,).
        d: size of the step.
        cond: class ids (B,) or None.
        guidance: strength of guidance; 1 is none.
        null_cond: (B,), what stands for no condition; needed for guidance.
        clip: bound on the magnitude of the point reached.
    """
    zero = torch.zeros_like(t)
    u = guided(teacher, x_t, t, zero, cond, guidance=guidance, null_cond=null_cond)
    x_s = step(x_t, u, zero + d)
    return x_s if clip is None else x_s.clamp(-clip, clip)


@dataclass(frozen=True)
class ConsistencyDistillation(Objective):
    """Consistency distillation.

    Attributes:
        M: number of steps of the teacher from noise to data.
        target_ema: decay of the EMA that makes targets; None uses the network itself.
        guidance: strength of the guidance of the teacher's step; 1 is none.
        clip: bound on the point that the teacher reaches; None is off.
        sampler: how the student is meant to be sampled.
    """

    VARIANTS: ClassVar[dict[str, Callable[[], "ConsistencyDistillation"]]]
    TEACHER: ClassVar[Literal["none", "optional", "required"]] = "required"
    BIAS: ClassVar[tuple[str, int] | None] = ("M", 2)

    M: int = 128
    target_ema: float | None = 0.95
    guidance: float = 1.0
    clip: float | None = None
    sampler: Sampler = "consistency"

    def __post_init__(self) -> None:
        finest_level(self.M)
        check_decay(self.target_ema)
        check_bound("clip", self.clip)

    @classmethod
    def authors(cls) -> "ConsistencyDistillation":
        """As the authors' code does: clip at 4, a slow EMA, Euler sampling."""
        return cls(target_ema=0.999, clip=4.0, sampler="euler")

    def spec(self, base: ModelSpec) -> ModelSpec:
        """D is always 0; guidance of the teacher's steps is baked in."""
        finest = (finest_level(self.M),)
        return replace(
            base,
            step_input="zero",
            finest=self.M,
            levels=finest,
            null_levels=(),
            guidance=self.guidance,
            guided_levels=finest if self.guidance != 1 else (),
            sampler=self.sampler,
        )

    def check_teacher(self, teacher: ModelSpec) -> None:
        """A velocity model; with guidance, one that knows its null label."""
        super().check_teacher(teacher)
        self.check_guidance(teacher, self.guidance)

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example."""
        assert models.teacher is not None
        x1, d = batch.x1, 1 / self.M
        x0 = noise_like(x1, generator) if batch.x0 is None else batch.x0
        t = uniform_times(len(x1), generator, x1, self.M)
        x_t = interpolate(x0, x1, t)
        x_s = teacher_step(
            models.teacher,
            x_t,
            t,
            d,
            batch.cond,
            guidance=self.guidance,
            null_cond=null_condition(models.net, batch.cond),
            clip=self.clip,
        )
        target = endpoint_target(models.target, x_s, t + d, x_t, t, batch.cond)
        per_example = squared_error(models.net(x_t, t, 1 - t, batch.cond), target)
        return Loss(per_example, {"loss/consistency": per_example.detach().mean()})


ConsistencyDistillation.VARIANTS = {"authors": ConsistencyDistillation.authors}

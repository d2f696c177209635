"""Progressive distillation: each phase, one step of the student is two of its teacher.

    L = E || u(x_t, t, d) - sg[ (u_1 + u_2) / 2 ] ||^2,    d = 2/M, 4/M ... 1, a phase each

    u_1 = u_teacher(x_t, t, d/2),   u_2 = u_teacher(x_t + d/2 u_1, t + d/2, d/2),   t = k d

The first teacher is a flow model. At the end of a phase the student (its EMA) becomes the teacher,
so the last student takes one step. The network is not told d: only the last size is left in it.

Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv
2202.00512), algorithm 2, in velocities, as the authors' code of arXiv 2410.12557 has it, whose
constants are `ProgressiveDistillation.authors()`. That code clips the midpoint only, and at its
very last step distils level -1; here the phases end with d = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from anystep.errors import UserError
from anystep.guidance import null_condition
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    check_bound,
    check_decay,
    copy_weights,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.objectives._two_steps import two_step_target
from anystep.path import interpolate
from anystep.spec import ModelSpec, finest_level


@dataclass(frozen=True)
class ProgressiveDistillation(Objective):
    """Progressive distillation.

    Attributes:
        M: number of steps of the first teacher, a power of two; there are log2 M phases.
        target_ema: decay of the EMA that becomes the next teacher; it starts anew with each
            phase and never spans more than a ninth of it. None takes the network itself.
        guidance: strength of the guidance of the first teacher; 1 is none. Later ones have it
            in them.
        clip: bound on the midpoint; None is off.
        keep_optimizer: whether the optimizer's moments outlive a phase.
    """

    VARIANTS: ClassVar[dict[str, Callable[[], "ProgressiveDistillation"]]]
    TEACHER: ClassVar[Literal["none", "optional", "required"]] = "required"

    M: int = 128
    target_ema: float | None = 0.999
    guidance: float = 1.0
    clip: float | None = None
    keep_optimizer: bool = True

    def __post_init__(self) -> None:
        if finest_level(self.M) < 1:
            raise UserError("progressive distillation needs M of at least 2")
        check_decay(self.target_ema)
        check_bound("clip", self.clip)

    @classmethod
    def authors(cls) -> "ProgressiveDistillation":
        """As the authors' code does."""
        return cls(clip=4.0)

    @property
    def phases(self) -> int:
        """log2 M."""
        return finest_level(self.M)

    def spec(self, base: ModelSpec) -> ModelSpec:
        """D is always 0, and one step is all that is claimed."""
        finest = (finest_level(self.M),)
        return replace(
            base,
            step_input="zero",
            finest=self.M,
            levels=finest,
            null_levels=(),
            guidance=self.guidance,
            guided_levels=finest if self.guidance != 1 else (),
            claims=(1, 1),
        )

    def check_teacher(self, teacher: ModelSpec) -> None:
        """A velocity model; with guidance, one that knows its null label."""
        super().check_teacher(teacher)
        self.check_guidance(teacher, self.guidance)

    def advance(self, models: Models, progress: float) -> None:
        """Teacher := student."""
        copy_weights(models.target, models.teacher)

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example."""
        assert models.teacher is not None
        x1, phase = batch.x1, self.phase(progress)
        size = 2.0 ** (phase + 1) / self.M
        x0 = noise_like(x1, generator) if batch.x0 is None else batch.x0
        t = uniform_times(len(x1), generator, x1, round(1 / size))
        d = torch.full_like(t, size)
        x_t = interpolate(x0, x1, t)
        target = two_step_target(
            models.teacher,
            x_t,
            t,
            d,
            batch.cond,
            guidance=self.guidance if phase == 0 else 1.0,
            null_cond=null_condition(models.net, batch.cond),
            clip_midpoint=self.clip,
        )
        per_example = squared_error(models.net(x_t, t, d, batch.cond), target)
        metrics = {"loss/distillation": per_example.detach().mean()}
        return Loss(per_example, metrics | {"step_size": torch.full((), size, device=x1.device)})


ProgressiveDistillation.VARIANTS = {"authors": ProgressiveDistillation.authors}

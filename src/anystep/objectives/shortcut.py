"""Shortcut models: one step of size d must land where two steps of d/2 land.

    L = E || u(x_t, t, 0) - (x1 - x0) ||^2                       flow rows
      + E || u(x_t, t, d) - sg[ (u_1 + u_2) / 2 ] ||^2           bootstrap rows

    u_1 = u(x_t, t, d/2),   u_2 = u(x_t + d/2 u_1, t + d/2, d/2),   d = 2^-j,  t a multiple of d

Flow rows ground the finest step in the data; bootstrap rows carry it to 1/64, 1/32 ... 1. Both
kinds share one batch and one mean over rows. Targets come from an EMA of the network.

Source: Frans et al., "One Step Diffusion via Shortcut Models" (arXiv 2410.12557), equations 4
and 5, algorithm 1. What differs from the paper and from the authors' code, and why, is listed in
docs/method.md; `Shortcut.paper()` and `Shortcut.authors()` are their constants.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.guidance import check_label_dropout, drop_condition, null_condition
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    check_bound,
    check_decay,
    group_means,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.objectives._two_steps import two_step_target as two_step_target
from anystep.path import interpolate, velocity
from anystep.spec import ModelSpec, finest_level


@dataclass(frozen=True)
class Shortcut(Objective):
    """The shortcut objective; how the defaults were found: results/digits.

    Attributes:
        M: the finest number of steps, a power of two; the paper's is 128. Fewer levels leave
            more rows for each, and for the flow.
        bootstrap_share: share of the batch's rows that are bootstrap rows, in [0, 1).
        target_ema: decay of the EMA that makes targets; None uses the network itself.
        guidance: strength of the guidance inside targets; 1 is none.
        guidance_level: the level j whose targets are guided; the finest bootstrap level,
            log2 M - 1, when None. Coarser levels inherit it.
        clip: bound on the midpoint and on the target; None is off.
        label_dropout: share of the flow rows whose label is replaced by the null label.
        remainder: what becomes of the bootstrap rows left after each level got its equal
            number: "random" levels, or all to the "coarsest" (d = 1).
        grid_times: draw t of the flow rows from the multiples of 1/M instead of uniformly.
    """

    VARIANTS: ClassVar[dict[str, Callable[[], "Shortcut"]]]

    M: int = 32
    bootstrap_share: float = 0.125
    target_ema: float | None = 0.95
    guidance: float = 1.0
    guidance_level: int | None = None
    clip: float | None = None
    label_dropout: float = 0.1
    remainder: Literal["random", "coarsest"] = "random"
    grid_times: bool = False

    def __post_init__(self) -> None:
        if self.M < 2:
            raise UserError("a shortcut model needs M of at least 2")
        if not 0 <= self.bootstrap_share < 1:
            raise UserError(f"bootstrap_share must be in [0, 1), not {self.bootstrap_share}")
        check_decay(self.target_ema)
        check_label_dropout(self.label_dropout)
        check_bound("clip", self.clip)
        if self.guidance != 1 and not self.label_dropout:
            raise UserError("guidance in the targets needs label_dropout, to train the null label")
        if not 0 <= self.guided_level < finest_level(self.M):
            raise UserError(
                f"guidance_level must be in 0..{finest_level(self.M) - 1}, "
                f"not {self.guidance_level}"
            )

    @classmethod
    def paper(cls) -> "Shortcut":
        """As published: a quarter of bootstrap rows, one EMA of 0.999, t uniform."""
        return cls(M=128, bootstrap_share=0.25, target_ema=0.999)

    @classmethod
    def authors(cls) -> "Shortcut":
        """As the authors' code does by default: an eighth, clip at 4, t on the grid."""
        return cls(
            M=128,
            bootstrap_share=0.125,
            target_ema=0.999,
            clip=4.0,
            remainder="coarsest",
            grid_times=True,
        )

    @property
    def guided_level(self) -> int:
        """The level whose targets are guided."""
        finest = finest_level(self.M) - 1
        return finest if self.guidance_level is None else self.guidance_level

    def spec(self, base: ModelSpec) -> ModelSpec:
        """Every level is trained; the null label only at the finest, by the flow rows."""
        finest = finest_level(self.M)
        conditional = base.num_classes > 0
        if self.guidance != 1 and not conditional:
            raise UserError("guidance in the targets needs a dataset with labels")
        if self.guidance != 1 and self.guided_level != finest - 1:
            warnings.warn(
                f"targets of level {self.guided_level} ask the null label at level "
                f"{self.guided_level + 1}, where it is not trained; level {finest - 1} is safe",
                stacklevel=2,
            )
        return replace(
            base,
            step_input="step",
            finest=self.M,
            levels=tuple(range(finest + 1)),
            null_levels=(finest,) if conditional and self.label_dropout else (),
            guidance=self.guidance,
            guided_levels=tuple(range(self.guided_level + 1)) if self.guidance != 1 else (),
        )

    def bootstrap_rows(self, batch: int) -> int:
        """How many of `batch` rows are bootstrap rows: at least one, and one flow row."""
        if not self.bootstrap_share:
            return 0
        if batch < 2:
            raise UserError("shortcut needs at least 2 rows a batch, a flow and a bootstrap row")
        return min(max(round(batch * self.bootstrap_share), 1), batch - 1)

    def draw_levels(self, rows: int, generator: torch.Generator) -> Tensor:
        """Levels j (rows,) of the bootstrap rows: first the remainder, then finest to coarsest.

        Each of the log2 M levels has rows // log2 M rows; only the levels of the remainder are
        left to chance, so shapes are not and every level is trained at any batch size.
        """
        levels = finest_level(self.M)
        device = generator.device
        fixed = torch.arange(levels - 1, -1, -1, device=device).repeat_interleave(rows // levels)
        if self.remainder == "random":
            rest = torch.randint(levels, (rows % levels,), generator=generator, device=device)
        else:
            rest = torch.zeros(rows % levels, dtype=torch.long, device=device)
        return torch.cat([rest, fixed])

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example: bootstrap rows first, then flow rows."""
        x1, finest = batch.x1, finest_level(self.M)
        rows = self.bootstrap_rows(len(x1))
        x0 = noise_like(x1, generator) if batch.x0 is None else batch.x0
        level = self.draw_levels(rows, generator)
        d = torch.exp2(-level.to(x1.dtype))
        flow_t = uniform_times(len(x1) - rows, generator, x1, self.M if self.grid_times else None)
        t = torch.cat([uniform_times(rows, generator, x1, 1 / d), flow_t])
        x_t = interpolate(x0, x1, t)

        null = null_condition(models.net, batch.cond)
        cond = drop_condition(batch.cond, null, self.label_dropout, generator, keep=rows)
        target = velocity(x0, x1)
        if rows:
            target[:rows] = self.bootstrap_target(
                models, x_t[:rows], t[:rows], d, level, batch.cond, null
            )
        u = models.net(x_t, t, torch.cat([d, torch.zeros_like(flow_t)]), cond)
        per_example = squared_error(u, target)
        group = torch.cat([level, torch.full((len(flow_t),), finest, device=level.device)])
        names = [f"loss/d={Fraction(1, 2**j)}" for j in range(finest)] + ["loss/flow"]
        return Loss(per_example, group_means(per_example, group, names))

    def bootstrap_target(
        self,
        models: Models,
        x_t: Tensor,
        t: Tensor,
        d: Tensor,
        level: Tensor,
        cond: Tensor | None,
        null: Tensor | None,
    ) -> Tensor:
        """The two-step target of the bootstrap rows, guided at the guided level."""
        rows = len(x_t)
        guidance: float | Tensor = 1.0
        may_be_guided = None
        if self.guidance != 1:
            # Which rows are asked twice must not depend on chance: the remainder, whose levels
            # do, is asked twice as a whole, with strength 1 where it is not to be guided.
            per_level, rest = divmod(rows, finest_level(self.M))
            first = rest + (finest_level(self.M) - 1 - self.guided_level) * per_level
            position = torch.arange(rows)
            may_be_guided = (position < rest) | (
                (position >= first) & (position < first + per_level)
            )
            guidance = torch.where(level == self.guided_level, self.guidance, 1.0)
        return two_step_target(
            models.target,
            x_t,
            t,
            d,
            None if cond is None else cond[:rows],
            guidance=guidance,
            null_cond=None if null is None else null[:rows],
            guided_rows=may_be_guided,
            clip_midpoint=self.clip,
            clip_target=self.clip,
        )


Shortcut.VARIANTS = {"paper": Shortcut.paper, "authors": Shortcut.authors}

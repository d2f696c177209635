"""Live reflow: flow matching and reflow at once, in one network that is told which.

    L = E || u(x_t, t, flow) - (x1 - x0) ||^2                     flow rows
      + E || u(x_t, t, reflow) - (x1' - x0) ||^2                  reflow rows

    x1' = K Euler steps of the current u(., ., flow) from x0,     x_t = (1 - t) x0 + t x1'

The flag is d: 0 asks for the flow, 1 for the reflow. Samples in fewer than M steps use the
reflow, those in M and more the flow. K Euler steps miss the flow's end by O(1/K).

Source: Frans et al. (arXiv 2410.12557), who introduce it as a baseline. `LiveReflow.authors()` is
their code: t on the grid. Their reflow and flow rows share their noise; here each has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.guidance import check_label_dropout, drop_condition, guided, null_condition
from anystep.objectives import (
    Batch,
    Loss,
    Models,
    Objective,
    check_decay,
    group_means,
    noise_like,
    squared_error,
    uniform_times,
)
from anystep.path import interpolate, step, velocity
from anystep.spec import ModelSpec, Network, finest_level


@torch.no_grad()
def simulate(
    net: Network,
    x0: Tensor,
    steps: int,
    cond: Tensor | None,
    *,
    guidance: float = 1.0,
    null_cond: Tensor | None = None,
) -> Tensor:
    """Where `steps` Euler steps of the flow carry x0 (B, *shape).

    Args:
        net: the network, asked d = 0.
        x0: noise (B, *shape).
        steps: K.
        cond: class ids (B,) or None.
        guidance: strength of guidance at every step; 1 is none.
        null_cond: (B,), what stands for no condition; needed for guidance.
    """
    zero = torch.zeros(len(x0), device=x0.device, dtype=x0.dtype)
    x = x0
    for k in range(steps):
        t = zero + k / steps
        u = guided(net, x, t, zero, cond, guidance=guidance, null_cond=null_cond)
        x = step(x, u, zero + 1 / steps)
    return x


@dataclass(frozen=True)
class LiveReflow(Objective):
    """Live reflow.

    Attributes:
        M: samples in M steps and more use the flow; with `grid_times`, t is a multiple of 1/M.
        reflow_share: share of the batch's rows that are reflow rows, in (0, 1).
        simulation_steps: K, Euler steps to the end of a pair.
        target_ema: decay of the EMA that is simulated; None simulates the network itself.
        guidance: strength of the guidance in the simulation; 1 is none.
        label_dropout: share of the flow rows whose label is replaced by the null label.
        grid_times: draw t from the multiples of 1/M instead of uniformly.
    """

    VARIANTS: ClassVar[dict[str, Callable[[], "LiveReflow"]]]
    BIAS: ClassVar[tuple[str, int] | None] = ("simulation_steps", 1)

    M: int = 128
    reflow_share: float = 0.125
    simulation_steps: int = 8
    target_ema: float | None = None
    guidance: float = 1.0
    label_dropout: float = 0.1
    grid_times: bool = False

    def __post_init__(self) -> None:
        if finest_level(self.M) < 1:
            raise UserError("live reflow needs M of at least 2, to tell the reflow from the flow")
        check_label_dropout(self.label_dropout)
        check_decay(self.target_ema)
        if not 0 < self.reflow_share < 1:
            raise UserError(f"reflow_share must be in (0, 1), not {self.reflow_share}")
        if self.simulation_steps < 1:
            raise UserError(f"simulation_steps must be at least 1, not {self.simulation_steps}")
        if self.guidance != 1 and not self.label_dropout:
            raise UserError("guidance in the targets needs label_dropout, to train the null label")

    @classmethod
    def authors(cls) -> "LiveReflow":
        """As the authors' code does."""
        return cls(grid_times=True)

    def spec(self, base: ModelSpec) -> ModelSpec:
        """Told which of the two; the null label only in the flow, guidance only in the reflow."""
        finest = finest_level(self.M)
        if self.guidance != 1 and not base.num_classes:
            raise UserError("guidance in the targets needs a dataset with labels")
        return replace(
            base,
            step_input="flag",
            finest=self.M,
            levels=(0, finest),
            null_levels=(finest,) if base.num_classes and self.label_dropout else (),
            guidance=self.guidance,
            guided_levels=(0,) if self.guidance != 1 else (),
        )

    def __call__(
        self, models: Models, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The squared error of every example: reflow rows first, then flow rows."""
        size = len(batch.x1)
        if size < 2:
            raise UserError("live_reflow needs at least 2 rows a batch, one of each kind")
        rows = min(max(round(size * self.reflow_share), 1), size - 1)
        x0 = noise_like(batch.x1, generator) if batch.x0 is None else batch.x0
        t = uniform_times(size, generator, x0, self.M if self.grid_times else None)
        null = null_condition(models.net, batch.cond)
        made = simulate(
            models.target,
            x0[:rows],
            self.simulation_steps,
            None if batch.cond is None else batch.cond[:rows],
            guidance=self.guidance,
            null_cond=None if null is None else null[:rows],
        )
        x1 = torch.cat([made, batch.x1[rows:]])
        reflow = torch.arange(size, device=x0.device) < rows
        cond = drop_condition(batch.cond, null, self.label_dropout, generator, keep=rows)
        u = models.net(interpolate(x0, x1, t), t, reflow.to(t.dtype), cond)
        per_example = squared_error(u, velocity(x0, x1))
        names = ["loss/flow", "loss/reflow"]
        return Loss(per_example, group_means(per_example, reflow.long(), names))


LiveReflow.VARIANTS = {"authors": LiveReflow.authors}

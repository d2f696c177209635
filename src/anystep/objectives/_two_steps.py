"""The target that makes one step agree with two: shortcut models, progressive distillation.

Source: Frans et al. (arXiv 2410.12557), equation 4; Salimans and Ho, "Progressive Distillation
for Fast Sampling of Diffusion Models" (arXiv 2202.00512), algorithm 2.
"""

import torch
from torch import Tensor

from anystep.guidance import guided
from anystep.path import step
from anystep.spec import Network


@torch.no_grad()
def two_step_target(
    net: Network,
    x_t: Tensor,
    t: Tensor,
    d: Tensor,
    cond: Tensor | None,
    *,
    guidance: float | Tensor = 1.0,
    null_cond: Tensor | None = None,
    guided_rows: Tensor | None = None,
    clip_midpoint: float | None = None,
    clip_target: float | None = None,
) -> Tensor:
    """The target for a step of size d: the mean velocity of two steps of d/2 (eq. 4).

    Args:
        net: the network asked, usually an EMA; no gradient flows.
        x_t: (B, *shape).
        t: (B,), the start of the step.
        d: (B,), the size of the whole step.
        cond: class ids (B,) or None.
        guidance: strength of guidance in both half-steps, a number or (B,); 1 is none.
        null_cond: (B,), what stands for no condition; needed for guidance.
        guided_rows: boolean (B,), the rows to which guidance applies; all when None.
        clip_midpoint: bound on the magnitude of the point between the half-steps.
        clip_target: bound on the magnitude of the target.

    Returns:
        (B, *shape).
    """

    def ask(x: Tensor, t: Tensor) -> Tensor:
        return guided(
            net, x, t, half, cond, guidance=guidance, null_cond=null_cond, rows=guided_rows
        )

    half = d / 2
    u_1 = ask(x_t, t)
    midpoint = clip(step(x_t, u_1, half), clip_midpoint)
    u_2 = ask(midpoint, t + half)
    return clip((u_1 + u_2) / 2, clip_target)


def clip(x: Tensor, bound: float | None) -> Tensor:
    """Bound x to [-bound, bound]; unchanged when there is no bound."""
    return x if bound is None else x.clamp(-bound, bound)

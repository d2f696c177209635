"""Sampling in any number of steps, from x0 ~ N(0, I) at t = 0 to x1 at t = 1.

| sampler     | a step of d from t                                         | arXiv      |
|-------------|------------------------------------------------------------|------------|
| euler       | x + d u(x, t, d)                                           | 2410.12557 |
| consistency | x1 = x + (1 - t) u(x, t, 1 - t), then z fresh:             | 2303.01469 |
|             | (1 - t - d) z + (t + d) x1                                 |            |
| ddim        | x1 and x0 from the predicted noise, both carried to t + d  | 2010.02502 |
| ancestral   | as ddim, but part of x0 is fresh (equation 16, eta = 1)    | 2010.02502 |

For N a power of two up to M every step has size 1/N. For other N up to M the schedule is made of
the two neighbouring sizes that were trained, each step starting at a multiple of itself, as in
training: 3 = 1/2 1/4 1/4. Above M the steps are equal and the network is asked d = 0. A model
that is not told the step takes equal steps at every N.
"""

import warnings
from collections.abc import Callable
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.guidance import guided
from anystep.path import (
    coefficients,
    data_from_noise,
    data_from_velocity,
    expand_to,
    interpolate,
    noise_from_data,
    step,
)
from anystep.spec import Model, ModelSpec, Network, Sampler, check_sampler

Order = Literal["fine_first", "coarse_first", "spread"]
Callback = Callable[[int, float, Tensor], None]
STOCHASTIC = ("consistency", "ancestral")  # in more than one step x0 is not all that counts
OWN_SEED = 2303_01469  # of noise added on the way; not one from which x0 is likely drawn
Move = Callable[[Tensor, Tensor, Tensor, Tensor, ModelSpec, torch.Generator], Tensor]


def schedule(
    steps: int, spec: ModelSpec | None = None, order: Order = "coarse_first"
) -> list[tuple[float, float]]:
    """The (t, d) of each of `steps` steps from t = 0 to 1.

    Args:
        steps: N, at least 1.
        spec: what the model may be asked; the paper's M = 128 when None.
        order: where the finer steps of a mixed schedule go: near the noise, near the data, or
            spread evenly. The default is the best measured (results/schedules).

    Raises:
        UserError: `steps` is not a whole number of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, SupportsIndex) or int(steps) < 1:
        raise UserError(f"steps must be a whole number of at least 1, not {steps!r}")
    spec, steps = spec or ModelSpec(), int(steps)
    if spec.step_input != "step" or steps > spec.finest:
        return [(i / steps, 1 / steps) for i in range(steps)]
    coarse = 2 ** (steps.bit_length() - 1)  # slots of size 1/coarse, some split in two
    split = steps - coarse
    if order == "spread":
        is_split = [(k + 1) * split // coarse > k * split // coarse for k in range(coarse)]
    else:
        is_split = [k < split for k in range(coarse)]
        is_split = is_split if order == "fine_first" else is_split[::-1]
    grid = []
    for k, fine in enumerate(is_split):
        d = 1 / (2 * coarse) if fine else 1 / coarse
        grid += [(k / coarse + i * d, d) for i in range(1 + fine)]
    return grid


@torch.no_grad()
def sample(
    net: Network,
    x0: Tensor,
    *,
    steps: int,
    cond: Tensor | None = None,
    guidance: float = 1.0,
    null_cond: Tensor | None = None,
    force_guidance: bool = False,
    order: Order = "coarse_first",
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Carry noise x0 to data in `steps` network calls (more with guidance: rows, not calls).

    Args:
        net: a `Model`, whose spec is kept to, or a bare network, which is asked the true step
            and otherwise treated as the paper's (M = 128).
        x0: noise (B, *shape); draw it with a generator (`draw`).
        steps: N >= 1; any whole number.
        cond: class ids (B,); None is the null label.
        guidance: classifier-free guidance strength, applied at the steps where the null label
            was trained and guidance is not baked in; other steps are plain, with a warning.
        null_cond: (B,), what stands for no condition; the network's own null label when None.
        force_guidance: apply guidance at every step, even untrained or on top of baked-in.
        order: see `schedule`.
        sampler: a row of this module's table; the one of the model's spec when None.
        generator: source, on the device of x0, of the noise that the consistency and ancestral
            samplers add on the way; one of a fixed seed when None, so that x0 determines the
            result.
        callback: called as callback(k, t, x) with the state after step k = 1..N, at time t.

    Returns:
        (B, *shape).

    Raises:
        UserError: a bad step count or label, guidance without a condition, or a sampler that
            does not fit what the model predicts.
    """
    spec = net.spec if isinstance(net, Model) else ModelSpec()
    sampler = sampler or spec.sampler
    check_sampler(spec, sampler)
    move = MOVES[sampler]
    generator = generator or torch.Generator(x0.device).manual_seed(OWN_SEED)
    grid = schedule(steps, spec, order)
    if isinstance(net, Model):
        check_request(spec, x0, cond)
    asked = [1 - t if sampler == "consistency" else d for t, d in grid]
    guide = [guidance != 1 and (force_guidance or may_guide(spec, d)) for d in asked]
    explain(spec, asked, guidance, guide)
    if any(guide) and null_cond is None and cond is not None:
        null = getattr(net, "null_label", None)
        null_cond = None if null is None else torch.full_like(cond, null)

    x = x0
    rows = [(*step, size) for step, size in zip(grid, asked, strict=True)]
    for k, times in enumerate(torch.tensor(rows, device=x0.device, dtype=x0.dtype)):
        t, d, size = times[:, None].expand(-1, len(x))
        if guide[k]:
            u = guided(net, x, t, size, cond, guidance=guidance, null_cond=null_cond)
        else:
            u = net(x, t, size, cond)
        x = move(x, u, t, d, spec, generator)
        if callback is not None:
            callback(k + 1, sum(grid[k]), x)
    return x


def euler(
    x: Tensor, u: Tensor, t: Tensor, d: Tensor, spec: ModelSpec, generator: torch.Generator
) -> Tensor:
    """Along u for a step of d."""
    return step(x, u, d)


def consistency(
    x: Tensor, u: Tensor, t: Tensor, d: Tensor, spec: ModelSpec, generator: torch.Generator
) -> Tensor:
    """To the end, then back to t + d with fresh noise (Song et al., algorithm 1)."""
    x1 = bounded(data_from_velocity(x, u, t), spec.bound)
    return interpolate(fresh(x, generator), x1, t + d)


def ddim(
    x: Tensor, u: Tensor, t: Tensor, d: Tensor, spec: ModelSpec, generator: torch.Generator
) -> Tensor:
    """The predicted data, and the noise that goes with them, mixed as they are at t + d."""
    x1 = bounded(data_from_noise(x, u, t, spec.path), spec.bound)
    x0 = noise_from_data(x, x1, t, spec.path)
    return interpolate(x0, x1, t + d, spec.path)


def ancestral(
    x: Tensor, u: Tensor, t: Tensor, d: Tensor, spec: ModelSpec, generator: torch.Generator
) -> Tensor:
    """As `ddim`, with as much of the noise fresh as the diffusion's own posterior has."""
    x1 = bounded(data_from_noise(x, u, t, spec.path), spec.bound)
    x0 = noise_from_data(x, x1, t, spec.path)
    (alpha, sigma), (alpha_s, sigma_s) = (
        coefficients(expand_to(time, x), spec.path) for time in (t, t + d)
    )
    share = sigma_s / sigma * (1 - (alpha / alpha_s) ** 2).clamp(min=0).sqrt()  # eq. 16, eta = 1
    kept = (sigma_s**2 - share**2).clamp(min=0).sqrt()
    return alpha_s * x1 + kept * x0 + share * fresh(x, generator)


MOVES: dict[str, Move] = {
    "euler": euler,
    "consistency": consistency,
    "ddim": ddim,
    "ancestral": ancestral,
}


def bounded(x1: Tensor, bound: float | None) -> Tensor:
    """Predicted data within [-bound, bound]; unchanged without a bound."""
    return x1 if bound is None else x1.clamp(-bound, bound)


def fresh(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise shaped like x."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def draw(
    spec: ModelSpec, n: int, generator: torch.Generator, label: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Noise x0 (n, *shape) and class ids (n,), uniformly random unless `label` is given.

    The ids are None for an unconditional model. The draw is made on the generator's device.
    """
    x0 = torch.randn(n, *spec.shape, generator=generator, device=generator.device)
    if not spec.num_classes:
        if label is not None:
            raise UserError("this model is unconditional: it takes no label")
        return x0, None
    cond = torch.randint(spec.num_classes, (n,), generator=generator, device=generator.device)
    return x0, cond if label is None else torch.full_like(cond, label)


def may_guide(spec: ModelSpec, d: float) -> bool:
    """Whether guidance has a meaning at a step of size d: null label trained, none baked in."""
    level = spec.level(d)
    return level in spec.null_levels and level not in spec.guided_levels


def check_request(spec: ModelSpec, x0: Tensor, cond: Tensor | None) -> None:
    """Raise `UserError` when noise or labels do not fit the model."""
    if tuple(x0.shape[1:]) != spec.shape:
        raise UserError(f"this model makes samples {spec.shape}, not {tuple(x0.shape[1:])}")
    if cond is None:
        return
    if not spec.num_classes:
        raise UserError("this model is unconditional: it takes no labels")
    if cond.shape != x0.shape[:1]:
        raise UserError(f"{len(x0)} samples need {len(x0)} labels, not {tuple(cond.shape)}")
    if len(cond) and not 0 <= int(cond.min()) <= int(cond.max()) <= spec.num_classes:
        raise UserError(
            f"label out of range: classes are 0..{spec.num_classes - 1} "
            f"and {spec.num_classes} means no condition"
        )


def explain(spec: ModelSpec, sizes: list[float], guidance: float, guide: list[bool]) -> None:
    """Warn of steps that were never trained and of guidance that is left out."""
    untrained = sorted({d for d in sizes if spec.level(d) not in spec.levels})
    if untrained:
        more = ", ..." if len(untrained) > 3 else ""
        warnings.warn(
            f"steps of size {', '.join(map(str, untrained[:3]))}{more} were never trained",
            stacklevel=3,
        )
    if guidance == 1 or all(guide):
        return
    baked = any(spec.level(d) in spec.guided_levels for d in sizes)
    reason = (
        f"guidance {spec.guidance} is already baked into this model's coarser steps"
        if baked
        else "the null label was trained only at the finest step"
        if spec.null_levels
        else "the null label was never trained"
    )
    remedy = f"{spec.finest} steps or more use it, " if spec.null_levels else ""
    warnings.warn(
        f"guidance {guidance} is left out of {len(guide) - sum(guide)} of {len(guide)} steps: "
        f"{reason}; {remedy}force_guidance applies it anyway",
        stacklevel=3,
    )

"""Interpolation between two noises, and how smoothly the samples follow.

Two noises a and b are joined by the quarter circle sin(theta) a + cos(theta) b, on which every
point is N(0, I) as they are (a straight line would pass through points that are too short). A
model that maps noise to data smoothly makes a strip of pictures that change gradually; the
largest jump between neighbours measures it, and mixing the two end samples pixel by pixel, which
moves in equal steps but leaves the data, is what to compare with.

Source: Frans et al. (arXiv 2410.12557), whose figure writes n a + sqrt(1 - n^2) b.
"""

import math

import torch
from torch import Tensor

from anystep.data import seeded
from anystep.errors import UserError
from anystep.path import expand_to
from anystep.sampling import STOCHASTIC, draw, sample
from anystep.spec import Model, Sampler


def arc(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Points (n, *shape) at equal angles on the quarter circle from b to a (*shape), ends exact.

    Raises:
        UserError: n is less than 2.
    """
    check_length(n)
    rise = torch.linspace(0, math.pi / 2, n, dtype=a.dtype, device=a.device).sin()
    a, b = a[None], b[None]
    return expand_to(rise, a) * a + expand_to(rise.flip(0), b) * b


def mix(first: Tensor, last: Tensor, n: int) -> Tensor:
    """Points (n, *shape) in equal steps on the straight line from first to last (*shape).

    Raises:
        UserError: n is less than 2.
    """
    check_length(n)
    weight = torch.linspace(0, 1, n, dtype=first.dtype, device=first.device)
    return torch.lerp(first[None], last[None], expand_to(weight, first[None]))


def largest_jump(strip: Tensor) -> float:
    """The largest L2 distance between neighbours of a strip (n, *shape)."""
    return float(strip.diff(dim=0).flatten(1).norm(dim=1).max())


def strip(
    model: Model,
    n: int,
    steps: int,
    seed: int = 0,
    label: int | None = None,
    *,
    guidance: float = 1.0,
    force_guidance: bool = False,
    sampler: Sampler | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A model's samples (n, *shape) along the arc between two noises, and their class ids (n,).

    The result is on the CPU. A sampler that adds noise on the way adds the same to every picture
    of the strip.

    Args:
        model: the model, on any device.
        n: how many, at least 2.
        steps: sampling steps.
        seed: of the two noises and the class.
        label: the class of the whole strip; drawn when None.
        guidance: see `anystep.sampling.sample`.
        force_guidance: likewise.
        sampler: likewise.

    Raises:
        UserError: n is less than 2, or `sample` refuses the request.
    """
    device = next(model.parameters()).device
    (b, a), cond = draw(model.spec, 2, seeded(seed, 0), label)
    noise, cond = arc(a, b, n), None if cond is None else cond[:1].repeat(n)
    together = 1 if (sampler or model.spec.sampler) in STOCHASTIC and steps > 1 else n
    x = torch.cat(
        [
            sample(
                model,
                x0.to(device),
                steps=steps,
                cond=None if cond is None else cond[: len(x0)].to(device),
                guidance=guidance,
                force_guidance=force_guidance,
                sampler=sampler,
            )
            for x0 in torch.split(noise, together)
        ]
    ).cpu()
    return x.clamp(-1, 1) if model.spec.data == "[-1, 1]" else x, cond


def check_length(n: int) -> None:
    """Raise `UserError` unless a strip has two ends."""
    if n < 2:
        raise UserError(f"an interpolation needs n of at least 2, not {n}")

"""Sliced Wasserstein distance (Bonneel et al. 2015).

    SW_2^2(a, b) = E_theta W_2^2(theta . a, theta . b),   theta uniform on the sphere

In one dimension W_2^2 is the integral over [0, 1] of the squared difference of the two quantile
functions. Those of samples are steps, so the integral is a finite sum: exact for any N and M.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from anystep.errors import UserError
from anystep.metrics.frechet import feature_pair


def sliced_wasserstein(
    a: Tensor, b: Tensor, *, projections: int = 256, generator: torch.Generator | None = None
) -> float:
    """SW_2 of points `a` (N, D) and `b` (M, D), in [0, inf), over random directions.

    Without a generator the directions are the same in every call.

    Raises:
        UserError: `projections` is below 1, a set is empty, or the two do not match.
    """
    if projections < 1:
        raise UserError(f"projections must be 1 or more, not {projections}")
    a, b = feature_pair(a, b)
    theta = _directions(a.shape[1], projections, generator or torch.Generator().manual_seed(0))
    squared = _wasserstein_squared(a @ theta.to(a.device), b @ theta.to(a.device))
    return float(squared.mean().sqrt())


def _directions(dims: int, count: int, generator: torch.Generator) -> Tensor:
    """Unit vectors (D, count), uniform on the sphere."""
    device, dtype = generator.device, torch.float64
    normal = torch.randn(dims, count, dtype=dtype, device=device, generator=generator)
    return F.normalize(normal, dim=0)


def _wasserstein_squared(a: Tensor, b: Tensor) -> Tensor:
    """W_2^2 (P,) between the columns of `a` (N, P) and `b` (M, P)."""
    n, m = len(a), len(b)
    # In units of 1 / (N M), the quantile functions step at multiples of M and of N.
    steps = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(m) * n])).to(a.device)
    start, weight = steps[:-1], steps.diff().double().div(n * m)
    gap: Tensor = a.sort(0).values[start // m] - b.sort(0).values[start // n]
    return gap.square().T.mv(weight)

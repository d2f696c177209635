"""Fréchet distance between two sets of features (Heusel et al. 2017, Eq. 6).

The squared 2-Wasserstein distance between the Gaussians fitted to each set:

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})

S_a S_b is not symmetric, but it has the eigenvalues of S_a^{1/2} S_b S_a^{1/2}, which is: two
symmetric eigendecompositions do, and both stay sound when the covariances are singular.

With few rows the estimate is too large (its bias shrinks as 1/N and grows with D), so only
distances at equal N are comparable. With the features of the Inception network it is the FID.
"""

import torch
from torch import Tensor

from anystep.errors import UserError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of features `a` (N, D) and `b` (M, D), in [0, inf); N < D is fine.

    Raises:
        UserError: a set has fewer than 2 rows, or the two do not match.
    """
    a, b = feature_pair(a, b, least=2)
    return frechet_from_moments(*moments(a), *moments(b))


def frechet_from_moments(mu_a: Tensor, cov_a: Tensor, mu_b: Tensor, cov_b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}): means (D,), covariances (D, D)."""
    mu_a, cov_a, mu_b, cov_b = (m.double() for m in (mu_a, cov_a, mu_b, cov_b))
    means = (mu_a - mu_b).square().sum()
    covariances = cov_a.trace() + cov_b.trace() - 2 * _trace_of_root(cov_a, cov_b)
    return max(0.0, float(means + covariances))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the unbiased covariance (D, D) of the rows of `x` (N, D)."""
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - 1)


def feature_pair(a: Tensor, b: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Two sets of features, (N, D) and (M, D), as float64 on the device of `a`.

    Raises:
        UserError: a set is not a matrix of `least` or more rows, holds NaN or infinity, or has
            another number of columns than the other.
    """
    for x in (a, b):
        if x.ndim != 2 or len(x) < least:
            shape = tuple(x.shape)
            raise UserError(f"features must be (N, D) with {least} rows or more, not {shape}")
        if not x.isfinite().all():
            raise UserError("the features contain NaN or infinity; so, it seems, do the samples")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"the sets have {a.shape[1]} and {b.shape[1]} features; use one kind")
    return a.double(), b.to(a.device).double()


def _trace_of_root(cov_a: Tensor, cov_b: Tensor) -> Tensor:
    """The trace of (S_a S_b)^{1/2}, that is of (S_a^{1/2} S_b S_a^{1/2})^{1/2}."""
    values, vectors = torch.linalg.eigh(cov_a)
    # Rounding leaves eigenvalues of about -1e-16 where the covariance is singular.
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    squares: Tensor = torch.linalg.eigvalsh(root @ cov_b @ root)
    return squares.clamp(min=0).sqrt().sum()

"""Kernel distance between two sets of features (Binkowski et al. 2018).

The unbiased estimate of the squared maximum mean discrepancy

    MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (x . y / D + 1)^3

over pairs of different rows. It is computed exactly, over all pairs, in blocks that bound the
memory; the usual averaging over random subsets is left out, so nothing is drawn. With the
features of the Inception network it is the KID.
"""

import torch
from torch import Tensor

from anystep.metrics.frechet import feature_pair

BLOCK = 1024  # rows of the kernel matrix held at once


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased MMD^2 of features `a` (N, D) and `b` (M, D).

    It is 0 on average for two samples of one distribution, so it may be slightly negative.

    Raises:
        UserError: a set has fewer than 2 rows, or the two do not match.
    """
    a, b = feature_pair(a, b, least=2)
    between = _kernel_sum(a, b) / (len(a) * len(b))
    return float(_mean_of_pairs(a) + _mean_of_pairs(b) - 2 * between)


def _kernel(dot: Tensor, dims: int) -> Tensor:
    """(x . y / D + 1)^3 of given dot products."""
    return (dot / dims + 1) ** 3


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum of k(a_i, b_j) over all i and j."""
    sums = [_kernel(rows @ b.T, a.shape[1]).sum() for rows in torch.split(a, BLOCK)]
    return sum(sums, start=a.new_zeros(()))


def _mean_of_pairs(x: Tensor) -> Tensor:
    """The mean of k(x_i, x_j) over i != j."""
    diagonal = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

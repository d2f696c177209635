"""Improved precision and recall (Kynkäänniemi et al. 2019, Eqs. 1 and 2).

The manifold of a set is the union of the balls around its points that reach to each point's
k-th nearest neighbour in the set:

    precision = the share of generated points inside the manifold of the real ones (quality)
    recall    = the share of real points inside the manifold of the generated ones (coverage)

Both depend on the number of points; compare them at equal N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.metrics.frechet import feature_pair

BLOCK = 1024  # rows of the distance matrix held at once


class PrecisionRecall(NamedTuple):
    """Precision and recall, each in [0, 1]; more is better."""

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """Precision and recall of features `generated` (M, D) against `real` (N, D).

    Raises:
        UserError: `k` is below 1, a set has no more than `k` rows, or the two do not match.
    """
    if k < 1:
        raise UserError(f"k must be 1 or more, not {k}")
    real, generated = feature_pair(real, generated, least=k + 1)
    precision = _share_inside(generated, real, _radii(real, k))
    recall = _share_inside(real, generated, _radii(generated, k))
    return PrecisionRecall(precision, recall)


def _radii(points: Tensor, k: int) -> Tensor:
    """The distance (N,) from each point to the k-th nearest of the others."""
    # Each point is the nearest to itself, at distance 0: hence k + 1.
    blocks = (torch.cdist(rows, points) for rows in torch.split(points, BLOCK))
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in blocks])


def _share_inside(queries: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of queries that lie in at least one of the balls."""
    blocks = (torch.cdist(rows, centres) for rows in torch.split(queries, BLOCK))
    inside = torch.cat([(block <= radii).any(dim=1) for block in blocks])
    return float(inside.double().mean())

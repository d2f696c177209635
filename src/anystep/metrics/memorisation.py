"""Memorisation: are samples nearer to the training images than fresh images are?

For each sample the distance to its nearest training image (L2 on the flattened pixels) is set
against the same distance of held-out images, which training has never seen. The idea of this
three-sample comparison is that of Meehan et al. (2020); the two summaries are plainer than their
test. Copies in pixel space only are seen: a shifted or recoloured copy is not near in L2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from anystep.errors import UserError

BLOCK = 1024  # training images compared at once


class Memorisation(NamedTuple):
    """How near samples lie to the training images.

    Attributes:
        generated_to_train: median distance from a sample to its nearest training image.
        held_out_to_train: the same for held-out images.
        ratio: the first over the second: about 1 for fresh draws, well below 1 for copies.
        share_closer: share of samples no farther from a training image than the closest 5 % of
            held-out images: 0.05 for fresh draws, 1 for copies.
    """

    generated_to_train: float
    held_out_to_train: float
    ratio: float
    share_closer: float


def memorisation(generated: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compare the distances of `generated` and `held_out` to `train`.

    The sets are (N, *shape), of any N each, all in one scale. Time goes with the number of
    training images times that of the others.

    Raises:
        UserError: a set is empty, or the sets differ in shape or in scale.
    """
    _check(generated, train, held_out)
    ours, fresh = nearest_distances(generated, train), nearest_distances(held_out, train)
    share = (ours <= fresh.quantile(0.05)).double().mean()
    # Divided as tensors: 0 / 0 is nan, not an exception, where held-out images are copies too.
    near, far = ours.quantile(0.5), fresh.quantile(0.5)
    return Memorisation(float(near), float(far), float(near / far), float(share))


def nearest_distances(queries: Tensor, points: Tensor) -> Tensor:
    """The L2 distance (N,) from each of `queries` (N, *shape) to the nearest of `points`."""
    queries = queries.flatten(1).double()
    best = torch.full_like(queries[:, 0], torch.inf)
    for block in torch.split(points.flatten(1), BLOCK):
        rows = block.to(queries)
        # cdist finds the nearest fast but rounds small distances, so that one is taken again.
        nearest = rows[torch.cdist(queries, rows).argmin(1)]
        best = best.minimum((queries - nearest).norm(dim=1))
    return best


def _check(generated: Tensor, train: Tensor, held_out: Tensor) -> None:
    sets = {"generated": generated, "train": train, "held_out": held_out}
    for name, x in sets.items():
        if len(x) == 0:
            raise UserError(f"memorisation compares three sets, and {name} is empty")
        if x.shape[1:] != train.shape[1:]:
            raise UserError(f"{name} has shape {tuple(x.shape[1:])}, not {tuple(train.shape[1:])}")
        if x.is_floating_point() != train.is_floating_point():
            raise UserError(f"{name} is {x.dtype} and train is {train.dtype}: use one scale")

"""Conditional metrics: does a sample show the class asked for, and do the classes still vary?

The two belong together. Accuracy alone is greatest for a model that always draws the mean of
the class; the variance within classes shows that one up:

    var_c = sum_j Var(x_j | class c)          (unbiased, over the flattened dimensions j)
    ratio = mean_c var_c(samples) / var_c(data)

The ratio is taken class by class, so that it does not depend on how often each class occurs.
"""

import torch
from torch import Tensor

from anystep.errors import UserError


def class_accuracy(predicted: Tensor, asked: Tensor) -> float:
    """The share of samples, in [0, 1], whose predicted class (N,) is the class asked for (N,).

    Raises:
        UserError: there are no labels, or not as many of the one as of the other.
    """
    if predicted.shape != asked.shape or predicted.numel() == 0:
        shapes = f"{tuple(predicted.shape)} and {tuple(asked.shape)}"
        raise UserError(f"accuracy needs one predicted and one asked class a sample, not {shapes}")
    return float((predicted == asked.to(predicted.device)).double().mean())


def within_class_variance(x: Tensor, labels: Tensor) -> float:
    """mean_c var_c of `x` (N, *shape) over the classes with 2 members or more; in [0, inf).

    Raises:
        UserError: no class has 2 members, or there is not one label an example.
    """
    return _mean(list(_class_variances(x, labels).values()))


def variance_ratio(x: Tensor, labels: Tensor, data_x: Tensor, data_labels: Tensor) -> float:
    """mean_c var_c(x) / var_c(data) over the classes with 2 members or more in both.

    About 1 when samples vary as the data do, 0 for one image a class; inf when a class of the
    data does not vary.

    Raises:
        UserError: no class has 2 members in both, or there is not one label an example.
    """
    ours, data = _class_variances(x, labels), _class_variances(data_x, data_labels)
    return _mean([ours[c] / data[c].to(ours[c].device) for c in ours if c in data])


def _class_variances(x: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """var_c of each class c that has 2 members or more."""
    if len(x) != len(labels):
        raise UserError(f"{len(x)} examples need as many labels, not {len(labels)}")
    classes, counts = torch.unique(labels, return_counts=True)
    present = classes[counts >= 2].tolist()
    return {c: x[labels == c].flatten(1).double().var(0).sum() for c in present}


def _mean(values: list[Tensor]) -> float:
    if not values:
        raise UserError("no class has two examples: draw more samples a class")
    return float(torch.stack(values).mean())

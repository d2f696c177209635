"""The target that makes two points of a path point to the same end: the consistency methods.

Source: Song et al., "Consistency Models" (arXiv 2303.01469), in the velocity form of the shortcut
authors' code.
"""

import torch
from torch import Tensor

from anystep.path import data_from_velocity, velocity_from_data
from anystep.spec import Network


@torch.no_grad()
def endpoint_target(
    net: Network, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor, cond: Tensor | None
) -> Tensor:
    """The velocity from x_t to where `net` says that the path through x_s ends.

    Args:
        net: the network asked, usually an EMA; no gradient flows.
        x_s: (B, *shape), the later point.
        s: (B,), its time, up to 1, where x_s is the end itself.
        x_t: (B, *shape), the earlier point.
        t: (B,), its time, below 1.
        cond: class ids (B,) or None.

    Returns:
        (B, *shape).
    """
    end = data_from_velocity(x_s, net(x_s, s, 1 - s, cond), s)
    return velocity_from_data(x_t, end, t)

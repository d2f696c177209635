"""Counting compute: rows that pass through networks, a backward as two forwards.

The count is made by hooks around the networks, not from a formula, so targets, teachers,
simulations and guidance are all in it. A run counts its own networks; what its teacher took
before, and pairs, were counted when they were made.
"""

from typing import Any

import torch
from torch import nn

BACKWARD = 2  # forwards that a backward costs


class ForwardCounter:
    """Counts the forward-equivalents of every network it watches.

    A row through a network whose weights will get a gradient counts 1 + `BACKWARD`, any other
    row 1.

    Attributes:
        rows: the count so far.
    """

    def __init__(self, *networks: nn.Module | None, rows: int = 0) -> None:
        self.rows = rows
        for network in networks:
            if network is not None:
                network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        trained = torch.is_grad_enabled() and next(network.parameters()).requires_grad
        self.rows += len(args[0]) * (1 + BACKWARD if trained else 1)

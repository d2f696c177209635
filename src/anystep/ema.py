"""Exponential moving average of a network's weights."""

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def warmed_up(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): the decay after `step` earlier updates.

    Until the decay is reached the average spans the last ninth of the run so far, so that the
    horizon fits a short run and the initial weights are soon forgotten.
    """
    return min(decay, (1 + step) / (10 + step))


def update(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """Ema <- decay ema + (1 - decay) net, in place, for all parameters."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    average(list(ema.parameters()), list(net.parameters()), 0)

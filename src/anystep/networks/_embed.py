"""Embeddings that every network shares: time, step level and class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anystep.spec import finest_level


def sinusoid(value: Tensor, dim: int = 256, max_period: float = 10_000) -> Tensor:
    """(B,) -> (B, dim) float32: dim/2 cosines, then dim/2 sines, of falling frequency.

    Source: the timestep embedding of Peebles and Xie, DiT (arXiv 2212.09748).
    """
    angle = value.float()[:, None] * sinusoid_rates(dim, max_period, value.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sinusoid_rates(
    dim: int = 256, max_period: float = 10_000, device: torch.device | None = None
) -> Tensor:
    """The angular frequencies (dim/2,) of `sinusoid`, from 1 falling to nearly 1 / max_period."""
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=device) / (dim // 2)
    return torch.exp(-math.log(max_period) * exponent)


def step_level(d: Tensor, finest: int) -> Tensor:
    """Level j = -log2 d of step sizes d (B,); every d <= 1/M, and so d = 0, is level log2 M."""
    return -torch.log2(d.float().clamp(min=2.0 ** -finest_level(finest)))


class ScalarEmbedding(nn.Module):
    """A number a row -> a vector of `width`: sinusoid, then two layers, always in float32.

    Low precision here would blur neighbouring times, so autocast is left at the door.
    """

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.hidden = nn.Linear(features, width)
        self.output = nn.Linear(width, width)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, value: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        with torch.autocast(value.device.type, enabled=False):
            features = sinusoid(value, self.features).to(self.hidden.weight.dtype)
            out: Tensor = self.output(F.silu(self.hidden(features)))
        return out

    @torch.no_grad()
    def silence(self) -> None:
        """Answer zero to every number, until training changes it."""
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @torch.no_grad()
    def hold(self, value: float) -> None:
        """Answer to every number what is answered to `value`, until training changes it."""
        held = self(torch.full((1,), value, device=self.output.bias.device))[0]
        self.silence()
        self.output.bias.copy_(held)


class Conditioning(nn.Module):
    """c (B, width): the sum of the embeddings of t, of the level of d, and of the class.

    Args:
        width: size of c.
        num_classes: 0 for none.
        finest: M.
        time_scale: t is multiplied by this before its sinusoid.
    """

    def __init__(self, width: int, num_classes: int, finest: int, time_scale: float) -> None:
        super().__init__()
        self.finest, self.time_scale = finest, time_scale
        self.null_label = num_classes or None
        self.time = ScalarEmbedding(width)
        self.level = ScalarEmbedding(width)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forget_steps(self) -> None:
        """Give every level the embedding of the finest, which is that of d = 0."""
        self.level.hold(finest_level(self.finest))

    def forward(self, t: Tensor, d: Tensor, cond: Tensor | None) -> Tensor:
        """T (B,), d (B,), class ids (B,) or None for the null label."""
        c: Tensor = self.time(t * self.time_scale) + self.level(step_level(d, self.finest))
        if self.label is None:
            return c
        if cond is None:
            cond = torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.long)
        label: Tensor = self.label(cond)
        return c + label

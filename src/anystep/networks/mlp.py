"""A residual MLP for vectors, modulated by time, step size and class as a DiT's blocks are."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from anystep.errors import UserError
from anystep.networks import NetworkConfig
from anystep.networks._embed import Conditioning


@dataclass(frozen=True)
class MLPConfig(NetworkConfig):
    """An MLP.

    Attributes:
        width: hidden features.
        depth: number of residual blocks.
        time_scale: factor on t before its sinusoid; smaller is smoother in t.
    """

    width: int = 128
    depth: int = 3
    time_scale: float = 100.0

    def build(self, shape: tuple[int, ...], num_classes: int = 0, finest: int = 128) -> "MLP":
        """The network for vectors (D,)."""
        if len(shape) != 1:
            raise UserError(
                f"an mlp takes vectors (D,), not samples of shape {shape}; images take a dit"
            )
        if self.width < 1 or self.depth < 1:
            raise UserError("width and depth of an mlp must be at least 1")
        return MLP(self, shape[0], num_classes, finest)


class MLP(nn.Module):
    """`net(x, t, d, cond) -> u` for vectors x (B, D)."""

    def __init__(self, config: MLPConfig, size: int, num_classes: int, finest: int) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.conditioning = Conditioning(width, num_classes, finest, config.time_scale)
        self.input = nn.Linear(size, width)
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(config.depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(config.depth)
        )
        self.output = nn.Linear(width, size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def null_label(self) -> int | None:
        """The class id that stands for no condition; None without classes."""
        return self.conditioning.null_label

    def forget_steps(self) -> None:
        """Answer every d as d = 0 was answered, until training changes it."""
        self.conditioning.forget_steps()

    def forward(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """U (B, D) for x (B, D), t (B,), d (B,), class ids (B,) or None."""
        h, c = self.input(x), F.silu(self.conditioning(t, d, cond))
        for modulation, block in zip(self.modulations, self.blocks, strict=True):
            shift, scale = modulation(c).chunk(2, dim=-1)
            h = h + block(h * (1 + scale) + shift)
        out: Tensor = self.output(F.silu(h)).to(x.dtype)
        return out

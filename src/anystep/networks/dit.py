"""Diffusion transformer (DiT) conditioned on time, step size and class.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), with
the step-size embedding of Frans et al. (arXiv 2410.12557). `DiTConfig.authors` is the network of
the latter's published code: t is not multiplied by 1000, attention logits are scaled by
1 / head_dim rather than its root, and the modulation of the blocks starts from Xavier values
where adaLN-Zero starts from zero. Positions are fixed sines and cosines in both.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anystep.errors import UserError
from anystep.networks import NetworkConfig
from anystep.networks._embed import Conditioning, sinusoid

SIZES = {  # width, depth, heads
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """A DiT.

    Attributes:
        patch: side of a square patch; divides both sides of the image.
        width: features a token; a multiple of `heads`, and of 4 for the positions.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden features of a block's MLP over `width`.
        time_scale: factor on t before its sinusoid.
        root_scale: scale attention logits by 1 / sqrt(head_dim) instead of 1 / head_dim.
        zero_modulation: start the blocks' modulation at zero (adaLN-Zero) instead of Xavier.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    time_scale: float = 1000.0
    root_scale: bool = True
    zero_modulation: bool = True

    @classmethod
    def size(cls, name: str, **changes: Any) -> "DiTConfig":
        """A size of the DiT paper with its patch, such as "B/2"; `changes` are other fields.

        Raises:
            UserError: no such size.
        """
        size, _, patch = name.partition("/")
        if size not in SIZES or not patch.isdigit():
            raise UserError(f"unknown DiT size {name!r}; write one of {', '.join(SIZES)}, as S/2")
        width, depth, heads = SIZES[size]
        return cls(patch=int(patch), width=width, depth=depth, heads=heads, **changes)

    @classmethod
    def authors(cls, **changes: Any) -> "DiTConfig":
        """The options of the shortcut authors' network; `changes` are sizes."""
        return cls(time_scale=1.0, root_scale=False, zero_modulation=False, **changes)

    def build(self, shape: tuple[int, ...], num_classes: int = 0, finest: int = 128) -> "DiT":
        """The network for images (C, H, W)."""
        return DiT(self, shape, num_classes, finest)


class DiT(nn.Module):
    """`net(x, t, d, cond) -> u` for images x (B, C, H, W) of one size."""

    def __init__(
        self, config: DiTConfig, shape: tuple[int, ...], num_classes: int, finest: int
    ) -> None:
        super().__init__()
        check(config, shape)
        self.config, self.shape = config, shape
        channels, height, width = shape
        self.grid = (height // config.patch, width // config.patch)
        self.patchify = nn.Conv2d(channels, config.width, config.patch, config.patch)
        self.conditioning = Conditioning(config.width, num_classes, finest, config.time_scale)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.patch**2 * channels)
        self.register_buffer("positions", positions(self.grid, config.width), persistent=False)
        xavier(self.patchify)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def null_label(self) -> int | None:
        """The class id that stands for no condition; None without classes."""
        return self.conditioning.null_label

    def forward(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """U (B, C, H, W) for x (B, C, H, W), t (B,), d (B,), class ids (B,) or None."""
        if x.shape[1:] != self.shape:
            raise UserError(f"this network takes {self.shape}, not {tuple(x.shape[1:])}")
        h = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        c = F.silu(self.conditioning(t, d, cond))
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.unpatchify(self.output(modulate(h, shift, scale))).to(x.dtype)

    def unpatchify(self, h: Tensor) -> Tensor:
        """Tokens (B, rows * columns, p * p * C), in the order p, p, C, to (B, C, H, W)."""
        (rows, columns), p, channels = self.grid, self.config.patch, self.shape[0]
        batch = h.shape[0]  # len() would fix it in an exported graph
        h = h.reshape(batch, rows, columns, p, p, channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(batch, *self.shape)


class Block(nn.Module):
    """Attention and an MLP, each modulated by the conditioning and gated into the residual.

    Attributes:
        few_tokens: up to so many, attention on the CPU is two plain products: the kernel that
            never holds all logits works in pieces too small to be fast (benchmarks/step.py).
    """

    few_tokens = 64

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.heads = config.heads
        head_dim = width // config.heads
        self.scale = head_dim**-0.5 if config.root_scale else 1 / head_dim
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        )
        xavier(self.qkv, parts=3)
        for layer in (self.modulation, self.project, self.mlp[0], self.mlp[2]):
            xavier(layer)
        if config.zero_modulation:
            nn.init.zeros_(self.modulation.weight)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens h (B, N, width) under the activated conditioning c (B, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )
        h = h + gate_a * self.attend(modulate(h, shift_a, scale_a))
        out: Tensor = h + gate_m * self.mlp(modulate(h, shift_m, scale_m))
        return out

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over the tokens (B, N, width)."""
        batch, tokens, width = h.shape
        qkv = self.qkv(h).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if h.device.type == "cpu" and tokens <= self.few_tokens:
            h = (q * self.scale @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out: Tensor = self.project(h.transpose(1, 2).reshape(batch, tokens, width))
        return out


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then (1 + scale) and shift."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (rows * columns, width): columns in the first half, rows in the second.

    Each half is width/4 sines, then width/4 cosines, of base 10,000 (as in DiT).
    """
    row, column = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    halves = [sinusoid(axis.flatten(), width // 2) for axis in (column, row)]
    return torch.cat([half.roll(width // 4, dims=1) for half in halves], dim=1)


def xavier(layer: nn.Module, parts: int = 1) -> None:
    """Xavier-uniform weights, zero bias; `parts` matrices stacked in one are drawn apart."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    for part in layer.weight.data.chunk(parts):
        nn.init.xavier_uniform_(part.flatten(1))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def check(config: DiTConfig, shape: tuple[int, ...]) -> None:
    """Raise `UserError` unless `config` can be built for samples of `shape`."""
    if len(shape) != 3:
        raise UserError(
            f"a DiT takes images (C, H, W), not samples of shape {shape}; vectors take an mlp"
        )
    if min(config.patch, config.width, config.depth, config.heads, config.mlp_ratio) <= 0:
        raise UserError("patch, width, depth, heads and mlp_ratio must be positive")
    if any(side < 1 or side % config.patch for side in shape[1:]):
        raise UserError(
            f"patch {config.patch} does not divide the image's {shape[1]}x{shape[2]}; choose "
            f"--network.patch or the image size so that it does"
        )
    if config.width % config.heads or config.width % 4:
        raise UserError(
            f"width {config.width} must be a multiple of 4 and of the {config.heads} heads"
        )

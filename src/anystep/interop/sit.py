"""Read velocity networks in the layout of the DiT and SiT repositories of Meta.

Source: github.com/facebookresearch/DiT and github.com/willisma/SiT (arXiv 2401.08740), whose
parameter names REPA and most ImageNet codes share. A SiT is our DiT without a step size, so it is
read into one whose step embedding answers zero: u(x, t, d) is the flow's velocity at every d, and
a start for a shortcut model.

| code | noise at | velocity | t is fed as |
|------|----------|----------|-------------|
| SiT  | t = 0    | x1 - x0  | itself      |
| REPA | t = 1    | x0 - x1  | itself      |

With noise at t = 1 both are turned here and for good: the sign by the output layer, the time by
the first layer of its embedding, since the cosine and sine of w (1 - t) are those of w t, rotated.
A DiT proper predicts noise at 1000 timesteps: it is no velocity network and is not read.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anystep.checkpoint import read_tensors
from anystep.errors import UserError
from anystep.networks._embed import sinusoid_rates
from anystep.networks.dit import DiT, DiTConfig, heads_of, positions
from anystep.objectives.flow_matching import FlowMatching
from anystep.spec import Model, ModelSpec, VAESpec

TOP = {
    "patchify": "x_embedder.proj",
    "conditioning.time.hidden": "t_embedder.mlp.0",
    "conditioning.time.output": "t_embedder.mlp.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "output": "final_layer.linear",
}
BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "project": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
LABELS, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
TRAINING_ONLY = "projectors."  # REPA's heads, which sampling never uses


def load_model(
    path: Path,
    *,
    noise_at: int = 0,
    time_scale: float = 1.0,
    heads: int | None = None,
    pixels: bool = False,
    vae: VAESpec | None = None,
) -> Model:
    """The flow-matching model of a safetensors file.

    Args:
        path: the file.
        noise_at: the time, 0 or 1, at which their samples are noise.
        time_scale: factor on their t before its sinusoid.
        heads: attention heads; by default those of the DiT of that width and depth.
        pixels: samples are images in [-1, 1], not latents.
        vae: the autoencoder of the latents.

    Raises:
        UserError: the file is damaged, or of another layout.
    """
    net = load_network(read_tensors(path), noise_at=noise_at, time_scale=time_scale, heads=heads)
    base = ModelSpec(net.shape, net.null_label or 0, data="[-1, 1]" if pixels else "raw", vae=vae)
    return Model(net, FlowMatching().spec(base)).eval()


def load_network(
    weights: Mapping[str, Tensor],
    *,
    noise_at: int = 0,
    time_scale: float = 1.0,
    heads: int | None = None,
) -> DiT:
    """The DiT that computes the velocity u(x, t, 0), whatever the step.

    Raises:
        UserError: the layout is another, or positions are not the fixed ones.
    """
    weights = {k: v.float() for k, v in weights.items() if not k.startswith(TRAINING_ONLY)}
    if noise_at not in (0, 1):
        raise UserError(f"noise is at time 0 or 1, not {noise_at}")
    patchify = _get(weights, "x_embedder.proj.weight")
    width, channels, patch = patchify.shape[:3]
    tokens = _get(weights, POSITIONS).shape[1]
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    config = DiTConfig(
        patch=patch,
        width=width,
        depth=depth,
        heads=heads or heads_of(width, depth),
        mlp_ratio=len(_get(weights, "blocks.0.mlp.fc1.weight")) / width,
        time_scale=time_scale,
    )
    side = math.isqrt(tokens) * patch
    classes = len(weights[LABELS]) - 1 if LABELS in weights else 0
    net = config.build((channels, side, side), classes)
    _check_positions(weights, net)
    try:
        net.load_state_dict(_state_dict(weights, net, turn=noise_at == 1))
    except RuntimeError as error:
        raise UserError(f"the weights do not fit: {str(error).splitlines()[-1].strip()}") from None
    return net.eval()


def _state_dict(weights: Mapping[str, Tensor], net: DiT, turn: bool) -> dict[str, Tensor]:
    """Our state dict; `turn` puts the noise from t = 1 to t = 0."""
    layers = dict(TOP)
    for k in range(net.config.depth):
        layers |= {f"blocks.{k}.{ours}": f"blocks.{k}.{theirs}" for ours, theirs in BLOCK.items()}
    state, used = {}, {POSITIONS}
    for ours, theirs in layers.items():
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = _get(weights, f"{theirs}.{part}")
            used.add(f"{theirs}.{part}")
    if LABELS in weights:
        state["conditioning.label.weight"] = weights[LABELS]
        used.add(LABELS)
    unknown = sorted(weights.keys() - used)
    if unknown:
        raise UserError(f"this is not the layout of DiT and SiT: it has {unknown[0]!r}")
    for part in ("output.weight", "output.bias"):
        state[part] = _velocity(state[part], net) * (-1 if turn else 1)
    if turn:
        hidden = "conditioning.time.hidden.weight"
        state[hidden] = _turned(state[hidden], net.config.time_scale)
    level = net.conditioning.level
    level.silence()
    return state | {f"conditioning.level.{k}": v for k, v in level.state_dict().items()}


def _velocity(layer: Tensor, net: DiT) -> Tensor:
    """Of an output layer's rows those of the velocity: of twice the channels, the first half."""
    patch, channels = net.config.patch, net.shape[0]
    if len(layer) != 2 * patch**2 * channels:
        return layer
    return layer.reshape(patch**2, 2 * channels, *layer.shape[1:])[:, :channels].flatten(0, 1)


def _turned(hidden: Tensor, scale: float) -> Tensor:
    """The first layer (width, features) of an embedding of s (1 - t), as one of s t.

    Its features are cosines, then sines, of angles a - b with a = w s and b = w s t:
    cos(a - b) = cos a cos b + sin a sin b, sin(a - b) = sin a cos b - cos a sin b.
    """
    angle = sinusoid_rates(hidden.shape[1]).double() * scale
    of_cos, of_sin = hidden.double().chunk(2, dim=1)
    turned = [
        of_cos * angle.cos() + of_sin * angle.sin(),
        of_cos * angle.sin() - of_sin * angle.cos(),
    ]
    return torch.cat(turned, dim=1).to(hidden.dtype)


def _check_positions(weights: Mapping[str, Tensor], net: DiT) -> None:
    theirs, ours = weights[POSITIONS][0], positions(net.grid, net.config.width)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4):
        raise UserError("these positions are not the fixed sines and cosines of a square grid")


def _get(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise UserError(f"this is not the layout of DiT and SiT: it has no {name!r}")
    return weights[name]

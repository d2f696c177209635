"""Read models of the shortcut authors' JAX code (github.com/kvfrans/shortcut-models).

Their checkpoint is a pickle of `{"train_state": {"params", "params_ema", "opt_state", "step"}}`,
read without running what it asks for. Its parameters are Flax names such as
`DiTBlock_0/Dense_0/kernel`. Dense kernels are (in, out) and images channels-last there; here they
are (out, in) and channels-first.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from anystep.errors import UserError
from anystep.interop.pickles import read_pickle
from anystep.networks.dit import DiT, DiTConfig, heads_of
from anystep.objectives.shortcut import Shortcut
from anystep.registry import flatten
from anystep.spec import Model, ModelSpec, VAESpec

FINEST = 128  # the authors' denoise_timesteps
GUIDANCE = 1.5  # in the targets of their class-conditional models

TOP = {
    "patchify": "PatchEmbed_0/Conv_0",
    "conditioning.time.hidden": "TimestepEmbedder_0/Dense_0",
    "conditioning.time.output": "TimestepEmbedder_0/Dense_1",
    "conditioning.level.hidden": "TimestepEmbedder_1/Dense_0",
    "conditioning.level.output": "TimestepEmbedder_1/Dense_1",
    "modulation": "FinalLayer_0/Dense_0",
    "output": "FinalLayer_0/Dense_1",
}
BLOCK = {
    "modulation": ("Dense_0",),
    "qkv": ("Dense_2", "Dense_1", "Dense_3"),  # the authors' order is key, query, value
    "project": ("Dense_4",),
    "mlp.0": ("MlpBlock_0/Dense_0",),
    "mlp.2": ("MlpBlock_0/Dense_1",),
}
LABELS = "LabelEmbedder_0/Embed_0/embedding"
PATCH = "PatchEmbed_0/Conv_0/kernel"


def load_model(
    path: Path,
    *,
    raw: bool = False,
    heads: int | None = None,
    size: int = 32,
    guidance: float | None = None,
    pixels: bool = False,
    vae: VAESpec | None = None,
) -> Model:
    """The shortcut model of a checkpoint, asked what the authors ask it.

    A table of one class is that of an unconditional model: the authors replace its label by the
    null label in every row, so the embedding of that is added to the time's for good.

    Args:
        path: the pickle.
        raw: take the weights themselves instead of their EMA.
        heads: attention heads; by default those of the DiT of that width and depth.
        size: side of the square image (of the latent, for a latent model).
        guidance: in the targets it was trained on; by default 1.5 for a model of several
            classes, as in the authors' commands, and none for one of one class.
        pixels: samples are images in [-1, 1], not latents.
        vae: the autoencoder of the latents.

    Raises:
        UserError: the file is no such checkpoint, asks for more than arrays, or does not fit.
    """
    params = read_params(path, raw=raw)
    width, _ = _sizes(params)
    net = load_network(
        params,
        num_heads=heads or heads_of(width, _depth(params)),
        patch_size=_patch(params),
        image_size=size,
    )
    classes = net.null_label or 0
    if classes == 1:
        net, classes = without_labels(net), 0
    strength = (GUIDANCE if classes else 1.0) if guidance is None else guidance
    base = ModelSpec(net.shape, classes, data="[-1, 1]" if pixels else "raw", vae=vae)
    return Model(net, replace(Shortcut.authors(), guidance=strength).spec(base)).eval()


def read_params(path: Path, *, raw: bool = False) -> dict[str, Any]:
    """The parameters of a checkpoint by their Flax names: the EMA's, or the raw ones.

    Raises:
        UserError: the file is no such checkpoint, or asks for more than arrays.
    """
    tree, name = read_pickle(path), "params" if raw else "params_ema"
    state = tree.get("train_state") if isinstance(tree, dict) else None
    params = state.get(name) if isinstance(state, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"{path} is no checkpoint of the shortcut authors: no train_state/{name}")
    return {key.replace(".", "/"): value for key, value in flatten(params).items()}


def without_labels(net: DiT) -> DiT:
    """The function of `net` at its null label, as a network without classes."""
    state = dict(net.state_dict())
    null = state.pop("conditioning.label.weight")[-1]
    state["conditioning.time.output.bias"] = state["conditioning.time.output.bias"] + null
    bare = net.config.build(net.shape, 0, FINEST)
    bare.load_state_dict(state)
    return bare.eval()


def load_network(
    params: Mapping[str, ArrayLike], *, num_heads: int, patch_size: int, image_size: int
) -> DiT:
    """The authors' DiT with the weights `params`, computing the same function.

    d = 2^-j is their level j; d = 0 and d = 1/128 are level 7.

    Args:
        params: Flax names without the leading `params/`, to arrays.
        num_heads: attention heads, which the weights do not tell.
        patch_size: side of a patch.
        image_size: side of the square image (of the latent, for a latent model).

    Returns:
        A network for x (B, C, image_size, image_size), in eval mode.

    Raises:
        UserError: a parameter is missing or its shape does not fit.
    """
    if patch_size != _patch(params):
        raise UserError(f"these weights have patches of {_patch(params)}, not {patch_size}")
    (width, channels), depth = _sizes(params), _depth(params)
    hidden = np.shape(_get(params, "DiTBlock_0/MlpBlock_0/Dense_0/kernel"))[1]
    classes = np.shape(_get(params, LABELS))[0] - 1
    config = DiTConfig.authors(
        patch=patch_size, width=width, depth=depth, heads=num_heads, mlp_ratio=hidden / width
    )
    net = config.build((channels, image_size, image_size), classes, FINEST)
    try:
        net.load_state_dict(state_dict(params, depth))
    except RuntimeError as error:
        raise UserError(f"the weights do not fit: {str(error).splitlines()[-1].strip()}") from None
    return net.eval()


def state_dict(params: Mapping[str, ArrayLike], depth: int) -> dict[str, Tensor]:
    """Our state dict from Flax parameters of `depth` blocks."""
    layers: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in TOP.items()}
    for k in range(depth):
        for ours, parts in BLOCK.items():
            layers[f"blocks.{k}.{ours}"] = tuple(f"DiTBlock_{k}/{part}" for part in parts)
    state = {"conditioning.label.weight": _get(params, LABELS)}
    for ours, parts in layers.items():
        kernels = [_get(params, f"{part}/kernel") for part in parts]
        state[f"{ours}.weight"] = torch.cat([_kernel(kernel) for kernel in kernels])
        state[f"{ours}.bias"] = torch.cat([_get(params, f"{part}/bias") for part in parts])
    return state


def _kernel(kernel: Tensor) -> Tensor:
    """Dense (in, out) -> (out, in); convolution (h, w, in, out) -> (out, in, h, w)."""
    return kernel.T if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)


def _sizes(params: Mapping[str, ArrayLike]) -> tuple[int, int]:
    """Width and channels."""
    kernel = _get(params, PATCH)
    return kernel.shape[3], kernel.shape[2]


def _patch(params: Mapping[str, ArrayLike]) -> int:
    """Side of a patch."""
    kernel = _get(params, PATCH)
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1]:
        raise UserError(f"{PATCH} is {tuple(kernel.shape)}, not the kernel of square patches")
    return kernel.shape[0]


def _depth(params: Mapping[str, ArrayLike]) -> int:
    """Number of blocks."""
    return len({name.split("/")[0] for name in params if name.startswith("DiTBlock_")})


def _get(params: Mapping[str, ArrayLike], name: str) -> Tensor:
    if name not in params:
        raise UserError(f"the weights have no parameter {name!r}")
    try:
        return torch.from_numpy(np.array(params[name], dtype=np.float32))
    except (TypeError, ValueError):
        raise UserError(f"the parameter {name!r} is no array of numbers") from None

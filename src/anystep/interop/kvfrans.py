"""Read weights of the shortcut authors' JAX code (github.com/kvfrans/shortcut-models).

Their parameters are Flax names such as `DiTBlock_0/Dense_0/kernel`. Dense kernels are (in, out)
and images channels-last there; here they are (out, in) and channels-first.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from anystep.errors import UserError
from anystep.networks.dit import DiT, DiTConfig

FINEST = 128  # the authors' denoise_timesteps

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
    width, channels = _sizes(params, patch_size)
    depth = len({name.split("/")[0] for name in params if name.startswith("DiTBlock_")})
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


def _sizes(params: Mapping[str, ArrayLike], patch: int) -> tuple[int, int]:
    kernel = _get(params, "PatchEmbed_0/Conv_0/kernel")
    if kernel.ndim != 4 or kernel.shape[:2] != (patch, patch):
        raise UserError(f"these weights have patches {tuple(kernel.shape[:2])}, not {patch}")
    return kernel.shape[3], kernel.shape[2]


def _get(params: Mapping[str, ArrayLike], name: str) -> Tensor:
    if name not in params:
        raise UserError(f"the weights have no parameter {name!r}")
    return torch.from_numpy(np.array(params[name], dtype=np.float32))

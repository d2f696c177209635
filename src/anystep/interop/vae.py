"""The autoencoders of diffusers (`AutoencoderKL`): pictures to moments of latents, and back.

diffusers is imported where it is used; without it a latent model can still be trained and sampled
as latents.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.spec import VAESpec

# What weights do not tell of the function they compute.
SILENT = ("act_fn", "norm_num_groups", "mid_block_add_attention")


class VAE:
    """An `AutoencoderKL`, in float32.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        revision: of the name on the hub; None is its newest.
        subfolder: where in the folder or under the name its files are, such as "vae".
        device: where it runs.

    Raises:
        UserError: diffusers is not installed, or there is no such autoencoder.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        subfolder: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.net = _load(name, revision, subfolder).to(device).eval()
        self.device = torch.device(device)
        config = self.net.config
        if config.get("latents_mean") is not None or config.get("scaling_factor") is None:
            raise UserError(f"the VAE {name} scales its latents by more than one number")
        self.channels = int(config["in_channels"])
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.spec = VAESpec(
            # A folder is found again from anywhere, and its loss is not looked for on the hub.
            str(Path(name).absolute()) if Path(name).is_dir() else name,
            revision,
            subfolder,
            weights_digest(self.net),
            float(config["scaling_factor"]),
            float(config.get("shift_factor") or 0),
        )

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, h, w) of pictures (B, 3, H, W) in [-1, 1], on the CPU."""
        latent = self.net.encode(x.to(self.device)).latent_dist
        return torch.cat([latent.mean, latent.logvar], 1).cpu()

    @torch.no_grad()
    def decode(self, x1: Tensor, batch: int = 16) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1], on the CPU, of a model's samples (N, C, h, w)."""
        latents = x1 / self.spec.scale + self.spec.shift
        parts = [self.net.decode(z.to(self.device)).sample for z in torch.split(latents, batch)]
        return torch.cat([part.clamp(-1, 1).cpu() for part in parts])


def recorded(spec: VAESpec, path: Path | None = None, device: torch.device | str = "cpu") -> VAE:
    """The autoencoder that a model was trained with.

    Args:
        spec: what the model says of it.
        path: the folder where it lies now; where it was found by default.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or is another one.
    """
    if path is not None:
        vae = VAE(str(path), device=device)
    else:
        try:
            vae = VAE(spec.name, spec.revision, spec.subfolder, device)
        except UserError as error:
            raise UserError(f"{error}; say where it lies with --vae FOLDER") from None
    if vae.spec != spec:
        names = ("weights", "scale", "shift")
        pairs = [(name, getattr(spec, name), getattr(vae.spec, name)) for name in names]
        what = ", ".join(f"{name} {a} -> {b}" for name, a, b in pairs if a != b)
        raise UserError(f"{vae.spec.name} is another VAE than the model's, {spec.name} ({what})")
    return vae


def weights_digest(net: Any) -> str:
    """A hash of an autoencoder's weights and of what they do not tell."""
    facts = {key: net.config.get(key) for key in SILENT}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(net.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()[:16]


def _load(name: str, revision: str | None, subfolder: str) -> Any:
    """The network, of safetensors weights alone."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            f"a VAE needs diffusers ({error}): pip install 'anystep[latents]'"
        ) from None
    folder = Path(name)
    local = folder.is_dir() or folder.is_absolute() or len(folder.parts) > 2
    if local and not (folder / subfolder / "config.json").is_file():
        raise UserError(f"there is no VAE in {folder / subfolder}: config.json is missing")
    try:
        return AutoencoderKL.from_pretrained(
            name,
            revision=revision,
            subfolder=subfolder or None,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # without accelerate it warns and falls back to this
        )
    except Exception as error:  # the hub, the config and the weights fail each in their own way
        line = " ".join(str(error).split())
        raise UserError(f"cannot load the VAE {name}: {line}") from None

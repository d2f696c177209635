"""Read a velocity network of diffusers, a `DiTTransformer2DModel`, as a flow-matching model."""

import json

import torch

from anystep.errors import UserError
from anystep.networks.diffusers_dit import DiffusersDiTConfig
from anystep.objectives.flow_matching import FlowMatching
from anystep.spec import Model, ModelSpec, VAESpec


def load_model(
    name: str,
    *,
    subfolder: str = "",
    noise_at: int = 1,
    time_scale: float = 1000.0,
    pixels: bool = False,
    vae: VAESpec | None = None,
) -> Model:
    """The model of a folder, or of a name on the Hugging Face hub; safetensors alone are read.

    Args:
        name: the folder or name.
        subfolder: where in it the transformer is, such as "transformer".
        noise_at: the time, 0 or 1, at which its samples are noise.
        time_scale: factor on its time where it is fed.
        pixels: samples are images in [-1, 1], not latents.
        vae: the autoencoder of the latents.

    Raises:
        UserError: diffusers is not installed, or there is no such network.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise UserError(
            f"this needs diffusers ({error}): pip install 'anystep[latents]'"
        ) from None
    try:
        theirs = DiTTransformer2DModel.from_pretrained(
            name,
            subfolder=subfolder or None,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # without accelerate it warns and falls back to this
        )
    except Exception as error:  # the hub, the config and the weights fail each in their own way
        line = " ".join(str(error).split())
        raise UserError(f"cannot load the DiTTransformer2DModel {name}: {line}") from None
    facts = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    config = DiffusersDiTConfig(json.dumps(facts, sort_keys=True), noise_at, time_scale)
    shape = (theirs.config.in_channels, *[theirs.config.sample_size] * 2)
    base = ModelSpec(
        shape,
        theirs.config.num_embeds_ada_norm,
        data="[-1, 1]" if pixels else "raw",
        vae=vae,
    )
    net = config.build(base.shape, base.num_classes)
    net.theirs.load_state_dict(theirs.state_dict())
    return Model(net, FlowMatching().spec(base)).eval()

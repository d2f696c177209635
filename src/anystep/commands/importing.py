"""anystep import: a model of another code as a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from anystep.arguments import Where, check_folder, parse
from anystep.checkpoint import model_info, save_model
from anystep.errors import UserError
from anystep.interop import from_diffusers, kvfrans, sit
from anystep.interop.vae import VAE
from anystep.registry import unknown
from anystep.spec import Model, VAESpec


@dataclass(frozen=True)
class Common:
    """Options of every source.

    Attributes:
        out: the model folder to write.
        vae: the autoencoder of the latents: a name on the Hugging Face hub, or a folder; without
            one samples are latents.
        vae_subfolder: where the VAE is in a pipeline, such as vae.
        pixels: samples are images in [-1, 1], not latents.
    """

    out: Path
    vae: str | None = None
    vae_subfolder: str = ""
    pixels: bool = False

    def data(self) -> dict[str, Any]:
        """What the samples are."""
        if self.pixels and self.vae is not None:
            raise UserError("pixels are no latents: leave --vae or --pixels out")
        spec: VAESpec | None = None
        if self.vae is not None:
            spec = VAE(self.vae, subfolder=self.vae_subfolder).spec
        return {"pixels": self.pixels, "vae": spec}


@dataclass(frozen=True)
class KvfransArgs(Common):
    """A checkpoint of the shortcut authors' code, a pickle: read without running it.

    Attributes:
        file: the checkpoint.
        raw: take the weights themselves instead of their EMA.
        heads: attention heads; those of the DiT of that width and depth by default.
        size: side of the samples; the weights do not tell it.
        guidance: in the targets it was trained on; by default 1.5 for a class-conditional model.
    """

    file: Where = tyro.MISSING
    raw: bool = False
    heads: int | None = None
    size: int = 32
    guidance: float | None = None

    def load(self) -> Model:
        """The model."""
        return kvfrans.load_model(
            self.file,
            raw=self.raw,
            heads=self.heads,
            size=self.size,
            guidance=self.guidance,
            **self.data(),
        )


@dataclass(frozen=True)
class SitArgs(Common):
    """Velocity weights in the layout of SiT and DiT (SiT, REPA ...), in safetensors.

    Attributes:
        file: the weights.
        noise_at: the time, 0 or 1, at which their samples are noise: 0 in SiT's code, 1 in REPA's.
        time_scale: factor on t before its sinusoid; 1 in both.
        heads: attention heads; those of the DiT of that width and depth by default.
    """

    file: Where = tyro.MISSING
    noise_at: int = 0
    time_scale: float = 1.0
    heads: int | None = None

    def load(self) -> Model:
        """The model."""
        return sit.load_model(
            self.file,
            noise_at=self.noise_at,
            time_scale=self.time_scale,
            heads=self.heads,
            **self.data(),
        )


@dataclass(frozen=True)
class DiffusersArgs(Common):
    """A DiTTransformer2DModel of diffusers that predicts a velocity.

    Attributes:
        name: a folder, or a name on the Hugging Face hub.
        subfolder: where in it the network is, such as transformer.
        noise_at: the time, 0 or 1, at which its samples are noise.
        time_scale: factor on t where it is fed; 1000 for timesteps.
    """

    name: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    subfolder: str = ""
    noise_at: int = 1
    time_scale: float = 1000.0

    def load(self) -> Model:
        """The model."""
        return from_diffusers.load_model(
            self.name,
            subfolder=self.subfolder,
            noise_at=self.noise_at,
            time_scale=self.time_scale,
            **self.data(),
        )


SOURCES: dict[str, Any] = {"kvfrans": KvfransArgs, "sit": SitArgs, "diffusers": DiffusersArgs}


def run(args: Sequence[str]) -> int:
    """Usage: anystep import SOURCE FILE --out FOLDER [--FIELD VALUE].

    SOURCE is one of those below; `anystep import SOURCE --help` lists its options. A flow model
    becomes a shortcut model by `anystep train PRESET --start FOLDER`.
    """
    words = list(args)
    if not words or words[0] in ("-h", "--help"):
        print(str(run.__doc__).replace("\n    ", "\n"))
        for name, source in SOURCES.items():
            print(f"  {name:<11}{str(source.__doc__).splitlines()[0]}")
        return 0 if words else 2
    source = words.pop(0)
    if source not in SOURCES:
        raise UserError(unknown("source", source, SOURCES))
    request = parse(SOURCES[source], words, f"anystep import {source}")
    check_folder(request.out.parent)
    model = request.load()
    origin = {"imported": source, "from": getattr(request, "name", None) or request.file.name}
    save_model(request.out, model.net, model_info(model.net.config, model.spec, origin))
    print(describe(model, request.out))
    return 0


def describe(model: Model, out: Path) -> str:
    """What was read, and what to do with it next."""
    spec = model.spec
    classes = f"{spec.num_classes} classes" if spec.num_classes else "no classes"
    parameters = sum(weight.numel() for weight in model.parameters())
    lines = [f"{parameters:,} parameters for samples {spec.shape} of {classes} in {out}"]
    if spec.guidance != 1:
        lines.append(f"guidance {spec.guidance} is taken to be in its targets (--guidance)")
    if spec.step_input == "zero":
        lines.append(f"next: anystep train PRESET --start {out}")
    else:
        lines.append(f"next: anystep sample {out} --steps 1 --out samples.npz")
    return "\n".join(lines)

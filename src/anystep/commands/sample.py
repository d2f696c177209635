"""anystep sample: draw samples from a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from anystep import checkpoint, figures
from anystep.arguments import Where, check_folder, parse
from anystep.config import pick_device
from anystep.errors import UserError
from anystep.evaluate import generate
from anystep.interop.vae import VAE, recorded
from anystep.interpolation import largest_jump, mix, strip
from anystep.spec import Model, Sampler


@dataclass(frozen=True)
class SampleArgs:
    """Draw samples from a model.

    Attributes:
        model: a run, a checkpoint, a model folder, or owner/name on the Hugging Face hub.
        steps: sampling steps; any whole number from 1.
        n: how many samples.
        out: FILE.npz for arrays, FILE.png for a grid, or a folder for one PNG each. Pictures of
            a latent model are decoded; FILE.npz holds its latents, unless --decode.
        interpolate: draw a strip of n samples of one class along the arc between two noises; in
            FILE.png a mix of its ends, pixel by pixel, stands below it.
        label: one class for all; uniformly random by default.
        guidance: classifier-free guidance strength; 1 is none.
        force_guidance: apply guidance even where it was not trained or is baked in already.
        sampler: euler, consistency, ddim or ancestral; the one the model is meant for by default.
        seed: of noise and labels.
        batch: samples a network call; a strip is drawn in one. The noise that the consistency and
            ancestral samplers add depends on it.
        decode: decode latents in FILE.npz too.
        vae: the folder where the VAE of a latent model lies now; where it was found by default.
        device: auto, cpu or cuda.
    """

    model: Where
    steps: int = 1
    n: int = 64
    out: Path = Path("samples.png")
    interpolate: bool = False
    label: int | None = None
    guidance: float = 1.0
    force_guidance: bool = False
    sampler: Sampler | None = None
    seed: int = 0
    batch: int = 256
    decode: bool = False
    vae: Path | None = None
    device: str = "auto"


def run(args: Sequence[str]) -> int:
    """Draw samples from a model."""
    request = parse(SampleArgs, args, "anystep sample")
    if request.n < 1 or request.batch < 1:
        raise UserError("n and batch must be at least 1")
    if request.interpolate and request.n < 2:
        raise UserError(f"--interpolate needs --n of at least 2, not {request.n}")
    model = checkpoint.load_model(request.model, pick_device(request.device))
    if request.label is not None and not 0 <= request.label < max(model.spec.num_classes, 1):
        raise UserError(
            f"label {request.label} is out of range: classes are 0..{model.spec.num_classes - 1}"
            if model.spec.num_classes
            else "this model is unconditional: it takes no --label"
        )
    check_output(request.out, len(model.spec.shape))
    vae = find_vae(model, request)
    x, cond = interpolate(model, request) if request.interpolate else draw(model, request)
    if not x.isfinite().all():
        raise UserError("the model made NaN or Inf: its weights are broken")
    if vae is not None:
        x = vae.decode(x)
    if request.interpolate:
        pixels = mix(x[0], x[-1], len(x))
        print(f"largest jump: {largest_jump(x):.3f}, of pixels mixed {largest_jump(pixels):.3f}")
    if request.interpolate and request.out.suffix == ".png":
        labels = [f"{request.steps} step{'s' if request.steps > 1 else ''}", "pixels mixed"]
        figures.save_rows(request.out, [x, pixels], labels)
    else:
        write_samples(request.out, x, cond)
    print(request.out)
    return 0


def find_vae(model: Model, request: SampleArgs) -> VAE | None:
    """What decodes the samples asked for; None where nothing is to be decoded."""
    if model.spec.vae is None:
        if request.decode or request.vae is not None:
            raise UserError("this is no latent model: it takes neither --decode nor --vae")
        return None
    if request.out.suffix == ".npz" and not request.decode:
        return None
    return recorded(model.spec.vae, request.vae, next(model.parameters()).device)


def draw(model: Model, request: SampleArgs) -> tuple[Tensor, Tensor | None]:
    """The samples asked for, and their class ids."""
    with tqdm(total=request.n, unit="sample", desc="sampling", delay=1) as bar:
        return generate(
            model,
            request.n,
            steps=request.steps,
            seed=request.seed,
            label=request.label,
            guidance=request.guidance,
            force_guidance=request.force_guidance,
            sampler=request.sampler,
            batch=request.batch,
            bar=bar.update,
        )


def interpolate(model: Model, request: SampleArgs) -> tuple[Tensor, Tensor | None]:
    """The strip asked for, and its class."""
    return strip(
        model,
        request.n,
        request.steps,
        request.seed,
        request.label,
        guidance=request.guidance,
        force_guidance=request.force_guidance,
        sampler=request.sampler,
    )


def check_output(out: Path, rank: int) -> None:
    """Refuse an output that cannot be written before the work is done, not after."""
    if out.suffix not in ("", ".npz", ".png"):
        raise UserError(f"{out}: write to FILE.npz, FILE.png or a folder without a suffix")
    if not out.suffix and rank != 3:
        raise UserError(f"{out}: these samples are no images; write to FILE.npz or FILE.png")
    if out.suffix and out.is_dir():
        raise UserError(f"{out} is a folder; name a file")
    check_folder(out.parent if out.suffix else out)
    if not out.suffix and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder")


def write_samples(out: Path, x: Tensor, cond: Tensor | None) -> None:
    """Write samples as arrays, as one grid, or as a folder of pictures."""
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {"samples": x.numpy().astype(np.float32)}
        np.savez(out, **arrays | ({} if cond is None else {"cond": cond.numpy()}))
    elif out.suffix == ".png":
        figures.save_rows(out, figures.near_square(x) if x.ndim == 4 else [x])
    else:
        for k, picture in enumerate(x):
            suffix = "" if cond is None else f"-class{int(cond[k])}"
            figures.to_picture(picture).save(out / f"{k:06d}{suffix}.png")

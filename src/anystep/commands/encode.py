"""anystep encode: pictures to a store of pixels or latents on the disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from anystep.arguments import check_folder, parse
from anystep.config import pick_device
from anystep.data.folder import OnError
from anystep.data.shards import Shards, Source
from anystep.encode import Pictures, encode, folder_pictures, hub_pictures
from anystep.errors import UserError
from anystep.interop.vae import VAE


@dataclass(frozen=True)
class EncodeArgs:
    """Store pictures, or a VAE's latents of them, for training; the same command goes on with it.

    Attributes:
        source: a folder of images (one subfolder a class, or flat); with --split a Hugging Face
            dataset: its name, or a folder.
        out: folder of the store.
        vae: an AutoencoderKL of diffusers: a name on the Hugging Face hub, or a folder; pixels
            are stored without one.
        vae_revision: revision of the VAE on the hub.
        vae_subfolder: where the VAE is in a pipeline, such as vae.
        size: height and width of the pictures.
        channels: 3 for RGB, 1 for grey.
        flip: also encode the mirrored pictures; training picks one of the two each time.
        split: split of a Hugging Face dataset, such as train.
        subset: configuration of the dataset.
        revision: revision of the dataset on the hub.
        image: the dataset's column of images.
        label: the dataset's column of classes; none by default.
        per_shard: pictures a file; by default 4096, or fewer if that is more than 256 MiB.
        batch: pictures encoded at a time.
        on_error: what to do about pictures that cannot be read: stop, or skip them.
        device: auto, cpu or cuda.
    """

    source: Annotated[str, tyro.conf.Positional]
    out: Path
    vae: str | None = None
    vae_revision: str | None = None
    vae_subfolder: str = ""
    size: tuple[int, int] = (256, 256)
    channels: int = 3
    flip: bool = False
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    image: str = "image"
    label: str | None = None
    per_shard: int | None = None
    batch: int = 32
    on_error: OnError = "stop"
    device: str = "auto"


def run(args: Sequence[str]) -> int:
    """Store pictures or latents."""
    request = parse(EncodeArgs, args, "anystep encode")
    device = pick_device(request.device)
    pictures = find_pictures(request)
    check_folder(request.out)
    vae = None
    if request.vae is not None:
        vae = VAE(request.vae, request.vae_revision, request.vae_subfolder, device)
    index = encode(
        pictures,
        request.out,
        size=request.size,
        channels=request.channels,
        vae=vae,
        flip=request.flip,
        per_shard=request.per_shard,
        batch=request.batch,
        on_error=request.on_error,
    )
    kept = len(Shards(request.out, held_out=0).load().train)
    if kept < index.n:
        print(f"{index.n - kept} of {index.n} pictures could not be read and were skipped")
    print(f"{kept} {'pictures' if vae is None else 'latents'} {index.shape} in {request.out}")
    print(f"next: anystep train shards --data.path {request.out}")
    return 0


def find_pictures(request: EncodeArgs) -> Pictures:
    """The pictures asked for."""
    if request.split is not None:
        names = (request.split, request.subset, request.revision, request.image, request.label)
        return hub_pictures(Source(request.source, *names))
    if request.label or request.subset or request.revision:
        raise UserError("--label, --subset and --revision are for a Hugging Face dataset: --split")
    return folder_pictures(Path(request.source))

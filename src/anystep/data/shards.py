"""What `anystep encode` writes: pictures or latents on the disk, more than fit in memory.

A store is a folder of `index.json` (an `Index`) and a safetensors file for every `per_shard`
pictures of the source: `shard-000000.safetensors` with `x` (n, *shape) and, if there are classes,
`labels` (n,).

* Pixels: x is uint8 (C, H, W).
* Latents: x is float16 (2C, h, w), the mean and the log-variance that the autoencoder gives; or
  (2, 2C, h, w), where the second is of the mirrored picture. A latent is drawn anew each time it
  is asked for.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anystep.checkpoint import read_json
from anystep.data import DataConfig, Dataset, Splits, split
from anystep.data._column import Column, Shard, open_shard
from anystep.data.folder import check_classes
from anystep.errors import UserError
from anystep.registry import from_json
from anystep.spec import VAESpec

INDEX, FORMAT = "index.json", 1


@dataclass(frozen=True)
class Source:
    """Where the pictures of a store came from.

    Attributes:
        name: a folder of images, or the name or folder of a Hugging Face dataset.
        split: split of the dataset; None for a folder of images.
        subset: configuration of the dataset.
        revision: of the dataset on the hub.
        image: column of the pictures.
        label: column of the classes; None without classes.
        listing: a hash of what is there: files and their sizes, or columns and labels.
    """

    name: str = field(compare=False)
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    listing: str = ""


@dataclass(frozen=True)
class Entry:
    """A finished shard.

    Attributes:
        rows: how many examples it holds.
        sha256: hash of the file, as `sha256sum` prints it.
    """

    rows: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What is in a store and how it was made.

    Attributes:
        source: where the pictures came from.
        n: how many pictures the source has.
        size: height and width to which they were brought.
        channels: 3 for RGB, 1 for grey.
        class_names: one name a class; empty without classes.
        vae: the autoencoder whose latents these are; None for pixels.
        flip: whether each latent has that of the mirrored picture beside it.
        shape: of one stored example.
        dtype: of the stored examples.
        per_shard: pictures of the source a shard.
        shards: the finished ones.
        format: of the store.
    """

    source: Source
    n: int
    size: tuple[int, int]
    channels: int
    class_names: tuple[str, ...]
    vae: VAESpec | None
    flip: bool
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float16"]
    per_shard: int
    shards: tuple[Entry, ...] = field(default=(), compare=False)
    format: int = FORMAT

    @property
    def count(self) -> int:
        """How many shards a finished store has."""
        return -(-self.n // self.per_shard)

    def shard(self, folder: Path, k: int) -> Shard:
        """Shard k of the store in `folder`."""
        shape, dtype = self.shape, getattr(torch, self.dtype)
        shard = open_shard(shard_path(folder, k), shape, dtype)
        labels = 0 if shard.labels is None else len(shard.labels)
        if labels != (shard.rows if self.class_names else 0):
            raise UserError(f"{shard.path} has {labels} labels for {shard.rows} examples")
        return shard


def shard_path(folder: Path, k: int) -> Path:
    """The file of shard k."""
    return folder / f"shard-{k:06d}.safetensors"


def read_index(folder: Path) -> Index:
    """The index of the store in `folder`.

    Raises:
        UserError: it is missing, damaged, or something else under that name.
    """
    path = folder / INDEX
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} is not of a format this version of anystep reads")
    try:
        index: Index = from_json(Index, data)
    except UserError as error:
        raise UserError(f"{path} was not written by anystep encode ({error})") from None
    if min(index.n, index.per_shard) < 1 or len(index.shards) > index.count:
        raise UserError(f"{path} is damaged: {len(index.shards)} shards of {index.count}")
    return index


@dataclass(frozen=True)
class OnDisk(Dataset):
    """Examples that stay on the disk; their labels are in memory.

    Attributes:
        contents: a hash of all files the examples are in.
    """

    x: Column  # type: ignore[assignment]  # all that a dataset asks of its tensor
    contents: str = ""

    def digest(self) -> str:
        """A hash of the files, of which rows these are, and of how latents are scaled."""
        scaled = None if self.vae is None else (self.vae.weights, self.vae.scale, self.vae.shift)
        facts = [self.contents, self.num_classes, tuple(self.x.shape), scaled]
        digest = hashlib.sha256(json.dumps(facts).encode())
        if self.x.index is not None:
            digest.update(self.x.index.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def rows(self, index: Tensor) -> "OnDisk":
        """The dataset made of the rows `index`; nothing is read."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, x=self.x.select(index), labels=labels)


@dataclass(frozen=True)
class Latents(OnDisk):
    """Moments of latents, drawn when asked for; x is (N, 2C, h, w), or (N, 2, 2C, h, w)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (C, h, w) of one latent."""
        channels, height, width = self.x.shape[-3:]
        return channels // 2, height, width

    @property
    def scale(self) -> Literal["[-1, 1]", "raw"]:
        """The range of latents is their own affair."""
        return "raw"

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, h, w) in the model's scale of stored moments.

        Args:
            x: from `read`, on any device.
            generator: source of the noise, and of which of a picture and its mirror image to
                take; without one the picture's mean.
        """
        assert self.vae is not None
        x = x.float()
        if x.ndim == 5:
            x = x[:, 0] if generator is None else _either(x, generator)
        latent, log_variance = x.chunk(2, 1)
        if generator is not None:
            noise = torch.randn(latent.shape, generator=generator, device=x.device)
            latent = latent + (log_variance / 2).exp() * noise
        return (latent - self.vae.shift) * self.vae.scale


def _either(x: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two of each x (B, 2, ...), with equal chance."""
    second = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    return torch.where(second.reshape(-1, 1, 1, 1), x[:, 1], x[:, 0])


@dataclass(frozen=True)
class Shards(DataConfig):
    """A store of pixels or latents that `anystep encode` wrote.

    Attributes:
        path: its folder.
        held_out: share of the examples kept apart, in [0, 1).
    """

    path: Path
    held_out: float = 0.1

    def load(self) -> Splits:
        """Look at all shards, read their labels, and split them by lists of rows.

        Raises:
            UserError: the store is missing, damaged or not finished.
        """
        index = read_index(self.path)
        if len(index.shards) < index.count:
            raise UserError(
                f"{self.path} holds {len(index.shards)} of {index.count} shards: the same "
                "anystep encode command goes on making them"
            )
        shards = [index.shard(self.path, k) for k in range(index.count)]
        for shard, entry in zip(shards, index.shards, strict=True):
            if shard.rows != entry.rows:
                raise UserError(f"{shard.path} has {shard.rows} rows, the index {entry.rows}")
        column = Column(shards, index.shape, getattr(torch, index.dtype))
        labels = [shard.labels for shard in shards if shard.labels is not None]
        kind = OnDisk if index.vae is None else Latents
        hashes = " ".join(entry.sha256 for entry in index.shards)
        data = kind(
            column,
            torch.cat(labels) if labels else None,
            index.class_names,
            vae=index.vae,
            contents=hashlib.sha256(hashes.encode()).hexdigest(),
        )
        check_classes(data)
        return split(data, self.held_out)

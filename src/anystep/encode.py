"""Write pictures, or an autoencoder's latents of them, to a store; stopped, it goes on.

See `anystep.data.shards` for what a store holds.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from anystep import checkpoint
from anystep.data.folder import OnError, check_size, decode, find_images, read_classes
from anystep.data.shards import INDEX, Entry, Index, Source, read_index, shard_path
from anystep.errors import UserError
from anystep.interop.vae import VAE
from anystep.registry import differences, to_json

LARGEST = 2**28  # bytes of a shard, unless the user says how many rows
MOST = 4096  # rows of a shard, likewise
# What an index may say otherwise when the same store is gone on with: where things lie. Hashes
# say what they are.
FREE = ("shards", "source.name", "vae.name", "vae.revision", "vae.subfolder")


@dataclass(frozen=True)
class Pictures:
    """Pictures that can be opened one by one.

    Attributes:
        source: where they come from.
        n: how many there are.
        open: the file of picture i, or its bytes.
        name: what picture i is called.
        labels: their class ids (n,), or None.
        class_names: one name a class.
    """

    source: Source
    n: int
    open: Callable[[int], Path | io.BytesIO]
    name: Callable[[int], str]
    labels: Tensor | None
    class_names: tuple[str, ...]


def folder_pictures(path: Path) -> Pictures:
    """The pictures of a folder, in the order of their sorted paths; see `anystep.data.folder`.

    Raises:
        UserError: there is no such folder, no picture in it, or classes and no classes.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder; of a Hugging Face dataset also give the split: --split train"
        )
    files = find_images(path)
    class_names, labels = read_classes(path, files)
    names = [file.relative_to(path).as_posix() for file in files]
    sizes = [file.stat().st_size for file in files]
    source = Source(str(path), listing=_digest(zip(names, sizes, strict=True)))
    return Pictures(source, len(files), files.__getitem__, names.__getitem__, labels, class_names)


def hub_pictures(source: Source) -> Pictures:
    """The pictures of a Hugging Face dataset, by name or from a folder on the disk.

    Raises:
        UserError: datasets is not installed, there is no such dataset, or a column is not as
            the source says.
    """
    table = _table(source)
    image, features = str(source.image), table.features
    if type(features.get(image)).__name__ != "Image":
        raise UserError(
            f"{source.name} has no column {image!r} of images (its columns: "
            f"{', '.join(features)}); name it with --image"
        )
    labels: Tensor | None = None
    names: tuple[str, ...] = ()
    if source.label is not None:
        if source.label not in features:
            raise UserError(
                f"{source.name} has no column {source.label!r} (its columns: "
                f"{', '.join(features)}); name the classes' with --label, or leave it out"
            )
        known = getattr(features[source.label], "names", None)
        labels, names = _classes(table[source.label], known, source.label)
    # Encoded bytes: pictures are decoded, and turned upright, as those of a folder are.
    table = table.cast_column(image, type(features[image])(decode=False))

    def opened(i: int) -> Path | io.BytesIO:
        cell = table[i][image] or {}
        return (
            Path(str(cell.get("path"))) if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
        )

    facts = [source.name if not Path(source.name).exists() else "", len(table)]
    facts += [] if labels is None else labels.tolist()
    source = replace(source, listing=_digest(facts))
    return Pictures(source, len(table), opened, lambda i: f"row {i}", labels, names)


def encode(
    pictures: Pictures,
    out: Path,
    *,
    size: tuple[int, int],
    channels: int = 3,
    vae: VAE | None = None,
    flip: bool = False,
    per_shard: int | None = None,
    batch: int = 32,
    on_error: OnError = "stop",
    bar: bool = True,
) -> Index:
    """Write the store of `pictures` to the folder `out`, or the shards that are still missing.

    Args:
        pictures: from `folder_pictures` or `hub_pictures`.
        out: the folder of the store.
        size: height and width to which pictures are brought, as `anystep.data.folder` does.
        channels: 3 for RGB, 1 for grey.
        vae: the autoencoder to whose latents they are turned; None stores pixels.
        flip: also encode mirrored pictures.
        per_shard: pictures a shard; by default 4096, or fewer if that is more than 256 MiB.
        batch: pictures decoded, and encoded, at a time.
        on_error: what to do about pictures that cannot be read: "stop", or "skip" them.
        bar: show a progress bar.

    Raises:
        UserError: a bad number, a picture that cannot be read, or a store made otherwise stands
            there already.
    """
    check_size(size, channels)
    check_request(vae, size, channels, flip)
    if batch < 1 or (per_shard is not None and per_shard < 1):
        raise UserError("--batch and --per-shard must be at least 1")
    shape: tuple[int, ...] = (channels, *size)
    if vae is not None:
        moments = vae.moments(torch.zeros(1, *shape))[0]
        shape = (2, *moments.shape) if flip else tuple(moments.shape)
    row = int(np.prod(shape)) * (1 if vae is None else 2)
    index = Index(
        pictures.source,
        pictures.n,
        size,
        channels,
        pictures.class_names,
        None if vae is None else vae.spec,
        flip,
        shape,
        "uint8" if vae is None else "float16",
        per_shard or max(1, min(MOST, LARGEST // row)),
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0), ThreadPoolExecutor(os.cpu_count()) as pool:
            return _write(index, out, Maker(pictures, index, vae, batch, on_error, pool), bar)
    except Timeout:
        raise UserError(f"another anystep encode is writing to {out}") from None


def check_request(vae: VAE | None, size: tuple[int, int], channels: int, flip: bool) -> None:
    """Raise `UserError` unless pictures of this kind can be stored as asked."""
    if vae is None:
        if flip:
            raise UserError("pixels are mirrored at training: give --flip to anystep train")
        return
    if any(side % vae.factor for side in size):
        raise UserError(
            f"the VAE {vae.spec.name} takes sides that are multiples of {vae.factor}, not {size}"
        )
    if channels != vae.channels:
        raise UserError(f"the VAE {vae.spec.name} takes {vae.channels} channels, not {channels}")


def _write(index: Index, out: Path, make: "Maker", bar: bool) -> Index:
    """Write what is missing, and the index after each shard."""
    done = list(check_same(out, index).shards)
    parts = [range(index.n)[i : i + index.per_shard] for i in range(0, index.n, index.per_shard)]
    standing = {k for k in range(len(done)) if shard_path(out, k).exists()}
    for k in standing:
        index.shard(out, k)  # complains of damage
    with tqdm(
        total=index.n,
        initial=sum(len(parts[k]) for k in standing),
        unit="image",
        desc=out.name,
        disable=not bar,
        dynamic_ncols=True,
    ) as shown:
        for k, rows in enumerate(parts):
            path = shard_path(out, k)
            if k in standing:
                continue
            if path.exists():  # it was about to enter the index: one that has its name is whole
                shown.update(len(rows))
            else:
                save(path, make(rows, shown.update))
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            done[k : k + 1] = [Entry(index.shard(out, k).rows, sha256)]
            checkpoint.write_json(out / INDEX, to_json(replace(index, shards=tuple(done))))
    return replace(index, shards=tuple(done))


def check_same(out: Path, index: Index) -> Index:
    """The index that stands in `out`, after a check that it differs in nothing that matters.

    Without one, `index` is written there.
    """
    if not (out / INDEX).exists():
        if any(out.glob("shard-*.safetensors")):
            raise UserError(f"{out} has shards but no {INDEX}: choose another --out")
        checkpoint.write_json(out / INDEX, to_json(index))
        return index
    old = read_index(out)
    changed = [
        line for line in differences(to_json(old), to_json(index)) if not line.startswith(FREE)
    ]
    if changed:
        raise UserError(
            f"{out} holds a store made otherwise ({'; '.join(changed)}): choose another --out"
        )
    return old


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    checkpoint.sync(temporary)
    temporary.replace(path)
    checkpoint.sync(path.parent)


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a shard: `make(rows, bar)`."""

    pictures: Pictures
    index: Index
    vae: VAE | None
    batch: int
    on_error: OnError
    pool: ThreadPoolExecutor

    def __call__(self, rows: Sequence[int], bar: Callable[[int], Any]) -> dict[str, Tensor]:
        """Examples, and labels if there are any, of the pictures `rows`."""
        parts, kept = [], []
        for chunk, pixels, readable in self._read(rows):
            kept += [row for row, ok in zip(chunk, readable, strict=True) if ok]
            parts.append(self._examples(pixels[torch.tensor(readable)]))
            bar(len(chunk))
        tensors = {"x": torch.cat(parts).contiguous()}  # a VAE may answer channels-last
        if self.pictures.labels is not None:
            tensors["labels"] = self.pictures.labels[kept]
        return tensors

    def _read(self, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, list[bool]]]:
        """Batches of decoded pictures; the next is decoded while one is encoded."""
        chunks = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._decode, chunks[0])
            for k, chunk in enumerate(chunks):
                pixels, readable = coming.result()
                if k + 1 < len(chunks):
                    coming = ahead.submit(self._decode, chunks[k + 1])
                yield chunk, pixels, readable

    def _decode(self, rows: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """The pictures (B, C, H, W), uint8, and which of them could be read."""
        x = np.zeros((len(rows), self.index.channels, *self.index.size), np.uint8)
        files = [self.pictures.open(row) for row in rows]
        readable = list(self.pool.map(decode, files, x))
        if not all(readable) and self.on_error == "stop":
            bad = self.pictures.name(rows[readable.index(False)])
            raise UserError(
                f"{bad!r} in {self.pictures.source.name} cannot be read: mend it, or use "
                "--on-error skip"
            )
        return torch.from_numpy(x), readable

    def _examples(self, pixels: Tensor) -> Tensor:
        """What is stored of pictures (B, C, H, W)."""
        if self.vae is None:
            return pixels
        if not len(pixels):
            return torch.empty((0, *self.index.shape), dtype=torch.float16)
        x = pixels.float() / 127.5 - 1
        moments = self.vae.moments(x)
        if self.index.flip:
            moments = torch.stack([moments, self.vae.moments(x.flip(-1))], 1)
        stored = moments.half()
        if not stored.isfinite().all():
            raise UserError("the VAE gives numbers that float16 cannot hold, or NaN")
        return stored


def _table(source: Source) -> Any:
    """The split of a Hugging Face dataset."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"a Hugging Face dataset needs datasets ({error}): pip install 'anystep[hub]'"
        ) from None
    path = Path(source.name)
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(source.name)
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the hub, the disk and the builders fail each in their own way
        line = " ".join(str(error).split())
        raise UserError(
            f"cannot load split {source.split!r} of the dataset {source.name}: {line}"
        ) from None


def _classes(
    column: Sequence[Any], names: Sequence[str] | None, what: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Class ids (n,) and class names; classes that have no names are numbered as they sort."""
    values = list(column)
    if names is None:
        known = sorted(set(values) - {None})
        place = {value: k for k, value in enumerate(known)}
        names, values = [str(value) for value in known], [place.get(v, -1) for v in values]
    labels = torch.tensor([-1 if v is None else v for v in values], dtype=torch.int64)
    if len(labels) and int(labels.min()) < 0:
        raise UserError(f"row {int(labels.argmin())} has no class in column {what!r}")
    return labels, tuple(names)


def _digest(facts: Any) -> str:
    """A hash of a list of facts."""
    return hashlib.sha256(repr(list(facts)).encode()).hexdigest()[:16]

"""A folder of images: one subfolder a class, or all of them flat and without labels.

Every image becomes uint8 (C, H, W) of one size:

* it is turned upright by its EXIF orientation, and an animation gives its first frame;
* transparency is laid over white;
* 16-bit grey is divided by 257, so that full white stays full white;
* it is resized with antialiasing so that it just covers (H, W), aspect ratio kept, and cropped
  at the centre. Small images are enlarged; one with a side of a single pixel has nothing to
  show and counts as unreadable.
"""

import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from anystep.data import DataConfig, Dataset, Splits, split
from anystep.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Only these decoders are tried: Pillow knows formats that start other programs (EPS), whatever
# the suffix says. WEBP is last because some builds of Pillow lack it.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Folder(DataConfig):
    """Images (png, jpg, jpeg, webp, bmp, gif, tif, tiff) under `path`, as uint8 (C, H, W).

    With subfolders, their sorted names are the classes and each is searched to any depth; with
    images straight under `path` there are no labels. Hidden files and folders, files of other
    kinds and subfolders without images are ignored; links to folders are followed.

    Attributes:
        path: the folder.
        size: height and width of the images.
        channels: 3 for RGB, 1 for grey.
        held_out: share of the images kept apart, in [0, 1).
        on_error: what to do about files that cannot be read: "stop", or "skip" them with a
            warning. A class must keep at least one image.
    """

    path: Path
    size: tuple[int, int] = (32, 32)
    channels: int = 3
    held_out: float = 0.1
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        check_size(self.size, self.channels)
        if self.on_error not in get_args(OnError):
            raise UserError(f"on_error must be 'stop' or 'skip', not {self.on_error!r}")

    def load(self) -> Splits:
        """Decode all images, in the order of their sorted paths, and split them.

        Raises:
            UserError: there is no image, images stand both beside and inside subfolders, some
                cannot be read (with "stop") or all of them, or they do not fit in memory.
        """
        files = find_images(self.path)
        class_names, labels = read_classes(self.path, files)
        x = self._buffer(len(files))
        readable = _decode_all(files, x)
        data = Dataset(torch.from_numpy(x), labels, class_names)
        bad = [file for file, ok in zip(files, readable, strict=True) if not ok]
        if bad:
            self._report(bad, len(files))
            data = data.rows(torch.tensor(readable).nonzero().flatten())
            check_classes(data)
        return split(data, self.held_out)

    def _buffer(self, count: int) -> NDArray[np.uint8]:
        shape = (count, self.channels, *self.size)
        needed = 2 * math.prod(shape)  # the split copies the images
        if needed > _memory():
            raise UserError(
                f"{count:,} images of {self.size[0]}x{self.size[1]} need {needed / 2**30:,.1f} "
                f"GiB and this machine has {_memory() / 2**30:,.1f}; choose a smaller --data.size"
            )
        return np.empty(shape, np.uint8)

    def _report(self, bad: Sequence[Path], count: int) -> None:
        """Stop, or warn, about the files `bad` out of `count`."""
        what = f"{len(bad)} of {count} images cannot be read: {listing(self.path, bad)}"
        if len(bad) == count:
            raise UserError(f"{what}; nothing is left to train on")
        if self.on_error == "stop":
            raise UserError(f"{what}; delete them or use --data.on-error skip")
        warnings.warn(f"skipped files: {what}", stacklevel=3)


def check_size(size: tuple[int, ...], channels: int) -> None:
    """Raise `UserError` unless pictures can be made of this size and number of channels."""
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"size must be a height and a width of at least 1, not {size}")
    if channels not in (1, 3):
        raise UserError(f"channels must be 3 (RGB) or 1 (grey), not {channels}")


def find_images(path: Path) -> list[Path]:
    """All image files under `path`, sorted."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a folder of images as --data.path")
    files = _visible_files(path)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        others = f"other files: {len(files)}, such as {listing(path, files[:1])}"
        raise UserError(
            f"there is no image in {path} ({others if files else 'it is empty'}); put "
            f"{', '.join(SUFFIXES)} files there, or in one subfolder a class"
        )
    return images


def _visible_files(path: Path) -> list[Path]:
    """All files under `path`, sorted, but for hidden ones and those in hidden folders."""
    found: list[Path] = []
    for root, folders, names in os.walk(path, onerror=_stop, followlinks=True):
        folders[:] = (name for name in folders if not name.startswith("."))
        found += (Path(root, name) for name in names if not name.startswith("."))
    return sorted(found)


def _stop(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None


def read_classes(path: Path, files: Sequence[Path]) -> tuple[tuple[str, ...], torch.Tensor | None]:
    """The sorted class names and one label a file; no names and None for a flat folder."""
    parents = [file.relative_to(path).parts[:-1] for file in files]
    flat = [file for file, parent in zip(files, parents, strict=True) if not parent]
    if len(flat) == len(files):
        return (), None
    if flat:
        raise UserError(
            f"{path} holds images both in subfolders and beside them ({listing(path, flat)}); "
            "move all into subfolders, one a class, or all out of them"
        )
    names = sorted({parent[0] for parent in parents})
    label = {name: k for k, name in enumerate(names)}
    return tuple(names), torch.tensor([label[parent[0]] for parent in parents])


def check_classes(data: Dataset) -> None:
    """Raise `UserError` if a class has no example left."""
    if data.labels is None:
        return
    empty = (data.labels.bincount(minlength=data.num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        names = ", ".join(repr(data.class_names[k]) for k in empty[:5])
        raise UserError(f"no image of class {names} can be read; mend some or remove the folder")


def _decode_all(files: Sequence[Path], x: NDArray[np.uint8]) -> list[bool]:
    """Decode file i into x[i]; which of them could be read."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        work = pool.map(decode, files, x)
        return list(tqdm(work, "reading images", len(files), unit="image", delay=1))


def decode(file: Path | BinaryIO, out: NDArray[np.uint8]) -> bool:
    """Decode `file`, or an open one, into `out` (C, H, W); whether it could be read."""
    channels, height, width = out.shape
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if min(opened.size) < 2:
                return False
            image = _opaque(ImageOps.exif_transpose(opened))
        image = image.convert("RGB" if channels == 3 else "L")
        pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception:  # decoders meet broken files with almost any exception
        return False
    out[:] = pixels.reshape(height, width, channels).transpose(2, 0, 1)
    return True


def _opaque(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel, laid over white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_from_16_bits(np.asarray(image))
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_from_16_bits(pixels: NDArray[Any]) -> Image.Image:
    # Pillow gives some 16-bit files as 32-bit integers. Wider values, and floats, have no white
    # that is known.
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("the range of the pixels is unknown")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


def listing(path: Path, files: Sequence[Path], most: int = 5) -> str:
    """The first few files, as quoted paths relative to `path`."""
    shown = [repr(file.relative_to(path).as_posix()) for file in files[:most]]
    return ", ".join(shown + ["..."] * (len(files) > most))


def _memory() -> float:
    """Physical memory in bytes; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf

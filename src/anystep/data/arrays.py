"""Your own NumPy arrays: an .npz file of examples and maybe labels, or an .npy of examples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anystep.data import DataConfig, Dataset, Splits, split
from anystep.errors import UserError
from anystep.registry import unknown

MAX_CLASSES = 1_000_000  # a label beyond is no class id but, say, a hash


@dataclass(frozen=True)
class Arrays(DataConfig):
    """The arrays of one .npz or .npy file.

    Examples are uint8 images (N, C, H, W) or (N, H, W) in 0..255, or floats that the model sees
    as they are: vectors (N, D), or images (N, C, H, W) or (N, H, W) in [-1, 1]. Images are
    channels-first; (N, H, W) has one channel. Labels are integers (N,) from 0, without gaps.

    Attributes:
        path: the file.
        x_key: name of the examples in an .npz.
        labels_key: name of the labels in an .npz; if it is "labels" and there is no such array,
            there are no labels.
        x0_key: name of the noises that belong to the examples, of the same shape, in an .npz;
            if it is "x0" and there is no such array, there are none.
        held_out: share of the examples kept apart, in [0, 1).
    """

    path: Path
    x_key: str = "x"
    labels_key: str = "labels"
    x0_key: str = "x0"
    held_out: float = 0.1

    def load(self) -> Splits:
        """Read and check the arrays, and split them.

        Raises:
            UserError: the file or an array in it is missing, damaged or not as described above.
        """
        arrays = self._read()
        x = _examples(arrays[self.x_key])
        x0 = _noise(arrays[self.x0_key], tuple(x.shape)) if self.x0_key in arrays else None
        if self.labels_key not in arrays:
            return split(Dataset(x, x0=x0), self.held_out)
        labels = class_ids(arrays[self.labels_key], len(x))
        names = tuple(str(k) for k in range(int(labels.max()) + 1))
        return split(Dataset(x, labels, names, x0), self.held_out)

    def _read(self) -> dict[str, Any]:
        """The examples and, if any, the labels and noises, by their keys."""
        if self.path.suffix.lower() not in (".npz", ".npy"):
            raise UserError(f"{self.path} is neither .npz nor .npy; write it with numpy.savez")
        if not self.path.is_file():
            raise UserError(f"there is no file {self.path}; name one by --data.path")
        try:
            known, arrays = self._parse()
        except MemoryError:
            raise UserError(f"the arrays in {self.path} do not fit in memory") from None
        except Exception:  # broken files fail with almost any exception
            raise UserError(
                f"cannot read {self.path}: it is damaged, or holds pickled objects, which are "
                "never loaded; write plain arrays of numbers with numpy.savez"
            ) from None
        for key in (self.x_key, self.labels_key, self.x0_key):
            if key not in arrays and key not in (Arrays.labels_key, Arrays.x0_key):
                raise UserError(unknown(f"array in {self.path}", key, known))
        return arrays

    def _parse(self) -> tuple[list[str], dict[str, Any]]:
        """The names of all arrays in the file, and those asked for; an .npy holds `x_key`."""
        loaded = np.load(self.path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return [self.x_key], {self.x_key: loaded}
        with loaded:
            keys = {self.x_key, self.labels_key, self.x0_key} & set(loaded.files)
            return loaded.files, {key: np.asarray(loaded[key]) for key in keys}


def _examples(x: NDArray[Any]) -> Tensor:
    """Check the examples: images (N, C, H, W), uint8 or float32, or float32 vectors (N, D)."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise UserError(f"x is {x.dtype}; store images as uint8 in 0..255 or as floats in [-1, 1]")
    if x.size == 0 or x.ndim not in (2, 3, 4):
        raise UserError(f"x has shape {x.shape}; store (N, C, H, W), (N, H, W) or (N, D)")
    x = x[:, None] if x.ndim == 3 else x
    if x.ndim == 4:
        _check_channels_first(x)
    if x.dtype == np.uint8:
        if x.ndim == 2:
            raise UserError(f"x holds uint8 vectors {x.shape}; store vectors as float32")
        return torch.from_numpy(np.ascontiguousarray(x))
    return _floats(x)


def _check_channels_first(x: NDArray[Any]) -> None:
    _, first, second, last = x.shape
    # The second test lets latents such as (N, 16, 4, 4) pass.
    if last in (1, 3, 4) and first not in (1, 3, 4) and second > last:
        raise UserError(
            f"x {x.shape} looks channels-last; store (N, C, H, W): x.transpose(0, 3, 1, 2)"
        )


def _noise(x0: NDArray[Any], shape: tuple[int, ...]) -> Tensor:
    """Check the noises that belong to examples (N, *shape): float32 of the same shape."""
    x0 = x0[:, None] if x0.ndim == len(shape) - 1 == 3 else x0
    if x0.shape != shape or x0.dtype.kind != "f":
        raise UserError(f"x0 is {x0.dtype} {x0.shape}; store floats of the shape of x: {shape}")
    return _floats(x0, "x0")


def _floats(x: NDArray[Any], name: str = "x") -> Tensor:
    """Float32 numbers, all finite."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, reported below
        x = np.ascontiguousarray(x, np.float32)
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise UserError(
            f"row {finite.argmin()} of {name} holds NaN or Inf; mend it or leave it out"
        )
    # Values of either sign may be latents, whose scale is their own affair.
    if x.ndim == 4 and x.min() >= 0 and x.max() > 10:
        raise UserError(
            f"x holds float images up to {x.max():g}; store uint8, or scale them to [-1, 1]"
        )
    return torch.from_numpy(x)


def class_ids(labels: NDArray[Any], count: int) -> Tensor:
    """Check the labels of `count` examples: int64 (N,)."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"labels are {labels.dtype} {labels.shape}; store one integer an example: ({count},)"
        )
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise UserError(
            f"labels run from {labels.min()} to {labels.max()}; store class ids from 0 "
            f"to less than {MAX_CLASSES:,}"
        )
    missing = np.setdiff1d(np.arange(labels.max() + 1), labels)
    if len(missing):
        raise UserError(
            f"no example has label {missing[0]}, though the largest is {labels.max()}; number "
            "the classes without gaps: labels = numpy.unique(labels, return_inverse=True)[1]"
        )
    return torch.from_numpy(labels.astype(np.int64))

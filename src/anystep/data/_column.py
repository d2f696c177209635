"""A column of examples on the disk, indexed like a tensor.

Rows are read by `preadv` straight into the result, not through a memory map: the kernel's page
cache is the same, but the process never owns a page of the files, so that its memory does not
grow with the data, and a file cut short is an error instead of a dead process.
"""

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anystep.errors import UserError

OPEN = 256  # files open at a time
AGAIN = "remove it, and the same anystep encode command makes it again"


class Shard(NamedTuple):
    """One safetensors file: where its examples `x` begin, how many there are, their labels."""

    path: Path
    offset: int
    rows: int
    labels: Tensor | None


def open_shard(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Shard:
    """Look at a shard without reading its examples.

    Args:
        path: the file.
        shape: of one example.
        dtype: of the examples.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            x = file.get_slice("x")
            found, kind = x.get_shape(), x[:0].dtype
            labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        what = "is missing" if not path.exists() else f"is damaged ({error})"
        raise UserError(f"{path} {what}: {AGAIN}") from None
    if found[1:] != list(shape) or kind != dtype:
        raise UserError(f"{path} holds {kind} {found[1:]}, not {dtype} {list(shape)}: {AGAIN}")
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        begins = json.loads(stream.read(size))["x"]["data_offsets"][0]
    return Shard(path, 8 + size + begins, found[0], labels)


class Column:
    """Examples (N, *shape) in shards.

    Args:
        shards: the files, in order.
        shape: of one example.
        dtype: of the examples.
        index: the rows of the files that this column has, in order; all by default.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shape: Sequence[int],
        dtype: torch.dtype,
        index: Tensor | None = None,
    ) -> None:
        self.shards, self.dtype, self.index = tuple(shards), dtype, index
        self.ends = torch.tensor([shard.rows for shard in shards], dtype=torch.int64).cumsum(0)
        total = int(self.ends[-1]) if len(shards) else 0
        self.shape = torch.Size((total if index is None else len(index), *shape))
        self._open = lru_cache(maxsize=OPEN)(_File)

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, index: Tensor) -> "Column":
        """The column of the rows `index`; nothing is read."""
        rows = index if self.index is None else self.index[index]
        return Column(self.shards, self.shape[1:], self.dtype, rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """The examples (B, *shape) of row numbers (B,) from 0, or of a slice.

        Raises:
            IndexError: a row is out of range.
            UserError: a file was removed or cut short.
        """
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {len(self)}")
        rows = rows if self.index is None else self.index[rows]
        out = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        size = prod(self.shape[1:]) * self.dtype.itemsize
        places = out.view(torch.uint8).numpy().reshape(len(rows), size)
        for place, row, k in zip(
            places, rows.tolist(), torch.searchsorted(self.ends, rows, right=True), strict=True
        ):
            shard = self.shards[int(k)]
            row -= int(self.ends[k]) - shard.rows
            self._open(shard.path).read(place, shard.offset + row * size)
        return out


class _File:
    """An open file, closed when it is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: {AGAIN}") from None
        if hasattr(os, "posix_fadvise"):  # reading ahead of a random row is wasted
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, place: Any, offset: int) -> None:
        """Fill a buffer from `offset` on."""
        if os.preadv(self.descriptor, [place], offset) != len(place):
            raise UserError(f"{self.path} was cut short: {AGAIN}")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

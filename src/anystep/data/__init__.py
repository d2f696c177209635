"""Datasets: one file each, found by file name, all giving the same in-memory `Dataset`.

A data config (`digits.Digits`, `folder.Folder`, ...) is a frozen dataclass whose `load()`
returns the training split and a held-out split that training never sees.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anystep.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """Examples in memory.

    Attributes:
        x: uint8 images (N, C, H, W) in 0..255, or float32 (N, *shape) already in the model's
            scale.
        labels: int64 class ids (N,), or None.
        class_names: one name a class; empty when there are no labels.
        x0: the noise (N, *shape) that belongs to each example, or None; float32.
        guidance: strength of the guidance with which a model made the examples; 1 is none.
    """

    x: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    x0: Tensor | None = None
    guidance: float = 1.0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)

    @property
    def scale(self) -> Literal["[-1, 1]", "raw"]:
        """Whether `batch` gives images in [-1, 1], or values whose range is their own affair."""
        image = len(self.shape) == 3
        bounded = self.x.dtype == torch.uint8 or bool(self.x.abs().max() <= 1 + 1e-6)
        return "[-1, 1]" if image and bounded else "raw"

    def digest(self) -> str:
        """A hash of all examples, labels, noises and the number of classes."""
        digest = hashlib.sha256(f"{self.num_classes}".encode())
        for tensor in (self.x, self.labels, self.x0):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Examples as the model sees them: float32 x1 (images in [-1, 1]) and labels."""
        x = self.x[rows]
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        return x, None if self.labels is None else self.labels[rows]

    def noise(self, rows: Tensor | slice) -> Tensor | None:
        """The noise that belongs to the examples of `batch(rows)`, if any does."""
        return None if self.x0 is None else self.x0[rows]

    def rows(self, index: Tensor) -> "Dataset":
        """The dataset made of the rows `index`."""
        labels, x0 = (None if a is None else a[index] for a in (self.labels, self.x0))
        return replace(self, x=self.x[index], labels=labels, x0=x0)


class Splits(NamedTuple):
    """What `load()` returns: the examples to train on, and those kept apart."""

    train: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class DataConfig(ABC):
    """Base of every data config."""

    PACKAGE: ClassVar[str] = "anystep.data"

    @abstractmethod
    def load(self) -> Splits:
        """Read the data.

        Raises:
            UserError: what is missing or unreadable, and what to do about it, in one line.
        """

    def reference(self, splits: Splits) -> Splits:
        """The data that samples are judged against; `splits`, which `load` gave, as a rule."""
        return splits


BASE = DataConfig


def split(data: Dataset, held_out: float, seed: int = 0) -> Splits:
    """Set a share `held_out` of the rows apart, at random but always the same ones.

    Raises:
        UserError: `held_out` is outside [0, 1) or leaves nothing to train on.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out must be in [0, 1), not {held_out}")
    count = int(len(data) * held_out)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    if len(data) - count < 1:
        raise UserError("the dataset is empty: there is nothing to train on")
    return Splits(data.rows(order[count:]), data.rows(order[:count]))


class Order:
    """Which rows each training step sees: every row once an epoch, in a new random order.

    Nothing is stored between steps: the rows of a step follow from (seed, step) alone, so a
    resumed run sees what an uninterrupted one would.

    Args:
        size: rows of the dataset.
        batch: rows a step; may exceed `size`.
        seed: of the permutations.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch = size, batch
        self.epoch = lru_cache(maxsize=2)(lambda epoch: self._permutation(seed, epoch))

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        return torch.randperm(self.size, generator=seeded(seed, epoch, stream=1))

    def __call__(self, step: int) -> Tensor:
        """The rows (batch,) of step `step`."""
        position, rows = step * self.batch, []
        left = self.batch
        while left:
            epoch, start = divmod(position, self.size)
            part = self.epoch(epoch)[start : start + left]
            rows.append(part)
            position, left = position + len(part), left - len(part)
        return torch.cat(rows)


def seeded(
    seed: int, step: int, *, stream: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on (seed, step, stream) and on nothing else.

    Raises:
        UserError: the seed is negative.
    """
    if seed < 0:
        raise UserError(f"a seed must be at least 0, not {seed}")
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def mirror(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of x (B, C, H, W) mirrored left to right with probability 1/2."""
    flip = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    return torch.where(flip.reshape(-1, 1, 1, 1), x.flip(-1), x)

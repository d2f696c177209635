"""Datasets: one file each, found by file name, all giving the same `Dataset`.

A data config (`digits.Digits`, `folder.Folder`, ...) is a frozen dataclass whose `load()`
returns the training split and a held-out split that training never sees. What fits in memory is a
`Dataset`; what does not is another kind of `Examples`, which is read while training goes on.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.spec import VAESpec


class Stored(NamedTuple):
    """The examples of a training step as they are stored, on the CPU.

    `position` is where the next step's begin: JSON data, or None when the number of the step
    says it.
    """

    x: Tensor
    labels: Tensor | None = None
    x0: Tensor | None = None
    position: Any = None


class Feed(Protocol):
    """What a training run reads its examples from; steps are asked for one after the other."""

    def __call__(self, step: int) -> Stored:
        """The examples of step `step`."""

    def seek(self, position: Any) -> None:
        """Go on from a `position` that an earlier feed gave."""


class Examples(ABC):
    """What a run trains on, in memory or not.

    Attributes:
        class_names: one name a class; empty when there are no labels.
        x0: the noise that belongs to each example, or None.
        guidance: strength of the guidance with which a model made the examples; 1 is none.
        vae: the autoencoder whose latents the examples are; None when they are none.
    """

    class_names: tuple[str, ...] = ()
    x0: Tensor | None = None
    guidance: float = 1.0
    vae: VAESpec | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)

    @property
    @abstractmethod
    def scale(self) -> Literal["[-1, 1]", "raw"]:
        """Whether `draw` gives images in [-1, 1], or values whose range is their own affair."""

    @abstractmethod
    def digest(self) -> str:
        """A short hash by which a resumed run knows its data again."""

    @abstractmethod
    def feed(self, batch: int, seed: int) -> Feed:
        """A feed of `batch` examples a step, in an order that follows from the seed."""

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The x1 that a model sees, float32 (images in [-1, 1]), of stored examples.

        Args:
            x: as a feed gives them, on any device.
            generator: source of what is random in it, if anything is; its mean without one.
        """
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


@dataclass(frozen=True)
class Dataset(Examples):
    """Examples in memory.

    Attributes:
        x: uint8 images (N, C, H, W) in 0..255, or float32 (N, *shape) already in the model's
            scale.
        labels: int64 class ids (N,), or None.
        class_names: one name a class; empty when there are no labels.
        x0: the noise (N, *shape) that belongs to each example, or None; float32.
        guidance: strength of the guidance with which a model made the examples; 1 is none.
        vae: the autoencoder whose latents the examples are; None when they are none.
    """

    x: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    x0: Tensor | None = None
    guidance: float = 1.0
    vae: VAESpec | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.x.shape[1:])

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

    def read(self, rows: Tensor | slice) -> Stored:
        """Examples as they are stored."""
        labels, x0 = (None if a is None else a[rows] for a in (self.labels, self.x0))
        return Stored(self.x[rows], labels, x0)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Examples as the model sees them: x1 and labels."""
        stored = self.read(rows)
        return self.draw(stored.x), stored.labels

    def rows(self, index: Tensor) -> "Dataset":
        """The dataset made of the rows `index`."""
        labels, x0 = (None if a is None else a[index] for a in (self.labels, self.x0))
        return replace(self, x=self.x[index], labels=labels, x0=x0)

    def feed(self, batch: int, seed: int) -> Feed:
        """A feed of `batch` examples a step, in an order that follows from the seed."""
        return InOrder(self.read, Order(len(self), batch, seed))


class Splits(NamedTuple):
    """What `load()` returns: the examples to train on, and those kept apart."""

    train: Dataset
    held_out: Dataset


class Streams(NamedTuple):
    """What `load()` returns when the examples to train on are not in memory."""

    train: Examples
    held_out: Dataset


Loaded = Splits | Streams


@dataclass(frozen=True)
class DataConfig(ABC):
    """Base of every data config."""

    PACKAGE: ClassVar[str] = "anystep.data"

    @abstractmethod
    def load(self) -> Loaded:
        """Read the data, or make ready to read them.

        Raises:
            UserError: what is missing or unreadable, and what to do about it, in one line.
        """

    def reference(self, splits: Loaded) -> Splits:
        """The data that samples are judged against; `splits`, which `load` gave, as a rule."""
        assert isinstance(splits, Splits), "streams have a reference of their own"
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


class InOrder(NamedTuple):
    """A feed of rows in an order: nothing to remember between steps."""

    read: Callable[[Tensor], Stored]
    order: Order

    def __call__(self, step: int) -> Stored:
        """The examples of step `step`."""
        return self.read(self.order(step))

    def seek(self, position: Any) -> None:
        """Nothing to do: the number of the step says where it begins."""


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

"""Pictures that stay encoded until a step wants them."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch

from anystep.data import DataConfig, Dataset, Examples, Loaded, Splits, Stored
from anystep.data.folder import check_size, decode
from anystep.errors import UserError

CHUNK = 256  # encoded pictures held at once where many are decoded
THREADS = 4


class Example(NamedTuple):
    """A picture as its file holds it, its class if there are classes, and where it came from."""

    picture: bytes
    label: int | None
    origin: str


@dataclass(frozen=True, kw_only=True)
class Pictures(Examples):
    """Examples read while training goes on, as uint8 pictures of one size.

    Attributes:
        size: their shape (C, H, W).
        class_names: one name a class; empty when there are no labels.
    """

    size: tuple[int, int, int]
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.size

    @property
    def scale(self) -> Literal["[-1, 1]"]:
        """Pictures are in [-1, 1]."""
        return "[-1, 1]"

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Examples to train on, each once, in an order that is always the same."""

    def sample(self, most: int) -> Dataset:
        """At most the first `most` of `examples()`, in memory."""
        return self.decoded(islice(self.examples(), most))

    def decoded(self, examples: Iterable[Example]) -> Dataset:
        """The examples, in memory.

        Raises:
            UserError: a picture cannot be read, or a label is none of the classes'.
        """
        left, parts = iter(examples), [self.stored([])]
        while chunk := list(islice(left, CHUNK)):
            parts.append(self.stored(chunk))
        labels = [part.labels for part in parts if part.labels is not None]
        return Dataset(
            torch.cat([part.x for part in parts]),
            torch.cat(labels) if labels else None,
            self.class_names,
        )

    def stored(self, examples: Sequence[Example]) -> Stored:
        """The decoded pictures (n, C, H, W) and labels (n,) of a few examples.

        Raises:
            UserError: a picture cannot be read, or a label is none of the classes'.
        """
        x = np.empty((len(examples), *self.size), np.uint8)
        with ThreadPoolExecutor(THREADS) as pool:
            files = [BytesIO(example.picture) for example in examples]
            for example, readable in zip(examples, pool.map(decode, files, x), strict=True):
                if not readable:
                    raise UserError(f"cannot read the picture {example.origin}; mend or remove it")
        return Stored(torch.from_numpy(x), self._labels(examples) if self.class_names else None)

    def _labels(self, examples: Sequence[Example]) -> torch.Tensor:
        for label, origin in ((example.label, example.origin) for example in examples):
            if label is None or not 0 <= label < self.num_classes:
                raise UserError(
                    f"the label of {origin} is {label}, not one of 0 to {self.num_classes - 1}; "
                    "mend it, or train without labels"
                )
        return torch.tensor([example.label for example in examples], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(DataConfig):
    """What the configs of such pictures have in common.

    Attributes:
        size: height and width of the images.
        channels: 3 for RGB, 1 for grey.
        held_out: how many examples are kept apart, in memory.
        reference_size: at most so many training examples are read into memory for samples to be
            judged against.
    """

    size: tuple[int, int] = (32, 32)
    channels: int = 3
    held_out: int = 1000
    reference_size: int = 10_000

    def __post_init__(self) -> None:
        check_size(self.size, self.channels)
        if self.held_out < 0 or self.reference_size < 1:
            raise UserError("held_out must be at least 0 and reference_size at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an example."""
        return (self.channels, *self.size)

    def reference(self, splits: Loaded) -> Splits:
        """The first training examples, read into memory, and the held-out ones."""
        assert isinstance(splits.train, Pictures)
        return Splits(splits.train.sample(self.reference_size), splits.held_out)


def digest(*facts: object) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def too_few(held_out: int, count: int) -> UserError:
    """The error for data that holding out leaves nothing of."""
    return UserError(
        f"there are {count} examples, and {held_out} are to be held out: nothing is left to "
        "train on; choose a smaller --data.held-out"
    )


def one_line(error: BaseException) -> str:
    """What a library says went wrong, as one short line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]}..."

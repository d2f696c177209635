"""Examples read from shards one after the other, shuffled block by block, resumed exactly.

An epoch reads every shard once, in an order drawn anew. The examples, in the order in which they
come, are cut into blocks of `buffer`; each block is permuted by itself. A batch is the next
examples of that, over the borders of blocks and epochs.

Both orders follow from (seed, epoch, block) alone, so the place where a block begins and the
number of its examples already given say all there is to know: resuming reads one block again.
While a block is given the next one is read, so two of encoded pictures are in memory.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from anystep.data import Dataset, Feed, Order, Stored, Streams, seeded
from anystep.data._pictures import Example, Pictures, digest, one_line, too_few
from anystep.errors import UserError

T = TypeVar("T")
SORTED = 100  # so many examples of one class in a row are no accident


class Shards(Protocol):
    """Examples in numbered shards, each readable from its start."""

    def __len__(self) -> int:
        """How many shards there are."""

    def name(self, shard: int) -> str:
        """What a message calls a shard."""

    def read(self, shard: int) -> Iterator[Example]:
        """The examples of a shard, always in the same order."""


class Place(NamedTuple):
    """Where a run is in a stream.

    Attributes:
        epoch: passes over the data completed.
        block: blocks of this epoch completed.
        shard: where the block in hand begins: the place of a shard in this epoch's order,
        row: and the first example's place in that shard.
        given: examples of the block already given.
    """

    epoch: int = 0
    block: int = 0
    shard: int = 0
    row: int = 0
    given: int = 0


@dataclass(frozen=True, kw_only=True)
class Stream(Pictures):
    """The examples of shards.

    Attributes:
        source: the shards.
        identity: what tells this source from another.
        buffer: examples a block.
        shards: numbers of the shards to read.
        skipped: examples at the start of shards[0] that are not read.
    """

    source: Shards
    identity: tuple[object, ...]
    buffer: int
    shards: Sequence[int]
    skipped: int = 0

    def digest(self) -> str:
        """A hash of what names the source; its content is not read."""
        return digest(self.identity, self.size, self.class_names, len(self.source))

    def examples(self) -> Iterator[Example]:
        """All examples, each once, shard by shard in an order that is always the same."""
        return (example for example, _, _ in self.walk(self.shards))

    def feed(self, batch: int, seed: int) -> Feed:
        """A feed of `batch` examples a step, in an order that follows from the seed."""
        return StreamFeed(self, batch, seed)

    def walk(
        self, shards: Sequence[int], start: int = 0, row: int = 0
    ) -> Iterator[tuple[Example, int, int]]:
        """The examples of `shards` from row `row` of shards[start] on, each with its place.

        Raises:
            UserError: a shard cannot be read.
        """
        for k in range(start, len(shards)):
            first = max(row, self.skipped if shards[k] == self.shards[0] else 0)
            for n, example in enumerate(islice(self._read(shards[k]), first, None), first):
                yield example, k, n
            row = 0

    def _read(self, shard: int) -> Iterator[Example]:
        try:
            yield from self.source.read(shard)
        except UserError:
            raise
        except Exception as error:  # tar, arrow and network each have their own
            raise UserError(
                f"cannot read {self.source.name(shard)} ({one_line(error)}); mend or replace it, "
                "and the same command goes on from the last checkpoint"
            ) from None

    def shuffled(self, seed: int, place: Place) -> Iterator[tuple[Example, Place]]:
        """Examples for ever, from `place` on, each with the place behind it.

        Raises:
            UserError: a shard cannot be read, or the data are not those `place` was in.
        """
        given = place.given
        for start, found in ahead(self.blocks(seed, place)):
            if len(found) < given:
                raise UserError("the data have fewer examples than before; restore them")
            generator = seeded(seed, start.block, stream=2 + start.epoch)
            mixed = torch.randperm(len(found), generator=generator).tolist()
            for k in range(given, len(found)):
                yield found[mixed[k]], start._replace(given=k + 1)
            given = 0

    def blocks(self, seed: int, place: Place) -> Iterator[tuple[Place, list[Example]]]:
        """Blocks for ever, as they are read, from the one that begins at `place` on."""
        order = Order(len(self.shards), len(self.shards), seed)
        for epoch in count(place.epoch):
            walk = self.walk([self.shards[k] for k in order(epoch)], place.shard, place.row)
            for block in count(place.block):
                found = list(islice(walk, self.buffer))
                if not found and block == place.block and epoch == place.epoch:
                    raise UserError("the data have fewer examples than before; restore them")
                if not found:
                    break
                _, shard, row = found[0]
                yield Place(epoch, block, shard, row), [example for example, _, _ in found]
            place = Place()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items of an endless iterator, each made while the one before it is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items)
        while True:
            item = coming.result()
            coming = reader.submit(next, items)
            yield item


@dataclass
class StreamFeed:
    """A feed of a stream: it remembers where it is."""

    stream: Stream
    batch: int
    seed: int
    left: Iterator[tuple[Example, Place]] = field(init=False)

    def __post_init__(self) -> None:
        self.seek(None)

    def __call__(self, step: int) -> Stored:
        """The next examples, whatever the step, and the place behind them."""
        taken = list(islice(self.left, self.batch))
        stored = self.stream.stored([example for example, _ in taken])
        return stored._replace(position=taken[-1][1]._asdict())

    def seek(self, position: Any) -> None:
        """Go on from a position that an earlier feed gave; from the start for None."""
        self.left = self.stream.shuffled(self.seed, Place(**position or {}))


def split_stream(stream: Stream, held_out: int) -> Streams:
    """Set the first `held_out` examples of a stream apart, in memory; the rest is to train on.

    "First" is meant in an order of the shards drawn once and for all, in which the later examples
    also serve as the reference: shards in an order of their own, by class say, are mixed by it.

    Raises:
        UserError: nothing is left to train on, or an example is not as it should be.
    """
    shards = Order(len(stream.source), len(stream.source), 0)(0).tolist()
    found = list(islice(stream.walk(shards), held_out + 1))
    if len(found) <= held_out:
        raise too_few(held_out, len(found))
    apart, (first, shard, row) = found[:held_out], found[held_out]
    stream.stored([first])  # a wrong key or size is better told now than in the first step
    train = replace(stream, shards=shards[shard:], skipped=row)
    held = stream.decoded(example for example, _, _ in apart)
    _warn_if_sorted(held)
    return Streams(train, held)


def _warn_if_sorted(held: Dataset) -> None:
    """Warn when the first examples of many classes are all of one."""
    one = held.labels is not None and bool((held.labels == held.labels[:1]).all())
    if one and held.num_classes > 1 and len(held) >= SORTED:
        warnings.warn(
            f"the first {len(held)} examples are all of one class: shuffle the examples when a "
            "stream is written, for its blocks do not mix what is far apart",
            stacklevel=4,
        )

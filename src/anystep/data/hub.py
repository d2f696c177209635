"""Pictures of a Hugging Face dataset: from the hub, or a local folder that `datasets` reads.

Map-style (the default) the files are on this machine, any row can be read at any time and an
epoch is one permutation of all rows. Streaming, they are read in order and shuffled in blocks
(`_stream`). Either way a picture is decoded when a step wants it, and exactly as `folder` does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anystep.data import Feed, InOrder, Order, Stored, Streams
from anystep.data._pictures import (
    CHUNK,
    Example,
    Pictures,
    PicturesConfig,
    digest,
    one_line,
    too_few,
)
from anystep.data._stream import Stream, split_stream
from anystep.data.arrays import class_ids
from anystep.errors import UserError
from anystep.registry import unknown

MOST_SHARDS = 1024  # more files are read in so many groups: opening one looks at all of them
PROBES = 16  # rows whose content is in the digest of map-style data


@dataclass(frozen=True, kw_only=True)
class Hub(PicturesConfig):
    """A split of a Hugging Face dataset.

    Labels are a ClassLabel column, which has names, or, map-style, integers from 0 without gaps.

    Attributes:
        path: name on the hub, or a folder: one written by `Dataset.save_to_disk`, or of pictures
            or parquet files as `datasets.load_dataset` reads them.
        subset: which configuration of the dataset, if it has several.
        split: which split.
        revision: branch, tag or commit on the hub.
        image_column: the column of the pictures.
        label_column: the column of the classes; None for no labels.
        streaming: read the data in order and never keep them on this machine.
        buffer: examples that are shuffled together when streaming.
        held_out: how many examples are kept apart, in memory: a random choice, always the same,
            or, streaming, those that come first.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    streaming: bool = False
    buffer: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer < 1:
            raise UserError(f"buffer must be at least 1, not {self.buffer}")

    def load(self) -> Streams:
        """Open the dataset, and read the held-out examples.

        Raises:
            UserError: there is no such dataset, split or column, or a column holds something else.
        """
        library = _library()
        data = self._columns(library, self._open(library))
        names = self._classes(library, data)
        if self.streaming:
            return self._stream(data, names)
        count = len(data)
        if count <= self.held_out:
            raise too_few(self.held_out, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        apart, rest = order[: self.held_out], order[self.held_out :]
        table = Table(
            size=self.shape, class_names=names, data=data, columns=self._named, rows=rest
        )
        return Streams(table, table.decoded(table.at(apart.tolist())))

    def _stream(self, data: Any, names: tuple[str, ...]) -> Streams:
        shards = HubShards(data, self.path, self._named, min(data.num_shards, MOST_SHARDS))
        identity = (self.path, self.subset, self.split, self.revision, *self._named)
        stream = Stream(
            size=self.shape,
            class_names=names,
            source=shards,
            identity=identity,
            buffer=self.buffer,
            shards=range(len(shards)),
        )
        return split_stream(stream, self.held_out)

    @property
    def _named(self) -> list[str]:
        """The columns that are read: the picture's, and the label's if there is one."""
        return [name for name in (self.image_column, self.label_column) if name is not None]

    def _open(self, library: Any) -> Any:
        """The split as a `datasets.Dataset`, or an `IterableDataset` when streaming."""
        folder = Path(self.path)
        if self.path.startswith((".", "/", "~")) and not folder.is_dir():
            raise UserError(f"there is no folder {self.path}; give a dataset as --data.path")
        saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
        try:
            if saved:
                return self._saved(library.load_from_disk(self.path), library)
            return library.load_dataset(
                self.path,
                self.subset,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
        except UserError:
            raise
        except Exception as error:  # the library has no error of its own
            raise UserError(
                f"cannot open the dataset {self.path}, split {self.split!r} ({one_line(error)}); "
                "see --data.path, --data.split and --data.subset"
            ) from None

    def _saved(self, data: Any, library: Any) -> Any:
        """The split of what `save_to_disk` wrote: of several, or of one alone."""
        if isinstance(data, library.DatasetDict):
            if self.split not in data:
                raise UserError(unknown(f"split of {self.path}", self.split, data))
            data = data[self.split]
        data = data.with_format(None)
        return data.to_iterable_dataset(min(len(data), 64)) if self.streaming else data

    def _columns(self, library: Any, data: Any) -> Any:
        """The data with the columns asked for alone, pictures left encoded."""
        if data.features is None:
            raise UserError(
                f"{self.path} does not say what its columns hold; use --data.no-streaming"
            )
        for name in self._named:
            if name not in data.features:
                hint = "" if name == self.image_column else " (--data.label-column None for none)"
                raise UserError(unknown(f"column of {self.path}", name, data.features) + hint)
        data = data.select_columns(self._named)
        kind = data.features[self.image_column]
        if not isinstance(kind, library.Image) and getattr(kind, "dtype", "") != "binary":
            raise UserError(
                f"column {self.image_column!r} of {self.path} holds {_kind(kind)}, not "
                "pictures; name another as --data.image-column, or cast it to datasets.Image"
            )
        return data.cast_column(self.image_column, library.Image(decode=False))

    def _classes(self, library: Any, data: Any) -> tuple[str, ...]:
        """The names of the classes; of integers, the integers."""
        if self.label_column is None:
            return ()
        kind = data.features[self.label_column]
        if isinstance(kind, library.ClassLabel):
            return tuple(kind.names)
        if self.streaming:
            raise UserError(
                f"column {self.label_column!r} of {self.path} is no ClassLabel, so a stream does "
                "not say how many classes there are; use --data.no-streaming, cast it, or train "
                "without labels: --data.label-column None"
            )
        column = data.select_columns([self.label_column]).with_format("numpy")[:]
        labels = class_ids(np.asarray(column[self.label_column]), len(data))
        return tuple(str(k) for k in range(int(labels.max()) + 1))


@dataclass(frozen=True, kw_only=True)
class Table(Pictures):
    """Rows of a map-style dataset, read when a step wants them.

    Attributes:
        data: the `datasets.Dataset`, pictures left encoded.
        columns: of the picture, and of the label if there is one.
        rows: the rows to train on (N,).
    """

    data: Any
    columns: Sequence[str]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """A hash of the number of rows, the classes, and a few rows spread over them."""
        # All of the content would have to be read for each start of a run.
        spread = torch.linspace(0, len(self) - 1, PROBES).long()
        return digest(
            len(self), self.class_names, self.decoded(self.at(self.rows[spread].tolist())).digest()
        )

    def examples(self) -> Iterator[Example]:
        """All examples to train on, in an order that is always the same."""
        for rows in torch.split(self.rows, CHUNK):
            yield from self.at(rows.tolist())

    def at(self, rows: Sequence[int]) -> Iterator[Example]:
        """The examples of these rows of the dataset."""
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            found = self.data[some]
            for k, row in enumerate(some):
                values = {name: found[name][k] for name in self.columns}
                yield example(values, self.columns, f"in row {row}")

    def feed(self, batch: int, seed: int) -> Feed:
        """A feed of `batch` examples a step, in an order that follows from the seed."""

        def read(index: Tensor) -> Stored:
            return self.stored(list(self.at(self.rows[index].tolist())))

        return InOrder(read, Order(len(self), batch, seed))


@dataclass(frozen=True)
class HubShards:
    """The shards of an `IterableDataset`.

    The library's own `shuffle` and `state_dict` are not used: what they promise for shuffled
    shards has changed from version to version, the place in a shard has not.
    """

    data: Any
    path: str
    columns: Sequence[str]
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, shard: int) -> str:
        """What a message calls a shard."""
        return f"shard {shard} of {self.path}"

    def read(self, shard: int) -> Iterator[Example]:
        """The examples of a shard, always in the same order."""
        rows = self.data.shard(num_shards=self.count, index=shard)
        for row, values in enumerate(rows):
            yield example(values, self.columns, f"in row {row} of shard {shard}")


def example(values: dict[str, Any], columns: Sequence[str], where: str) -> Example:
    """The example that a row of a dataset holds.

    Raises:
        UserError: there is no picture in it, or its file cannot be read.
    """
    picture = values[columns[0]] or {}
    content, path = picture.get("bytes"), picture.get("path")
    origin = f"{where} ({path})" if path else where
    if content is None and path:
        import fsspec  # comes with datasets

        try:
            with fsspec.open(path, "rb") as file:  # on this machine, or where the stream is from
                content = file.read()
        except OSError as error:
            raise UserError(f"cannot read the picture {origin} ({one_line(error)})") from None
    if content is None:
        raise UserError(f"there is no picture {origin}; leave such rows out")
    return Example(content, values[columns[1]] if columns[1:] else None, origin)


def _kind(kind: Any) -> str:
    """What a column holds, in a word or two."""
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "these data are read by the library datasets: pip install 'anystep[hub]'"
        ) from None
    return datasets

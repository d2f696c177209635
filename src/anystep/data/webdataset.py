"""WebDataset: tar files in which the files of an example stand side by side under one name.

A shard holds 000.jpg, 000.cls, 001.jpg, 001.cls ...; `cls` is a class id in digits. Shards are
read in order, from files or over the network, and shuffled in blocks (`_stream`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from anystep.data import Streams
from anystep.data._pictures import Example, PicturesConfig
from anystep.data._stream import Stream, split_stream
from anystep.errors import UserError
from anystep.registry import unknown

# webdataset also knows pipe:, which would start whatever program a config names.
SCHEMES = ("", "file", "http", "https", "hf", "gs")


@dataclass(frozen=True, kw_only=True)
class WebDataset(PicturesConfig):
    """Tar shards of pictures.

    Attributes:
        urls: files or http(s):, hf: or gs: addresses; braces make many of one, as in
            data/shard-{0000..0099}.tar, and :: stands between several.
        image_key: suffixes of a picture's file; of several, the first that an example has.
        label_key: suffix of the file of the class id; None for no labels.
        num_classes: how many classes there are; needed with labels.
        buffer: examples that are shuffled together.
        held_out: how many examples, those that come first, are kept apart, in memory.
    """

    urls: str
    image_key: str = "jpg;jpeg;png;webp"
    label_key: str | None = "cls"
    num_classes: int = 0
    buffer: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer < 1 or self.num_classes < 0:
            raise UserError("buffer must be at least 1 and num_classes at least 0")

    def load(self) -> Streams:
        """Find the shards, and read the held-out examples.

        Raises:
            UserError: a shard is missing or damaged, or its examples are not as described above.
        """
        if self.label_key is not None and self.num_classes < 1:
            raise UserError(
                "say how many classes there are with --data.num-classes, or train without labels: "
                "--data.label-key None"
            )
        keys = tuple(key for key in self.image_key.lower().split(";") if key)
        shards = TarShards(_expanded(self.urls), keys, self.label_key)
        classes = 0 if self.label_key is None else self.num_classes
        stream = Stream(
            size=self.shape,
            class_names=tuple(str(k) for k in range(classes)),
            source=shards,
            identity=(*shards.urls, *keys, self.label_key),
            buffer=self.buffer,
            shards=range(len(shards)),
        )
        return split_stream(stream, self.held_out)


@dataclass(frozen=True)
class TarShards:
    """Tar files as shards.

    Attributes:
        urls: one a shard.
        image_keys: suffixes of a picture's file.
        label_key: suffix of the file of the class id, or None.
    """

    urls: Sequence[str]
    image_keys: Sequence[str]
    label_key: str | None

    def __len__(self) -> int:
        return len(self.urls)

    def name(self, shard: int) -> str:
        """What a message calls a shard."""
        return self.urls[shard]

    def read(self, shard: int) -> Iterator[Example]:
        """The examples of a shard, always in the same order."""
        url = self.urls[shard]
        for files in _library().tariterators.tarfile_samples([{"url": url}]):
            yield self._example(files, f"{files['__key__']} in {url}")

    def _example(self, files: dict[str, Any], origin: str) -> Example:
        """The example made of the files of one name, by their suffixes."""
        key = next((key for key in self.image_keys if key in files), None)
        known = [name for name in files if not name.startswith("__")]
        if key is None:
            raise UserError(unknown(f"file of {origin}:", self.image_keys[0], known))
        if self.label_key is None:
            return Example(files[key], None, origin)
        if self.label_key.lower() not in files:
            raise UserError(unknown(f"file of {origin}:", self.label_key, known))
        text = files[self.label_key.lower()]
        if not text.strip().isdigit():
            raise UserError(
                f"the {self.label_key} of {origin} is {text[:20]!r}, not a class id in digits"
            )
        return Example(files[key], int(text), origin)


def _expanded(urls: str) -> list[str]:
    """The shards' addresses.

    Raises:
        UserError: one is of a kind that is not read, or a file that does not exist.
    """
    found: list[str] = _library().shardlists.expand_urls(urls)
    for url in found:
        scheme, path = urlparse(url).scheme, url.removeprefix("file:")
        if scheme not in SCHEMES:
            raise UserError(f"{url} is neither a file nor http, https, hf or gs; give such urls")
        if scheme in ("", "file") and not Path(path).is_file():
            raise UserError(f"there is no file {path}; name the shards with --data.urls")
    return found


def _library() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "tar shards are read by the library webdataset: pip install 'anystep[webdataset]'"
        ) from None
    return webdataset

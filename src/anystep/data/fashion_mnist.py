"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey 28x28 pictures of clothes in ten classes.

It is read from the four IDX files of its authors. An IDX file is two zero bytes, a type code
(8 = uint8), the number of dimensions, each dimension as a big-endian 32-bit integer, then the
values in row-major order.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anystep.data import DataConfig, Dataset, Splits
from anystep.errors import UserError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class FashionMNIST(DataConfig):
    """Fashion-MNIST from its four IDX files; no download.

    Attributes:
        path: folder of the files, gzipped (`train-images-idx3-ubyte.gz`, ...) or not.
    """

    path: Path = Path("/usr/share/datasets/fashion-mnist")

    def load(self) -> Splits:
        """uint8 images (1, 28, 28): 60,000 to train on; the 10,000 test images are held out.

        Raises:
            UserError: a file is missing or damaged.
        """
        return Splits(self._part("train"), self._part("t10k"))

    def _part(self, part: str) -> Dataset:
        images = self._read(f"{part}-images-idx3-ubyte", 28, 28)
        labels = self._read(f"{part}-labels-idx1-ubyte")
        if len(images) != len(labels) or labels.max() >= len(CLASSES):
            raise UserError(
                f"the {part} files in {self.path} do not belong together: {len(images)} images, "
                f"{len(labels)} labels up to {labels.max()}; get all four from one source"
            )
        x = torch.from_numpy(images).unsqueeze(1)
        return Dataset(x, torch.from_numpy(labels).long(), CLASSES)

    def _read(self, name: str, *shape: int) -> NDArray[np.uint8]:
        """The uint8 array (N, *shape) in file `name`, gzipped or not."""
        packed, plain = self.path / f"{name}.gz", self.path / name
        file = packed if packed.is_file() else plain
        if not file.is_file():
            raise UserError(
                f"Fashion-MNIST: there is no {name}.gz in {self.path}; install the Debian/Ubuntu "
                "package dataset-fashion-mnist, or put the four files of "
                "github.com/zalandoresearch/fashion-mnist in a folder and name it by --data.path"
            )
        try:
            data = file.read_bytes()
            array = parse_idx(gzip.decompress(data) if file is packed else data)
            if array.shape[1:] != shape or not array.size:
                raise ValueError(f"its shape is {array.shape}, not {('N', *shape)}")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"cannot read {file} ({error}); replace it") from None
        return array


def parse_idx(data: bytes) -> NDArray[np.uint8]:
    """The uint8 array that the bytes of an IDX file hold.

    Raises:
        ValueError: these are not the bytes of one whole IDX file of uint8.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] < 1:
        raise ValueError("it is not an IDX file of bytes")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError("it ends early")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    # reshape refuses a wrong number of values; PyTorch wants memory of its own to write to.
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()

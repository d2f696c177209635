"""Pairs of noise and the sample a model makes of it, as `anystep pairs` writes them.

A folder of pairs holds `pairs.json` (which model made them and how, how many there are to be) and
one file for every `CHUNK` of them: `pairs-000000.safetensors` with x0 and x1 (n, *shape), cond
(n,) if there are classes, and the forwards they took.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystep.checkpoint import read_json, read_tensors
from anystep.data import DataConfig, Dataset, Loaded, Splits
from anystep.errors import UserError
from anystep.registry import from_json
from anystep.spec import VAESpec

INFO, CHUNK = "pairs.json", 1024


def chunk_path(folder: Path, index: int) -> Path:
    """The file of chunk `index`."""
    return folder / f"pairs-{index:06d}.safetensors"


def read_chunk(folder: Path, index: int) -> dict[str, Tensor]:
    """The tensors of chunk `index`; empty when it has not been made.

    Raises:
        UserError: it is damaged.
    """
    path = chunk_path(folder, index)
    try:
        return read_tensors(path) if path.is_file() else {}
    except UserError as error:
        raise UserError(f"{error}: remove it, and anystep pairs makes it again") from None


@dataclass(frozen=True)
class Pairs(DataConfig):
    """The pairs in a folder.

    Attributes:
        path: the folder.
    """

    path: Path

    def load(self) -> Splits:
        """Read all pairs; none is held out."""
        info = self.info()
        n, chunks = info["n"], []
        for start in range(0, n, CHUNK):
            chunk = read_chunk(self.path, start // CHUNK)
            made = start + len(chunk.get("x0", ()))
            if made < min(start + CHUNK, n):
                raise UserError(
                    f"{self.path} holds {made} of {n} pairs: the same anystep pairs command "
                    "goes on making them"
                )
            chunks.append(chunk)
        columns = {key: torch.cat([chunk[key] for chunk in chunks])[:n] for key in chunks[0]}
        names = tuple(str(k) for k in range(info["num_classes"]))
        train = Dataset(
            columns["x1"],
            columns.get("cond"),
            names,
            columns["x0"],
            float(info["guidance"]),
            None if info.get("vae") is None else from_json(VAESpec, info["vae"]),
        )
        return Splits(train, train.rows(torch.arange(0)))

    def reference(self, splits: Loaded) -> Splits:
        """The data that the model behind the pairs was trained on."""
        data: DataConfig = from_json(DataConfig, self.info()["data"])
        return data.reference(data.load())

    def info(self) -> dict[str, Any]:
        """The content of `pairs.json`.

        Raises:
            UserError: it is missing, damaged, or something else under that name.
        """
        info: dict[str, Any] = read_json(self.path / INFO)
        if not isinstance(info, dict) or not info.keys() >= {
            "n",
            "num_classes",
            "guidance",
            "data",
        }:
            raise UserError(f"{self.path / INFO} was not written by anystep pairs")
        return info

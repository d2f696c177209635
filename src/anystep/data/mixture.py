"""A two-dimensional mixture whose flow map is known: the toy on which methods are understood."""

from dataclasses import dataclass

import torch

from anystep.data import DataConfig, Dataset, Splits
from anystep.errors import UserError
from anystep.oracle import ring


@dataclass(frozen=True)
class Mixture(DataConfig):
    """Eight Gaussians on a circle (`anystep.oracle.ring`), as float vectors (2,).

    Attributes:
        train: number of training points.
        held_out: number of points kept apart.
        labels: give each point its component as its class.
        seed: of the draw.
    """

    train: int = 20_000
    held_out: int = 5_000
    labels: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train < 1 or self.held_out < 0:
            raise UserError("the mixture needs train of at least 1 and held_out of at least 0")

    def load(self) -> Splits:
        """Draw the points; both splits are exact samples."""
        generator = torch.Generator().manual_seed(self.seed)
        return Splits(self._draw(self.train, generator), self._draw(self.held_out, generator))

    def _draw(self, n: int, generator: torch.Generator) -> Dataset:
        x, component = ring().sample(max(n, 1), generator)
        x, component = x[:n], component[:n]
        if not self.labels:
            return Dataset(x.float())
        return Dataset(x.float(), component, tuple(f"mode {k}" for k in range(8)))

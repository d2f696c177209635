"""The 8x8 handwritten digits that scikit-learn carries: 1,797 grey images, ten classes."""

from dataclasses import dataclass

import torch

from anystep.data import DataConfig, Dataset, Splits, split
from anystep.errors import UserError


@dataclass(frozen=True)
class Digits(DataConfig):
    """scikit-learn's digits; no download.

    Attributes:
        held_out: share of the images kept apart, in [0, 1).
    """

    held_out: float = 0.2

    def load(self) -> Splits:
        """Images (1, 8, 8) in [-1, 1] and labels 0..9; needs scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "the digits come with scikit-learn: pip install 'anystep[digits]'"
            ) from None
        raw = load_digits()
        # Pixels are counts 0..16, so they are kept as floats: a uint8 scale would not be exact.
        x = torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(raw.target).long()
        return split(Dataset(x, labels, tuple(str(k) for k in range(10))), self.held_out)

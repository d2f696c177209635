"""Scores that are quoted against other people's, and what they may be called.

Such a number means nothing without the features, the count of samples and the rounding it was
made with, so its name says them, and its notes say the rest.
"""

from typing import Protocol

from torch import Tensor

FULL = 50_000  # samples of a number that is quoted as it is


class Quoted(Protocol):
    """Scores of samples whose names say what they are."""

    @property
    def note(self) -> str:
        """How they are made, in a sentence."""

    def __call__(self, x1: Tensor, features: Tensor) -> dict[str, float]:
        """The scores, by name, of samples x1 (N, *shape) whose features are (N, D)."""


def counted(score: str, n: int, quotable: bool = True) -> str:
    """A score's name with its count of samples; "50k" is kept for 50,000 that are quotable."""
    return f"{score}-{'50k' if quotable and n == FULL else n}"

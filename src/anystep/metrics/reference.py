"""Fréchet distance to statistics that others computed: the files behind published FIDs.

A reference is an .npz file in one of two layouts:

    mu (D,), sigma (D, D)      mean and unbiased covariance of features, of whatever network
    arr_0 (N, H, W, C) uint8   pictures, whose features are taken here

Files of the ADM evaluation hold both; the first is used then. A distance is an FID only in the
features of the Inception network of Heusel et al. on whole numbers 0..255. Here it is known by
the SHA-256 of the TorchScript file that StyleGAN2-ADA and clean-fid use; in any other features the
number is called a Fréchet distance.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.metrics.features import BATCH, TorchScriptFeatures
from anystep.metrics.frechet import feature_pair, frechet_from_moments, moments
from anystep.metrics.quoted import counted

INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reference:
    """The moments of features, and the network they are of.

    Attributes:
        path: the file they were read from.
        features: what gives the features of the samples.
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased.
        source: what in the file they come from, in a few words.
    """

    path: Path
    features: TorchScriptFeatures
    mean: Tensor
    covariance: Tensor
    source: str

    @property
    def note(self) -> str:
        """How the distance is made, in a sentence."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return (
            f"{self._score} to the {self.source} in {self.path.name} (SHA-256 {digest}), "
            f"in the features of {self.features.path.name}."
        )

    def __call__(self, x1: Tensor, features: Tensor) -> dict[str, float]:
        """The distance, by its name, of samples whose features are (N, D).

        Nothing where they are fewer than 2 or hold NaN.

        Raises:
            UserError: they are of another number of features.
        """
        if len(features) < 2 or not features.isfinite().all():
            return {}
        rows, mean = feature_pair(features, self.mean.to(features.device)[None])
        distance = frechet_from_moments(*moments(rows), mean[0], self.covariance.to(rows.device))
        return {self.name(len(features)): distance}

    def name(self, n: int) -> str:
        """What the distance of n samples may be called."""
        score = counted(self._score, n, quotable=self._score == "FID")
        return f"{score} (features {self.features.path.name})"

    @property
    def _score(self) -> str:
        inception = self.features.digest == INCEPTION and self.features.uint8
        return "FID" if inception and self.features.size is None else "Fréchet"


def read_reference(path: Path, features: TorchScriptFeatures, example: Tensor) -> Reference:
    """The reference in an .npz file; nothing in it is unpickled.

    Args:
        path: the file.
        features: the network whose statistics it holds, or is to give.
        example: one picture (C, H, W) such as will be judged, in [-1, 1].

    Raises:
        UserError: there is no such file, it is of neither layout, or it is of other features
            or pictures.
    """
    arrays = _read(path)
    if "mu" in arrays and "sigma" in arrays:
        mean, covariance = _statistics(path, arrays["mu"], arrays["sigma"])
        size = features(example[None]).shape[1]
        if len(mean) != size:
            raise UserError(
                f"{path} holds statistics of {len(mean)} features and {features.path} gives "
                f"{size}: they are not of one network"
            )
        return Reference(path, features, mean, covariance, f"mu and sigma of {size} features")
    pictures = _pictures(path, arrays["arr_0"], tuple(example.shape))
    parts = [features(rows.float() / 127.5 - 1) for rows in torch.split(pictures, BATCH)]
    mean, covariance = moments(torch.cat(parts).double())
    return Reference(path, features, mean, covariance, f"{len(pictures):,} pictures")


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file that are of use here."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("a single array, as .npy files hold it")
        with file:
            names = list(file.files)
            wanted = ("mu", "sigma") if {"mu", "sigma"} <= set(names) else ("arr_0",)
            found = {name: file[name] for name in wanted if name in names}
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except DAMAGED:
        raise UserError(f"{path} is not an .npz file of arrays, or is damaged") from None
    if not found:
        raise UserError(
            f"{path} holds {', '.join(names) or 'nothing'}: a reference has mu and sigma, or arr_0"
        )
    return found


def _statistics(path: Path, mu: np.ndarray, sigma: np.ndarray) -> tuple[Tensor, Tensor]:
    """The moments, if that is what they are."""
    real = mu.dtype.kind == "f" and sigma.dtype.kind == "f"
    if not real or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise UserError(
            f"{path}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape} are no mean "
            f"(D,) and covariance (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: mu or sigma holds NaN or infinity")
    if not np.allclose(sigma, sigma.T, atol=1e-6 * abs(sigma).max()):
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance")
    return torch.from_numpy(mu).double(), torch.from_numpy(sigma).double()


def _pictures(path: Path, pictures: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """The pictures (N, C, H, W) as uint8, if they are like those that will be judged."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or len(pictures) < 2:
        raise UserError(
            f"{path}: arr_0 {pictures.dtype} {pictures.shape} are no uint8 pictures (N, H, W, C)"
        )
    found = torch.from_numpy(pictures).movedim(-1, 1)
    if found.shape[1:] != shape:
        raise UserError(f"{path} holds pictures {tuple(found.shape[1:])}, the model makes {shape}")
    return found

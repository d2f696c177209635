"""Features: what the distances between sets of samples are measured in.

Any callable that maps examples in the model's scale to one vector each will do. Three are here:

    Classifier           penultimate features of a small network trained on the data's own labels
    TorchScriptFeatures  a program that the user names, such as the Inception network of the FID
    PixelFeatures        principal components of the pixels, for data without labels

Distances in different features are different quantities: say which, by `name`, next to them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anystep.errors import UserError

BATCH = 512  # examples a call of a program


class Features(Protocol):
    """Maps examples to features, without gradients."""

    @property
    def name(self) -> str:
        """What the features are, in a few words."""

    def __call__(self, x1: Tensor) -> Tensor:
        """Features (N, D) of examples (N, *shape) in the model's scale."""


class TorchScriptFeatures:
    """The output of a TorchScript program that the user names.

    A TorchScript file is a program, and it is run: load only what you trust. The one behind the
    usual FID and KID, StyleGAN's `inception-2015-12-05.pt`, wants uint8 images and has an
    argument `return_features`: a program with that argument is called with it set, and fed
    uint8 unless told otherwise.

    Attributes:
        digest: the SHA-256 of the file.

    Args:
        path: the file.
        size: resize the images to `size` x `size` first; None leaves that to the program.
        uint8: feed whole numbers 0..255 as uint8 in place of floats in [-1, 1]; by default only
            to a program that has the argument `return_features`.
        rgb: feed grey images as three equal channels.
        device: where the program runs.

    Raises:
        UserError: the file is missing or is no TorchScript program.
    """

    def __init__(
        self,
        path: Path | str,
        size: int | None = None,
        *,
        uint8: bool | None = None,
        rgb: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path, self.size, self.rgb = Path(path), size, rgb
        self._device = torch.device(device)
        self._program = _load_program(self.path, self._device)
        self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        arguments = self._program.forward.schema.arguments
        named = any(argument.name == "return_features" for argument in arguments)
        self._options = {"return_features": True} if named else {}
        self.uint8 = named if uint8 is None else uint8

    @property
    def name(self) -> str:
        """What the features are: the file, and what is done to the images it is given."""
        resized = f"resized to {self.size} x {self.size}" if self.size else "not resized"
        rounded = "rounded to uint8" if self.uint8 else "floats in [-1, 1]"
        return (
            f"TorchScript program {self.path.name} (SHA-256 {self.digest}; images {resized} "
            f"before it, {rounded})"
        )

    def __call__(self, x1: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W) in [-1, 1].

        Raises:
            UserError: the program fails on such images or does not give one vector each.
        """
        return in_batches(self._run, x1, self._device)

    def _run(self, x1: Tensor) -> Tensor:
        images = self._prepared(x1)
        what = f"{self.path}: the program, given {images.dtype} images {tuple(images.shape)},"
        try:
            features = self._program(images, **self._options)
        except (RuntimeError, torch.jit.Error) as error:
            raise UserError(f"{what} fails: {str(error).strip().splitlines()[-1]}") from None
        if not isinstance(features, Tensor) or features.shape[:-1] != x1.shape[:1]:
            raise UserError(f"{what} does not return one vector of features each")
        return features

    def _prepared(self, x1: Tensor) -> Tensor:
        if x1.ndim != 4:
            raise UserError(f"TorchScript features are for images, not shape {tuple(x1.shape)}")
        if self.size is not None:
            size = (self.size, self.size)
            x1 = F.interpolate(x1, size, mode="bilinear", antialias=True)
        x1 = in_colour(x1) if self.rgb else x1
        return to_uint8(x1) if self.uint8 else x1


def in_colour(x1: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) as three equal channels; others unchanged."""
    return x1.repeat(1, 3, 1, 1) if x1.shape[1] == 1 else x1


def to_uint8(x1: Tensor) -> Tensor:
    """Images in [-1, 1] as whole numbers 0..255."""
    return (x1 * 127.5 + 127.5).round().clamp(0, 255).byte()


def _load_program(path: Path, device: torch.device) -> Any:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        program = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is not a TorchScript program, or is damaged") from None
    return program.eval()


class PixelFeatures:
    """Pixels in the top (at most 64) principal directions of the training data.

    Distances in them see layout and contrast, not content.

    Args:
        train_x: training examples (N, *shape) in the model's scale.

    Raises:
        UserError: there are fewer than 2 examples.
    """

    def __init__(self, train_x: Tensor) -> None:
        if len(train_x) < 2:
            raise UserError("principal components need 2 training examples or more")
        x = train_x.flatten(1).double()
        self.mean = x.mean(0)
        self.directions = _principal_directions(x - self.mean, 64)

    @property
    def name(self) -> str:
        """What the features are, in a few words."""
        return f"pixels, {self.directions.shape[1]} principal components"

    def __call__(self, x1: Tensor) -> Tensor:
        """Features (N, D), D <= 64, of examples (N, *shape) in the model's scale."""
        return in_batches(self._project, x1, self.directions.device)

    def _project(self, x1: Tensor) -> Tensor:
        return (x1.flatten(1).double() - self.mean) @ self.directions


def _principal_directions(x: Tensor, count: int) -> Tensor:
    """The orthonormal directions (D, count) in which centred rows (N, D) vary most.

    Randomised subspace iteration (Halko et al. 2011, Algorithm 4.4) with a fixed seed.
    """
    rank = min(count + 32, *x.shape)  # some directions too many make the kept ones accurate
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(x.shape[1], rank, dtype=x.dtype, generator=generator).to(x.device)
    for _ in range(5):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    rotation: Tensor = torch.linalg.svd(x @ basis, full_matrices=False).Vh.T
    return basis @ rotation[:, :count]


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x1: Tensor, device: torch.device) -> Tensor:
    """`function` of rows of `x1`, run on `device`, brought back to where `x1` is."""
    return torch.cat([function(rows.to(device)).to(x1.device) for rows in torch.split(x1, BATCH)])

"""FID, KID and IS by torch-fidelity, an optional extra.

The package's own Inception network (`inception-v3-compat`) and its own resizing follow the
TensorFlow code behind the published numbers. It is imported only here, when it is asked for, and
fetches the network's weights when it first needs them.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anystep.data import Dataset
from anystep.errors import UserError
from anystep.metrics.features import in_colour, to_uint8
from anystep.metrics.quoted import counted

SPLITS, SUBSET = 10, 1000  # of the IS and the KID, as published; fewer where samples are fewer


class Pictures(torch.utils.data.Dataset[Tensor]):
    """Images in [-1, 1] as torch-fidelity reads them: uint8 (3, H, W), one at a time."""

    def __init__(self, read: Callable[[slice], Tensor], n: int) -> None:
        self.read, self.n = read, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: int) -> Tensor:
        return to_uint8(in_colour(self.read(slice(k, k + 1))))[0]


class Fidelity:
    """FID, KID and IS of samples, against the training pictures.

    Args:
        train: the pictures.
        device: where torch-fidelity's network runs; cpu or cuda.

    Raises:
        UserError: torch-fidelity cannot be used, or the data are no grey or RGB pictures.
    """

    def __init__(self, train: Dataset, device: torch.device | str = "cpu") -> None:
        if train.scale != "[-1, 1]" or train.shape[0] not in (1, 3) or train.vae is not None:
            raise UserError(f"FID, KID and IS are of grey or RGB pictures, not of {train.shape}")
        self._library = _library()
        self._train = Pictures(lambda rows: train.batch(rows)[0], len(train))
        self._cuda = torch.device(device).type == "cuda"
        # The training pictures' features, for as long as this object lives.
        self._cache = tempfile.TemporaryDirectory()

    @property
    def note(self) -> str:
        """How the scores are made, in a sentence."""
        version = getattr(self._library, "__version__", "of unknown version")
        return (
            f"FID, KID and IS by torch-fidelity {version} (inception-v3-compat, which resizes to "
            f"299 x 299 as TensorFlow 1 does), of images rounded to uint8, against "
            f"{len(self._train):,} training pictures."
        )

    def __call__(self, x1: Tensor, features: Tensor) -> dict[str, float]:
        """The scores of samples x1 (N, C, H, W), by name; none where x1 holds NaN.

        Raises:
            UserError: torch-fidelity fails.
        """
        if not x1.isfinite().all():
            return {}
        n = len(x1)
        try:
            found = self._library.calculate_metrics(
                input1=Pictures(lambda rows: x1[rows], n),
                input2=self._train,
                input2_cache_name="train",
                cache_root=self._cache.name,
                isc=True,
                fid=True,
                kid=True,
                isc_splits=min(SPLITS, n),
                kid_subset_size=min(SUBSET, n, len(self._train)),
                cuda=self._cuda,
                save_cpu_ram=True,  # no worker processes: the pictures are in memory
                verbose=False,
            )
        except Exception as error:  # its network, its download and its checks fail each in theirs
            raise UserError(f"torch-fidelity fails: {' '.join(str(error).split())}") from None
        return {
            f"{counted('FID', n)} (torch-fidelity)": found["frechet_inception_distance"],
            f"{counted('KID', n)} x 1000": 1000 * found["kernel_inception_distance_mean"],
            counted("IS", n): found["inception_score_mean"],
        }


def _library() -> Any:
    """torch-fidelity, which imports torchvision, which must fit torch."""
    try:
        import torch_fidelity
    except ImportError as error:
        raise UserError(
            f"FID, KID and IS need torch-fidelity ({error}): pip install 'anystep[fidelity]'"
        ) from None
    except Exception as error:  # a torchvision of another torch fails where it registers itself
        line = " ".join(str(error).split())
        raise UserError(f"torch-fidelity does not work with this torch: {line}") from None
    return torch_fidelity

"""Judge a model at every step count.

Distances are taken in the features of a classifier trained on the dataset's own labels, of a
TorchScript program the user names, or, without labels, of the pixels' principal components
(images) or the coordinates themselves (vectors). Each metric's value for held-out against
training data is its floor.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from anystep.data import Dataset, Splits, seeded
from anystep.errors import UserError
from anystep.metrics import (
    Classifier,
    Features,
    PixelFeatures,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    memorisation,
    precision_recall,
    sliced_wasserstein,
    train_classifier,
    variance_ratio,
)
from anystep.metrics.quoted import Quoted
from anystep.sampling import STOCHASTIC, draw, may_guide, sample
from anystep.spec import Model, Sampler

REFERENCE = 10_000  # at most so many real examples
QUADRATIC = 4_096  # and fewer for kernel and recall, which cost their square
PIXELS = 2**28  # and at most so many numbers of them at once where pixels are compared
REAL = "real data"

COLUMNS = {
    "frechet": "Fréchet",
    "kernel": "KID x 1000",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "variance": "within-class variance",
    "memorisation": "distance to train / held-out's",
    "sliced": "sliced W2",
}


@dataclass(frozen=True)
class Row:
    """The scores of one model at one step count.

    Attributes:
        model: its name; `REAL` for held-out data.
        steps: sampling steps; 0 for data.
        guidance: strength of the guidance at sampling; 1 is none.
        scores: metric -> value; the metrics are the keys of `COLUMNS`, and the names of those
            that are quoted.
    """

    model: str
    steps: int
    guidance: float
    scores: dict[str, float]


class Coordinates:
    """Vectors are their own features."""

    name = "coordinates"

    def __call__(self, x1: Tensor) -> Tensor:
        """(N, D) unchanged."""
        return x1.flatten(1)


class Judge:
    """A dataset, and features in which to compare samples with it.

    Args:
        splits: the data; reference is the training split.
        features: None for the dataset's own (see the module's docstring).
        cache: folder for trained classifiers; the user's cache when None.
        device: where a classifier runs.
        quoted: scores that are quoted against other people's, beside the others.
    """

    def __init__(
        self,
        splits: Splits,
        features: Features | None = None,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        quoted: Sequence[Quoted] = (),
    ) -> None:
        self.splits, self.quoted = splits, tuple(quoted)
        self.size = min(len(splits.train), REFERENCE)
        self.pixels = slice(0, min(self.size, max(PIXELS // math.prod(splits.train.shape), 2)))
        self.x, self.labels = splits.train.batch(self.pixels)
        self.classifier: Classifier | None = None
        if splits.train.num_classes > 1:
            self.classifier = train_classifier(
                splits, cache=cache or cache_folder(), device=device
            )
        self.features = features or self.classifier or default_features(self.x)
        self.real = torch.cat(
            [
                self.features(splits.train.batch(r)[0])
                for r in torch.split(torch.arange(self.size), 512)
            ]
        )

    @property
    def metric(self) -> str:
        """The distance by which models are ranked: Fréchet, or sliced W2 for vectors.

        Fréchet's sees two moments only, which of vectors without a network say little.
        """
        return "sliced" if self.x.ndim == 2 else "frechet"

    def distance(self, x: Tensor) -> float:
        """That distance of samples x (N, *shape) to the training data."""
        if self.metric == "sliced":
            return sliced_wasserstein(x, self.x, generator=seeded(0, 0))
        return frechet_distance(self.features(x), self.real)

    def scores(self, x: Tensor, cond: Tensor | None) -> dict[str, float]:
        """All metrics of samples x (N, *shape) made for class ids cond (N,).

        A metric for which there are too few examples, such as the variance within classes of one
        example each, is left out.
        """
        features = self.features(x)
        scores: dict[str, float] = {}

        def add(name: str, metric: Callable[[], float]) -> None:
            with contextlib.suppress(UserError):
                scores[name] = metric()

        add("frechet", lambda: frechet_distance(features, self.real))
        some = self.real[:QUADRATIC]
        add("kernel", lambda: 1000 * kernel_distance(features, some))
        with contextlib.suppress(UserError):
            scores |= precision_recall(some, features)._asdict()
        if self.classifier is not None and cond is not None and self.labels is not None:
            labels, predicted = self.labels, self.classifier.predict(x)
            add("accuracy", lambda: class_accuracy(predicted, cond))
            add("variance", lambda: variance_ratio(x, cond, self.x, labels))
        if len(self.splits.held_out):
            held_out, _ = self.splits.held_out.batch(self.pixels)
            add("memorisation", lambda: memorisation(x, self.x, held_out).ratio)
        if x.ndim == 2:
            add("sliced", lambda: self.distance(x))
        for score in self.quoted:
            scores |= score(x, features)
        return scores

    def floor(self, n: int | None = None) -> Row | None:
        """At most n held-out examples judged as samples are; None when nothing is held out.

        All metrics depend on how many are judged, so n should be the number of samples.
        """
        held_out: Dataset = self.splits.held_out
        if len(held_out) < 5:
            return None
        x, labels = held_out.batch(slice(0, min(self.pixels.stop, n or self.pixels.stop)))
        return Row(REAL, 0, 1.0, self.scores(x, labels))


def default_features(x: Tensor) -> Features:
    """Features for data without labels."""
    return PixelFeatures(x) if x.ndim == 4 else Coordinates()


def cache_folder() -> Path:
    """Where trained classifiers are kept: $XDG_CACHE_HOME/anystep or ~/.cache/anystep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anystep"


def generate(
    model: Model,
    n: int,
    *,
    steps: int,
    seed: int = 0,
    label: int | None = None,
    guidance: float = 1.0,
    force_guidance: bool = False,
    sampler: Sampler | None = None,
    batch: int = 256,
    bar: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """N samples (n, *shape) and their class ids (n,), on the CPU.

    The same seed gives the same noise and labels at every step count.

    Args:
        model: the model, on any device.
        n: how many.
        steps: sampling steps.
        seed: of noise and labels.
        label: one class for all; uniformly random when None.
        guidance: see `anystep.sampling.sample`.
        force_guidance: likewise.
        sampler: likewise.
        batch: samples a network call.
        bar: called with the number of samples just made.
    """
    device = next(model.parameters()).device
    x0, cond = draw(model.spec, n, seeded(seed, 0), label)
    parts = []
    for i in range(0, n, batch):
        x = sample(
            model,
            x0[i : i + batch].to(device),
            steps=steps,
            cond=None if cond is None else cond[i : i + batch].to(device),
            guidance=guidance,
            force_guidance=force_guidance,
            sampler=sampler,
            generator=seeded(seed, i, stream=1, device=device),
        )
        parts.append(x.clamp(-1, 1).cpu() if model.spec.data == "[-1, 1]" else x.cpu())
        if bar is not None:
            bar(len(x))
    return torch.cat(parts), cond


def requests(model: Model, steps: Sequence[int]) -> list[tuple[int, float]]:
    """The (steps, guidance) to judge.

    A model with guidance baked into its coarser steps is judged at the finest one both without
    and with guidance of that strength, since there it is not baked in.
    """
    spec = model.spec
    pairs = []
    for n in steps:
        pairs.append((n, 1.0))
        if spec.guidance != 1 and may_guide(spec, 1 / n):
            pairs.append((n, spec.guidance))
    return pairs


def evaluate(
    name: str, model: Model, judge: Judge, *, steps: Sequence[int], n: int = 2048, seed: int = 0
) -> list[Row]:
    """The scores of n samples at each step count, shown with a progress bar."""
    pairs = requests(model, steps)
    rows = []
    with tqdm(total=n * sum(s for s, _ in pairs), unit="step", desc=name, delay=1) as bar:
        for count, guidance in pairs:
            x, cond = generate(
                model,
                n,
                steps=count,
                seed=seed,
                guidance=guidance,
                bar=lambda k, count=count: bar.update(k * count),  # type: ignore[misc]
            )
            rows.append(Row(name, count, guidance, judge.scores(x, cond)))
    return rows


def semigroup_gap(model: Model, n: int = 512, seed: int = 0) -> float | None:
    """Mean of || X(x0, 0, 1) - X(X(x0, 0, 1/2), 1/2, 1/2) ||: one step against two.

    None for a model whose sampler adds noise between them.
    """
    if model.spec.sampler in STOCHASTIC:
        return None
    device = next(model.parameters()).device
    x0, cond = draw(model.spec, n, seeded(seed, 0))
    x0, cond = x0.to(device), None if cond is None else cond.to(device)
    one, two = (sample(model, x0, steps=steps, cond=cond) for steps in (1, 2))
    return float((one - two).flatten(1).norm(dim=1).mean())

"""A small classifier of the data at hand: its features, its verdict on samples, its cache."""

import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from anystep.data import Dataset, Splits
from anystep.errors import UserError
from anystep.metrics.features import BATCH, in_batches

VERSION = 1  # of the classifier: raise it with any change that changes what is trained
JUDGED = 10_000  # at most so many examples measure its accuracy
STEM, WIDTH = 32, 64  # channels of the first layer and of those after it
STEPS, TRAIN_BATCH, LEARNING_RATE, WEIGHT_DECAY = 1000, 128, 4e-3, 0.05


class ClassifierNet(nn.Module):
    """Features (N, 64) and a linear head on them.

    Images (C, H, W) of 4 x 4 or more pixels go through convolutions that halve them down to
    about 4 x 4, and are averaged; examples of any other rank go flat through two layers.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.features = _convolutions(shape) if len(shape) == 3 else _dense(shape)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x1: Tensor) -> Tensor:
        """Class logits (N, num_classes)."""
        logits: Tensor = self.head(self.features(x1))
        return logits


def _convolutions(shape: tuple[int, ...]) -> nn.Sequential:
    channels, size = shape[0], min(shape[1:])
    stride = max(1, size // 32)  # the stem brings large images to about 32 pixels at once
    layers: list[nn.Module] = []
    while len(layers) < 9 or size > 4:  # three modules make a layer
        width = WIDTH if layers else STEM
        conv = nn.Conv2d(channels, width, 2 * stride + 1, stride, padding=stride, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        channels, size = width, math.ceil(size / stride)
        stride = 2 if size > 4 else 1
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _dense(shape: tuple[int, ...]) -> nn.Sequential:
    first, second = nn.Linear(math.prod(shape), 128), nn.Linear(128, WIDTH)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU())


class Classifier:
    """A network trained on the labels of the data; made by `train_classifier`.

    Attributes:
        net: the network, in evaluation mode.
        accuracy: share of the held-out examples it classes right (of the training examples, if
            none are held out).
    """

    def __init__(self, net: ClassifierNet, accuracy: float) -> None:
        self.net = net.eval()
        self.accuracy = accuracy

    @property
    def name(self) -> str:
        """What the features are, in a few words."""
        return f"classifier of this data, {WIDTH} features"

    def __call__(self, x1: Tensor) -> Tensor:
        """Penultimate features (N, D), D = 64, of examples (N, *shape) in the model's scale."""
        return in_batches(self.net.features, x1, self._device)

    def predict(self, x1: Tensor) -> Tensor:
        """The most likely class (N,) of examples (N, *shape) in the model's scale."""
        return in_batches(self.net, x1, self._device).argmax(dim=1)

    @property
    def _device(self) -> torch.device:
        return self.net.head.weight.device


def train_classifier(
    splits: Splits,
    *,
    seed: int = 0,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a classifier on the labels of `splits.train`, or read it from the folder `cache`.

    The cache knows a classifier by the contents of the data, the seed and the code's version; a
    damaged file in it is trained and written anew. On one machine's CPU, with as many threads, the
    same arguments give the same weights. The global random state stays as it was.

    Raises:
        UserError: the data have no labels.
    """
    train = splits.train
    if train.labels is None:
        raise UserError("a classifier needs labelled data; without labels use PixelFeatures")
    if len(train.shape) == 3 and min(train.shape[1:]) < 4:
        raise UserError(f"the classifier needs images of 4 x 4 or more, not {train.shape}")
    path = None if cache is None else _cache_path(cache, splits, seed)
    net = _new_net(train, seed)
    accuracy = None if path is None else _read(path, net)
    if accuracy is None:
        net = _fit(_new_net(train, seed).to(device), train, seed)
        accuracy = _accuracy(net, splits)
        if path is not None:
            _write(path, net, accuracy)
    return Classifier(net.to(device), accuracy)


def _new_net(train: Dataset, seed: int) -> ClassifierNet:
    assert train.labels is not None
    num_classes = max(train.num_classes, int(train.labels.max()) + 1)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, which are not forked here.
        torch.default_generator.manual_seed(seed)
        return ClassifierNet(train.shape, num_classes)


@torch.enable_grad()
def _fit(net: ClassifierNet, train: Dataset, seed: int) -> ClassifierNet:
    """A fixed number of steps of AdamW on the cross-entropy, whatever the size of the data."""
    generator = torch.Generator().manual_seed(seed)
    device = net.head.weight.device
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=STEPS)
    net.train()
    for _ in tqdm(range(STEPS), desc="training the classifier", delay=1, leave=False):
        x1, labels = train.batch(torch.randint(len(train), (TRAIN_BATCH,), generator=generator))
        assert labels is not None
        logits = net(_shifted(x1, generator).to(device))
        optimiser.zero_grad()
        F.cross_entropy(logits, labels.to(device)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return net


def _shifted(x1: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) moved by up to one pixel, all alike; anything else as it is."""
    if x1.ndim != 4:
        return x1
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    height, width = x1.shape[2:]
    padded = F.pad(x1, (1, 1, 1, 1), mode="replicate")
    return padded[:, :, down : down + height, right : right + width]


def _accuracy(net: ClassifierNet, splits: Splits) -> float:
    data = splits.held_out if len(splits.held_out) else splits.train
    assert data.labels is not None
    classifier = Classifier(net, accuracy=math.nan)
    rows = torch.split(torch.arange(min(len(data), JUDGED)), BATCH)
    right = [classifier.predict(data.batch(r)[0]).cpu() == data.labels[r] for r in rows]
    return float(torch.cat(right).double().mean())


def _cache_path(cache: Path, splits: Splits, seed: int) -> Path:
    """The cache's file for these data, this seed and this version, without a suffix."""
    facts = [VERSION, seed, *(data.digest() for data in splits)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    return cache / f"classifier-{digest.hexdigest()[:16]}"


def _read(path: Path, net: ClassifierNet) -> float | None:
    """Fill `net` from the cache and return its accuracy; None if it is absent or damaged."""
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
        weights = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != facts["sha256"]:
            return None
        net.load_state_dict(safetensors.torch.load(weights))
        return float(facts["accuracy"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return None


def _write(path: Path, net: ClassifierNet, accuracy: float) -> None:
    state = {key: value.cpu().contiguous() for key, value in net.state_dict().items()}
    weights = safetensors.torch.save(state)
    facts = {"accuracy": accuracy, "sha256": hashlib.sha256(weights).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path.with_suffix(".safetensors"), weights)
        _replace(path.with_suffix(".json"), json.dumps(facts).encode())
    except OSError as error:  # a full disk must not cost the trained network
        warnings.warn(f"the classifier was not cached in {path.parent}: {error}", stacklevel=3)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

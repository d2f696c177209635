"""Presets: a function a dataset, giving the config of a run that works on it.

A preset takes the objective, because a run is a preset of data and network crossed with a
method; everything can be overridden afterwards.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from anystep.config import LogConfig, OptimizerConfig, TrainConfig
from anystep.data.arrays import Arrays
from anystep.data.digits import Digits
from anystep.data.fashion_mnist import FashionMNIST
from anystep.data.folder import Folder
from anystep.data.hub import Hub
from anystep.data.mixture import Mixture
from anystep.data.pairs import Pairs
from anystep.data.shards import Shards
from anystep.data.webdataset import WebDataset
from anystep.errors import UserError
from anystep.networks.dit import DiTConfig
from anystep.networks.mlp import MLPConfig
from anystep.objectives import Objective
from anystep.objectives.shortcut import Shortcut
from anystep.registry import find, unknown

Preset = Callable[[Objective], TrainConfig]


def digits(objective: Objective) -> TrainConfig:
    """8x8 digits, class-conditional, under four minutes on two cores."""
    return TrainConfig(
        data=Digits(),
        network=DiTConfig(patch=2, width=96, depth=4, heads=4),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=4e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=100, decay="cosine"
        ),
        log=LogConfig(look_every=1000, look_steps=(1, 4)),
        steps=3000,
        batch=128,
    )


def fashion_mnist(objective: Objective) -> TrainConfig:
    """28x28 garments, class-conditional, about two hours on two cores."""
    return TrainConfig(
        data=FashionMNIST(),
        network=DiTConfig(patch=4, width=128, depth=4, heads=4),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay="cosine"
        ),
        log=LogConfig(look_every=2000, save_every=1000),
        steps=15_000,
        batch=64,
    )


def folder(objective: Objective) -> TrainConfig:
    """Your pictures at 32x32; name the folder with --data.path."""
    return TrainConfig(
        data=Folder(path=tyro.MISSING),
        network=DiTConfig(patch=4, width=192, depth=6, heads=6),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay="cosine"
        ),
        log=LogConfig(look_every=500),
        steps=20_000,
        batch=64,
    )


def hub(objective: Objective) -> TrainConfig:
    """Pictures of a Hugging Face dataset at 32x32; name it with --data.path."""
    return TrainConfig(
        data=Hub(path=tyro.MISSING),
        network=DiTConfig(patch=4, width=192, depth=6, heads=6),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay="cosine"
        ),
        log=LogConfig(look_every=500),
        steps=20_000,
        batch=64,
    )


def webdataset(objective: Objective) -> TrainConfig:
    """Pictures in tar shards at 32x32; name them with --data.urls."""
    return TrainConfig(
        data=WebDataset(urls=tyro.MISSING),
        network=DiTConfig(patch=4, width=192, depth=6, heads=6),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay="cosine"
        ),
        log=LogConfig(look_every=500),
        steps=20_000,
        batch=64,
    )


def arrays(objective: Objective) -> TrainConfig:
    """Images of an npz or npy file; name it with --data.path."""
    return TrainConfig(
        data=Arrays(path=tyro.MISSING),
        network=DiTConfig(patch=2, width=192, depth=6, heads=6),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay="cosine"
        ),
        log=LogConfig(look_every=500),
        steps=20_000,
        batch=64,
    )


def shards(objective: Objective) -> TrainConfig:
    """Latents or pixels stored by `anystep encode`; name their folder with --data.path."""
    return TrainConfig(
        data=Shards(path=tyro.MISSING),
        network=DiTConfig.size("S/2"),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=3e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup=1000, decay="cosine"
        ),
        log=LogConfig(save_every=2000, look_every=5000),
        steps=100_000,
        batch=128,
    )


def vectors(objective: Objective) -> TrainConfig:
    """Vectors of an npz or npy file; name it with --data.path."""
    return TrainConfig(
        data=Arrays(path=tyro.MISSING),
        network=MLPConfig(width=256, depth=4),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=100, decay="cosine"
        ),
        steps=10_000,
        batch=256,
    )


def pairs(objective: Objective) -> TrainConfig:
    """Pairs made by `anystep pairs`; name their folder with --data.path."""
    return TrainConfig(
        data=Pairs(path=tyro.MISSING),
        network=DiTConfig(patch=2, width=192, depth=6, heads=6),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=100, decay="cosine"
        ),
        log=LogConfig(look_every=500),
        steps=5000,
        batch=128,
    )


def mixture(objective: Objective) -> TrainConfig:
    """Eight Gaussians in the plane, under a minute."""
    return TrainConfig(
        data=Mixture(),
        network=MLPConfig(),
        objective=objective,
        optimizer=OptimizerConfig(
            lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=100, decay="cosine"
        ),
        steps=5000,
        batch=256,
    )


def celebahq_256_b(objective: Objective) -> TrainConfig:
    """The paper's CelebA-HQ-256: DiT-B/2 on latents of a store; --data.path."""
    return as_published(objective, "B/2", steps=400_000, batch=64)


def imagenet_256_b(objective: Objective) -> TrainConfig:
    """The paper's ImageNet-256: DiT-B/2, guided targets, latents of a store; --data.path."""
    return as_published(guided(objective), "B/2", steps=800_000, batch=256)


def imagenet_256_xl(objective: Objective) -> TrainConfig:
    """The paper's ImageNet-256 at DiT-XL/2, guided targets, latents; --data.path."""
    return as_published(guided(objective), "XL/2", steps=800_000, batch=256)


def as_published(objective: Objective, size: str, steps: int, batch: int) -> TrainConfig:
    """What Frans et al. (arXiv 2410.12557) train alike on both datasets; see docs/method.md."""
    return TrainConfig(
        data=Shards(path=tyro.MISSING, held_out=0.0),
        network=DiTConfig.size(size),
        objective=objective,
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, clip=None),
        log=LogConfig(save_every=5000, look_every=20_000),
        steps=steps,
        batch=batch,
        ema=0.999,
    )


def guided(objective: Objective) -> Objective:
    """With the paper's guidance of 1.5 in the targets; other methods as they are."""
    return replace(objective, guidance=1.5) if isinstance(objective, Shortcut) else objective


PRESETS: dict[str, Preset] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        digits,
        fashion_mnist,
        folder,
        arrays,
        shards,
        hub,
        webdataset,
        vectors,
        pairs,
        mixture,
        celebahq_256_b,
        imagenet_256_b,
        imagenet_256_xl,
    )
}
PUBLISHED = ("celebahq-256-b", "imagenet-256-b", "imagenet-256-xl")  # are shortcut/paper


def objective(name: str) -> Objective:
    """The objective `name`, or one of its variants, as "shortcut/paper".

    Raises:
        UserError: there is no such method or variant.
    """
    method, _, variant = name.partition("/")
    cls = find(Objective.PACKAGE, method)
    if not variant:
        made: Objective = cls()
        return made
    variants = getattr(cls, "VARIANTS", {})
    if variant not in variants:
        raise UserError(unknown(f"variant of {method}", variant, variants))
    made = variants[variant]()
    return made


def preset(name: str, method: str | None = None) -> TrainConfig:
    """The config of preset `name` with the objective `method`, out in runs/<name>-<method>.

    Without a method it is shortcut: as published where the preset is, else as found here.

    Raises:
        UserError: unknown preset or method; the nearest name is suggested.
    """
    if name not in PRESETS:
        raise UserError(unknown("preset", name, PRESETS))
    method = method or ("shortcut/paper" if name in PUBLISHED else "shortcut")
    config = PRESETS[name](objective(method))
    slug = f"{name}-{method}".replace("/", "-").replace("_", "-")
    fields = vars(config) | {"out": Path("runs") / slug}
    return TrainConfig(**fields)

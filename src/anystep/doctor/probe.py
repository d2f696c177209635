"""What an objective asks its networks: found by letting it ask one that keeps account.

So rules need not know a method: how many rows train a level, and whose answers decide a target,
is measured on a network that answers 0.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anystep.config import TrainConfig
from anystep.data import seeded
from anystep.objectives import Batch, Models
from anystep.spec import Model, ModelSpec
from anystep.train import split_batch

STEPS = 32  # training steps looked at, from all of the run


@dataclass(frozen=True)
class Asked:
    """What the networks are asked.

    Attributes:
        rows: level -> rows of a training step that train it, on average.
        guided: levels at which the answer for the null label has a share in targets.
    """

    rows: dict[float, float]
    guided: frozenset[float]


class Probe(nn.Module):
    """A network that answers 0, and at level `marked` 1 for the null label in targets.

    Attributes:
        trained: level -> rows asked with a gradient.
        null: levels at which targets ask for the null label.
    """

    def __init__(self, spec: ModelSpec, marked: float | None = None) -> None:
        super().__init__()
        self.spec, self.marked = spec, marked
        self.trained: Counter[float] = Counter()
        self.null: set[float] = set()

    def forward(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """Keep account of (B,) rows and answer (B, *shape)."""
        asked = d.tolist()
        levels = {size: self.spec.level(size) for size in set(asked)}
        level = torch.tensor([levels[size] for size in asked])
        u = torch.zeros_like(x)
        if torch.is_grad_enabled():
            self.trained.update(level.tolist())
        elif cond is not None:
            null = cond == self.spec.null_label
            self.null.update(level[null].tolist())
            u[null & (level == self.marked)] = 1
        return u


def ask(config: TrainConfig, spec: ModelSpec) -> Asked:
    """What the objective asks in a training step."""
    net, ema = Probe(spec), Probe(spec)
    plain = losses(config, net, ema)
    guided = {
        level
        for level in net.null | ema.null
        if not torch.equal(plain, losses(config, Probe(spec, level), Probe(spec, level)))
    }
    return Asked({level: n / STEPS for level, n in net.trained.items()}, frozenset(guided))


def losses(config: TrainConfig, net: Probe, ema: Probe) -> Tensor:
    """The losses of `STEPS` training steps of one-dimensional noise; a teacher answers 0."""
    objective, spec = config.objective, net.spec
    models = Models(
        Model(net, spec),
        None if objective.target_ema is None else Model(ema, spec),
        None if objective.TEACHER == "none" else Model(Probe(spec), spec),
    )
    found = []
    for k in range(STEPS):
        generator = seeded(0, k)
        x1, x0 = torch.randn(2, config.batch, 1, generator=generator)
        cond = torch.zeros(config.batch, dtype=torch.long) if spec.num_classes else None
        batch = Batch(x1, cond, x0 if objective.PAIRS else None)
        for part in split_batch(batch, config.accumulate):
            found.append(objective(models, part, (k + 0.5) / STEPS, generator).per_example)
    return torch.cat(found).detach()

"""What a budget of forward-equivalents pays for: the steps of a run, by counting some of them."""

from dataclasses import replace

import torch

from anystep.config import TrainConfig
from anystep.data import seeded
from anystep.errors import UserError
from anystep.objectives import Batch
from anystep.state import initial_state


def with_steps(config: TrainConfig, budget: int, looks: int) -> TrainConfig:
    """The config with the steps that a budget pays for, and so many looks along the way.

    Raises:
        UserError: the budget is too small for the method.
    """
    steps = int(budget / forwards_per_step(config))
    if steps < config.objective.phases:
        raise UserError(f"{config.out.name}: a budget of {budget:,} pays for {steps} steps only")
    log = replace(
        config.log,
        look_every=max(steps // looks, 1) if looks else 0,
        look_steps=(1, 4),
        trackers=(),
    )
    return replace(config, steps=steps, log=log)


def forwards_per_step(config: TrainConfig) -> float:
    """Forward-equivalents of a training step, counted over steps from all of the run."""
    splits = config.data.load()
    state = initial_state(config, splits, torch.device("cpu"))
    stored = splits.train.feed(config.batch, config.seed)(0)
    batch = Batch(splits.train.draw(stored.x), stored.labels, stored.x0)
    moments = 2 * config.objective.phases
    for k in range(moments):
        config.objective(state.called, batch, (k + 0.5) / moments, seeded(0, k))
    return state.counter.rows / moments

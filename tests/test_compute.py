"""The count of forward-equivalents against arithmetic, for every method."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anystep import train as training
from anystep.compute import ForwardCounter
from anystep.config import TrainConfig
from anystep.data import seeded
from anystep.data.mixture import Mixture
from anystep.networks.mlp import MLPConfig
from anystep.objectives import Batch
from anystep.objectives.consistency_distillation import ConsistencyDistillation
from anystep.objectives.consistency_training import ConsistencyTraining
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.live_reflow import LiveReflow
from anystep.objectives.progressive_distillation import ProgressiveDistillation
from anystep.objectives.reflow import Reflow
from anystep.objectives.shortcut import Shortcut

B, STEPS = 64, 14  # rows a step, steps of the run

# The network's own forward and backward are 3 a row; what a target asks is 1 a row.
COUNTS = {
    "flow_matching": (FlowMatching(), 0, 3 * B),
    "diffusion": (Diffusion(), 0, 3 * B),
    "reflow": (Reflow(), 0, 3 * B),
    # Two half-steps of the 16 bootstrap rows.
    "shortcut": (Shortcut(bootstrap_share=0.25), 0, 3 * B + 2 * 16),
    "shortcut from itself": (Shortcut(bootstrap_share=0.25, target_ema=None), 0, 3 * B + 2 * 16),
    # Of 16 rows, 2 a level and 2 of random levels: the guided level and the random rows twice.
    "shortcut, guided": (Shortcut(bootstrap_share=0.25, guidance=1.5), 0, 3 * B + 2 * (16 + 4)),
    "shortcut without targets": (Shortcut(bootstrap_share=0.0), 0, 3 * B),
    # K = 8 steps of the 16 reflow rows.
    "live_reflow": (LiveReflow(reflow_share=0.25), 0, 3 * B + 8 * 16),
    "live_reflow from an EMA": (LiveReflow(reflow_share=0.25, target_ema=0.9), 0, 3 * B + 8 * 16),
    "live_reflow, guided": (LiveReflow(reflow_share=0.25, guidance=1.5), 0, 3 * B + 8 * 2 * 16),
    # The end of the later point.
    "consistency_training": (ConsistencyTraining(), 0, 3 * B + B),
    "consistency_training/ict": (ConsistencyTraining.ict(), 0, 3 * B + B),
    # The teacher's step and the end of the later point.
    "consistency_distillation": (ConsistencyDistillation(), 0, 3 * B + B + B),
    "consistency_distillation, guided": (
        *(ConsistencyDistillation(guidance=1.5), 0),
        3 * B + 2 * B + B,
    ),
    # Two steps of the teacher; the first teacher alone is guided.
    "progressive_distillation": (ProgressiveDistillation(), 0, 3 * B + 2 * B),
    "progressive_distillation, guided": (
        *(ProgressiveDistillation(guidance=1.5), 1),
        3 * B + 2 * 2 * B,
    ),
    "progressive_distillation, guided, later": (
        *(ProgressiveDistillation(guidance=1.5), 2),
        3 * B + 2 * B,
    ),
}


def state_and_config(objective):
    """The state of a run; its teacher, where there is one, has the initial weights."""
    config = TrainConfig(
        data=Mixture(train=B, held_out=0, labels=True),
        network=MLPConfig(width=8, depth=1),
        objective=objective,
        teacher=None if objective.TEACHER == "none" else Path("teacher"),
        steps=STEPS,
        batch=B,
        device="cpu",
    )
    splits = config.data.load()
    state = training.initial_state(config, splits, torch.device("cpu"))
    x1, cond = splits.train.batch(slice(0, B))
    return state, config, Batch(x1, cond, torch.randn(x1.shape) if objective.PAIRS else None)


def count(state, config, batch, step):
    before = state.counter.rows
    state.step = step
    training.training_step(state, batch, config, seeded(0, step))
    return state.counter.rows - before


@pytest.mark.parametrize("name", COUNTS)
def test_a_step_costs_what_arithmetic_says(name):
    objective, step, expected = COUNTS[name]
    state, config, batch = state_and_config(objective)
    assert [count(state, config, batch, step) for _ in range(2)] == [expected] * 2
    halves = replace(config, accumulate=2)
    if "shortcut" not in name:  # whose rows a level depend on the size of a part
        assert count(state, halves, batch, step) == expected


def test_a_row_counts_three_only_where_weights_get_a_gradient():
    trained, frozen = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    counter = ForwardCounter(trained, None, frozen, rows=100)
    trained(torch.zeros(5, 2))
    assert counter.rows == 100 + 3 * 5
    with torch.no_grad():
        trained(torch.zeros(7, 2))
    frozen(torch.zeros(11, 2))
    assert counter.rows == 100 + 3 * 5 + 7 + 11


def test_the_average_that_is_sampled_with_is_not_counted():
    state, _, batch = state_and_config(Shortcut())
    state.average(batch.x1, torch.zeros(B), torch.zeros(B), batch.cond)
    assert state.counter.rows == 0
    assert not state.average._forward_pre_hooks

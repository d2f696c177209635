"""Methods are tested by learning: one-step samples of a trained model against the truth."""

from dataclasses import replace

import pytest
import torch

from anystep import checkpoint
from anystep.metrics import sliced_wasserstein
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.oracle import ring
from anystep.presets import mixture
from anystep.sampling import draw, sample
from anystep.train import train

STEPS = 600


def one_step_distance(objective, out, cost):
    """Sliced Wasserstein distance of one-step samples to the data, after equal compute.

    `cost` is that of a training step in units of flow matching's.
    """
    config = replace(
        mixture(objective), out=out, steps=round(STEPS / cost), batch=256, device="cpu"
    )
    config = replace(config, log=replace(config.log, trackers=()))
    train(config, bar=False)
    model = checkpoint.load_model(out)
    x0, _ = draw(model.spec, 4000, torch.Generator().manual_seed(1))
    exact, _ = ring().sample(4000, torch.Generator().manual_seed(2))
    made = sample(model, x0, steps=1)
    return sliced_wasserstein(made, exact, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
def test_shortcut_learns_one_step_sampling_and_needs_its_consistency_rows(tmp_path):
    share = 0.5
    cost = 1 + 2 * share / 3  # two target forwards on a share of the rows; a step is 3 forwards
    flow = one_step_distance(FlowMatching(), tmp_path / "flow", 1)
    shortcut = one_step_distance(Shortcut(bootstrap_share=share), tmp_path / "shortcut", cost)
    without = one_step_distance(Shortcut(bootstrap_share=0.0), tmp_path / "without", 1)
    print(f"sliced W2 at 1 step: flow {flow:.3f}, shortcut {shortcut:.3f}, without {without:.3f}")
    assert shortcut < flow / 5
    assert not without < flow / 5

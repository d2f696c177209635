"""Parity with the authors' own code, see fixtures/README.md."""

import pytest
import torch

from anystep.errors import UserError
from anystep.interop.kvfrans import load_network
from anystep.objectives.shortcut import two_step_target
from anystep.sampling import sample

TOLERANCE = 1e-5


def weights(official, prefix):
    return {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}


def network(official, prefix="params/", **sizes):
    sizes = {"num_heads": 3, "patch_size": 2, "image_size": 8} | sizes
    return load_network(weights(official, prefix), **sizes)


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_forward(official):
    with torch.no_grad():
        v = network(official)(
            official["fwd_x"],
            torch.from_numpy(official["fwd_t"]),
            torch.exp2(-torch.from_numpy(official["fwd_dt_base"])),
            torch.from_numpy(official["fwd_y"]),
        )
    assert relative_error(v, official["fwd_v"]) <= TOLERANCE


@pytest.mark.parametrize(("name", "guidance"), [("nocfg", 1.0), ("cfg", 1.5), ("cfg8", 1.5)])
def test_shortcut_targets(official, name, guidance):
    rows = int(official[f"{name}_bst"])
    t, level, labels = (
        torch.from_numpy(official[f"{name}_{k}"][:rows]) for k in ("t", "dt_base", "labels")
    )
    target = two_step_target(
        network(official, "ema_params/"),
        official[f"{name}_x_t"][:rows],
        t,
        torch.exp2(-level),
        labels.long(),
        guidance=guidance,
        null_cond=torch.full((rows,), 10),
        guided_rows=level == 6,
        clip_midpoint=4,
        clip_target=4,
    )
    assert relative_error(target, official[f"{name}_v_t"][:rows]) <= TOLERANCE


@pytest.mark.parametrize("clip", ["clip_midpoint", "clip_target"])
def test_both_clips_matter_to_the_targets(official, clip):
    bounds = {"clip_midpoint": 4, "clip_target": 4, clip: None}
    rows = int(official["nocfg_bst"])
    t, level, labels = (
        torch.from_numpy(official[f"nocfg_{k}"][:rows]) for k in ("t", "dt_base", "labels")
    )
    x_t = official["nocfg_x_t"][:rows]
    target = two_step_target(
        network(official, "ema_params/"), x_t, t, torch.exp2(-level), labels.long(), **bounds
    )
    assert relative_error(target, official["nocfg_v_t"][:rows]) > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 128])
def test_samples(official, steps):
    x1 = sample(
        network(official),
        official[f"s{steps}_x0"],
        steps=steps,
        cond=torch.from_numpy(official[f"s{steps}_y"]),
    )
    assert relative_error(x1, official[f"s{steps}_x1"]) <= TOLERANCE


def test_weights_that_do_not_fit_are_refused(official):
    with pytest.raises(UserError, match="patches"):
        network(official, patch_size=4)
    incomplete = weights(official, "params/")
    del incomplete["DiTBlock_1/Dense_2/kernel"]
    with pytest.raises(UserError, match="DiTBlock_1/Dense_2/kernel"):
        load_network(incomplete, num_heads=3, patch_size=2, image_size=8)

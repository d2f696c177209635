import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from anystep import checkpoint, ema
from anystep import train as training
from anystep.config import LogConfig, OptimizerConfig, TrainConfig, config_json
from anystep.data import seeded
from anystep.data.mixture import Mixture
from anystep.errors import UserError
from anystep.evaluate import Judge
from anystep.log import read_metrics
from anystep.networks.mlp import MLPConfig
from anystep.objectives import Batch, Loss, Objective
from anystep.objectives.shortcut import Shortcut
from anystep.registry import from_json

CPU = torch.device("cpu")


def config(out, **changes):
    base = TrainConfig(
        data=Mixture(train=500, held_out=50, labels=True),
        network=MLPConfig(width=16, depth=1),
        objective=Shortcut(),
        optimizer=OptimizerConfig(lr=1e-3, warmup=3, decay="cosine"),
        log=LogConfig(every=4, save_every=5, trackers=()),
        out=out,
        steps=23,
        batch=60,
        device="cpu",
    )
    return replace(base, **changes)


def final_tensors(out):
    folder = checkpoint.checkpoints(out)[-1]
    return {
        f"{file}/{k}": v
        for file in (checkpoint.WEIGHTS, checkpoint.TRAINING)
        for k, v in load_file(folder / file).items()
    }


def assert_same_run(a, b):
    left, right = final_tensors(a), final_tensors(b)
    assert left.keys() == right.keys()
    assert any("exp_avg" in k for k in left) and any("target." in k for k in left)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def stop_at(monkeypatch, step):
    """Make the run die in the middle of step `step`."""
    usual = training.training_step

    def dying(state, *rest):
        if state.step == step:
            raise RuntimeError("power cut")
        return usual(state, *rest)

    monkeypatch.setattr(training, "training_step", dying)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_cut_off_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch, accumulate):
    whole, parts = (config(tmp_path / k, accumulate=accumulate) for k in ("whole", "parts"))
    assert training.train(whole, bar=False)
    for step in (3, 12, 16):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(RuntimeError, match="power cut"):
                training.train(parts, bar=False)
    assert training.train(parts, bar=False)
    assert_same_run(whole.out, parts.out)
    keep = ("step", "loss", "loss/flow", "lr")
    lines = [
        [{k: line[k] for k in keep} for line in read_metrics(run.out / training.METRICS)]
        for run in (whole, parts)
    ]
    assert [line["step"] for line in lines[1]] == [4, 5, 8, 10, 12, 15, 16, 20, 23]
    assert lines[0] == lines[1]


def test_the_seed_matters_and_nothing_else_random_does(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(random.randrange(1000))
        training.train(config(tmp_path / name, seed=seed), bar=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "c")
    name = "model.safetensors/input.weight"
    assert not torch.equal(a[name], c[name])


def test_looking_does_not_change_the_run(tmp_path):
    plain = config(tmp_path / "plain")
    looking = config(tmp_path / "looking", log=replace(plain.log, look_every=6, look_samples=20))
    for run in (plain, looking):
        training.train(run, bar=False)
    assert_same_run(plain.out, looking.out)
    assert (looking.out / "samples" / "step-00000018.png").is_file()
    scores = [m for m in read_metrics(looking.out / training.METRICS) if "sliced/1" in m]
    assert [m["step"] for m in scores] == [6, 12, 18]


def test_a_finished_run_is_left_alone(tmp_path):
    run = config(tmp_path / "run")
    training.train(run, bar=False)
    before = (checkpoint.checkpoints(run.out)[-1] / checkpoint.TRAINING).stat().st_mtime_ns
    assert training.train(run, bar=False)
    assert (checkpoint.checkpoints(run.out)[-1] / checkpoint.TRAINING).stat().st_mtime_ns == before


def test_data_that_cannot_be_judged_do_not_stop_the_run(tmp_path, monkeypatch):
    def refuse(judge, x):
        raise UserError("too few examples")

    monkeypatch.setattr(Judge, "distance", refuse)
    run = config(tmp_path / "run")
    run = replace(run, log=replace(run.log, look_every=10, look_samples=4))
    with pytest.warns(UserWarning, match="no scores at step 10"):
        assert training.train(run, bar=False)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run = config(tmp_path / "run")
    training.train(run, bar=False)
    assert [c.name for c in checkpoint.checkpoints(run.out)] == ["step-00000020", "step-00000023"]


def test_another_config_is_refused_with_the_fields_named(tmp_path):
    run = config(tmp_path / "run")
    training.train(run, bar=False)
    other = replace(run, batch=61, objective=Shortcut(target_ema=0.9))
    with pytest.raises(UserError, match=r"batch: 60 -> 61; objective.target_ema: 0.95 -> 0.9"):
        training.train(other, bar=False)
    longer_log = replace(run, log=replace(run.log, every=7))
    assert training.train(longer_log, bar=False)


def test_config_goes_through_json(tmp_path):
    run = config(tmp_path / "run")
    assert from_json(TrainConfig, json.loads(json.dumps(config_json(run)))) == run
    broken = config_json(run)
    broken["objective"]["target_em"] = 0.5
    with pytest.raises(UserError, match=r"'target_em'; did you mean 'target_ema'"):
        from_json(TrainConfig, broken)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    run = config(tmp_path / "run")
    usual = training.load_batch

    def poisoned(config, splits, rows, generator, device):
        batch = usual(config, splits, rows, generator, device)
        if poisoned.calls == 12:
            batch.x1[0] = float("nan")
        poisoned.calls += 1
        return batch

    poisoned.calls = 0
    monkeypatch.setattr(training, "load_batch", poisoned)
    with pytest.raises(UserError) as caught:
        training.train(run, bar=False)
    message = str(caught.value)
    assert "not finite at step 13" in message and "gradient norm nan" in message
    assert "loss/d=" in message and "loss/flow" not in message  # row 0 is a bootstrap row
    assert "step-00000010" in message and "\n" not in message
    assert checkpoint.load_model(run.out).net.input.weight.isfinite().all()
    monkeypatch.undo()
    assert training.train(run, bar=False)


@dataclass(frozen=True)
class Plain(Objective):
    """Draws nothing: the loss of an example is the square of what the network says."""

    def spec(self, base):
        return base

    def __call__(self, models, batch, progress, generator):
        t = torch.full_like(batch.x1[:, 0], 0.5)
        out = models.net(batch.x1, t, t, batch.cond)
        return Loss((out - batch.x1).square().sum(1), {})


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    grads = []
    for parts in (1, 4):
        run = config(tmp_path, objective=Plain(), accumulate=parts)
        splits = run.data.load()
        state = training.initial_state(run, splits, CPU)
        captured = {}
        state.optimizer.register_step_pre_hook(
            lambda opt, *_, c=captured: c.update(
                {k: p.grad.clone() for k, p in enumerate(opt.param_groups[0]["params"])}
            )
        )
        batch = Batch(*splits.train.batch(slice(0, 62)))
        training.training_step(state, batch, run, seeded(0, 0))
        grads.append(captured)
    for k, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][k], rtol=1e-4, atol=1e-7)


def test_gradient_is_clipped_and_rate_follows_the_schedule(tmp_path):
    options = OptimizerConfig(lr=1.0, warmup=4, decay="cosine")
    rates = [options.rate(k, 100) for k in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] < 1e-3 and rates.index(max(rates)) == 4
    assert OptimizerConfig(lr=1.0).rate(99, 100) == 1.0


def test_ema_is_the_weighted_sum_of_the_weights():
    net, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    values = [1.0, 5.0, -2.0, 7.0]
    expected = average.weight.item()
    for step, value in enumerate(values):
        net.weight.data.fill_(value)
        decay = ema.warmed_up(0.3, step)
        ema.update(average, net, decay)
        expected = decay * expected + (1 - decay) * value
    assert float(average.weight) == pytest.approx(expected)
    assert [ema.warmed_up(0.3, k) for k in range(4)] == [0.1, 2 / 11, 0.25, 0.3]
    # After n steps of warm-up the average spans about n/9 of them.
    assert 1 / (1 - ema.warmed_up(0.9999, 900)) == pytest.approx(910 / 9)


def test_both_averages_follow_their_own_decay(tmp_path):
    run = config(tmp_path / "run", objective=Shortcut(target_ema=0.0), ema=0.9)
    training.train(run, bar=False)
    tensors = final_tensors(run.out)
    state = "training.safetensors"
    net, target = (tensors[f"{state}/{k}.input.weight"] for k in ("net", "target"))
    average = tensors["model.safetensors/input.weight"]
    assert torch.equal(net, target) and not torch.equal(net, average)


COMMAND = [
    *(sys.executable, "-m", "anystep.cli", "train", "mixture", "--steps", "80", "--batch", "64"),
    *("--log.save-every", "4", "--log.look-every", "0", "--device", "cpu"),
]


def start(out):
    return subprocess.Popen(
        [*COMMAND, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(out, process, count=1, seconds=120):
    deadline = time.monotonic() + seconds
    while len(checkpoint.checkpoints(out)) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_runs_end_where_the_undisturbed_run_ends(tmp_path):
    for _ in range(2):
        process = start(tmp_path / "killed")
        wait_for_checkpoint(tmp_path / "killed", process)
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
    for out in ("killed", "whole"):
        process = start(tmp_path / out)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves(tmp_path):
    process = start(tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal came")
    assert process.returncode == training.INTERRUPTED
    assert "the run is saved" in output and "Traceback" not in output
    last = checkpoint.checkpoints(tmp_path / "run")[-1]
    step = checkpoint.read_info(last)["training"]["step"]
    assert read_metrics(tmp_path / "run" / training.METRICS)[-1]["step"] == step


def test_the_sampled_average_warms_up(tmp_path):
    run = config(tmp_path / "run", steps=1, ema=0.999)
    start = training.initial_state(run, run.data.load(), CPU).model.net.state_dict()
    training.train(run, bar=False)
    tensors = final_tensors(run.out)
    net = tensors["training.safetensors/net.input.weight"]
    average = tensors["model.safetensors/input.weight"]
    torch.testing.assert_close(average, 0.1 * start["input.weight"] + 0.9 * net)


def test_a_generator_depends_on_seed_step_and_stream():
    def draw(*args, **kwargs):
        return float(torch.rand(1, generator=seeded(*args, **kwargs)))

    assert draw(0, 0) == draw(0, 0)
    assert len({draw(0, 0), draw(1, 0), draw(0, 1), draw(0, 0, stream=1)}) == 4

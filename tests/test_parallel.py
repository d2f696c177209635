"""Many processes compute what one does, for every objective, and stop and go on as one does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import parallel_worker
from anystep import checkpoint, pairs
from anystep.cli import main
from anystep.config import LogConfig, OptimizerConfig, TrainConfig, config_json
from anystep.data.arrays import Arrays
from anystep.data.mixture import Mixture
from anystep.data.pairs import Pairs
from anystep.errors import UserError
from anystep.log import read_metrics
from anystep.networks.dit import DiTConfig
from anystep.networks.mlp import MLPConfig
from anystep.objectives import Objective
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.registry import find, names
from anystep.state import initial_state
from anystep.train import METRICS, train

WORKER = Path(__file__).with_name("parallel_worker.py")
CPU = torch.device("cpu")
KINDS = ("ddp", "fsdp")
METHODS = names(Objective.PACKAGE)
STEPS = 20


def config(out, **changes):
    base = TrainConfig(
        data=Mixture(train=300, held_out=50, labels=True),
        network=MLPConfig(width=16, depth=2),
        objective=Shortcut(),
        optimizer=OptimizerConfig(lr=1e-3, warmup=3),
        log=LogConfig(every=5, save_every=10, keep=9, trackers=()),
        out=out,
        steps=STEPS,
        batch=61,  # odd: shares of two and three processes are uneven
        device="cpu",
    )
    return replace(base, **changes)


def written(run):
    """The path of the run's config, for a worker."""
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out.parent / f"{run.out.name}.json"
    checkpoint.write_json(path, config_json(run))
    return str(path)


def launch(count, task, *runs, restarts=0, wait=True):
    """Start a worker task under torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(count), "--max-restarts", str(restarts)),
        *(str(WORKER), task, *map(written, runs)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if not wait:
        return process
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def tensors(run, step=STEPS):
    """All tensors of the checkpoint of a step, from however many files."""
    folder = checkpoint.checkpoint_folder(run.out, step)
    found = {f"average.{k}": v for k, v in load_file(folder / checkpoint.WEIGHTS).items()}
    state = initial_state(run, run.data.load(), CPU)
    state.restore(folder)
    return found | {k: v.clone() for k, v in state.tensors().items()}


def assert_close(left, right, tolerance):
    """Equal up to a share of each tensor's greatest magnitude."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        scale = right[name].abs().max().clamp(min=1e-6)
        difference = (value - right[name]).abs().max() / scale
        assert difference < tolerance, (name, float(difference))


def cases(folder):
    """Changes to the config, by name: every method, and what else could break a share."""
    flow = config(folder / "teacher", objective=FlowMatching())
    train(flow, bar=False)
    pairs.make_pairs(flow.out, folder / "pairs", n=300, steps=2)
    made = {}
    for method in METHODS:
        objective = find(Objective.PACKAGE, method)()
        made[method] = {"objective": objective}
        if objective.TEACHER != "none":
            made[method]["teacher"] = flow.out
        if objective.PAIRS:
            made[method]["data"] = Pairs(folder / "pairs")
    made["accumulate"] = {"accumulate": 3}
    rng = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=rng.integers(0, 255, (80, 3, 8, 12), dtype=np.uint8))
    made["images"] = {
        "data": Arrays(folder / "x.npz"),
        "network": DiTConfig(patch=4, width=16, depth=2, heads=2),
        "flip": True,
        "recompute": True,
    }
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each case on one process, and on two by DDP and by FSDP2."""
    folder = tmp_path_factory.mktemp("parallel")
    made = {
        name: {kind: config(folder / f"{name}-{kind}", parallel=kind, **changes) for kind in KINDS}
        | {"one": config(folder / f"{name}-one", **changes)}
        for name, changes in cases(folder).items()
    }
    code, output = launch(2, "train", *(runs[kind] for runs in made.values() for kind in KINDS))
    assert code == 0, output
    for runs in made.values():
        parallel_worker.train(runs["one"])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [*METHODS, "accumulate", "images"])
def test_two_processes_compute_what_one_does(runs, case, kind):
    one, two = runs[case]["one"], runs[case][kind]
    gradients, shared = (load_file(r.out / parallel_worker.GRADIENTS) for r in (one, two))
    assert any(v.any() for v in gradients.values())
    assert_close(shared, gradients, 2e-5)
    assert_close(tensors(two), tensors(one), 5e-3)
    facts = [checkpoint.read_info(checkpoint.find_model(r.out))["training"] for r in (one, two)]
    assert facts[0]["forwards"] == facts[1]["forwards"] > 0
    assert read_metrics(two.out / METRICS)[-1]["step"] == STEPS


def cut_to(run, out, step, **changes):
    """A copy of a run that has come as far as `step`."""
    shutil.copytree(run.out, out)
    for folder in checkpoint.checkpoints(out):
        if folder != checkpoint.checkpoint_folder(out, step):
            shutil.rmtree(folder)
    return replace(run, out=out, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_goes_on_with_one_and_three(runs, tmp_path, kind):
    written, end = runs["shortcut"][kind], tensors(runs["shortcut"]["one"])
    at_10 = tensors(written, 10)
    one = cut_to(written, tmp_path / "one", 10, parallel="ddp")
    assert train(one, bar=False)
    three = {k: cut_to(written, tmp_path / k, 10, parallel=k) for k in KINDS}
    code, output = launch(3, "restore", *three.values())
    assert code == 0, output
    code, output = launch(3, "train", *three.values())
    assert code == 0, output
    for k, run in three.items():
        restored = [load_file(run.out / f"restored-3-{rank}.safetensors") for rank in range(3)]
        held = [int(r.pop("held")) for r in restored]
        for found in restored:
            assert found.keys() == at_10.keys()
            assert all(torch.equal(v, at_10[name]) for name, v in found.items())
        total = sum(v.numel() for v in at_10.values())
        if k == "fsdp":  # no process holds more than its share, a row of each tensor rounded up
            assert max(held) < 0.4 * total
        else:
            assert held == [total] * 3
        assert_close(tensors(run), end, 5e-3)
    assert_close(tensors(one), end, 5e-3)


def test_a_checkpoint_of_one_process_goes_on_sharded(runs, tmp_path):
    one = runs["consistency_distillation"]["one"]
    two = cut_to(one, tmp_path / "two", 10, parallel="fsdp")
    code, output = launch(2, "train", two)
    assert code == 0, output
    assert_close(tensors(two), tensors(one), 5e-3)


def test_a_sharded_run_is_sampled_as_any_other(runs, tmp_path):
    run, out = runs["images"]["fsdp"], tmp_path / "samples.png"
    assert main(["sample", str(run.out), "--steps", "2", "--n", "4", "--out", str(out)]) == 0
    weights = load_file(checkpoint.find_model(run.out) / checkpoint.WEIGHTS)
    model = checkpoint.load_model(run.out)
    assert weights.keys() == model.net.state_dict().keys()


def test_a_damaged_shard_is_answered_in_a_line(runs, tmp_path):
    run = cut_to(runs["shortcut"]["fsdp"], tmp_path / "run", 10)
    shard = next(checkpoint.checkpoint_folder(run.out, 10).glob("shard-*"))
    content = shard.read_bytes()
    for broken in (content[:100], content[:-50], None):
        if broken is None:
            shard.unlink()
        else:
            shard.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            train(run, bar=False)


def test_the_error_of_one_process_stops_all_and_is_shown(tmp_path):
    code, output = launch(2, "fail", config(tmp_path / "run"))
    assert code != 0 and "anystep: the second process is ill" in output


def children(pid):
    """The processes that a process started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes under /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_is_started_again_and_nothing_is_lost(tmp_path, kind):
    changes = {"parallel": kind, "steps": 200}
    undisturbed, run = (config(tmp_path / name, **changes) for name in ("undisturbed", "run"))
    code, output = launch(2, "train", undisturbed)
    assert code == 0, output
    job = launch(2, "train", run, restarts=1, wait=False)
    try:
        while not checkpoint.checkpoints(run.out) and job.poll() is None:
            time.sleep(0.01)
        os.kill(children(job.pid)[-1], signal.SIGKILL)
        output = job.communicate(timeout=200)[0]
    finally:
        job.kill()
    assert job.returncode == 0 and "exitcode: -9" in output, output
    for name, value in tensors(undisturbed, 200).items():
        assert torch.equal(value, tensors(run, 200)[name]), name

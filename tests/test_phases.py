"""Runs in more than one part: a teacher and then its student, and phases within a run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anystep import checkpoint, ema
from anystep import train as training
from anystep.config import LogConfig, OptimizerConfig, TrainConfig
from anystep.data.arrays import Arrays
from anystep.data.mixture import Mixture
from anystep.errors import UserError
from anystep.log import read_metrics
from anystep.networks.mlp import MLPConfig
from anystep.objectives.consistency_distillation import ConsistencyDistillation
from anystep.objectives.consistency_training import ConsistencyTraining
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.live_reflow import LiveReflow
from anystep.objectives.progressive_distillation import ProgressiveDistillation
from anystep.objectives.reflow import Reflow
from anystep.objectives.shortcut import Shortcut

M, STEPS, PHASES = 8, 23, 3  # phases start at steps 0, 8 and 16
BOUNDARIES = (8, 16)


def config(out, objective, **changes):
    base = TrainConfig(
        data=Mixture(train=200, held_out=0, labels=True),
        network=MLPConfig(width=16, depth=1),
        objective=objective,
        optimizer=OptimizerConfig(lr=3e-3, warmup=2, decay="cosine"),
        log=LogConfig(every=1, save_every=4, keep=100, trackers=()),
        out=out,
        steps=STEPS,
        batch=32,
        device="cpu",
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A trained flow model, and files for reflow."""
    root = tmp_path_factory.mktemp("teachers")
    training.train(config(root / "flow", FlowMatching(M=M)), bar=False)
    generator = np.random.default_rng(0)
    labels = np.arange(100) % 8
    x0, noise = generator.normal(size=(2, 100, 2)).astype(np.float32)
    np.savez(root / "pairs.npz", x=x0 + 0.1 * noise, x0=x0, labels=labels)
    return root


def student(teachers, out, method, **changes):
    """The config of a student of the flow model."""
    objective = {
        "progressive_distillation": ProgressiveDistillation(M=M, target_ema=0.5),
        "fresh_optimizer": ProgressiveDistillation(M=M, keep_optimizer=False),
        "no_ema": ProgressiveDistillation(M=M, target_ema=None),
        "consistency_distillation": ConsistencyDistillation(M=M),
        "reflow": Reflow(M=M),
    }[method]
    if method == "reflow":
        changes["data"] = Arrays(teachers / "pairs.npz", held_out=0.0)
    return config(out, objective, **({"teacher": teachers / "flow"} | changes))


def tensors(out, step=STEPS):
    folder = out / checkpoint.CHECKPOINTS / f"step-{step:08d}"
    state = load_file(folder / checkpoint.TRAINING)
    return state | {f"average.{k}": v for k, v in load_file(folder / checkpoint.WEIGHTS).items()}


def part(tensors, name):
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def facts(out, step=STEPS):
    folder = out / checkpoint.CHECKPOINTS / f"step-{step:08d}"
    return checkpoint.read_info(folder)["training"]


def assert_equal(a, b):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def die_at(monkeypatch, step):
    """Make the run die in the middle of step `step`."""
    usual = training.training_step

    def dying(state, *rest):
        if state.step == step:
            raise RuntimeError("power cut")
        return usual(state, *rest)

    monkeypatch.setattr(training, "training_step", dying)


def spied(monkeypatch):
    """The state before each step of the runs to come, as (step, net, target, teacher, ...)."""
    usual, seen = training.training_step, {}

    def copy(net):
        return None if net is None else {k: v.clone() for k, v in net.state_dict().items()}

    def spying(state, *rest):
        before = {
            "net": copy(state.model.net),
            "average": copy(state.average),
            "target": copy(state.target),
            "teacher": copy(state.teacher),
            "moments": len(state.optimizer.state),
        }
        result = usual(state, *rest)
        seen[state.step] = before | {"after": copy(state.model.net)}
        return result

    monkeypatch.setattr(training, "training_step", spying)
    return seen


@pytest.mark.parametrize(
    "method", ["progressive_distillation", "fresh_optimizer", "consistency_distillation", "reflow"]
)
def test_a_run_cut_off_and_resumed_is_the_uninterrupted_run(
    teachers, tmp_path, monkeypatch, method
):
    whole, parts = (student(teachers, tmp_path / k, method) for k in ("whole", "parts"))
    assert training.train(whole, bar=False)
    for step in (2, 6, *BOUNDARIES, BOUNDARIES[1] + 1, 21):
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(RuntimeError, match="power cut"):
                training.train(parts, bar=False)
    assert training.train(parts, bar=False)
    for step in (4, 8, 12, 16, 20, STEPS):
        assert_equal(tensors(whole.out, step), tensors(parts.out, step))
        assert facts(whole.out, step)["forwards"] == facts(parts.out, step)["forwards"] > 0
    kinds = {name.split(".")[0] for name in tensors(whole.out)}
    assert kinds >= {"net", "average", "teacher", "optimizer"}
    assert facts(whole.out)["teacher"] == facts(parts.out)["teacher"]


def test_a_run_without_its_teachers_files_goes_on(teachers, tmp_path, monkeypatch):
    run = student(teachers, tmp_path / "run", "progressive_distillation")
    with monkeypatch.context() as patch:
        die_at(patch, 10)
        with pytest.raises(RuntimeError, match="power cut"):
            training.train(run, bar=False)
    monkeypatch.setattr(training, "load_teacher", None)
    assert training.train(run, bar=False)


@pytest.mark.parametrize(
    "method", ["progressive_distillation", "no_ema", "consistency_distillation", "reflow"]
)
def test_the_student_starts_as_the_average_of_its_teacher(teachers, tmp_path, monkeypatch, method):
    seen = spied(monkeypatch)
    training.train(student(teachers, tmp_path / "run", method, steps=3), bar=False)
    average = part(tensors(teachers / "flow"), "average")
    assert not torch.equal(average["input.weight"], tensors(teachers / "flow")["net.input.weight"])
    for name in ("net", "average", "teacher"):
        assert_equal(seen[0][name], average)
    if method not in ("reflow", "no_ema"):
        assert_equal(seen[0]["target"], average)
    assert not torch.equal(seen[0]["after"]["input.weight"], average["input.weight"])


@pytest.mark.parametrize(
    ("method", "source"), [("progressive_distillation", "target"), ("no_ema", "net")]
)
def test_the_next_teacher_is_the_student_at_the_end_of_the_phase(
    teachers, tmp_path, monkeypatch, method, source
):
    seen = spied(monkeypatch)
    run = student(teachers, tmp_path / "run", method)
    training.train(run, bar=False)
    assert [run.phase(step)[0] for step in range(STEPS)] == [0] * 8 + [8] * 8 + [16] * 7
    for step in range(1, STEPS):
        earlier = source if step in BOUNDARIES else "teacher"
        end_of_phase = part(tensors(run.out, step), source) if step in BOUNDARIES else None
        assert_equal(seen[step]["teacher"], end_of_phase or seen[step - 1][earlier])
        assert_equal(seen[step]["net"], seen[step - 1]["after"])  # the student goes on


def test_averages_and_the_rate_start_again_with_each_phase(teachers, tmp_path, monkeypatch):
    run = student(teachers, tmp_path / "run", "progressive_distillation")
    seen = spied(monkeypatch)
    training.train(run, bar=False)
    lines = {line["step"]: line for line in read_metrics(run.out / training.METRICS)}
    for step in range(STEPS - 1):
        first = max(k for k in (0, *BOUNDARIES) if k <= step)
        length = 7 if first == 16 else 8
        assert lines[step + 1]["lr"] == run.optimizer.rate(step - first, length)
        assert lines[step + 1]["step_size"] == 2.0 ** (first // 8 + 1) / M
        for name, decay in (("average", run.ema), ("target", 0.5)):
            weight = ema.warmed_up(decay, step - first)
            before, now, net = (
                k["input.weight"]
                for k in (seen[step][name], seen[step + 1][name], seen[step]["after"])
            )
            torch.testing.assert_close(now, weight * before + (1 - weight) * net)
    rates = [run.optimizer.rate(k, 8) for k in range(8)]
    assert [lines[k + 1]["lr"] for k in range(16)] == rates * 2 and rates[-1] < rates[2] / 5


@pytest.mark.parametrize(("method", "kept"), [("fresh_optimizer", False), ("no_ema", True)])
def test_moments_outlive_a_phase_or_not(teachers, tmp_path, monkeypatch, method, kept):
    seen = spied(monkeypatch)
    run = student(teachers, tmp_path / "run", method)
    training.train(run, bar=False)
    for step in range(1, STEPS):
        assert bool(seen[step]["moments"]) == (kept or step not in BOUNDARIES), step
    steps = tensors(run.out)["optimizer.0.step"]
    assert steps == (STEPS if kept else STEPS - BOUNDARIES[1])


@pytest.mark.parametrize("steps", [7, 20, 21, 23, 100])
def test_the_objective_and_the_loop_agree_on_the_phase(tmp_path, steps):
    run = config(tmp_path, ProgressiveDistillation(), steps=steps)
    starts = [run.phase(step)[0] for step in range(steps)]
    phases = [run.objective.phase(step / steps) for step in range(steps)]
    assert sorted(set(phases)) == list(range(7))
    changes = [step for step in range(1, steps) if phases[step] != phases[step - 1]]
    assert [step for step in range(1, steps) if step == starts[step]] == changes
    lengths = [run.phase(start)[1] for start in dict.fromkeys(starts)]
    assert sum(lengths) == steps and max(lengths) - min(lengths) <= 1


def test_the_cost_of_the_teacher_and_of_its_teacher_is_written_down(teachers, tmp_path):
    first = student(teachers, tmp_path / "reflow", "reflow", steps=4)
    second = student(
        teachers, tmp_path / "cd", "consistency_distillation", steps=4, teacher=first.out
    )
    for run in (first, second):
        training.train(run, bar=False)
    flow, reflow, cd = (facts(first.teacher), facts(first.out, 4), facts(second.out, 4))
    assert (flow["forwards"], flow["teacher"]) == (3 * 32 * STEPS, {})
    assert reflow["forwards"] == 3 * 32 * 4
    assert reflow["teacher"] == {"model": str(teachers / "flow"), "forwards": flow["forwards"]}
    assert cd["forwards"] == 5 * 32 * 4
    assert cd["teacher"]["forwards"] == flow["forwards"] + reflow["forwards"]
    assert read_metrics(second.out / training.METRICS)[-1]["forwards"] == cd["forwards"]


def refusal(run):
    """The one line with which a run is refused, before it leaves anything behind."""
    with pytest.raises(UserError) as caught:
        training.train(run, bar=False)
    assert "\n" not in str(caught.value) and not run.out.exists()
    return str(caught.value)


def test_a_teacher_or_pairs_that_are_missing_or_not_wanted(teachers, tmp_path):
    def refused(objective, **changes):
        return refusal(config(tmp_path / "run", objective, **changes))

    for objective in (ConsistencyDistillation(M=M), ProgressiveDistillation(M=M)):
        assert "learns from a trained model: name it with --teacher" in refused(objective)
        assert "holds no model" in refused(objective, teacher=tmp_path / "nowhere")
    for objective in (FlowMatching(), Shortcut(), Diffusion()):
        assert "has no teacher" in refused(objective, teacher=teachers / "flow")
    for teacher in (None, teachers / "flow"):
        assert "reflow learns from pairs" in refused(Reflow(M=M), teacher=teacher)


def test_every_phase_needs_a_step(teachers, tmp_path):
    run = student(teachers, tmp_path / "run", "progressive_distillation", steps=PHASES - 1)
    assert "3 phases and needs as many steps, not 2" in refusal(run)
    assert training.train(replace(run, steps=PHASES), bar=False)


def test_a_teacher_that_does_not_fit(teachers, tmp_path):
    def refused(objective=None, **changes):
        objective = objective or ConsistencyDistillation(M=M)
        return refusal(config(tmp_path / "run", objective, teacher=teachers / "flow", **changes))

    network = refused(network=MLPConfig(width=8, depth=1))
    assert "another network than the student (width: 16 -> 8)" in network
    assert "num_classes 8, the student is for 0" in refused(data=Mixture(train=200, held_out=0))
    assert "finest 8, the student is for 16" in refused(ConsistencyDistillation(M=16))
    assert "finest 8, the student is for 4" in refused(ProgressiveDistillation(M=4))
    np.savez(tmp_path / "wide.npz", x=np.zeros((20, 3), np.float32), labels=np.arange(20) % 8)
    data = Arrays(tmp_path / "wide.npz", held_out=0.0)
    assert "shape (2,), the student is for (3,)" in refused(data=data)


def test_a_teacher_of_another_method(teachers, tmp_path):
    """Each has the weights of the flow model and the spec of its method."""
    flow = checkpoint.load_model(teachers / "flow")

    def attempt(teacher, objective):
        spec = teacher.spec(replace(flow.spec, claims=(1, None)))
        info = checkpoint.model_info(MLPConfig(width=16, depth=1), spec)
        checkpoint.save_model(tmp_path / "teacher", flow.net, info)
        return config(tmp_path / "run", objective, teacher=tmp_path / "teacher", steps=3)

    refused = {
        "predicts noise on the vp-cosine path": Diffusion(M=M),
        "sampled by consistency": ConsistencyTraining(M=M),
        "not trained at d = 0": ProgressiveDistillation(M=M),
    }
    for message, teacher in refused.items():
        for objective in (ConsistencyDistillation(M=M), ProgressiveDistillation(M=M)):
            assert message in refusal(attempt(teacher, objective))
    pairs = Arrays(teachers / "pairs.npz", held_out=0.0)
    assert "noise" in refusal(replace(attempt(Diffusion(M=M), Reflow(M=M)), data=pairs))

    for guided in (
        ConsistencyDistillation(M=M, guidance=1.5),
        ProgressiveDistillation(M=M, guidance=1.5),
    ):
        message = refusal(attempt(FlowMatching(M=M, label_dropout=0.0), guided))
        assert "guidance 1.5 needs a teacher trained with label_dropout" in message
    for k, teacher in enumerate((FlowMatching(M=M), Shortcut(M=M), LiveReflow(M=M))):
        run = replace(attempt(teacher, guided), out=tmp_path / f"run-{k}")
        assert training.train(run, bar=False)


def test_a_refused_teacher_can_be_corrected(teachers, tmp_path):
    run = student(teachers, tmp_path / "run", "consistency_distillation", steps=1)
    refusal(replace(run, teacher=tmp_path / "nowhere"))
    assert training.train(run, bar=False)


def test_a_pair_is_mirrored_as_one(tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 40, 1, 4, 4)).astype(np.float32)
    images[1] = -2 * images[0]
    np.savez(tmp_path / "pairs.npz", x=images[0], x0=images[1])
    data = Arrays(tmp_path / "pairs.npz", held_out=0.0)
    run = config(tmp_path / "run", Reflow(), data=data, flip=True)
    splits, generator = data.load(), torch.Generator().manual_seed(0)
    x1, _, x0 = training.load_batch(
        run, splits.train, splits.train.read(slice(40)), generator, torch.device("cpu")
    )
    original = splits.train.batch(slice(None))[0]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x1, original, strict=True)]
    assert torch.equal(x0, -2 * x1) and 5 < sum(mirrored) < 35

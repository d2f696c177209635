"""Pairs of noise and sample: what is in them, making them again, and training on them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from anystep import checkpoint, cli
from anystep import pairs as making
from anystep.data import pairs as reading
from anystep.data import seeded
from anystep.data.mixture import Mixture
from anystep.data.pairs import Pairs
from anystep.errors import UserError
from anystep.networks.mlp import MLPConfig
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.pairs import make_pairs
from anystep.registry import to_json
from anystep.sampling import draw, sample
from anystep.spec import ModelSpec

DATA = Mixture(train=300, held_out=50, labels=True)
CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (making, reading):
        monkeypatch.setattr(module, "CHUNK", CHUNK)


@pytest.fixture
def teacher(tmp_path):
    """A model folder of an untrained network on a mixture of 8 classes."""

    def make(objective=None, name="teacher", seed=0, data=DATA, **fields):
        network = MLPConfig(width=8, depth=1)
        classes = 8 if data.labels else 0
        base = ModelSpec(shape=(2,), num_classes=classes, data="raw")
        spec = replace((objective or FlowMatching()).spec(base), **fields)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = network.build(spec.shape, classes)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.arange(parameter.numel()).view_as(parameter).cos()
        training = {"config": {"data": to_json(data)}}
        folder = tmp_path / name
        checkpoint.save_model(folder, net, checkpoint.model_info(network, spec, training))
        return folder

    return make


def make(teacher, out, n=20, steps=3, **options):
    return make_pairs(teacher, out, n=n, steps=steps, bar=False, **options)


def content(folder):
    """Every tensor in a folder of pairs, by file and name."""
    return {
        f"{path.name}/{k}": v
        for path in sorted(folder.glob("*.safetensors"))
        for k, v in load_file(path).items()
    }


def assert_same(a, b):
    left, right = content(a), content(b)
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert (a / reading.INFO).read_text() == (b / reading.INFO).read_text()


def complaint(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- making -------------------------------------------------------------------------------------


def test_the_data_of_a_pair_are_the_teachers_sample_from_its_noise(teacher, tmp_path):
    folder, out = teacher(), tmp_path / "pairs"
    assert make(folder, out) == 20 * 3
    data = Pairs(out).load().train
    model = checkpoint.load_model(folder)
    torch.testing.assert_close(sample(model, data.x0, steps=3, cond=data.labels), data.x)
    assert (data.x - sample(model, data.x0, steps=2, cond=data.labels)).abs().max() > 1e-3
    assert (data.x - sample(model, data.x0, steps=3)).abs().max() > 1e-3
    assert len(data) == 20 and len(data.x0.unique(dim=0)) == 20
    assert len(data.labels.unique()) > 4


def test_noise_is_normal_and_follows_from_seed_and_place_alone(teacher, tmp_path):
    folder = teacher()
    make(folder, tmp_path / "a", n=800, steps=1, seed=5)
    data = Pairs(tmp_path / "a").load().train
    assert data.x0.mean().abs() < 0.06 and abs(float(data.x0.std()) - 1) < 0.05
    assert 60 < data.labels.bincount().min() <= data.labels.bincount().max() < 140
    x0, cond = draw(checkpoint.load_model(folder).spec, CHUNK, seeded(5, 2, stream=2))
    assert torch.equal(data.x0[2 * CHUNK : 3 * CHUNK], x0)
    assert torch.equal(data.labels[2 * CHUNK : 3 * CHUNK], cond)


def test_guided_pairs_are_guided_and_cost_twice(teacher, tmp_path):
    folder, out = teacher(), tmp_path / "pairs"
    assert make(folder, out, guidance=2.0) == 2 * 20 * 3
    data = Pairs(out).load().train
    model = checkpoint.load_model(folder)
    wanted = sample(model, data.x0, steps=3, cond=data.labels, guidance=2.0)
    torch.testing.assert_close(data.x, wanted)
    assert (wanted - sample(model, data.x0, steps=3, cond=data.labels)).abs().max() > 1e-3
    assert data.guidance == 2.0 and data.rows(torch.arange(3)).guidance == 2.0


def test_images_are_kept_within_their_range(teacher, tmp_path):
    network = MLPConfig(width=8, depth=1)
    spec = FlowMatching().spec(ModelSpec(shape=(2,), data="[-1, 1]"))
    training = {"config": {"data": to_json(DATA)}}
    info = checkpoint.model_info(network, spec, training)
    checkpoint.save_model(tmp_path / "m", network.build((2,), 0), info)
    make(tmp_path / "m", tmp_path / "pairs")
    assert Pairs(tmp_path / "pairs").load().train.x.abs().max() == 1


def test_pairs_say_where_they_come_from(teacher, tmp_path):
    folder, other = teacher(), teacher(name="other", seed=1)
    make(folder, tmp_path / "a", guidance=1.5, seed=3)
    make(other, tmp_path / "b")
    a, b = (json.loads((tmp_path / k / "pairs.json").read_text()) for k in "ab")
    expected = {
        "teacher": str(folder),
        "data": to_json(DATA),
        "num_classes": 8,
        "steps": 3,
        "guidance": 1.5,
        "seed": 3,
        "n": 20,
    }
    assert {k: v for k, v in a.items() if k != "weights"} == expected
    assert a["weights"] != b["weights"] and len(a["weights"]) == 16


# --- stopping and going on ----------------------------------------------------------------------


class PowerCut(Exception):
    pass


def cut_after(monkeypatch, chunks):
    """Let `chunks` chunks be made and the next one fail; returns the list of those made."""
    usual, made = making.chunk, []

    def dying(model, rows, *rest):
        if len(made) == chunks:
            raise PowerCut
        made.append(rows)
        return usual(model, rows, *rest)

    monkeypatch.setattr(making, "chunk", dying)
    return made


def test_interrupted_pairs_go_on_and_end_as_uninterrupted_ones(teacher, tmp_path, monkeypatch):
    folder, whole, parts = teacher(), tmp_path / "whole", tmp_path / "parts"
    forwards = make(folder, whole)
    for chunks in (0, 1, 1):
        with monkeypatch.context() as patch:
            cut_after(patch, chunks)
            with pytest.raises(PowerCut):
                make(folder, parts)
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert len(before) == 2
    assert "holds 16 of 20 pairs" in complaint(Pairs(parts).load)
    made = cut_after(monkeypatch, 99)
    assert make(folder, parts) == forwards and made == [4]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_same(whole, parts)
    assert not list(parts.glob(".*"))


def test_a_chunk_that_was_lost_is_made_again(teacher, tmp_path, monkeypatch):
    folder, whole, parts = teacher(), tmp_path / "whole", tmp_path / "parts"
    make(folder, whole)
    make(folder, parts)
    (parts / "pairs-000001.safetensors").unlink()
    assert "holds 8 of 20 pairs: the same anystep pairs" in complaint(Pairs(parts).load)
    made = cut_after(monkeypatch, 99)
    make(folder, parts)
    assert made == [8]
    assert_same(whole, parts)


def test_growing_and_shrinking_the_number_loses_nothing(teacher, tmp_path, monkeypatch):
    folder, out = teacher(), tmp_path / "pairs"
    make(folder, out, n=11)
    small = Pairs(out).load().train
    made = cut_after(monkeypatch, 99)
    assert make(folder, out, n=20) == 60 and made == [8, 4]
    make(folder, tmp_path / "whole", n=20)
    assert_same(out, tmp_path / "whole")
    large = Pairs(out).load().train
    assert torch.equal(large.x0[:11], small.x0) and torch.equal(large.labels[:11], small.labels)
    torch.testing.assert_close(large.x[:11], small.x)
    made.clear()
    make(folder, out, n=5)
    assert made == [] and torch.equal(Pairs(out).load().train.x0, large.x0[:5])
    make(folder, out, n=20)
    assert made == [] and torch.equal(Pairs(out).load().train.x, large.x)


def test_a_growth_cut_off_within_a_chunk_is_noticed(teacher, tmp_path, monkeypatch):
    folder, out = teacher(), tmp_path / "pairs"
    make(folder, out, n=4)
    with monkeypatch.context() as patch:
        patch.setattr(making, "save_file", lambda *_: (_ for _ in ()).throw(PowerCut))
        with pytest.raises(PowerCut):
            make(folder, out, n=7)
    assert "holds 4 of 7 pairs" in complaint(Pairs(out).load)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"steps": 4}, "steps: 3 -> 4"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"guidance": 2.0}, "guidance: 1.0 -> 2.0"),
    ],
)
def test_pairs_made_otherwise_are_not_mixed(teacher, tmp_path, other, named):
    folder, out = teacher(), tmp_path / "pairs"
    make(folder, out)
    before = content(out)
    message = complaint(make, folder, out, **other)
    assert f"({named})" in message and "choose another --out" in message
    after = content(out)
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    make(folder, out)


def test_another_teacher_is_noticed_by_its_weights_and_not_by_its_name(teacher, tmp_path):
    folder, out = teacher(), tmp_path / "pairs"
    make(folder, out)
    moved = folder.rename(tmp_path / "moved")
    make(moved, out)
    assert "weights: " in complaint(make, teacher(seed=1), out)
    elsewhere = teacher(name="elsewhere", data=replace(DATA, seed=1))
    assert "(data.seed: 0 -> 1)" in complaint(make, elsewhere, out)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n": 0}, "n must be at least 1 pair, not 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"seed": -1}, "a seed must be at least 0"),
    ],
)
def test_a_refused_request_leaves_nothing_that_a_good_one_stumbles_over(
    teacher, tmp_path, bad, message
):
    folder, out = teacher(), tmp_path / "pairs"
    assert message in complaint(make, folder, out, **bad)
    make(folder, out)
    assert len(Pairs(out).load().train) == 20


def test_guidance_that_would_be_left_out_is_refused(teacher, tmp_path):
    out = tmp_path / "pairs"
    shortcut = teacher(Shortcut(M=8))
    message = complaint(make, shortcut, out, guidance=2.0)
    assert "guidance 2.0 does not reach all 3 steps: take 8 steps or more" in message
    assert make(shortcut, out, n=1, steps=8, guidance=2.0) == 16
    never = teacher(FlowMatching(label_dropout=0), "never")
    assert "null label was not trained" in complaint(make, never, out, guidance=2.0)
    unconditional = teacher(name="none", data=replace(DATA, labels=False))
    assert "null label was not trained" in complaint(make, unconditional, out, guidance=2.0)


def test_a_sampler_that_adds_noise_makes_no_pairs(teacher, tmp_path):
    consistency = teacher(sampler="consistency")
    message = complaint(make, consistency, tmp_path / "pairs")
    assert "consistency, adds noise" in message and "take 1 step" in message
    make(consistency, tmp_path / "pairs", steps=1)
    ddim = teacher(Diffusion(), "ddim")
    make(ddim, tmp_path / "ddim")
    data = Pairs(tmp_path / "ddim").load().train
    model = checkpoint.load_model(ddim)
    torch.testing.assert_close(sample(model, data.x0, steps=3, cond=data.labels), data.x)


def test_a_teacher_that_cannot_be_used_is_refused(teacher, tmp_path):
    folder = teacher()
    info = checkpoint.read_info(folder)
    model = checkpoint.load_model(folder)
    checkpoint.save_model(tmp_path / "bare", model.net, info | {"training": {}})
    assert "does not say what data" in complaint(make, tmp_path / "bare", tmp_path / "pairs")
    model.net.output.bias.data.fill_(float("nan"))
    checkpoint.save_model(tmp_path / "nan", model.net, info)
    assert "NaN or Inf" in complaint(make, tmp_path / "nan", tmp_path / "pairs")
    assert not list((tmp_path / "pairs").glob("*"))


# --- reading ------------------------------------------------------------------------------------


def test_pairs_are_a_dataset_with_noise_and_hold_nothing_out(teacher, tmp_path):
    make(teacher(), tmp_path / "pairs")
    train, held_out = Pairs(tmp_path / "pairs").load()
    assert len(held_out) == 0 and held_out.shape == (2,)
    assert train.num_classes == 8 and train.labels.dtype == torch.int64
    assert torch.equal(train.read(slice(3, 5)).x0, train.x0[3:5])
    assert train.digest() != replace(train, x0=None).digest()
    assert train.digest() != replace(train, x0=train.x0 + 1).digest()


def test_pairs_without_classes(teacher, tmp_path):
    make(teacher(data=replace(DATA, labels=False)), tmp_path / "pairs")
    train = Pairs(tmp_path / "pairs").load().train
    assert train.labels is None and train.num_classes == 0 and len(train.x0) == 20


def test_pairs_are_judged_against_the_data_of_the_first_teacher(teacher, tmp_path):
    make(teacher(), tmp_path / "once")
    again = teacher(name="student", data=DATA)
    info = checkpoint.read_info(again)
    info["training"]["config"]["data"] = to_json(Pairs(tmp_path / "once"))
    checkpoint.save_model(again, checkpoint.load_model(again).net, info)
    make(again, tmp_path / "twice")
    for name in ("once", "twice"):
        data = Pairs(tmp_path / name)
        reference = data.reference(data.load())
        assert torch.equal(reference.train.x, DATA.load().train.x)
        assert len(reference.held_out) == 50


def test_a_damaged_chunk_is_one_line_in_making_and_reading(teacher, tmp_path):
    folder, out = teacher(), tmp_path / "pairs"
    make(folder, out)
    chunk = out / "pairs-000001.safetensors"
    whole = chunk.read_bytes()
    for damaged in (whole[:50], whole[:-1], b""):
        chunk.write_bytes(damaged)
        for call in (Pairs(out).load, lambda: make(folder, out)):
            message = complaint(call)
            assert f"{chunk} is damaged" in message
            assert message.endswith("remove it, and anystep pairs makes it again")
    chunk.unlink()
    make(folder, out)
    assert chunk.read_bytes() == whole


def test_a_folder_that_holds_no_pairs_is_one_line(teacher, tmp_path):
    assert f"{tmp_path / 'none' / 'pairs.json'} is missing" in complaint(
        Pairs(tmp_path / "none").load
    )
    for text, message in (("{", "is damaged"), ("[1]", "was not written by anystep pairs")):
        (tmp_path / "pairs.json").write_text(text)
        assert message in complaint(Pairs(tmp_path).load)
        assert message in complaint(make, teacher(), tmp_path)


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def call(*args):
        code = cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def refused(result, *fragments):
    code, _, err = result
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("anystep: "), err
    for fragment in fragments:
        assert fragment in lines[0]


FEW = ("--steps", 3, "--batch", 16, "--device", "cpu", "--log.trackers")


def test_from_a_teacher_to_a_student_that_is_judged_by_the_teachers_data(run, tmp_path):
    flow, out, student = (tmp_path / k for k in ("flow", "pairs", "student"))
    train = ["train", "mixture", "--method", "flow_matching", "--data.train", 300, *FEW]
    small = ("--data.held-out", 50, "--network.width", 8, "--network.depth", 1)
    assert run(*train, *small, "--out", flow)[0] == 0
    code, text, err = run("pairs", flow, "--out", out, "--n", 20, "--steps", 4, "--device", "cpu")
    assert code == 0, err
    assert f"20 pairs in {out}, 80 forwards" in text
    hint = next(line for line in text.splitlines() if line.startswith("next: anystep "))
    command = hint.removeprefix("next: anystep ").split()
    code, _, err = run(*command, *FEW, "--out", student)
    assert code == 0, err
    start, end = (checkpoint.load_model(folder) for folder in (flow, student))
    assert end.spec.step_input == "zero" and end.spec.shape == (2,)
    change = end.net.input.weight - start.net.input.weight
    assert 0 < change.abs().max() < 0.05  # it started from the teacher
    code, text, err = run("eval", student, "--steps", 1, 2, "--n", 40)
    assert code == 0, err
    assert "40 samples (seed 0) against 300 training examples; real data: 50 held-out" in text


def test_mistakes_with_pairs_are_one_line(run, teacher, tmp_path):
    folder, out = teacher(), tmp_path / "pairs"
    pairs = ["pairs", folder, "--device", "cpu"]
    refused(run(*pairs), "anystep: Missing from anystep pairs: --out PATH")
    refused(run("pairs", "--out", out), "anystep: Missing from anystep pairs: PATH the")
    refused(run(*pairs, "--out", out, "--n", 0), "n must be at least 1 pair, not 0")
    refused(run(*pairs, "--out", out, "--steps", 0), "at least 1, not 0")
    refused(run(*pairs, "--out", out, "--step", 1), "did you mean '--steps'?")
    refused(run("pairs", tmp_path / "none", "--out", out), "none holds no model")
    (tmp_path / "file").touch()
    refused(run(*pairs, "--out", tmp_path / "file"), "cannot write to")
    train = ["train", "pairs", "--method", "reflow", *FEW, "--out", tmp_path / "run"]
    refused(run(*train), "--data.path")
    refused(run(*train, "--data.path", out), "pairs.json is missing")
    assert run(*pairs, "--out", out, "--n", 20, "--steps", 1)[0] == 0
    refused(run(*train, "--data.path", out, "--teacher", tmp_path / "none"), "holds no model")
    refused(run(*train, "--data.path", out), "a DiT takes images")
    plain = ["train", "mixture", "--method", "reflow", *FEW, "--out", tmp_path / "run"]
    refused(run(*plain), "reflow learns from pairs of noise and data", "anystep pairs RUN --out")
    assert not (tmp_path / "run").exists()
    (out / "pairs-000001.safetensors").write_bytes(b"1")
    again = "remove it, and anystep pairs makes it again"
    refused(run(*train, "--data.path", out, "--teacher", folder), "is damaged", again)
    refused(run(*pairs, "--out", out, "--n", 20, "--steps", 1), "is damaged", again)

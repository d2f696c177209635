import os
import shutil

import pytest
import torch

from anystep import checkpoint
from anystep.checkpoint import load_model, model_info, save_checkpoint, save_model
from anystep.errors import UserError
from anystep.objectives.shortcut import Shortcut
from anystep.spec import ModelSpec
from conftest import SMALL, small_net


def parts(kind="mlp", seed=0):
    net, shape = small_net(kind, seed=seed)
    spec = Shortcut(guidance=1.5).spec(ModelSpec(shape=shape, num_classes=4))
    return net, spec, model_info(SMALL[kind][0], spec, {"step": seed})


def save(run, step, keep=3):
    net, _, info = parts(seed=step)
    return save_checkpoint(run, step, net, info, {"net.w": torch.full((3,), float(step))}, keep)


@pytest.mark.parametrize("kind", SMALL)
def test_a_model_comes_back_with_its_spec(tmp_path, kind):
    net, spec, info = parts(kind)
    save_model(tmp_path / "model", net, info)
    model = load_model(tmp_path / "model")
    assert model.spec == spec and not model.training
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.net.state_dict().items())


def test_half_precision_weights_load_as_float32(tmp_path):
    net, _, info = parts()
    save_model(tmp_path / "model", net.half(), info)
    weights = load_model(tmp_path / "model").net.state_dict()
    assert {v.dtype for v in weights.values()} == {torch.float32}


def test_a_run_stands_for_its_newest_checkpoint(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    wanted = small_net("mlp", seed=10)[0].input.weight
    for path in (tmp_path, tmp_path / "checkpoints" / "step-00000010"):
        assert torch.equal(load_model(path).net.input.weight, wanted)


class PowerCut(BaseException):
    pass


def test_a_crash_at_any_instant_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Cut the power before each single operation on the file system, one run each."""

    def cut_before(operation, run):
        counter = iter(range(operation, -1, -1))

        def counted(function):
            def call(*args, **kwargs):
                if next(counter, 0) == 0:
                    raise PowerCut
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "fsync"),
                (os, "rename"),
                (os, "replace"),
                (os, "unlink"),
                (os, "rmdir"),
                (os, "mkdir"),
                (checkpoint, "save_file"),
                (shutil, "rmtree"),
                (checkpoint.Path, "rename"),
                (checkpoint.Path, "mkdir"),
                (checkpoint.Path, "write_text"),
                (checkpoint.Path, "replace"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            save(run, 20, keep=1)

    survived = 0
    for operation in range(200):
        run = tmp_path / str(operation)
        save(run, 10)
        try:
            cut_before(operation, run)
        except PowerCut:
            survived += 1
        else:
            assert [c.name for c in checkpoint.checkpoints(run)] == ["step-00000020"]
            break
        found = checkpoint.checkpoints(run)
        assert found
        for folder in found:
            step = int(folder.name.removeprefix("step-"))
            state = checkpoint.read_tensors(folder / checkpoint.TRAINING)
            assert torch.equal(state["net.w"], torch.full((3,), float(step)))
            assert checkpoint.read_info(folder)["training"]["step"] == step
        save(run, 30)
        assert load_model(run)
    assert survived > 15


def test_leftovers_of_a_crash_are_no_checkpoints(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / ".step-00000020.new").mkdir()
    (tmp_path / "checkpoints" / "step-00000010-my-copy").mkdir()
    assert [c.name for c in checkpoint.checkpoints(tmp_path)] == ["step-00000010"]
    checkpoint.sweep(tmp_path)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000010", "step-00000010-my-copy"]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.MODEL])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, name):
    save(tmp_path, 10)
    file = save(tmp_path, 20) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged") as caught:
        load_model(tmp_path)
    assert "go on from step-00000010" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path / "missing")
    net, _, info = parts()
    save_model(tmp_path / "future", net, info | {"format": 99})
    with pytest.raises(UserError, match="format"):
        load_model(tmp_path / "future")
    save_model(tmp_path / "other", small_net("dit")[0], info)
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "other")


def test_saving_a_model_again_replaces_it(tmp_path):
    for seed in (0, 1):
        net, _, info = parts(seed=seed)
        save_model(tmp_path / "model", net, info)
    assert torch.equal(load_model(tmp_path / "model").net.input.weight, net.input.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

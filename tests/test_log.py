"""Where metrics go: JSON lines always, trackers when asked for."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from anystep import cli
from anystep import train as training
from anystep.config import LogConfig, TrainConfig, config_json
from anystep.data.mixture import Mixture
from anystep.errors import UserError
from anystep.log import read_metrics
from anystep.networks.mlp import MLPConfig
from anystep.objectives.shortcut import Shortcut
from anystep.registry import from_json
from anystep.trackers import IDENTITY, identity

RESULTS = Path(__file__).parents[1] / "results"


def config(out, *trackers, **log):
    return TrainConfig(
        data=Mixture(train=100, held_out=0),
        network=MLPConfig(width=8, depth=1),
        objective=Shortcut(),
        log=LogConfig(every=2, save_every=4, trackers=trackers, **log),
        out=out,
        steps=10,
        batch=16,
        device="cpu",
    )


class Run:
    """What `init` of wandb and of trackio returns, as far as it is used."""

    def __init__(self, options):
        self.options, self.lines, self.finished = options, [], False

    def log(self, metrics, step=None):
        assert not self.finished
        self.lines.append({"step": step, **metrics})

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """Put a library that records its runs where `name` would be."""

    def install(name):
        module = types.ModuleType(name)
        module.runs = []

        def init(project, name=None, config=None, resume="never", **rest):
            run = Run(dict(project=project, name=name, config=config, resume=resume, **rest))
            module.runs.append(run)
            return run

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def test_every_line_reaches_every_tracker(tmp_path, fake):
    libraries = [fake("wandb"), fake("trackio")]
    run = config(tmp_path / "run #1", "wandb", "trackio", look_every=5, look_samples=8)
    assert training.train(run, bar=False)
    lines = read_metrics(run.out / training.METRICS)
    assert [line["step"] for line in lines] == [2, 4, 5, 5, 6, 8, 10, 10]
    for library in libraries:
        (tracked,) = library.runs
        assert tracked.lines == lines and tracked.finished
        options = tracked.options
        assert options["project"] == "anystep" and options["resume"] == "allow"
        assert options["config"] == config_json(run)
        assert options["name"].startswith("run-1-") and not set(options["name"]) & set("/\\#?% :")
    wandb, trackio = (library.runs[0].options for library in libraries)
    assert wandb["id"] == wandb["name"] and wandb["dir"] == str(run.out)
    assert set(trackio) == {"project", "name", "config", "resume"}  # it knows no others
    assert not (run.out / "tensorboard").exists()


def test_a_resumed_run_goes_on_in_the_same_tracked_run(tmp_path, fake, monkeypatch):
    libraries = [fake("wandb"), fake("trackio")]
    run = config(tmp_path / "run", "wandb", "trackio", project="mine")
    usual = training.training_step

    def dying(state, *rest):
        if state.step == 6:
            raise RuntimeError("power cut")
        return usual(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            training.train(run, bar=False)
    moved = tmp_path / "moved"
    run.out.rename(moved)
    assert training.train(replace(run, out=moved), bar=False)
    for library in libraries:
        first, second = library.runs
        assert first.finished  # what was logged before the cut is sent
        for key in {"project", "name", "id", "resume"} & set(first.options):
            assert first.options[key] == second.options[key]
        assert second.options["resume"] == "allow" and second.options["project"] == "mine"
        assert second.lines[0]["step"] == 6
    assert training.train(config(tmp_path / "other", "wandb"), bar=False)
    assert libraries[0].runs[2].options["id"] != libraries[0].runs[0].options["id"]


def test_the_identity_is_kept_in_the_folder(tmp_path):
    name = identity(tmp_path)
    assert name.startswith(f"{tmp_path.name}-") and identity(tmp_path) == name
    assert json.loads((tmp_path / IDENTITY).read_text()) == {"name": name}


def test_a_missing_library_is_told_before_anything_is_done(tmp_path, monkeypatch, capsys):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        args = ["train", "mixture", "--log.trackers", "tensorboard", name]
        assert cli.main([*args, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"anystep: the tracker {name} cannot be imported (")
        assert error.endswith(f"): pip install 'anystep[{name}]'\n") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    try:
        with pytest.raises(UserError, match="wandb is a folder here"):
            training.train(config(tmp_path / "run", "wandb"), bar=False)
    finally:
        sys.modules.pop("wandb", None)


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, fake):
    def refuse(**options):
        raise RuntimeError("no API key\nconfigured")

    fake("wandb").init = refuse
    with pytest.raises(UserError) as caught:
        training.train(config(tmp_path / "run", "wandb"), bar=False)
    assert "wandb does not start (no API key configured)" in str(caught.value)
    assert "--log.trackers" in str(caught.value)


def test_libraries_are_imported_only_when_asked_for(tmp_path, monkeypatch):
    asked = set()

    class Watch:
        @staticmethod
        def find_spec(name, *rest):
            asked.add(name)

    monkeypatch.setattr(sys, "meta_path", [Watch, *sys.meta_path])
    training.train(config(tmp_path / "run", "tensorboard"), bar=False)
    assert not asked & {"wandb", "trackio"}
    with pytest.raises(UserError, match="wandb"):
        monkeypatch.setattr(sys, "meta_path", [Watch])
        training.train(config(tmp_path / "other", "wandb"), bar=False)
    assert "wandb" in asked


def test_tensorboard_is_the_default_and_may_be_missing(tmp_path, monkeypatch):
    assert LogConfig().trackers == ("tensorboard",)
    run = config(tmp_path / "run", "tensorboard")
    training.train(run, bar=False)
    assert list((run.out / "tensorboard").glob("events*"))
    assert not (run.out / IDENTITY).exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert training.train(config(tmp_path / "without", "tensorboard"), bar=False)
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_configs_of_earlier_versions_are_read():
    assert from_json(LogConfig, {"tensorboard": False}) == LogConfig(trackers=())
    assert from_json(LogConfig, {"tensorboard": True, "every": 7}) == LogConfig(every=7)
    files = sorted(RESULTS.glob("*/scores/*.json"))
    old = [json.loads(file.read_text())["made_by"]["config"] for file in files]
    old = [data for data in old if "tensorboard" in data["log"]]
    assert len(old) > 10
    for data in old:
        assert from_json(TrainConfig, data).log.trackers == ("tensorboard",)


def test_a_misspelt_tracker_is_one_line(tmp_path, capsys):
    assert cli.main(["train", "mixture", "--log.trackers", "wandbb", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "wandbb" in error

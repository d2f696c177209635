"""The command line as a newcomer uses it, typos included; `main` returns the exit code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anystep import checkpoint, cli
from anystep.networks.dit import DiTConfig
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.spec import ModelSpec

SMALL = [
    *("--network.width", "16", "--network.depth", "1", "--network.heads", "2", "--batch", "8"),
    *("--log.look-every", "0", "--log.trackers", "--device", "cpu"),
]


LIGHT = ("--steps", "1", "--out", "never-made")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Run a command; returns its exit code, stdout and stderr."""

    def call(*args):
        code = cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def refused(result, *fragments):
    """The command failed with one line on stderr that contains the fragments."""
    code, _, err = result
    lines = [line for line in err.splitlines() if "step/s" not in line and "?step" not in line]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("anystep: "), err
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.fixture
def model(tmp_path):
    """A model folder of a small network on 8x8 images of 3 classes."""

    def make(objective=None, num_classes=3):
        config = DiTConfig(patch=2, width=16, depth=1, heads=2)
        spec = (objective or Shortcut()).spec(ModelSpec(shape=(1, 8, 8), num_classes=num_classes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = config.build(spec.shape, num_classes)
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.arange(parameter.numel()).view_as(parameter).sin()
        folder = tmp_path / "model"
        checkpoint.save_model(folder, net, checkpoint.model_info(config, spec))
        return folder

    return make


def pictures(folder, n=12, classes=("cat", "dog"), size=(10, 8)):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(n):
            pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


class TestHelp:
    def test_overview_and_version(self, run):
        code, out, _ = run("--help")
        assert code == 0 and all(f"  {name} " in out for name in cli.COMMANDS)
        assert run("--version")[1].startswith("anystep 0.")
        assert run()[0] == 2

    @pytest.mark.parametrize("command", ["sample", "eval", "info"])
    def test_each_command_explains_its_options(self, capsys, command):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert "(default" in out or command == "info"
        assert "model" in out

    def test_train_lists_presets_and_methods(self, run):
        code, out, _ = run("train", "--help")
        assert code == 0 and "digits" in out and "flow_matching" in out and "shortcut" in out

    def test_train_lists_every_field_of_the_method(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["train", "digits", "--help"])
        out = capsys.readouterr().out
        assert "--objective.bootstrap-share" in out and "--network.patch" in out


class TestTypos:
    def test_nearest_match_is_named(self, run):
        refused(run("trian", "digits"), "did you mean 'train'?")
        refused(run("train", "digit"), "unknown preset 'digit'", "'digits'")
        refused(run("train", "digits", "--method", "shortcuts"), "did you mean 'shortcut'?")
        refused(run("train", "digits", "--method", "shortcut/papr"), "did you mean 'paper'?")
        refused(run("train", "digits", "--stpes", "3"), "--stpes", "did you mean '--steps'?")
        refused(
            run("train", "digits", "--objective.target_em", "0.9"),
            "did you mean '--objective.target-ema'?",
        )
        refused(run("sample", "x", "--step", "3"), "did you mean '--steps'?")

    def test_bad_values_are_one_line(self, run):
        refused(run("train", "digits", "--steps", "many"), "--steps", "many")
        refused(run("train", "digits", "--steps", "0"), "steps must be at least 1")
        refused(run("train", "digits", "--optimizer.decay", "cosin"), "cosin")
        refused(run("train", "digits", "--objective.M", "100"), "power of two")
        refused(run("train", "folder"), "--data.path")
        refused(run("train", "--steps", "5"), "name a preset")
        refused(run("train", "digits", "extra"), "unexpected argument 'extra'")
        refused(run("train", "digits", "--method"), "--method needs a value")
        refused(run("train", "folder", "--data.path", ""), "empty value")
        for option, value in (
            ("--seed", "-1"),
            ("--network.patch", "0"),
            ("--network.heads", "0"),
            ("--optimizer.lr", "nan"),
            ("--optimizer.clip", "0"),
            ("--optimizer.betas", "2 2"),
            ("--ema", "2"),
            ("--objective.target-ema", "1.5"),
            ("--device", "meta"),
            ("--objective.label-dropout", "5"),
            ("--objective.clip", "-1"),
            ("--log.look-steps", "0"),
            ("--data.held-out", "1"),
        ):
            refused(run("train", "digits", option, *value.split(), *LIGHT))
        refused(run("sample", "x", "--seed", "1.5"), "--seed")
        refused(run("train", "digits", "--device", "cuda:7"), "CUDA") if (
            not torch.cuda.is_available()
        ) else None


class TestTrain:
    def test_dry_run_prints_the_resolved_config_and_does_nothing(self, run, tmp_path):
        code, out, _ = run(
            "train",
            "digits",
            "--method",
            "shortcut/authors",
            "--dry-run",
            "--steps",
            "7",
            "--out",
            tmp_path / "run",
        )
        config = json.loads(out)
        assert code == 0 and config["steps"] == 7
        assert config["objective"]["clip"] == 4.0 and config["objective"]["name"] == "shortcut"
        assert not (tmp_path / "run").exists()

    def test_a_config_file_is_a_preset(self, run, tmp_path):
        _, first, _ = run("train", "digits", "--dry-run", "--seed", "5")
        (tmp_path / "config.json").write_text(first)
        _, again, _ = run("train", tmp_path / "config.json", "--dry-run")
        assert json.loads(again) == json.loads(first)
        config = tmp_path / "config.json"
        refused(run("train", config, "--method", "shortcut"), "names its method itself")
        for text, message in (
            ("[1]", "must be a JSON object"),
            (first.replace('"cosine"', '"cosin"'), "'cosin' is not"),
            (first.replace('"steps": 3000', '"steps": 1.5'), "1.5 is not int"),
            (first.replace('"name": "digits"', '"name": "digit"'), "did you mean 'digits'"),
            (first[:100], "damaged"),
        ):
            assert text != first
            config.write_text(text)
            refused(run("train", config, "--dry-run"), message)

    def test_train_sample_eval_info(self, run, tmp_path):
        out = tmp_path / "run"
        data = pictures(tmp_path / "data")
        args = ["train", "folder", "--data.path", data, "--data.size", "8", "12", *SMALL]
        code, _, err = run(*args, "--network.patch", "4", "--steps", "3", "--out", out)
        assert code == 0, err
        code, text, _ = run("sample", out, "--steps", "3", "--n", "5", "--out", tmp_path / "s.npz")
        assert code == 0 and str(tmp_path / "s.npz") in text
        with np.load(tmp_path / "s.npz") as made:
            assert made["samples"].shape == (5, 3, 8, 12) and made["samples"].dtype == np.float32
            assert abs(made["samples"]).max() <= 1 and made["cond"].shape == (5,)
        assert run("sample", out, "--n", "5", "--out", tmp_path / "s.png")[0] == 0
        assert Image.open(tmp_path / "s.png").width > 12
        assert run("sample", out, "--n", "5", "--label", "1", "--out", tmp_path / "many")[0] == 0
        names = sorted(p.name for p in (tmp_path / "many").iterdir())
        assert len(names) == 5 and names[0] == "000000-class1.png"
        assert Image.open(tmp_path / "many" / names[0]).size == (12, 8)
        code, text, err = run("eval", out, "--steps", "1", "4", "--n", "20")
        assert code == 0, err
        for name in ("quality.md", "quality.json", "quality.png", "grid.png"):
            assert str(out / name) in text and (out / name).is_file()
        rows = json.loads((out / "quality.json").read_text())["rows"]
        assert [r["steps"] for r in rows if r["model"] != "real data"] == [1, 4]
        code, text, _ = run("info", out)
        about = json.loads(text)
        assert code == 0 and about["spec"]["shape"] == [3, 8, 12] and about["parameters"] > 1000

    def test_resuming_with_the_same_command_and_refusing_another(self, run, tmp_path):
        args = ["train", "digits", *SMALL, "--steps", "2", "--out", tmp_path / "run"]
        assert run(*args)[0] == 0
        assert run(*args)[0] == 0
        refused(run(*args, "--seed", "3"), "seed: 0 -> 3", "--out")


class TestBadData:
    def test_nothing_to_train_on(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        refused(run("train", "folder", "--data.path", tmp_path / "empty"), "no image", "empty")
        refused(run("train", "folder", "--data.path", tmp_path / "gone"), "does not exist")

    def test_broken_pictures_stop_or_are_skipped(self, run, tmp_path):
        data = pictures(tmp_path / "data")
        whole = (data / "cat" / "0.png").read_bytes()
        Image.new("RGB", (64, 64), "red").save(data / "dog" / "cut.jpg")
        cut = (data / "dog" / "cut.jpg").read_bytes()
        (data / "dog" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
        (data / "dog" / "text.png").write_text("not a picture")
        Image.new("RGB", (1, 1)).save(data / "dog" / "dot.png")
        args = [
            "train",
            "folder",
            "--data.path",
            data,
            "--data.size",
            "8",
            "8",
            *SMALL,
            "--steps",
            "2",
            "--out",
            tmp_path / "run",
        ]
        refused(
            run(*args), "3 of 27 images", "cut.jpg", "dot.png", "text.png", "--data.on-error skip"
        )
        assert not (tmp_path / "run").exists()
        code, _, err = run(*args, "--data.on-error", "skip")
        assert code == 0 and "skipped" in err and "3 of 27" in err
        assert (data / "cat" / "0.png").read_bytes() == whole

    def test_a_patch_that_does_not_divide(self, run, tmp_path):
        data = pictures(tmp_path / "data")
        refused(
            run("train", "folder", "--data.path", data, "--data.size", "9", "8", *SMALL),
            "patch 4 does not divide",
            "9x8",
        )


class TestBadRequests:
    def test_steps_and_labels(self, run, model, tmp_path):
        folder, out = model(), ("--out", tmp_path / "s.npz")
        refused(run("sample", folder, "--steps", "0", *out), "at least 1, not 0")
        refused(run("sample", folder, "--label", "3", *out), "out of range", "0..2")
        refused(run("sample", folder, "--label", "-1", *out), "out of range")
        refused(run("sample", folder, "--n", "0", *out), "n and batch")
        refused(run("sample", folder, "--out", tmp_path / "s.jpeg"), "FILE.npz")
        refused(run("sample", tmp_path / "none"), "holds no model")
        refused(run("eval", folder), "does not say what data")
        refused(run("eval"), "name at least one")
        assert not (tmp_path / "s.npz").exists()

    def test_an_unconditional_model_takes_no_label(self, run, model, tmp_path):
        folder = model(num_classes=0)
        refused(run("sample", folder, "--label", "0"), "unconditional")
        assert run("sample", folder, "--out", tmp_path / "s.npz")[0] == 0
        with np.load(tmp_path / "s.npz") as made:
            assert made.files == ["samples"]

    def test_half_a_checkpoint(self, run, tmp_path):
        args = ["train", "digits", *SMALL, "--log.save-every", "2", "--out", tmp_path / "run"]
        assert run(*args, "--steps", "4")[0] == 0
        file = checkpoint.checkpoints(tmp_path / "run")[-1] / checkpoint.TRAINING
        file.write_bytes(file.read_bytes()[:1000])
        refused(run(*args, "--steps", "4"), "is damaged", "go on from step-00000002")
        assert len(checkpoint.checkpoints(tmp_path / "run")) == 2

    def test_outputs_that_cannot_be_written_cost_nothing(self, run, model, tmp_path):
        folder = model()
        (tmp_path / "file").touch()
        (tmp_path / "dir.npz").mkdir()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.png").touch()
        refused(run("sample", folder, "--out", tmp_path / "file" / "s.npz"), "cannot write")
        refused(run("sample", folder, "--out", tmp_path / "dir.npz"), "is a folder")
        refused(run("sample", folder, "--out", tmp_path / "full"), "not empty")
        refused(run("train", "digits", *SMALL, "--steps", "1", "--out", tmp_path / "file"), "file")
        refused(
            run("train", "digits", *SMALL, "--steps", "1", "--out", tmp_path / "file" / "x"),
            "Not a directory",
        )

    def test_broken_weights_are_reported(self, run, model, tmp_path):
        folder = model()
        loaded = checkpoint.load_model(folder)
        loaded.net.output.bias.data.fill_(float("nan"))
        checkpoint.save_model(folder, loaded.net, checkpoint.read_info(folder))
        refused(run("sample", folder, "--out", tmp_path / "s.npz"), "NaN")

    def test_other_data_under_the_same_name(self, run, tmp_path):
        rng = np.random.default_rng(0)
        np.save(tmp_path / "v.npy", rng.normal(size=(50, 3)))
        args = [
            "train",
            "vectors",
            "--data.path",
            tmp_path / "v.npy",
            "--batch",
            "8",
            "--device",
            "cpu",
            "--network.width",
            "8",
            "--network.depth",
            "1",
            "--log.save-every",
            "1",
            "--out",
            tmp_path / "run",
            "--steps",
            "2",
        ]
        assert run(*args)[0] == 0
        np.save(tmp_path / "moved.npy", np.load(tmp_path / "v.npy"))
        np.save(tmp_path / "v.npy", rng.normal(size=(40, 3)))
        refused(run(*args), "the data have changed")
        code, out, err = run("eval", tmp_path / "run", "--steps", "1", "--n", "40")
        assert code == 0 and "the data have changed" in err and "sliced W2" in out
        again = ["eval", tmp_path / "run", "--steps", "1", "--n", "40"]
        assert "have changed" not in run(*again, "--data", tmp_path / "moved.npy")[2]

    def test_guidance_where_it_was_not_trained_is_a_warning(self, run, model, tmp_path):
        args = ["sample", model(), "--n", "3", "--guidance", "2", "--out", tmp_path / "s.npz"]
        code, _, err = run(*args, "--steps", "4")
        assert code == 0 and err.startswith("warning: guidance 2.0 is left out of 4 of 4 steps")
        assert run(*args, "--steps", "128")[2] == ""
        assert run(*args, "--steps", "4", "--force-guidance")[2] == ""


def test_sampling_is_determined_by_the_seed(run, model, tmp_path):
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(
            "sample",
            model(FlowMatching()),
            "--seed",
            seed,
            "--n",
            9,
            "--batch",
            4 + seed,
            "--out",
            tmp_path / f"{name}.npz",
        )
        with np.load(tmp_path / f"{name}.npz") as arrays:
            made.append((arrays["samples"], arrays["cond"]))
    assert np.array_equal(made[0][0], made[1][0]) and np.array_equal(made[0][1], made[1][1])
    assert not np.array_equal(made[0][0], made[2][0])


def test_the_readme_names_only_commands_that_exist():
    text = Path(__file__).parents[1].joinpath("README.md").read_text()
    for line in text.splitlines():
        words = line.removeprefix("$ ").split()
        if len(words) > 1 and words[0] == "anystep":
            assert words[1] in cli.COMMANDS, line

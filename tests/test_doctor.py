"""Each rule finds its fault, and nothing where there is none."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anystep import cli
from anystep.config import LogConfig, OptimizerConfig, config_json
from anystep.data import Dataset, Splits
from anystep.data.arrays import Arrays
from anystep.data.folder import Folder
from anystep.data.mixture import Mixture
from anystep.data.pairs import Pairs
from anystep.doctor import RULES, Case, examine, open_case
from anystep.networks.dit import DiTConfig
from anystep.objectives import Objective
from anystep.objectives.consistency_distillation import ConsistencyDistillation
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.live_reflow import LiveReflow
from anystep.objectives.progressive_distillation import ProgressiveDistillation
from anystep.objectives.reflow import Reflow
from anystep.objectives.shortcut import Shortcut
from anystep.presets import PRESETS, preset
from anystep.registry import names
from anystep.spec import ModelSpec, VAESpec

DATA = Mixture(train=500, held_out=50, labels=True)
VAE = VAESpec("a-vae", None, "", "digest", scale=0.2, shift=0.1)
LABELLED = ModelSpec(shape=(2,), num_classes=8, data="raw")


def config(objective=None, **changes):
    """A run of the mixture preset, with labels."""
    return replace(preset("mixture"), data=DATA, objective=objective or Shortcut(), **changes)


def splits(x, **fields):
    data = Dataset(x, **fields)
    return Splits(data, data.rows(torch.arange(0)))


def vectors(std=1.0, n=600, size=4):
    return std * torch.randn(n, size, generator=torch.Generator().manual_seed(0))


def images(low=-1.0, high=1.0, channels=3, n=200):
    x = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return low + (high - low) * x


def found(changed=None, data=None, **facts):
    """Rule -> what it says, of all that is found in a case."""
    lines = examine(Case(changed or config(), data or DATA.load(), **facts))
    assert all("\n" not in line and ": " in line for _, line in lines)
    return {name: line for name, line in lines}


def test_a_sound_case_has_no_findings():
    assert found() == {}
    assert len(RULES) == len({rule.__name__ for rule in RULES}) >= 10


class TestLevels:
    @pytest.mark.parametrize("changes", [{"batch": 32}, {"batch": 256, "accumulate": 32}])
    def test_too_few_rows_for_every_level(self, changes):
        lines = found(config(Shortcut.authors(), **changes))
        assert (
            "step sizes 1/2, 1/4, 1/8, 1/16, 1/32, 1/64 are trained on"
            in (lines["rows_per_level"])
        )
        assert "(the least on 0 of" in lines["rows_per_level"]
        assert "rows_per_level" not in found(config(Shortcut.authors(), batch=256))

    def test_rows_drawn_at_random_count_on_average(self):
        lines = found(config(batch=32))
        assert "step sizes 1, 1/2, 1/4, 1/8, 1/16" in lines["rows_per_level"]
        assert "rows_per_level" not in found(config(batch=40))

    def test_step_counts_that_are_never_trained(self):
        log = LogConfig(look_every=10, look_steps=(1, 4, 128))
        only_flow = Shortcut(bootstrap_share=0)
        assert (
            "has 4, which asks step sizes 1/4 that"
            in (found(config(only_flow, log=log))["steps_never_trained"])
        )
        fine = replace(log, look_steps=(128,))
        never = replace(log, look_every=0)
        for objective, some in ((Shortcut(), log), (only_flow, fine), (only_flow, never)):
            assert "steps_never_trained" not in found(config(objective, log=some))

    def test_pairs_of_fewer_steps_than_the_teacher_claims(self):
        teacher = FlowMatching().spec(LABELLED)
        lines = found(config(Reflow()), teacher=teacher, pairs={"steps": 4})
        assert "from 32 steps on" in lines["pairs_outside_the_claim"]
        assert "--steps 32" in lines["pairs_outside_the_claim"]
        assert found(config(Reflow()), teacher=teacher, pairs={"steps": 32}) == {}
        assert found(config(Reflow()), pairs={"steps": 4}) == {}


class TestGuidance:
    def test_a_teacher_with_guidance_baked_in_is_not_guided_again(self):
        plain = FlowMatching().spec(LABELLED)
        baked = replace(plain, guidance=2.0, guided_levels=(7,))
        coarse = replace(plain, guidance=2.0, guided_levels=(0,))  # not what the student asks
        distil = ConsistencyDistillation(guidance=1.5)
        assert "has guidance 2 baked in" in found(config(distil), teacher=baked)["guidance_twice"]
        assert found(config(distil), teacher=plain) == found(config(distil), teacher=coarse) == {}
        assert found(config(ConsistencyDistillation()), teacher=baked) == {}

    def test_data_made_with_guidance_are_not_guided_again(self):
        x, labels = DATA.load().train.batch(slice(0, 400))
        made = splits(x, labels=labels, class_names=tuple("abcdefgh"), guidance=2.0)
        guided = config(Shortcut(guidance=1.5))
        assert "made with guidance 2" in found(guided, made)["guidance_twice"]
        assert found(config(), made) == found(guided) == {}

    def test_guidance_where_the_null_label_is_not_trained(self):
        lines = found(config(Shortcut(guidance=1.5, guidance_level=0)))
        assert "at step sizes 1/2, where it is never" in lines["guidance_untrained"]
        for sound in (Shortcut(guidance=1.5), LiveReflow(guidance=2.0), Shortcut()):
            assert found(config(sound)) == {}


class TestScale:
    def test_vectors_far_from_the_noise(self):
        for x in (vectors(5.0), vectors(0.1), vectors() + 10):
            assert "standard deviation" in found(data=splits(x))["data_scale"]
        assert "subtract" in found(data=splits(vectors() + 10))["data_scale"]
        for x in (vectors(), vectors(0.5), vectors(1.5)):
            assert "data_scale" not in found(data=splits(x))

    def test_latents_scaled_by_a_wrong_factor_name_the_right_one(self):
        x = torch.randn(200, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        line = found(data=splits(5 * x, vae=VAE))["data_scale"]
        assert line.endswith("the VAE's scale, 0.2, should be near 0.04")
        line = found(data=splits(x + 3, vae=VAE))["data_scale"]
        assert line.endswith("should be near 0.2 and its shift, 0.1, near 15")
        assert found(data=splits(x, vae=VAE)) == {}

    def test_pictures_that_do_not_fill_their_range(self):
        assert "run from" in found(data=splits(images(0)))["data_scale"]
        flat = torch.randint(0, 2, (200, 3, 4, 4)).to(torch.uint8)  # meant as 0 and 255
        assert "pixels are 0..255" in found(data=splits(flat))["data_scale"]
        assert found(data=splits(images())) == found(data=splits(255 * flat)) == {}

    def test_pictures_divided_by_their_deviation(self):
        assert "from -2.1 to 2.6" in found(data=splits(images(-2.1, 2.6)))["normalised_pictures"]
        assert found(data=splits(images(-2.1, 2.6), vae=VAE)) == {}
        assert found(data=splits(images(-2.1, 2.6, channels=4))) == {}

    def test_constant_channels(self):
        x, y = images(), vectors()
        x[:, 1] = 0.25
        y[:, 3] = 1.0
        assert "channel 1 of 3 is constant" in found(data=splits(x))["constant_channel"]
        assert "coordinate 3 of 4 is constant" in found(data=splits(y))["constant_channel"]
        assert "constant_channel" not in found(data=splits(images()))

    def test_a_clip_for_latents_on_other_data(self):
        clipped = config(Shortcut.authors(), steps=50_000)
        line = found(clipped, splits(vectors(4.0)))["bound_cuts_data"]
        assert "objective.clip 4 cuts 3" in line
        for x in (vectors(), images()):  # it acts on 1 in 200, and never
            assert found(clipped, splits(x)) == {}
        assert "bound_cuts_data" not in found(config(steps=50_000), splits(vectors(4.0)))

    def test_a_bound_on_samples_that_data_exceed(self):
        line = found(config(Diffusion(bound=1.0)), splits(vectors()))["bound_cuts_data"]
        assert "objective.bound 1 cuts 31" in line or "objective.bound 1 cuts 32" in line
        assert found(config(Diffusion()), splits(images())) == {}  # bounded by 1 by itself
        assert found(config(Diffusion()), splits(vectors())) == {}


class TestAverages:
    def test_a_target_average_too_slow_for_its_levels(self):
        line = found(config(Shortcut.paper(), steps=3000))["ema_too_slow"]
        assert "target-ema 0.999 averages 334 steps, 7 times over from level to level" in line
        assert "of 3000 in a phase: take 0.9953 or less" in line
        fitting = replace(Shortcut.paper(), target_ema=0.995)
        assert found(config(fitting, steps=3000)) == {}
        assert found(config(Shortcut.paper(), steps=15_000)) == {}  # as long as the delay allows

    def test_an_average_too_slow_for_short_phases(self):
        short = config(ProgressiveDistillation(), steps=50)
        assert found(short)["ema_too_slow"].endswith("of 7 in a phase: train longer")
        assert found(config(ProgressiveDistillation(), steps=500)) == {}

    def test_raw_weights(self):
        assert "averages 1.0 steps" in found(config(ema=0.0))["raw_weights"]
        assert found(config(ema=0.99)) == {}


class TestRates:
    def test_a_batch_changed_without_the_rate(self):
        line = found(config(batch=4096))["rate_and_batch"]
        assert "0.002 with batch 4096" in line and "0.002 were found with batch 256" in line
        assert "makes about 0.008 here" in line
        both = config(batch=4096, optimizer=OptimizerConfig(lr=8e-3))
        assert found(both) == {}

    def test_a_rate_changed_without_the_batch(self):
        fast, slow = (config(optimizer=OptimizerConfig(lr=lr)) for lr in (2e-2, 2e-5))
        assert "rate_and_batch" in found(fast) and "rate_and_batch" in found(slow)
        for lr in (1e-3, 4e-3, 1e-4):  # a sweep, and the paper's
            assert found(config(optimizer=OptimizerConfig(lr=lr))) == {}

    def test_the_preset_of_a_run_on_pairs_is_that_of_the_data_behind_them(self):
        run = config(Reflow(), batch=64, optimizer=OptimizerConfig(lr=4e-3))
        run = replace(run, data=Pairs(Path("pairs")), network=DiTConfig())
        assert "rate_and_batch" in found(run, pairs={"data": {"name": "folder"}})
        assert found(run, pairs={"data": {"name": "digits"}}) == found(run) == {}

    def test_no_preset_for_such_data_and_network(self):
        odd = config(network=DiTConfig(), optimizer=OptimizerConfig(lr=1.0))
        assert found(odd) == {}

    def test_a_loss_that_rises(self):
        def lines(level, n=30):
            flow = {"loss/flow": 1.0, "loss": 1.0}
            return [{"step": 100 * (k + 1), "loss/d=1": level(k), **flow} for k in range(n)]

        for level in (
            lambda k: 0.1 if k < 20 else 0.3,  # late
            lambda k: 0.1 + max(k - 12, 0) * 0.03,  # slowly
            lambda k: 0.02 if 10 <= k < 14 else 0.1,  # early, and stays
        ):
            line = found(config(steps=3000), metrics=lines(level))["loss_diverging"]
            assert line.startswith("loss/d=1 rises: ") and "--optimizer.lr" in line
        for level in (
            lambda k: 0.001 if k < 5 else 0.2 / k,  # nothing to learn yet, then falling
            lambda k: 0.1 * (1 + 0.3 * (-1) ** k),  # noise
            lambda k: 9.0 if k == 25 else 0.1,  # one bad line
            lambda k: 0.3 * 0.8 ** max(k - 15, 0),  # falling most at the end
        ):
            assert found(config(steps=3000), metrics=lines(level)) == {}
        assert found(config(), metrics=lines(lambda k: float(k), n=8)) == {}  # too few to say
        # Scores stand on lines of their own.
        scores = [{"step": 100, "sliced/1": 0.1}, *lines(lambda k: 0.1)]
        assert found(config(steps=3000), metrics=scores) == {}

    def test_a_new_phase_may_be_harder_than_the_last(self):
        metrics = [
            {"step": k + 1, "loss": 0.0, "loss/distillation": 0.1 * 2 ** (k // 100)}
            for k in range(700)
        ]
        distil = config(ProgressiveDistillation(), steps=700)
        assert found(distil, metrics=metrics) == {}
        for line in metrics[-30:]:
            line["loss/distillation"] *= 3
        assert "of the phase" in found(distil, metrics=metrics)["loss_diverging"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_for_every_method(name):
    for method in names(Objective.PACKAGE):
        run = preset(name, method)
        labels = torch.arange(200) % 3
        x = vectors(n=200) if name in ("vectors", "mixture") else images()
        data = splits(x, labels=labels, class_names=tuple("abc"))
        assert found(run, data) == {}, method


class TestCommand:
    @pytest.fixture
    def run(self, capsys):
        def call(*args):
            code = cli.main([str(a) for a in args])
            out = capsys.readouterr()
            return code, out.out, out.err

        return call

    def test_before_training(self, run, tmp_path):
        assert run("doctor", "mixture") == (0, f"{len(RULES)} rules found nothing\n", "")
        code, out, err = run("doctor", "mixture", "--batch", "32", "--ema", "0")
        lines = out.splitlines()
        assert code == 1 and err == "" and lines[-1] == "3 findings"
        names = {line.split(":")[0] for line in lines[:-1]}
        assert names == {"raw_weights", "rows_per_level", "rate_and_batch"}
        (tmp_path / "c.json").write_text(json.dumps(config_json(config(ema=0.0))))
        code, out, _ = run("doctor", tmp_path / "c.json")
        assert code == 1 and out.startswith("raw_weights: ") and out.endswith("1 finding\n")

    def test_a_run(self, run, tmp_path):
        out = tmp_path / "run"
        small = ("--steps", 60, "--log.every", 2, "--log.trackers", "--device", "cpu")
        code, _, err = run("train", "mixture", "--method", "flow_matching", *small, "--out", out)
        assert code == 0, err
        assert run("doctor", out)[0] == 0
        metrics = (out / "metrics.jsonl").read_text().splitlines()
        worse = [json.loads(line) for line in metrics]
        for line in worse[-10:]:
            line["loss/flow"] = 50.0
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in worse))
        code, text, _ = run("doctor", out)
        assert code == 1 and text.startswith("loss_diverging: loss/flow rises: 50 at")

    def test_data_that_are_gone_leave_the_other_rules(self, run, tmp_path):
        np.save(tmp_path / "x.npy", vectors().numpy())
        args = ("doctor", "vectors", "--data.path", tmp_path / "x.npy", "--ema", "0")
        assert run(*args)[:2][1].splitlines()[0].startswith("raw_weights")
        (tmp_path / "x.npy").unlink()
        code, out, err = run(*args)
        assert code == 1 and "raw_weights" in out
        assert err.startswith("warning: the data are not examined: there is no file")

    def test_a_teacher_that_is_gone(self, tmp_path):
        distil = config(ConsistencyDistillation(), teacher=tmp_path / "gone")
        with pytest.warns(UserWarning, match="the teacher is not examined"):
            assert examine(open_case(distil)) == []

    def test_one_line_for_a_mistake(self, run, tmp_path):
        for args, message in (
            ((tmp_path,), "is no run"),
            (("mixtur",), "did you mean 'mixture'"),
            (("--steps", "3"), "anystep doctor"),
            (("mixture", "--bach", "3"), "did you mean '--batch'"),
        ):
            code, _, err = run("doctor", *args)
            assert code == 2 and message in err and len(err.splitlines()) == 1
        assert run("doctor", "--help")[0] == 0 and run("doctor")[0] == 2


def test_any_kind_of_data_is_looked_at(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    for k, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    np.save(tmp_path / "x.npy", pixels.transpose(0, 3, 1, 2))
    for data in (Folder(tmp_path, size=(8, 8)), Arrays(tmp_path / "x.npy")):
        case = open_case(replace(config(), data=data))
        assert case.x1.shape[1:] == (3, 8, 8) and case.x1.min() < 0 < case.x1.max() <= 1

"""Our models as pipelines of diffusers: the same noise gives the same pictures."""

import json
import re
import sys

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.39")

from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler

from anystep import Model, ModelSpec, UserError, cli, sample
from anystep.interop.diffusers import TIMESTEPS, AnyStepNetwork, AnyStepPipeline, pipeline
from anystep.interop.vae import VAE
from anystep.networks import build_model
from anystep.objectives.consistency_training import ConsistencyTraining
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.live_reflow import LiveReflow
from anystep.objectives.shortcut import Shortcut
from anystep.share import read_source, save_pretrained
from conftest import SMALL, small_net
from test_cli import refused
from test_latents import save_vae

METHODS = {
    "shortcut": Shortcut(),
    "shortcut of 128": Shortcut(M=128),
    "guided shortcut": Shortcut(guidance=1.5),
    "flow matching": FlowMatching(),
    "live reflow": LiveReflow(),
    "consistency": ConsistencyTraining(),
}
STEPS = (1, 2, 3, 4, 7, 128, 200)


def small_model(objective, num_classes=4, **spec):
    weights, shape = small_net("dit", num_classes)
    spec = objective.spec(ModelSpec(**{"shape": shape, "num_classes": num_classes} | spec))
    net = weights.config.build(shape, num_classes, spec.finest)
    net.load_state_dict(weights.state_dict())
    for parameter in net.parameters():
        parameter.data *= 1.5  # so that the step and the label make a difference to see
    return Model(net.eval(), spec)


@pytest.fixture
def export(tmp_path, capsys):
    """The pipeline of a model, written by the command and read by diffusers."""

    def call(model, *args, **options):
        save_pretrained(model, tmp_path / "model")
        out = tmp_path / "pipe"
        assert cli.main(["export", "diffusers", str(tmp_path / "model"), str(out), *args]) == 0
        capsys.readouterr()
        return quiet(AnyStepPipeline.from_pretrained(out, **options))

    return call


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(model, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *model.spec.shape, generator=generator)


def latents(pipe, x0, **options):
    return pipe(latents=x0, output_type="latent", **options).images


@pytest.mark.parametrize("method", METHODS)
def test_the_same_noise_gives_the_same_samples(method, export):
    model = small_model(METHODS[method])
    pipe, x0, cond = export(model), noise(model), torch.tensor([0, 1, 2, 3, 4])
    for steps in STEPS:
        ours = sample(model, x0, steps=steps, cond=cond)
        theirs = latents(pipe, x0, num_inference_steps=steps, class_labels=cond)
        difference = (ours - theirs).abs().max().item()
        moved = (ours - x0).abs().mean().item()
        print(f"{method}, {steps} steps: differ by {difference:.1e}, moved {moved:.2f}")
        assert difference < 1e-5 and moved > 0.1
        assert len(pipe.scheduler.timesteps) == steps
    other = sample(model, x0, steps=4, cond=cond.flip(0))
    assert (other - sample(model, x0, steps=4, cond=cond)).abs().max() > 1e-2
    assert type(pipe.scheduler) is FlowMapEulerDiscreteScheduler


def test_the_noise_of_a_seed_is_that_of_torch(export):
    for num_classes, given in ((4, {"class_labels": [3, 1]}), (0, {"batch_size": 2})):
        model = small_model(Shortcut(), num_classes)
        pipe = quiet(pipeline(model, read_source(model).info))
        theirs = pipe(
            generator=torch.Generator().manual_seed(5), output_type="latent", **given
        ).images
        cond = torch.tensor(given["class_labels"]) if num_classes else None
        ours = sample(model, noise(model, 2, 5), steps=4, cond=cond)
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_noise_added_on_the_way_follows_the_generator(export):
    model = small_model(ConsistencyTraining())
    pipe, x0 = quiet(pipeline(model, read_source(model).info)), noise(model)
    made = []
    for seed in (1, 1, 2):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        a = sample(model, x0, steps=4, generator=ours)
        b = latents(pipe, x0, num_inference_steps=4, generator=theirs)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        made.append(b)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


class TestGuidance:
    def both(self, model, pipe, steps, guidance, force=False):
        x0, cond = noise(model), torch.tensor([0, 1, 2, 3, 4])
        ours = sample(model, x0, steps=steps, cond=cond, guidance=guidance, force_guidance=force)
        theirs = latents(
            pipe,
            x0,
            num_inference_steps=steps,
            class_labels=cond,
            guidance_scale=guidance,
            force_guidance=force,
        )
        return ours, theirs

    def test_where_it_was_trained(self, export):
        model = small_model(Shortcut())
        pipe = export(model)
        for steps, force in ((32, False), (128, False), (1, True), (4, True)):
            ours, theirs = self.both(model, pipe, steps, 2.0, force)
            plain, _ = self.both(model, pipe, steps, 1.0)
            difference = (ours - theirs).abs().max().item()
            print(f"guidance 2, {steps} steps: differ by {difference:.1e}")
            assert difference < 1e-5 and (ours - plain).abs().max() > 1e-3

    @pytest.mark.parametrize("method", ["shortcut", "guided shortcut"])
    def test_where_it_is_left_out_the_same_is_said(self, method):
        model = small_model(METHODS[method])
        pipe = quiet(pipeline(model, read_source(model).info))
        with pytest.warns(UserWarning, match="is left out of 4 of 4 steps") as said:
            ours, theirs = self.both(model, pipe, 4, 2.0)
        first, second = (str(warning.message) for warning in said)
        assert first == second and (ours - theirs).abs().max() < 1e-5
        assert ("already baked" in first) == (method == "guided shortcut")

    def test_without_labels_it_is_refused(self):
        model = small_model(Shortcut())
        pipe = quiet(pipeline(model, read_source(model).info))
        with pytest.raises(UserError, match="needs a class-conditional model"):
            latents(pipe, noise(model), num_inference_steps=128, guidance_scale=2.0)


def test_labels_and_steps_that_do_not_fit(export):
    model = small_model(Shortcut())
    pipe, x0 = export(model), noise(model)
    for options, line in (
        ({"class_labels": [0, 1]}, "5 samples need 5 labels"),
        ({"class_labels": [5] * 5}, "label out of range"),
        ({"num_inference_steps": 0}, "at least 1, not 0"),
        ({"num_inference_steps": 2.5}, "whole number"),
    ):
        with pytest.raises(UserError, match=line):
            latents(pipe, x0, **options)
    with pytest.raises(UserError, match="this model makes samples"):
        latents(pipe, x0[:, :1])
    ours = sample(model, x0, steps=4)  # no condition
    null = latents(pipe, x0, class_labels=[4] * 5)
    torch.testing.assert_close(latents(pipe, x0), ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(null, ours, atol=1e-5, rtol=0)
    same = latents(pipe, x0, class_labels=2)  # one label is everybody's
    assert torch.equal(same, latents(pipe, x0, class_labels=[2] * 5))


def test_another_grid_of_steps_is_warned_of(export):
    pipe = export(small_model(Shortcut()))
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    with pytest.warns(UserWarning, match="were never trained"):
        latents(pipe, noise(pipe.transformer.model), num_inference_steps=4)


def test_pictures(export):
    model = small_model(Shortcut())
    pipe, x0 = export(model), noise(model)
    wanted = (sample(model, x0, steps=2).clamp(-1, 1) + 1) / 2
    asked = {"latents": x0, "num_inference_steps": 2}
    torch.testing.assert_close(pipe(**asked, output_type="pt").images, wanted, atol=1e-5, rtol=0)
    (images,) = pipe(**asked, return_dict=False)
    assert len(images) == 5 and images[0].size == (6, 4) and images[0].mode == "RGB"
    seen = []
    pipe(**asked, callback_on_step_end=lambda pipe, k, t, state: seen.append((k, float(t))))
    assert seen == [(0, 1000.0), (1, 500.0)]


def test_a_latent_model_takes_its_vae_along(tmp_path, export):
    folder = save_vae(tmp_path / "vae", scaling_factor=0.4, shift_factor=0.25)
    vae = VAE(str(folder))
    base = ModelSpec(shape=(4, 8, 8), num_classes=4, data="raw", vae=vae.spec)
    model = build_model(SMALL["dit"][0], Shortcut().spec(base)).eval()
    torch.nn.init.normal_(model.net.output.weight, std=0.1)
    pipe, x0 = export(model), noise(model)
    assert isinstance(pipe.vae, AutoencoderKL)
    for steps in (1, 2, 4, 128):
        x1 = sample(model, x0, steps=steps)
        ours = (vae.decode(x1) + 1) / 2
        theirs = pipe(latents=x0, num_inference_steps=steps, output_type="pt").images
        difference = (ours - theirs).abs().max().item()
        print(f"decoded, {steps} steps: differ by {difference:.1e}")
        assert theirs.shape == (5, 3, 16, 16) and difference < 1e-5
    no_paths(tmp_path / "pipe", tmp_path)


def test_raw_samples_are_no_pictures():
    model = small_model(Shortcut(), data="raw")
    pipe = quiet(pipeline(model, read_source(model).info))
    with pytest.raises(UserError, match="ask output_type='latent'"):
        pipe(latents=noise(model))
    assert latents(pipe, noise(model)).shape == (5, 3, 4, 6)


def no_paths(folder, place):
    for path in folder.rglob("*"):
        assert path.suffix in ("", ".json", ".md", ".png", ".safetensors"), path
        if path.suffix in (".json", ".md"):
            assert str(place) not in path.read_text(), path


def test_the_folder(tmp_path, export, monkeypatch):
    export(small_model(Shortcut()))
    folder = tmp_path / "pipe"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["anystep.interop.diffusers", "AnyStepNetwork"]
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    no_paths(folder, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["images"]) == 4


def test_the_network_round_trip_and_its_convention(tmp_path):
    model = small_model(Shortcut())
    info = read_source(model).info
    network = pipeline(model, info).transformer
    network.save_pretrained(tmp_path / "net")
    again = AnyStepNetwork.from_pretrained(tmp_path / "net")
    assert again.spec == model.spec and not again.training
    x, cond = noise(model), torch.arange(5)
    t, d = 0.25, 0.5
    with torch.no_grad():
        u = model(x, torch.full((5,), t), torch.full((5,), d), cond)
        theirs = again(x, (1 - t) * TIMESTEPS, (1 - t - d) * TIMESTEPS, cond)
        assert torch.equal(theirs.sample, -u)
        assert torch.equal(again(x, 750, 250, cond, return_dict=False)[0], -u)


def test_half_precision(export):
    model = small_model(Shortcut())
    pipe, x0 = export(model, torch_dtype=torch.float16), noise(model)
    theirs = latents(pipe, x0, num_inference_steps=32)
    difference = (theirs.float() - sample(model, x0, steps=32)).abs().max().item()
    print(f"float16, 32 steps: differ by {difference:.1e}")
    assert theirs.dtype == torch.float16 and difference < 0.05


def test_what_is_declined(tmp_path, capsys, monkeypatch):
    def run(*args):
        code = cli.main([str(a) for a in args])
        return code, *capsys.readouterr()

    save_pretrained(small_model(Diffusion()), tmp_path / "noise")
    refused(
        run("export", "diffusers", tmp_path / "noise", tmp_path / "out"),
        "predicts a velocity; this model predicts noise",
    )
    net, shape = small_net("mlp")
    vectors = Model(net, Shortcut(M=128).spec(ModelSpec(shape=shape, num_classes=4, data="raw")))
    save_pretrained(vectors, tmp_path / "vectors")
    refused(
        run("export", "diffusers", tmp_path / "vectors", tmp_path / "out"),
        "makes pictures, not samples (5,)",
    )
    save_pretrained(small_model(Shortcut()), tmp_path / "good")
    refused(
        run("export", "diffusers", tmp_path / "good", tmp_path / "out", "--vae", tmp_path),
        "no latent model",
    )
    refused(run("export", "diffusers", tmp_path / "good", tmp_path / "good"), "not empty")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "anystep.interop.diffusers")
    refused(
        run("export", "diffusers", tmp_path / "good", tmp_path / "out"),
        "pip install 'anystep[diffusers]'",
    )
    assert not (tmp_path / "out").exists()

"""Exported graphs compute what the model does, and say what they are."""

import json
import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from anystep.errors import UserError
from anystep.interop import onnx as interop
from anystep.interop.onnx import LIMIT, OneStep, differences, example, export, load_onnx
from anystep.networks.dit import DiTConfig
from anystep.objectives.consistency_training import ConsistencyTraining
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.live_reflow import LiveReflow
from anystep.objectives.shortcut import Shortcut
from anystep.registry import from_json
from anystep.sampling import sample
from anystep.spec import Model, ModelSpec
from conftest import small_net

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FILES = {"network.onnx", "network.pt2", "one_step.onnx", "one_step.pt2"}


def model(kind, num_classes, objective=None, **changes):
    net, shape = small_net(kind, num_classes)
    base = ModelSpec(shape=shape, num_classes=num_classes)
    return Model(net, replace((objective or Shortcut()).spec(base), **changes)).eval()


def many_tokens():
    """A DiT of more tokens than attention by plain products is used for, 8 x 16."""
    config = DiTConfig(patch=1, width=16, depth=1, heads=2)
    torch.manual_seed(0)
    net = config.build((1, 8, 16))
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return Model(net, Shortcut().spec(ModelSpec(shape=(1, 8, 16))))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models by what is special of them, and the folders they were exported to."""
    models = {
        "dit with classes, guidance baked in": model("dit", 4, Shortcut(guidance=1.5)),
        "dit without classes, many tokens": many_tokens(),
        "mlp with classes, in bfloat16": model("mlp", 4).bfloat16(),
        "mlp without classes, consistency": model("mlp", 0, ConsistencyTraining(), bound=0.5),
    }
    made = {}
    for name, one in models.items():
        folder = tmp_path_factory.mktemp("exported") / "out"
        dtype = next(one.parameters()).dtype
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export(one, folder)
        assert next(one.parameters()).dtype == dtype  # the model is left as it was
        made[name] = (one.float(), folder)
    return made


@pytest.mark.slow
def test_files_compute_what_the_model_does_at_batches_they_were_not_traced_at(exported):
    for name, (one, folder) in exported.items():
        assert {p.name for p in folder.iterdir()} == FILES
        found = differences(folder, one)
        print(name, {file: f"{value:.1e}" for file, value in found.items()})
        assert set(found) == FILES and max(found.values()) <= LIMIT


@pytest.mark.slow
def test_one_step_file_is_the_sampler(exported):
    """By the file and nothing else of ours: numpy in, numpy out, any batch."""
    import onnxruntime

    for name, (one, folder) in exported.items():
        session = onnxruntime.InferenceSession(folder / "one_step.onnx")
        for batch in (1, 2, 64):
            inputs = example(one, "one_step", batch)
            (made,) = session.run(None, {k: v.numpy() for k, v in inputs.items()})
            x1 = sample(one, inputs["x0"], steps=1, cond=inputs.get("cond")).numpy()
            print(f"{name}, batch {batch}: {np.abs(made - x1).max():.1e}")
            np.testing.assert_allclose(made, x1, rtol=0, atol=LIMIT)
        assert np.abs(x1 - inputs["x0"].numpy()).max() > 0.1  # not the identity


@pytest.mark.slow
def test_network_file_sees_every_input(exported):
    one, folder = exported["dit with classes, guidance baked in"]
    run = load_onnx(folder / "network.onnx")
    inputs = example(one, "network", 3)
    u = run(inputs)
    changed = {"x": inputs["x"] + 1, "t": 1 - inputs["t"], "cond": (inputs["cond"] + 1) % 5}
    changed["d"] = torch.where(inputs["d"] < 0.5, 1.0, 0.125)
    for name, value in changed.items():
        assert (run(inputs | {name: value}) - u).abs().max() > 1e-3, name
    # The spec is in the graph: a consistency model is asked d = 0 whatever the step.
    one, folder = exported["mlp without classes, consistency"]
    run, inputs = load_onnx(folder / "network.onnx"), example(one, "network", 3)
    ones, halves = ({"d": torch.full((3,), d)} for d in (1.0, 0.5))
    assert torch.equal(run(inputs | ones), run(inputs | halves))


@pytest.mark.slow
def test_a_loop_around_the_network_file_is_the_sampler(exported):
    one, folder = exported["dit with classes, guidance baked in"]
    run, inputs = load_onnx(folder / "network.onnx"), example(one, "one_step", 7)
    x, cond, d = inputs["x0"], inputs["cond"], torch.full((7,), 0.25)
    for k in range(4):
        x = x + 0.25 * run({"x": x, "t": torch.full((7,), k / 4), "d": d, "cond": cond})
    x1 = sample(one, inputs["x0"], steps=4, cond=cond)
    print(f"four steps: {(x - x1).abs().max():.1e}")
    torch.testing.assert_close(x, x1, rtol=0, atol=LIMIT)


@pytest.mark.slow
def test_inputs_outputs_and_spec_are_in_the_files(exported):
    for one, folder in exported.values():
        cond = ["cond"] if one.spec.num_classes else []
        for name, inputs, output in (
            ("network", ["x", "t", "d", *cond], "u"),
            ("one_step", ["x0", *cond], "x1"),
        ):
            graph = onnx.load(folder / f"{name}.onnx")
            assert [i.name for i in graph.graph.input] == inputs
            assert [o.name for o in graph.graph.output] == [output]
            for value in [*graph.graph.input, *graph.graph.output]:
                assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
            metadata = {entry.key: entry.value for entry in graph.metadata_props}
            extra = {interop.SPEC: ""}
            torch.export.load(folder / f"{name}.pt2", extra_files=extra)
            for text in (metadata[interop.SPEC], extra[interop.SPEC]):
                assert from_json(ModelSpec, json.loads(text)) == one.spec


@pytest.mark.parametrize(
    "objective",
    [Shortcut(), FlowMatching(), LiveReflow(), ConsistencyTraining(), Diffusion()],
    ids=lambda o: type(o).__name__,
)
@pytest.mark.parametrize("kind", ["dit", "mlp"])
def test_one_step_is_sample_in_one_step(kind, objective):
    one = model(kind, 4, objective, bound=0.9)
    inputs = example(one, "one_step", 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one step was not trained by all
        x1 = sample(one, inputs["x0"], steps=1, cond=inputs["cond"])
    with torch.no_grad():
        made = OneStep(one)(inputs["x0"], inputs["cond"])
    torch.testing.assert_close(made, x1, rtol=1e-5, atol=1e-5)


def test_a_file_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    level = logging.getLogger("torch.onnx").level
    monkeypatch.setattr(interop, "_write", lambda path, *_: path.touch())
    monkeypatch.setattr(interop, "differences", lambda *_: {"network.onnx": 1e-3})
    with pytest.raises(UserError, match=r"network.onnx differs from the model by 1.0e-03"):
        export(model("mlp", 0), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert logging.getLogger("torch.onnx").level == level
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError):
            interop._refuse_wrong({"one_step.pt2": bad}, model("mlp", 0))


@pytest.mark.slow
def test_differences_see_another_model(exported):
    one, folder = exported["mlp with classes, in bfloat16"]
    other = Model(small_net("mlp", 4, seed=1)[0], one.spec).eval()
    assert min(differences(folder, other).values()) > 10 * LIMIT
    next(other.parameters()).data[0, 0] = torch.nan
    assert all(np.isnan(value) for value in differences(folder, other).values())


def test_mistakes_are_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="not an empty folder"):
            export(model("mlp", 0), out)
    monkeypatch.setattr(interop.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript: pip install 'anystep\[onnx\]'"):
        export(model("mlp", 0), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.slow
def test_without_onnxruntime_the_programs_are_checked_and_the_rest_warned_of(
    monkeypatch, exported
):
    one, folder = exported["mlp with classes, in bfloat16"]
    found = interop.importlib.util.find_spec
    monkeypatch.setattr(
        interop.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else found(n)
    )
    with pytest.warns(UserWarning, match="onnxruntime is not installed"):
        assert set(differences(folder, one)) == {"network.pt2", "one_step.pt2"}

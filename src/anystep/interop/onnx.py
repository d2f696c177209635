"""A model as graphs that run without this library: ONNX and `torch.export`.

| files                       | inputs                              | output                   |
|-----------------------------|-------------------------------------|--------------------------|
| network.onnx, network.pt2   | x (B, *shape), t, d (B,), cond (B,) | u = model(x, t, d, cond) |
| one_step.onnx, one_step.pt2 | x0 (B, *shape), cond (B,)           | x1, one-step sampling    |

All are float32 but cond, int64 class ids, which a model without classes does not take; the null
label is num_classes. The batch B is free. d is the true step: what the network is asked for it is
in the graph, as `anystep.Model` does it, and so is guidance that is baked into the weights. x1 is
that of `sample(model, x0, steps=1, cond=cond)`, neither clamped nor, for a latent model, decoded.

The spec goes along as JSON: in an ONNX file's metadata under `anystep.spec`, in a .pt2 as the
extra file of that name.
"""

import contextlib
import copy
import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anystep.checkpoint import replacing, temporary
from anystep.errors import UserError
from anystep.path import coefficients, data_from_noise, data_from_velocity
from anystep.registry import to_json
from anystep.sampling import bounded
from anystep.spec import Model

SPEC = "anystep.spec"  # where the spec is in a file
LIMIT = 1e-4  # a graph may differ from torch by so much, where outputs are about 1
TRACED, CHECKED = 2, (1, 5)  # batch sizes: of the trace, and those at which the files are run
Inputs = dict[str, Tensor]
Program = Callable[[Inputs], Tensor]


class OneStep(nn.Module):
    """`one_step(x0, cond) -> x1`, what `sample` makes of noise in one step, without guidance."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """x1 (B, *shape) of noise x0 (B, *shape) and class ids (B,) or None."""
        spec, t = self.model.spec, x0.new_zeros(x0.shape[0])
        u = self.model(x0, t, torch.ones_like(t), cond)
        # Every sampler's step ends at t = 1, where what it adds of fresh noise has weight 0.
        if spec.predicts == "noise":
            return bounded(data_from_noise(x0, u, t, spec.path), spec.bound)
        x1 = data_from_velocity(x0, u, t)
        return x1 if spec.sampler == "euler" else bounded(x1, spec.bound)


def export(model: Model, out: Path) -> None:
    """Write ONNX and torch.export files of the network and of one-step sampling.

    The files are run right away, against the model, at two batch sizes; the ONNX ones only where
    onnxruntime is installed.

    Args:
        model: the model, on any device; float32 weights are written.
        out: a new or empty folder; it holds all files or is not made.

    Raises:
        UserError: onnx or onnxscript is not installed, `out` is not empty, or a file does not
            compute what the model does.
    """
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'anystep[onnx]'")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; name a new one")
    model, out = copy.deepcopy(model).cpu().float().eval(), out.absolute()
    try:
        with _quiet(), replacing(out) as folder:
            for name, module in graphs(model).items():
                _write(folder / name, module, model)
            _refuse_wrong(differences(folder, model), model)
    except BaseException:
        shutil.rmtree(temporary(out), ignore_errors=True)
        raise


def graphs(model: Model) -> dict[str, nn.Module]:
    """What is written, by the name of the files."""
    return {"network": model, "one_step": OneStep(model)}


def example(model: Model, name: str, batch: int) -> Inputs:
    """Inputs of a graph: noise, times, trained steps and any label, the null label among them."""
    spec, generator = model.spec, torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *spec.shape, generator=generator)
    if name == "network":
        level = torch.randint(len(spec.levels), (batch,), generator=generator)
        d = 2.0 ** -torch.tensor(spec.levels)[level].float()
        inputs = {"x": x, "t": torch.rand(batch, generator=generator), "d": d}
    else:
        inputs = {"x0": x}
    if not spec.num_classes:
        return inputs
    return inputs | {"cond": torch.randint(spec.num_classes + 1, (batch,), generator=generator)}


def differences(folder: Path, model: Model) -> dict[str, float]:
    """How far each file in `folder` is from a float32 model on the CPU, by the file's name.

    The largest difference over two batch sizes, neither of them the one that was traced, where
    the largest output, if above 1, counts as 1. Without onnxruntime its files are left out, with
    a warning.
    """
    found, runtimes = {}, _runtimes()
    for name, module in graphs(model).items():
        examples = [example(model, name, batch) for batch in CHECKED]
        for suffix, load in runtimes.items():
            program = load(folder / f"{name}{suffix}")
            with torch.no_grad():
                wrong = [_distance(program(i), module(*i.values())) for i in examples]
            found[f"{name}{suffix}"] = float(torch.stack(wrong).max())  # nan, if one is
    return found


def load_onnx(path: Path) -> Program:
    """An ONNX file as a function on the CPU, by onnxruntime; as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(output)

    return run


def load_program(path: Path) -> Program:
    """A .pt2 file as a function."""
    module = torch.export.load(path).module()

    def run(inputs: Inputs) -> Tensor:
        output: Tensor = module(*inputs.values())
        return output

    return run


def _write(path: Path, module: nn.Module, model: Model) -> None:
    """Write `path`.pt2 and `path`.onnx."""
    spec, inputs = json.dumps(to_json(model.spec)), example(model, path.name, TRACED)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        module, tuple(inputs.values()), dynamic_shapes=dict.fromkeys(inputs, batch)
    )
    torch.export.save(program, path.with_suffix(".pt2"), extra_files={SPEC: spec})
    onnx: Any = torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=["u" if path.name == "network" else "x1"],
        # All share one symbol: to name it for more than one input would be warned of.
        dynamic_shapes=dict.fromkeys(inputs) | {next(iter(inputs)): batch},
        dynamo=True,
        verbose=False,
    )
    onnx.model.metadata_props[SPEC] = spec
    onnx.save(path.with_suffix(".onnx"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about torchvision and about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _runtimes() -> dict[str, Callable[[Path], Program]]:
    """What runs the files of each suffix."""
    if importlib.util.find_spec("onnxruntime"):
        return {".pt2": load_program, ".onnx": load_onnx}
    warnings.warn(
        "onnxruntime is not installed: the ONNX files were written and not run", stacklevel=4
    )
    return {".pt2": load_program}


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference, over the largest output if that is above 1."""
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1)


def _refuse_wrong(found: dict[str, float], model: Model) -> None:
    """Raise `UserError` where a file is too far from the model."""
    limit = {"network": LIMIT, "one_step": LIMIT}
    if model.spec.predicts == "noise":  # x1 is got by a division by alpha, as is the rounding
        limit["one_step"] /= float(coefficients(torch.zeros(()), model.spec.path)[0])
    for name, difference in found.items():
        if not difference <= limit[Path(name).stem]:
            raise UserError(f"{name} differs from the model by {difference:.1e}: not written")

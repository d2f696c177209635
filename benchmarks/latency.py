"""One-step sampling on the CPU: eager, compiled, and as an ONNX file in onnxruntime.

    python benchmarks/latency.py [RUN ...] [--sizes digits fashion-mnist] [--repeats 50]

Runs, checkpoints or model folders, or the networks of the presets with random weights, which take
as long. The contestants of a model and batch take turns in one process, on as many threads each,
and medians are compared, so that a busy machine slows all alike. They are first seen to agree.
Writes README.md and results.json to `--out`, results/latency by default.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from step import sizes, timed

from anystep import checkpoint
from anystep.interop.onnx import OneStep, differences, example, export, load_onnx
from anystep.networks import build_model
from anystep.objectives.shortcut import Shortcut
from anystep.provenance import as_markdown, provenance
from anystep.sampling import sample
from anystep.spec import Model, ModelSpec

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 64)
CONTESTANTS = ("eager", "compiled", "onnxruntime")
CPU = torch.device("cpu")


def preset(name: str) -> Model:
    """The network of a preset with random weights, no layer of which is zero."""
    size = sizes(quick=False)[name]
    spec = Shortcut().spec(ModelSpec(shape=size.shape, num_classes=10))
    torch.manual_seed(0)
    model = build_model(size.network, spec).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def contestants(model: Model, folder: Path, batch: int) -> dict[str, Callable[[], Any]]:
    """Functions that each make the same `batch` samples."""
    inputs = example(model, "one_step", batch)
    compiled = torch.no_grad()(torch.compile(OneStep(model), dynamic=False))
    return {
        "eager": partial(sample, model, inputs["x0"], steps=1, cond=inputs.get("cond")),
        "compiled": partial(compiled, *inputs.values()),
        "onnxruntime": partial(load_onnx(folder / "one_step.onnx"), inputs),
    }


def latencies(model: Model, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each contestant at each batch size, and how far files are off."""
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "model")
        found: dict[str, Any] = {"differences": differences(Path(folder) / "model", model)}
        for batch in BATCHES:
            torch.compiler.reset()
            runs = contestants(model, Path(folder) / "model", batch)
            made = {name: run() for name, run in runs.items()}
            for x1 in made.values():
                torch.testing.assert_close(x1, made["eager"], rtol=1e-4, atol=1e-4)
            seconds = timed(runs, repeats, CPU)
            found[f"batch {batch}"] = {name: 1e3 * s for name, s in seconds.items()}
    return found


def readme(measured: dict[str, Any], repeats: int) -> str:
    """The table."""
    lines = [
        "# Latency of one-step sampling on the CPU",
        "",
        f"Milliseconds from noise to samples, medians of {repeats} calls that take turns; "
        f"onnxruntime {onnxruntime.__version__}, threads: {torch.get_num_threads()}.",
        "",
        "| model | batch | eager | torch.compile | onnxruntime |",
        "|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        for batch in BATCHES:
            cells = (f"{found[f'batch {batch}'][c]:.2f}" for c in CONTESTANTS)
            lines.append(f"| {name} | {batch} | {' | '.join(cells)} |")
    worst = max(max(found["differences"].values()) for found in measured.values())
    lines += ["", f"Largest difference of an exported file from the model: {worst:.1e}.", ""]
    return "\n".join([*lines, as_markdown(provenance())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["digits", "fashion-mnist"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "latency")
    args = parser.parse_args()
    models = {run.name: checkpoint.load_model(run) for run in args.runs}
    models = models or {name: preset(name) for name in args.sizes}
    measured = {name: latencies(model, args.repeats) for name, model in models.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "README.md").write_text(readme(measured, args.repeats))
    report = {"latency_ms": measured, "provenance": provenance()}
    (args.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()

"""Time of a training step, fast path over plain eager and shortcut over flow matching.

    python benchmarks/step.py [--quick] [--repeats 15] [--out results/step/cpu.json]

The contestants of a size take turns in one process and medians are compared, so that a busy
machine slows all alike. They are

    eager     the reference: no compiler, float32, scaled_dot_product_attention, AdamW step by step
    plain     what `anystep train` runs
    compiled  what it runs with --compile
    fast      and with --precision bfloat16 besides

(all in bfloat16 on CUDA). The matrix rate is that of square products in the same dtype, between
the same repeats. `--quick` is the digits' size alone, without guidance and "compiled".
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from anystep.config import OptimizerConfig, pick_device
from anystep.data import Dataset, Splits, seeded
from anystep.networks import blocks_of
from anystep.networks.dit import DiTConfig
from anystep.objectives import Batch, Objective
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.presets import digits, fashion_mnist
from anystep.provenance import provenance
from anystep.sampling import sample
from anystep.state import State, initial_state
from anystep.train import training_step

SHARE = 0.25  # of bootstrap rows: 2 / 4 / 3 more forwards than flow matching
METHODS: dict[str, Objective] = {
    "flow_matching": FlowMatching(),
    "shortcut": Shortcut(bootstrap_share=SHARE),
    "shortcut guided": Shortcut(bootstrap_share=SHARE, guidance=1.5),
}
PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "plain": {},
    "compiled": {"compile": True},
    "fast": {"compile": True, "precision": "bfloat16"},
}
WARM_UP = 3
SIDE = 1024  # of the square products


@dataclass(frozen=True)
class Size:
    """A network and a batch of noise in the shape of its data."""

    shape: tuple[int, int, int]
    network: DiTConfig
    batch: int
    optimizer: OptimizerConfig

    @property
    def splits(self) -> Splits:
        """Noise with labels, of the shape of the data."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch, *self.shape, generator=generator) * 2 - 1
        labels = torch.arange(self.batch) % 10
        data = Dataset(x, labels, tuple("0123456789"))
        return Splits(data, data)


def sizes(quick: bool) -> dict[str, Size]:
    """What is measured: the two presets, and the smallest size of the DiT paper on latents."""
    found = {}
    for name, preset, shape in (
        ("digits", digits, (1, 8, 8)),
        ("fashion-mnist", fashion_mnist, (1, 28, 28)),
    ):
        config = preset(Shortcut())
        assert isinstance(config.network, DiTConfig)
        found[name] = Size(shape, config.network, config.batch, config.optimizer)
    found["DiT-S/2"] = Size((4, 32, 32), DiTConfig.size("S/2"), 8, OptimizerConfig())
    return {"digits": found["digits"]} if quick else found


def training(
    size: Size, objective: Objective, path: str, device: torch.device
) -> Callable[[], None]:
    """A function that takes one training step on the same batch each time."""
    base = digits(objective)
    config = replace(
        base,
        network=size.network,
        optimizer=size.optimizer,
        batch=size.batch,
        device=str(device),
        **PATHS[path],
    )
    splits = size.splits
    state = initial_state(config, splits, device)
    if path == "eager":
        reference(state)
    x1, cond = splits.train.batch(slice(None))
    assert cond is not None
    batch = Batch(x1.to(device), cond.to(device))

    def step() -> None:
        training_step(state, batch, config, seeded(0, state.step, device=device))

    return step


def reference(state: State) -> None:
    """Undo what is done for speed without a compiler."""
    for group in state.optimizer.param_groups:
        group["fused"], group["foreach"] = False, False
    for net in (state.model.net, state.target):
        for block in [] if net is None else blocks_of(net):
            block.few_tokens = 0


def timed(
    contestants: dict[str, Callable[[], None]],
    repeats: int,
    device: torch.device,
    average: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Average seconds of each contestant; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + WARM_UP):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: average(values) for name, values in seconds.items()}


def first_step(run: Callable[[], None]) -> float:
    """Seconds of the first call, in which compiling happens."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrix_product(dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A square product."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        a @ b

    return product


def step_times(
    size: Size, methods: list[str], paths: list[str], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Step times of every method on every path, their ratios, and the rate of arithmetic."""
    runs = {
        (method, path): training(size, METHODS[method], path, device)
        for method in methods
        for path in paths
    }
    waits = {f"{m}, {p}": first_step(run) for (m, p), run in runs.items()}
    flops = {}
    for method in methods:
        with FlopCounterMode(display=False) as counter:
            runs[method, "eager"]()
        flops[method] = counter.get_total_flops()
    contestants = {f"{m}, {p}": run for (m, p), run in runs.items()}
    products = {str(t): matrix_product(t, device) for t in (torch.float32, torch.bfloat16)}
    seconds = timed(contestants | products, repeats, device)
    rates = {name: 2 * SIDE**3 / seconds.pop(name) for name in products}

    def row(method: str, path: str) -> dict[str, float]:
        s, low = seconds[f"{method}, {path}"], path == "fast" or device.type == "cuda"
        return {
            "ms": 1e3 * s,
            "first_s": waits[f"{method}, {path}"],
            "over_eager": s / seconds[f"{method}, eager"],
            "over_flow_matching": s / seconds[f"flow_matching, {path}"],
            "forward_equivalents": 3 * flops[method] / flops["flow_matching"],
            "gflops": flops[method] / s / 1e9,
            "share_of_matrix_rate": flops[method]
            / s
            / rates[str(torch.bfloat16 if low else torch.float32)],
        }

    return {
        "batch": size.batch,
        "matrix_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "steps": {f"{m}, {p}": row(m, p) for m in methods for p in paths},
    }


def sampling_ratio(steps: int, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Time of `steps` sampling steps over that of as many bare network calls."""
    size = sizes(quick=True)["digits"]
    config = replace(digits(Shortcut()), device=str(device))
    model = initial_state(config, size.splits, device).model
    x0 = torch.randn(batch, *model.spec.shape, device=device)
    cond = torch.zeros(batch, dtype=torch.long, device=device)
    t, d = torch.zeros(batch, device=device), torch.full((batch,), 1 / steps, device=device)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(steps):
            model.net(x0, t, d, cond)

    def sampled() -> None:
        sample(model, x0, steps=steps, cond=cond)

    times = timed({"sampled": sampled, "bare": bare}, repeats, device)
    return {
        "steps": steps,
        "batch": batch,
        "step_ms": 1e3 * times["sampled"] / steps,
        "call_ms": 1e3 * times["bare"] / steps,
        "images_per_second": batch / times["sampled"],
        "ratio_sampling_over_calls": times["sampled"] / times["bare"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the digits alone")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    methods, paths = list(METHODS), list(PATHS)
    if args.quick:
        methods, paths = ["flow_matching", "shortcut"], ["eager", "plain", "fast"]
    measured = {}
    for name, size in sizes(args.quick).items():
        measured[name] = step_times(size, methods, paths, args.repeats, device)
        torch.compiler.reset()  # another size is another graph, not a change of this one
    steps = measured["digits"]["steps"]
    report: dict[str, Any] = {
        "ratio_shortcut_over_flow": steps["shortcut, plain"]["over_flow_matching"],
        "ratio_fast_over_eager": steps["shortcut, fast"]["over_eager"],
        "bootstrap_share": SHARE,
        "threads": torch.get_num_threads(),
        "training": measured,
    }
    if not args.quick:
        report["sampling"] = [
            sampling_ratio(steps, batch, args.repeats, device)
            for steps, batch in ((1, 1), (1, 64), (1, 512), (8, 64), (32, 64))
        ]
    text = json.dumps(report | {"provenance": provenance()}, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Time of a training step, shortcut over flow matching, and of a sampling step over a bare call.

    python benchmarks/step.py [--repeats 30] [--out results/step/cpu.json]

Both ratios come from one process: the contestants take turns, and medians are compared, so that
a busy machine slows both alike. Network: the digits preset's. Batch: the same for both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from anystep.config import TrainConfig, pick_device
from anystep.data import seeded
from anystep.objectives import Batch
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.presets import digits
from anystep.provenance import provenance
from anystep.sampling import sample
from anystep.state import initial_state
from anystep.train import training_step


def medians(
    contestants: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each contestant; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 3):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training(config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """A function that takes one training step on the same batch each time."""
    splits = config.data.load()
    state = initial_state(config, splits, device)
    x1, cond = splits.train.batch(slice(0, config.batch))
    assert cond is not None
    batch = Batch(x1.to(device), cond.to(device))

    def step() -> None:
        training_step(state, batch, config, seeded(0, state.step, device=device))

    return step


def training_ratio(share: float, repeats: int, device: torch.device) -> dict[str, float]:
    """Step times of shortcut without guidance and of flow matching, and their ratio."""
    base = replace(digits(FlowMatching()), device=str(device))
    shortcut = replace(base, objective=Shortcut(bootstrap_share=share))
    times = medians(
        {"shortcut": training(shortcut, device), "flow_matching": training(base, device)},
        repeats,
        device,
    )
    return {
        "bootstrap_share": share,
        "shortcut_ms": 1e3 * times["shortcut"],
        "flow_matching_ms": 1e3 * times["flow_matching"],
        "ratio_shortcut_over_flow": times["shortcut"] / times["flow_matching"],
        "arithmetic": 1 + 2 * share / 3,
    }


def sampling_ratio(steps: int, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Time of `steps` sampling steps over that of as many bare network calls."""
    config = replace(digits(Shortcut()), device=str(device))
    model = initial_state(config, config.data.load(), device).model
    x0 = torch.randn(batch, *model.spec.shape, device=device)
    cond = torch.zeros(batch, dtype=torch.long, device=device)
    t, d = torch.zeros(batch, device=device), torch.full((batch,), 1 / steps, device=device)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(steps):
            model.net(x0, t, d, cond)

    def sampled() -> None:
        sample(model, x0, steps=steps, cond=cond)

    times = medians({"sampled": sampled, "bare": bare}, repeats, device)
    return {
        "steps": steps,
        "batch": batch,
        "step_ms": 1e3 * times["sampled"] / steps,
        "call_ms": 1e3 * times["bare"] / steps,
        "ratio_sampling_over_calls": times["sampled"] / times["bare"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    report = {
        "provenance": provenance(),
        "training": [training_ratio(share, args.repeats, device) for share in (0.25, 0.5)],
        "sampling": [sampling_ratio(n, 64, args.repeats, device) for n in (1, 8, 32)],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Make a shortcut model of a flow model that exists already, and see what that saves.

    python examples/finetune_flow.py

Flow matching is trained on the digits. Then a shortcut model starts from it, with a quarter of
its compute, beside two that start from nothing: one with that quarter alone, and one with the
compute of flow and fine-tuning together. All are judged alike; to results/finetune. Stopped, the
same command goes on.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from anystep import checkpoint
from anystep.compare.budget import with_steps
from anystep.config import TrainConfig
from anystep.evaluate import Judge, evaluate
from anystep.objectives import Objective
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.presets import digits
from anystep.provenance import as_markdown, provenance
from anystep.train import train

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.25  # compute of the fine-tuning over that of the flow
STEPS = (1, 2, 4, 32, 128)
FLOW, TUNED, QUARTER, EQUAL = "flow", "fine-tuned", "scratch, quarter", "scratch, equal"
WHAT = {
    FLOW: "flow matching, the start",
    TUNED: "shortcut from that flow",
    QUARTER: "shortcut from nothing, the compute of the fine-tuning",
    EQUAL: "shortcut from nothing, the compute of flow and fine-tuning",
}


def main() -> None:
    """Train and judge everything, seed by seed, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the flow")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1.0, help="of the fine-tuning, over others'")
    parser.add_argument("--n", type=int, default=4096, help="samples judged")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "finetune")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "finetune")
    args = parser.parse_args()

    splits = digits(Shortcut()).data.load()
    judge = Judge(splits)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in WHAT}
    for seed in range(args.seeds):
        for name, run in runs(args, seed).items():
            train(run)
            model = checkpoint.load_model(run.out)
            rows = evaluate(f"{name} {seed}", model, judge, steps=STEPS, n=args.n)
            results[name].append(
                {"steps": run.steps, "forwards": forwards(run.out)}
                | {"scores": {row.steps: row.scores for row in rows}}
            )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "README.md").write_text(report(results, args))
    print((args.out / "README.md").read_text())


def runs(args: argparse.Namespace, seed: int) -> dict[str, TrainConfig]:
    """The runs of a seed; the flow is trained first, since it says what the others may cost."""

    def base(name: str, objective: Objective) -> TrainConfig:
        config = digits(objective)
        out = args.runs / f"{name.replace(', ', '-')}-seed{seed}"
        log = replace(config.log, look_every=0, trackers=())
        return replace(config, out=out, seed=seed, log=log, device=args.device)

    flow = replace(base(FLOW, FlowMatching()), steps=args.steps)
    train(flow)
    whole = forwards(flow.out)
    tuned = base(TUNED, Shortcut())
    slower = replace(tuned.optimizer, lr=tuned.optimizer.lr * args.rate)
    tuned = replace(tuned, start=flow.out, optimizer=slower)
    return {
        FLOW: flow,
        TUNED: with_steps(tuned, round(SHARE * whole), 0),
        QUARTER: with_steps(base(QUARTER, Shortcut()), round(SHARE * whole), 0),
        EQUAL: with_steps(base(EQUAL, Shortcut()), round((1 + SHARE) * whole), 0),
    }


def forwards(run: Path) -> int:
    """What a run cost by itself, in forward-equivalents."""
    training = checkpoint.read_info(checkpoint.find_model(run))["training"]
    return int(training["forwards"])


def report(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """The page."""
    lines = ["# A flow model as a start", "", str(__doc__).split("\n\n")[2], ""]
    lines += [f"| Fréchet distance at | {' | '.join(f'{n} steps' for n in STEPS)} | compute |"]
    lines[-1] = lines[-1].replace("| 1 steps", "| 1 step")
    lines += ["|---" * (len(STEPS) + 2) + "|"]
    unit = statistics.mean(run["forwards"] for run in results[FLOW])
    for name, seeds in results.items():
        cells = [spread([run["scores"][n]["frechet"] for run in seeds]) for n in STEPS]
        cost = statistics.mean(run["forwards"] for run in seeds) / unit
        cost = cost + 1 if name == TUNED else cost
        lines.append(f"| {WHAT[name]} | {' | '.join(cells)} | {cost:.2f} |")
    lines += ["", "| at one step | class accuracy | within-class variance |", "|---|---|---|"]
    for name, seeds in results.items():
        cells = [
            spread([run["scores"][1].get(metric, float("nan")) for run in seeds])
            for metric in ("accuracy", "variance")
        ]
        lines.append(f"| {WHAT[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{args.n} samples, {args.seeds} seeds (mean ± half the range); compute is counted in "
        f"forward-equivalents, over the flow's, whose {args.steps} steps are in the fine-tuned "
        f"row. The learning rate of the fine-tuning is {args.rate:g} times that of the others.",
        "",
    ]
    return "\n".join([*lines, as_markdown(provenance())])


def spread(values: list[float]) -> str:
    """Mean, and half the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()

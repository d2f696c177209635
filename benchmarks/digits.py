"""Shortcut against flow matching on the digits, trained with the same compute.

    python benchmarks/digits.py [--seeds 3] [--methods shortcut flow_matching ...]

Compute is counted in network forwards a row (a backward is two): a step of flow matching costs
3 a row, one of shortcut 3 + 2 share. Every method gets what the digits preset spends on the
default shortcut. Runs stand in runs/benchmark-digits and are resumed or reused; the report, with
mean and standard deviation over seeds, goes to results/digits.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from provenance import ROOT, as_markdown, provenance

from anystep import checkpoint, figures
from anystep.config import TrainConfig
from anystep.evaluate import COLUMNS, REAL, Judge, evaluate, semigroup_gap
from anystep.presets import digits, objective
from anystep.report import save_grid
from anystep.train import train

STEPS = (1, 2, 4, 8, 32, 128)
SHOWN = ("frechet", "kernel", "recall", "accuracy", "variance", "memorisation")
RUNS = ROOT / "runs" / "benchmark-digits"


def cost(config: TrainConfig) -> float:
    """Forwards a row of a training step, with its backward counted as two."""
    return 3 + 2 * getattr(config.objective, "bootstrap_share", 0.0)


def config_of(method: str, seed: int, scale: float) -> TrainConfig:
    """The digits preset for `method` with the steps that equal compute allows."""
    reference = digits(objective("shortcut"))
    config = digits(objective(method))
    steps = round(scale * reference.steps * cost(reference) / cost(config))
    name = f"{method.replace('/', '-')}-seed{seed}"
    log = replace(config.log, look_every=0, tensorboard=False)
    return replace(config, steps=steps, seed=seed, out=RUNS / name, log=log)


def judged(method: str, seed: int, judge: Judge, scale: float) -> dict[str, object]:
    """Train (or find) one run and judge it; the result is kept beside it."""
    config = config_of(method, seed, scale)
    done = config.out / "judged.json"
    if done.exists():
        result: dict[str, object] = json.loads(done.read_text())
        return result
    start = time.perf_counter()
    if not train(config):
        sys.exit("interrupted; the same command goes on")
    seconds = time.perf_counter() - start
    model = checkpoint.load_model(config.out)
    rows = evaluate(f"{method} {seed}", model, judge, steps=STEPS, n=2048, seed=1)
    save_grid(config.out / "grid.png", model, STEPS)
    result = {
        "method": method,
        "seed": seed,
        "steps": config.steps,
        "seconds": seconds,
        "gap": semigroup_gap(model),
        "scores": {row.steps: row.scores for row in rows},
    }
    checkpoint.write_json(done, result)
    return json.loads(done.read_text())


def report(results: list[dict], judge: Judge, out: Path) -> None:
    """Table, plot and grids."""
    out.mkdir(parents=True, exist_ok=True)
    floor = judge.floor()
    assert floor is not None and judge.classifier is not None
    methods = list(dict.fromkeys(r["method"] for r in results))
    lines = ["| method | steps | " + " | ".join(COLUMNS[k] for k in SHOWN) + " |"]
    lines.append("|" + "---|" * (len(SHOWN) + 2))
    real = " | ".join(f"{floor.scores[k]:.3f}" for k in SHOWN)
    lines.append(f"| {REAL} (held-out) | | {real} |")
    curves: dict = {}
    for method in methods:
        mine = [r for r in results if r["method"] == method]
        for steps in map(str, STEPS):
            cells = []
            for key in SHOWN:
                values = [r["scores"][steps][key] for r in mine]
                mean = statistics.mean(values)
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean:.3f}{spread}")
                if key in ("frechet", "accuracy", "variance"):
                    metric = curves.setdefault(COLUMNS[key], {})
                    metric.setdefault(method, {})[int(steps)] = mean
            lines.append(f"| {method} | {steps} | {' | '.join(cells)} |")
    runs = [
        "| method | seeds | training steps | seconds a run | semigroup gap |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        mine = [r for r in results if r["method"] == method]
        seconds = statistics.mean(r["seconds"] for r in mine)
        gap = statistics.mean(r["gap"] for r in mine)
        seeds = ", ".join(str(r["seed"]) for r in mine)
        runs.append(f"| {method} | {seeds} | {mine[0]['steps']} | {seconds:.0f} | {gap:.3f} |")
    floors = {COLUMNS[k]: floor.scores[k] for k in ("frechet", "accuracy", "variance")}
    figures.plot_quality(out / "quality.png", curves, floors)
    for method in methods:
        name = method.replace("/", "-")
        source = RUNS / f"{name}-seed{results[0]['seed']}" / "grid.png"
        (out / f"grid-{name}.png").write_bytes(source.read_bytes())
    text = [
        "# Digits: quality against steps at equal compute",
        "",
        *lines,
        "",
        "Mean ± standard deviation over seeds; 2,048 samples a row, uniformly random classes,",
        f"against {judge.size} training images; features: {judge.features.name}, accuracy",
        f"{judge.classifier.accuracy:.4f} on {len(judge.splits.held_out)} held-out images. The",
        "held-out Fréchet distance is high because it is made of few images.",
        "",
        *runs,
        "",
        as_markdown(provenance()),
    ]
    (out / "README.md").write_text("\n".join(text))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["shortcut", "flow_matching"])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the preset's compute")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "digits")
    args = parser.parse_args()
    judge = Judge(digits(objective("shortcut")).data.load())
    results = []
    for seed in range(args.seeds):
        for method in args.methods:
            results.append(judged(method, seed, judge, args.scale))
    results.sort(key=lambda r: args.methods.index(r["method"]))
    report(results, judge, args.out)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()

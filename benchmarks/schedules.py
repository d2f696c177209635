"""Which order of step sizes is best where N is not a power of two.

    python benchmarks/schedules.py RUN [RUN ...]

For each N the schedule mixes two sizes; the finer ones go near the noise, near the data, or are
spread. Fréchet distances of 4,096 samples of the same noise, in the classifier's features,
averaged over the runs; to results/schedules.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from anystep import checkpoint
from anystep.data import DataConfig, seeded
from anystep.evaluate import Judge
from anystep.provenance import as_markdown, provenance
from anystep.registry import from_json
from anystep.sampling import draw, sample

ROOT = Path(__file__).resolve().parents[1]

ORDERS = ("fine_first", "coarse_first", "spread")
COUNTS = (3, 5, 6, 7, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "schedules")
    args = parser.parse_args()
    info = checkpoint.read_info(checkpoint.find_model(args.runs[0]))
    judge = Judge(from_json(DataConfig, info["training"]["config"]["data"]).load())
    distances: dict[int, dict[str, list[float]]] = {n: {o: [] for o in ORDERS} for n in COUNTS}
    for run in args.runs:
        model = checkpoint.load_model(run)
        x0, cond = draw(model.spec, args.n, seeded(1, 0))
        for n, by_order in distances.items():
            for order, values in by_order.items():
                made = [
                    sample(model, x, steps=n, cond=c, order=order)
                    for x, c in zip(x0.split(512), cond.split(512), strict=True)
                ]
                values.append(judge.frechet(torch.cat(made).clamp(-1, 1)))
    lines = ["# Order of step sizes", "", f"| steps | {' | '.join(ORDERS)} |", "|---|---|---|---|"]
    for n, by_order in distances.items():
        cells = [f"{statistics.mean(values):.3f}" for values in by_order.values()]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    means = [
        statistics.mean(statistics.mean(distances[n][order]) for n in COUNTS) for order in ORDERS
    ]
    lines += [f"| mean | {' | '.join(f'{m:.3f}' for m in means)} |", ""]
    lines += [f"Fréchet distance of {args.n} samples, mean over {len(args.runs)} runs.", ""]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "README.md").write_text("\n".join([*lines, as_markdown(provenance())]))
    (args.out / "results.json").write_text(json.dumps(distances, indent=1) + "\n")
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()

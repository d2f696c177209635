"""The report of a comparison: table, statements, plots, grids, sweep and ledger."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anystep import figures, provenance, statements
from anystep.compare import Comparison, Entry
from anystep.evaluate import COLUMNS, REAL
from anystep.statements import Scores, spread

OTHER = ("accuracy", "variance", "recall", "memorisation")  # shown at every step count, once


def write(comparison: Comparison, results: dict[Entry, dict[str, Any]]) -> dict[str, Path]:
    """Write README.md and its pictures into the comparison's folder.

    Returns:
        What was written, by what it is.
    """
    out, steps = comparison.config.out, sorted(comparison.config.steps)
    out.mkdir(parents=True, exist_ok=True)
    scores: Scores = {}
    for entry, result in results.items():
        scores.setdefault(entry.label, []).append(result)
    files = {
        "report": out / "README.md",
        "steps": out / "steps.png",
        "compute": out / "compute.png",
    }
    metric = comparison.metric
    floor = comparison.judge.floor()
    figures.plot_quality(
        files["steps"],
        curves(scores, metric, steps),
        {COLUMNS[metric]: floor.scores[metric]} if floor else {},
    )
    figures.plot_curves(files["compute"], learning(scores), "training forwards")
    judge = comparison.judge
    lines = [
        f"# Comparison on {type(comparison.base.data).__name__.lower()}",
        "",
        f"{COLUMNS[metric]} of {comparison.config.n} samples against {judge.size} training "
        f"examples, mean ± standard deviation over seeds {list(comparison.config.seeds)}; "
        "parentheses: a number of steps for which the method claims nothing. Budget: "
        f"{comparison.budget:,} forward-equivalents a run (a backward counts as two forwards). "
        "inside: teacher, pairs and student share it; free: the teacher costs nothing. "
        f"Features: {judge.features.name}."
        + (f" Its accuracy: {judge.classifier.accuracy:.4f}." if judge.classifier else ""),
        "",
        *table(scores, metric, steps),
        "",
        *([f"{REAL} (held-out): {floor.scores[metric]:.3g}.\n"] if floor else []),
        "![quality against steps](steps.png)",
        "![quality against training compute](compute.png)",
        "",
        "## The paper's statements",
        "",
        *statements.as_markdown(statements.statements(scores, metric, steps)),
        "",
        "## Other metrics",
        "",
        *other_metrics(scores, steps),
        "",
        *sweep(comparison),
        "## Compute",
        "",
        *ledger(scores),
        "",
        "## The same noises at each step count",
        "",
        *(
            f"{label}: ![{label}](grids/{Entry(r[0]['method'], r[0]['seed'], r[0]['variant']).key}"
            ".png)\n"
            for label, r in scores.items()
        ),
        *(["## Failed", ""] if comparison.failures else []),
        *(f"* {key}: {why}" for key, why in comparison.failures.items()),
        "",
        provenance.as_markdown(provenance.provenance()),
    ]
    files["report"].write_text("\n".join(lines))
    return files


def table(scores: Scores, metric: str, steps: Sequence[int]) -> Iterator[str]:
    """Methods by steps."""
    yield "| method | " + " | ".join(f"{n} step{'s' if n > 1 else ''}" for n in steps) + " |"
    yield "|---|" + "---|" * len(steps)
    for label, results in scores.items():
        cells = []
        for n in steps:
            cell = spread([r["scores"][str(n)][metric] for r in results])
            cells.append(cell if n in results[0]["claims"] else f"({cell})")
        yield f"| {label} | {' | '.join(cells)} |"


def other_metrics(scores: Scores, steps: Sequence[int]) -> Iterator[str]:
    """The other metrics at the least and the most steps."""
    ends = sorted({min(steps), max(steps)})
    used = [
        key
        for key in OTHER
        if any(key in r["scores"][str(n)] for rs in scores.values() for r in rs for n in ends)
    ]
    heads = [f"{COLUMNS[key]} at {n}" for key in used for n in ends]
    yield f"| method | {' | '.join([*heads, 'semigroup gap'])} |"
    yield "|---|" + "---|" * (len(heads) + 1)
    for label, results in scores.items():
        cells = [
            spread([r["scores"][str(n)][key] for r in results if key in r["scores"][str(n)]])
            for key in used
            for n in ends
        ]
        gaps = [r["gap"] for r in results if r["gap"] is not None]
        yield f"| {label} | {' | '.join([*cells, spread(gaps)])} |"


def sweep(comparison: Comparison) -> Iterator[str]:
    """What was tried for each method, and what was chosen."""
    swept = {method: comparison.tried(method) for method in comparison.config.methods}
    swept = {method: tried for method, tried in swept.items() if len(tried) > 1}
    if not swept:
        return
    yield "## The sweep\n"
    yield (
        "At a quarter of the budget, seed 0: geometric mean of the distance at those of 1, 4 and "
        "32 steps for which the method claims good samples. Best in bold.\n"
    )
    yield "| method | rate | teacher's share | pairs' share | steps of a pair | distance |"
    yield "|---|---|---|---|---|---|"
    for method, tried in swept.items():
        best = comparison.choose(method)
        for choice, value in tried:
            bold = "**" if choice == best else ""
            split = [f"{part:.3g}" if part else "" for part in choice.split]
            cells = [f"{choice.rate:g}", *split, f"{bold}{value:.3f}{bold}"]
            yield f"| {method} | {' | '.join(cells)} |"
    yield ""


def ledger(scores: Scores) -> Iterator[str]:
    """Forwards and seconds of each method, in the mean over seeds."""
    yield "| method | steps | teacher | pairs | training | seconds a run | parameters |"
    yield "|---|---|---|---|---|---|---|"
    for label, results in scores.items():
        mean = {
            key: sum(r["forwards"][key] for r in results) / len(results)
            for key in ("teacher", "pairs", "training")
        }
        seconds = sum(r["seconds"] for r in results) / len(results)
        cells = [f"{results[0]['steps']}", *(f"{value:,.0f}" for value in mean.values())]
        cells += [f"{seconds:.0f}", f"{results[0]['parameters']:,}"]
        yield f"| {label} | {' | '.join(cells)} |"


def curves(
    scores: Scores, metric: str, steps: Sequence[int]
) -> dict[str, dict[str, dict[int, float]]]:
    """Metric -> method -> steps -> mean over seeds, for the plot."""
    lines = {
        label: {n: mean(r["scores"][str(n)][metric] for r in results) for n in steps}
        for label, results in scores.items()
    }
    return {COLUMNS[metric]: lines}


def learning(scores: Scores) -> dict[str, dict[str, dict[float, float]]]:
    """Panel -> method -> forwards -> Fréchet distance of the first seed, for the plot.

    Forwards are all that were paid for: with the teacher's and the pairs', if they were.
    """
    panels: dict[str, dict[str, dict[float, float]]] = {}
    for label, results in scores.items():
        first = results[0]
        paid = first["forwards"]["pairs"]
        paid += first["forwards"]["teacher"] if first["variant"] == "inside" else 0
        for look in first["curve"]:
            for key in look.keys() - {"forwards"}:
                panel = panels.setdefault(f"{key.replace('frechet/', 'Fréchet, steps: ')}", {})
                panel.setdefault(label, {})[paid + look["forwards"]] = look[key]
    return dict(sorted(panels.items()))


def mean(values: Any) -> float:
    """The mean of numbers."""
    numbers = list(values)
    return float(sum(numbers) / len(numbers))

"""The report of a comparison: table, statements, plots, grids, sweep and ledger."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anystep import figures, provenance
from anystep.compare import statements
from anystep.compare.comparison import Comparison
from anystep.compare.plan import Entry
from anystep.compare.statements import Scores, spread
from anystep.evaluate import COLUMNS, REAL

OTHER = ("accuracy", "variance", "recall", "memorisation")  # shown at every step count, once


def write_report(comparison: Comparison, results: dict[Entry, dict[str, Any]]) -> dict[str, Path]:
    """Write README.md and its pictures into the comparison's folder.

    Args:
        comparison: what was compared.
        results: what `Comparison.run` gave.

    Returns:
        What was written, by what it is.
    """
    out, steps = comparison.config.out, sorted(comparison.config.steps)
    scores: Scores = {}
    for entry, result in sorted(results.items(), key=lambda pair: pair[0].label):
        scores.setdefault(entry.label, []).append(result)
    metric = comparison.judge.metric
    files = {"report": out / "README.md"}
    floor = comparison.judge.floor(comparison.config.n)
    if scores:
        files |= {"steps": out / "steps.png", "compute": out / "compute.png"}
        floors = {COLUMNS[metric]: floor.scores[metric]} if floor else {}
        figures.plot_quality(files["steps"], curves(scores, metric, steps), floors)
        figures.plot_curves(files["compute"], learning(scores), "training forwards")
    lines = [
        *introduction(comparison),
        *table(scores, metric, steps),
        "",
        *([f"{REAL} (held-out): {floor.scores[metric]:.3g}.\n"] if floor else []),
        *(f"![{what}]({path.name})" for what, path in files.items() if what != "report"),
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
        *grids(results),
        *(["## Failed", ""] if comparison.failures else []),
        *(f"* {key}: {why}" for key, why in comparison.failures.items()),
        "",
        provenance.as_markdown(provenance.provenance()),
        f"Runs were made at {', '.join(sorted(commits(results)))}.",
        "",
    ]
    files["report"].write_text("\n".join(lines))
    return files


def introduction(comparison: Comparison) -> Iterator[str]:
    """What was measured, and how to read it."""
    config, judge = comparison.config, comparison.judge
    yield f"# Comparison on {type(comparison.base.data).__name__.lower()}\n"
    yield (
        f"{COLUMNS[judge.metric]} of {config.n} samples against {judge.size} training examples, "
        f"mean ± standard deviation over seeds {', '.join(map(str, config.seeds))}; smaller is "
        f"better. Real data: at most as many of {len(judge.splits.held_out)} held-out examples. "
        "Parentheses: a number of steps for which the method claims nothing. Budget: "
        f"{comparison.budget:,} forward-equivalents a run (a backward counts as two forwards). "
        "inside: teacher, pairs and student share it. free: the teacher costs nothing; pairs and "
        "student do."
    )
    accuracy = f", accuracy {judge.classifier.accuracy:.4f}" if judge.classifier else ""
    yield f"\nFeatures: {judge.features.name}{accuracy}.\n"


def grids(results: dict[Entry, dict[str, Any]]) -> Iterator[str]:
    """A grid of each method, of its first seed."""
    yield "## The same noises at each step count\n"
    first: dict[str, Entry] = {}
    for entry in results:
        first.setdefault(entry.label, entry)
    for label, entry in sorted(first.items()):
        yield f"{label}: ![{label}](grids/{entry.key}.png)\n"


def commits(results: dict[Entry, dict[str, Any]]) -> set[str]:
    """The commits at which the runs were made."""
    return {f"`{result['made_at']['commit']}`" for result in results.values()}


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
    jumps = {"jump in a strip at 1": "jump/1", f"at {max(steps)}": f"jump/{max(steps)}"}
    heads = [f"{COLUMNS[key]} at {n}" for key in used for n in ends]
    yield f"| method | {' | '.join([*heads, 'semigroup gap', *jumps])} |"
    yield "|---|" + "---|" * (len(heads) + 1 + len(jumps))
    for label, results in scores.items():
        cells = [
            spread([r["scores"][str(n)][key] for r in results if key in r["scores"][str(n)]])
            for key in used
            for n in ends
        ]
        gaps = [r["gap"] for r in results if r["gap"] is not None]
        cells.append(spread(gaps))
        for key in jumps.values():
            cells.append(spread([r["interpolation"][key] for r in results if r["interpolation"]]))
        yield f"| {label} | {' | '.join(cells)} |"


def sweep(comparison: Comparison) -> Iterator[str]:
    """What was tried for each method, and what was chosen."""
    swept = {method: tried for method, tried in comparison.sweeps.items() if len(tried) > 1}
    if not swept:
        return
    yield "## The sweep\n"
    yield (
        "At a quarter of the budget, seed 0: geometric mean of the distance at those of 1, 4 and "
        "32 steps for which the method claims good samples. Best in bold. A split is chosen "
        "inside the budget; free takes the share of pairs from it.\n"
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
        spent = [
            statistics.fmean(r["forwards"][key] for r in results)
            for key in ("teacher", "pairs", "training")
        ]
        seconds = statistics.fmean(r["seconds"] for r in results)
        cells = [f"{results[0]['steps']}", *(f"{value:,.0f}" for value in spent)]
        cells += [f"{seconds:.0f}", f"{results[0]['parameters']:,}"]
        yield f"| {label} | {' | '.join(cells)} |"


def curves(
    scores: Scores, metric: str, steps: Sequence[int]
) -> dict[str, dict[str, dict[int, float]]]:
    """Metric -> method -> steps -> mean over seeds, for the plot."""
    lines = {
        label: {n: statistics.fmean(r["scores"][str(n)][metric] for r in results) for n in steps}
        for label, results in scores.items()
    }
    return {COLUMNS[metric]: lines}


def learning(scores: Scores) -> dict[str, dict[str, dict[float, float]]]:
    """Panel -> method -> forwards -> distance of the first seed, for the plot.

    Forwards are all that were paid for: with the teacher's and the pairs', if they were.
    """
    panels: dict[str, dict[str, dict[float, float]]] = {}
    for label, results in scores.items():
        first = results[0]
        paid = first["forwards"]["pairs"]
        paid += first["forwards"]["teacher"] if first["variant"] == "inside" else 0
        for look in first["curve"]:
            for key in look.keys() - {"forwards"}:
                metric, _, steps = key.partition("/")
                panel = panels.setdefault(f"{COLUMNS[metric]}, steps: {steps}", {})
                panel.setdefault(label, {})[paid + look["forwards"]] = look[key]
    return dict(sorted(panels.items()))

"""The statements of the shortcut paper, each held, not held or undecided by a comparison.

A statement is made of claims "this is larger than that", each about two sets of scores, one
score a seed. A claim is held when the difference of the means is in the claimed direction by more
than two standard errors, not held when it is the other way by as much, else undecided. A
statement is held when all its claims are, not held when one is not, else undecided.

Source: Frans et al. (arXiv 2410.12557), table 1 and the figures on steps, size and interpolation.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

HELD, NOT_HELD, UNDECIDED = "held", "not held", "undecided"
ONE_PHASE = ("diffusion", "flow_matching", "live_reflow", "consistency_training")
SHORTCUT, FLOW = "shortcut", "flow_matching"
PROGRESSIVE, REFLOW = "progressive_distillation (free)", "reflow (inside)"

Values = Sequence[float]
Scores = dict[str, list[dict[str, Any]]]  # label -> a result a seed


class Claim(NamedTuple):
    """`larger` is claimed to be larger than `smaller`; each has a name and a value a seed."""

    larger: str
    smaller: str
    larger_values: Values
    smaller_values: Values

    def verdict(self) -> str:
        """Held, not held or undecided."""
        a, b = self.larger_values, self.smaller_values
        if min(len(a), len(b)) < 2:
            return UNDECIDED
        difference = statistics.mean(a) - statistics.mean(b)
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        if abs(difference) <= 2 * error:
            return UNDECIDED
        return HELD if difference > 0 else NOT_HELD

    def __str__(self) -> str:
        a, b = (spread(v) for v in (self.larger_values, self.smaller_values))
        return f"{self.larger} {a} > {self.smaller} {b}: {self.verdict()}"


class Statement(NamedTuple):
    """A statement, and the claims of which it is made."""

    text: str
    claims: list[Claim]

    def verdict(self) -> str:
        """Held, not held or undecided."""
        verdicts = [claim.verdict() for claim in self.claims]
        if NOT_HELD in verdicts:
            return NOT_HELD
        return HELD if verdicts and set(verdicts) == {HELD} else UNDECIDED


def spread(values: Values) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def statements(scores: Scores, metric: str, steps: Sequence[int]) -> list[Statement]:
    """The paper's eight statements.

    Args:
        scores: the results of `Comparison.run`, by label.
        metric: the distance by which quality is judged; smaller is better.
        steps: the judged step counts; the largest is the "full" one.
    """
    full, few = max(steps), [n for n in (4, 1) if n in steps]

    def at(label: str, n: int) -> Values:
        judged = [result["scores"].get(str(n)) for result in scores.get(label, [])]
        return [found[metric] for found in judged if found]

    def worse(label: str, n: int, than: str, m: int, factor: float = 1) -> Claim:
        name = f"{factor:g} x " if factor != 1 else ""
        return Claim(
            f"{label} at {n}",
            f"{name}{than} at {m}",
            at(label, n),
            [factor * value for value in at(than, m)],
        )

    def of_strips(larger: str, smaller: str) -> Claim:
        strips = [result["interpolation"] for result in scores.get(SHORTCUT, [])]
        values = [[strip[key] for strip in strips if key in strip] for key in (larger, smaller)]
        return Claim(larger, smaller, *values)

    sizes = sorted(
        (results[0]["size"], label)
        for label, results in scores.items()
        if results[0]["method"] == SHORTCUT
    )
    return [
        Statement(
            "Among one-phase methods shortcut is best at 4 steps and at 1.",
            [worse(other, n, SHORTCUT, n) for n in few for other in ONE_PHASE],
        ),
        Statement(
            "Flow matching and diffusion fall apart at few steps "
            "(twice the distance of the full step count, or more).",
            [worse(m, n, m, full, 2) for m in (FLOW, "diffusion") for n in few],
        ),
        Statement(
            "Shortcut at the full step count is no worse than flow matching.",
            [worse(FLOW, full, SHORTCUT, full)],
        ),
        Statement(
            "Progressive distillation with a free teacher beats shortcut at 1 step, and loses to "
            "it at the full step count.",
            [worse(SHORTCUT, 1, PROGRESSIVE, 1), worse(PROGRESSIVE, full, SHORTCUT, full)],
        ),
        Statement(
            "Consistency training gets worse, or no better, with more steps.",
            [worse("consistency_training", full, "consistency_training", n) for n in few],
        ),
        Statement(
            "Reflow is beaten by shortcut at equal total compute.",
            [worse(REFLOW, n, SHORTCUT, n) for n in (full, *few)],
        ),
        Statement(
            "One-step quality keeps improving with model size.",
            [worse(a, 1, b, 1) for (_, a), (_, b) in itertools.pairwise(sizes)],
        ),
        Statement(
            "Interpolated noise gives smooth samples in one step: the largest jump is below that "
            "of the full step count, and the pictures are nearer to the data than pixel "
            "interpolation of the two ends.",
            [
                of_strips(f"jump/{full}", "jump/1"),
                of_strips("distance/pixels", "distance/arc"),
            ],
        ),
    ]


def as_markdown(found: Sequence[Statement]) -> Iterator[str]:
    """A line a statement and, below it, one a claim of which anything is known."""
    for number, statement in enumerate(found, 1):
        yield f"{number}. **{statement.verdict()}**: {statement.text}"
        known = [c for c in statement.claims if c.larger_values and c.smaller_values]
        yield from (f"   * {claim}" for claim in known)
        missing = len(statement.claims) - len(known)
        if missing or not known:
            yield f"   * not run: {missing or 'any'} of its comparisons"

"""Rules about the averages of the weights that are sampled with and that make targets."""

import math
from collections.abc import Iterator

from anystep.doctor.case import Case, rule
from anystep.ema import warmed_up

SAMPLED = 1 / 5  # share of a phase that the average sampled with may span
LEARNT = 1 / 2  # share of a phase after which the last level must have heard of the first
RAW = 0.9  # an average of less than ten steps hardly differs from the raw weights


@rule
def ema_too_slow(case: Case) -> Iterator[str]:
    """No average spans too much of the run, or of each of its phases.

    The warm-up keeps an average to a ninth of a phase, but levels learn one from the other: each
    hears of the one below with the delay of the average that makes targets.
    """
    config = case.config
    _, length = config.phase(config.steps - 1)
    hops = max(len(case.spec.levels) - 1, 1)
    averages = (
        ("ema", config.ema, 1, SAMPLED),
        ("objective.target-ema", config.objective.target_ema, hops, LEARNT),
    )
    for name, decay, count, share in averages:
        if decay is None:
            continue
        span = 1 / (1 - warmed_up(decay, length - 1))
        if span * count > share * length:
            through = f", {count} times over from level to level" if count > 1 else ""
            most = math.floor(1e4 * (1 - count / (share * length))) / 1e4
            remedy = f"take {most:g} or less, or train longer" if most >= RAW else "train longer"
            yield (
                f"{name} {decay:g} averages {span:.0f} steps{through}, of {length} in a phase: "
                f"{remedy}"
            )


@rule
def raw_weights(case: Case) -> Iterator[str]:
    """Samples are drawn with averaged weights."""
    ema = case.config.ema
    if ema < RAW:
        yield (
            f"ema {ema:g} averages {1 / (1 - ema):.1f} steps: samples and scores would be those "
            "of the raw weights; take 0.99 or more"
        )

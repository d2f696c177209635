"""Rules about step sizes: which are trained, which are asked, where guidance goes."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

from anystep.doctor.case import Case, rule
from anystep.sampling import schedule
from anystep.spec import ModelSpec, finest_level


@rule
def rows_per_level(case: Case) -> Iterator[str]:
    """Every step size that the model may be asked has a row in every training step."""
    config, rows = case.config, case.asked.rows
    few = [level for level in case.spec.levels if rows.get(level, 0) < 1]
    if few:
        least = min(rows.get(level, 0) for level in few)
        cut = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        yield (
            f"step sizes {sizes(case.spec, few)} are trained on less than a row a step (the least "
            f"on {least:.2g} of {config.batch}{cut}): take a larger batch, fewer parts, fewer "
            "levels (M), or a larger share of such rows"
        )


@rule
def steps_never_trained(case: Case) -> Iterator[str]:
    """Samples drawn along the run ask only step sizes that it trains."""
    config, spec = case.config, case.spec
    trained = set(case.asked.rows) & set(spec.levels)
    for steps in config.log.look_steps if config.log.look_every else ():
        asked = {spec.level(d) for d in asked_sizes(spec, steps)}
        if asked - trained:
            yield (
                f"log.look_steps has {steps}, which asks step sizes "
                f"{sizes(spec, sorted(asked - trained))} that are never trained: leave it out, or "
                "train them"
            )


@rule
def pairs_outside_the_claim(case: Case) -> Iterator[str]:
    """Pairs are made in as many steps as their model makes good samples in."""
    steps = (case.pairs or {}).get("steps")
    if case.teacher is not None and steps and not case.teacher.in_regime(steps):
        fewest, most = case.teacher.claims
        to = "on" if most is None else f"to {most}"
        yield (
            f"the pairs were made in {steps} steps, and the teacher makes good samples from "
            f"{fewest} steps {to}: make them again with anystep pairs --steps {fewest}"
        )


@rule
def guidance_twice(case: Case) -> Iterator[str]:
    """Guidance is baked in once: by the data, by the teacher, or by the objective."""
    asked = case.spec_of(1.0).guidance
    if asked == 1:
        return
    made = 1.0 if case.data is None else case.data.train.guidance
    if made != 1:
        yield (
            f"the data were made with guidance {made:g}, and the targets are guided by {asked:g} "
            "on top: set --objective.guidance 1"
        )
    teacher = case.teacher
    if teacher is not None and finest_level(teacher.finest) in teacher.guided_levels:
        yield (
            f"the teacher has guidance {teacher.guidance:g} baked in, and its answers are guided "
            f"by {asked:g} on top: set --objective.guidance 1"
        )


@rule
def guidance_untrained(case: Case) -> Iterator[str]:
    """Guidance in targets asks for the null label only where that is trained."""
    never = sorted(case.asked.guided - set(case.spec.null_levels))
    if never:
        yield (
            f"guidance in the targets asks for the null label at step sizes "
            f"{sizes(case.spec, never)}, where it is never trained: guide the targets that ask "
            "d = 0 (leave guidance_level out), or set --objective.guidance 1"
        )


def asked_sizes(spec: ModelSpec, steps: int) -> list[float]:
    """The sizes that sampling in so many steps asks."""
    ends = spec.sampler == "consistency"
    return [1 - t if ends else d for t, d in schedule(steps, spec)]


def sizes(spec: ModelSpec, levels: Sequence[float]) -> str:
    """The step sizes of levels, as 1, 1/2, 0."""
    finest = finest_level(spec.finest)
    words = ["0" if k == finest else str(Fraction(2.0**-k).limit_denominator(999)) for k in levels]
    return ", ".join(words)

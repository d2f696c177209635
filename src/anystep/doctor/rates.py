"""Rules about how fast a run learns, and whether it did."""

import math
from collections.abc import Iterator
from statistics import median

from anystep.config import TrainConfig
from anystep.data.pairs import Pairs
from anystep.doctor.case import Case, rule
from anystep.presets import PRESETS
from anystep.registry import name_of

PAPER = ((1e-4, 64), (1e-4, 256))  # rate and batch, CelebA-HQ and ImageNet
FACTOR = 2.0  # that a rate may be off
LINES = 9  # of metrics, at least, in a phase that is judged
RISE = 1.5  # from one third of a phase to the next
ABOVE = 3.0  # the least that three lines had


@rule
def rate_and_batch(case: Case) -> Iterator[str]:
    """Rate and batch go together as in the preset or in the paper, as the root of the batch."""
    config = case.config
    lr, batch = config.optimizer.lr, config.batch
    presets = list(alike(case))
    if not presets:
        return
    known = [(preset.optimizer.lr, preset.batch) for preset in presets] + list(PAPER)
    rates = [rate * math.sqrt(batch / size) for rate, size in known]
    if all(max(lr / rate, rate / lr) > FACTOR * 1.001 for rate in rates):
        (rate, size), fitting = known[0], rates[0]
        yield (
            f"optimizer.lr {lr:g} with batch {batch}: rates like {rate:g} were found with batch "
            f"{size}, which makes about {fitting:.2g} here (the root of the batch); change both "
            "together"
        )


def alike(case: Case) -> Iterator[TrainConfig]:
    """The presets for such data, or those behind its pairs, and such a network."""
    sources = [name_of(case.config.data)]
    if isinstance(case.config.data, Pairs):
        if case.pairs is None:
            return
        sources.append(case.pairs["data"]["name"])
    for make in PRESETS.values():
        preset = make(case.config.objective)
        same = name_of(preset.network) == name_of(case.config.network)
        if same and name_of(preset.data) in sources:
            yield preset


@rule
def loss_diverging(case: Case) -> Iterator[str]:
    """No loss rises at the end of the run, or stands far above its own least value.

    Lines of the last phase alone are compared: a new phase has a task of its own. The first third
    does not count, for a level has nothing to learn before the one below it has learnt something.
    """
    if not case.metrics:
        return
    first, _ = case.config.phase(min(case.metrics[-1]["step"], case.config.steps) - 1)
    lines = [line for line in case.metrics if line["step"] > first]
    for name in sorted({key for line in lines for key in line if key.startswith("loss/")}):
        values = [float(line[name]) for line in lines if name in line]
        if len(values) < LINES:
            continue
        third = len(values) // 3
        middle, last = median(values[third:-third]), median(values[-third:])
        smooth = [median(values[k : k + 3]) for k in range(third, len(values) - 2)]
        least, end = min(smooth), smooth[-1]
        if last > RISE * middle or end > ABOVE * least:
            yield (
                f"{name} rises: {end:.3g} at the end, {last:.3g} in the last third of the "
                f"{'run' if case.config.objective.phases == 1 else 'phase'}, {middle:.3g} before, "
                f"{least:.3g} at least: lower --optimizer.lr, or raise --optimizer.weight-decay"
            )

"""What is measured of a model in a comparison."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anystep.evaluate import Judge, evaluate, generate, semigroup_gap
from anystep.interpolation import largest_jump, mix, strip
from anystep.log import read_metrics
from anystep.sampling import STOCHASTIC
from anystep.spec import Model
from anystep.train import METRICS

SWEEP_STEPS, SWEEP_SAMPLES = (1, 4, 32), 1024
STRIPS, FRAMES = 16, 9  # interpolations judged: how many, and pictures in each
SEED = 1  # of the samples judged


def quick(model: Model, judge: Judge) -> float:
    """The geometric mean of the distance at those of `SWEEP_STEPS` that the model claims."""
    claimed = [n for n in SWEEP_STEPS if model.spec.in_regime(n)] or [SWEEP_STEPS[-1]]
    samples = [generate(model, SWEEP_SAMPLES, steps=n, seed=SEED)[0] for n in claimed]
    return statistics.geometric_mean([judge.distance(x) for x in samples])


def judged(run: Path, model: Model, judge: Judge, steps: Sequence[int], n: int) -> dict[str, Any]:
    """Everything a report says of a model.

    Args:
        run: the folder of its training.
        model: the model.
        judge: the yardstick.
        steps: sampling steps at which it is judged.
        n: samples judged at each.

    Returns:
        "claims", those of the steps for which the method claims good samples; "scores", by step
        count, then metric, without guidance at sampling; "gap", see `semigroup_gap`;
        "interpolation", see `interpolated`; "curve", see `learning_curve`.
    """
    rows = evaluate(run.name, model, judge, steps=steps, n=n, seed=SEED)
    return {
        "claims": [count for count in steps if model.spec.in_regime(count)],
        "scores": {str(row.steps): row.scores for row in rows if row.guidance == 1},
        "gap": semigroup_gap(model),
        "interpolation": interpolated(model, judge, max(steps)),
        "curve": learning_curve(run),
    }


def interpolated(model: Model, judge: Judge, most: int) -> dict[str, float]:
    """Smoothness and quality of strips between two noises; empty if sampling adds noise.

    Args:
        model: the model.
        judge: measures quality.
        most: the number of steps that is compared with one.

    Returns:
        "jump/1" and "jump/MOST": the largest jump between neighbours, in the mean over strips;
        "jump/pixels": that of mixing the two ends; "distance/arc" and "distance/pixels": the
        judge's distance of the pictures between the ends, in one step and mixed.
    """
    if model.spec.sampler in STOCHASTIC:
        return {}
    ones, mosts = (
        [strip(model, FRAMES, steps, seed)[0] for seed in range(STRIPS)] for steps in (1, most)
    )
    pixels = [mix(frames[0], frames[-1], FRAMES) for frames in ones]
    result = {
        f"jump/{name}": statistics.fmean(largest_jump(frames) for frames in strips)
        for name, strips in {"1": ones, str(most): mosts, "pixels": pixels}.items()
    }
    for name, strips in {"arc": ones, "pixels": pixels}.items():
        inner = torch.cat([frames[1:-1] for frames in strips])
        result[f"distance/{name}"] = judge.distance(inner)
    return result


def learning_curve(run: Path) -> list[dict[str, float]]:
    """The looks taken while a run went on: "forwards" so far, and the distance at a step count.

    Such a distance is called after the metric, as "frechet/4".
    """
    curve, forwards = [], 0.0
    for line in read_metrics(run / METRICS):
        forwards = line.get("forwards", forwards)
        looks = {k: v for k, v in line.items() if k.startswith(("frechet/", "sliced/"))}
        if looks:
            curve.append({"forwards": forwards, **looks})
    return curve

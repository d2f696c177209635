"""Rules about the scale of the data: noise has unit variance, and data should be near it."""

from collections.abc import Iterator

import torch

from anystep.data import seeded
from anystep.doctor.case import Case, rule
from anystep.spec import ModelSpec

PICTURES = (0.1, 1.1)  # standard deviations of pictures in [-1, 1] that are no cause for doubt
OTHERS = (1 / 3, 2.0)  # and of latents and vectors
CONSTANT = 1e-3  # a channel that varies less, compared with all of them, says nothing
CLIPPED = 0.02  # share of true values that a bound may cut; of unit-variance latents at 4: 0.005


@rule
def data_scale(case: Case) -> Iterator[str]:
    """Data have about the scale of the noise; pictures fill [-1, 1]."""
    x = case.x1
    if x is None:
        return
    picture = case.spec.data == "[-1, 1]"
    low, high = (float(v) for v in x.aminmax())
    std, mean = float(x.std()), float(x.mean())
    if picture and low >= 0:
        yield (
            f"pictures run from {low:.3g} to {high:.3g}, not from -1 to 1: store uint8 in 0..255, "
            "or 2 x - 1"
        )
        return
    least, most = PICTURES if picture else OTHERS
    if least <= std <= most and abs(mean) <= most:
        return
    yield (
        f"the data have standard deviation {std:.3g} and mean {mean:.3g}, where {least:.2g} to "
        f"{most:.2g} around 0 go with the noise: {rescaled(case.spec, std, mean)}"
    )


def rescaled(spec: ModelSpec, std: float, mean: float) -> str:
    """What to do about data of this deviation and mean."""
    vae = spec.vae
    if spec.data == "[-1, 1]":
        return "look whether their pixels are 0..255"
    if vae is None:
        return f"subtract {mean:.3g} and divide by {std:.3g}"
    parts = [f"scale, {vae.scale:.3g}, should be near {vae.scale / std:.2g}"]
    if abs(mean) > std / 2:
        parts.append(f"shift, {vae.shift:.3g}, near {vae.shift + mean / vae.scale:.2g}")
    return f"the VAE's {' and its '.join(parts)}"


@rule
def normalised_pictures(case: Case) -> Iterator[str]:
    """Pictures are in [-1, 1], not divided by a dataset's standard deviation."""
    x = case.x1
    if x is None or case.spec.data != "raw" or case.spec.vae is not None:
        return
    if x.ndim == 4 and x.shape[1] == 3:
        low, high = x.aminmax()
        yield (
            f"floats with 3 channels run from {low:.3g} to {high:.3g}: if these are pictures, "
            "store uint8 or [-1, 1], for samples beyond that are cut off when they are drawn"
        )


@rule
def constant_channel(case: Case) -> Iterator[str]:
    """Every channel, or coordinate of a vector, varies."""
    x = case.x1
    if x is None:
        return
    spread = x.transpose(0, 1).flatten(1).std(1)
    dead = (spread <= CONSTANT * x.std()).nonzero().flatten().tolist()
    if dead:
        what = "channel" if x.ndim == 4 else "coordinate"
        more = ", ..." if len(dead) > 5 else ""
        yield (
            f"{what} {', '.join(map(str, dead[:5]))}{more} of {len(spread)} is constant: leave it "
            "out of the data, or look for what emptied it"
        )


@rule
def bound_cuts_data(case: Case) -> Iterator[str]:
    """A bound on targets or on samples leaves true values alone.

    One that never acts, as 4 does for pictures in [-1, 1], is no fault.
    """
    x1 = case.x1
    if x1 is None:
        return
    v = x1 - torch.randn(x1.shape, generator=seeded(0, 0))
    clip = getattr(case.config.objective, "clip", None)
    for name, bound, values in (
        ("clip", clip, (x1, v)),  # of the point reached, and of the mean velocity to it
        ("bound", case.spec.bound, (x1,)),
    ):
        if bound is None:
            continue
        cut = max(float((a.abs() > bound).float().mean()) for a in values)
        if cut > CLIPPED:
            yield (
                f"objective.{name} {bound:g} cuts {cut:.1%} of true values (data have standard "
                f"deviation {float(x1.std()):.3g}): leave it out, or scale the data to 1"
            )

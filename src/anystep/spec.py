"""What a trained network may be asked: the `ModelSpec`, and the `Model` that keeps to it.

A *network* is any `net(x, t, d, cond) -> u`. A *model* is a network and its spec. The spec is
written at training, saved with the weights and read by every sampler, so that nothing about a
method is guessed from a file name or repeated on a command line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from anystep.errors import UserError
from anystep.path import PathName

Sampler = Literal["euler", "consistency", "ddim", "ancestral"]
SAMPLERS: dict[str, str] = {  # and what a network must predict for each
    "euler": "u",
    "consistency": "u",
    "ddim": "noise",
    "ancestral": "noise",
}
Network = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class VAESpec:
    """The autoencoder in whose latent space a model works; data are (latent - shift) * scale.

    Two are equal when they give the same latents, wherever they were found.

    Attributes:
        name: a folder, or a name on the Hugging Face hub.
        revision: of the name on the hub; None is its newest.
        subfolder: where in the folder or under the name its files are.
        weights: digest of its weights.
        scale: the scaling factor of its config.
        shift: the shift factor of its config; 0 when it has none.
    """

    name: str = field(compare=False)
    revision: str | None = field(compare=False)
    subfolder: str = field(compare=False)
    weights: str
    scale: float
    shift: float = 0.0


@dataclass(frozen=True)
class ModelSpec:
    """What a network predicts and which inputs it was trained on.

    Attributes:
        shape: shape of one sample, channels first; empty for a network nothing is known of.
        num_classes: number of classes, 0 for an unconditional model. Class ids are
            0..num_classes - 1 and the null label (no condition) is num_classes.
        predicts: what the output means: "u", the average velocity over the step, or the "noise".
        path: the path of `anystep.path`.
        step_input: the d the network expects: the "step", always "zero", or a "flag", 0 for
            steps of 1/M and less and 1 for all others.
        finest: M; a step of 1/M or less is asked as d = 0. A power of two.
        levels: the trained levels j, step size d = 2^-j; level log2 M stands for d = 0.
        null_levels: the levels at which the null label was trained, which is where guidance at
            sampling has a meaning.
        guidance: strength of the guidance baked into the weights; 1 is none.
        guided_levels: the levels into which it is baked.
        data: the scale of the data: "[-1, 1]" for images, "raw" for vectors.
        sampler: the sampler the model is meant for, see `anystep.sampling`.
        bound: magnitude to which a sampler that predicts data bounds it; None is no bound.
        claims: the fewest and the most steps for which the method claims good samples; None is
            any number. A table shows what lies outside in parentheses.
        vae: the autoencoder whose latents the samples are; None for samples of any other kind.
    """

    shape: tuple[int, ...] = ()
    num_classes: int = 0
    predicts: Literal["u", "noise"] = "u"
    path: PathName = "linear"
    step_input: Literal["step", "zero", "flag"] = "step"
    finest: int = 128
    levels: tuple[int, ...] = tuple(range(8))
    null_levels: tuple[int, ...] = (7,)
    guidance: float = 1.0
    guided_levels: tuple[int, ...] = ()
    data: Literal["[-1, 1]", "raw"] = "[-1, 1]"
    sampler: Sampler = "euler"
    bound: float | None = None
    claims: tuple[int, int | None] = (1, None)
    vae: VAESpec | None = None

    def __post_init__(self) -> None:
        finest_level(self.finest)
        known = {"predicts": ("u", "noise"), "path": get_args(PathName), "sampler": SAMPLERS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"this version of anystep cannot sample a model whose {name} is "
                    f"{getattr(self, name)!r} (it knows {', '.join(values)})"
                )
        if (self.predicts == "u") != (self.path == "linear"):
            raise UserError(
                f"a model that predicts {self.predicts} cannot be one of the {self.path} path"
            )
        check_sampler(self, self.sampler)

    @property
    def null_label(self) -> int | None:
        """The class id that stands for no condition; None for an unconditional model."""
        return self.num_classes or None

    @property
    def knows_velocity(self) -> bool:
        """Whether u(x, t, 0) of the linear path is what the model was trained for."""
        return (
            (self.predicts, self.path, self.sampler) == ("u", "linear", "euler")
            and finest_level(self.finest) in self.levels
            and self.in_regime(self.finest)
        )

    def asked(self, d: float) -> float:
        """The d the network is asked for a step of size d."""
        if self.step_input == "zero" or d <= 1 / self.finest:
            return 0.0
        return 1.0 if self.step_input == "flag" else d

    def in_regime(self, steps: int) -> bool:
        """Whether the method claims good samples in so many steps."""
        fewest, most = self.claims
        return fewest <= steps and (most is None or steps <= most)

    def level(self, d: float) -> float:
        """The level the network is asked for a step of size d; whole for a trained size."""
        asked = self.asked(d)
        return -math.log2(asked) if asked else finest_level(self.finest)


def finest_level(finest: int) -> int:
    """log2 M, the level that stands for both 1/M and 0.

    Raises:
        UserError: `finest` is not a power of two.
    """
    if finest < 1 or finest & (finest - 1):
        raise UserError(f"the finest number of steps M must be a power of two, not {finest}")
    return finest.bit_length() - 1


def check_sampler(spec: ModelSpec, sampler: str) -> None:
    """Raise `UserError` unless `sampler` can be used with what the model predicts."""
    fitting = [name for name, predicts in SAMPLERS.items() if predicts == spec.predicts]
    if sampler not in fitting:
        raise UserError(
            f"a model that predicts {spec.predicts} is sampled by {' or '.join(fitting)}, "
            f"not by {sampler!r}"
        )


class Model(nn.Module):
    """A network that is asked only what its spec allows: `model(x, t, d, cond) -> u`.

    Args:
        net: the network; an `nn.Module`.
        spec: what it was trained on.
    """

    def __init__(self, net: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.net = net
        self.spec = spec

    @property
    def null_label(self) -> int | None:
        """The class id that stands for no condition; None for an unconditional model."""
        return self.spec.null_label

    def forward(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """The prediction (B, *shape) at x (B, *shape), t (B,) for true steps d (B,).

        The network is asked d as `spec.asked` says.
        """
        coarse = d > 1 / self.spec.finest
        if self.spec.step_input == "zero":
            d = torch.zeros_like(d)
        elif self.spec.step_input == "flag":
            d = coarse.to(d.dtype)
        else:
            d = torch.where(coarse, d, 0.0)
        u: Tensor = self.net(x, t, d, cond)
        return u

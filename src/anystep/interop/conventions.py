"""Other conventions of time, noise and prediction, to and from ours.

Every convention writes a sample as a sum of data and noise, and predicts another such sum:

    z = a(s) x1 + b(s) x0,    prediction = p x1 + q x0

at its own time s. With t = a / (a + b) our point on the same ray is x_t = z / (a + b), and the
two sums give x1 and x0 back, so that u(x_t, t, 0) = x1 - x0 follows from any prediction and any
prediction from u. All is linear, so it holds for expectations: for what networks predict.

| convention               | s                     | a        | b            | velocity     |
|--------------------------|-----------------------|----------|--------------|--------------|
| OURS, SiT's code         | t                     | s        | 1 - s        | x1 - x0      |
| rectified_flow, REPA     | 1 - t                 | 1 - s    | s            | x0 - x1      |
| ... (1000), SD3, FLUX    | 1000 (1 - t)          | 1-s/1000 | s/1000       | x0 - x1      |
| edm                      | sigma = (1 - t) / t   | 1        | s            | x0           |
| trigflow, sCM            | atan(sigma/sigma_data)| cos s    | sigma_data   | dz/ds        |
|                          |                       |          | sin s        |              |
| timesteps, diffusers' DDPM | 0 to 999            | sqrt(    | sqrt(        | a x0 - b x1, |
|                          |                       | alpha_s) | 1 - alpha_s) | v-prediction |

Sigmas of a diffusers scheduler are those of `edm` where it adds them to data, and s of
`rectified_flow` in flow matching; its timesteps are `timesteps(scheduler.alphas_cumprod)` and
`rectified_flow(1000)`.

A prediction is the "velocity", the "data" (x1, EDM's denoiser), or the "noise" (x0, epsilon). Data
cannot be told from a point at t = 1, nor noise at t = 0: there u from them divides by zero.

Sources: Ma et al., SiT (arXiv 2401.08740); Esser et al., SD3 (2403.03206); Karras et al., EDM
(2206.00364); Lu and Song, sCM (2410.11081); Salimans and Ho, v-prediction (2202.00512).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anystep.errors import UserError
from anystep.path import data_from_velocity, expand_to, noise_from_velocity
from anystep.spec import Network

Prediction = Literal["velocity", "data", "noise"]
Pair = tuple[Tensor, Tensor]
Foreign = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (z, s, cond) -> prediction


@dataclass(frozen=True)
class Convention:
    """How others write a sample and its time.

    Attributes:
        mix: s -> (a, b), the shares of data and noise in a sample.
        time: (1 - t) / t, the noise over the data at our t, -> s.
        slope: s -> (p, q), what they call the velocity.
    """

    mix: Callable[[Tensor], Pair]
    time: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Pair]

    def from_t(self, t: Tensor) -> Tensor:
        """Their time s (B,) of our t (B,)."""
        return self.time((1 - t) / t)

    def to_t(self, s: Tensor) -> Tensor:
        """Our t (B,) of their time s (B,)."""
        a, b = self.mix(s)
        return a / (a + b)

    def from_point(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Their sample z (B, *shape) of our x_t (B, *shape) at t (B,)."""
        return x_t * expand_to(self._size(self.from_t(t)), x_t)

    def to_point(self, z: Tensor, s: Tensor) -> Tensor:
        """Our x_t (B, *shape) of their sample z (B, *shape) at s (B,)."""
        return z / expand_to(self._size(s), z)

    def from_u(self, u: Tensor, x_t: Tensor, t: Tensor, predicts: Prediction) -> Tensor:
        """Their prediction (B, *shape) of our u(x_t, t, 0)."""
        p, q = (expand_to(share, u) for share in self._shares(self.from_t(t), predicts))
        return p * data_from_velocity(x_t, u, t) + q * noise_from_velocity(x_t, u, t)

    def to_u(self, prediction: Tensor, z: Tensor, s: Tensor, predicts: Prediction) -> Tensor:
        """Our u(x_t, t, 0) (B, *shape) of their prediction at their sample z and time s."""
        a, b = (expand_to(share, z) for share in self.mix(s))
        p, q = (expand_to(share, z) for share in self._shares(s, predicts))
        # x1 = (q z - b prediction) / (a q - b p), x0 = (a prediction - p z) / (a q - b p)
        return ((p + q) * z - (a + b) * prediction) / (a * q - b * p)

    def _size(self, s: Tensor) -> Tensor:
        a, b = self.mix(s)
        return a + b

    def _shares(self, s: Tensor, predicts: Prediction) -> Pair:
        if predicts == "velocity":
            return self.slope(s)
        if predicts not in ("data", "noise"):
            raise UserError(f"a prediction is velocity, data or noise, not {predicts!r}")
        one, zero = torch.ones_like(s), torch.zeros_like(s)
        return (one, zero) if predicts == "data" else (zero, one)


def network(theirs: Foreign, convention: Convention, predicts: Prediction) -> Network:
    """A network of another convention as one of ours that knows u(x, t, 0): it takes any d for 0.

    Args:
        theirs: (z, s, cond) -> prediction.
        convention: its convention.
        predicts: what it predicts.
    """

    def ours(x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        s, z = convention.from_t(t), convention.from_point(x, t)
        return convention.to_u(theirs(z, s, cond), z, s, predicts)

    return ours


def rectified_flow(scale: float = 1.0) -> Convention:
    """Straight lines from data at s = 0 to noise at s = scale; velocity noise minus data."""
    return Convention(
        mix=lambda s: (1 - s / scale, s / scale),
        time=lambda ratio: scale - scale / (1 + ratio),
        slope=lambda s: (-torch.ones_like(s), torch.ones_like(s)),
    )


def edm(sigma_max: float = 80.0) -> Convention:
    """Data plus sigma times noise.

    Args:
        sigma_max: where samplers start; a larger one, infinite for our t = 0, is taken for it.
    """
    return Convention(
        mix=lambda s: (torch.ones_like(s), s),
        time=lambda ratio: ratio.clamp(max=sigma_max),
        slope=lambda s: (torch.zeros_like(s), torch.ones_like(s)),
    )


def trigflow(sigma_data: float = 1.0) -> Convention:
    """cos(s) data + sin(s) sigma_data noise for s from 0 to pi/2.

    sCM's network F(z / sigma_data, s) is the velocity over sigma_data.

    Args:
        sigma_data: standard deviation of the data (0.5 in sCM).
    """
    return Convention(
        mix=lambda s: (s.cos(), sigma_data * s.sin()),
        time=lambda ratio: (ratio / sigma_data).atan(),
        slope=lambda s: (-s.sin(), sigma_data * s.cos()),
    )


def timesteps(alphas_cumprod: Tensor) -> Convention:
    """The timesteps of a diffusers scheduler; between two the log of noise over data is linear.

    A time outside of the schedule is that of its nearer end, as samplers that start from pure
    noise take it. Its velocity is v-prediction.

    Args:
        alphas_cumprod: (K,), the scheduler's, falling.
    """
    ratios = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt().log()
    if ratios.ndim != 1 or len(ratios) < 2 or not (ratios.diff() > 0).all():
        raise UserError("alphas_cumprod must be a falling sequence in (0, 1)")

    def mix(s: Tensor) -> Pair:
        place = s.double().clamp(0, len(ratios) - 1)
        low = place.floor().long().clamp(max=len(ratios) - 2)
        table = ratios.to(s.device)
        angle = torch.lerp(table[low], table[low + 1], place - low).exp().atan()
        return angle.cos().to(s.dtype), angle.sin().to(s.dtype)

    def time(ratio: Tensor) -> Tensor:
        table = ratios.to(ratio.device)
        log = ratio.double().log().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log, right=True) - 1).clamp(0, len(table) - 2)
        place = low + (log - table[low]) / (table[low + 1] - table[low])
        return place.to(ratio.dtype)

    def slope(s: Tensor) -> Pair:
        a, b = mix(s)
        return -b, a

    return Convention(mix, time, slope)


OURS = Convention(
    mix=lambda s: (s, 1 - s),
    time=lambda ratio: 1 / (1 + ratio),
    slope=lambda s: (torch.ones_like(s), -torch.ones_like(s)),
)

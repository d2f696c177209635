"""Paths from noise to data, and what their quantities say of one another.

Noise x0 sits at t = 0, data x1 at t = 1, and between them

    x_t = sigma(t) x0 + alpha(t) x1.

| path      | alpha                                      | sigma             | arXiv      |
|-----------|--------------------------------------------|-------------------|------------|
| linear    | t                                          | 1 - t             | 2410.12557 |
| vp-cosine | sin(pi/2 (t + (1 - t) 0.01))               | sqrt(1 - alpha^2) | 2102.09672 |
| vp-linear | exp(-19.9 s^2 / 4 - 0.1 s / 2), s = 1 - t  | sqrt(1 - alpha^2) | 2011.13456 |

On the linear path the velocity is v = x1 - x0, and a point x_t and any one of u (a velocity), x1
and x0 give the other two, because x1 = x_t + (1 - t) u and x0 = x_t - t u. On the
variance-preserving paths a signal is left at t = 0 (alpha = 0.0157 and 0.0066), since without one
x1 could not be told from a predicted noise. The conversions below are exact inverses away from
the end at which they divide by zero; nothing here clips or bounds t.
"""

import math
from typing import Literal

from torch import Tensor

PathName = Literal["linear", "vp-cosine", "vp-linear"]
COSINE_START = 0.01  # the share of the cosine's quarter period that is left out at t = 0
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the linear schedule, over a unit of time


def expand_to(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) with trailing axes of size 1, so that they broadcast over x (B, *shape)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def coefficients(t: Tensor, path: PathName) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t), shaped like t, in [0, 1]."""
    if path == "linear":
        return t, 1 - t
    if path == "vp-cosine":
        angle = math.pi / 2 * (t + (1 - t) * COSINE_START)
        return angle.sin(), angle.cos()
    s = 1 - t
    log_alpha = -(BETA_MAX - BETA_MIN) * s**2 / 4 - BETA_MIN * s / 2
    return log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()


def interpolate(x0: Tensor, x1: Tensor, t: Tensor, path: PathName = "linear") -> Tensor:
    """x_t = sigma(t) x0 + alpha(t) x1, for x0, x1 (B, *shape) and t (B,) in [0, 1]."""
    alpha, sigma = coefficients(expand_to(t, x0), path)
    return sigma * x0 + alpha * x1


def velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """V = x1 - x0, the velocity of the path, for x0, x1 (B, *shape)."""
    return x1 - x0


def step(x_t: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """X(x, t, d) = x + d u: where a step of size d (B,) along u (B, *shape) lands."""
    return x_t + expand_to(d, x_t) * u


def data_from_velocity(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """The x1 to which velocity u points: x_t + (1 - t) u."""
    return step(x_t, u, 1 - t)


def noise_from_velocity(x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """The x0 from which velocity u came: x_t - t u."""
    return step(x_t, u, -t)


def velocity_from_data(x_t: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """U = (x1 - x_t) / (1 - t); infinite at t = 1."""
    return (x1 - x_t) / (1 - expand_to(t, x_t))


def velocity_from_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """U = (x_t - x0) / t; infinite at t = 0."""
    return (x_t - x0) / expand_to(t, x_t)


def data_from_noise(x_t: Tensor, x0: Tensor, t: Tensor, path: PathName = "linear") -> Tensor:
    """x1 = (x_t - sigma x0) / alpha; infinite where alpha = 0, at t = 0 of the linear path."""
    alpha, sigma = coefficients(expand_to(t, x_t), path)
    return (x_t - sigma * x0) / alpha


def noise_from_data(x_t: Tensor, x1: Tensor, t: Tensor, path: PathName = "linear") -> Tensor:
    """x0 = (x_t - alpha x1) / sigma; infinite where sigma = 0, at t = 1."""
    alpha, sigma = coefficients(expand_to(t, x_t), path)
    return (x_t - alpha * x1) / sigma

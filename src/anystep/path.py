"""The straight path from noise to data, and what its quantities say of one another.

Noise x0 sits at t = 0, data x1 at t = 1, and between them

    x_t = (1 - t) x0 + t x1            v = x1 - x0.

A point x_t and any one of u (a velocity), x1 and x0 give the other two, because
x1 = x_t + (1 - t) u and x0 = x_t - t u. The conversions below are exact inverses away from the
end at which they divide by zero; nothing here clips or bounds t.

Source: Frans et al., "One Step Diffusion via Shortcut Models" (arXiv 2410.12557), section 2.
"""

from torch import Tensor


def expand_to(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) with trailing axes of size 1, so that they broadcast over x (B, *shape)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t x1, for x0, x1 (B, *shape) and t (B,) in [0, 1]."""
    t = expand_to(t, x0)
    return (1 - t) * x0 + t * x1


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


def data_from_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """x1 = (x_t - (1 - t) x0) / t; infinite at t = 0."""
    t = expand_to(t, x_t)
    return (x_t - (1 - t) * x0) / t


def noise_from_data(x_t: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x0 = (x_t - t x1) / (1 - t); infinite at t = 1."""
    t = expand_to(t, x_t)
    return (x_t - t * x1) / (1 - t)

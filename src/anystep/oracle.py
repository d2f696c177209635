"""Closed-form truth for tests: distributions whose probability-flow ODE is known.

Each oracle is itself a network, `oracle(x, t, d, cond) -> u`, with u the exact average velocity
over [t, t + d] and u(x, t, 0) = E[v | x_t = x]. Use float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anystep.path import PathName, coefficients, expand_to


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2 I), noise N(0, I).

    With S(t)^2 = (1 - t)^2 + t^2 std^2 the flow map is
    X(x, t, d) = (t + d) mean + S(t + d) / S(t) (x - t mean).

    Attributes:
        mean: broadcastable to one sample.
        std: a positive number.
    """

    mean: float | Tensor
    std: float

    def scale(self, t: Tensor) -> Tensor:
        """S(t), the standard deviation of x_t."""
        return ((1 - t) ** 2 + (t * self.std) ** 2).sqrt()

    def __call__(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """U (B, *shape); S(t + d) - S(t) is divided by d symbolically, so d = 0 is exact."""
        t, d = expand_to(t, x), expand_to(d, x)
        slope = (2 * t + d) * (1 + self.std**2) - 2
        slope = slope / (self.scale(t) * (self.scale(t) + self.scale(t + d)))
        return self.mean + slope * (x - t * self.mean)

    def flow_map(self, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        """X(x, t, d) (B, *shape)."""
        t, r = expand_to(t, x), expand_to(t + d, x)
        return r * self.mean + self.scale(r) / self.scale(t) * (x - t * self.mean)

    def noise(self, x: Tensor, t: Tensor, path: PathName = "linear") -> Tensor:
        """E[x0 | x_t = x] (B, *shape) on a path of `anystep.path`: what diffusion predicts."""
        alpha, sigma = coefficients(expand_to(t, x), path)
        return sigma * (x - alpha * self.mean) / (sigma**2 + (alpha * self.std) ** 2)

    def straight(self, x: Tensor, t: Tensor) -> Tensor:
        """V (B, *shape) of the line through x at t from an x0 to X(x0, 0, 1): what reflow learns.

        These lines, from x0 to mean + std x0, never cross.
        """
        t = expand_to(t, x)
        x0 = (x - t * self.mean) / (1 - t + t * self.std)
        return self.mean + (self.std - 1) * x0


@dataclass(frozen=True)
class GaussianMixture:
    """Data from a mixture of isotropic Gaussians; the ODE is integrated numerically.

    Attributes:
        means: (K, D).
        std: standard deviation of every component.
        weights: (K,), summing to 1; equal when None.
        substeps: fourth-order Runge-Kutta steps from t = 0 to 1 (fewer for a shorter way).
    """

    means: Tensor
    std: float
    weights: Tensor | None = None
    substeps: int = 256

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Exact samples (n, D) and the component of each (n,)."""
        k = len(self.means)
        weights = torch.full((k,), 1 / k) if self.weights is None else self.weights
        component = torch.multinomial(weights.double(), n, True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.std * noise, component

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[v | x_t = x] (B, D): the components' velocities, weighted by their posterior.

        A component alone is a `Gaussian`, whose velocity is linear in x - t mean.
        """
        t = expand_to(t, x)
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        offset = x[:, None] - t[..., None] * self.means  # (B, K, D)
        logits = -offset.square().sum(-1) / (2 * variance)
        if self.weights is not None:
            logits = logits + self.weights.log()
        slope = (t * self.std**2 - (1 - t)) / variance
        per_component = self.means + slope[..., None] * offset
        return (logits.softmax(-1)[..., None] * per_component).sum(1)

    def flow_map(self, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        """X(x, t, d) (B, D), by the classical Runge-Kutta method with steps of equal length."""
        steps = max(1, round(float(d.abs().max()) * self.substeps))
        h = d / steps
        for k in range(steps):
            s = t + k * h
            k1 = self.velocity(x, s)
            k2 = self.velocity(x + expand_to(h / 2, x) * k1, s + h / 2)
            k3 = self.velocity(x + expand_to(h / 2, x) * k2, s + h / 2)
            k4 = self.velocity(x + expand_to(h, x) * k3, s + h)
            x = x + expand_to(h / 6, x) * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def __call__(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """U (B, D): the average velocity over the step, the instantaneous one where d = 0."""
        zero = expand_to(d == 0, x)
        length = torch.where(d == 0, 1, d)
        average = (self.flow_map(x, t, d) - x) / expand_to(length, x)
        return torch.where(zero, self.velocity(x, t), average)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.15) -> GaussianMixture:
    """The mixture used throughout tests and docs: equal modes on a circle, in float64."""
    angle = 2 * torch.pi * torch.arange(modes, dtype=torch.float64) / modes
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)

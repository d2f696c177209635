import pytest
import torch

from anystep.metrics import sliced_wasserstein
from anystep.oracle import Gaussian, GaussianMixture, ring
from anystep.path import interpolate, noise_from_velocity, step, velocity

GAUSSIAN = Gaussian(mean=0.7, std=0.4)


def batch(generator, n=64, dim=2):
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    t = torch.rand(n, generator=generator, dtype=torch.float64) * 0.9
    d = torch.rand(n, generator=generator, dtype=torch.float64) * (1 - t)
    return x, t, d


def test_gaussian_u_is_the_mean_velocity_of_its_flow_map(generator):
    x, t, d = batch(generator)
    landed = step(x, GAUSSIAN(x, t, d), d)
    torch.testing.assert_close(landed, GAUSSIAN.flow_map(x, t, d), atol=1e-13, rtol=0)


def test_gaussian_flow_map_composes(generator):
    x, t, d = batch(generator)
    halfway = GAUSSIAN.flow_map(x, t, d / 3)
    twice = GAUSSIAN.flow_map(halfway, t + d / 3, 2 * d / 3)
    torch.testing.assert_close(twice, GAUSSIAN.flow_map(x, t, d), atol=1e-13, rtol=0)


def test_gaussian_u_at_zero_is_the_conditional_mean_velocity(generator):
    n, t = 400_000, 0.6
    x0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x1 = 0.7 + 0.4 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    time = torch.full((n,), t, dtype=torch.float64)
    x_t, v = interpolate(x0, x1, time), velocity(x0, x1)
    # Both are linear in x_t: compare the least-squares line through v with the oracle's.
    design = torch.cat([torch.ones_like(x_t), x_t], 1)
    line = torch.linalg.lstsq(design, v).solution.flatten()
    at_0, at_1 = GAUSSIAN(
        torch.tensor([[0.0], [1.0]], dtype=torch.float64), time[:2], torch.zeros_like(time[:2])
    ).flatten()
    torch.testing.assert_close(line, torch.stack([at_0, at_1 - at_0]), atol=0.02, rtol=0)


def test_gaussian_noise_goes_with_its_velocity(generator):
    x, t, d = batch(generator)
    u = GAUSSIAN(x, t, 0 * d)
    torch.testing.assert_close(
        GAUSSIAN.noise(x, t), noise_from_velocity(x, u, t), atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("path", ["linear", "vp-cosine", "vp-linear"])
def test_gaussian_noise_is_the_conditional_mean_noise(generator, path):
    x0, noise = torch.randn(2, 400_000, 1, generator=generator, dtype=torch.float64)
    t = torch.full((len(x0),), 0.6, dtype=torch.float64)
    x_t = interpolate(x0, 0.7 + 0.4 * noise, t, path)
    design = torch.cat([torch.ones_like(x_t), x_t], 1)
    line = torch.linalg.lstsq(design, x0).solution.flatten()
    at_0, at_1 = GAUSSIAN.noise(torch.tensor([[0.0], [1.0]]).double(), t[:2], path).flatten()
    torch.testing.assert_close(line, torch.stack([at_0, at_1 - at_0]), atol=0.02, rtol=0)


def test_gaussian_straight_lines_join_the_ends_of_its_flow(generator):
    x0, t, _ = batch(generator)
    x1 = GAUSSIAN.flow_map(x0, 0 * t, 1 + 0 * t)
    v = GAUSSIAN.straight(interpolate(x0, x1, t), t)
    torch.testing.assert_close(v, velocity(x0, x1), atol=1e-12, rtol=0)


def test_mixture_of_one_is_the_gaussian(generator):
    x, t, d = batch(generator)
    one = GaussianMixture(torch.full((1, 2), 0.7, dtype=torch.float64), 0.4)
    torch.testing.assert_close(one(x, t, d), GAUSSIAN(x, t, d), atol=1e-9, rtol=0)
    zero = torch.zeros_like(d)
    torch.testing.assert_close(one(x, t, zero), GAUSSIAN(x, t, zero), atol=1e-13, rtol=0)


def test_mixture_integration_has_converged(generator):
    x, _, _ = batch(generator)
    mixture = ring()
    zero, one = torch.zeros(len(x)).double(), torch.ones(len(x)).double()
    finer = GaussianMixture(mixture.means, mixture.std, substeps=2 * mixture.substeps)
    error = (mixture.flow_map(x, zero, one) - finer.flow_map(x, zero, one)).norm(dim=1)
    assert error.median() < 1e-7
    assert error.max() < 1e-4  # next to a ridge between two modes the flow is stiff


def test_mixture_flow_map_carries_noise_to_the_mixture(generator):
    mixture = ring()
    x0 = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    ends = (torch.zeros(4000).double(), torch.ones(4000).double())
    made = mixture.flow_map(x0, *ends)
    exact, again = (mixture.sample(4000, generator)[0] for _ in range(2))
    floor = sliced_wasserstein(exact, again, generator=torch.Generator().manual_seed(1))
    distance = sliced_wasserstein(made, exact, generator=torch.Generator().manual_seed(1))
    assert distance < 2 * floor + 0.02


def test_mixture_weights_move_the_mass(generator):
    means = torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    mixture = GaussianMixture(means, 0.2, torch.tensor([0.9, 0.1], dtype=torch.float64))
    x0 = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    made = mixture.flow_map(x0, torch.zeros(4000).double(), torch.ones(4000).double())
    assert abs(float((made[:, 0] < 0).double().mean()) - 0.9) < 0.02
    drawn, component = mixture.sample(4000, generator)
    assert abs(float((component == 0).double().mean()) - 0.9) < 0.02
    assert ((drawn[:, 0] < 0) == (component == 0)).all()

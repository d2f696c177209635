import math
from typing import get_args

import pytest
import torch

from anystep import path

PATHS = get_args(path.PathName)
PRESERVING = [name for name in PATHS if name != "linear"]


@pytest.fixture
def points(generator):
    x0 = torch.randn(16, 3, 4, 6, generator=generator, dtype=torch.float64)
    x1 = torch.randn(16, 3, 4, 6, generator=generator, dtype=torch.float64)
    t = torch.rand(16, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return x0, x1, t


def test_ends_of_the_path(points):
    x0, x1, t = points
    assert torch.equal(path.interpolate(x0, x1, torch.zeros_like(t)), x0)
    assert torch.equal(path.interpolate(x0, x1, torch.ones_like(t)), x1)


def test_velocity_is_the_derivative_of_the_path(points):
    x0, x1, t = points
    _, derivative = torch.func.jvp(
        lambda t: path.interpolate(x0, x1, t), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(derivative, path.velocity(x0, x1))


def test_conversions_recover_noise_data_and_velocity(points):
    x0, x1, t = points
    x_t, v = path.interpolate(x0, x1, t), path.velocity(x0, x1)
    for found, true in (
        (path.data_from_velocity(x_t, v, t), x1),
        (path.noise_from_velocity(x_t, v, t), x0),
        (path.velocity_from_data(x_t, x1, t), v),
        (path.velocity_from_noise(x_t, x0, t), v),
        (path.data_from_noise(x_t, x0, t), x1),
        (path.noise_from_data(x_t, x1, t), x0),
    ):
        torch.testing.assert_close(found, true, atol=1e-12, rtol=0)


def test_a_step_along_the_velocity_stays_on_the_path(points):
    x0, x1, t = points
    d = (1 - t) / 3
    there = path.step(path.interpolate(x0, x1, t), path.velocity(x0, x1), d)
    torch.testing.assert_close(there, path.interpolate(x0, x1, t + d))


def test_times_broadcast_over_any_rank():
    t = torch.tensor([0.0, 1.0])
    for shape in ((2, 5), (2, 1, 2, 2), (2, 3, 4, 5, 6)):
        assert path.expand_to(t, torch.zeros(shape)).shape == (2,) + (1,) * (len(shape) - 1)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_preserving_paths_keep_the_variance_and_end_at_the_data(points, name):
    x0, x1, t = points
    alpha, sigma = path.coefficients(t, name)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-14, rtol=0)
    end = path.interpolate(x0, x1, torch.ones_like(t), name)
    torch.testing.assert_close(end, x1, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "signal"),
    [("linear", 0), ("vp-cosine", math.sin(0.005 * math.pi)), ("vp-linear", math.exp(-5.025))],
)
def test_the_signal_left_at_the_start_is_as_stated(name, signal):
    alpha, sigma = path.coefficients(torch.zeros(1, dtype=torch.float64), name)
    assert float(alpha) == pytest.approx(signal, abs=1e-15)
    stated = {"linear": 0.0, "vp-cosine": 0.0157, "vp-linear": 0.0066}
    assert round(signal, 4) == stated[name]
    assert float(sigma) == pytest.approx(math.sqrt(1 - signal**2), abs=1e-15)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signal_rises_and_noise_falls_all_along_a_path(name, dtype):
    alpha, sigma = path.coefficients(torch.linspace(0, 1, 129, dtype=dtype), name)
    assert (alpha.diff() > 0).all() and (sigma.diff() < 0).all()
    assert alpha.isfinite().all() and sigma.isfinite().all()


def test_the_linear_schedule_is_the_integral_of_its_beta(points):
    t = points[2]
    _, slope = torch.func.jvp(
        lambda t: path.coefficients(t, "vp-linear")[0].log(), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(slope, (0.1 + 19.9 * (1 - t)) / 2)


@pytest.mark.parametrize("name", PATHS)
def test_noise_and_data_give_each_other_on_every_path(points, name):
    x0, x1, t = points
    x_t = path.interpolate(x0, x1, t, name)
    for found, true in (
        (path.data_from_noise(x_t, x0, t, name), x1),
        (path.noise_from_data(x_t, x1, t, name), x0),
    ):
        torch.testing.assert_close(found, true, atol=1e-10, rtol=0)

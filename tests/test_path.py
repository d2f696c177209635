import pytest
import torch

from anystep import path


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

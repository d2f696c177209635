"""Conventions of time, noise and prediction: round trips, closed forms, diffusers' schedulers."""

import itertools

import pytest
import torch

from anystep.errors import UserError
from anystep.interop import conventions as conv
from anystep.oracle import Gaussian
from anystep.path import expand_to, interpolate
from anystep.sampling import sample

DDPM = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
CONVENTIONS = {
    "ours": conv.OURS,
    "rectified flow": conv.rectified_flow(),
    "rectified flow, timesteps": conv.rectified_flow(1000),
    "edm": conv.edm(),
    "trigflow": conv.trigflow(0.5),
    "timesteps": conv.timesteps(DDPM),
}
CASES = list(itertools.product(CONVENTIONS, ("velocity", "data", "noise")))
TRUTH = Gaussian(mean=0.7, std=0.4)


def batch(dtype=torch.float64, n=64):
    generator = torch.Generator().manual_seed(0)
    x0, x1, u = (torch.randn(n, 2, 3, generator=generator, dtype=dtype) for _ in range(3))
    t = torch.linspace(0.03, 0.97, n, dtype=dtype)
    return x0, x1, u, t


def posterior(a, b, z):
    """E[x1 | z] and E[x0 | z] for z = a x1 + b x0, x1 ~ N(mean, std^2), x0 ~ N(0, 1)."""
    residual = (z - a * TRUTH.mean) / ((a * TRUTH.std) ** 2 + b**2)
    return TRUTH.mean + a * TRUTH.std**2 * residual, b * residual


def closed_form(name, predicts, z, s):
    """What a perfect network of a convention answers, written down from its own paper."""
    s = expand_to(s, z)
    if name == "ours":
        a, b, slope = s, 1 - s, (1, -1)
    elif name.startswith("rectified"):
        s = s / (1000 if "timesteps" in name else 1)
        a, b, slope = 1 - s, s, (-1, 1)
    elif name == "edm":
        a, b, slope = torch.ones_like(s), s, (0, 1)
    elif name == "trigflow":
        a, b, slope = s.cos(), 0.5 * s.sin(), (-s.sin(), 0.5 * s.cos())
    else:
        share = DDPM[s.round().long()]
        a, b = share.sqrt(), (1 - share).sqrt()
        slope = (-b, a)
    data, noise = posterior(a, b, z)
    return {"data": data, "noise": noise, "velocity": slope[0] * data + slope[1] * noise}[predicts]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_times_and_points_come_back(name):
    theirs, (_, x1, _, t) = CONVENTIONS[name], batch()
    s = theirs.from_t(t)
    x = theirs.to_point(theirs.from_point(x1, t), s)
    errors = [float((a - b).abs().max()) for a, b in ((theirs.to_t(s), t), (x, x1))]
    print(f"{name}: times {errors[0]:.1e}, points {errors[1]:.1e}")
    assert max(errors) <= 1e-9
    assert ((s[1:] > s[:-1]) == (name == "ours")).all()  # theirs run from data to noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "predicts"), CASES)
def test_predictions_come_back(name, predicts, dtype):
    theirs, (_, x1, u, t) = CONVENTIONS[name], batch(dtype)
    t = t.clamp(0.1, 0.9)
    prediction = theirs.from_u(u, x1, t, predicts)
    again = theirs.to_u(prediction, theirs.from_point(x1, t), theirs.from_t(t), predicts)
    error = float((again - u).abs().max() / u.abs().max())
    print(f"{name}, {predicts}: {error:.1e}")
    assert prediction.dtype == dtype
    assert error <= (1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("name", "predicts"), CASES)
def test_a_perfect_network_has_the_oracle_s_velocity(name, predicts):
    theirs, (x0, _, _, t) = CONVENTIONS[name], batch()
    if name == "timesteps":  # the closed form above is for whole timesteps
        s = torch.linspace(5, 995, len(t), dtype=t.dtype).round()
        t = theirs.to_t(s)
    x_t = interpolate(x0, TRUTH.mean + TRUTH.std * x0.flip(0), t)
    net = conv.network(lambda z, s, cond: closed_form(name, predicts, z, s), theirs, predicts)
    u, truth = net(x_t, t, torch.zeros_like(t)), TRUTH(x_t, t, torch.zeros_like(t))
    error = float((u - truth).abs().max())
    back = theirs.from_u(truth, x_t, t, predicts)
    z, s = theirs.from_point(x_t, t), theirs.from_t(t)
    inverse = float((back - closed_form(name, predicts, z, s)).abs().max())
    print(f"{name}, {predicts}: u {error:.1e}, prediction {inverse:.1e}")
    assert max(error, inverse) <= 1e-6


@pytest.mark.parametrize(("name", "predicts"), CASES)
def test_our_sampler_starts_from_noise_in_any_convention(name, predicts):
    """At t = 0 some conventions are at infinity, or off their schedule."""
    if predicts == "noise" and (name == "ours" or name.startswith("rectified")):
        pytest.skip("noise says nothing of data at pure noise, where these start")
    theirs = CONVENTIONS[name]
    net = conv.network(lambda z, s, cond: closed_form(name, predicts, z, s), theirs, predicts)
    x0 = batch()[0]
    made = sample(net, x0, steps=512)
    exact = TRUTH.flow_map(x0, torch.zeros(len(x0)).double(), torch.ones(len(x0)).double())
    error = float((made - exact).abs().max())
    print(f"{name}, {predicts}: {error:.3f} from the exact flow")
    assert error <= 0.05


class TestSchedulersOfDiffusers:
    """Their own noising of data says the same as ours, once translated."""

    @pytest.fixture(autouse=True)
    def diffusers(self):
        self.module = pytest.importorskip("diffusers")

    def check(self, theirs, z, s, prediction, predicts):
        x0, x1, _, _ = batch()
        t = theirs.to_t(s)
        errors = [
            float((theirs.to_point(z, s) - interpolate(x0, x1, t)).abs().max()),
            float((theirs.to_u(prediction, z, s, predicts) - (x1 - x0)).abs().max()),
            float((theirs.from_t(t) - s).abs().max()),
        ]
        print(f"points {errors[0]:.1e}, velocity {errors[1]:.1e}, times {errors[2]:.1e}")
        assert max(errors) <= 1e-6

    def test_ddpm(self):
        scheduler = self.module.DDPMScheduler(beta_schedule="linear")
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        x0, x1, _, _ = batch()
        k = torch.linspace(5, 990, len(x0)).long()
        z = scheduler.add_noise(x1, x0, k)
        v = scheduler.get_velocity(x1, x0, k)
        theirs = conv.timesteps(scheduler.alphas_cumprod)
        self.check(theirs, z, k.double(), v, "velocity")
        self.check(theirs, z, k.double(), x0, "noise")

    def test_euler_s_sigmas(self):
        scheduler = self.module.EulerDiscreteScheduler()
        scheduler.set_timesteps(64)
        sigma = scheduler.sigmas[:-1].double()
        x0, x1, _, _ = batch()
        z = x1 + sigma[:, None, None] * x0
        noised = scheduler.add_noise(x1.float(), x0.float(), scheduler.timesteps)
        assert torch.allclose(z.float(), noised, atol=1e-3)  # of up to 400
        self.check(conv.edm(float(sigma[0])), z, sigma, x0, "noise")

    def test_flow_matching(self):
        scheduler = self.module.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(64)
        s, sigma = scheduler.timesteps.double(), scheduler.sigmas[:-1].double()
        x0, x1, _, _ = batch()
        z = scheduler.scale_noise(x1.float(), scheduler.timesteps, x0.float()).double()
        exact = (1 - sigma)[:, None, None] * x1 + sigma[:, None, None] * x0
        assert torch.allclose(z, exact, atol=1e-5)
        s = sigma * 1000
        self.check(conv.rectified_flow(1000), exact, s, x0 - x1, "velocity")
        self.check(conv.rectified_flow(), exact, sigma, x0 - x1, "velocity")


def test_what_is_no_prediction_or_schedule_is_refused():
    x0, _, u, t = batch()
    with pytest.raises(UserError, match="velocity, data or noise, not 'score'"):
        conv.OURS.from_u(u, x0, t, "score")
    with pytest.raises(UserError, match="falling"):
        conv.timesteps(DDPM.flip(0))

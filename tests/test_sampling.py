import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from anystep import registry
from anystep.errors import UserError
from anystep.evaluate import generate
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.oracle import Gaussian
from anystep.path import coefficients, expand_to
from anystep.sampling import draw, sample, schedule
from anystep.spec import Model, ModelSpec

ORACLE = Gaussian(mean=0.7, std=0.4)
SHORTCUT = Shortcut(M=128).spec(ModelSpec(shape=(2,), num_classes=3, data="raw"))
FLOW = FlowMatching().spec(ModelSpec(shape=(2,), num_classes=3, data="raw"))


class Recorder(torch.nn.Module):
    """A network that notes what it is asked and answers with the class id."""

    null_label = 3

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, t, d, cond=None):
        self.asked += [(float(a), float(b)) for a, b in zip(t, d, strict=True)][:1]
        return torch.zeros_like(x) + (0 if cond is None else cond.view(-1, 1))


def noise(n=512, seed=0, dim=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def ends(x):
    return torch.zeros(len(x)).double(), torch.ones(len(x)).double()


@pytest.mark.parametrize("steps", [*range(1, 34), 63, 64, 65, 100, 127, 128])
@pytest.mark.parametrize("order", ["fine_first", "coarse_first", "spread"])
def test_schedules_use_only_trained_sizes_on_their_own_grid(steps, order):
    grid = schedule(steps, SHORTCUT, order)
    assert len(grid) == steps
    now = 0.0
    for t, d in grid:
        assert t == now
        assert d in {2.0**-j for j in range(8)}
        assert (t / d).is_integer()
        now += d
    assert now == 1


def test_schedule_examples():
    assert schedule(3, SHORTCUT, "fine_first") == [(0, 0.25), (0.25, 0.25), (0.5, 0.5)]
    assert schedule(3, SHORTCUT, "coarse_first") == [(0, 0.5), (0.5, 0.25), (0.75, 0.25)]
    assert [d for _, d in schedule(6, SHORTCUT, "spread")] == [1 / 4, 1 / 8, 1 / 8] * 2
    assert schedule(3, FLOW)[1] == (1 / 3, 1 / 3)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 100, 128, 200])
def test_the_exact_flow_map_lands_in_any_number_of_steps(steps):
    x0 = noise()
    landed = sample(ORACLE, x0, steps=steps)
    torch.testing.assert_close(landed, ORACLE.flow_map(x0, *ends(x0)), atol=1e-12, rtol=0)


def test_euler_on_the_velocity_converges_with_order_one():
    x0 = noise()
    exact = ORACLE.flow_map(x0, *ends(x0))
    counts = [16, 32, 64, 128, 256]
    model = Model(OracleModule(), FLOW)
    errors = torch.tensor(
        [float((sample(model, x0, steps=n) - exact).norm()) for n in counts], dtype=torch.float64
    )
    slope = torch.log2(errors[1:] / errors[:-1])
    assert (slope + 1).abs().max() < 0.1


class OracleModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, d, cond=None):
        return ORACLE(x, t, d)


def test_what_the_network_is_asked_follows_the_spec():
    def asked(spec, steps):
        net = Recorder()
        sample(Model(net, spec), noise(2).float(), steps=steps, cond=torch.zeros(2).long())
        return net.asked

    assert asked(SHORTCUT, 3) == [(0, 0.5), (0.5, 0.25), (0.75, 0.25)]
    assert {d for _, d in asked(SHORTCUT, 128)} == {0}
    assert {d for _, d in asked(SHORTCUT, 200)} == {0}
    assert len(asked(SHORTCUT, 200)) == 200
    for steps in (1, 3, 4, 128):
        assert {d for _, d in asked(FLOW, steps)} == {0}


def test_a_bare_network_is_asked_the_step():
    net = Recorder()
    sample(net, noise(2).float(), steps=4)
    assert net.asked == [(k / 4, 1 / 4) for k in range(4)]


def test_guidance_is_applied_at_the_finest_level_only():
    cond = torch.tensor([1, 2])
    x0 = torch.zeros(2, 2)
    # The answer is the class id c, the null's is 3: guided u = 3 + w (c - 3).
    plain = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    wanted = 3 + 2 * (plain - 3)
    model = Model(Recorder(), SHORTCUT)
    torch.testing.assert_close(sample(model, x0, steps=128, cond=cond, guidance=2.0), wanted)
    with pytest.warns(UserWarning, match="left out of 4 of 4 steps: the null label was trained"):
        torch.testing.assert_close(sample(model, x0, steps=4, cond=cond, guidance=2.0), plain)
    forced = sample(model, x0, steps=4, cond=cond, guidance=2.0, force_guidance=True)
    torch.testing.assert_close(forced, wanted)
    with pytest.warns(UserWarning, match="left out of 28 of 100 steps"):
        sample(model, x0, steps=100, cond=cond, guidance=2.0)


def test_guidance_is_never_doubled_silently():
    guided = Shortcut(M=128, guidance=1.5).spec(ModelSpec(shape=(2,), num_classes=3))
    model = Model(Recorder(), guided)
    x0, cond = torch.zeros(2, 2), torch.tensor([1, 2])
    with pytest.warns(UserWarning, match=r"guidance 1.5 is already baked into"):
        few = sample(model, x0, steps=1, cond=cond, guidance=1.5)
    torch.testing.assert_close(few, cond.view(-1, 1).expand(2, 2).float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = sample(model, x0, steps=128, cond=cond, guidance=1.5)
    torch.testing.assert_close(many[0], torch.tensor([0.0, 0.0]))


def test_guidance_of_flow_matching_holds_at_any_step_count():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = sample(
            Model(Recorder(), FLOW),
            torch.zeros(2, 2),
            steps=3,
            cond=torch.tensor([1, 2]),
            guidance=2.0,
        )
    torch.testing.assert_close(out[:, 0], torch.tensor([-1.0, 1.0]))


def test_guidance_without_null_training_is_explained():
    spec = FlowMatching(label_dropout=0).spec(ModelSpec(shape=(2,), num_classes=3))
    with pytest.warns(UserWarning, match="null label was never trained"):
        sample(
            Model(Recorder(), spec),
            torch.zeros(2, 2),
            steps=2,
            cond=torch.tensor([1, 2]),
            guidance=2.0,
        )


def test_untrained_steps_are_warned_of():
    spec = replace(SHORTCUT, levels=(2, 3, 4, 5, 6, 7))
    with pytest.warns(UserWarning, match="steps of size 0.5 were never trained"):
        sample(Model(Recorder(), spec), torch.zeros(2, 2), steps=2)


def test_the_callback_sees_every_state():
    seen = []
    x0 = noise(4)
    last = sample(ORACLE, x0, steps=4, callback=lambda k, t, x: seen.append((k, t, x.clone())))
    assert [(k, t) for k, t, _ in seen] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    zero = torch.zeros(4).double()
    torch.testing.assert_close(seen[1][2], ORACLE.flow_map(x0, zero, zero + 0.5))
    assert torch.equal(seen[-1][2], last)


def test_noise_and_labels_follow_from_the_generator():
    def made(seed, **kwargs):
        return draw(SHORTCUT, 600, torch.Generator().manual_seed(seed), **kwargs)

    (a, la), (b, lb), (c, _) = made(1), made(1), made(2)
    assert torch.equal(a, b) and torch.equal(la, lb) and not torch.equal(a, c)
    assert la.bincount().min() > 150 and la.max() == 2
    assert made(1, label=2)[1].unique().tolist() == [2]
    assert torch.equal(made(1, label=2)[0], a)


def test_integers_of_other_libraries_are_step_counts():
    assert schedule(np.int64(3), SHORTCUT) == schedule(3, SHORTCUT)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4"])
def test_bad_step_counts(steps):
    with pytest.raises(UserError, match="steps must be a whole number of at least 1"):
        sample(ORACLE, noise(2), steps=steps)


def test_bad_requests():
    model = Model(Recorder(), SHORTCUT)
    x0 = torch.zeros(2, 2)
    for bad, message in (
        ({"cond": torch.tensor([0, 4])}, "out of range"),
        ({"cond": torch.tensor([0, -1])}, "out of range"),
        ({"cond": torch.tensor([0])}, "2 samples need 2 labels"),
        ({"guidance": 2.0}, "guidance needs"),
    ):
        with pytest.raises(UserError, match=message):
            sample(model, x0, steps=128, **bad)
    with pytest.raises(UserError, match="makes samples"):
        sample(model, torch.zeros(2, 3), steps=1)
    unconditional = Model(Recorder(), replace(SHORTCUT, num_classes=0))
    with pytest.raises(UserError, match="unconditional"):
        sample(unconditional, x0, steps=1, cond=torch.tensor([0, 0]))


@pytest.mark.parametrize("field", ["predicts", "path", "sampler"])
def test_a_spec_of_the_future_is_refused(field):
    with pytest.raises(UserError, match=f"cannot sample a model whose {field} is 'new'"):
        ModelSpec(**{field: "new"})


def test_a_spec_that_contradicts_itself_is_refused():
    for fields, message in (
        ({"predicts": "noise", "path": "vp-cosine"}, "by ddim or ancestral, not by 'euler'"),
        ({"sampler": "ddim"}, "by euler or consistency, not by 'ddim'"),
        ({"predicts": "noise", "sampler": "ddim"}, "predicts noise cannot be .* the linear path"),
        ({"path": "vp-linear"}, "predicts u cannot be .* the vp-linear path"),
        ({"finest": 100}, "power of two"),
    ):
        with pytest.raises(UserError, match=message):
            ModelSpec(**fields)


def test_a_step_is_one_network_call():
    net = Recorder()
    sample(
        Model(net, SHORTCUT), torch.zeros(2, 2), steps=128, cond=torch.tensor([0, 1]), guidance=2.0
    )
    assert len(net.asked) == 128


# --- samplers of other methods ------------------------------------------------------------------

PRESERVING = ["vp-cosine", "vp-linear"]


class NoisePrediction(torch.nn.Module):
    """E[x0 | x_t] of the Gaussian of `ORACLE` on a variance-preserving path, in closed form."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, d, cond=None):
        alpha, sigma = coefficients(expand_to(t, x), self.path)
        return sigma * (x - alpha * ORACLE.mean) / ((alpha * ORACLE.std) ** 2 + sigma**2)


def noise_model(path, **fields):
    """That prediction as a model sampled by DDIM."""
    spec = ModelSpec(
        shape=(2,),
        data="raw",
        predicts="noise",
        path=path,
        step_input="zero",
        levels=(7,),
        sampler="ddim",
    )
    return Model(NoisePrediction(path), replace(spec, **fields))


def exact_end(x0, path):
    """Where the probability-flow ODE of a variance-preserving path carries x0."""
    alpha, sigma = coefficients(torch.zeros(1, dtype=torch.float64), path)
    scale = ((alpha * ORACLE.std) ** 2 + sigma**2).sqrt()
    return ORACLE.mean + ORACLE.std / scale * (x0 - alpha * ORACLE.mean)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", PRESERVING)
def test_ddim_converges_to_the_exact_flow_with_order_one(path):
    x0, model = noise(), noise_model(path)
    exact = exact_end(x0, path)
    errors = torch.stack(
        [(sample(model, x0, steps=n) - exact).norm() for n in (128, 256, 512, 1024)]
    )
    slope = torch.log2(errors[1:] / errors[:-1])
    assert (slope + 1).abs().max() < 0.04
    extrapolated = 2 * sample(model, x0, steps=1024) - sample(model, x0, steps=512)
    torch.testing.assert_close(extrapolated, exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("path", PRESERVING)
def test_one_ddim_step_is_the_predicted_data(path):
    x0, model = noise(), noise_model(path)
    alpha, sigma = coefficients(torch.zeros(1, dtype=torch.float64), path)
    predicted = (x0 - sigma * model.net(x0, torch.zeros(len(x0)).double(), None)) / alpha
    torch.testing.assert_close(sample(model, x0, steps=1), predicted)


@pytest.mark.parametrize("path", PRESERVING)
def test_ancestral_samples_are_distributed_as_the_data(path):
    x0, model = noise(20_000), noise_model(path)
    stds = []
    for steps in (16, 64, 256):
        x = sample(model, x0, steps=steps, sampler="ancestral", generator=seeded(1))
        assert float(x.mean()) == pytest.approx(ORACLE.mean, abs=0.01)
        stds.append(float(x.std()))
    errors = [ORACLE.std - std for std in stds]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and abs(errors[2]) < 0.015
    ddim = sample(model, x0, steps=256)
    correlation = torch.corrcoef(torch.stack([x.flatten(), ddim.flatten()]))[0, 1]
    assert abs(correlation) < 0.05  # nothing is left of x0


def test_one_ancestral_step_has_the_moments_of_the_posterior():
    # DDPM: x_s given x_t and the predicted x1, with variance (1 - a_s) / (1 - a_t) (1 - a_t / a_s)
    # and mean (sqrt(a_s) (1 - a_t / a_s) x1 + sqrt(a_t / a_s) (1 - a_s) x_t) / (1 - a_t).
    x0, model = torch.full((200_000, 2), 0.3).double(), noise_model("vp-cosine")
    states = []
    sample(
        model,
        x0,
        steps=2,
        sampler="ancestral",
        generator=seeded(2),
        callback=lambda k, t, x: states.append(x),
    )
    times = torch.tensor([0, 0.5], dtype=torch.float64)
    (a, a_s), _ = ((c**2).tolist() for c in coefficients(times, "vp-cosine"))
    x1 = float(sample(model, x0[:1], steps=1)[0, 0])
    mean = (a_s**0.5 * (1 - a / a_s) * x1 + (a / a_s) ** 0.5 * (1 - a_s) * 0.3) / (1 - a)
    variance = (1 - a_s) / (1 - a) * (1 - a / a_s)
    assert float(states[0].mean()) == pytest.approx(mean, abs=0.01)
    assert float(states[0].var()) == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_consistency_with_the_exact_map_has_the_exact_distribution(steps):
    x0 = noise(20_000)
    spec = replace(SHORTCUT, num_classes=0, levels=(), sampler="consistency")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that a shortcut model was not trained for
        x = sample(Model(OracleModule(), spec), x0, steps=steps)
    exact = ORACLE.flow_map(x0, *ends(x0))
    if steps == 1:
        torch.testing.assert_close(x, exact, atol=1e-12, rtol=0)
    assert float(x.mean()) == pytest.approx(ORACLE.mean, abs=0.01)
    assert float(x.std()) == pytest.approx(ORACLE.std, abs=0.01)
    assert (steps == 1) == (float((x - exact).abs().mean()) < 1e-3)


def test_consistency_asks_for_the_step_to_the_end():
    def asked(spec, steps):
        net = Recorder()
        sample(Model(net, spec), noise(2).float(), steps=steps, sampler="consistency")
        return net.asked

    with pytest.warns(UserWarning, match="steps of size 0.75 were never trained"):
        assert asked(SHORTCUT, 4) == [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    assert asked(FLOW, 2) == [(0, 0), (0.5, 0)]
    with pytest.warns(UserWarning, match=r"0.0234375, 0.0390625, 0.046875, \.\.\. were never"):
        asked(SHORTCUT, 128)


def test_a_consistency_step_goes_back_with_fresh_noise():
    states = []
    x0, model = torch.zeros(1, 2), Model(Recorder(), FLOW)
    cond = torch.tensor([2])  # the answer, so x1 = x + 2 (1 - t)
    kwargs = {"steps": 2, "sampler": "consistency", "generator": seeded(5)}
    x = sample(model, x0, cond=cond, callback=lambda k, t, x: states.append(x), **kwargs)
    z = torch.randn(1, 2, generator=seeded(5))
    torch.testing.assert_close(states[0], 0.5 * z + 0.5 * 2)
    torch.testing.assert_close(x, states[0] + 0.5 * 2)


NOISY = [("consistency", Model(OracleModule(), SHORTCUT)), ("ancestral", noise_model("vp-cosine"))]


@pytest.mark.parametrize(("sampler", "model"), NOISY)
def test_noise_on_the_way_follows_from_the_generator(sampler, model):
    def made(generator=None, seed=3):
        return sample(model, noise(8, seed), steps=2, sampler=sampler, generator=generator)

    assert torch.equal(made(), made())
    assert torch.equal(made(seeded(1)), made(seeded(1)))
    assert not torch.equal(made(seeded(1)), made(seeded(2)))
    assert not torch.equal(made(), made(seed=4))
    before = torch.random.get_rng_state()
    made()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_noise_on_the_way_is_not_the_noise_of_the_start(seed):
    x0, model = torch.randn(64, 2, generator=seeded(seed)), Model(Recorder(), FLOW)
    states = []
    sample(model, x0, steps=2, sampler="consistency", callback=lambda k, t, x: states.append(x))
    fresh = 2 * states[0] - x0  # the network says u = 0, so x1 = x0
    assert (fresh - x0).abs().max() > 1


def test_generated_samples_have_noise_of_their_own_on_the_way():
    class Still(OracleModule):
        def forward(self, x, t, d, cond=None):
            return torch.zeros_like(x)

    def noises(seed):
        """x0 and the z of two steps, from x = (x0 + z) / 2."""
        x, _ = generate(
            Model(Still(), FLOW), 6, steps=2, seed=seed, sampler="consistency", batch=3
        )
        x0, _ = generate(Model(Still(), FLOW), 6, steps=2, seed=seed, batch=3)
        return x0, 2 * x - x0

    (x0, z), (_, other) = noises(0), noises(1)
    parts = [*x0.split(3), *z.split(3), *other.split(3)]
    for k, a in enumerate(parts):
        assert all((a - b).abs().max() > 0.1 for b in parts[:k])


@pytest.mark.parametrize(("sampler", "model"), NOISY)
def test_the_same_seed_generates_the_same_samples(sampler, model):
    a, b, c = (
        generate(model, 300, steps=2, seed=seed, sampler=sampler, batch=100)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len(a.unique(dim=0)) == 300


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_predicted_data_are_bounded(sampler):
    x0 = noise(2000)
    free = sample(noise_model("vp-cosine"), x0, steps=64, sampler=sampler)
    assert free.max() > 1.5
    bounded = sample(noise_model("vp-cosine", bound=0.9), x0, steps=64, sampler=sampler)
    assert bounded.abs().max() < 0.9 + 1e-6
    assert (bounded.abs() < 0.85).float().mean() > 0.4  # and not all pushed to the bound


def test_bounded_data_and_their_noise_still_make_up_the_state():
    model, x0, states = noise_model("vp-cosine", bound=0.1), noise(8), []
    sample(model, x0, steps=2, callback=lambda k, t, x: states.append(x))
    (alpha, alpha_s), (sigma, sigma_s) = (
        c.tolist() for c in coefficients(torch.tensor([0, 0.5]).double(), "vp-cosine")
    )
    x1 = sample(noise_model("vp-cosine"), x0, steps=1).clamp(-0.1, 0.1)
    torch.testing.assert_close(states[0], sigma_s * (x0 - alpha * x1) / sigma + alpha_s * x1)


def test_the_consistency_sampler_keeps_to_the_bound_at_every_step():
    model = Model(OracleModule(), replace(FLOW, bound=0.5, sampler="consistency"))
    x = sample(model, noise(2000), steps=4)
    assert x.abs().max() == pytest.approx(0.5) and x.abs().min() < 0.1


def test_the_sampler_of_the_spec_is_used_and_may_be_overridden():
    x0, consistency = noise(), Model(OracleModule(), replace(FLOW, sampler="consistency"))
    euler = Model(OracleModule(), FLOW)
    assert torch.equal(
        sample(consistency, x0, steps=4, sampler="euler"), sample(euler, x0, steps=4)
    )
    assert torch.equal(
        sample(euler, x0, steps=4, sampler="consistency"), sample(consistency, x0, steps=4)
    )
    assert not torch.equal(sample(euler, x0, steps=4), sample(consistency, x0, steps=4))


def test_a_sampler_that_does_not_fit_is_refused():
    for net, sampler in (
        (Model(OracleModule(), FLOW), "ddim"),
        (Model(OracleModule(), FLOW), "ancestral"),
        (ORACLE, "ddim"),
        (noise_model("vp-linear"), "euler"),
        (noise_model("vp-linear"), "consistency"),
        (ORACLE, "heun"),
    ):
        with pytest.raises(UserError, match=f"is sampled by .*, not by '{sampler}'"):
            sample(net, noise(2), steps=2, sampler=sampler)


def test_a_flag_is_raised_below_the_finest_step_count_only():
    spec = replace(SHORTCUT, step_input="flag", finest=8, levels=(0, 3), null_levels=(3,))
    for steps in (1, 2, 3, 5, 7, 8, 9, 20):
        net = Recorder()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(Model(net, spec), noise(2).float(), steps=steps)
        assert [d for _, d in net.asked] == [float(steps < 8)] * steps
        assert [t for t, _ in net.asked] == pytest.approx([k / steps for k in range(steps)])
        assert schedule(steps, spec) == [(k / steps, 1 / steps) for k in range(steps)]
    net = Recorder()
    with pytest.warns(UserWarning, match="left out of 4 of 4 steps"):
        sample(
            Model(net, spec),
            torch.zeros(2, 2),
            steps=4,
            cond=torch.tensor([0, 1]),
            guidance=2.0,
        )


def test_what_a_spec_claims():
    assert all(SHORTCUT.in_regime(n) for n in (1, 128, 1000))
    few, many = replace(SHORTCUT, claims=(1, 4)), replace(SHORTCUT, claims=(32, None))
    assert [few.in_regime(n) for n in (1, 4, 5)] == [True, True, False]
    assert [many.in_regime(n) for n in (31, 32, 128)] == [False, True, True]


def test_every_field_of_a_spec_survives_json():
    spec = noise_model("vp-linear", bound=1.5, claims=(32, None)).spec
    flag = replace(SHORTCUT, step_input="flag", sampler="consistency", claims=(1, 4))
    for one in (spec, flag):
        assert registry.from_json(ModelSpec, json.loads(json.dumps(registry.to_json(one)))) == one

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from anystep.errors import UserError
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.oracle import Gaussian
from anystep.sampling import draw, sample, schedule
from anystep.spec import Model, ModelSpec

ORACLE = Gaussian(mean=0.7, std=0.4)
SHORTCUT = Shortcut().spec(ModelSpec(shape=(2,), num_classes=3, data="raw"))
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
    guided = Shortcut(guidance=1.5).spec(ModelSpec(shape=(2,), num_classes=3))
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


def test_a_spec_of_the_future_is_refused():
    with pytest.raises(UserError, match="cannot sample"):
        ModelSpec(predicts="noise")
    with pytest.raises(UserError, match="power of two"):
        ModelSpec(finest=100)


def test_a_step_is_one_network_call():
    net = Recorder()
    sample(
        Model(net, SHORTCUT), torch.zeros(2, 2), steps=128, cond=torch.tensor([0, 1]), guidance=2.0
    )
    assert len(net.asked) == 128

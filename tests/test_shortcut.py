from dataclasses import fields, replace

import pytest
import torch

from anystep.errors import UserError
from anystep.objectives import Batch, Models
from anystep.objectives.shortcut import Shortcut, two_step_target
from anystep.oracle import Gaussian, ring
from anystep.path import interpolate
from anystep.spec import ModelSpec
from conftest import small_net


def dyadic(generator, n=256, dim=2):
    """Points, and steps of the trained sizes on their own grids."""
    level = torch.randint(7, (n,), generator=generator)
    d = torch.exp2(-level.double())
    t = (torch.rand(n, generator=generator, dtype=torch.float64) / d).floor() * d
    return torch.randn(n, dim, generator=generator, dtype=torch.float64), t, d


def test_the_gaussians_exact_u_is_its_own_target(generator):
    oracle = Gaussian(mean=0.7, std=0.4)
    x, t, d = dyadic(generator)
    target = two_step_target(oracle, x, t, d, None)
    assert (target - oracle(x, t, d)).abs().max() <= 1e-10


def test_the_mixtures_exact_u_is_its_own_target(generator):
    x, t, d = dyadic(generator, n=32)
    target = two_step_target(ring(), x, t, d, None)
    error = (target - ring()(x, t, d)).norm(dim=1)
    assert error.median() < 1e-6 and error.max() < 1e-3


def test_a_wrong_u_is_not_its_own_target(generator):
    x, t, d = dyadic(generator)

    def velocity_everywhere(x, t, d, cond=None):
        return Gaussian(0.7, 0.4)(x, t, 0 * d)

    target = two_step_target(velocity_everywhere, x, t, d, None)
    assert (target - velocity_everywhere(x, t, d)).abs().max() > 0.1


def test_guidance_reaches_the_asked_rows_only():
    def net(x, t, d, cond):
        return cond.view(-1, 1).to(x)

    x, t, d = torch.zeros(3, 1), torch.zeros(3), torch.ones(3)
    cond, null = torch.tensor([1, 2, 4]), torch.full((3,), 9)
    rows = torch.tensor([True, False, True])

    def target(**kwargs):
        return two_step_target(net, x, t, d, cond, null_cond=null, **kwargs).flatten().tolist()

    assert target() == [1, 2, 4]
    assert target(guidance=2.0) == [-7, -5, -1]
    assert target(guidance=2.0, guided_rows=rows) == [-7, 2, -1]
    assert target(guidance=torch.tensor([2.0, 2.0, 1.0]), guided_rows=rows) == [-7, 2, 4]
    assert target(guidance=torch.tensor(1.0)) == [1, 2, 4]
    assert target(guidance=2.0, guided_rows=rows.numpy()) == [-7, 2, -1]
    assert target(guidance=2.0, clip_target=3) == [-3, -3, -1]


def test_the_midpoint_alone_is_clipped():
    def net(x, t, d, cond):
        return 10 * torch.ones_like(x) + x

    x, t, d = torch.zeros(1, 1), torch.zeros(1), torch.ones(1)
    assert two_step_target(net, x, t, d, None).item() == (10 + 15) / 2
    assert two_step_target(net, x, t, d, None, clip_midpoint=4).item() == (10 + 14) / 2
    assert two_step_target(net, x, t, d, None, clip_target=4).item() == 4


@pytest.mark.parametrize("rows", [1, 4, 7, 16, 32, 64])
def test_every_level_gets_its_share(rows):
    counts = torch.zeros(7)
    shapes = set()
    for seed in range(400):
        level = Shortcut(M=128).draw_levels(rows, torch.Generator().manual_seed(seed))
        shapes.add(level.shape)
        fixed = level[rows % 7 :]
        assert fixed.tolist() == sorted(fixed.tolist(), reverse=True)
        assert (level.bincount(minlength=7) >= rows // 7).all()
        counts += level.bincount(minlength=7)
    assert shapes == {(rows,)}
    expected = 400 * rows / 7
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_the_authors_split_gives_the_remainder_to_one_step(generator):
    authors = replace(Shortcut.authors(), bootstrap_share=0.25)
    levels = authors.draw_levels(16, generator).bincount(minlength=7)
    assert levels.tolist() == [4, 2, 2, 2, 2, 2, 2]
    assert authors.draw_levels(4, generator).tolist() == [0, 0, 0, 0]


class Spy(torch.nn.Module):
    """A network that keeps what it is asked."""

    null_label = 4

    def __init__(self):
        super().__init__()
        self.calls = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, d, cond=None):
        self.calls.append((x.detach(), t, d, cond))
        return self.weight * x


def spied(objective, batch=64, seed=0, target_is_net=False):
    net, ema = Spy(), Spy()
    x1 = torch.arange(batch).float().view(-1, 1).expand(batch, 3) * 1000
    models = Models(net, None if target_is_net else ema)
    data = Batch(x1, torch.arange(batch) % 4)
    objective(models, data, 0.0, torch.Generator().manual_seed(seed))
    return net.calls, ema.calls


def test_rows_times_and_steps_are_as_the_method_says():
    (call,), targets = spied(Shortcut(M=128, bootstrap_share=0.25, label_dropout=0.5))
    x, t, d, cond = call
    assert (d[:16] > 0).all() and (d[16:] == 0).all()
    assert ((t[:16] / d[:16]) % 1 == 0).all() and (t[:16] + d[:16] <= 1).all()
    assert ((t[16:] * 128) % 1 != 0).any()
    assert torch.equal(cond[:16], torch.arange(16) % 4)  # bootstrap labels are never dropped
    assert 0 < (cond[16:] == 4).sum() < 48
    # Flow and bootstrap rows show different images: row k holds image k, scaled by t.
    image = ((x - (1 - t.view(-1, 1)) * 0) / t.view(-1, 1) / 1000).mean(1)
    seen = t > 0.2
    assert (image[seen] - torch.arange(64)[seen]).abs().max() < 0.1
    # The target network is asked twice, for half the step, at t and then t + d/2.
    assert len(targets) == 2
    for k, (_, t_k, d_k, _) in enumerate(targets):
        assert torch.equal(d_k, d[:16] / 2)
        assert torch.equal(t_k, t[:16] + k * d[:16] / 2)


def test_target_network_is_the_ema_or_the_network_itself():
    net_calls, ema_calls = spied(Shortcut(M=128))
    assert (len(net_calls), len(ema_calls)) == (1, 2)
    net_calls, ema_calls = spied(Shortcut(M=128, target_ema=None), target_is_net=True)
    assert (len(net_calls), len(ema_calls)) == (3, 0)


def test_grid_times():
    (call,), _ = spied(Shortcut(M=128, bootstrap_share=0.25, grid_times=True))
    assert ((call[1] * 128) % 1 == 0).all()


def test_flow_rows_have_independent_noise():
    net = Spy()
    Shortcut(M=128, bootstrap_share=0.5)(
        Models(net, Spy()), Batch(torch.zeros(64, 500)), 0.0, torch.Generator().manual_seed(0)
    )
    x, t, _, _ = net.calls[0]
    noise = x / (1 - t.view(-1, 1))
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 0.3


@pytest.mark.parametrize("batch", [8, 64, 128])
@pytest.mark.parametrize("level", [None, 3])
def test_guided_targets_ask_a_fixed_number_of_rows(batch, level):
    objective = Shortcut(M=128, guidance=1.5, guidance_level=level)
    sizes = set()
    for seed in range(20):
        _, targets = spied(objective, batch, seed)
        sizes |= {len(call[0]) for call in targets}
    rows = objective.bootstrap_rows(batch)
    assert sizes == {rows + rows % 7 + rows // 7}


def test_guided_level_is_guided_whatever_row_it_falls_in():
    objective = Shortcut(M=128, guidance=3.0)

    class Constant(Spy):
        def forward(self, x, t, d, cond=None):
            return cond.view(-1, 1).expand_as(x).float()

    for rows in (3, 16, 64):
        level = objective.draw_levels(rows, torch.Generator().manual_seed(rows))
        d = torch.exp2(-level.float())
        cond, null = torch.ones(rows).long(), torch.full((rows,), 4)
        target = objective.bootstrap_target(
            Models(Constant(), Constant()), torch.zeros(rows, 1), 0 * d, d, level, cond, null
        ).flatten()
        assert torch.equal(target, torch.where(level == 6, 4 + 3 * (1 - 4), 1).float())


def test_spec_says_what_was_trained():
    base = ModelSpec(shape=(3,), num_classes=4)
    spec = Shortcut(M=32, guidance=1.5).spec(base)
    assert (spec.finest, spec.levels, spec.null_levels) == (32, (0, 1, 2, 3, 4, 5), (5,))
    assert (spec.guidance, spec.guided_levels) == (1.5, (0, 1, 2, 3, 4))
    assert Shortcut(M=128, label_dropout=0).spec(base).null_levels == ()
    with pytest.warns(UserWarning, match="level 2 ask the null label at level 3"):
        Shortcut(M=128, guidance=1.5, guidance_level=2).spec(base)
    with pytest.raises(UserError, match="labels"):
        Shortcut(M=128, guidance=1.5).spec(replace(base, num_classes=0))


def test_presets_are_the_published_constants():
    paper, authors = Shortcut.paper(), Shortcut.authors()
    assert (paper.bootstrap_share, paper.target_ema, paper.clip, paper.M) == (
        0.25,
        0.999,
        None,
        128,
    )
    assert (authors.bootstrap_share, authors.clip, authors.grid_times) == (0.125, 4.0, True)
    assert authors.remainder == "coarsest"


CHANGES = {
    "M": 32,
    "bootstrap_share": 0.25,
    "target_ema": None,
    "guidance": 1.5,
    "guidance_level": 2,
    "clip": 0.1,
    "label_dropout": 0.9,
    "remainder": "coarsest",
    "grid_times": True,
}


@pytest.mark.parametrize("field", [f.name for f in fields(Shortcut)])
def test_every_field_changes_the_loss(field):
    base = Shortcut(M=128, guidance=1.2) if field == "guidance_level" else Shortcut(M=128)
    net, shape = small_net("mlp")
    ema, _ = small_net("mlp", seed=1)
    x1 = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))

    def loss(objective):
        models = Models(net, None if objective.target_ema is None else ema)
        batch = Batch(x1, torch.arange(24) % 4)
        return objective(models, batch, 0.0, torch.Generator().manual_seed(3)).per_example

    changed = replace(base, **{field: CHANGES[field]})
    assert not torch.equal(loss(base), loss(changed))


def test_bad_fields():
    for bad in (
        {"M": 100},
        {"M": 1},
        {"bootstrap_share": 1.0},
        {"guidance_level": 7},
        {"clip": 0},
        {"guidance": 2.0, "label_dropout": 0.0},
    ):
        with pytest.raises(UserError):
            Shortcut(**bad)
    with pytest.raises(UserError, match="at least 2 rows"):
        Shortcut(M=128).bootstrap_rows(1)


def test_losses_are_reported_by_level(generator):
    net, shape = small_net("mlp")
    x1 = torch.randn(64, *shape, generator=generator)
    loss = Shortcut(M=128, bootstrap_share=0.5)(Models(net, net), Batch(x1), 0.0, generator)
    names = ["loss/flow", "loss/d=1"] + [f"loss/d=1/{2**j}" for j in range(1, 7)]
    assert set(loss.metrics) == set(names)
    flow = loss.per_example[32:].mean()
    torch.testing.assert_close(loss.metrics["loss/flow"], flow.detach())


def test_x_t_is_on_the_path(generator):
    net = Spy()
    x1, x0 = torch.ones(64, 3), torch.zeros(64, 3)
    Shortcut(M=128)(Models(net, Spy()), Batch(x1, None, x0), 0.0, generator)
    x, t, _, _ = net.calls[0]
    torch.testing.assert_close(x, interpolate(x0, x1, t))

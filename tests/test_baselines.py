"""The baselines: parity with the authors' own code (fixtures/README.md), and their parts."""

from dataclasses import replace

import pytest
import torch

from anystep.errors import UserError
from anystep.interop.kvfrans import load_network
from anystep.objectives import (
    Batch,
    Models,
    consistency_distillation,
    consistency_training,
    live_reflow,
    progressive_distillation,
    squared_error,
)
from anystep.objectives._endpoint import endpoint_target
from anystep.objectives._two_steps import two_step_target
from anystep.objectives.consistency_distillation import ConsistencyDistillation, teacher_step
from anystep.objectives.consistency_training import ConsistencyTraining, pseudo_huber
from anystep.objectives.diffusion import Diffusion
from anystep.objectives.live_reflow import LiveReflow, simulate
from anystep.objectives.progressive_distillation import ProgressiveDistillation
from anystep.objectives.reflow import Reflow
from anystep.objectives.shortcut import Shortcut
from anystep.spec import Model, ModelSpec
from conftest import small_net

TOLERANCE = 1e-5
SIGMA = 1 - 1e-5  # their x_t = (1 - SIGMA t) x0 + t x1
PROGRESS = 350 / 800  # where the fixture stands in the run


class Theirs:
    """What the authors computed for one method."""

    def __init__(self, official, method):
        self.official, self.method = official, method
        self.x_t, self.x0, self.v_t = (official[f"{method}_{k}"] for k in ("x_t", "x0", "v_t"))
        self.t = torch.from_numpy(official[f"{method}_t"])
        self.labels = torch.from_numpy(official[f"{method}_labels"]).long()
        self.images = official["images"]

    def network(self, prefix):
        """Their network with one of the fixture's four sets of weights."""
        params = {
            k.removeprefix(prefix): v for k, v in self.official.items() if k.startswith(prefix)
        }
        return load_network(params, num_heads=3, patch_size=2, image_size=8)

    def told_nothing(self, prefix):
        """The same, but always asked their level 0, which is d = 1, as all but two methods do."""
        net = self.network(prefix)
        return lambda x, t, d, cond: net(x, t, torch.ones_like(d), cond)

    def point(self, t, rows=slice(None), x1=None):
        """x_t as they interpolate."""
        t = t.view(-1, 1, 1, 1)
        x1 = self.images[rows] if x1 is None else x1
        return (1 - SIGMA * t) * self.x0[rows] + t * x1


@pytest.fixture
def theirs(official, request):
    return Theirs(official, request.param)


def of(method):
    return pytest.mark.parametrize("theirs", [method], indirect=True)


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@of("livereflow")
def test_live_reflow_targets(theirs):
    rows = 16
    made = simulate(
        theirs.network("params/"),
        theirs.x0[:rows],
        8,
        theirs.labels[:rows],
        guidance=1.5,
        null_cond=torch.full((rows,), 10),
    )
    x_t = theirs.point(theirs.t[:rows], slice(rows), made)
    assert relative_error(x_t, theirs.x_t[:rows]) <= TOLERANCE
    assert relative_error(made - theirs.x0[:rows], theirs.v_t[:rows]) <= TOLERANCE
    assert (theirs.official["livereflow_dt_base"] == [0] * rows + [7] * 48).all()


@of("ct")
def test_consistency_training_targets(theirs):
    bins = ConsistencyTraining.authors().bins_at(PROGRESS)
    assert bins == 2 ** theirs.official["ct_dt_base"]
    assert (theirs.t * bins % 1 == 0).all() and theirs.t.max() == 1 - 1 / bins
    s = theirs.t + 1 / bins
    target = endpoint_target(
        theirs.told_nothing("ema_params/"),
        *(theirs.point(s), s, theirs.x_t, theirs.t, theirs.labels),
    )
    assert relative_error(target, theirs.v_t) <= TOLERANCE


@of("cd")
def test_consistency_distillation_targets(theirs):
    d = 1 / ConsistencyDistillation.authors().M
    assert (theirs.t / d % 1 == 0).all() and (theirs.official["cd_dt_base"] == 7).all()

    def target(clip):
        teacher = theirs.told_nothing("teacher_ema_params/")
        x_s = teacher_step(teacher, theirs.x_t, theirs.t, d, theirs.labels, clip=clip)
        net = theirs.told_nothing("ema_params/")
        return endpoint_target(net, x_s, theirs.t + d, theirs.x_t, theirs.t, theirs.labels)

    assert relative_error(target(4), theirs.v_t) <= TOLERANCE
    assert relative_error(target(None), theirs.v_t) > 1e-2


@of("pd")
def test_progressive_distillation_targets(theirs):
    objective = ProgressiveDistillation.authors()
    size = 2.0 ** (objective.phase(PROGRESS) + 1) / objective.M
    assert size == 2.0 ** -theirs.official["pd_dt_base"][0]
    assert (theirs.t / size % 1 == 0).all() and theirs.t.max() == 1 - size

    def target(**clips):
        return two_step_target(
            theirs.told_nothing("teacher_ema_params/"),
            theirs.x_t,
            theirs.t,
            torch.full_like(theirs.t, size),
            theirs.labels,
            **clips,
        )

    assert relative_error(target(clip_midpoint=4), theirs.v_t) <= TOLERANCE
    assert relative_error(target(), theirs.v_t) > 1e-2


WHOLE = {
    "livereflow": (replace(LiveReflow.authors(), reflow_share=0.25, guidance=1.5), live_reflow),
    "ct": (ConsistencyTraining.authors(), consistency_training),
    "cd": (ConsistencyDistillation.authors(), consistency_distillation),
    "pd": (ProgressiveDistillation.authors(), progressive_distillation),
}


@pytest.mark.parametrize("theirs", WHOLE, indirect=True)
@torch.no_grad()
def test_losses_of_whole_batches(theirs, monkeypatch):
    """Given their times, noise and labels; our SIGMA is 1, which is the tolerance."""
    objective, module = WHOLE[theirs.method]
    monkeypatch.setattr(module, "uniform_times", lambda *_: theirs.t)
    parts = ("params/", "ema_params/", "teacher_ema_params/")
    if theirs.method == "livereflow":
        monkeypatch.setattr(module, "drop_condition", lambda cond, *_, **__: cond)
        spec = objective.spec(ModelSpec(shape=(4, 8, 8), num_classes=10))
        models = Models(Model(theirs.network("params/"), spec))
        images = torch.cat([theirs.images[:16], theirs.images[:48]])
        net = theirs.network("params/")
        d = torch.exp2(-torch.from_numpy(theirs.official["livereflow_dt_base"]))
    else:
        models = Models(*(theirs.told_nothing(part) for part in parts))
        images, net, d = theirs.images, models.net, theirs.t
    batch = Batch(images, theirs.labels, theirs.x0)
    loss = objective(models, batch, PROGRESS, torch.Generator()).per_example
    u = net(theirs.x_t, theirs.t, d, theirs.labels)
    assert relative_error(loss, squared_error(u, theirs.v_t)) < 1e-4


class Spy(torch.nn.Module):
    """A network that keeps what it is asked and says half of x."""

    null_label = 4

    def __init__(self):
        super().__init__()
        self.calls = []
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, d, cond=None):
        self.calls.append((x.detach(), t, d, cond))
        return self.weight * x


def asked(objective, progress=0.0, batch=64, cond=None):
    """What the network, the EMA and the teacher are asked, and the loss."""
    models = Models(Spy(), None if objective.target_ema is None else Spy(), Spy())
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, batch, 3, generator=generator)
    loss = objective(models, Batch(x1, cond, x0), progress, generator)
    return *(None if model is None else model.calls for model in models), loss


def on_the_grid(t, size):
    return bool((t / size % 1 == 0).all() and (t + size <= 1).all())


@pytest.mark.parametrize("phase", range(7))
def test_progressive_distillation_is_a_shortcut_whose_ema_is_the_teacher(phase):
    net, other = (small_net("mlp", seed=seed)[0] for seed in (0, 1))
    calls = []
    net.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    batch = Batch(torch.randn(24, 5), torch.arange(24) % 4)
    loss = ProgressiveDistillation()(
        Models(net, None, other), batch, phase / 7, torch.Generator().manual_seed(0)
    )
    ((x_t, t, d, cond),) = calls
    level = torch.full((24,), 6 - phase)
    assert torch.equal(d, torch.exp2(-level.float()))
    target = Shortcut().bootstrap_target(Models(net, other), x_t, t, d, level, cond, None)
    expected = squared_error(net(x_t, t, d, cond), target)
    torch.testing.assert_close(loss.per_example, expected)


@pytest.mark.parametrize(
    ("progress", "size"),
    [(0, 1 / 64), (0.142, 1 / 64), (1 / 7, 1 / 32), (0.5, 1 / 8), (6 / 7, 1), (0.999, 1)],
)
def test_steps_double_with_each_phase_of_progressive_distillation(progress, size):
    (net,), _, (first, second), loss = asked(ProgressiveDistillation(), progress, 1024)
    assert loss.metrics["step_size"] == size and (net[2] == size).all()
    assert on_the_grid(net[1], size) and len(net[1].unique()) == 1 / size
    assert torch.equal(first[1], net[1]) and torch.equal(second[1], net[1] + size / 2)
    assert (first[2] == size / 2).all() and (second[2] == size / 2).all()
    torch.testing.assert_close(second[0], first[0] * (1 + size / 4))


def test_progressive_distillation_clips_the_midpoint_alone():
    def loss(clip, slope):
        def teacher(x, t, d, cond):
            return 10 + slope * x

        objective = ProgressiveDistillation(clip=clip)
        batch = Batch(torch.zeros(8, 1), None, torch.zeros(8, 1))
        generator = torch.Generator().manual_seed(0)
        return objective(Models(Spy(), None, teacher), batch, 0.99, generator).per_example

    assert (loss(None, 0.0) == 100).all() and (loss(4.0, 0.0) == 100).all()
    assert (loss(None, 1.0) == 12.5**2).all() and (loss(4.0, 1.0) == 12**2).all()


def test_only_the_first_teacher_is_guided():
    objective = ProgressiveDistillation(M=4, guidance=2.0)
    cond = torch.arange(64) % 4
    for progress, rows in ((0.0, 128), (0.5, 64)):
        _, _, teacher, _ = asked(objective, progress, cond=cond)
        assert [len(call[0]) for call in teacher] == [rows, rows]
        assert (teacher[0][3][64:] == Spy.null_label).all()


def test_the_next_teacher_is_the_ema_or_the_network_itself():
    for decay, seed in ((0.9, 1), (None, 0)):
        net, ema, teacher = (small_net("mlp", seed=seed)[0] for seed in range(3))
        objective = ProgressiveDistillation(target_ema=decay)
        objective.advance(Models(net, None if decay is None else ema, teacher), 0.5)
        expected = small_net("mlp", seed=seed)[0].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("objective", "bins"),
    [
        (ConsistencyTraining(), [1, 2, 4, 8, 16, 32, 64]),
        (ConsistencyTraining(M=8), [1, 2, 4]),
        (ConsistencyTraining.ict(), [10, 20, 40, 80, 128]),
        (ConsistencyTraining(M=8, bins="ict"), [8]),
        (ConsistencyTraining(M=1024, bins="ict"), [10, 20, 40, 80, 160, 320, 640, 1024]),
    ],
)
def test_bins_grow_in_equal_phases(objective, bins):
    n = len(bins)
    assert [objective.bins_at(k / n) for k in range(n)] == bins
    assert [objective.bins_at((k + 1) / n - 1e-6) for k in range(n)] == bins
    for steps in (21 * n, 10 * n + 1):  # of a run, whose progress is a rounded fraction
        found = [objective.bins_at(step / steps) for step in range(steps)]
        assert found == [bins[step * n // steps] for step in range(steps)]


@pytest.mark.parametrize(("progress", "bins"), [(0.0, 1), (0.3, 4), (0.99, 64)])
def test_consistency_training_joins_neighbours_of_one_path(progress, bins):
    (net,), (later,), teacher, loss = asked(ConsistencyTraining(), progress, 1024)
    assert loss.metrics["bins"] == bins and not teacher
    assert on_the_grid(net[1], 1 / bins) and len(net[1].unique()) == bins
    assert torch.equal(later[1], net[1] + 1 / bins)
    assert torch.equal(net[2], 1 - net[1]) and torch.equal(later[2], 1 - later[1])
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 1024, 3, generator=generator)
    torch.testing.assert_close((later[0] - net[0]) * bins, x1 - x0, rtol=0, atol=1e-4)


def test_the_last_point_of_a_path_is_the_data_whatever_the_network_says():
    x_t, x1 = torch.randn(2, 8, 5)
    t = torch.full((8,), 0.75)
    target = endpoint_target(small_net("mlp")[0], x1, torch.ones(8), x_t, t, None)
    torch.testing.assert_close(target, (x1 - x_t) / 0.25)


def test_pseudo_huber_is_a_square_near_zero_and_a_distance_far_away():
    zero, far, near = torch.zeros(3, 2, 8), torch.full((3, 2, 8), 0.5), torch.full((3, 2, 8), 1e-5)
    weight = torch.tensor([1.0, 0.5, 0.0])
    c = 0.00054 * 4
    exact = (weight**2 * 4 + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(far, zero, weight), exact)
    distance, square = 2 * weight, 16 * (weight * 1e-5) ** 2 / (2 * c)
    torch.testing.assert_close(pseudo_huber(far, zero, weight), distance, rtol=0, atol=2 * c)
    near = pseudo_huber(near.double(), zero.double(), weight.double())
    torch.testing.assert_close(near, square.double(), rtol=1e-3, atol=0)


def test_the_loss_of_ict_weighs_the_ends_by_the_number_of_bins():
    objective = ConsistencyTraining.ict()
    net, _ = small_net("mlp")
    batch = Batch(torch.randn(8, 5))
    calls = []
    net.register_forward_hook(lambda _, inputs, u: calls.append((*inputs[:3], u)))
    generator = torch.Generator().manual_seed(0)
    loss = objective(Models(net), batch, 0.99, generator).per_example
    (x_s, s, _, u_s), (x_t, t, _, u_t) = calls
    ends = [x + (1 - t).view(-1, 1) * u for x, t, u in ((x_s, s, u_s), (x_t, t, u_t))]
    c = 0.00054 * 5**0.5
    error = (ends[1] - ends[0]).square().sum(1)
    torch.testing.assert_close(loss, 128 * ((error + c**2).sqrt() - c), rtol=1e-3, atol=1e-4)


def test_consistency_distillation_follows_the_teacher_for_one_step():
    objective = ConsistencyDistillation(M=8, clip=0.5)
    (net,), (later,), (teacher,), _ = asked(objective, batch=1024)
    assert on_the_grid(net[1], 1 / 8) and len(net[1].unique()) == 8
    assert torch.equal(teacher[1], net[1]) and (teacher[2] == 0).all()
    assert torch.equal(later[1], net[1] + 1 / 8)
    torch.testing.assert_close(later[0], (net[0] * (1 + 1 / 16)).clamp(-0.5, 0.5))


def test_the_step_of_a_guided_teacher():
    def teacher(x, t, d, cond):
        return torch.where(cond == 9, 1.0, 3.0).view(-1, 1).expand_as(x)

    x, t, cond = torch.zeros(2, 1), torch.zeros(2), torch.tensor([0, 1])
    null = torch.full((2,), 9)
    x_s = teacher_step(teacher, x, t, 0.25, cond, guidance=2.0, null_cond=null)
    assert x_s.flatten().tolist() == [0.25 * 5] * 2
    x_s = teacher_step(teacher, x, t, 0.25, cond, guidance=2.0, null_cond=null, clip=1.0)
    assert x_s.flatten().tolist() == [1.0] * 2


@pytest.mark.parametrize(
    ("batch", "share", "rows"),
    [(64, 0.125, 8), (2, 0.125, 1), (2, 0.9, 1), (20, 0.125, 2), (3, 0.999, 2), (24, 0.5, 12)],
)
def test_live_reflow_splits_its_rows(batch, share, rows):
    objective = LiveReflow(reflow_share=share, simulation_steps=3, label_dropout=1.0)
    cond = torch.arange(batch) % 4
    calls, _, _, loss = asked(objective, batch=batch, cond=cond)
    assert [len(call[0]) for call in calls] == [rows] * 3 + [batch]
    assert all((call[2] == 0).all() for call in calls[:3])
    _, t, flag, labels = calls[3]
    assert flag.tolist() == [1.0] * rows + [0.0] * (batch - rows)
    assert torch.equal(labels[:rows], cond[:rows]) and (labels[rows:] == Spy.null_label).all()
    torch.testing.assert_close(loss.metrics["loss/reflow"], loss.per_example[:rows].mean())
    torch.testing.assert_close(loss.metrics["loss/flow"], loss.per_example[rows:].mean())
    on_grid = asked(replace(objective, grid_times=True), batch=batch)[0][3][1]
    assert (on_grid * 128 % 1 == 0).all() and (t * 128 % 1 != 0).any()


def test_live_reflow_simulates_the_ema_if_it_has_one():
    net, ema, _, _ = asked(LiveReflow(simulation_steps=3, target_ema=0.9))
    assert [len(call[0]) for call in ema] == [8] * 3 and [len(call[0]) for call in net] == [64]


def test_a_simulation_goes_from_noise_to_data_in_equal_steps():
    net = Spy()
    x0 = torch.ones(2, 1)
    assert simulate(net, x0, 4, None).flatten().tolist() == [1.125**4] * 2
    assert [call[1].tolist() for call in net.calls] == [[k / 4] * 2 for k in range(4)]


def test_variants_are_the_published_constants():
    slow = {ConsistencyTraining, ConsistencyDistillation, ProgressiveDistillation}
    assert {method.authors().target_ema for method in slow} == {0.999}
    assert ConsistencyDistillation.authors().sampler == "euler"
    assert LiveReflow.authors() == LiveReflow(reflow_share=1 / 8, grid_times=True)
    ict = ConsistencyTraining.ict()
    assert (ict.bins, ict.loss, ict.target_ema) == ("ict", "pseudo_huber", None)


BAD = [
    (ConsistencyTraining, {"M": 1}),
    (ConsistencyTraining, {"M": 12}),
    (ConsistencyTraining, {"target_ema": 1.0}),
    (ConsistencyDistillation, {"M": 3}),
    (ConsistencyDistillation, {"clip": 0.0}),
    (ConsistencyDistillation, {"target_ema": -0.1}),
    (ProgressiveDistillation, {"M": 1}),
    (ProgressiveDistillation, {"clip": -1.0}),
    (ProgressiveDistillation, {"target_ema": 1.0}),
    (LiveReflow, {"M": 1}),
    (LiveReflow, {"reflow_share": 0.0}),
    (LiveReflow, {"reflow_share": 1.0}),
    (LiveReflow, {"simulation_steps": 0}),
    (LiveReflow, {"guidance": 1.5, "label_dropout": 0.0}),
    (LiveReflow, {"label_dropout": 1.5}),
    (Diffusion, {"bound": 0.0}),
    (Diffusion, {"M": 100}),
    (Diffusion, {"label_dropout": -1.0}),
    (Reflow, {"M": 0}),
]


@pytest.mark.parametrize(("method", "fields"), BAD)
def test_bad_fields(method, fields):
    with pytest.raises(UserError) as caught:
        method(**fields)
    assert "\n" not in str(caught.value)


def test_live_reflow_needs_a_row_of_each_kind():
    with pytest.raises(UserError, match="at least 2 rows"):
        asked(LiveReflow(), batch=1)

"""What every objective must do, found by file name; a new one is tested without a line here."""

import copy
from dataclasses import replace

import pytest
import torch

from anystep import registry
from anystep.objectives import Batch, Models, Objective
from anystep.oracle import Gaussian
from anystep.path import expand_to
from anystep.presets import objective as named
from anystep.spec import Model, ModelSpec
from conftest import SMALL, small_net

METHODS = registry.names(Objective.PACKAGE)
VARIANTS = [
    f"{method}/{variant}"
    for method in METHODS
    for variant in getattr(registry.find(Objective.PACKAGE, method), "VARIANTS", {})
]
EVERY = pytest.mark.parametrize("method", METHODS + VARIANTS)
KINDS = pytest.mark.parametrize("kind", SMALL)
TIMES = (0.0, 0.3, 0.5, 0.999)  # progress: the first phase of a method, two inside, the last


def setting(method, kind, batch=24, classes=4):
    """An objective, three models of distinct weights that keep to its spec, and a batch."""
    objective = named(method)
    shape = SMALL[kind][1]
    spec = objective.spec(ModelSpec(shape=shape, num_classes=classes))
    models = Models(*(Model(small_net(kind, classes, seed)[0], spec) for seed in range(3)))
    models.ema.requires_grad_(False)
    models.teacher.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, batch, *shape, generator=generator)
    cond = torch.arange(batch) % classes if classes else None
    return objective, models, Batch(x1, cond, x0 if objective.PAIRS else None)


def run(objective, models, batch, seed=0, progress=0.5):
    return objective(models, batch, progress, torch.Generator().manual_seed(seed))


def weights(models):
    return {
        f"{part}.{name}": value
        for part, model in models._asdict().items()
        for name, value in model.state_dict().items()
    }


@EVERY
@KINDS
class TestContract:
    def test_one_finite_loss_an_example(self, method, kind):
        for size in (2, 3, 5, 8, 17, 64):
            objective, models, batch = setting(method, kind, size)
            loss = run(objective, models, batch)
            assert loss.per_example.shape == (size,)
            assert loss.per_example.dtype == torch.float32
            assert loss.per_example.isfinite().all() and (loss.per_example > 0).any()
            assert all(v.shape == () and not v.requires_grad for v in loss.metrics.values())

    def test_gradient_reaches_the_network_and_nothing_else(self, method, kind):
        for progress in TIMES:
            objective, models, batch = setting(method, kind)
            for model in models:
                model.requires_grad_()
            run(objective, models, batch, progress=progress).per_example.mean().backward()
            for name, parameter in models.net.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            for target in (models.ema, models.teacher):
                assert all(p.grad is None for p in target.parameters())

    def test_the_generator_determines_the_loss(self, method, kind):
        for progress in TIMES:
            objective, models, batch = setting(method, kind)
            torch.manual_seed(1)
            first = run(objective, models, batch, progress=progress).per_example
            torch.manual_seed(2)
            state = torch.random.get_rng_state()
            again = run(objective, models, batch, progress=progress).per_example
            assert torch.equal(first, again)
            assert torch.equal(state, torch.random.get_rng_state())
            other = run(objective, models, batch, seed=1, progress=progress).per_example
            assert not torch.equal(first, other)

    def test_inputs_are_left_alone(self, method, kind):
        objective, models, batch = setting(method, kind)
        before = copy.deepcopy((batch, weights(models)))
        run(objective, models, batch).per_example.mean().backward()
        assert all(
            a is b is None or torch.equal(a, b) for a, b in zip(batch, before[0], strict=True)
        )
        assert all(torch.equal(before[1][k], v) for k, v in weights(models).items())

    def test_unconditional(self, method, kind):
        objective, models, batch = setting(method, kind, classes=0)
        assert run(objective, models, batch).per_example.isfinite().all()

    def test_labels_are_used(self, method, kind):
        objective, models, batch = setting(method, kind)
        loss = run(objective, models, batch).per_example
        other = run(objective, models, batch._replace(cond=(batch.cond + 1) % 4)).per_example
        assert (loss != other).double().mean() > 0.5  # some labels are dropped

    def test_given_noise_is_used(self, method, kind):
        objective, models, batch = setting(method, kind)
        x0 = torch.randn(batch.x1.shape)
        losses = [
            run(objective, models, batch._replace(x0=noise)).per_example for noise in (x0, x0, -x0)
        ]
        assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])

    def test_networks_that_were_not_declared_are_not_needed(self, method, kind):
        objective, models, batch = setting(method, kind)
        if objective.target_ema is None:
            models = models._replace(ema=None)
        if objective.TEACHER != "required":
            models = models._replace(teacher=None)
        assert run(objective, models, batch).per_example.isfinite().all()

    def test_networks_that_were_declared_are_used(self, method, kind):
        objective, models, batch = setting(method, kind)
        declared = {"ema"} if objective.target_ema is not None else set()
        declared |= {"teacher"} if objective.TEACHER == "required" else set()

        def outcome(models):
            models = copy.deepcopy(models)
            loss = run(objective, models, batch).per_example
            objective.advance(models, 0.5)
            return torch.cat([loss, run(objective, models, batch).per_example])

        for part in declared:
            other = Model(small_net(kind, seed=9)[0], models.net.spec)
            changed = models._replace(**{part: other})
            assert not torch.equal(outcome(models), outcome(changed)), part

    def test_spec_describes_the_data_and_goes_through_json(self, method, kind):
        objective = named(method)
        base = ModelSpec(shape=SMALL[kind][1], num_classes=4)
        spec = objective.spec(base)
        assert (spec.shape, spec.num_classes, spec.null_label) == (base.shape, 4, 4)
        assert registry.from_json(ModelSpec, registry.to_json(spec)) == spec
        assert registry.from_json(Objective, registry.to_json(objective)) == objective


class Truth(torch.nn.Module):
    """What the network of `spec` should say when the data are Gaussian, for the true step d.

    Models told a flag know the flow at 0 and the reflow at 1; those trained on pairs are given
    the pairs that the flow makes, so that their truth is the reflow.
    """

    null_label = None

    def __init__(self, gaussian, spec, pairs):
        super().__init__()
        self.gaussian, self.spec, self.pairs = gaussian, spec, pairs

    def forward(self, x, t, d, cond=None):
        if self.spec.predicts == "noise":
            return self.gaussian.noise(x, t, self.spec.path)
        if self.pairs:
            return self.gaussian.straight(x, t)
        if self.spec.step_input == "flag":
            flow = self.gaussian(x, t, torch.zeros_like(d))
            return torch.where(expand_to(d, x) > 0, self.gaussian.straight(x, t), flow)
        return self.gaussian(x, t, d)


class Perturbed(torch.nn.Module):
    """A truth plus a small trainable departure, which `weights` zero is none of."""

    null_label = None

    def __init__(self, truth):
        super().__init__()
        self.truth = truth
        self.weights = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x, t, d, cond=None):
        t_, d_ = t.view(-1, 1), d.view(-1, 1)
        features = torch.stack([torch.ones_like(x), x, t_ * x, (6 * x).sin(), d_ * x], -1)
        return self.truth(x, t, d) + features @ self.weights


DATA = Gaussian(mean=0.7, std=0.4)
WRONG = Gaussian(mean=0.8, std=0.4)


def gradients(objective, gaussian, progress=0.5, batches=20, rows=8192):
    """The mean gradient at the truth of `gaussian` and its z-score, for each departure.

    Data come from `DATA`, of which the teacher knows the truth.
    """
    spec = objective.spec(ModelSpec(shape=(1,), data="raw"))
    truth, teacher = (Truth(g, spec, objective.PAIRS) for g in (gaussian, DATA))
    net = Perturbed(truth)
    models = Models(net, None if objective.target_ema is None else truth, teacher)
    grads = []
    for k in range(batches):
        generator = torch.Generator().manual_seed(k)
        noise = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        x1 = DATA.mean + DATA.std * noise
        batch = Batch(x1, None, noise if objective.PAIRS else None)
        loss = objective(models, batch, progress, generator)
        grads.append(torch.autograd.grad(loss.per_example.mean(), net.weights)[0])
    table = torch.stack(grads)
    mean, error = table.mean(0), table.std(0) / batches**0.5
    return mean, mean / error.clamp(min=1e-12)


UNBIASED = [m for m in METHODS if registry.find(Objective.PACKAGE, m).BIAS is None]
BIASED = [m for m in METHODS if m not in UNBIASED]


@pytest.mark.parametrize("method", UNBIASED)
def test_the_exact_u_is_a_fixed_point(method):
    objective = named(method)
    middles = [(k + 0.5) / objective.phases for k in range(objective.phases)]
    for progress in middles:
        assert gradients(objective, DATA, progress)[1].abs().max() < 4.5, progress
        assert gradients(objective, WRONG, progress)[1].abs().max() > 20, progress


@pytest.mark.parametrize("method", BIASED)
def test_the_bias_of_the_exact_u_vanishes_at_its_order(method):
    """At a quarter, half and all of the default of the declared field, at the end of the run.

    Orders are told apart by 0.35: the last step of a consistency method has a bias of one order
    less, which in the mean over all steps makes log(M) / M^2 of 1 / M^2.
    """
    field, order = named(method).BIAS
    default = getattr(named(method), field)

    def slopes(gaussian):
        """The order of each departure whose gradient stands out, between neighbouring values."""
        found = [
            gradients(replace(named(method), **{field: value}), gaussian, 0.999, 20, 100_000)
            for value in (default // 4, default // 2, default)
        ]
        clear = torch.stack([z.abs() for _, z in found]).min(0).values > 10
        means = torch.stack([mean.abs() for mean, _ in found])[:, clear]
        return (means[:-1] / means[1:]).log2()

    at_truth, elsewhere = slopes(DATA), slopes(WRONG)
    coarse, fine = (at_truth - order).abs()
    assert len(fine) >= 1 and fine.max() < 0.35 and (fine < coarse + 0.1).all()
    assert elsewhere[1].min() < order - 0.65

"""What every objective must do, found by file name; a new one is tested without a line here."""

import copy

import pytest
import torch

from anystep import registry
from anystep.objectives import Batch, Models, Objective
from anystep.oracle import Gaussian
from anystep.spec import ModelSpec
from conftest import SMALL, small_net

METHODS = registry.names(Objective.PACKAGE)
EVERY = pytest.mark.parametrize("method", METHODS)
KINDS = pytest.mark.parametrize("kind", SMALL)


def setting(method, kind, batch=24, classes=4, seed=0):
    """An objective, its models with distinct weights, and a batch."""
    objective = registry.find(Objective.PACKAGE, method)()
    net, shape = small_net(kind, classes)
    ema, _ = small_net(kind, classes, seed=1)
    generator = torch.Generator().manual_seed(seed)
    x1 = torch.randn(batch, *shape, generator=generator)
    cond = torch.arange(batch) % classes if classes else None
    return objective, Models(net, ema, None), Batch(x1, cond)


def run(objective, models, batch, seed=0, progress=0.5):
    return objective(models, batch, progress, torch.Generator().manual_seed(seed))


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
        objective, models, batch = setting(method, kind)
        run(objective, models, batch).per_example.mean().backward()
        for name, parameter in models.net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert all(p.grad is None for p in models.ema.parameters())

    def test_the_generator_determines_the_loss(self, method, kind):
        objective, models, batch = setting(method, kind)
        torch.manual_seed(1)
        first = run(objective, models, batch).per_example
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        again = run(objective, models, batch).per_example
        assert torch.equal(first, again)
        assert torch.equal(state, torch.random.get_rng_state())
        assert not torch.equal(first, run(objective, models, batch, seed=1).per_example)

    def test_inputs_are_left_alone(self, method, kind):
        objective, models, batch = setting(method, kind)
        x1, cond = batch.x1.clone(), batch.cond.clone()
        before = copy.deepcopy(models.net.state_dict())
        run(objective, models, batch)
        assert torch.equal(batch.x1, x1) and torch.equal(batch.cond, cond)
        assert all(torch.equal(before[k], v) for k, v in models.net.state_dict().items())

    def test_unconditional(self, method, kind):
        objective, models, batch = setting(method, kind, classes=0)
        assert run(objective, models, batch).per_example.isfinite().all()

    def test_given_noise_is_used(self, method, kind):
        objective, models, batch = setting(method, kind)
        pairs = Batch(batch.x1, batch.cond, torch.randn(batch.x1.shape))
        losses = [
            run(objective, models, Batch(pairs.x1, pairs.cond, x0)).per_example
            for x0 in (pairs.x0, pairs.x0, -pairs.x0)
        ]
        assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])

    def test_spec_describes_the_data_and_goes_through_json(self, method, kind):
        objective = registry.find(Objective.PACKAGE, method)()
        base = ModelSpec(shape=SMALL[kind][1], num_classes=4)
        spec = objective.spec(base)
        assert (spec.shape, spec.num_classes, spec.null_label) == (base.shape, 4, 4)
        assert registry.from_json(ModelSpec, registry.to_json(spec)) == spec
        assert registry.from_json(Objective, registry.to_json(objective)) == objective


class Perturbed(torch.nn.Module):
    """The exact u plus a small trainable departure: `weights` zero is the truth."""

    null_label = None

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle
        self.weights = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x, t, d, cond=None):
        t_, d_ = t.view(-1, 1), d.view(-1, 1)
        features = torch.stack([torch.ones_like(x), x, t_ * x, (6 * x).sin(), d_ * x], -1)
        return self.oracle(x, t, d) + features @ self.weights


def gradient_z_scores(method, oracle, data, batches=40, rows=4096):
    """The gradient at the truth over its standard error, for each departure."""
    objective = registry.find(Objective.PACKAGE, method)()
    net = Perturbed(oracle)
    grads = []
    for k in range(batches):
        generator = torch.Generator().manual_seed(k)
        x1 = data.mean + data.std * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        loss = objective(Models(net, net, None), Batch(x1), 0.5, generator)
        grads.append(torch.autograd.grad(loss.per_example.mean(), net.weights)[0])
    table = torch.stack(grads)
    return table.mean(0) / (table.std(0) / batches**0.5).clamp(min=1e-12)


@EVERY
def test_the_exact_u_is_a_fixed_point(method):
    truth = Gaussian(mean=0.7, std=0.4)
    assert gradient_z_scores(method, truth, truth).abs().max() < 4.5
    assert gradient_z_scores(method, Gaussian(0.8, 0.4), truth).abs().max() > 20

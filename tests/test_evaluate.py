"""Judging: what is computed, on which samples, and what happens where it cannot be."""

import json

import pytest
import torch

from anystep import metrics
from anystep.data import Dataset, Splits
from anystep.data.digits import Digits
from anystep.evaluate import REAL, Judge, generate, requests, semigroup_gap
from anystep.networks.mlp import MLPConfig
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.oracle import Gaussian
from anystep.report import write_report
from anystep.spec import Model, ModelSpec


class Exact(torch.nn.Module):
    """The flow map of a Gaussian far outside [-1, 1], as a network with a parameter."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, d, cond=None):
        return self.oracle(x, t, d)


def model(objective=None, oracle=None, shape=(2,)):
    spec = (objective or Shortcut()).spec(ModelSpec(shape=shape, data="raw"))
    return Model(Exact(oracle or Gaussian(5.0, 2.0)), spec)


def gaussian(n, seed, dim=2):
    generator = torch.Generator().manual_seed(seed)
    return 5 + 2 * torch.randn(n, dim, generator=generator)


def test_an_exact_model_scores_as_real_data_do_at_every_step_count(tmp_path):
    judge = Judge(Splits(Dataset(gaussian(4000, 0)), Dataset(gaussian(4000, 1))))
    files = write_report(tmp_path, {"exact": model()}, judge, steps=(1, 4, 128), n=4000)
    rows = json.loads(files["json"].read_text())["rows"]
    floor = rows[0]
    assert floor["model"] == REAL
    for row in rows[1:]:
        assert row["scores"]["frechet"] < 0.05 and row["scores"]["sliced"] < 0.15
        assert row["scores"]["precision"] > 0.9 and row["scores"]["recall"] > 0.9
        assert row["scores"]["memorisation"] == pytest.approx(1, abs=0.1)
        assert set(row["scores"]) == set(floor["scores"])
    assert files["table"].read_text().count("| exact |") == 3
    assert files["plot"].is_file() and files["grid"].is_file()


def test_semigroup_gap_is_zero_for_the_flow_map_and_not_for_its_velocity():
    assert semigroup_gap(model()) < 1e-4
    velocity = model(FlowMatching())
    x0 = torch.randn(1000, 2)
    zero = torch.zeros(1000)
    net = velocity.net
    one = x0 + net(x0, zero, zero)
    half = x0 + 0.5 * net(x0, zero, zero)
    two = half + 0.5 * net(half, zero + 0.5, zero)
    expected = float((one - two).norm(dim=1).mean())
    assert expected > 0.5
    assert semigroup_gap(velocity) == pytest.approx(expected, rel=0.2)


def test_images_are_clamped_and_raw_data_are_not():
    raw = model()
    assert generate(raw, 100, steps=1)[0].max() > 5
    bounded = Model(raw.net, Shortcut().spec(ModelSpec(shape=(1, 2, 2), data="[-1, 1]")))
    assert generate(bounded, 100, steps=1)[0].max() == 1


def test_the_same_noise_and_labels_at_every_step_count_and_batch_size():
    spec = Shortcut().spec(ModelSpec(shape=(2,), num_classes=5, data="raw"))
    conditional = Model(Exact(Gaussian(0.0, 1.0)), spec)
    a, labels = generate(conditional, 50, steps=1, seed=3)
    b, again = generate(conditional, 50, steps=8, seed=3, batch=7)
    torch.testing.assert_close(a, b)
    assert torch.equal(labels, again) and len(labels.unique()) == 5


def test_a_guided_model_is_judged_both_ways_at_the_finest_level():
    spec = Shortcut(M=128, guidance=1.5).spec(ModelSpec(shape=(2,), num_classes=3))
    net = MLPConfig(width=8, depth=1).build((2,), 3)
    assert requests(Model(net, spec), (1, 64, 128)) == [(1, 1), (64, 1), (128, 1), (128, 1.5)]


def test_class_means_are_exposed():
    splits = Digits().load()
    judge = Judge(splits)
    x, labels = splits.train.batch(slice(None))
    means = torch.stack([x[labels == k].mean(0) for k in range(10)])
    scores = judge.scores(means[labels], labels)
    assert scores["accuracy"] > 0.95 and scores["variance"] < 0.01
    assert scores["frechet"] > 3 * judge.floor().scores["frechet"]
    copies = judge.scores(x, labels)
    assert copies["memorisation"] == 0 and copies["variance"] == pytest.approx(1)


def test_metrics_without_enough_examples_are_left_out(monkeypatch):
    monkeypatch.setattr(metrics.classifier, "STEPS", 2)
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    data = Dataset(x, labels, tuple("abcdef"))
    judge = Judge(Splits(data, data))
    scores = judge.scores(x, labels)
    assert "variance" not in scores and "frechet" in scores and "accuracy" in scores

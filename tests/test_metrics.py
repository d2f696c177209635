import importlib
import itertools
import json

import pytest
import torch
from torch import nn

from anystep.data import Dataset, Splits
from anystep.data.digits import Digits
from anystep.errors import UserError
from anystep.metrics import (
    PixelFeatures,
    TorchScriptFeatures,
    class_accuracy,
    features,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    memorisation,
    precision_recall,
    sliced_wasserstein,
    train_classifier,
    variance_ratio,
    within_class_variance,
)
from anystep.metrics import classifier as training
from anystep.metrics.frechet import moments
from anystep.metrics.memorisation import nearest_distances

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def cloud(rows, columns, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator) + shift


def set_block(monkeypatch, module, rows):
    # The package's function of the same name hides the module from attribute access.
    monkeypatch.setattr(importlib.import_module(f"anystep.metrics.{module}"), "BLOCK", rows)


def covariance(dims, seed):
    factor = cloud(dims, dims, seed)
    return factor @ factor.T


# Fréchet


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    rotation = torch.linalg.qr(cloud(5, 5)).Q
    s, r = torch.rand(5).double() + 0.1, torch.rand(5).double() + 0.1
    mu_a, mu_b = cloud(5, 1, 1)[:, 0], cloud(5, 1, 2)[:, 0]
    cov_a, cov_b = (rotation * s**2 @ rotation.T, rotation * r**2 @ rotation.T)
    expected = (mu_a - mu_b).square().sum() + (s - r).square().sum()
    assert frechet_from_moments(mu_a, cov_a, mu_b, cov_b) == pytest.approx(float(expected))


def test_frechet_of_an_optimal_map_is_its_mean_squared_displacement():
    """y = A x + m with A symmetric positive is the optimal map (Brenier), so W2^2 is E|y - x|^2,
    also where the covariances do not commute."""
    x = cloud(300, 4) @ cloud(4, 4, 1)
    a, m = covariance(4, 2), cloud(1, 4, 3)
    y = x @ a + m
    (mu, cov), i = moments(x), torch.eye(4)
    expected = ((a - i) @ mu + m[0]).square().sum() + ((a - i) @ cov @ (a - i)).trace()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_moments_are_the_unbiased_ones():
    x = cloud(7, 3)
    mu, cov = moments(x)
    assert torch.allclose(mu, x.mean(0))
    assert torch.allclose(cov, torch.cov(x.T))


@pytest.mark.parametrize("rows", [500, 6])
def test_frechet_is_zero_for_identical_sets_and_symmetric(rows):
    a, b = cloud(rows, 20), 2 * cloud(rows + 3, 20, 1, shift=0.3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) > 1


def test_frechet_of_fewer_rows_than_features():
    """With two rows each the covariances have rank one: tr (S_a S_b)^(1/2) = |<a, b>| / 2."""
    a, b = cloud(2, 50), cloud(2, 50, 1)
    da, db = a[0] - a[1], b[0] - b[1]
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + (da.square().sum() + db.square().sum()) / 2 - (da @ db).abs()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_metrics_refuse_what_they_cannot_judge(metric):
    good = cloud(10, 3)
    for bad in (cloud(1, 3), cloud(10, 4), good[:, 0], good / 0):
        with pytest.raises(UserError):
            metric(good, bad)


# kernel


def test_kernel_distance_equals_the_double_loop(monkeypatch):
    set_block(monkeypatch, "kernel", 4)
    a, b = cloud(9, 3), cloud(6, 3, 1, shift=0.5)

    def k(x, y):
        return float(x @ y / 3 + 1) ** 3

    within_a = [k(x, y) for x, y in itertools.permutations(a, 2)]
    within_b = [k(x, y) for x, y in itertools.permutations(b, 2)]
    between = [k(x, y) for x, y in itertools.product(a, b)]
    expected = sum(within_a) / 72 + sum(within_b) / 30 - 2 * sum(between) / 54
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased():
    values = torch.tensor(
        [kernel_distance(cloud(20, 4, i), cloud(30, 4, -i)) for i in range(1, 401)]
    )
    error = values.std() / 20
    assert abs(values.mean()) < 4 * error
    assert (values < 0).any()
    assert kernel_distance(cloud(20, 4), cloud(30, 4, 1, shift=1.0)) > 20 * error


# precision and recall


def test_precision_recall_by_hand():
    """The radii are 1, 1, 2 for the real points and 1.5, 1.5, 5 for the generated."""
    real = torch.tensor([[0.0], [1], [3]])
    generated = torch.tensor([[2.5], [4], [9]])
    precision, recall = precision_recall(real, generated, k=1)
    assert precision == pytest.approx(2 / 3)  # 9 is outside
    assert recall == pytest.approx(2 / 3)  # 1 and 3 are inside a ball; 0 is outside


def test_k_counts_other_points_only():
    """Radii are 1 for k = 1, and 5, 4, 4, 5 for k = 2."""
    real = torch.tensor([[0.0], [1], [5], [6]])
    generated = torch.tensor([[1.9], [3], [-0.9]])
    assert precision_recall(real, generated, k=1).precision == pytest.approx(2 / 3)
    assert precision_recall(real, generated, k=2).precision == 1


def test_precision_recall_of_identical_and_of_disjoint_sets(monkeypatch):
    set_block(monkeypatch, "precision_recall", 64)
    x = cloud(200, 40)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)


def test_dropping_a_mode_lowers_recall_only():
    modes = torch.tensor([[0.0] * 4, [50.0] * 4]).double()
    real = (cloud(400, 4).view(2, 200, 4) + modes[:, None]).flatten(0, 1)
    both = (cloud(400, 4, 1).view(2, 200, 4) + modes[:, None]).flatten(0, 1)
    whole, dropped = precision_recall(real, both), precision_recall(real, both[:200])
    assert whole.precision > 0.8
    assert whole.recall > 0.8
    assert dropped.precision == pytest.approx(whole.precision, abs=0.1)
    assert dropped.recall == pytest.approx(whole.recall / 2, abs=0.1)


# sliced Wasserstein


def test_sliced_distance_of_a_shift_is_its_length_over_root_d():
    x, shift = cloud(50, 3), torch.tensor([1.0, -2, 2]).double()
    assert sliced_wasserstein(x, x + shift, projections=20_000) == pytest.approx(3**0.5, rel=0.01)
    assert sliced_wasserstein(x[:, :1], x[:, :1] - 2) == pytest.approx(2)
    assert sliced_wasserstein(x, x) == 0


def test_sliced_distance_does_not_depend_on_repeated_points():
    a, b = cloud(12, 3), cloud(9, 3, 1, shift=0.4)
    distance = sliced_wasserstein(a, b)
    assert sliced_wasserstein(a.repeat(3, 1), b) == pytest.approx(distance)
    assert sliced_wasserstein(a.repeat(3, 1), b.repeat(4, 1)) == pytest.approx(distance)
    assert sliced_wasserstein(b, a) == pytest.approx(distance)


def test_sliced_distance_of_unequal_sizes_by_hand():
    a, b = torch.tensor([[0.0], [1], [2]]), torch.tensor([[0.0], [2]])
    # Quantiles differ by 0 on (0, 1/3), 1 on (1/3, 1/2), 1 on (1/2, 2/3) and 0 on (2/3, 1).
    assert sliced_wasserstein(a, b) == pytest.approx((1 / 3) ** 0.5)


def test_sliced_directions_come_from_the_generator_alone():
    a, b = cloud(20, 3), cloud(20, 3, 1) * torch.tensor([1, 2, 3])
    state = torch.get_rng_state()
    assert sliced_wasserstein(a, b, projections=4) == sliced_wasserstein(a, b, projections=4)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    one, two = (sliced_wasserstein(a, b, projections=4, generator=g) for g in seeds)
    assert one != two
    assert torch.equal(state, torch.get_rng_state())


# memorisation


def test_memorisation_of_copies(monkeypatch):
    set_block(monkeypatch, "memorisation", 64)
    # Far from the origin, where |x|^2 + |y|^2 - 2 x . y would not give exactly 0.
    train, held_out = (cloud(300, 30, seed, shift=100.0).view(-1, 1, 5, 6) for seed in (0, 1))
    assert nearest_distances(train, train).max() == 0
    copies = memorisation(train[100:150].float(), train.float(), held_out.float())
    assert copies.generated_to_train == 0
    assert copies.ratio == 0
    assert copies.share_closer == 1
    near = memorisation(train[:50] + 0.01, train, held_out)
    assert near.generated_to_train == pytest.approx(0.01 * 30**0.5)


def test_memorisation_of_fresh_draws():
    fresh = memorisation(cloud(3000, 5, 1), cloud(500, 5), cloud(3000, 5, 2))
    assert fresh.ratio == pytest.approx(1, abs=0.05)
    assert fresh.share_closer == pytest.approx(0.05, abs=0.02)


def test_nearest_distances_equal_the_double_loop(monkeypatch):
    set_block(monkeypatch, "memorisation", 4)
    queries, points = cloud(5, 3), cloud(10, 3, 1)
    expected = [min(float((q - p).norm()) for p in points) for q in queries]
    assert nearest_distances(queries, points).tolist() == pytest.approx(expected)


def test_memorisation_refuses_two_scales_and_empty_sets():
    x = cloud(20, 4)
    for others in ((x.byte(), x), (x, x[:0]), (x[:, :2], x)):
        with pytest.raises(UserError):
            memorisation(x, *others)


# conditional


def test_class_accuracy_counts_what_was_asked():
    assert class_accuracy(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 0])) == 0.75
    with pytest.raises(UserError):
        class_accuracy(torch.tensor([1, 2]), torch.tensor([[1], [2]]))


def test_within_class_variance_by_hand():
    """Class 0: (0, 2) and (2, 2) vary by 2; class 1 by 0 + 8; class 2 has one member."""
    x = torch.tensor([[0.0, 2], [2, 2], [1, 0], [1, 4], [9, 9]])
    assert within_class_variance(x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx((2 + 8) / 2)


def test_class_means_have_no_variance():
    x, labels = cloud(300, 8).view(300, 2, 2, 2), torch.arange(300) % 3
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    assert variance_ratio(means[labels], labels, x, labels) == pytest.approx(0, abs=1e-12)
    assert variance_ratio(2 * x, labels, x, labels) == pytest.approx(4)


def test_variance_ratio_does_not_depend_on_how_often_classes_occur():
    labels = torch.arange(4000) % 2
    x = cloud(4000, 3) * torch.where(labels == 0, 1.0, 10.0)[:, None]
    few = torch.cat([torch.where(labels == 0)[0], torch.where(labels == 1)[0][:400]])
    assert variance_ratio(x[few], labels[few], x, labels) == pytest.approx(1, abs=0.1)
    with pytest.raises(UserError):
        variance_ratio(x, labels, x, labels + 2)


# features


@pytest.fixture(scope="module")
def splits():
    return Digits().load()


@pytest.fixture(scope="module")
def trained(splits, tmp_path_factory):
    """A classifier of the digits, its cache, and the global random state before and after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache") / "made"
    before = torch.get_rng_state()
    classifier = train_classifier(splits, cache=cache)
    after = torch.get_rng_state()
    torch.set_num_threads(threads)
    return classifier, cache, before, after


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 60)


def vectors(rows=200):
    """Three clusters in the plane."""
    labels = torch.arange(rows) % 3
    centres = torch.tensor([[0.0, 0], [4, 0], [0, 4]])
    x = centres[labels] + 0.3 * cloud(rows, 2).float()
    data = Dataset(x, labels, ("a", "b", "c"))
    return Splits(data.rows(torch.arange(rows // 2)), data.rows(torch.arange(rows // 2, rows)))


def test_classifier_learns_the_digits(trained, splits):
    classifier, _, before, after = trained
    x, labels = splits.held_out.batch(slice(None))
    assert classifier.accuracy >= 0.97
    assert class_accuracy(classifier.predict(x), labels) == pytest.approx(classifier.accuracy)
    assert torch.equal(before, after)


def test_classifier_features_tell_data_from_noise(trained, splits):
    classifier = trained[0]
    train, held_out = (s.batch(slice(None))[0] for s in splits)
    real, fresh = classifier(train), classifier(held_out)
    assert real.shape == (len(train), 64)
    assert not real.requires_grad
    distance = frechet_distance(fresh, real)
    blurred = nn.functional.avg_pool2d(held_out, 3, 1, padding=1)
    assert frechet_distance(classifier(blurred), real) > 5 * distance
    assert frechet_distance(classifier(torch.rand_like(held_out)), real) > 20 * distance


def test_classifier_features_do_not_depend_on_the_batch(trained, splits, monkeypatch):
    classifier, x = trained[0], splits.held_out.batch(slice(50))[0]
    whole = classifier(x)
    monkeypatch.setattr(features, "BATCH", 7)
    assert torch.allclose(classifier(x), whole, atol=1e-5)
    assert classifier(x[:0]).shape == (0, 64)


def test_cached_classifier_is_the_same_and_is_not_trained(trained, splits, monkeypatch):
    classifier, cache, _, _ = trained
    monkeypatch.setattr(training, "_fit", None)
    cached = train_classifier(splits, cache=cache)
    x = splits.held_out.batch(slice(None))[0]
    assert torch.equal(cached(x), classifier(x))
    assert cached.accuracy == classifier.accuracy
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".safetensors"]


def test_cache_knows_data_and_seed(few_steps, tmp_path):
    splits = vectors()
    train = splits.train
    changed = splits._replace(train=Dataset(train.x + 1, train.labels, train.class_names))
    for data, seed in ((splits, 0), (splits, 1), (changed, 0), (splits, 0)):
        train_classifier(data, seed=seed, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_cache_is_trained_anew(few_steps, tmp_path, suffix, damage):
    splits = vectors()
    first = train_classifier(splits, cache=tmp_path)
    (path,) = tmp_path.glob(f"*{suffix}")
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:-9] + bytes(9))
    again = train_classifier(splits, cache=tmp_path)
    assert torch.equal(again(splits.train.x), first(splits.train.x))
    assert path.read_bytes() == whole


def test_cache_of_another_shape_is_trained_anew(few_steps, tmp_path):
    splits = vectors()
    train_classifier(splits, cache=tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(["not", "facts"]))
    assert train_classifier(splits, cache=tmp_path).accuracy > 0.5


def test_an_unusable_cache_folder_does_not_cost_the_classifier(few_steps, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="was not cached"):
        classifier = train_classifier(vectors(), cache=tmp_path / "file" / "folder")
    assert classifier.accuracy > 0.5


def test_a_full_disk_does_not_cost_the_classifier(few_steps, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(training, "_replace", full)
    with pytest.warns(UserWarning, match="no space left"):
        assert train_classifier(vectors(), cache=tmp_path).accuracy > 0.5


def test_classifier_of_vectors_and_its_determinism(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 200)
    splits = vectors()
    with torch.no_grad():
        one = train_classifier(splits)
        torch.rand(1)  # the global state does not matter
        state = torch.get_rng_state()
        two, other = (train_classifier(splits, seed=seed) for seed in (0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert one.accuracy == 1
    assert torch.equal(one(splits.train.x), two(splits.train.x))
    assert not torch.equal(one(splits.train.x), other(splits.train.x))


def test_accuracy_is_on_the_training_data_when_none_are_held_out(few_steps, tmp_path):
    splits = vectors()
    splits = Splits(splits.train, splits.held_out.rows(torch.arange(0)))
    assert train_classifier(splits, cache=tmp_path).accuracy > 0.9


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 9), (3, 70, 64)])
def test_classifier_takes_images_of_any_size(monkeypatch, shape):
    monkeypatch.setattr(training, "STEPS", 2)
    data = Dataset(torch.zeros(4, *shape, dtype=torch.uint8), torch.arange(4) % 2, ("a", "b"))
    classifier = train_classifier(Splits(data, data))
    assert classifier(torch.zeros(3, *shape)).shape == (3, 64)


def test_classifier_needs_labels():
    data = Dataset(cloud(10, 2).float())
    with pytest.raises(UserError, match="labelled"):
        train_classifier(Splits(data, data))


class Means(nn.Module):
    """A program that returns the mean of each channel."""

    def forward(self, x):
        return x.float().mean(dim=(2, 3))


class Inception(nn.Module):
    """A program that wants uint8 RGB and a flag, as StyleGAN's Inception file does."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        if return_features:
            return x.float().flatten(1)
        return x.float().mean(dim=(1, 2, 3))


@pytest.fixture
def program(tmp_path):
    def save(module):
        path = tmp_path / "program.pt"
        torch.jit.script(module).save(str(path))
        return path

    return save


def test_torchscript_program_gets_rgb_in_model_scale(program):
    x = 2 * torch.rand(5, 1, 6, 6) - 1
    path = program(Means())
    assert torch.allclose(TorchScriptFeatures(path)(x), x.mean((2, 3)).repeat(1, 3))
    assert TorchScriptFeatures(path, rgb=False)(x).shape == (5, 1)
    assert "program.pt" in TorchScriptFeatures(path).name


def test_torchscript_program_gets_whole_numbers_and_its_flag(program):
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2)
    values = TorchScriptFeatures(program(Inception()))(x)
    assert values.view(3, 4).tolist() == [[0, 128, 255, 255]] * 3


def test_torchscript_images_are_resized(program):
    x = torch.arange(4.0).view(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3) / 4
    values = TorchScriptFeatures(program(Inception()), size=2, uint8=True, rgb=True)(x)
    assert values.shape == (1, 12)


def test_torchscript_mistakes_are_one_line(program, tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a program")
    for path in (tmp_path / "missing.pt", broken, tmp_path):
        with pytest.raises(UserError) as error:
            TorchScriptFeatures(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="fails") as error:
        TorchScriptFeatures(program(Inception()), uint8=False)(torch.zeros(2, 1, 4, 4))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="images"):
        TorchScriptFeatures(program(Means()))(torch.zeros(2, 3))


def test_pixel_features_are_the_principal_components():
    scales = torch.tensor([5.0, 3, 2, *[0.01] * 97]).double()
    rotation = torch.linalg.qr(cloud(100, 100)).Q
    x = (cloud(400, 100, 1) * scales) @ rotation + 7
    pixels = PixelFeatures(x.view(400, 1, 10, 10))
    projected = pixels(x.view(400, 1, 10, 10))
    assert pixels.name == "pixels, 64 principal components"
    expected = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    assert torch.allclose(projected.var(0)[:3], expected[:3], rtol=1e-6)
    assert projected.var(0).sum() == pytest.approx(float(expected[:64].sum()), rel=1e-3)
    assert projected.mean(0).abs().max() < 1e-9


def test_pixel_features_of_few_pixels_keep_all_distances():
    x = cloud(50, 12)
    pixels = PixelFeatures(x.view(50, 3, 2, 2))
    assert pixels.name == "pixels, 12 principal components"
    assert torch.allclose(torch.pdist(pixels(x)), torch.pdist(x))


def test_metrics_do_not_change_their_inputs_or_lose_precision():
    """A shift of 1e-9 in float64 is seen."""
    a, b = cloud(30, 3), cloud(30, 3, 1)
    copies = a.clone(), b.clone()
    for metric in (frechet_distance, kernel_distance, precision_recall, sliced_wasserstein):
        metric(a, b)
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])
    assert sliced_wasserstein(a[:, :1], a[:, :1] + 1e-9) == pytest.approx(1e-9, rel=1e-4)

"""Interpolation between two noises: the arc, the strip of a model, and what the command writes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from anystep import checkpoint, cli
from anystep.errors import UserError
from anystep.interpolation import arc, largest_jump, mix, strip
from anystep.networks.dit import DiTConfig
from anystep.networks.mlp import MLPConfig
from anystep.objectives.shortcut import Shortcut
from anystep.spec import Model, ModelSpec

SHAPE = (3, 4, 5)


@pytest.fixture
def ends(generator):
    return torch.randn(2, *SHAPE, generator=generator).unbind()


class Linear(torch.nn.Module):
    """A flow map that multiplies x0 by 3 and adds the class: u = 2 x0 + cond, in one step."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))
        self.asked = []

    def forward(self, x, t, d, cond=None):
        self.asked.append(x)
        return self.factor * x + (0 if cond is None else cond.view(-1, *[1] * (x.ndim - 1)))


def linear_model(**fields):
    fields = {"shape": SHAPE, "num_classes": 5, "data": "raw"} | fields
    return Model(Linear(), ModelSpec(**fields))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_arc_joins_its_ends_exactly_at_equal_angles(ends, n):
    a, b = ends
    points = arc(a, b, n)
    assert points.shape == (n, *SHAPE)
    assert torch.equal(points[0], b) and torch.equal(points[-1], a)
    for k, point in enumerate(points):
        theta = k / (n - 1) * math.pi / 2
        torch.testing.assert_close(point, math.sin(theta) * a + math.cos(theta) * b)


def test_points_of_an_arc_are_normal_and_those_of_a_line_are_not(generator):
    a, b = torch.randn(2, 20_000, generator=generator).unbind()
    assert (arc(a, b, 9).std(dim=1) - 1).abs().max() < 0.02
    assert float(mix(a, b, 9)[4].std()) == pytest.approx(math.sqrt(0.5), abs=0.02)


def test_a_mix_joins_its_ends_exactly_in_equal_steps(ends):
    a, b = ends
    points = mix(a, b, 6)
    assert torch.equal(points[0], a) and torch.equal(points[-1], b)
    torch.testing.assert_close(points.diff(dim=0), ((b - a) / 5).expand(5, *SHAPE))
    assert largest_jump(points) == pytest.approx(float((b - a).norm()) / 5, rel=1e-5)


def test_the_largest_jump_is_that_of_the_worst_neighbours():
    points = torch.tensor([0.0, 3.0, 3.0, 2.0])[:, None] * torch.tensor([0.6, 0.8])
    assert largest_jump(points) == pytest.approx(3)
    assert largest_jump(points.flip(0)) == pytest.approx(3)
    assert largest_jump(points[1:]) == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 0, -1])
def test_a_strip_has_two_ends(ends, n):
    for call in (
        lambda: arc(*ends, n),
        lambda: mix(*ends, n),
        lambda: strip(linear_model(), n, 1),
    ):
        with pytest.raises(UserError, match=f"n of at least 2, not {n}"):
            call()


def test_the_strip_of_a_linear_model_is_known():
    model = linear_model()
    x, cond = strip(model, 9, 1, seed=4, label=2)
    noise = model.net.asked[0]
    torch.testing.assert_close(x, 3 * noise + 2)
    a, b = noise[-1], noise[0]
    torch.testing.assert_close(noise, arc(a, b, 9))
    assert cond.tolist() == [2] * 9
    # Neighbours on the arc differ by 2 sin(pi/32) (cos(phi) a - sin(phi) b), phi between them.
    jumps = [
        6 * math.sin(math.pi / 32) * float((math.cos(p) * a - math.sin(p) * b).norm())
        for p in ((k + 0.5) * math.pi / 16 for k in range(8))
    ]
    assert largest_jump(x) == pytest.approx(max(jumps), rel=1e-4)


def test_a_strip_follows_from_the_seed_and_has_one_class():
    model = linear_model()
    (a, cond), (b, again), (c, _) = (strip(model, 5, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(cond, again) and not torch.equal(a, c)
    classes = {int(strip(model, 3, 1, seed=seed)[1].unique()) for seed in range(30)}
    assert len(classes) > 2
    same = strip(model, 5, 3, seed=0, label=int(cond[0]))
    assert torch.equal(same[0], a)
    assert strip(linear_model(num_classes=0), 3, 1)[1] is None


def test_images_are_clamped_and_other_data_are_not():
    assert strip(linear_model(), 3, 1)[0].max() > 1
    assert strip(linear_model(data="[-1, 1]"), 3, 1)[0].abs().max() == 1


def test_guidance_and_sampler_are_passed_on():
    model = linear_model()
    x, _ = strip(model, 3, 128, label=1)
    guided, _ = strip(model, 3, 128, label=1, guidance=2.0)
    assert (guided < x).all()  # away from the null label, which is 5
    forced, _ = strip(model, 3, 1, label=1, guidance=2.0, force_guidance=True)
    torch.testing.assert_close(forced, strip(model, 3, 1, label=1)[0] - 4)
    with pytest.raises(UserError, match="not by 'ddim'"):
        strip(model, 3, 1, sampler="ddim")


def test_noise_added_on_the_way_is_the_same_all_along_a_strip():
    # With x1 = 3 x0 for every step to the end, two steps end at 3 x0 + z.
    x, _ = strip(linear_model(), 7, 2, label=0, sampler="consistency")
    one, _ = strip(linear_model(), 7, 1, label=0)
    assert (x - one).abs().max() > 1
    torch.testing.assert_close(x - x[:1], one - one[:1])


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def call(*args):
        code = cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def saved(folder, config, shape, num_classes):
    torch.manual_seed(0)
    net = config.build(shape, num_classes)
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.arange(parameter.numel()).view_as(parameter).sin()
    spec = Shortcut().spec(ModelSpec(shape=shape, num_classes=num_classes, data="[-1, 1]"))
    checkpoint.save_model(folder, net, checkpoint.model_info(config, spec))
    return folder


@pytest.fixture
def images(tmp_path):
    config = DiTConfig(patch=2, width=16, depth=1, heads=2)
    return saved(tmp_path / "images", config, (1, 8, 8), 3)


def test_a_strip_as_a_picture_and_as_arrays(run, images, tmp_path):
    sample = ["sample", images, "--interpolate", "--n", 5, "--steps", 2, "--label", 1]
    code, text, err = run(*sample, "--out", tmp_path / "s.npz")
    assert code == 0, err
    with np.load(tmp_path / "s.npz") as made:
        x, cond = made["samples"], made["cond"]
    expected, _ = strip(checkpoint.load_model(images), 5, 2, label=1)
    assert np.array_equal(x, expected.numpy()) and cond.tolist() == [1] * 5
    pixels = mix(expected[0], expected[-1], 5)
    jumps = f"{largest_jump(expected):.3f}", f"{largest_jump(pixels):.3f}"
    assert jumps[0] != jumps[1]
    line = f"largest jump: {jumps[0]}, of pixels mixed {jumps[1]}"
    assert text.splitlines() == [line, str(tmp_path / "s.npz")]
    code, text, _ = run(*sample, "--out", tmp_path / "s.png")
    assert code == 0 and text.splitlines() == [line, str(tmp_path / "s.png")]
    picture = np.asarray(Image.open(tmp_path / "s.png").convert("L"))
    assert picture.shape[0] == 2 + 2 * 50  # two rows of 8 pixels, six times enlarged
    tops = picture[5:102:50, -5 * 50 + 3 :: 50]
    wanted = ((torch.stack([expected, pixels])[:, :, 0, 0, 0] + 1) * 127.5).round()
    assert np.array_equal(tops, wanted.numpy())
    assert run(*sample, "--out", tmp_path / "folder")[0] == 0
    assert len(list((tmp_path / "folder").iterdir())) == 5


def test_a_strip_of_vectors(run, tmp_path):
    model = saved(tmp_path / "vectors", MLPConfig(width=8, depth=1), (2,), 0)
    sample = ["sample", model, "--interpolate", "--n", 6]
    assert run(*sample, "--out", tmp_path / "v.png")[0] == 0
    assert Image.open(tmp_path / "v.png").width > 200
    assert run(*sample, "--out", tmp_path / "v.npz")[0] == 0
    with np.load(tmp_path / "v.npz") as made:
        assert made["samples"].shape == (6, 2) and made.files == ["samples"]


def test_mistakes_are_one_line(run, images, tmp_path):
    sample = ["sample", images, "--interpolate", "--out", tmp_path / "s.png"]
    for options, message in (
        (["--n", 1], "--interpolate needs --n of at least 2, not 1"),
        (["--n", 0], "must be at least 1"),
        (["--steps", 0], "at least 1, not 0"),
        (["--label", 3], "out of range"),
        (["--seed", -1], "seed must be at least 0"),
        (["--sampler", "ddim"], "not by 'ddim'"),
        (["--interpolat"], "did you mean '--interpolate'?"),
    ):
        code, _, err = run(*sample, *options)
        assert code == 2 and err.startswith("anystep: ") and message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "s.png").exists()

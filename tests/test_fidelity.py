"""Numbers people quote: how they are made, and that they are called what they are."""

import hashlib
import json
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from anystep.cli import main
from anystep.data import Dataset, Splits
from anystep.errors import UserError
from anystep.evaluate import Judge
from anystep.metrics import TorchScriptFeatures
from anystep.metrics import reference as references
from anystep.metrics.fidelity import Fidelity, Pictures
from anystep.metrics.quoted import counted
from anystep.metrics.reference import Reference, read_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

SHAPE = (3, 4, 4)


class Net(nn.Module):
    """Six features of uint8 RGB images, as a program with StyleGAN's flag."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(48, 6, generator=generator) / 48)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8 and return_features
        return x.flatten(1).float() @ self.weight


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "inception.pt"
    torch.jit.script(Net()).save(str(path))
    return path


@pytest.fixture
def features(program):
    return TorchScriptFeatures(program)


def pictures(n, seed=0):
    """uint8 (n, 4, 4, 3), as files hold them."""
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def in_scale(array):
    """Those pictures in the model's scale."""
    return torch.from_numpy(array).movedim(-1, 1).float() / 127.5 - 1


def statistics(array):
    """mu and sigma, as the scripts behind published statistics compute them."""
    x = np.moveaxis(array, -1, 1).reshape(len(array), -1).astype(np.float32)
    rows = (torch.from_numpy(x) @ Net().weight.detach()).double().numpy()
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def published(a, b):
    """The distance as those scripts compute it (Heusel et al.): scipy's root of a product."""
    means = np.square(a["mu"] - b["mu"]).sum()
    root = scipy.linalg.sqrtm(a["sigma"] @ b["sigma"])
    return float(means + np.trace(a["sigma"] + b["sigma"] - 2 * root.real))


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


# Reference statistics


def test_statistics_and_pictures_of_a_file_give_one_distance(features, tmp_path):
    real, made = pictures(400), pictures(300, 1) // 2 + 60
    x1 = in_scale(made)
    expected = published(statistics(made), statistics(real))
    for name, arrays in {
        "statistics": statistics(real),
        "pictures": {"arr_0": real},
        "both, as ADM has it": {"arr_0": pictures(9), **statistics(real), "mu_s": np.zeros(2)},
    }.items():
        reference = read_reference(saved(tmp_path / "r.npz", **arrays), features, x1[0])
        (found,) = reference(x1, features(x1)).values()
        print(f"{name}: {found:.9f} against {expected:.9f}")
        assert found == pytest.approx(expected, rel=1e-6) and expected > 1


def test_distance_of_a_set_to_its_own_statistics_is_zero(features, tmp_path):
    real = pictures(50)
    reference = read_reference(
        saved(tmp_path / "r.npz", **statistics(real)), features, in_scale(real)[0]
    )
    (found,) = reference(in_scale(real), features(in_scale(real))).values()
    print(f"distance of a set to itself: {found:.1e}")
    assert found == pytest.approx(0, abs=1e-5)


def test_only_50000_rounded_samples_in_inception_features_are_called_so(
    program, features, monkeypatch
):
    def name(features, n):
        one = Reference(program, features, torch.zeros(6), torch.eye(6), "")
        return one.name(n)

    assert name(features, 2048) == "Fréchet-2048 (features inception.pt)"
    assert name(features, 50_000) == "Fréchet-50000 (features inception.pt)"
    monkeypatch.setattr(references, "INCEPTION", features.digest)
    assert name(features, 50_000) == "FID-50k (features inception.pt)"
    assert name(features, 2048) == "FID-2048 (features inception.pt)"
    assert name(features, 49_999) == "FID-49999 (features inception.pt)"
    for other in (
        TorchScriptFeatures(program, uint8=False),
        TorchScriptFeatures(program, size=299),
    ):
        assert name(other, 50_000) == "Fréchet-50000 (features inception.pt)"
    assert counted("IS", 50_000) == "IS-50k" and counted("IS", 10) == "IS-10"


def test_note_says_file_hash_resizing_and_rounding(program, features, tmp_path):
    path = saved(tmp_path / "r.npz", arr_0=pictures(20))
    digest, other = (hashlib.sha256(p.read_bytes()).hexdigest() for p in (program, path))
    reference = read_reference(path, features, in_scale(pictures(1))[0])
    for word in ("Fréchet to the 20 pictures in r.npz", other, "features of inception.pt"):
        assert word in reference.note
    for word in ("inception.pt", digest, "not resized", "rounded to uint8"):
        assert word in features.name
    assert "resized to 299 x 299" in TorchScriptFeatures(program, size=299).name
    assert "floats" in TorchScriptFeatures(program, uint8=False).name


def test_samples_without_a_distance_have_none(features, tmp_path):
    x = in_scale(pictures(5))
    path = saved(tmp_path / "r.npz", **statistics(pictures(20)))
    reference = read_reference(path, features, x[0])
    assert reference(x[:1], features(x[:1])) == {}
    assert reference(x, features(x) / 0) == {}


def test_bad_reference_files_are_one_line(features, tmp_path):
    x = in_scale(pictures(1))[0]
    good = statistics(pictures(20))
    tilted = good["sigma"] + np.triu(np.ones((6, 6)), 1)
    path = tmp_path / "r.npz"
    for arrays, message in (
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "2048 features and .* gives 6"),
        ({"mu": good["mu"], "sigma": np.eye(5)}, "no mean"),
        ({"mu": good["mu"].astype(int), "sigma": np.eye(6)}, "no mean"),
        ({"mu": good["mu"] + np.nan, "sigma": np.eye(6)}, "NaN"),
        ({"mu": good["mu"], "sigma": tilted}, "not symmetric"),
        ({"m": np.zeros(3)}, "holds m: a reference has mu and sigma"),
        ({}, "holds nothing"),
        ({"arr_0": np.zeros((9, 4, 4, 3))}, "no uint8 pictures"),
        ({"arr_0": np.zeros((9, 8, 4, 3), np.uint8)}, r"\(3, 8, 4\), the model makes \(3, 4, 4\)"),
        ({"arr_0": np.array([object()], dtype=object)}, "not an .npz file of arrays"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_reference(saved(path, **arrays), features, x)
        assert "\n" not in str(error.value)
    for gone in (tmp_path / "gone.npz", tmp_path):
        with pytest.raises(UserError):
            read_reference(gone, features, x)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_reference_files_are_one_line(features, tmp_path, save):
    x, path = in_scale(pictures(1))[0], tmp_path / "r.npz"
    save(path, **statistics(pictures(20)))
    whole, third = path.read_bytes(), len(path.read_bytes()) // 3
    np.save(tmp_path / "single.npy", np.zeros(3))
    for content in (
        b"",
        b"text",
        whole[: 2 * third],
        whole[:third] + bytes(40) + whole[third + 40 :],
        (tmp_path / "single.npy").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not an \.npz file") as error:
            read_reference(path, features, x)
        assert "\n" not in str(error.value)


# torch-fidelity


@pytest.fixture
def fake(monkeypatch):
    """A torch_fidelity that records how it is called."""
    module = types.ModuleType("torch_fidelity")
    module.__version__ = "0.0.fake"
    module.calls = []

    def calculate_metrics(**kwargs):
        module.calls.append(kwargs)
        return {
            "inception_score_mean": 9.5,
            "inception_score_std": 0.1,
            "frechet_inception_distance": 3.25,
            "kernel_inception_distance_mean": 0.002,
            "kernel_inception_distance_std": 0.001,
        }

    module.calculate_metrics = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    return module


def test_torch_fidelity_is_called_as_published_numbers_are_made(fake):
    grey = torch.arange(5 * 16, dtype=torch.uint8).view(5, 1, 4, 4)
    fidelity = Fidelity(Dataset(grey))
    x1 = 2 * torch.rand(1200, 1, 4, 4) - 1
    assert fidelity(x1, x1) == {
        "FID-1200 (torch-fidelity)": 3.25,
        "KID-1200 x 1000": 2.0,
        "IS-1200": 9.5,
    }
    (call,) = fake.calls
    made, train, root = (call.pop(k) for k in ("input1", "input2", "cache_root"))
    assert call == {
        "input2_cache_name": "train",
        "isc": True,
        "fid": True,
        "kid": True,
        "isc_splits": 10,
        "kid_subset_size": 5,
        "cuda": False,
        "save_cpu_ram": True,
        "verbose": False,
    }
    assert isinstance(made, torch.utils.data.Dataset) and len(made) == 1200 and len(train) == 5
    assert all(torch.equal(train[k], grey[k].expand(3, 4, 4)) for k in range(5))
    expected = ((x1[7] + 1) * 127.5).round().byte().expand(3, 4, 4)
    assert made[7].dtype == torch.uint8 and torch.equal(made[7], expected)
    fidelity(x1[:6], x1)
    assert fake.calls[1]["cache_root"] == root  # training features are made once
    assert fake.calls[1]["kid_subset_size"] == 5 and fake.calls[1]["isc_splits"] == 6
    assert "0.0.fake" in fidelity.note and "against 5 training" in fidelity.note
    assert "FID-50k (torch-fidelity)" in fidelity(x1[:1].expand(50_000, -1, -1, -1), x1)
    assert fake.calls[2]["kid_subset_size"] == 5
    assert fidelity(x1 / 0, x1) == {} and len(fake.calls) == 3


def test_pictures_are_clamped_and_stay_in_colour():
    x = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)
    assert Pictures(lambda rows: x[rows], 1)[0].flatten().tolist() == [0, 128, 255]


def test_what_torch_fidelity_cannot_do_is_one_line(fake, monkeypatch):
    data = Dataset(torch.zeros(4, 3, 4, 4, dtype=torch.uint8))
    fake.calculate_metrics = lambda **_: 1 / 0
    with pytest.raises(UserError, match="torch-fidelity fails: division by zero"):
        Fidelity(data)(torch.zeros(4, 3, 4, 4), torch.zeros(4, 2))
    for other in (torch.zeros(4, 2), torch.zeros(4, 4, 2, 2), 9 * torch.ones(4, 3, 2, 2)):
        with pytest.raises(UserError, match="grey or RGB pictures"):
            Fidelity(Dataset(other))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"pip install 'anystep\[fidelity\]'"):
        Fidelity(data)


def test_a_torchvision_that_does_not_fit_torch_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "torch_fidelity.py").write_text(
        "raise RuntimeError('operator torchvision::nms\\ndoes not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    with pytest.raises(UserError, match="with this torch: operator torchvision::nms does not"):
        Fidelity(Dataset(torch.zeros(4, 3, 4, 4, dtype=torch.uint8)))


# Where they are shown


def test_judge_keeps_quoted_scores_beside_its_own(features, tmp_path):
    data = Dataset(torch.from_numpy(pictures(60)).movedim(-1, 1))
    path = saved(tmp_path / "r.npz", **statistics(pictures(60)))
    x, _ = data.batch(slice(None))
    reference = read_reference(path, features, x[0])
    scores = Judge(Splits(data, data), features, quoted=[reference]).scores(x, None)
    title = "Fréchet-60 (features inception.pt)"
    assert scores[title] == pytest.approx(scores["frechet"], abs=1e-5)
    assert list(scores)[-1] == title


@pytest.fixture
def run(tmp_path, program, capsys, monkeypatch):
    """`anystep eval` of a small model of pictures on the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "data.npz", x=np.moveaxis(pictures(60), -1, 1))
    shape = ["--network.patch", "2", "--network.width", "8", "--network.depth", "1"]
    train = ["train", "arrays", "--data.path", str(tmp_path / "data.npz"), "--steps", "1"]
    rest = ["--network.heads", "2", "--batch", "8", "--device", "cpu", "--log.no-tensorboard"]
    assert main([*train, *shape, *rest, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()

    def evaluate(*args):
        some = ["--steps", "1", "--n", "20", "--device", "cpu"]
        code = main(["eval", str(tmp_path / "run"), *some, *map(str, args)])
        return code, *capsys.readouterr()

    return evaluate


def test_eval_reports_the_distance_to_a_reference_file(run, program, features, tmp_path):
    path = saved(tmp_path / "published.npz", **statistics(pictures(500, 3)))
    code, text, err = run("--features", program, "--reference", path)
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "quality.json").read_text())
    score = report["rows"][-1]["scores"]["Fréchet-20 (features inception.pt)"]
    assert score > 0 and "| Fréchet-20 (features inception.pt) |" in text
    notes = " ".join(report["notes"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for word in ("published.npz", digest, features.digest, "not resized", "uint8", "20 samples"):
        assert word in notes and word in text
    print(text)


def test_eval_mistakes_are_one_line(run, program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    path = saved(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for args, message in (
        (["--reference", path], "--reference needs --features"),
        (["--features", program, "--reference", path], "2048 features"),
        (["--features", program, "--reference", tmp_path / "gone.npz"], "no such file"),
        (["--fidelity"], "pip install 'anystep[fidelity]'"),
    ):
        code, _, err = run(*args)
        assert code == 2 and message in err and err.count("\n") == 1


def test_eval_with_torch_fidelity(run, fake, tmp_path):
    code, text, err = run("--fidelity")
    assert code == 0, err
    assert "| FID-20 (torch-fidelity) | KID-20 x 1000 | IS-20 |" in text and "3.250" in text
    assert "torch-fidelity 0.0.fake" in text

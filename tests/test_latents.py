"""Stores of pixels and latents: writing, stopping and going on, reading, training, decoding."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anystep import checkpoint, cli
from anystep import encode as making
from anystep.data import Dataset, seeded
from anystep.data.folder import Folder
from anystep.data.shards import INDEX, Latents, Shards, read_index, shard_path
from anystep.encode import encode, folder_pictures, hub_pictures
from anystep.errors import UserError
from anystep.evaluate import Judge
from anystep.interop.vae import VAE, recorded
from anystep.pairs import make_pairs
from anystep.registry import from_json, to_json
from anystep.spec import ModelSpec, VAESpec

N, SHARD, SIZE = 18, 4, (16, 16)
diffusers = pytest.importorskip("diffusers")


def save_vae(folder, seed=0, **config):
    """A small autoencoder, 16x16 to 4x8x8, no layer of which is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            **config,
        )
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"), scaling_factor=0.4, shift_factor=0.25)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """18 random pictures of two classes; read as 16x16 they are as they were drawn."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(N):
        path = folder / ("cat", "dog")[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(pictures, out, vae_folder=None, **options):
    vae = None if vae_folder is None else VAE(str(vae_folder))
    options = {"size": SIZE, "per_shard": SHARD, "batch": 3, "bar": False} | options
    return encode(folder_pictures(pictures), out, vae=vae, **options)


def whole(folder):
    return Shards(folder, held_out=0).load().train


def pixels_of(pictures):
    """The same pictures as `Folder` reads them, in their order on the disk."""
    files = sorted(pictures.glob("*/*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])


def complaint(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# --- what is stored -----------------------------------------------------------------------------


def test_pixels_are_those_of_the_folder(pictures, tmp_path):
    index = make(pictures, tmp_path / "s")
    data, folder = whole(tmp_path / "s"), Folder(pictures, SIZE, held_out=0).load().train
    order = folder.x.flatten(1).double().sum(1).argsort()  # `split` shuffles each its own way
    ours = data.x[:].flatten(1).double().sum(1).argsort()
    assert torch.equal(data.x[:][ours], folder.x[order])
    assert torch.equal(data.labels[ours], folder.labels[order])
    assert data.class_names == ("cat", "dog") and data.scale == "[-1, 1]" and data.vae is None
    assert data.shape == (3, 16, 16) and index.count == 5 and len(data) == N
    assert torch.equal(data.batch(slice(0, 3))[0], data.x[:3].float() / 127.5 - 1)


def test_latents_are_those_the_vae_gives_of_the_same_pixels(pictures, vae_folder, tmp_path):
    index = make(pictures, tmp_path / "s", vae_folder)
    x = torch.cat([load_file(shard_path(tmp_path / "s", k))["x"] for k in range(5)])
    net = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        wanted = net.encode(pixels_of(pictures).float() / 127.5 - 1).latent_dist
    assert x.dtype == torch.float16 and index.shape == (8, 8, 8)
    torch.testing.assert_close(x[:, :4].float(), wanted.mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(x[:, 4:].float(), wanted.logvar, atol=2e-3, rtol=2e-3)
    data = whole(tmp_path / "s")
    mean, _ = data.batch(slice(0, N))
    assert data.shape == (4, 8, 8) == mean.shape[1:] and data.scale == "raw"
    torch.testing.assert_close(mean, (data.x[:][:, :4].float() - 0.25) * 0.4)


def test_a_draw_has_the_moments_that_are_stored(pictures, vae_folder, tmp_path):
    make(pictures, tmp_path / "s", vae_folder)
    data = whole(tmp_path / "s")
    x = data.read(torch.tensor([3])).x.clone()
    x[:, 4:] = torch.linspace(-3, 1, x[:, 4:].numel()).view_as(x[:, 4:])
    drawn = data.draw(x.expand(20_000, -1, -1, -1), seeded(0, 0))
    mean, log_variance = x[0].float().chunk(2)
    std = (log_variance / 2).exp() * 0.4
    error = (drawn.mean(0) - (mean - 0.25) * 0.4) / std
    assert error.abs().max() < 5 / 20_000**0.5
    torch.testing.assert_close(drawn.std(0), std, rtol=0.03, atol=0)
    assert torch.equal(data.draw(x, seeded(1, 2)), data.draw(x, seeded(1, 2)))
    assert not torch.equal(data.draw(x, seeded(1, 2)), data.draw(x, seeded(1, 3)))


def test_flip_stores_the_latent_of_the_mirrored_picture(pictures, vae_folder, tmp_path):
    index = make(pictures, tmp_path / "s", vae_folder, flip=True)
    data = whole(tmp_path / "s")
    stored, vae = data.x[:], VAE(str(vae_folder))
    assert index.shape == (2, 8, 8, 8) and data.shape == (4, 8, 8)
    x = (pixels_of(pictures).float() / 127.5 - 1)[read_order(tmp_path / "s", data)]
    for k, side in enumerate((x, x.flip(-1))):
        torch.testing.assert_close(stored[:, k].float(), vae.moments(side), atol=2e-3, rtol=2e-3)
    assert (stored[:, 1] - stored[:, 0].flip(-1)).abs().max() > 0.05  # not the mirrored latent
    torch.testing.assert_close(data.draw(stored), (stored[:, 0, :4].float() - 0.25) * 0.4)
    still = stored.clone()
    still[:, :, 4:] = -60  # no noise: a draw is one of the two means
    drawn = data.draw(still[:1].expand(2000, -1, -1, -1, -1), seeded(0, 0))
    means = (still[0, :, :4].float() - 0.25) * 0.4
    first, second = (torch.isclose(drawn, m, atol=1e-5).flatten(1).all(1) for m in means)
    assert bool((first ^ second).all()) and 900 < int(second.sum()) < 1100


def read_order(folder, data):
    """Which picture of the source each row of `data` is."""
    return torch.arange(N) if data.x.index is None else data.x.index


def test_the_index_says_where_everything_came_from(pictures, vae_folder, tmp_path):
    make(pictures, tmp_path / "s", vae_folder)
    index = json.loads((tmp_path / "s" / INDEX).read_text())
    assert index["source"]["name"] == str(pictures) and index["n"] == N
    assert index["size"] == [16, 16] and index["class_names"] == ["cat", "dog"]
    vae = index["vae"]
    assert (vae["name"], vae["scale"], vae["shift"]) == (str(vae_folder), 0.4, 0.25)
    for k, entry in enumerate(index["shards"]):
        data = shard_path(tmp_path / "s", k).read_bytes()
        assert entry == {"rows": min(4, N - 4 * k), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_hugging_face_dataset_gives_the_same(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(pictures.glob("*/*.png"))
    names = ["cat", "dog"]
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
    )
    rows = {
        "picture": [str(f) for f in files],
        "kind": [names.index(f.parent.name) for f in files],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "hf")
    options = ("--size", "16", "16", "--split", "train", "--image", "picture")
    args = ["encode", tmp_path / "hf", *options, "--label", "kind", "--out", tmp_path / "a"]
    assert cli.main([str(a) for a in args]) == 0
    make(pictures, tmp_path / "b", per_shard=None)
    a, b = whole(tmp_path / "a"), whole(tmp_path / "b")
    assert torch.equal(a.x[:], b.x[:]) and torch.equal(a.labels, b.labels)
    assert a.class_names == b.class_names
    source = read_index(tmp_path / "a").source
    assert "no column 'image' of images" in complaint(hub_pictures, replace(source, image="image"))
    assert "no column 'label'" in complaint(hub_pictures, replace(source, label="label"))
    missing = complaint(hub_pictures, replace(source, name=str(tmp_path)))
    assert f"cannot load split 'train' of the dataset {tmp_path}" in missing


# --- stopping and going on ----------------------------------------------------------------------


class PowerCut(Exception):
    pass


def test_stopped_it_goes_on_and_ends_as_if_never_stopped(
    pictures, vae_folder, tmp_path, monkeypatch
):
    make(pictures, tmp_path / "whole", vae_folder)
    parts, made = tmp_path / "parts", []
    usual = making.save

    def dying(path, tensors):
        made.append(path.name)
        if len(made) == 3:
            raise PowerCut
        usual(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(making, "save", dying)
        with pytest.raises(PowerCut):
            make(pictures, parts, vae_folder)
        times = {p: p.stat().st_mtime_ns for p in parts.glob("shard-*")}
        assert len(times) == 2
        message = complaint(whole, parts)
        assert "holds 2 of 5 shards: the same anystep encode command" in message
        make(pictures, parts, vae_folder)
    assert made[3:] == [f"shard-00000{k}.safetensors" for k in (2, 3, 4)]
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert bytes_of(parts) == bytes_of(tmp_path / "whole")


KILLED = """
import os, signal, sys
from anystep import checkpoint, cli
usual, shards = checkpoint.sync, 0
def sync(path):
    global shards
    usual(path)
    shards += path.name.startswith(".shard") or path.name.startswith(".index")
    if shards == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.sync = sync
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("at", [5, 6])  # as a shard, and as the index, is about to get its name
def test_killed_it_goes_on_and_ends_as_if_never_killed(pictures, tmp_path, at):
    make(pictures, tmp_path / "whole")
    parts = tmp_path / "parts"
    args = ["encode", pictures, "--out", parts, "--size", "16", "16", "--per-shard", SHARD]
    done = subprocess.run([sys.executable, "-c", KILLED, str(at), *map(str, args)], check=False)
    assert done.returncode == -signal.SIGKILL
    there = sorted(p.name for p in parts.iterdir() if p.name != ".lock")
    half = [name for name in there if name.endswith(".tmp")]
    assert half == [{5: ".index.json.tmp", 6: ".shard-000002.safetensors.tmp"}[at]]
    times = {p: p.stat().st_mtime_ns for p in parts.glob("shard-*")}
    assert len(times) == 2
    assert cli.main([str(a) for a in args]) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert bytes_of(parts) == bytes_of(tmp_path / "whole")


def test_a_store_made_otherwise_is_not_mixed(pictures, vae_folder, tmp_path):
    out = tmp_path / "s"
    make(pictures, out, vae_folder)
    before = bytes_of(out)
    other = save_vae(tmp_path / "other", seed=1, scaling_factor=0.4, shift_factor=0.25)
    for options, named in (
        ({"vae_folder": other}, "vae.weights: "),
        ({"vae_folder": vae_folder, "size": (8, 16)}, "size: [16, 16] -> [8, 16]"),
        ({"vae_folder": vae_folder, "flip": True}, "flip: False -> True"),
        ({"vae_folder": None}, "dtype: float16 -> uint8"),
    ):
        message = complaint(make, pictures, out, **options)
        assert named in message and "choose another --out" in message
    moved = save_vae(tmp_path / "moved", scaling_factor=0.4, shift_factor=0.25)
    make(pictures, out, moved)
    assert bytes_of(out) == before


# --- reading ------------------------------------------------------------------------------------


def test_rows_are_read_as_from_a_tensor(pictures, tmp_path):
    make(pictures, tmp_path / "s")
    train, held_out = Shards(tmp_path / "s", held_out=0.3).load()
    column = whole(tmp_path / "s").x.select(torch.arange(N))
    files = torch.cat([load_file(shard_path(tmp_path / "s", k))["x"] for k in range(5)])
    for data in (train, held_out):
        assert torch.equal(data.x[:], files[data.x.index])
        assert torch.equal(data.read(slice(2, 99)).labels, data.labels[2:])
    assert sorted(torch.cat([train.x.index, held_out.x.index]).tolist()) == list(range(N))
    assert len(held_out) == 5 and held_out.x.shape == (5, 3, 16, 16)
    memory = column[:]
    rows = torch.tensor([17, 0, 3, 3, 4])
    assert torch.equal(column[rows], memory[rows])
    assert torch.equal(column[5:1000], memory[5:]) and torch.equal(column[1:9:3], memory[1:9:3])
    assert column[torch.arange(0)].shape == (0, 3, 16, 16)
    assert torch.equal(train.rows(rows % 3).x[:], train.x[rows % 3])
    for wrong in (torch.tensor([N]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            column[wrong]


def test_the_digest_follows_content_rows_and_scale(pictures, vae_folder, tmp_path):
    make(pictures, tmp_path / "a", vae_folder)
    train, held_out = Shards(tmp_path / "a", held_out=0.3).load()
    digests = {train.digest(), held_out.digest(), whole(tmp_path / "a").digest()}
    digests.add(replace(train, vae=replace(train.vae, scale=0.5)).digest())
    digests.add(replace(train, contents="another").digest())
    digests |= {train.rows(torch.arange(3) + k).digest() for k in (0, 1)}
    assert len(digests) == 7
    (tmp_path / "a").rename(tmp_path / "b")
    assert Shards(tmp_path / "b", held_out=0.3).load().train.digest() == train.digest()


READER = """
import re, sys, torch
from pathlib import Path
from anystep.data.shards import Shards
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
data = Shards(Path(sys.argv[1])).load().train
order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(64)
for rows in order[:3]:  # what code and buffers take
    data.read(rows).x.long().sum()
before, total = peak(), 0
for rows in order:
    total += int(data.read(rows).x.long().sum())
print(peak() - before, total)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")  # noqa: PTH110
def test_memory_does_not_grow_with_what_is_read(pictures, tmp_path):
    make(pictures, tmp_path / "s")
    shape, rows = (3, 64, 64), 1500
    x = torch.randint(256, (rows, *shape), dtype=torch.uint8)
    index = read_index(tmp_path / "s")
    for k in range(8):  # 147 MB
        save_file({"x": x, "labels": torch.arange(rows) % 2}, shard_path(tmp_path / "s", k))
    entries = tuple(replace(index.shards[0], rows=rows) for _ in range(8))
    index = replace(index, n=8 * rows, per_shard=rows, shape=shape, shards=entries)
    checkpoint.write_json(tmp_path / "s" / INDEX, to_json(index))
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "s"], capture_output=True, text=True, check=True
    )
    grown, total = map(int, done.stdout.split())
    expected = 8 * int(x.long().sum())
    assert abs(total / expected - 0.9) < 0.01  # all of the training split was read
    assert grown < 12_000  # kB: a twelfth of the data


def test_damage_is_one_line(pictures, vae_folder, tmp_path):
    folder = tmp_path / "s"
    make(pictures, folder, vae_folder)
    data, shard = whole(folder), shard_path(folder, 1)
    content, again = shard.read_bytes(), "remove it, and the same anystep encode command"
    for damaged in (content[:50], content[:-1], b""):
        shard.write_bytes(damaged)
        for call in (lambda: whole(folder), lambda: make(pictures, folder, vae_folder)):
            message = complaint(call)
            assert f"{shard} is damaged" in message and again in message
    assert again in complaint(lambda: whole(folder).x[:]) and again in complaint(lambda: data.x[:])
    shard.unlink()
    assert f"{shard} is missing" in complaint(whole, folder)
    make(pictures, folder, vae_folder)
    assert shard.read_bytes() == content
    index = json.loads((folder / INDEX).read_text())
    for text, message in (
        ("{", "is damaged"),
        ("[1]", "is not of a format"),
        (json.dumps(index | {"n": "x"}), "was not written by anystep encode"),
        (json.dumps({k: v for k, v in index.items() if k != "n"}), "was not written by"),
        (json.dumps(index | {"n": 0}), "is damaged"),
        (json.dumps(index | {"shape": [8, 8, 9]}), "holds torch.float16 [8, 8, 8]"),
        (json.dumps(index | {"class_names": []}), "has 4 labels"),
    ):
        (folder / INDEX).write_text(text)
        assert message in complaint(whole, folder)
    assert f"{tmp_path / INDEX} is missing" in complaint(whole, tmp_path)


def test_a_picture_that_cannot_be_read(pictures, tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes((pictures / "cat" / "00.png").read_bytes())
    (tmp_path / "p" / "cat" / "b.png").write_bytes(b"no picture")
    message = complaint(make, tmp_path / "p", tmp_path / "s")
    assert "'cat/b.png' in" in message and "--on-error skip" in message
    make(tmp_path / "p", tmp_path / "s", on_error="skip")
    assert whole(tmp_path / "s").labels.tolist() in ([0, 1], [1, 0])


def test_judging_reads_no_more_than_it_needs(pictures, vae_folder, tmp_path, monkeypatch):
    make(pictures, tmp_path / "s", vae_folder)
    splits, asked = Shards(tmp_path / "s", held_out=0.3).load(), []
    usual = Latents.read
    monkeypatch.setattr(Latents, "read", lambda self, r: asked.append(r) or usual(self, r))
    monkeypatch.setattr("anystep.evaluate.REFERENCE", 7)
    monkeypatch.setattr("anystep.metrics.classifier.STEPS", 2)
    monkeypatch.setattr("anystep.metrics.classifier.JUDGED", 3)
    judge = Judge(splits)
    assert judge.size == 7 and judge.x.shape == (7, 4, 8, 8)
    assert all(len(torch.arange(N)[r]) in (7, 3, 128) for r in asked)
    assert judge.scores(torch.randn(20, 4, 8, 8), torch.arange(20) % 2)["frechet"] > 0


# --- the model and the command line -------------------------------------------------------------

TINY = [
    *("--network.width", "16", "--network.depth", "1", "--network.heads", "2", "--batch", "8"),
    *("--log.trackers", "--device", "cpu", "--steps", "3", "--log.look-every", "0"),
]


@pytest.fixture
def run(capsys):
    def call(*args):
        code = cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, re.sub(r".*\r.*|.*it/s.*|.*image/s.*|.*step/s.*", "", out.err)

    return call


def refused(result, *fragments):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("anystep: "), err
    for fragment in fragments:
        assert fragment in lines[0], err


def test_from_pictures_to_pictures(pictures, vae_folder, tmp_path, run, monkeypatch):
    store, out = tmp_path / "store", tmp_path / "run"
    options = ("--size", 16, 16, "--vae", vae_folder, "--flip", "--out", store)
    code, text, _ = run("encode", pictures, *options)
    assert code == 0 and f"18 latents (2, 8, 8, 8) in {store}" in text
    train = ("train", "shards", "--data.path", store, *TINY, "--out", out)
    refused(run(*train, "--flip"), "a mirrored latent is not the latent of the mirrored picture")
    monkeypatch.setattr("anystep.metrics.classifier.STEPS", 2)
    assert run(*train, "--log.look-every", 2, "--log.look-steps", 1)[0] == 0
    assert Image.open(out / "samples" / "step-00000002.png").height > 2 * 16
    model = checkpoint.load_model(out)
    assert model.spec.shape == (4, 8, 8) and model.spec.data == "raw"
    assert model.spec.vae == VAE(str(vae_folder)).spec

    draw = ("sample", out, "--n", 6, "--steps", 2, "--device", "cpu")
    assert run(*draw, "--out", tmp_path / "z.npz")[0] == 0
    assert run(*draw, "--out", tmp_path / "x.npz", "--decode")[0] == 0
    assert run(*draw, "--out", tmp_path / "x")[0] == 0
    assert run(*draw, "--out", tmp_path / "x.png")[0] == 0
    assert run(*draw, "--interpolate", "--out", tmp_path / "strip.png")[0] == 0
    z, x = (np.load(tmp_path / f"{k}.npz")["samples"] for k in "zx")
    assert z.shape == (6, 4, 8, 8) and x.shape == (6, 3, 16, 16)
    net = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        wanted = net.decode(torch.from_numpy(z) / 0.4 + 0.25).sample.clamp(-1, 1)
    np.testing.assert_allclose(x, wanted.numpy(), atol=1e-5)
    files = sorted((tmp_path / "x").iterdir())
    picture = np.array(Image.open(files[2])).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(picture, x[2], atol=0.005)

    moved = vae_folder.rename(vae_folder.with_name("moved"))
    try:
        refused(run(*draw, "--out", tmp_path / "y.png"), "say where it lies with --vae FOLDER")
        assert run(*draw, "--out", tmp_path / "y.png", "--vae", moved)[0] == 0
        assert run(*draw, "--out", tmp_path / "y.npz")[0] == 0
    finally:
        moved.rename(vae_folder)
    same = {"scaling_factor": 0.4, "shift_factor": 0.25}
    for seed, config, named in (
        (1, same, "weights"),
        (0, same | {"scaling_factor": 0.5}, "scale 0.4 -> 0.5"),
        (0, same | {"act_fn": "relu"}, "weights"),
    ):
        wrong = save_vae(tmp_path / "wrong", seed, **config)
        message = f"{wrong} is another VAE than the model's"
        refused(run(*draw, "--out", tmp_path / "n.png", "--vae", wrong), message, named)
    refused(run(*draw, "--out", tmp_path / "n.png", "--vae", store), "there is no VAE in")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(run(*draw, "--out", tmp_path / "n.png"), "pip install 'anystep[latents]'")
    assert not (tmp_path / "n.png").exists()


def test_a_run_on_other_latents_is_not_gone_on_with(pictures, vae_folder, tmp_path, run):
    for name, folder in (("a", vae_folder), ("b", save_vae(tmp_path / "v", seed=1))):
        make(pictures, tmp_path / name, folder)
    train = ("train", "shards", "--method", "flow_matching", *TINY)
    train = (*train, "--out", tmp_path / "run", "--data.path")
    assert run(*train, tmp_path / "a")[0] == 0
    (tmp_path / "a").rename(tmp_path / "c")
    assert run(*train, tmp_path / "c")[0] == 0
    refused(run(*train, tmp_path / "b"), "the data have changed since")
    teach = ("--method", "progressive_distillation", "--teacher", tmp_path / "run")
    train = ("train", "shards", *TINY, "--out", tmp_path / "pd", *teach, "--steps", 20)
    refused(run(*train, "--data.path", tmp_path / "b"), "was trained for vae")


def test_pairs_of_a_latent_model_keep_its_vae(pictures, vae_folder, tmp_path, run):
    make(pictures, tmp_path / "s", vae_folder)
    train = ("train", "shards", "--data.path", tmp_path / "s", *TINY, "--out", tmp_path / "run")
    assert run(*train, "--method", "flow_matching")[0] == 0
    make_pairs(tmp_path / "run", tmp_path / "pairs", n=8, steps=2, bar=False)
    options = ("--data.path", tmp_path / "pairs", "--teacher", tmp_path / "run")
    out = ("--out", tmp_path / "reflow")
    assert run("train", "pairs", "--method", "reflow", *options, *TINY, *out)[0] == 0
    assert checkpoint.load_model(tmp_path / "reflow").spec.vae == VAE(str(vae_folder)).spec


def test_pixels_train_too(pictures, tmp_path, run):
    assert run("encode", pictures, "--size", 8, 8, "--out", tmp_path / "s")[0] == 0
    train = ("train", "shards", "--data.path", tmp_path / "s", *TINY, "--flip")
    assert run(*train, "--out", tmp_path / "run")[0] == 0
    spec = checkpoint.load_model(tmp_path / "run").spec
    assert spec.vae is None and spec.shape == (3, 8, 8) and spec.data == "[-1, 1]"
    draw = ("sample", tmp_path / "run", "--n", 2, "--out", tmp_path / "x.png")
    refused(run(*draw, "--decode"), "takes neither --decode nor --vae")
    assert run(*draw)[0] == 0


def test_a_spec_with_and_without_a_vae_goes_to_json_and_back():
    vae = VAESpec("name", None, "vae", "0" * 16, 0.18215, 0.1)
    spec = ModelSpec(shape=(4, 8, 8), data="raw", vae=vae)
    data = json.loads(json.dumps(to_json(spec)))
    assert from_json(ModelSpec, data) == spec
    assert from_json(ModelSpec, data).vae.subfolder == "vae"
    del data["vae"]  # a model.json of before
    assert from_json(ModelSpec, data) == replace(spec, vae=None)
    assert Dataset(torch.zeros(1, 2)).vae is None


def test_what_cannot_be_encoded_is_one_line(pictures, vae_folder, tmp_path, run):
    out = ("--out", tmp_path / "s")
    refused(run("encode", tmp_path / "none", *out), "is no folder", "--split train")
    refused(run("encode", pictures, *out, "--flip"), "pixels are mirrored at training")
    vae = ("--vae", vae_folder)
    refused(run("encode", pictures, *out, *vae, "--size", 9, 16), "multiples of 2, not (9, 16)")
    refused(run("encode", pictures, *out, *vae, "--channels", 1), "takes 3 channels, not 1")
    refused(run("encode", pictures, *out, "--size", 0, 4), "at least 1")
    refused(run("encode", pictures, *out, "--per-shard", 0), "at least 1")
    refused(run("encode", pictures, *out, "--label", "x"), "--split")
    refused(run("encode", pictures, *out, "--siez", 4), "did you mean '--size'?")
    refused(run("encode", pictures, *out, "--vae", pictures), "there is no VAE in")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "config.json").write_text("{}")
    refused(run("encode", pictures, *out, "--vae", tmp_path / "v"), "cannot load the VAE")
    train = ("train", "shards", *TINY, "--out", tmp_path / "run")
    refused(run(*train, "--data.path", tmp_path / "s"), "index.json is missing")
    refused(run(*train), "--data.path")


def test_the_recorded_vae_is_found_in_its_subfolder_from_anywhere(tmp_path, monkeypatch):
    save_vae(tmp_path / "pipeline" / "vae")
    monkeypatch.chdir(tmp_path)
    vae = VAE("pipeline", subfolder="vae")
    monkeypatch.chdir(tmp_path / "pipeline")
    assert (
        recorded(vae.spec).spec == vae.spec == recorded(vae.spec, tmp_path / "pipeline/vae").spec
    )

"""Data read while training goes on: the same pictures, each once an epoch, resumed exactly."""

import io
import json
import re
import sys
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from anystep import checkpoint, cli, registry
from anystep import train as training
from anystep.config import LogConfig, TrainConfig
from anystep.data import Splits, _stream, hub
from anystep.data.folder import Folder
from anystep.data.hub import Hub
from anystep.data.webdataset import WebDataset
from anystep.errors import UserError
from anystep.evaluate import Judge
from anystep.networks.dit import DiTConfig
from anystep.objectives.reflow import Reflow
from anystep.objectives.shortcut import Shortcut
from test_train import assert_same_run

datasets = pytest.importorskip("datasets")
wds = pytest.importorskip("webdataset")

COUNT, CLASSES = 23, ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(k):
    """Picture k, encoded; no two are alike, and all need a crop and a resize."""
    pixels = np.random.default_rng(k).integers(0, 256, (9, 12, 3), np.uint8)
    if k % 5 == 0:
        pixels = np.dstack([pixels, pixels[..., 0]])  # half transparent
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def label(k):
    return k % len(CLASSES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same pictures in every form."""
    root = tmp_path_factory.mktemp("made")
    for k in range(COUNT):
        path = root / "folder" / CLASSES[label(k)] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)), number=int64()
    )
    rows = {
        "image": [{"bytes": png(k), "path": None} for k in range(COUNT)],
        "label": [label(k) for k in range(COUNT)],
        "number": [label(k) for k in range(COUNT)],
    }
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(root / "saved", num_shards=3)
    datasets.DatasetDict(train=data).save_to_disk(root / "splits")
    (root / "parquet").mkdir()
    for k in range(4):
        data.shard(4, k).to_parquet(root / "parquet" / f"train-{k}.parquet")
    (root / "tar").mkdir()
    shards(root / "tar", range(COUNT))
    return root


def int64():
    return datasets.Value("int64")


def shards(folder, numbers, many=4, **more):
    """Tar shards of the pictures; returns their urls."""
    for s, part in enumerate(np.array_split(list(numbers), many)):
        with tarfile.open(folder / f"s-{s}.tar", "w") as tar:
            for k in part.tolist():
                files = {"png": png(k), "cls": str(label(k)).encode()} | more
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{k:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/s-{{0..{many - 1}}}.tar"


SMALL = {"size": (6, 6), "held_out": 0}
KINDS = ("saved", "splits", "imagefolder", "parquet")
STREAMS = ("stream saved", "stream imagefolder", "stream parquet", "tar")


def config(made, kind, **changes):
    options = SMALL | changes
    streamed, _, name = kind.rpartition(" ")
    if name == "tar":
        urls = f"{made}/tar/s-{{0..3}}.tar"
        return WebDataset(**{"urls": urls, "num_classes": 3, "buffer": 5} | options)
    path = str(made / name.replace("imagefolder", "folder"))
    return Hub(**{"path": path, "streaming": bool(streamed), "buffer": 5} | options)


def steps(feed, count, start=0):
    """Pictures, labels and positions of some steps."""
    return [feed(start + k) for k in range(count)]


def seen(stored):
    """Each picture with its label, as things that can be counted."""
    return [(bytes(x.numpy()), int(y)) for s in stored for x, y in zip(s.x, s.labels, strict=True)]


def complaint(make):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def truth(made):
    """What `Folder` makes of the pictures."""
    train, _ = Folder(made / "folder", size=(6, 6), held_out=0).load()
    return Counter((bytes(x.numpy()), int(y)) for x, y in zip(train.x, train.labels, strict=True))


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *STREAMS])
@pytest.mark.parametrize("held_out", [0, 7])
def test_each_picture_is_folders_and_comes_once_an_epoch(made, truth, kind, held_out):
    data, apart = config(made, kind, held_out=held_out).load()
    assert data.shape == (3, 6, 6) and data.num_classes == 3 and data.scale == "[-1, 1]"
    kept = Counter(seen([apart]))
    assert len(apart) == held_out and apart.num_classes == 3
    rest = COUNT - held_out
    read = seen(steps(data.feed(4, seed=0), rest))  # four epochs
    for epoch in range(4):
        assert Counter(read[epoch * rest : (epoch + 1) * rest]) + kept == truth
    assert read[:rest] != read[rest : 2 * rest]
    assert read != seen(steps(data.feed(4, seed=1), rest))


@pytest.mark.parametrize("kind", ["saved", "parquet", "stream parquet", "tar"])
def test_the_reference_is_training_data_in_memory(made, kind):
    asked = config(made, kind, held_out=5, reference_size=9)
    loaded = asked.load()
    reference = asked.reference(loaded)
    assert isinstance(reference, Splits) and len(reference.train) == 9
    assert not set(seen([reference.train])) & set(seen([loaded.held_out]))
    everything = set(seen(steps(loaded.train.feed(6, seed=0), 3)))
    assert set(seen([reference.train])) <= everything
    again = asked.reference(asked.load())
    assert again.train.digest() == reference.train.digest()


def test_labels_by_number_and_no_labels(made):
    data, _ = config(made, "saved", label_column="number").load()
    assert data.class_names == ("0", "1", "2")
    for kind, none in (("saved", "label_column"), ("tar", "label_key")):
        data, apart = config(made, kind, held_out=2, **{none: None}).load()
        assert data.num_classes == 0 and apart.labels is None and data.feed(2, 0)(0).labels is None


def test_names_of_the_classes_come_from_the_column(made):
    assert config(made, "stream parquet").load().train.class_names == CLASSES


def test_blocks_mix_what_stands_side_by_side(made):
    data, _ = config(made, "tar", buffer=COUNT).load()
    order = [data.stored([e]).x for e in data.examples()]
    mixed = data.feed(COUNT, 0)(0).x
    assert not torch.equal(torch.cat(order), mixed)
    read = data.source.read
    opened = []
    object.__setattr__(data.source, "read", lambda s: opened.append(s) or read(s))
    steps(data.feed(COUNT, 0), 4)
    epochs = [tuple(opened[k : k + 4]) for k in (0, 4, 8, 12)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and len(set(epochs)) > 1


def test_many_files_are_read_as_a_few_groups(made, truth, monkeypatch):
    monkeypatch.setattr(hub, "MOST_SHARDS", 3)
    data, _ = config(made, "stream parquet").load()
    assert len(data.source) == 3
    assert Counter(seen(steps(data.feed(COUNT, 0), 1))) == truth


def test_the_order_in_a_block_depends_on_seed_epoch_and_block(made, tmp_path):
    urls = shards(tmp_path, range(20), 1)  # one shard: there is nothing else to shuffle
    data, _ = WebDataset(urls=urls, num_classes=3, buffer=10, **SMALL).load()
    plain = seen([data.stored(list(data.examples()))])
    orders = set()
    for seed in (0, 1):
        read = seen(steps(data.feed(10, seed), 4))
        for start in range(0, 40, 10):
            block = plain[start % 20 : start % 20 + 10]
            orders.add(tuple(block.index(row) for row in read[start : start + 10]))
    assert len(orders) == 8 and tuple(range(10)) not in orders


def test_a_stream_sorted_by_class_is_warned_of(made, tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "SORTED", 5)
    urls = shards(tmp_path, [0, 3, 6, 9, 12, 1, 4, 2], 1)
    with pytest.warns(UserWarning, match="5 examples are all of one class"):
        WebDataset(urls=urls, num_classes=3, **SMALL | {"held_out": 5}).load()
    WebDataset(urls=urls, num_classes=3, **SMALL | {"held_out": 6}).load()


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*STREAMS, "saved"])
@pytest.mark.parametrize(("batch", "buffer", "held_out"), [(4, 5, 0), (7, 30, 7), (30, 3, 2)])
def test_every_position_goes_on_bit_for_bit(made, kind, batch, buffer, held_out):
    data, _ = config(made, kind, buffer=buffer, held_out=held_out).load()
    whole = steps(data.feed(batch, seed=3), 14)
    again, _ = config(made, kind, buffer=buffer, held_out=held_out).load()
    for k in range(13):
        feed = again.feed(batch, 3)
        feed.seek(json.loads(json.dumps(whole[k].position)))
        for a, b in zip(steps(feed, min(3, 13 - k), k + 1), whole[k + 1 :], strict=False):
            assert torch.equal(a.x, b.x) and torch.equal(a.labels, b.labels)
            assert a.position == b.position


def test_resuming_reads_one_block_again_and_no_more(made, monkeypatch):
    data, _ = config(made, "tar").load()
    position = steps(data.feed(4, seed=0), 4)[-1].position
    taken = []
    walk = type(data).walk

    def counted(*args):
        for item in walk(*args):
            taken.append(item)
            yield item

    monkeypatch.setattr(type(data), "walk", counted)
    monkeypatch.setattr(_stream, "ahead", iter)  # which would read the next one too
    feed = data.feed(4, seed=0)
    feed.seek(position)
    feed(4)
    assert position == {"epoch": 0, "block": 3, "shard": 2, "row": 3, "given": 1}
    assert len(taken) == 5


RUN = ["--network.width", "16", "--network.depth", "1", "--network.heads", "2", "--batch", "6"]
RUN += [
    "--log.save-every",
    "4",
    "--log.look-every",
    "0",
    "--device",
    "cpu",
    "--data.held-out",
    "3",
]
RUN += ["--data.size", "8", "8", "--data.buffer", "5", "--steps", "11", "--log.trackers"]


def command(made, kind, out):
    chosen = ["webdataset", "--data.num-classes", "3", "--data.urls", f"{made}/tar/s-{{0..3}}.tar"]
    if kind != "tar":
        chosen = ["hub", "--data.path", str(made / "parquet")]
        chosen += ["--data.streaming"] if kind == "stream" else []
    return ["train", *chosen, *RUN, "--out", str(out)]


@pytest.mark.parametrize("kind", ["stream", "tar", "map"])
def test_a_stopped_run_ends_where_the_undisturbed_run_ends(made, tmp_path, monkeypatch, kind):
    assert cli.main(command(made, kind, tmp_path / "whole")) == 0
    usual = training.training_step
    for step in (3, 6, 10):

        def dying(state, *rest, step=step):
            if state.step == step:
                raise RuntimeError("power cut")
            return usual(state, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(training, "training_step", dying)
            with pytest.raises(RuntimeError, match="power cut"):
                cli.main(command(made, kind, tmp_path / "parts"))
    assert cli.main(command(made, kind, tmp_path / "parts")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    facts = [
        checkpoint.read_info(checkpoint.checkpoints(tmp_path / name)[-1])["training"]["position"]
        for name in ("whole", "parts")
    ]
    assert facts[0] == facts[1] and (facts[0] is None) == (kind == "map")


# --- judging, and what is declined --------------------------------------------------------------


def test_samples_are_judged_against_the_reference(made, tmp_path):
    args = command(made, "tar", tmp_path / "run")
    args[args.index("--log.look-every") + 1] = "11"
    args += ["--data.label-key", "None", "--log.look-samples", "20"]
    assert cli.main(args) == 0
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("frechet/1" in line for line in lines)
    assert cli.main(["eval", str(tmp_path / "run"), "--n", "20", "--steps", "1"]) == 0
    assert (tmp_path / "run" / "quality.md").is_file()


def test_config_goes_through_json(made):
    for kind in ("stream parquet", "tar"):
        asked = config(made, kind)
        again = registry.from_json(type(asked), json.loads(json.dumps(registry.to_json(asked))))
        assert again == asked
        assert registry.find("anystep.data", registry.name_of(asked)) is type(asked)


def test_digest_tells_sources_apart(made, tmp_path):
    for kind in ("saved", "tar"):
        same, other = config(made, kind), config(made, kind, size=(5, 6))
        assert same.load().train.digest() == config(made, kind).load().train.digest()
        assert same.load().train.digest() != other.load().train.digest()
    moved = WebDataset(urls=shards(tmp_path, range(COUNT)), num_classes=3, **SMALL)
    assert moved.load().train.digest() != config(made, "tar").load().train.digest()


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("saved", {"image_column": "imag"}, r"unknown column .* did you mean 'image'"),
        ("saved", {"label_column": "labels"}, r"did you mean 'label'\?.*label-column None"),
        ("saved", {"image_column": "number"}, r"holds int64, not pictures"),
        ("stream saved", {"image_column": "imag"}, r"did you mean 'image'"),
        ("stream saved", {"label_column": "number"}, r"no ClassLabel.*no-streaming"),
        ("splits", {"split": "trian"}, r"unknown split .*did you mean 'train'"),
        ("parquet", {"split": "trian"}, r"cannot open .*Unknown split"),
        ("stream parquet", {"split": "trian"}, r"cannot open .*trian"),
        ("saved", {"path": "./missing"}, r"there is no folder ./missing"),
        ("saved", {"path": "nobody/nothing"}, r"cannot open the dataset nobody/nothing"),
        ("saved", {"held_out": COUNT}, r"nothing is left.*held-out"),
        ("tar", {"held_out": COUNT}, r"nothing is left.*held-out"),
        ("tar", {"num_classes": 0}, r"--data.num-classes"),
        ("tar", {"num_classes": 2, "held_out": 3}, r"label of .* is 2, not one of 0 to 1"),
        ("tar", {"label_key": "clss"}, r"did you mean 'cls'"),
        ("tar", {"image_key": "pngg"}, r"did you mean 'png'"),
        ("tar", {"urls": "nowhere-{0..3}.tar"}, r"there is no file nowhere-0.tar"),
        ("tar", {"urls": "pipe:touch executed"}, r"neither a file nor http"),
        ("tar", {"buffer": 0}, r"buffer must be at least 1"),
        ("saved", {"size": (0, 3)}, r"size must be"),
    ],
)
def test_mistakes_are_answered_in_one_line(made, kind, changes, says):
    assert re.search(says, complaint(lambda: config(made, kind, **changes).load()))


def bad_pictures(tmp_path, kind):
    """Data whose last picture is no picture, and their config."""
    if kind == "tar":
        urls = shards(tmp_path, range(COUNT - 1), 1)
        with tarfile.open(tmp_path / "s-0.tar", "a") as tar:
            for name, content in (("999.png", b"no picture"), ("999.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return WebDataset(urls=urls, num_classes=3, **SMALL), "999 in "
    content = [png(k) for k in range(COUNT - 1)] + [b"no picture"]
    data = datasets.Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in content]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "bad")
    streaming = kind == "stream"
    asked = Hub(path=str(tmp_path / "bad"), label_column=None, streaming=streaming, **SMALL)
    return asked, "row 22" if kind == "map" else "of shard"


@pytest.mark.parametrize("kind", ["map", "stream", "tar"])
def test_an_unreadable_picture_is_named_in_the_main_thread(made, tmp_path, kind, capsys):
    asked, says = bad_pictures(tmp_path, kind)
    path = tmp_path / "config.json"
    start = training_config(asked, tmp_path / "run")
    path.write_text(json.dumps(registry.to_json(start)))
    assert cli.main(["train", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot read the picture" in error and says in error


def training_config(data, out):
    return TrainConfig(
        data=data,
        network=DiTConfig(patch=2, width=16, depth=1, heads=2),
        objective=Shortcut(),
        log=LogConfig(look_every=0, trackers=()),
        out=out,
        steps=12,
        batch=5,
        device="cpu",
    )


def test_a_shard_that_is_cut_off_or_gone_is_named(made, tmp_path):
    urls = shards(tmp_path, range(COUNT))
    data, _ = WebDataset(urls=urls, num_classes=3, **SMALL).load()
    whole = (tmp_path / "s-2.tar").read_bytes()
    (tmp_path / "s-2.tar").write_bytes(whole[:700])  # in the middle of a picture
    assert "cannot read" in complaint(lambda: steps(data.feed(COUNT, 0), 1))
    (tmp_path / "s-2.tar").unlink()
    assert "s-2.tar" in complaint(lambda: steps(data.feed(COUNT, 0), 1))


def test_data_that_shrank_are_noticed_on_resume(made, tmp_path):
    urls = shards(tmp_path, range(COUNT))
    asked = WebDataset(urls=urls, num_classes=3, buffer=20, **SMALL)
    position = steps(asked.load().train.feed(6, 0), 3)[-1].position
    shards(tmp_path, range(8))
    feed = asked.load().train.feed(6, 0)
    feed.seek(position)
    assert "fewer examples" in complaint(lambda: feed(3))


def test_reflow_is_declined_on_a_stream(made, tmp_path):
    run = replace(training_config(config(made, "tar"), tmp_path), objective=Reflow())
    run = replace(run, teacher=tmp_path)
    assert "pairs of noise" in complaint(lambda: training.train(run, bar=False))


@pytest.mark.parametrize(("kind", "library"), [("saved", "datasets"), ("tar", "webdataset")])
def test_a_missing_library_names_the_extra(made, monkeypatch, kind, library):
    monkeypatch.setitem(sys.modules, library, None)
    extra = "hub" if library == "datasets" else library
    assert f"anystep[{extra}]" in complaint(config(made, kind).load)


def test_a_judge_takes_the_reference(made):
    asked = config(made, "stream parquet", held_out=5, label_column=None)
    judge = Judge(asked.reference(asked.load()))
    assert judge.size == COUNT - 5 and judge.floor() is not None

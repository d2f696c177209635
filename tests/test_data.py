"""What each dataset promises: exact pixels, the right labels, and one line for a bad input."""

import gzip
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from anystep import registry
from anystep.data import Dataset, split
from anystep.data import folder as folder_module
from anystep.data.arrays import Arrays
from anystep.data.digits import Digits
from anystep.data.fashion_mnist import CLASSES, FashionMNIST, parse_idx
from anystep.data.folder import Folder
from anystep.data.pairs import Pairs
from anystep.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def complaint(make):
    """The message of the UserError that `make()` raises, checked to be one line."""
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def all_rows(data):
    """Training and held-out examples together, in an order that does not depend on the split."""
    train, held_out = data
    return sorted(map(bytes, torch.cat([train.x, held_out.x]).flatten(1).numpy()))


# --- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("digits", Digits),
        ("folder", Folder),
        ("fashion-mnist", FashionMNIST),
        ("arrays", Arrays),
        ("pairs", Pairs),
    ],
)
def test_registry_finds_each_dataset_by_its_file_name(name, cls):
    assert registry.find("anystep.data", name) is cls


def test_config_survives_json():
    config = Folder(Path("pictures"), size=(8, 4), channels=1, on_error="skip")
    assert registry.from_json(Folder, registry.to_json(config)) == config


def test_batch_maps_black_to_minus_one_and_white_to_one():
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1)
    x1, labels = Dataset(x).batch(slice(None))
    torch.testing.assert_close(x1.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert labels is None


def test_split_is_a_partition_that_keeps_labels_with_their_rows():
    x = torch.arange(103.0)[:, None]
    train, held_out = split(Dataset(x, torch.arange(103), tuple("c" * 103)), 0.25)
    assert (len(train), len(held_out)) == (78, 25)
    both = torch.cat([train.x, held_out.x]).flatten()
    assert torch.equal(both.sort().values, x.flatten())
    assert torch.equal(torch.cat([train.labels, held_out.labels]), both.long())


@pytest.mark.parametrize("held_out", [-0.1, 1.0, 10])
def test_split_refuses_a_share_outside_0_1(held_out):
    assert "held_out" in complaint(lambda: split(Dataset(torch.zeros(5, 1)), held_out))


# --- digits -------------------------------------------------------------------------------------


def test_digits_are_all_of_scikit_learns_in_model_scale():
    datasets = pytest.importorskip("sklearn.datasets")
    train, held_out = Digits().load()
    assert (len(train), len(held_out)) == (1438, 359)
    assert train.shape == (1, 8, 8) and train.num_classes == 10
    raw = torch.from_numpy(datasets.load_digits().images).float().flatten(1)
    both = torch.cat([train.x, held_out.x])
    assert both.min() == -1 and both.max() == 1
    restored = (both.flatten(1) + 1) * 8
    assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, raw.tolist()))


def test_digits_labels_belong_to_their_images():
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    pixels = [row.astype("f4").tobytes() for row in bunch.data]
    known = dict(zip(pixels, bunch.target.tolist(), strict=True))
    for part in Digits().load():
        rows = ((part.x + 1) * 8).numpy()
        assert [known[row.tobytes()] for row in rows] == part.labels.tolist()


def test_digits_split_is_the_same_each_time_and_disjoint():
    pytest.importorskip("sklearn")
    first, second = Digits().load(), Digits().load()
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.held_out.labels, second.held_out.labels)
    train = set(map(bytes, first.train.x.numpy()))
    assert not train & set(map(bytes, first.held_out.x.numpy()))


# --- folder -------------------------------------------------------------------------------------


def save(path, color, size=(5, 7), mode="RGB", **options):
    """Write an image of one colour; its parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def only(path, **options):
    """The one image in the folder `path`, (C, H, W)."""
    train, held_out = Folder(path, **options).load()
    assert len(train) == 1 and len(held_out) == 0
    return train.x[0]


def solid(image):
    """The colour of an image that has one, channel by channel."""
    assert (image == image[:, :1, :1]).all()
    return tuple(image[:, 0, 0].tolist())


@pytest.mark.parametrize("name", ["a.png", "a.BMP", "a.tiff", "a.TIF", "a.gif"])
def test_a_solid_colour_is_kept_exactly(tmp_path, name):
    save(tmp_path / name, (250, 128, 3))
    assert solid(only(tmp_path)) == (250, 128, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp"])
def test_a_solid_colour_survives_lossy_formats(tmp_path, name):
    save(tmp_path / name, (250, 128, 3), size=(32, 32), quality=95)
    assert np.abs(only(tmp_path).numpy().mean((1, 2)) - (250, 128, 3)).max() < 4


@pytest.mark.parametrize(
    ("mode", "color", "seen"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 0), WHITE),
        ("LA", (100, 255), (100, 100, 100)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, WHITE),
    ],
)
def test_transparency_is_laid_over_white(tmp_path, mode, color, seen):
    save(tmp_path / "a.png", color, mode=mode)
    assert solid(only(tmp_path)) == seen


def test_palette_images_with_and_without_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*BLUE, *GREEN])
    image.save(tmp_path / "a.png")
    assert solid(only(tmp_path)) == GREEN
    image.save(tmp_path / "a.png", transparency=1)
    assert solid(only(tmp_path)) == WHITE


def test_a_transparent_colour_of_an_rgb_png_is_white(tmp_path):
    save(tmp_path / "a.png", BLUE, transparency=BLUE)
    assert solid(only(tmp_path)) == WHITE


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(("deep", "shallow"), [(0, 0), (65535, 255), (25700, 100), (400, 2)])
def test_16_bit_grey_keeps_its_white(tmp_path, suffix, deep, shallow):
    Image.fromarray(np.full((4, 4), deep, np.uint16)).save(tmp_path / f"a.{suffix}")
    assert solid(only(tmp_path)) == (shallow,) * 3


def test_cmyk_is_converted(tmp_path):
    save(tmp_path / "a.tif", (0, 255, 255, 0), mode="CMYK")
    assert solid(only(tmp_path)) == RED


def test_a_float_image_has_no_known_white_so_it_is_unreadable(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    assert "1 of 1 images cannot be read" in complaint(Folder(tmp_path).load)


def test_grey_is_luma(tmp_path):
    for name, color in (("r", RED), ("g", GREEN), ("b", BLUE), ("w", WHITE)):
        save(tmp_path / f"{name}.png", color)
    train, _ = Folder(tmp_path, channels=1, held_out=0).load()
    assert train.shape == (1, 32, 32)
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    assert sorted(train.x[:, 0, 0, 0].tolist()) == [29, 76, 150, 255]


def test_size_is_height_then_width_and_top_left_stays(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :8] = RED
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = only(tmp_path, size=(8, 16))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("upright", [False, True])
def test_the_crop_is_the_centre(tmp_path, upright):
    pixels = np.full((9, 27, 3), 255, np.uint8)
    pixels[:, 9:18] = BLUE
    pixels[4, 13] = RED
    turned = pixels.transpose(1, 0, 2) if upright else pixels
    Image.fromarray(turned).save(tmp_path / "a.png")
    image = only(tmp_path, size=(9, 9))
    expected = np.full((9, 9, 3), BLUE, np.uint8)
    expected[4, 4] = RED
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))


def test_the_aspect_ratio_is_kept(tmp_path):
    # A disc is as wide as it is high after a 3:1 image is made square.
    y, x = np.mgrid[:60, :180]
    disc = ((y - 29.5) ** 2 + (x - 89.5) ** 2 < 20**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "a.png")
    image = only(tmp_path, size=(30, 30), channels=1)[0].float() / 255
    assert image[15].sum() == pytest.approx(20, abs=1)
    assert image[:, 15].sum() == pytest.approx(20, abs=1)


def test_reduction_is_antialiased(tmp_path):
    # Stripes of one pixel average out to grey; without antialiasing they would alias.
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    image = only(tmp_path, size=(8, 8), channels=1)[:, 1:-1, 1:-1].float()
    assert (image - 127.5).abs().max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((6, 6, 3), np.uint8)
    upright[:3, :3], upright[:3, 3:], upright[3:, :3] = RED, GREEN, BLUE
    # What a camera would store for the picture `upright`, from the definition of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    image = only(tmp_path, size=(6, 6))
    assert torch.equal(image, torch.from_numpy(upright).permute(2, 0, 1))


def test_exif_orientation_swaps_the_sides_before_the_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.full((4, 12, 3), 255, np.uint8)
    pixels[:, 4:8] = RED
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = only(tmp_path, size=(12, 4))
    assert solid(image[:, 4:8]) == RED and solid(image[:, :4]) == WHITE


def test_one_pixel_has_nothing_to_show(tmp_path):
    save(tmp_path / "a.png", (9, 99, 199), size=(1, 1))
    assert "1 of 1 images cannot be read: 'a.png'" in complaint(Folder(tmp_path).load)
    save(tmp_path / "b.png", (9, 99, 199), size=(2, 2))
    with pytest.warns(UserWarning, match="'a.png'"):
        train, _ = Folder(tmp_path, on_error="skip", held_out=0).load()
    assert solid(train.x[0]) == (9, 99, 199)


def test_a_class_without_a_readable_image_is_named(tmp_path):
    save(tmp_path / "dog" / "a.png", RED)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 2"):
        assert "no image of class 'cat'" in complaint(Folder(tmp_path, on_error="skip").load)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert solid(only(tmp_path)) == RED


def test_class_names_are_the_sorted_subfolders(tmp_path):
    colors = {"zebra": RED, "ant": GREEN, "Cat": BLUE}
    for name, color in colors.items():
        for k in range(3):
            save(tmp_path / name / f"{k}.png", color)
    save(tmp_path / "ant" / "deep" / "er" / "x.jpg", GREEN)
    train, held_out = Folder(tmp_path, held_out=0.3).load()
    assert train.class_names == held_out.class_names == ("Cat", "ant", "zebra")
    assert (len(train), len(held_out)) == (7, 3)
    for part in (train, held_out):
        for image, label in zip(part.x, part.labels, strict=True):
            seen = image[:, 16, 16].int() - torch.tensor(colors[part.class_names[label]])
            assert seen.abs().max() <= 2  # the one JPEG is not exact
    assert torch.cat([train.labels, held_out.labels]).bincount().tolist() == [3, 4, 3]


def test_flat_folder_has_no_labels_and_ignores_what_is_no_image(tmp_path):
    save(tmp_path / "a.png", RED)
    save(tmp_path / ".hidden.png", BLUE)
    save(tmp_path / ".thumbnails" / "a.png", BLUE)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    (tmp_path / "captions.json").write_text("{}")
    train, _ = Folder(tmp_path).load()
    assert len(train) == 1 and solid(train.x[0]) == RED
    assert train.labels is None and train.class_names == ()


def test_links_to_class_folders_are_followed(tmp_path):
    save(tmp_path / "store" / "a.png", RED)
    (tmp_path / "set").mkdir()
    try:
        (tmp_path / "set" / "cat").symlink_to(tmp_path / "store", target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    assert Folder(tmp_path / "set").load().train.class_names == ("cat",)


def test_order_is_that_of_the_sorted_paths(tmp_path, monkeypatch):
    for k in (3, 1, 2, 0):
        save(tmp_path / f"{k}.png", (k, k, k))
    seen = []
    monkeypatch.setattr(folder_module, "split", lambda data, held_out: seen.append(data))
    Folder(tmp_path).load()
    assert seen[0].x[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_the_same_folder_gives_the_same_split(tmp_path):
    for k in range(20):
        save(tmp_path / f"{k}.png", (k, k, k))
    first, second = Folder(tmp_path).load(), Folder(tmp_path).load()
    assert torch.equal(first.train.x, second.train.x)
    assert len(first.held_out) == 2
    assert {solid(image)[0] for part in first for image in part.x} == set(range(20))


def png_claiming(width, height):
    """A small PNG file whose header claims an enormous picture."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def spoil(folder):
    """Put one of each kind of unreadable file into `folder`; their names."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "text.png").write_text("this is not an image\n")
    (folder / "zero.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_claiming(60000, 60000))
    return ["bomb.png", "cut.jpg", "text.png", "zero.png"]


@pytest.mark.parametrize("which", range(4))
def test_each_unreadable_file_stops_by_default(tmp_path, which):
    names = spoil(tmp_path)
    for name in names[:which] + names[which + 1 :]:
        (tmp_path / name).unlink()
    save(tmp_path / "good.png", RED)
    message = complaint(Folder(tmp_path).load)
    assert message.startswith(f"1 of 2 images cannot be read: {names[which]!r};")
    assert "delete" in message and "--data.on-error skip" in message


def test_no_suffix_makes_a_file_start_a_program(tmp_path, monkeypatch):
    save(tmp_path / "a.eps", RED)
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: run.append(1))
    assert "1 of 1 images cannot be read" in complaint(Folder(tmp_path).load)
    assert not run


def test_unreadable_files_are_all_counted_and_five_are_named(tmp_path):
    bad = tmp_path / "b"
    bad.mkdir()
    spoil(bad)
    for k in range(3):
        (bad / f"z{k}.png").write_bytes(b"")
        save(tmp_path / "a" / f"{k}.png", RED)
    message = complaint(Folder(tmp_path).load)
    assert "7 of 10" in message and "'b/bomb.png'" in message
    assert message.count("'b/") == 5 and "..." in message


def test_skip_warns_in_one_line_and_uses_the_rest(tmp_path):
    (tmp_path / "cat").mkdir()
    spoil(tmp_path / "cat")
    save(tmp_path / "cat" / "middle.png", RED)
    save(tmp_path / "ant" / "a.png", BLUE)
    with pytest.warns(UserWarning) as caught:
        train, _ = Folder(tmp_path, on_error="skip").load()
    (warning,) = (str(w.message) for w in caught if "cannot be read" in str(w.message))
    assert "4 of 6" in warning and "'cat/bomb.png'" in warning and "\n" not in warning
    seen = {train.class_names[k]: solid(x) for x, k in zip(train.x, train.labels, strict=True)}
    assert seen == {"ant": BLUE, "cat": RED}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_nothing_readable_is_an_error_in_both_modes(tmp_path, on_error):
    spoil(tmp_path)
    message = complaint(Folder(tmp_path, on_error=on_error).load)
    assert "4 of 4" in message and "nothing is left" in message


def test_images_beside_class_folders_are_refused(tmp_path):
    save(tmp_path / "cat" / "a.png", RED)
    save(tmp_path / "stray.png", RED)
    message = complaint(Folder(tmp_path).load)
    assert "'stray.png'" in message and "cat/a.png" not in message


def test_missing_path_file_and_empty_folder(tmp_path):
    assert "does not exist" in complaint(Folder(tmp_path / "none").load)
    save(tmp_path / "a.png", RED)
    assert "is a file" in complaint(Folder(tmp_path / "a.png").load)
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(Folder(tmp_path / "empty").load)
    (tmp_path / "empty" / "x.heic").write_bytes(b"")
    message = complaint(Folder(tmp_path / "empty").load)
    assert "other files: 1" in message and "'x.heic'" in message and ".png" in message


def test_a_subfolder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    save(tmp_path / "cat" / "a.png", RED)
    save(tmp_path / "secret" / "a.png", RED)
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    message = complaint(Folder(tmp_path).load)
    assert str(tmp_path / "secret") in message and "Permission denied" in message


@pytest.mark.parametrize(
    "bad",
    [
        {"size": (0, 8)},
        {"size": (8, -1)},
        {"channels": 2},
        {"channels": 4},
        {"on_error": "ignore"},
    ],
)
def test_bad_folder_settings_are_refused_at_once(bad):
    (name,) = bad
    assert name in complaint(lambda: Folder(Path("anywhere"), **bad))


def test_images_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.png", RED)
    monkeypatch.setattr(folder_module, "_memory", lambda: 6 * 100 * 200)
    assert len(Folder(tmp_path, size=(100, 200)).load().train) == 1
    assert "--data.size" in complaint(Folder(tmp_path, size=(100, 201)).load)


# --- Fashion-MNIST ------------------------------------------------------------------------------


def idx(array):
    """The bytes of an IDX file, from the definition of the format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def small_fashion(path, packed=True):
    """Write four small files in the format of Fashion-MNIST; the arrays."""
    random = np.random.default_rng(1)
    arrays = {}
    for part, count in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = random.integers(0, 10, count).astype(np.uint8)
    for name, array in arrays.items():
        data = idx(array)
        file = path / f"{name}.gz" if packed else path / name
        file.write_bytes(gzip.compress(data) if packed else data)
    return arrays


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 5)])
def test_idx_round_trip(shape):
    array = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    assert np.array_equal(parse_idx(idx(array)), array)


def test_an_idx_file_without_dimensions_is_refused():
    with pytest.raises(ValueError, match="not an IDX file"):
        parse_idx(b"\0\0\x08\0\x07")


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_packed_and_plain_files(tmp_path, packed):
    arrays = small_fashion(tmp_path, packed)
    for part, data in zip(("train", "t10k"), FashionMNIST(tmp_path).load(), strict=True):
        assert data.x.dtype == torch.uint8 and data.labels.dtype == torch.int64
        assert np.array_equal(data.x[:, 0].numpy(), arrays[f"{part}-images-idx3-ubyte"])
        assert np.array_equal(data.labels.numpy(), arrays[f"{part}-labels-idx1-ubyte"])
        assert data.class_names[:2] == ("T-shirt/top", "Trouser") and data.num_classes == 10


def damaged(data):
    """Ways to spoil an IDX file of images, by name."""
    return {
        "short": gzip.compress(data[:-1]),
        "long": gzip.compress(data + b"\0"),
        "header": gzip.compress(data[:9]),
        "magic": gzip.compress(b"\0\0\x0d" + data[3:]),
        "dims": gzip.compress(data[:3] + b"\x01" + data[4:]),
        "truncated": gzip.compress(data)[:-100],
        "garbled": gzip.compress(data)[:10] + b"\xff" * 60 + gzip.compress(data)[70:],
        "not gzip": b"hello",
        "empty": b"",
        "no rows": gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))),
        "shape": gzip.compress(idx(np.zeros((7, 28, 27), np.uint8))),
    }


@pytest.mark.parametrize("how", damaged(b"\0" * 9))
def test_a_damaged_idx_file_is_named(tmp_path, how):
    arrays = small_fashion(tmp_path)
    name = "train-images-idx3-ubyte"
    (tmp_path / f"{name}.gz").write_bytes(damaged(idx(arrays[name]))[how])
    assert f"{name}.gz" in complaint(FashionMNIST(tmp_path).load)


@pytest.mark.parametrize("labels", [[0] * 6, [0] * 6 + [10]])
def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path, labels):
    small_fashion(tmp_path, packed=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    assert "do not belong together" in complaint(FashionMNIST(tmp_path).load)


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        message = complaint(FashionMNIST(path).load)
        assert "dataset-fashion-mnist" in message and "--data.path" in message
    small_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte" in complaint(FashionMNIST(tmp_path).load)


@pytest.mark.skipif(not FashionMNIST.path.is_dir(), reason="the Debian package is not installed")
def test_the_real_fashion_mnist():
    train, held_out = FashionMNIST().load()
    assert (len(train), len(held_out)) == (60_000, 10_000)
    assert train.shape == held_out.shape == (1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert held_out.labels.bincount().tolist() == [1000] * 10
    # Known statistics of the training images, on a scale of 0..1.
    assert train.x.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert train.x.float().std().item() / 255 == pytest.approx(0.3530, abs=1e-4)
    # Trousers are tall and narrow, sneakers are low.
    mean = {k: train.x[train.labels == CLASSES.index(k)].float().mean(0)[0] for k in CLASSES}
    assert mean["Trouser"][0:4].mean() > 10 * mean["Sneaker"][0:4].mean()


# --- arrays -------------------------------------------------------------------------------------


def store(path, **arrays):
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


IMAGES = np.random.default_rng(3).integers(0, 256, (20, 3, 4, 5), np.uint8)


def test_uint8_images_and_labels_come_back_together(tmp_path):
    labels = np.arange(20, dtype=np.int16) % 7
    data = Arrays(store(tmp_path, x=IMAGES, labels=labels), held_out=0.25).load()
    assert (len(data.train), len(data.held_out)) == (15, 5)
    assert data.train.x.dtype == torch.uint8 and data.train.class_names == tuple("0123456")
    assert all_rows(data) == sorted(map(bytes, IMAGES.reshape(20, -1)))
    known = {image.tobytes(): k for image, k in zip(IMAGES, labels.tolist(), strict=True)}
    for part in data:
        assert [known[image.tobytes()] for image in part.x.numpy()] == part.labels.tolist()


def test_grey_images_get_a_channel(tmp_path):
    for x in (IMAGES[:, 0], IMAGES[:, 0] / np.float32(255)):
        data = Arrays(store(tmp_path, x=x)).load()
        assert data.train.shape == (1, 4, 5) and data.train.labels is None
        assert all_rows(data) == sorted(map(bytes, x.reshape(20, -1)))


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8"])
def test_floats_are_kept_as_they_are_in_float32(tmp_path, dtype):
    x = np.random.default_rng(4).normal(0, 30, (10, 2)).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(x))
    data = Arrays(tmp_path / "a.npy").load()
    assert data.train.x.dtype == torch.float32
    assert all_rows(data) == sorted(map(bytes, x.astype("f4")))
    assert torch.equal(data.train.batch(slice(None))[0], data.train.x)


def test_keys_can_be_named(tmp_path):
    file = store(tmp_path, data=IMAGES, y=np.arange(20) % 3)
    train, _ = Arrays(file, x_key="data", labels_key="y").load()
    assert train.labels.unique().tolist() == [0, 1, 2] and train.num_classes == 3


def test_labels_with_gaps_are_refused(tmp_path):
    file = store(tmp_path, x=IMAGES, labels=np.arange(20) % 3 + 1)
    assert "no example has label 0, though the largest is 3" in complaint(Arrays(file).load)


def test_scale_is_bounded_only_for_images_within_one(tmp_path):
    def scale(x):
        return Arrays(store(tmp_path, x=x), held_out=0).load().train.scale

    latents = np.random.default_rng(0).normal(size=(20, 4, 8, 8)).astype(np.float32)
    assert scale(latents) == "raw" and scale(latents / 10) == "[-1, 1]"
    assert scale(IMAGES) == "[-1, 1]" and scale(latents[:, 0, 0] / 10) == "raw"


def test_digest_sees_every_change():
    x, labels = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    base = Dataset(x, labels, ("a", "b"))
    others = [
        Dataset(x + 1, labels, ("a", "b")),
        Dataset(x, 1 - labels, ("a", "b")),
        Dataset(x, labels, ("a", "b", "c")),
        Dataset(x.view(4, 2, 1), labels, ("a", "b")),
        Dataset(x),
        Dataset(x, labels, ("a", "b"), torch.zeros(4, 2)),
        Dataset(x, labels, ("a", "b"), torch.ones(4, 2)),
    ]
    assert base.digest() == Dataset(x.clone(), labels.clone(), ("a", "b")).digest()
    assert len({d.digest() for d in [base, *others]}) == 8


def test_an_unknown_key_names_the_nearest(tmp_path):
    file = store(tmp_path, images=IMAGES, label=np.zeros(20, int))
    assert "did you mean 'images'" in complaint(Arrays(file, x_key="image").load)
    assert "did you mean 'label'" in complaint(Arrays(file, "images", labels_key="labl").load)
    assert "images, label" in complaint(Arrays(file, x_key="qqq").load)
    np.save(tmp_path / "a.npy", IMAGES)
    assert "'y'" in complaint(Arrays(tmp_path / "a.npy", labels_key="y").load)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.full(20, -1), "-1"),
        (np.zeros(19, int), r"\(19,\)"),
        (np.zeros((20, 1), int), r"\(20, 1\)"),
        (np.zeros(20), "float64"),
        (np.zeros(20, bool), "bool"),
        (np.full(20, 10**12), "1000000000000"),
        (np.full(20, 2**63, np.uint64), str(2**63)),
    ],
)
def test_bad_labels_are_refused(tmp_path, labels, says):
    message = complaint(Arrays(store(tmp_path, x=IMAGES, labels=labels)).load)
    assert message.startswith("labels") and re.search(says, message)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.zeros((5, 32, 32, 3), np.uint8), "transpose"),
        (np.zeros((5, 28, 28, 1), np.float32), "transpose"),
        (np.zeros((5, 8), np.uint8), "float32"),
        (np.zeros((5, 8), np.int64), "int64"),
        (np.zeros((5, 8), bool), "bool"),
        (np.zeros(5), r"\(5,\)"),
        (np.zeros((2, 2, 2, 2, 2)), "shape"),
        (np.zeros((0, 1, 2, 2), np.uint8), r"\(0, 1, 2, 2\)"),
        (np.full((5, 3, 4, 4), 255.0), "255"),
        (np.full((5, 4, 4), 11.0), "uint8"),
    ],
)
def test_bad_examples_are_refused(tmp_path, x, says):
    message = complaint(Arrays(store(tmp_path, x=x)).load)
    assert message.startswith("x ") and re.search(says, message)


@pytest.mark.parametrize("shape", [(5, 16, 4, 4), (5, 4, 8, 8), (5, 3, 32, 4), (5, 64, 1, 1)])
def test_latents_and_narrow_images_are_not_taken_for_channels_last(tmp_path, shape):
    x = np.linspace(-20, 20, np.prod(shape), dtype=np.float32).reshape(shape)
    assert Arrays(store(tmp_path, x=x)).load().train.shape == shape[1:]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_the_first_row_that_is_not_finite_is_named(tmp_path, value):
    x = np.zeros((9, 3))
    x[4, 1] = x[7, 2] = value
    assert "row 4 " in complaint(Arrays(store(tmp_path, x=x)).load)


@pytest.mark.parametrize("key", ["x0", "noise"])
def test_noises_stay_with_their_examples(tmp_path, key):
    x = np.random.default_rng(5).normal(size=(20, 2))
    named = {} if key == "x0" else {"x0_key": key}
    file = store(tmp_path, x=x, labels=np.arange(20) % 2, **{key: x + 7})
    for part in Arrays(file, held_out=0.25, **named).load():
        assert part.x0.dtype == torch.float32
        torch.testing.assert_close(part.x0, part.x + 7)
        torch.testing.assert_close(part.read(slice(1, 3)).x0, part.x[1:3] + 7)
    plain = Arrays(store(tmp_path, x=x)).load().train
    assert plain.x0 is None and plain.read(slice(1, 3)).x0 is None


def test_noises_of_grey_images_get_a_channel_and_may_exceed_one(tmp_path):
    x0 = np.random.default_rng(6).normal(size=(20, 4, 5)).astype(np.float32)
    data = Arrays(store(tmp_path, x=IMAGES[:, 0], x0=x0), held_out=0).load().train
    assert data.scale == "[-1, 1]" and data.x0.shape == (20, 1, 4, 5)
    assert sorted(map(bytes, data.x0.numpy())) == sorted(map(bytes, x0))
    rows = torch.tensor([3, 1])
    assert torch.equal(data.rows(rows).x0, data.x0[rows])


@pytest.mark.parametrize(
    ("x0", "says"),
    [
        (np.zeros((19, 2)), r"float64 \(19, 2\); .*: \(20, 2\)"),
        (np.zeros((20, 3)), r"\(20, 3\)"),
        (np.zeros(20), r"\(20,\)"),
        (np.zeros((20, 2), int), "int64"),
        (np.zeros((20, 2), np.uint8), "uint8"),
        (np.zeros((20, 2), complex), "complex128"),
    ],
)
def test_bad_noises_are_refused(tmp_path, x0, says):
    message = complaint(Arrays(store(tmp_path, x=np.zeros((20, 2)), x0=x0)).load)
    assert message.startswith("x0 is ") and re.search(says, message)


def test_noises_that_are_not_finite_or_not_there(tmp_path):
    x0 = np.zeros((20, 2))
    x0[-1, 1] = np.nan
    file = store(tmp_path, x=np.zeros((20, 2)), x0=x0)
    assert "row 19 of x0 holds NaN or Inf" in complaint(Arrays(file).load)
    assert "did you mean 'x0'" in complaint(Arrays(file, x0_key="x00").load)
    np.save(tmp_path / "a.npy", IMAGES)
    assert "'noise'" in complaint(Arrays(tmp_path / "a.npy", x0_key="noise").load)


def broken_files(path):
    """Files that hold no arrays of numbers, by name."""
    np.save(path / "cut.npy", IMAGES)
    (path / "cut.npy").write_bytes((path / "cut.npy").read_bytes()[:-1])
    np.savez_compressed(path / "cut.npz", x=IMAGES)
    (path / "cut.npz").write_bytes((path / "cut.npz").read_bytes()[:-9])
    np.savez_compressed(path / "garbled.npz", x=IMAGES)
    data = (path / "garbled.npz").read_bytes()
    (path / "garbled.npz").write_bytes(data[:300] + b"\xff" * 30 + data[330:])
    (path / "text.npy").write_text("1 2 3")
    (path / "text.npz").write_text("1 2 3")
    (path / "empty.npy").write_bytes(b"")
    np.save(path / "pickle.npy", np.array([{}, 1], object))
    np.savez(path / "pickle.npz", x=np.array([{}, 1], object))
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', (((".ljust(117) + b"\n"
    (path / "header.npy").write_bytes(header)


BROKEN = ["cut.npy", "cut.npz", "garbled.npz", "text.npy", "text.npz", "empty.npy", "header.npy"]


@pytest.mark.parametrize("name", [*BROKEN, "pickle.npy", "pickle.npz"])
def test_broken_and_pickled_files_are_refused(tmp_path, name):
    broken_files(tmp_path)
    message = complaint(Arrays(tmp_path / name).load)
    assert message.startswith(f"cannot read {tmp_path / name}") and "pickled" in message


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((10, 10)))
    data = (tmp_path / "a.npy").read_bytes()
    huge = data.replace(b"(10, 10), }" + b" " * 14, b"(1000000000000000, 10), }")
    assert huge != data
    (tmp_path / "a.npy").write_bytes(huge)
    assert "memory" in complaint(Arrays(tmp_path / "a.npy").load)


def test_missing_files_folders_and_other_suffixes(tmp_path):
    assert "no file" in complaint(Arrays(tmp_path / "a.npz").load)
    (tmp_path / "b.npy").mkdir()
    assert "no file" in complaint(Arrays(tmp_path / "b.npy").load)
    assert "numpy.savez" in complaint(Arrays(tmp_path / "a.csv").load)

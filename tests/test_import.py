"""Doors in: the paper's recipes, the authors' pickles, and pickles that want more than arrays."""

import collections
import functools
import json
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from anystep import checkpoint, cli
from anystep.errors import UserError
from anystep.interop import kvfrans
from anystep.interop.pickles import Record, read_pickle
from anystep.sampling import sample

TOLERANCE = 1e-5


@pytest.fixture
def run(capsys):
    def call(*args):
        code = cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


# ---------------------------------------------------------------------------------------------
# The paper's recipes

# Frans et al. (arXiv 2410.12557), section 3.1, algorithm 1 and appendix B.1; sizes and guidance
# as in the README of github.com/kvfrans/shortcut-models at 6010043.
ALIKE = {
    "network.patch": 2,
    "network.depth": 12,
    "network.width": 768,
    "network.heads": 12,
    "network.mlp_ratio": 4.0,
    "objective.name": "shortcut",
    "objective.M": 128,
    "objective.bootstrap_share": 0.25,
    "objective.target_ema": 0.999,
    "objective.guidance": 1.5,
    "objective.guidance_level": None,  # the finest
    "objective.label_dropout": 0.1,
    "objective.clip": None,
    "optimizer.lr": 1e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup": 0,
    "optimizer.decay": "none",
    "optimizer.clip": None,
    "ema": 0.999,
    "batch": 256,
    "steps": 800_000,
    "data.name": "shards",
    "data.held_out": 0.0,
    "flip": False,  # in the store
}
RECIPES = {
    "celebahq-256-b": ALIKE | {"batch": 64, "steps": 400_000, "objective.guidance": 1.0},
    "imagenet-256-b": ALIKE,
    "imagenet-256-xl": ALIKE | {"network.width": 1152, "network.depth": 28, "network.heads": 16},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_constants(run, name):
    code, out, err = run("train", name, "--data.path", "store", "--dry-run")
    assert code == 0, err
    config = json.loads(out)
    for key, value in RECIPES[name].items():
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    assert config["out"] == f"runs/{name}-shortcut-paper"


def test_a_recipe_needs_its_store_and_takes_other_methods(run):
    code, _, err = run("train", "imagenet-256-b", "--dry-run")
    assert code == 2 and "--data.path" in err and err.count("\n") == 1
    args = (
        "train",
        "imagenet-256-b",
        "--method",
        "flow_matching",
        "--data.path",
        "s",
        "--dry-run",
    )
    config = json.loads(run(*args)[1])
    assert config["objective"]["name"] == "flow_matching" and config["batch"] == 256


# ---------------------------------------------------------------------------------------------
# The authors' checkpoints


class FrozenDict:
    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return FrozenDict, (self.content,)


class JaxArray:
    """Pickles as a JAX array does."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def __reduce__(self):
        function, args, state = self.value.__reduce__()
        return _reconstruct_array, (function, args, state, {"weak_type": False})


def _reconstruct_array(function, args, state, aval):
    raise AssertionError("called while reading")


ScaleByAdamState = collections.namedtuple("ScaleByAdamState", "count mu nu")
EmptyState = collections.namedtuple("EmptyState", "")
HOMES = {
    "flax.core.frozen_dict": [FrozenDict],
    "jax._src.array": [_reconstruct_array],
    "optax._src.transform": [ScaleByAdamState],
    "optax._src.base": [EmptyState],
}


def dumps(value, protocol=pickle.DEFAULT_PROTOCOL):
    """Pickle with Flax, JAX and optax pretended, for as long as it takes."""
    with pytest.MonkeyPatch.context() as patch:
        for home, members in HOMES.items():
            parts = home.split(".")
            for k in range(len(parts)):
                name = ".".join(parts[: k + 1])
                patch.setitem(sys.modules, name, types.ModuleType(name))
            module = sys.modules[home]
            for member in members:
                patch.setattr(member, "__module__", home)
                setattr(module, member.__name__, member)
        return pickle.dumps(value, protocol)


def nested(official, prefix, wrap):
    """Parameters as Flax nests them."""
    tree = {}
    for name, value in official.items():
        if name.startswith(prefix):
            *parents, last = name.removeprefix(prefix).split("/")
            functools.reduce(lambda at, key: at.setdefault(key, {}), parents, tree)[last] = wrap(
                value
            )
    return tree


def train_state(official, wrap=lambda a: a, frozen=FrozenDict):
    params, average = (nested(official, p, wrap) for p in ("params/", "ema_params/"))
    moments = ScaleByAdamState(wrap(np.int32(7)), params, {})
    state = {
        "params": frozen(params),
        "params_ema": frozen(average),
        "opt_state": (moments, EmptyState(), EmptyState()),
        "step": np.asarray(810_000, np.int32),
    }
    return {"train_state": state, "_timestamp": 1.7e9}


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def forward(model, official):
    with torch.no_grad():
        return model(
            official["fwd_x"],
            torch.from_numpy(official["fwd_t"]),
            torch.exp2(-torch.from_numpy(official["fwd_dt_base"])),
            torch.from_numpy(official["fwd_y"]),
        )


SIZES = ("--heads", "3", "--size", "8")


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("wrap", [np.asarray, JaxArray], ids=["numpy", "jax"])
def test_a_checkpoint_computes_what_the_authors_compute(run, official, tmp_path, protocol, wrap):
    (tmp_path / "file").write_bytes(dumps(train_state(official, wrap), protocol))
    args = ("import", "kvfrans", tmp_path / "file", *SIZES)
    for folder, options in (("raw", ["--raw"]), ("ema", [])):
        code, out, err = run(*args, "--out", tmp_path / folder, *options)
        assert code == 0 and "10 classes" in out and "guidance 1.5" in out, err
    raw, average = (checkpoint.load_model(tmp_path / name) for name in ("raw", "ema"))
    error = relative_error(forward(raw, official), official["fwd_v"])
    apart = relative_error(forward(average, official), official["fwd_v"])
    cond = torch.from_numpy(official["s4_y"])
    x1 = sample(raw, official["s4_x0"], steps=4, cond=cond)
    of_samples = relative_error(x1, official["s4_x1"])
    print(f"forward {error:.1e}, 4-step samples {of_samples:.1e}; EMA {apart:.2f} from raw")
    assert max(error, of_samples) <= TOLERANCE < 0.1 < apart
    spec = raw.spec
    assert (spec.num_classes, spec.guidance, spec.finest, spec.data) == (10, 1.5, 128, "raw")
    assert spec.null_levels == (7,) and spec.guided_levels == tuple(range(7))
    direct = kvfrans.load_network(
        {k.removeprefix("ema_params/"): v for k, v in official.items() if "ema_params/" in k},
        num_heads=3,
        patch_size=2,
        image_size=8,
    )
    assert relative_error(forward(average, official), forward(direct, official)) <= TOLERANCE


def test_numpy_1_and_plain_dicts(official, tmp_path):
    content = dumps(train_state(official, frozen=dict), 3)
    old = content.replace(b"cnumpy._core.", b"cnumpy.core.")
    assert old != content
    (tmp_path / "file").write_bytes(old)
    params = kvfrans.read_params(tmp_path / "file", raw=True)
    theirs = {k.removeprefix("params/"): v for k, v in official.items() if k[:7] == "params/"}
    assert params.keys() == theirs.keys()
    assert all(np.array_equal(params[k], theirs[k]) for k in theirs)


def test_everything_in_a_checkpoint_is_read_as_inert_containers(official, tmp_path):
    (tmp_path / "file").write_bytes(dumps(train_state(official, JaxArray)))
    tree = read_pickle(tmp_path / "file")
    (count, mu, nu), *empty = tree["train_state"]["opt_state"]
    assert count == 7 and nu == {} and empty == [(), ()] and type(empty[0]) is tuple
    assert np.array_equal(mu["Embed_0"]["embedding"], official["params/Embed_0/embedding"])
    assert tree["train_state"]["step"] == 810_000 and tree["_timestamp"] == 1.7e9


def test_a_table_of_one_class_becomes_an_unconditional_model(official, tmp_path):
    """The authors' CelebA-HQ model sees the null label in every row."""
    state = train_state(official)
    params = state["train_state"]["params_ema"].content
    table = params["LabelEmbedder_0"]["Embed_0"]
    table["embedding"] = table["embedding"][[3, 10]]
    (tmp_path / "file").write_bytes(dumps(state))
    model = kvfrans.load_model(tmp_path / "file", heads=3, size=8)
    whole = train_state(official)
    (tmp_path / "whole").write_bytes(dumps(whole))
    conditional = kvfrans.load_model(tmp_path / "whole", heads=3, size=8)
    x, t = official["fwd_x"], torch.from_numpy(official["fwd_t"])
    d = torch.exp2(-torch.from_numpy(official["fwd_dt_base"]))
    with torch.no_grad():
        error = relative_error(model(x, t, d), conditional(x, t, d, torch.full((len(x),), 10)))
    print(f"without labels {error:.1e}")
    assert error <= TOLERANCE and (model.spec.num_classes, model.spec.guidance) == (0, 1.0)


def test_what_is_no_such_checkpoint_is_one_line(run, official, tmp_path):
    def refused(content, *fragments, options=SIZES):
        (tmp_path / "file").write_bytes(content)
        code, _, err = run(
            "import", "kvfrans", tmp_path / "file", "--out", tmp_path / "o", *options
        )
        assert code == 2 and err.count("\n") == 1, err
        for fragment in fragments:
            assert fragment in err
        assert not (tmp_path / "o").exists()

    good = dumps(train_state(official))
    refused(good[: len(good) // 2], "damaged")
    refused(b"", "damaged")
    refused(b"not a pickle", "damaged")
    refused(dumps({"params": {}}), "no checkpoint of the shortcut authors")
    refused(good, "say how many attention heads", "--heads", options=("--size", "8"))
    refused(good, "width 48 must be a multiple", options=("--size", "8", "--heads", "5"))
    refused(good, "patch 2 does not divide", options=("--heads", "3", "--size", "7"))
    state = train_state(official)
    del state["train_state"]["params_ema"].content["PatchEmbed_0"]
    refused(dumps(state), "PatchEmbed_0/Conv_0/kernel")
    state["train_state"]["params_ema"].content["PatchEmbed_0"] = {"Conv_0": {"kernel": "text"}}
    refused(dumps(state), "is no array of numbers")
    assert run("import", "kvfrans", tmp_path / "gone", "--out", tmp_path / "o")[0] == 2
    assert "did you mean 'kvfrans'" in run("import", "kvfran", "x", "--out", "o")[2]
    assert run("import", "--help")[0] == 0


# ---------------------------------------------------------------------------------------------
# Pickles that want more


class Calls:
    """A pickle that calls `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


ATTACKS = {
    "posix.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Calls(getattr, "text", "upper"),
    "functools.partial": lambda mark: functools.partial(os.system, f"touch {mark}"),
    "operator.attrgetter": lambda mark: Calls(__import__("operator").attrgetter, "system"),
    "numpy.load": lambda mark: Calls(np.load, str(mark)),
    "collections.OrderedDict": lambda mark: collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("place", ["alone", "in an object array", "as a key", "in a container"])
def test_a_pickle_that_asks_for_more_is_refused_by_name(tmp_path, name, place):
    mark, file = tmp_path / "executed", tmp_path / "file"
    evil = ATTACKS[name](mark)
    if place == "in an object array":
        array = np.empty(1, object)
        array[0] = evil
        evil = array
    elif place == "as a key":
        if name == "collections.OrderedDict":
            pytest.skip("no key")
        evil = {evil: 1}
    elif place == "in a container":
        evil = {"train_state": {"params": FrozenDict({"a": evil}), "o": EmptyState()}}
    file.write_bytes(dumps(evil))
    with pytest.raises(UserError) as refusal:
        read_pickle(file)
    assert name in str(refusal.value) and "\n" not in str(refusal.value)
    assert not mark.exists()


# Opcodes of protocol 0: c module name, ( mark, t tuple, R call, b set state, I int, V text, . stop
FROZEN = "cflax.core.frozen_dict\nFrozenDict\n"
DTYPE = "cnumpy\ndtype\n"
JAX = "cjax._src.array\n_reconstruct_array\n"


def array_of(dtype="f4", data="V" + "x" * 24 + "\n"):
    """An array of shape (2, 3) by its opcodes."""
    made = "cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR(I1\n(I2\nI3\nt"
    return f"{made}{DTYPE}(V{dtype}\nI00\nI01\ntR(I3\nV<\nNNNI-1\nI-1\nI0\ntbI00\n{data}tb."


CRAFTED = {
    "a dotted name": ("cflax.core\nfrozen_dict.sys.modules\n.", "asks for flax.core.frozen_dict"),
    "state for a class": (FROZEN + "(dVx\nVy\nsb.", "damaged"),
    "a class itself": (FROZEN + ".", "holds a type"),
    "a bare dtype": (DTYPE + "(Vf4\nI00\nI01\ntR.", "outside of an array"),
    "ndarray called": ("cnumpy\nndarray\n((I9\nttR.", "outside of an array"),
    "a persistent id": ("Pmine\n.", "damaged"),
    "text for bytes": (array_of(), "array of str"),
    "objects": (array_of("O8", "(lVa\na"), "no numbers"),
    "a set": (pickle.dumps({1, 2}), "holds a set"),
    "a structured dtype": (pickle.dumps(np.zeros(2, [("a", "f4")])), "no numbers"),
    "text in an array": (pickle.dumps(np.array(["a"])), "no numbers"),
    "a date": (pickle.dumps(np.array(["2024"], "M8[s]")), "no numbers"),
    "jax around a dict": (JAX + f"({FROZEN}(tNNtR.", "made by flax"),
    "jax around text": (JAX + "(Vos\n(tNNtR.", "unknown form"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_pickle_is_refused(tmp_path, name):
    content, message = CRAFTED[name]
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "file").write_bytes(content)
    before = dict(vars(Record))
    with pytest.raises(UserError, match=message) as refusal:
        read_pickle(tmp_path / "file")
    assert "\n" not in str(refusal.value)
    assert dict(vars(Record)) == before


def test_a_pickle_that_contains_itself_or_lies_about_a_shape(tmp_path):
    loop = []
    loop.append(loop)
    (tmp_path / "file").write_bytes(pickle.dumps(loop))
    with pytest.raises(UserError, match="contains itself"):
        read_pickle(tmp_path / "file")
    content = pickle.dumps(np.zeros(10, np.float32), 3)
    grown = content.replace(b"K\n\x85", b"K\xff\x85")
    assert grown != content
    (tmp_path / "file").write_bytes(grown)
    with pytest.raises(UserError, match=r"shape \(255,\) in 40 bytes"):
        read_pickle(tmp_path / "file")


def test_a_part_used_a_billion_times_is_made_once(tmp_path):
    part = [np.arange(3)]
    for _ in range(60):
        part = [part, part]
    (tmp_path / "file").write_bytes(pickle.dumps(part))
    found = read_pickle(tmp_path / "file")
    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]
    assert found[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", ">i4", "float16", ">f8", "complex64"])
def test_arrays_of_numbers_come_back(tmp_path, dtype, protocol):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    values = [
        array,
        np.asfortranarray(array),
        array[:, ::2],
        array[0, 0, 0],
        array[:0],
        array.sum(),
    ]
    (tmp_path / "file").write_bytes(pickle.dumps(values, protocol))
    found = read_pickle(tmp_path / "file")
    for theirs, ours in zip(values, found, strict=True):
        assert np.array_equal(theirs, ours) and np.shape(theirs) == np.shape(ours)
        assert np.ndim(theirs) == 0 or theirs.dtype == ours.dtype

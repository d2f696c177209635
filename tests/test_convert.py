"""A flow model as a start: at first the flow at every step size, and then it learns."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from anystep import checkpoint, cli
from anystep.errors import UserError
from anystep.interop import sit
from anystep.networks import forget_steps
from anystep.networks.diffusers_dit import DiffusersDiTConfig
from anystep.networks.dit import SIZES, heads_of, positions
from anystep.networks.mlp import MLPConfig
from anystep.objectives.consistency_training import ConsistencyTraining
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.live_reflow import LiveReflow
from anystep.objectives.progressive_distillation import ProgressiveDistillation
from anystep.objectives.shortcut import Shortcut
from anystep.presets import digits, mixture
from anystep.spec import ModelSpec
from anystep.state import initial_state
from anystep.train import train
from conftest import SMALL, small_net

CPU = torch.device("cpu")
TOLERANCE = 1e-6


def inputs(shape, n=32, classes=4):
    generator = torch.Generator().manual_seed(3)
    x, t, d = (torch.randn(n, *shape, generator=generator), *torch.rand(2, n, generator=generator))
    d[: n // 2] = 2.0 ** -torch.arange(n // 2)
    return x, t, d, torch.arange(n) % (classes + 1)


def error(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("kind", SMALL)
def test_a_network_that_forgets_its_steps_is_the_flow_at_every_step(kind):
    net, shape = small_net(kind)
    net.conditioning.level.output.weight.data *= 20
    x, t, d, cond = inputs(shape)
    flow = net(x, t, torch.zeros_like(d), cond).detach()
    apart = error(net(x, t, d, cond), flow)
    forget_steps(net)
    found = [error(net(x, t, step, cond), flow) for step in (d, torch.zeros_like(d))]
    print(f"{kind}: {apart:.2f} apart before, {found[0]:.1e} after, {found[1]:.1e} at d = 0")
    assert max(found) <= TOLERANCE < 1e-2 < apart
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(2):  # the step is learnt again
        optimizer.zero_grad()
        (net(x, t, d, cond) * expand(d, x)).mean().backward()
        optimizer.step()
    assert error(net(x, t, d, cond), net(x, t, torch.zeros_like(d), cond)) > 1e-4


def expand(d, x):
    return d.reshape(-1, *[1] * (x.ndim - 1))


# ---------------------------------------------------------------------------------------------
# --start


def flow_run(folder, objective=None, **changes):
    config = mixture(objective or FlowMatching())
    config = replace(config, out=folder, steps=8, batch=16, device="cpu", **changes)
    config = replace(config, network=MLPConfig(width=16, depth=2))
    config = replace(config, log=replace(config.log, trackers=()))
    train(config, bar=False)
    return config


@pytest.mark.parametrize("objective", [FlowMatching(), LiveReflow()], ids=["flow", "live"])
@pytest.mark.parametrize("finest", [128, 32])
def test_a_run_starts_from_a_flow(tmp_path, objective, finest):
    config = flow_run(tmp_path / "flow", objective)
    flow = checkpoint.load_model(tmp_path / "flow")
    tuned = replace(
        config,
        out=tmp_path / "tuned",
        objective=Shortcut(M=finest),
        start=tmp_path / "flow",
        steps=4,
    )
    state = initial_state(tuned, tuned.data.load(), CPU)
    x, t, d, _ = inputs((2,))
    u = flow(x, t, torch.zeros_like(d))
    found = error(state.model(x, t, d), u)
    print(f"M {finest}: {found:.1e}")
    assert found <= TOLERANCE
    state.begin_phase(tuned)
    assert all(error(net(x, t, d), u) <= TOLERANCE for net in (state.average, state.target))

    train(tuned, bar=False)
    info = checkpoint.read_info(checkpoint.find_model(tmp_path / "tuned"))
    assert info["training"]["teacher"] == {
        "model": str(tmp_path / "flow"),
        "forwards": checkpoint.read_info(checkpoint.find_model(tmp_path / "flow"))["training"][
            "forwards"
        ],
    }
    after = checkpoint.load_model(tmp_path / "tuned")
    assert after.spec.step_input == "step" and after.spec.finest == finest
    assert error(after(x, t, d), after(x, t, torch.zeros_like(d))) > 1e-6


def test_a_run_goes_on_without_its_start_bit_for_bit(tmp_path):
    config = flow_run(tmp_path / "flow")
    base = replace(config, objective=Shortcut(), start=tmp_path / "flow", steps=6)
    base = replace(base, log=replace(base.log, save_every=3))
    train(replace(base, out=tmp_path / "whole"), bar=False)
    train(replace(base, out=tmp_path / "cut"), bar=False)
    last = checkpoint.checkpoints(tmp_path / "cut")[-1]
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    (tmp_path / "flow").rename(tmp_path / "elsewhere")
    assert len(checkpoint.checkpoints(tmp_path / "cut")) == 1
    train(replace(base, out=tmp_path / "cut"), bar=False)
    nets = [checkpoint.load_model(tmp_path / name).state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert read_origin(tmp_path / "cut") == read_origin(tmp_path / "whole")


def read_origin(run):
    return checkpoint.read_info(checkpoint.find_model(run))["training"]["teacher"]


def test_a_shortcut_model_goes_on_as_it_is(tmp_path):
    config = flow_run(tmp_path / "first", Shortcut())
    more = replace(config, out=tmp_path / "more", start=tmp_path / "first")
    state = initial_state(more, more.data.load(), CPU)
    first = checkpoint.load_model(tmp_path / "first").net.state_dict()
    assert all(torch.equal(first[k], v) for k, v in state.model.net.state_dict().items())


def test_a_run_that_began_from_nothing_is_not_given_a_start(tmp_path, capsys):
    flow_run(tmp_path / "flow")
    begun = flow_run(tmp_path / "begun", Shortcut())
    with pytest.raises(UserError, match=r"run of another config \(start: None -> "):
        train(replace(begun, start=tmp_path / "flow"), bar=False)
    assert cli.main(["train", "mixture", "--start", str(tmp_path / "flow"), "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["out"] == "runs/mixture-shortcut-from-flow" and config["network"]["width"] == 16


def test_what_cannot_be_a_start_is_refused(tmp_path):
    config = flow_run(tmp_path / "flow")
    tuned = replace(config, objective=Shortcut(), start=tmp_path / "flow")
    flow_run(tmp_path / "consistency", ConsistencyTraining())
    flow_run(tmp_path / "shortcut", Shortcut(M=16))
    for changes, message in (
        ({"network": MLPConfig(width=24, depth=2)}, "network.width|another network"),
        ({"start": tmp_path / "consistency"}, "velocity at d = 0"),
        ({"start": tmp_path / "shortcut"}, "choose --objective.M 16"),
        ({"start": tmp_path / "none"}, "holds no model"),
        (
            {"objective": ProgressiveDistillation(), "teacher": tmp_path / "flow"},
            "leave --start out",
        ),
    ):
        run = replace(tuned, **changes)
        with pytest.raises(UserError, match=message):
            initial_state(run, run.data.load(), CPU)
    other = replace(digits(Shortcut()), start=tmp_path / "flow", network=config.network)
    with pytest.raises(UserError, match=r"takes vectors|shape"):
        initial_state(other, other.data.load(), CPU)


# ---------------------------------------------------------------------------------------------
# SiT and DiT layout


class Layout(nn.Module):
    """A small network in the layout of SiT, written after its paper: the names are what counts."""

    def __init__(self, width=32, depth=2, heads=4, patch=2, channels=4, side=8, sigma=True):
        super().__init__()
        self.heads, self.patch, self.channels = heads, patch, channels * (1 + sigma)
        self.keep = channels
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(5, width)
        grid = (side // patch, side // patch)
        self.pos_embed = nn.Parameter(positions(grid, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch**2 * self.channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    @staticmethod
    def block(width):
        block = nn.Module()
        block.attn = nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        block.mlp = nn.Module()
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        return block

    def forward(self, x, t, y):
        angle = t[:, None] * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(1e4)))
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1))
        c = c + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            a = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in block.attn.qkv(self.norm(h) * (1 + a[1]) + a[0]).chunk(3, -1)
            )
            h = h + a[2] * block.attn.proj(
                F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            )
            hidden = block.mlp.fc1(self.norm(h) * (1 + a[4]) + a[3])
            h = h + a[5] * block.mlp.fc2(F.gelu(hidden, approximate="tanh"))
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        h = self.final_layer.linear(self.norm(h) * (1 + scale) + shift)
        side, p = x.shape[-1] // self.patch, self.patch
        h = h.reshape(len(x), side, side, p, p, self.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])[:, : self.keep]

    @staticmethod
    def norm(h):
        return F.layer_norm(h, h.shape[-1:], eps=1e-6)


@pytest.fixture
def theirs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Layout()
        nn.init.normal_(net.t_embedder.mlp[0].weight, std=0.2)
    return net.eval()


def their_velocity(net, x, t, cond, noise_at):
    with torch.no_grad():
        return net(x, t, cond) if noise_at == 0 else -net(x, 1 - t, cond)


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("sigma", [True, False], ids=["with variance", "alone"])
def test_a_sit_is_the_same_function(tmp_path, noise_at, sigma):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Layout(sigma=sigma).eval()
        nn.init.normal_(net.t_embedder.mlp[0].weight, std=0.2)
    file, folder = tmp_path / "sit.safetensors", tmp_path / "model"
    weights = net.state_dict() | {"projectors.0.weight": torch.zeros(3)}
    save_file({k: v.contiguous() for k, v in weights.items()}, file)
    args = ["import", "sit", file, "--out", folder, "--heads", "4", "--noise-at", noise_at]
    assert cli.main([str(a) for a in args]) == 0
    model = checkpoint.load_model(folder)
    x, t, d, cond = inputs((4, 8, 8))
    u = their_velocity(net, x, t, cond, noise_at)
    with torch.no_grad():
        found = [error(model.net(x, t, step, cond), u) for step in (d, torch.zeros_like(d))]
        turned = error(model.net(x, 1 - t, d, cond), u)
    print(f"noise at {noise_at}: {found[0]:.1e} at all d; with time the other way {turned:.2f}")
    assert max(found) <= TOLERANCE < 1e-2 < turned
    assert model.spec == FlowMatching().spec(ModelSpec((4, 8, 8), 4, data="raw"))


def test_another_layout_is_refused(theirs, tmp_path):
    weights = theirs.state_dict()

    def refused(message, **changes):
        changed = {k: v for k, v in (weights | changes).items() if v is not None}
        with pytest.raises(UserError, match=message):
            sit.load_network(changed, heads=4)

    refused(
        "it has 'blocks.0.attn.q_norm.weight'", **{"blocks.0.attn.q_norm.weight": torch.ones(8)}
    )
    refused("it has no 'x_embedder.proj.weight'", **{"x_embedder.proj.weight": None})
    refused("it has no 'blocks.1.mlp.fc2.bias'", **{"blocks.1.mlp.fc2.bias": None})
    refused("fixed sines", pos_embed=weights["pos_embed"] + 0.1)
    refused("do not fit", **{"final_layer.linear.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="--heads"):
        sit.load_network(weights)
    with pytest.raises(UserError, match="time 0 or 1"):
        sit.load_network(weights, heads=4, noise_at=2)
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        sit.load_model(tmp_path / "broken.safetensors")


# ---------------------------------------------------------------------------------------------
# diffusers


@pytest.fixture
def transformer(tmp_path):
    """A small `DiTTransformer2DModel` for digits, saved, no layer of it zero."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            out_channels=2,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
        )
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    net.save_pretrained(tmp_path / "theirs" / "transformer")
    return net.eval()


def imported(tmp_path, *options):
    out = tmp_path / "model"
    args = ["import", "diffusers", tmp_path / "theirs", "--subfolder", "transformer"]
    assert cli.main([str(a) for a in [*args, "--pixels", "--out", out, *options]]) == 0
    return checkpoint.load_model(out)


@pytest.mark.parametrize("noise_at", [1, 0])
def test_a_transformer_of_diffusers_is_the_same_function(transformer, tmp_path, noise_at):
    model = imported(tmp_path, "--noise-at", str(noise_at))
    x, t, d, cond = inputs((1, 8, 8), classes=10)
    time = 1000 * (t if noise_at == 0 else 1 - t)
    with torch.no_grad():
        theirs = transformer(x, time, class_labels=cond).sample[:, :1]
        u = theirs if noise_at == 0 else -theirs
        model.net.train()  # labels are not dropped behind our back
        found = error(model.net(x, t, d, cond), u)
        null = error(model.net(x, t, d), model.net(x, t, d, torch.full((len(x),), 10)))
        twin = copy.deepcopy(model.net)
        nn.init.normal_(twin.level.output.weight)
        apart, kept = (error(net(x, t, d, cond), u) for net in (twin, model.net))
    print(f"{found:.1e} at all d; with a step embedding {apart:.2f}")
    assert max(found, null, kept) <= TOLERANCE < 1e-2 < apart


def test_our_trainer_makes_a_shortcut_model_of_it(transformer, tmp_path):
    flow = imported(tmp_path)
    args = ["train", "digits", "--start", tmp_path / "model", "--steps", "3", "--batch", "16"]
    args += ["--log.look-every", "0", "--log.trackers", "--device", "cpu"]
    args += ["--out", tmp_path / "tuned"]
    assert cli.main([str(a) for a in args]) == 0
    tuned = checkpoint.load_model(tmp_path / "tuned")
    x, t, d, cond = inputs((1, 8, 8), classes=10)
    with torch.no_grad():
        before = flow.net(x, t, d, cond)
        steps = error(tuned(x, t, d, cond), tuned(x, t, torch.zeros_like(d), cond))
        moved = error(tuned(x, t, torch.zeros_like(d), cond), before)
    print(f"after three steps: {moved:.3f} from the flow at d = 0, {steps:.1e} between steps")
    assert tuned.spec.step_input == "step" and moved > 0 and steps > 0
    text = (tmp_path / "tuned" / "config.json").read_text()
    assert (
        json.loads(text)["network"]["name"] == "diffusers_dit"
        and str(tmp_path / "theirs") not in text
    )


def test_what_is_no_transformer_is_refused(transformer, tmp_path, capsys):
    def refused(message, *args):
        assert cli.main([str(a) for a in args]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err

    base = ("import", "diffusers", tmp_path / "none", "--out", tmp_path / "o")
    refused("cannot load", *base)
    here = ("import", "diffusers", tmp_path / "theirs", "--subfolder", "transformer")
    refused("time 0 or 1", *here, "--noise-at", "3", "--out", tmp_path / "o")
    imported(tmp_path)
    config = checkpoint.read_info(tmp_path / "model")["network"]
    assert "diffusers_version" not in config["config"]
    with pytest.raises(UserError, match="samples"):
        DiffusersDiTConfig(config["config"]).build((1, 28, 28), 10)
    with pytest.raises(UserError, match="no config"):
        DiffusersDiTConfig('{"colour": 3}').build((1, 8, 8), 10)


def test_heads_are_found_by_width_and_depth():
    assert all(heads_of(width, depth) == heads for width, depth, heads in SIZES.values())
    with pytest.raises(UserError, match="--heads"):
        heads_of(768, 28)

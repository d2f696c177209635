"""What is done for speed changes no gradient: against the plain step, in float64."""

import shutil
from dataclasses import replace

import pytest
import torch

from anystep import cli
from anystep.data import seeded
from anystep.networks import blocks_of
from anystep.networks.dit import DiTConfig
from anystep.objectives import Batch
from anystep.objectives.shortcut import Shortcut
from anystep.presets import digits
from anystep.state import compile_blocks, initial_state, recompute_blocks

CPU = torch.device("cpu")
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def state_of(config):
    """A state in float64 whose weights are not the initial ones, at which much is zero."""
    state = initial_state(config, config.data.load(), CPU)
    generator = torch.Generator().manual_seed(0)
    for net in (state.model.net, state.target):
        net.double()
        for weight in net.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator).double()
    return state


def gradients(prepare):
    """The gradients of a digits batch with targets and guidance, after `prepare(nets)`."""
    config = digits(Shortcut(bootstrap_share=0.25, guidance=2.0))
    config = replace(config, network=DiTConfig(patch=2, width=24, depth=2, heads=2))
    state = state_of(config)
    prepare([state.model.net, state.target])
    x1, cond = config.data.load().train.batch(slice(0, 48))
    batch = Batch(x1.double(), cond)
    loss = config.objective(state.called, batch, 0.5, seeded(0, 0)).per_example.mean()
    loss.backward()
    return {k: v.grad for k, v in state.model.net.named_parameters()}


def plain(nets):
    """Use the kernel of torch for attention."""
    for net in nets:
        for block in blocks_of(net):
            block.few_tokens = 0


CHANGES = {
    "explicit attention": lambda nets: None,
    "recompute": lambda nets: recompute_blocks(nets[0]),
    "compile": lambda nets: compile_blocks(*nets),
}


@pytest.mark.parametrize(
    "change",
    [
        "explicit attention",
        "recompute",
        pytest.param("compile", marks=[COMPILER, pytest.mark.slow]),
    ],
)
def test_fast_paths_have_the_gradients_of_the_plain_step(change):
    expected, found = gradients(plain), gradients(CHANGES[change])
    assert all(v.abs().max() > 1e-6 for v in expected.values())
    for name, value in expected.items():
        bound = 1e-10 * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound)


def kept(prepare):
    """Bytes of activations kept for the backward pass, after `prepare(nets)`."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(prepare)
    return sum(sizes)


def test_recomputing_keeps_less():
    assert kept(CHANGES["recompute"]) < 0.5 * kept(CHANGES["explicit attention"])


@COMPILER
@pytest.mark.slow
def test_a_compiled_run_is_trained_stopped_and_sampled_as_any_other(tmp_path, capsys):
    options = "--network.width 16 --network.depth 2 --network.heads 2 --batch 16 --log.every 2"
    command = ["train", "digits", "--out", str(tmp_path / "run"), *options.split(), "--steps", "4"]
    command += ["--log.look-every", "0"]
    assert cli.main([*command, "--compile"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert cli.main(command) == 0  # what is compiled is not part of what the run is
    assert cli.main(["sample", str(tmp_path / "run"), "--n", "2", "--steps", "2"]) == 0

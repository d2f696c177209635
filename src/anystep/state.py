"""The state of a training run: everything a checkpoint holds, and how it gets there and back."""

import contextlib
import copy
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from anystep import checkpoint, parallel
from anystep.compute import ForwardCounter
from anystep.config import TrainConfig, config_json
from anystep.data import Loaded
from anystep.errors import UserError
from anystep.networks import blocks_of, build_model
from anystep.objectives import Models, copy_weights
from anystep.parallel import Processes
from anystep.spec import Model, ModelSpec
from anystep.start import cost, load_start, source

# Fusing reductions over features with those over tokens gives wrong gradients of modulated
# LayerNorms, silently: by 1 % on the CPU (torch 2.13; tests/test_fast.py fails without), more on
# CUDA (pytorch issue 193061).
EXACT = {"cpp.max_horizontal_fusion_size": 1, "triton.mix_order_reduction": False}


@dataclass
class State:
    """Everything a checkpoint holds.

    Attributes:
        model: the network being trained, and its spec.
        average: the EMA of its weights that is sampled with.
        target: the EMA that makes targets, when the objective wants one.
        teacher: the network learnt from, when there is one.
        optimizer: AdamW.
        data: digest of the training data.
        counter: of forward-equivalents.
        origin: where the teacher or the start came from, and what it cost.
        step: steps done.
        seconds: time they took.
        position: where in the data the next step begins, when its number does not say.
        processes: those that train, each with this state or a share of it.
        called: the networks as an objective calls them, all processes together.
    """

    model: Model
    average: nn.Module
    target: nn.Module | None
    teacher: nn.Module | None
    optimizer: torch.optim.AdamW
    data: str
    counter: ForwardCounter
    origin: dict[str, Any]
    processes: Processes
    called: Models
    step: int = 0
    seconds: float = 0.0
    position: Any = None

    def begin_phase(self, config: TrainConfig) -> None:
        """Start the run, or advance to the phase whose first step is the next."""
        objective = config.objective
        models = Models(self.model.net, self.target, self.teacher)  # weights, not to be called
        if self.step == 0:
            objective.start(models)
            copy_weights(self.model.net, self.average)
            if self.target is not None:
                copy_weights(self.model.net, self.target)
            return
        objective.advance(models, self.step / config.steps)
        if not objective.keep_optimizer:
            self.optimizer.state.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors of everything but `average`, which is the checkpoint's model."""
        tensors = {f"net.{k}": v for k, v in self.model.net.state_dict().items()}
        for name, net in (("target", self.target), ("teacher", self.teacher)):
            if net is not None:
                tensors |= {f"{name}.{k}": v for k, v in net.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        return tensors

    def restore(self, folder: Path) -> None:
        """Take everything from a checkpoint, however many processes wrote it.

        Raises:
            UserError: it is damaged, or was trained on other data.
        """
        facts = checkpoint.read_info(folder)["training"]
        if facts["data"] != self.data:
            raise UserError(
                f"the data have changed since {folder}: restore them, or train to another --out"
            )
        if self.processes.mesh is None and (folder / checkpoint.TRAINING).exists():
            self._restore_file(folder)
        else:
            for weight in self.model.net.parameters():
                zeros = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[weight] = {"step": torch.tensor(0.0), **zeros}
            parallel.read_shards(folder, self.tensors() | self.average.state_dict())
        self.step = int(facts["step"])
        self.seconds = float(facts.get("seconds", 0))
        self.counter.rows = int(facts.get("forwards", 0))
        self.origin = facts.get("teacher", {})
        self.position = facts.get("position")

    def _restore_file(self, folder: Path) -> None:
        """Take weights, averages and moments from the two files of an unsharded checkpoint."""
        path = folder / checkpoint.TRAINING
        parts: dict[str, dict[str, Tensor]] = {"net": {}, "target": {}, "teacher": {}}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in checkpoint.read_tensors(path).items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                index, _, key = rest.partition(".")
                moments.setdefault(int(index), {})[key] = value
            else:
                parts[part][rest] = value
        nets = {"net": self.model.net, "target": self.target, "teacher": self.teacher}
        for part, net in nets.items():
            if net is not None:
                checkpoint.load_weights(net, parts[part], path)
        weights = folder / checkpoint.WEIGHTS
        checkpoint.load_weights(self.average, checkpoint.read_tensors(weights), weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def initial_state(
    config: TrainConfig,
    splits: Loaded,
    device: torch.device,
    processes: Processes | None = None,
    *,
    new: bool = True,
) -> State:
    """The state before the first step; the initial weights follow from the seed, or the start.

    Args:
        config: the run.
        splits: its data.
        device: where it is trained.
        processes: those that train.
        new: whether it is a new run, not one whose checkpoint brings the weights.

    Raises:
        UserError: the start does not fit.
    """
    processes = processes or Processes()
    data = splits.train
    base = ModelSpec(
        shape=data.shape,
        num_classes=data.num_classes,
        data=data.scale,
        guidance=data.guidance,
        vae=data.vae,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.network, config.objective.spec(base))
    origin = load_start(model, config) if new else {}

    def frozen_copy() -> nn.Module:
        return processes.place(copy.deepcopy(model.net).requires_grad_(False), device)

    average = frozen_copy()
    target = None if config.objective.target_ema is None else frozen_copy()
    teacher = None if config.teacher is None else frozen_copy()
    if config.recompute:
        recompute_blocks(model.net)
    processes.place(model.net, device)
    if config.compile:
        compile_blocks(model.net, target, teacher)
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.net.parameters(),
        options.lr,
        options.betas,
        weight_decay=options.weight_decay,
        fused=True,
    )

    def called(net: nn.Module | None) -> Model | None:
        return None if net is None else Model(processes.share(net), model.spec)

    shared = [called(net) for net in (model.net, target, teacher)]
    assert shared[0] is not None
    return State(
        model,
        average,
        target,
        teacher,
        optimizer,
        data.digest(),
        ForwardCounter(*shared),
        origin,
        processes,
        Models(shared[0], *shared[1:]),
    )


def recompute_blocks(net: nn.Module) -> None:
    """Keep no activations inside the blocks: the backward pass computes them again."""
    for block in blocks_of(net):
        block.forward = partial(torch_checkpoint, block.forward, use_reentrant=False)


def compile_blocks(*nets: nn.Module | None) -> None:
    """Compile what a network repeats: once for all blocks, so that the wait is short."""
    from torch._inductor import list_options  # takes a second

    known = list_options()
    options = {name: value for name, value in EXACT.items() if name in known}
    for net in nets:
        for block in [] if net is None else blocks_of(net):
            block.compile(dynamic=False, options=options)


def load_teacher(state: State, config: TrainConfig) -> None:
    """Give a new run the weights of its teacher.

    Raises:
        UserError: the teacher has another network, other data or another objective than the
            student can learn from; what differs is named.
    """
    if config.teacher is None:
        return
    folder, model = source(config.teacher, "teacher", config, state.model.spec)
    config.objective.check_teacher(model.spec)
    assert state.teacher is not None
    if state.processes.mesh is None:
        copy_weights(model.net, state.teacher)
    else:
        parallel.read_shards(folder, state.teacher.state_dict())
    state.origin = cost(config.teacher)


def save(state: State, config: TrainConfig) -> None:
    """Write a checkpoint, all processes together."""
    training = {
        "step": state.step,
        "seconds": round(state.seconds, 1),
        "forwards": state.counter.rows,
        "teacher": state.origin,
        "data": state.data,
        "position": state.position,
        "config": config_json(config),
    }
    info = checkpoint.model_info(config.network, state.model.spec, training)
    keep, processes = config.log.keep, state.processes
    if processes.mesh is not None:
        save_shards(checkpoint.checkpoint_folder(config.out, state.step), state, info)
        if processes.first:
            checkpoint.prune(config.out, keep)
    elif processes.first:
        tensors = state.tensors()
        checkpoint.save_checkpoint(config.out, state.step, state.average, info, tensors, keep)
    processes.wait()


def save_shards(folder: Path, state: State, info: dict[str, Any]) -> None:
    """Write a checkpoint, each process its share; the averaged weights become one file."""
    first = state.processes.first
    place: contextlib.AbstractContextManager[Path] = (
        checkpoint.replacing(folder)
        if first
        else contextlib.nullcontext(checkpoint.temporary(folder))
    )
    with place as new:
        state.processes.wait()
        parallel.write_shards(new, state.tensors())
        parallel.write_shards(new / "average", state.average.state_dict(), merge=True)
        state.processes.wait()
        if first:
            (merged,) = (new / "average").glob("*.safetensors")
            merged.rename(new / checkpoint.WEIGHTS)
            shutil.rmtree(new / "average")
            checkpoint.write_json(new / checkpoint.MODEL, info)

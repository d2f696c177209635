"""The state of a training run: everything a checkpoint holds, and how it gets there and back."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anystep import checkpoint
from anystep.compute import ForwardCounter
from anystep.config import TrainConfig, config_json
from anystep.data import Splits
from anystep.errors import UserError
from anystep.networks import build_model
from anystep.objectives import Models, copy_weights
from anystep.registry import differences, to_json
from anystep.spec import Model, ModelSpec


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
        origin: where the teacher came from, and what it cost.
        step: steps done.
        seconds: time they took.
        position: where in the data the next step begins, when its number does not say.
    """

    model: Model
    average: nn.Module
    target: nn.Module | None
    teacher: nn.Module | None
    optimizer: torch.optim.AdamW
    data: str
    counter: ForwardCounter
    origin: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    position: Any = None

    @property
    def models(self) -> Models:
        """The networks as an objective sees them: asked only what the spec allows."""
        spec = self.model.spec
        target, teacher = (
            None if net is None else Model(net, spec) for net in (self.target, self.teacher)
        )
        return Models(self.model, target, teacher)

    def begin_phase(self, config: TrainConfig) -> None:
        """Start the run, or advance to the phase whose first step is the next."""
        objective = config.objective
        if self.step == 0:
            objective.start(self.models)
            copy_weights(self.model.net, self.average)
            if self.target is not None:
                copy_weights(self.model.net, self.target)
            return
        objective.advance(self.models, self.step / config.steps)
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
        """Take everything from a checkpoint.

        Raises:
            UserError: it is damaged, or was trained on other data.
        """
        facts = checkpoint.read_info(folder)["training"]
        if facts["data"] != self.data:
            raise UserError(
                f"the data have changed since {folder}: restore them, or train to another --out"
            )
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
        self.step = int(facts["step"])
        self.seconds = float(facts.get("seconds", 0))
        self.counter.rows = int(facts.get("forwards", 0))
        self.origin = facts.get("teacher", {})
        self.position = facts.get("position")


def initial_state(config: TrainConfig, splits: Splits, device: torch.device) -> State:
    """The state before the first step; the initial weights follow from the seed."""
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
        model = build_model(config.network, config.objective.spec(base)).to(device)

    def frozen_copy() -> nn.Module:
        return copy.deepcopy(model.net).requires_grad_(False)

    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.net.parameters(), options.lr, options.betas, weight_decay=options.weight_decay
    )
    average = frozen_copy()
    target = None if config.objective.target_ema is None else frozen_copy()
    teacher = None if config.teacher is None else frozen_copy()
    counter = ForwardCounter(model.net, target, teacher)  # last: a copy would copy its hooks
    return State(model, average, target, teacher, optimizer, data.digest(), counter, {})


def load_teacher(state: State, config: TrainConfig) -> None:
    """Give a new run the weights of its teacher.

    Raises:
        UserError: the teacher has another network, other data or another objective than the
            student can learn from; what differs is named.
    """
    if config.teacher is None:
        return
    folder = checkpoint.find_model(config.teacher)
    info = checkpoint.read_info(folder)
    changed = differences(info["network"], to_json(config.network))
    if changed:
        raise UserError(
            f"the teacher {config.teacher} has another network than the student "
            f"({'; '.join(changed)}): give the student the teacher's"
        )
    model = checkpoint.load_model(folder)
    for name in ("shape", "num_classes", "data", "finest", "vae"):
        theirs, ours = getattr(model.spec, name), getattr(state.model.spec, name)
        if theirs != ours:
            raise UserError(
                f"the teacher {config.teacher} was trained for {name} {theirs}, the student is "
                f"for {ours}"
            )
    config.objective.check_teacher(model.spec)
    assert state.teacher is not None
    copy_weights(model.net, state.teacher)
    training = info["training"]
    earlier = training.get("teacher") or {}
    state.origin = {
        "model": str(config.teacher),
        "forwards": training.get("forwards", 0) + earlier.get("forwards", 0),
    }


def save(state: State, config: TrainConfig) -> Path:
    """Write a checkpoint."""
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
    return checkpoint.save_checkpoint(
        config.out, state.step, state.average, info, state.tensors(), config.log.keep
    )

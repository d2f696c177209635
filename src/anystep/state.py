"""The state of a training run: everything a checkpoint holds, and how it gets there and back."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anystep import checkpoint
from anystep.config import TrainConfig, config_json
from anystep.data import Splits
from anystep.errors import UserError
from anystep.networks import build_model
from anystep.spec import Model, ModelSpec


@dataclass
class State:
    """Everything a checkpoint holds.

    Attributes:
        model: the network being trained, and its spec.
        average: the EMA of its weights that is sampled with.
        target: the EMA that makes targets, when the objective wants one.
        optimizer: AdamW.
        data: digest of the training data.
        step: steps done.
    """

    model: Model
    average: nn.Module
    target: nn.Module | None
    optimizer: torch.optim.AdamW
    data: str
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors of everything but `average`, which is the checkpoint's model."""
        tensors = {f"net.{k}": v for k, v in self.model.net.state_dict().items()}
        if self.target is not None:
            tensors |= {f"target.{k}": v for k, v in self.target.state_dict().items()}
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
        parts: dict[str, dict[str, Tensor]] = {"net": {}, "target": {}, "optimizer": {}}
        for name, value in checkpoint.read_tensors(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        checkpoint.load_weights(self.model.net, parts["net"], path)
        if self.target is not None:
            checkpoint.load_weights(self.target, parts["target"], path)
        weights = folder / checkpoint.WEIGHTS
        checkpoint.load_weights(self.average, checkpoint.read_tensors(weights), weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = int(facts["step"])


def initial_state(config: TrainConfig, splits: Splits, device: torch.device) -> State:
    """The state before the first step; the initial weights follow from the seed."""
    data = splits.train
    base = ModelSpec(
        shape=data.shape,
        num_classes=data.num_classes,
        data=data.scale,
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
    target = None if config.objective.target_ema is None else frozen_copy()
    return State(model, frozen_copy(), target, optimizer, data.digest())


def save(state: State, config: TrainConfig) -> Path:
    """Write a checkpoint."""
    info = checkpoint.model_info(
        config.network,
        state.model.spec,
        {"step": state.step, "data": state.data, "config": config_json(config)},
    )
    return checkpoint.save_checkpoint(
        config.out, state.step, state.average, info, state.tensors(), config.log.keep
    )

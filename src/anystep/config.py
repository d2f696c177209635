"""Everything that determines a training run, as frozen dataclasses that go to JSON and back."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from anystep.data import DataConfig
from anystep.errors import UserError
from anystep.networks import NetworkConfig
from anystep.objectives import Objective
from anystep.registry import differences, to_json
from anystep.trackers import TrackerName


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        betas: decay of the two moments.
        weight_decay: decoupled weight decay, on all parameters.
        warmup: steps of linear warm-up; at most a tenth of the run, or of each of its phases.
        decay: how the rate falls after warm-up: not at all, or along a cosine to zero.
        clip: bound on the norm of the gradient; None is off.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    warmup: int = 0
    decay: Literal["none", "cosine"] = "none"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr must be positive, not {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas must be in [0, 1), not {self.betas}")
        if self.weight_decay < 0 or self.warmup < 0:
            raise UserError("optimizer.weight_decay and optimizer.warmup must be at least 0")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"optimizer.clip must be positive or None, not {self.clip}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of a phase of `steps`, counted from 0."""
        warmup = min(self.warmup, steps // 10)
        rate = self.lr * min(1.0, (step + 1) / (warmup + 1))
        if self.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        return rate


@dataclass(frozen=True)
class LogConfig:
    """What is written while a run goes on; none of it changes the weights.

    Attributes:
        every: steps between lines of metrics.
        save_every: steps between checkpoints; the last step is always saved.
        keep: how many checkpoints are kept.
        look_every: steps between sample grids and few-step scores; 0 is never.
        look_steps: the step counts of those grids and scores.
        look_samples: samples scored at each step count.
        trackers: what else is given the metrics; tensorboard writes to the run's folder, where
            it is installed.
        project: what wandb and trackio call the project.
    """

    every: int = 50
    save_every: int = 500
    keep: int = 2
    look_every: int = 0
    look_steps: tuple[int, ...] = (1, 4, 32)
    look_samples: int = 512
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    project: str = "anystep"

    def __post_init__(self) -> None:
        if self.every < 1 or self.save_every < 1 or self.keep < 1:
            raise UserError("log.every, log.save_every and log.keep must be at least 1")
        if self.look_every < 0 or self.look_samples < 4:
            raise UserError("log.look_every must be at least 0 and log.look_samples at least 4")
        if not self.look_steps or min(self.look_steps) < 1:
            raise UserError(f"log.look_steps must be step counts from 1, not {self.look_steps}")

    @staticmethod
    def upgrade(data: dict[str, Any]) -> dict[str, Any]:
        """JSON of an earlier version in today's fields: `tensorboard` was true or false."""
        if "tensorboard" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "tensorboard"}
        return {"trackers": ["tensorboard"] if data["tensorboard"] else []} | rest


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: the dataset.
        network: the network.
        objective: the method.
        optimizer: AdamW and its schedule.
        log: what is written on the way.
        teacher: a run, checkpoint or model folder to learn from, for methods that have one.
        start: a run, checkpoint or model folder whose weights a new run starts from; a flow
            model answers every step size as it answered d = 0.
        out: the run's folder.
        steps: number of training steps.
        batch: examples a step.
        accumulate: parts into which a batch is cut to save memory.
        ema: decay of the EMA of the weights that are sampled with; it warms up, so that its
            horizon never exceeds a ninth of the run.
        flip: mirror half of the images left to right.
        seed: everything random follows from it.
        device: "auto" is CUDA where there is one.
        precision: "auto" is bfloat16 autocast on CUDA and float32 elsewhere.
        parallel: how the processes that torchrun started hold the networks, see
            `anystep.parallel`; one process holds them whole.
        recompute: compute a block's activations again in the backward pass instead of keeping
            them: less memory, more time.
        compile: compile the blocks with torch.compile: faster steps after a wait at the start,
            which is short when the same run was compiled before. Needs a C++ compiler on the CPU.
    """

    data: DataConfig
    network: NetworkConfig
    objective: Objective
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    teacher: Path | None = None
    start: Path | None = None
    out: Path = Path("runs/run")
    steps: int = 10_000
    batch: int = 128
    accumulate: int = 1
    ema: float = 0.999
    flip: bool = False
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    recompute: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.accumulate > self.batch:
            raise UserError(f"accumulate {self.accumulate} is more than batch {self.batch}")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be in [0, 1), not {self.ema}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, not {self.seed}")

    def phase(self, step: int) -> tuple[int, int]:
        """The first step of the phase that step `step` belongs to, and how many it has."""
        phases = self.objective.phases
        index = step * phases // self.steps
        first, end = (-(-k * self.steps // phases) for k in (index, index + 1))
        return first, end - first


# These may differ between a run and its continuation: they do not change what is computed. Where
# data, teacher and start lie is free: a checkpoint has the digest of the data, and the weights.
PLACES = ("out", "teacher", "start", "data.path")
FREE = (*PLACES, "log.", "device", "parallel", "recompute", "compile")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields, as "name: old -> new", in which two configs (JSON) are different runs.

    A run that began without a start cannot be given one.
    """
    different = differences(old, new)
    return [line for line in different if not line.startswith(FREE) or "start: None ->" in line]


def config_json(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON data."""
    data: dict[str, Any] = to_json(config)
    return data


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" stands for.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no CUDA device {name!r} here; use --device cpu")
    return device

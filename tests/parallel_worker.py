"""What each process of tests/test_parallel.py does: parallel_worker.py TASK CONFIG ..."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from anystep import checkpoint, parallel
from anystep import train as training
from anystep.config import TrainConfig
from anystep.errors import UserError
from anystep.registry import from_json
from anystep.state import initial_state

CPU = torch.device("cpu")
GRADIENTS = "gradients.safetensors"
training_step = training.training_step


def train(config):
    """Train the run, and write the moments after its first step, which are its gradients'."""

    def recording(state, *rest):
        metrics = training_step(state, *rest)
        if state.step == 0:
            moments = {k: parallel.whole(v) for k, v in state.tensors().items() if "exp_avg" in k}
            if state.processes.first:
                save_file(moments, config.out / GRADIENTS)
        return metrics

    training.training_step = recording
    training.train(config, bar=False)


def fail(config):
    """Train until the fifth step, in which the second process fails."""

    def failing(state, *rest):
        if state.step == 5 and parallel.rank() == 1:
            raise UserError("the second process is ill")
        return training_step(state, *rest)

    training.training_step = failing
    training.train(config, bar=False)


def restore(config):
    """Take a checkpoint and write all of its tensors, and how much of them each process held."""
    with parallel.joined(config.parallel, CPU) as processes:
        state = initial_state(config, config.data.load(), CPU, processes)
        state.restore(checkpoint.checkpoints(config.out)[-1])
        held = state.tensors() | {f"average.{k}": v for k, v in state.average.state_dict().items()}
        local = sum(getattr(v, "_local_tensor", v).numel() for v in held.values())
        tensors = {k: parallel.whole(v).contiguous() for k, v in held.items()}
        tensors["held"] = torch.tensor(local)
        save_file(tensors, config.out / f"restored-{processes.count}-{processes.rank}.safetensors")


def main():
    """Do the task for every config."""
    task, *paths = sys.argv[1:]
    assert "RANK" in os.environ
    with parallel.joined("ddp", CPU):
        for path in paths:
            globals()[task](from_json(TrainConfig, checkpoint.read_json(Path(path))))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"anystep: {error}")

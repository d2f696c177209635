"""Weights that a run takes from another model: what it starts from, what teaches it."""

from pathlib import Path
from typing import Any

from anystep import checkpoint
from anystep.config import TrainConfig
from anystep.errors import UserError
from anystep.networks import forget_steps
from anystep.objectives import copy_weights
from anystep.registry import differences, to_json
from anystep.spec import Model, ModelSpec


def load_start(model: Model, config: TrainConfig) -> dict[str, Any]:
    """Give the network of a new run the weights it starts from.

    A flow model's become those of a network that answers every step size as d = 0.

    Returns:
        Where they came from, and what they cost; nothing without a start.

    Raises:
        UserError: they are of another network or other data, or know no velocity at d = 0.
    """
    if config.start is None:
        return {}
    if config.teacher is not None:
        raise UserError("the teacher's weights are the start: leave --start out")
    _, start = source(config.start, "start", config, model.spec, steps=False)
    if not start.spec.knows_velocity:
        raise UserError(
            f"the start {config.start} was not trained for the velocity at d = 0, as "
            "flow_matching and shortcut are"
        )
    if start.spec.step_input != "step":
        forget_steps(start.net)
    elif start.spec.finest != model.spec.finest:
        raise UserError(
            f"the start {config.start} was trained for steps down to 1/{start.spec.finest}, not "
            f"1/{model.spec.finest}: choose --objective.M {start.spec.finest}"
        )
    copy_weights(start.net, model.net)
    return cost(config.start)


def source(
    path: Path, role: str, config: TrainConfig, spec: ModelSpec, *, steps: bool = True
) -> tuple[Path, Model]:
    """The folder and the model whose weights a run takes.

    Args:
        path: a run, checkpoint or model folder.
        role: what it is to the run.
        config: the run.
        spec: the run's model.
        steps: whether M must be the same.

    Raises:
        UserError: it has another network, or other data; what differs is named.
    """
    folder = checkpoint.find_model(path)
    changed = differences(checkpoint.read_info(folder)["network"], to_json(config.network))
    if changed:
        raise UserError(
            f"the {role} {path} has another network than the student ({'; '.join(changed)}): "
            f"give the student the {role}'s"
        )
    model = checkpoint.load_model(folder)
    for name in ("shape", "num_classes", "data", "vae", *(["finest"] if steps else [])):
        theirs, ours = getattr(model.spec, name), getattr(spec, name)
        if theirs != ours:
            raise UserError(
                f"the {role} {path} was trained for {name} {theirs}, the student is for {ours}"
            )
    return folder, model


def cost(path: Path) -> dict[str, Any]:
    """Where weights were taken from, and the forwards that it and what it rests on took."""
    training = checkpoint.read_info(checkpoint.find_model(path))["training"]
    earlier = training.get("teacher") or {}
    return {
        "model": str(path),
        "forwards": training.get("forwards", 0) + earlier.get("forwards", 0),
    }

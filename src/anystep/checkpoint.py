"""Models and training states on disk: safetensors and JSON, written whole or not at all.

A *model folder* holds `model.safetensors` (the weights to sample with) and `model.json` (network,
spec, and where they came from). A *checkpoint* is a model folder that also holds
`training.safetensors`, everything needed to go on, in one file or, from a sharded run, in several
(`shard-*.safetensors`). A *run* keeps its newest checkpoints under
`checkpoints/`. Wherever a model is asked for, any of the three will do, and so will the name of
one on the Hugging Face hub, owner/name or owner/name@revision. Nothing is unpickled.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anystep.errors import UserError
from anystep.interop import hub
from anystep.networks import NetworkConfig, build_model
from anystep.registry import from_json, to_json
from anystep.spec import Model, ModelSpec

FORMAT = 1
WEIGHTS, MODEL, TRAINING = "model.safetensors", "model.json", "training.safetensors"
CHECKPOINTS = "checkpoints"
VAE = "vae"  # in a model folder: the autoencoder of a latent model, if it was shared with it


def model_info(
    network: NetworkConfig, spec: ModelSpec, training: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `model.json`; `training` says where the weights come from."""
    return {
        "format": FORMAT,
        "network": to_json(network),
        "spec": to_json(spec),
        "training": dict(training or {}),
    }


def save_model(folder: Path, net: nn.Module, info: Mapping[str, Any]) -> None:
    """Write a model folder, replacing what stands there.

    Args:
        folder: where; made if missing.
        net: the network with the weights to sample with.
        info: from `model_info`.
    """
    _replace(folder, {WEIGHTS: dict(net.state_dict())}, {MODEL: info})


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Model:
    """The model of a model folder, a checkpoint, a run (its newest checkpoint), or the hub.

    Raises:
        UserError: there is no model there, or it is damaged or of a newer format.
    """
    folder = find_model(Path(path))
    info = read_info(folder)
    spec = from_json(ModelSpec, info["spec"])
    model = build_model(from_json(NetworkConfig, info["network"]), with_own_vae(spec, folder))
    load_weights(model.net, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.to(device).eval()


def read_info(folder: Path) -> dict[str, Any]:
    """The content of a folder's `model.json`.

    Raises:
        UserError: it is missing, damaged or of a newer format.
    """
    info = read_json(folder / MODEL)
    parts = ("network", "spec", "training")
    if (
        not isinstance(info, dict)
        or info.get("format") != FORMAT
        or not all(isinstance(info.get(part), dict) for part in parts)
    ):
        raise UserError(f"{folder / MODEL} is not of a format this version of anystep reads")
    return info


def with_own_vae(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec, its VAE being the one in the model's own folder if there is one."""
    if spec.vae is None or not (folder / VAE / "config.json").is_file():
        return spec
    here = replace(spec.vae, name=str(folder.absolute()), revision=None, subfolder=VAE)
    return replace(spec, vae=here)


def find_model(path: Path) -> Path:
    """The model folder that `path` stands for; a model of the hub is fetched.

    Raises:
        UserError: there is none.
    """
    if hub.is_name(path):
        path = hub.fetch(path.as_posix())
    if (path / MODEL).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(
            f"{path} holds no model: name a run, a checkpoint, a model folder or one on the hub"
        )
    return found[-1]


def save_checkpoint(
    run: Path,
    step: int,
    net: nn.Module,
    info: Mapping[str, Any],
    state: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`.

    A crash at any instant leaves the older checkpoints as they were.
    """
    folder = checkpoint_folder(run, step)
    _replace(folder, {WEIGHTS: dict(net.state_dict()), TRAINING: dict(state)}, {MODEL: info})
    prune(run, keep)
    return folder


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(run)[:-keep]:
        _remove(old)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / CHECKPOINTS).glob("step-" + 8 * "[0-9]"))


def sweep(run: Path) -> None:
    """Remove what an interrupted write or removal left behind."""
    for leftover in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is missing or damaged; another checkpoint, if there is one, is named.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing{_otherwise(path)}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({_line(error)}){_otherwise(path)}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing{_otherwise(path)}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({_line(error)}){_otherwise(path)}") from None


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all."""
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(json.dumps(data, indent=2) + "\n")
    sync(new)
    new.replace(path)
    sync(path.parent)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights (cast to the network's dtype) that must fit exactly.

    Raises:
        UserError: they do not.
    """
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its network: {_line(error)}") from None


def _replace(
    folder: Path, tensors: Mapping[str, dict[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Make `folder` hold just these files."""
    with replacing(folder) as new:
        write_files(new, tensors, documents)


def write_files(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write safetensors and JSON files, name -> content."""
    for name, state in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / name)
        sync(folder / name)
    for name, document in documents.items():
        write_json(folder / name, document)


def temporary(folder: Path) -> Path:
    """Where a folder is written before it has its name."""
    return folder.with_name(f".{folder.name}.new")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write to; it becomes `folder`, complete, when the block ends well."""
    new = temporary(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    sync(new)
    if folder.exists():
        _remove(folder)
    new.rename(folder)
    sync(folder.parent)


def _remove(folder: Path) -> None:
    """Remove a folder such that, if interrupted, no half of it keeps its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _otherwise(path: Path) -> str:
    """What to do when a file of a checkpoint is unusable."""
    if path.parent.parent.name != CHECKPOINTS:
        return ""
    others = [c.name for c in checkpoints(path.parent.parent.parent) if c != path.parent]
    hint = f"go on from {others[-1]}" if others else "start again"
    return f": remove {path.parent} to {hint}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Where the metrics of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

A library is imported only when a run asks for it. The runs of wandb and trackio have the same
`log` and `finish`, so either is a tracker as it is; TensorBoard is given these two.
"""

import importlib
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from anystep.checkpoint import read_json, write_json
from anystep.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
OWN_RUNS = ("wandb", "trackio")  # those that keep runs of their own, outside the run's folder
IDENTITY = "tracker.json"


class Tracker(Protocol):
    """What metrics are sent to."""

    def log(self, metrics: dict[str, float], /, *, step: int) -> None:
        """Take the metrics of a step."""

    def finish(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Events in a folder; later ones than `step`, from a run that was cut off, do not count.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, metrics: dict[str, float], /, *, step: int) -> None:
        """One event a metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise `UserError` unless the libraries asked for are there.

    TensorBoard, which nobody has to ask for, is left out where it is not installed.
    """
    for name in names:
        if name in OWN_RUNS:
            library(name)


def start_trackers(
    names: Sequence[TrackerName], run: Path, step: int, project: str, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of a run that goes on from `step`.

    Args:
        names: which.
        run: the run's folder.
        step: steps done; 0 for a new run.
        project: what wandb and trackio are to call the project.
        config: the run's config, for them to show.

    Raises:
        UserError: one is not installed, or does not start.
    """
    trackers: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name in OWN_RUNS:
            trackers.append(own_run(name, run, project, config))
            continue
        try:
            trackers.append(TensorBoard(run / "tensorboard", step))
        except ImportError:
            continue
    return trackers


def own_run(name: str, run: Path, project: str, config: Mapping[str, Any]) -> Tracker:
    """A new run of wandb or trackio, or the one with which this run began."""
    module, called = library(name), identity(run)
    options = {"project": project, "name": called, "config": dict(config), "resume": "allow"}
    if name == "wandb":  # knows a run by its id, trackio by its name
        options |= {"id": called, "dir": str(run)}
    try:
        started: Tracker = module.init(**options)
    except Exception as error:  # no login, no network, no disk: each library has its own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} does not start ({reason}); mend it, or leave it out of --log.trackers"
        ) from None
    return started


def library(name: str) -> Any:
    """The module of a tracker."""
    try:
        module = importlib.import_module(name)
        if not hasattr(module, "init"):  # wandb leaves a folder of its name where it is used
            raise ImportError(f"{name} is a folder here")
    except ImportError as error:
        raise UserError(
            f"the tracker {name} cannot be imported ({error}): pip install 'anystep[{name}]'"
        ) from None
    return module


def identity(run: Path) -> str:
    """What trackers call the run in this folder, as often as it is resumed or moved."""
    path = run / IDENTITY
    if not path.exists():
        plain = re.sub(r"[^\w.-]+", "-", run.resolve().name)  # wandb takes no / \ # ? % :
        write_json(path, {"name": f"{plain}-{secrets.token_hex(4)}"})
    return str(read_json(path)["name"])

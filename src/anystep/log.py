"""Metrics of a run: JSON lines, and TensorBoard events where tensorboard is installed."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


class MetricsLog:
    """Append one JSON object a line; lines after `step`, from a run that was cut off, go.

    Args:
        path: the file, `metrics.jsonl`; None writes nothing.
        step: the step from which the run goes on; 0 for a new one.
        tensorboard: also write events to `tensorboard/` beside the file.
    """

    def __init__(self, path: Path | None, step: int, tensorboard: bool = False) -> None:
        self.file: TextIO | None = None
        self.events: Any = None
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file = path.open("a")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            folder = path.parent / "tensorboard"
            self.events = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, and one event a metric."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        if self.events is not None:
            for name, value in metrics.items():
                self.events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file is not None:
            self.file.close()
        if self.events is not None:
            self.events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines

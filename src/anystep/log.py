"""Metrics of a run: JSON lines in its folder, and whatever else follows it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from anystep.trackers import Tracker


class MetricsLog:
    """Append one JSON object a line; lines after `step`, from a run that was cut off, go.

    Args:
        path: the file, `metrics.jsonl`; None writes nothing.
        step: the step from which the run goes on; 0 for a new one.
        trackers: they are given the same metrics, and finished at the end.
    """

    def __init__(self, path: Path | None, step: int, trackers: Sequence[Tracker] = ()) -> None:
        self.file: TextIO | None = None
        self.trackers = trackers
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, and the same to every tracker."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.log(dict(metrics), step=step)

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
        for tracker in self.trackers:
            tracker.finish()


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

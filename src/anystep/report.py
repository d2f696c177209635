"""What is shown of a model's quality: a table, a plot, grids of the same noise."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from anystep import checkpoint, figures
from anystep.config import LogConfig
from anystep.data import Splits, seeded
from anystep.errors import UserError
from anystep.evaluate import COLUMNS, REAL, Judge, Row, evaluate, generate, semigroup_gap
from anystep.interop.vae import recorded
from anystep.sampling import draw, sample
from anystep.spec import Model


def table(rows: Sequence[Row], gaps: dict[str, float], notes: Sequence[str]) -> str:
    """The scores as Markdown."""
    found = dict.fromkeys(k for row in rows for k in row.scores)
    used = [k for k in COLUMNS if k in found] + [k for k in found if k not in COLUMNS]
    head = ["model", "steps", *(COLUMNS.get(k, k) for k in used)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        steps = "" if not row.steps else str(row.steps)
        steps += f" (guidance {row.guidance:g})" if row.guidance != 1 else ""
        cells = [f"{row.scores[k]:.3f}" if k in row.scores else "" for k in used]
        lines.append(f"| {' | '.join([row.model, steps, *cells])} |")
    lines += ["", *(f"Semigroup gap of {name}: {gap:.3f}  " for name, gap in gaps.items())]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]) + "\n"


def write_report(
    out: Path,
    models: dict[str, Model],
    judge: Judge,
    *,
    steps: Sequence[int],
    n: int = 2048,
    seed: int = 0,
) -> dict[str, Path]:
    """Judge every model and write table, plot and grids.

    Returns:
        What was written: "table", "json", "plot", and a "grid" a model.
    """
    out.mkdir(parents=True, exist_ok=True)
    floor = judge.floor(n)
    rows = [floor] if floor else []
    for name, model in models.items():
        rows += evaluate(name, model, judge, steps=steps, n=n, seed=seed)
    measured = {name: semigroup_gap(model) for name, model in models.items()}
    gaps = {name: gap for name, gap in measured.items() if gap is not None}
    notes = [
        f"{n} samples (seed {seed}) against {judge.size} training examples; "
        f"{REAL}: {len(judge.splits.held_out)} held-out examples.",
        f"Features: {judge.features.name}.",
        *(score.note for score in judge.quoted),
    ]
    if judge.classifier is not None:
        notes.append(f"Classifier accuracy on held-out data: {judge.classifier.accuracy:.4f}.")
    files = {
        "table": out / "quality.md",
        "json": out / "quality.json",
        "plot": out / "quality.png",
    }
    files["table"].write_text(table(rows, gaps, notes))
    checkpoint.write_json(
        files["json"],
        {"rows": [asdict(row) for row in rows], "semigroup_gap": gaps, "notes": notes},
    )
    plot(files["plot"], rows)
    for name, model in models.items():
        key = "grid" if len(models) == 1 else f"grid {name}"
        files[key] = out / (f"{key.replace(' ', '-').replace('/', '-')}.png")
        save_grid(files[key], model, steps, seed=seed)
    return files


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Quality against steps: Fréchet distance, and accuracy and variance where there are any."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    floors = {}
    for row in rows:
        for key in ("frechet", "sliced", "accuracy", "variance"):
            if key not in row.scores:
                continue
            if row.model == REAL:
                floors[COLUMNS[key]] = row.scores[key]
                continue
            name = row.model + (f", guidance {row.guidance:g}" if row.guidance != 1 else "")
            metric = curves.setdefault(COLUMNS[key], {})
            metric.setdefault(name, {})[row.steps] = row.scores[key]
    figures.plot_quality(path, curves, floors)


def save_grid(
    path: Path | None, model: Model, steps: Sequence[int], *, columns: int = 10, seed: int = 0
) -> None:
    """Save the same noises at each step count, a row each; classes in turn along a row.

    Without a path they are drawn and not saved: a process does its share of another's picture.
    """
    spec = model.spec
    columns = columns if len(spec.shape) == 3 else 2000
    device = next(model.parameters()).device
    x0, cond = draw(spec, columns, seeded(seed, 0))
    if cond is not None:
        cond = (torch.arange(columns) % spec.num_classes).to(device)
    rows = shown(model, [sample(model, x0.to(device), steps=n, cond=cond).cpu() for n in steps])
    if path is not None:
        figures.save_rows(path, rows, [f"{n} step{'s' if n > 1 else ''}" for n in steps])


def shown(model: Model, rows: list[Tensor]) -> list[Tensor]:
    """Samples as they are shown: those of a latent model decoded, where its VAE can be had."""
    if model.spec.vae is None:
        return rows
    try:
        vae = recorded(model.spec.vae, device=next(model.parameters()).device)
        return [vae.decode(row) for row in rows]
    except UserError as error:
        warnings.warn(f"latents are shown as they are: {error}", stacklevel=3)
        return rows


class Look:
    """Sample grids and few-step scores while a run goes on; changes nothing in it.

    Args:
        config: how often, at which step counts, how many samples.
        splits: the data samples are judged against; None when no look is ever due.
        out: the run's folder; pictures go to `samples/` in it. None writes none.
        device: where a classifier runs.
    """

    def __init__(
        self, config: LogConfig, splits: Splits | None, out: Path | None, device: torch.device
    ) -> None:
        self.config, self.splits, self.out, self.device = config, splits, out, device
        self.judge: Judge | None = None

    def due(self, step: int) -> bool:
        """Whether to look after `step` steps."""
        return self.config.look_every > 0 and step % self.config.look_every == 0

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        """Write the grid of this step; returns the distance at each step count.

        Data that cannot be judged are warned of and do not stop the run.
        """
        assert self.splits is not None
        path = self.out and self.out / "samples" / f"step-{step:08d}.png"
        save_grid(path, model, self.config.look_steps)
        try:
            self.judge = self.judge or Judge(self.splits, device=self.device)
            metric = self.judge.metric
            return {f"{metric}/{n}": self.distance(model, n) for n in self.config.look_steps}
        except UserError as error:
            warnings.warn(f"no scores at step {step}: {error}", stacklevel=2)
            return {}

    def distance(self, model: Model, steps: int) -> float:
        """The distance of samples at one step count."""
        assert self.judge is not None
        return self.judge.distance(generate(model, self.config.look_samples, steps=steps)[0])

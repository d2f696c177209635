"""Pictures: sample grids, point clouds and quality against steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 48  # small images are enlarged to about this many pixels, without smoothing
MARGIN = 2
LEGEND = 2.2  # inches for a legend beside the panels, so that it does not squeeze them


def to_picture(x: Tensor) -> Image.Image:
    """One sample (C, H, W) in [-1, 1] as a picture; of more than 3 channels the first three."""
    x = x.detach().cpu().float().nan_to_num().clamp(-1, 1)
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    if len(pixels) in (1, 2):
        return Image.fromarray(pixels[0].numpy())
    return Image.fromarray(pixels[:3].permute(1, 2, 0).contiguous().numpy())


def image_grid(rows: Sequence[Tensor], labels: Sequence[str] = ()) -> Image.Image:
    """A picture of rows of samples, each (K, C, H, W), with a label before each row."""
    height, width = rows[0].shape[2:]
    scale = max(1, math.ceil(MIN_SIDE / max(height, width)))
    cell_h, cell_w = height * scale + MARGIN, width * scale + MARGIN
    font = ImageFont.load_default(size=14)
    left = max((int(font.getlength(label)) + 8 for label in labels), default=MARGIN)
    size = (left + cell_w * max(len(row) for row in rows), MARGIN + cell_h * len(rows))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        top = MARGIN + r * cell_h
        if labels:
            pen.text((4, top + cell_h // 2), labels[r], "black", font, anchor="lm")
        for k, x in enumerate(row):
            picture = to_picture(x).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (left + k * cell_w, top))
    return canvas


def near_square(x: Tensor) -> list[Tensor]:
    """Samples (K, ...) cut into rows of about sqrt(K)."""
    side = math.ceil(math.sqrt(len(x)))
    return [x[i : i + side] for i in range(0, len(x), side)]


def save_rows(path: Path, rows: Sequence[Tensor], labels: Sequence[str] = ()) -> None:
    """Save rows of samples: images as a grid, vectors as one scatter plot a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows[0].ndim == 4:
        image_grid(rows, labels).save(path)
    else:
        save_scatter(path, rows, labels)


def save_scatter(path: Path, clouds: Sequence[Tensor], labels: Sequence[str] = ()) -> None:
    """Save point clouds (K, D), by their first two coordinates, side by side."""
    figure, axes = _figure(len(clouds), 2.6)
    bound = float(torch.cat(list(clouds)).abs().quantile(0.999)) * 1.15
    for k, (axis, cloud) in enumerate(zip(axes, clouds, strict=True)):
        points = cloud.detach().cpu().numpy()
        axis.scatter(points[:, 0], points[:, min(1, points.shape[1] - 1)], s=2, alpha=0.4, lw=0)
        axis.set(xlim=(-bound, bound), ylim=(-bound, bound), aspect="equal", xticks=[], yticks=[])
        axis.set_title(labels[k] if labels else "", fontsize=9)
    figure.savefig(path, dpi=120)


def plot_quality(
    path: Path,
    curves: Mapping[str, Mapping[str, Mapping[int, float]]],
    floors: Mapping[str, float],
) -> None:
    """Save quality against the number of steps, a panel a metric and a line a model.

    Args:
        path: a PNG file.
        curves: metric -> model -> steps -> value.
        floors: metric -> the value of real against real, drawn as a dashed line.
    """
    figure, axes = _figure(len(curves), 4.2)
    for axis, (metric, models) in zip(axes, curves.items(), strict=True):
        values = [v for curve in models.values() for v in curve.values()]
        for k, (name, curve) in enumerate(models.items()):
            axis.plot(list(curve), list(curve.values()), ms=4, label=name, **style(k))
        if metric in floors:
            axis.axhline(floors[metric], ls="--", color="grey", lw=1, label="real data")
        axis.set_xscale("log", base=2)
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        steps = sorted({n for curve in models.values() for n in curve})
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.set(xlabel="sampling steps", title=metric)
        axis.grid(alpha=0.3)
    legend(figure, axes)
    figure.savefig(path, dpi=120)


def plot_curves(
    path: Path, curves: Mapping[str, Mapping[str, Mapping[float, float]]], xlabel: str
) -> None:
    """Save panels of lines, panel -> line -> x -> y, with logarithmic y."""
    figure, axes = _figure(max(len(curves), 1), 4.8)
    for axis, (title, lines) in zip(axes, curves.items(), strict=False):
        for k, (name, line) in enumerate(lines.items()):
            axis.plot(list(line), list(line.values()), ms=3, label=name, **style(k))
        axis.set(xlabel=xlabel, title=title, yscale="log")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.3)
    legend(figure, axes)
    figure.savefig(path, dpi=120)


def legend(figure: Any, axes: "np.ndarray[Any, Any]") -> None:
    """Names of the lines: in each panel, or beside them all where they would hide the lines."""
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 5:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + LEGEND, height)
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        return
    for axis in axes:
        axis.legend(fontsize=8)


def style(k: int) -> dict[str, str]:
    """Ten colours, solid with dots, then dashed with squares."""
    return {"color": f"C{k % 10}"} | (
        {"marker": "o", "ls": "-"} if k < 10 else {"marker": "s", "ls": "--"}
    )


def _figure(panels: int, side: float) -> tuple[Any, np.ndarray[Any, Any]]:
    """A figure with `panels` axes in one row, drawn without a window or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * panels, side), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))

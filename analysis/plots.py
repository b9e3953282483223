"""Figures of results: each function draws one result into an Axes and returns it; nothing is computed here.

Colours are readable for colour-blind people (Okabe–Ito; viridis and cividis). Without ``ax`` a new figure is made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.text import Text

from analysis.divergence import KLMatrix
from analysis.landscape import Line, Plane
from rlhf.metrics import read_json_lines

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABELS = {
    "loss": "loss (nats per token)",
    "proxy_reward": "proxy reward",
    "gold_reward": "gold reward",
    "entropy": "entropy (nats per token)",
    "response_length": "response length (tokens)",
}
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def label_of(metric: str) -> str:
    """A metric's name for people, with its unit where that is known."""
    if metric.startswith("kl/"):
        return f"KL to {metric.removeprefix('kl/')} (nats per response)"
    return LABELS.get(metric, metric)


def _new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height), layout="compressed")[1] if ax is None else ax


def _require(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"metric {name!r}: not in this result, which has {list(names)}; choose one of these")


def plot_line(result: Line, metrics: str | Sequence[str], ax: Axes | None = None, **style: Any) -> Axes:
    """One or more metrics along a path, with a band of ± one standard error; the checkpoints are named at the top.

    ``style`` goes to ``Axes.plot``.
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    ax = _new_axes(ax, 6, 4)
    travelled = result.t * result.length
    for metric, color in zip(metrics, cycle(COLORS), strict=False):
        _require(metric, list(result.values))
        mean, error = result.values[metric], np.nan_to_num(result.stderr[metric])
        options: dict[str, Any] = {"color": color, "linewidth": 1.8, "marker": ".", "label": label_of(metric)}
        (curve,) = ax.plot(travelled, mean, **options | style)
        ax.fill_between(travelled, mean - error, mean + error, color=curve.get_color(), alpha=0.2, linewidth=0)
    places = [result.coordinates[name] * result.length for name in result.names]
    for place in places:
        ax.axvline(place, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
    top = ax.secondary_xaxis("top")
    top.set_xticks(places, result.names)
    top.tick_params(length=0)
    ax.margins(x=0.02)
    ax.grid(axis="y", alpha=0.25)
    ax.set_xlabel(f"distance along the path from {result.names[0]} (weight-space L2)")
    if len(metrics) == 1:
        ax.set_ylabel(label_of(metrics[0]))
    else:
        ax.legend(frameon=False)
    return ax


def plot_plane(result: Plane, metric: str, ax: Axes | None = None, *, levels: int = 12, **style: Any) -> Axes:
    """A metric over a plane as filled contours with labelled lines and a colour bar; the checkpoints are marked.

    Marked checkpoints that lie off the plane are drawn hollow, at their projections. ``style`` goes to
    ``Axes.contourf``.
    """
    _require(metric, list(result.values))
    ax = _new_axes(ax, 6.2, 4.8)
    surface = np.ma.masked_invalid(result.values[metric])
    options: dict[str, Any] = {"levels": levels, "cmap": "viridis"}
    filled = ax.contourf(result.x, result.y, surface, **options | style)
    line_levels = np.asarray(filled.levels)[::2]
    lines = ax.contour(
        result.x, result.y, surface, levels=line_levels, colors="white", linewidths=0.6, linestyles="solid"
    )
    _drop_labels_near_edges(ax, ax.clabel(lines, fontsize=7, fmt="%.3g"))
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(filled, ax=ax, label=label_of(metric))
    missing = result.done & ~np.isfinite(result.values[metric])
    if missing.any():  # measured, but not a number; what is not measured yet is left blank
        rows, columns = np.nonzero(missing)
        ax.plot(result.x[columns], result.y[rows], "x", color="0.4", markersize=5)
    units = np.sqrt(np.diag(result.gram))
    extent = max(units[0] * np.ptp(result.x), units[1] * np.ptp(result.y))
    for name, point in result.coordinates.items():
        on_plane = result.distance[name] < 0.01 * extent
        marker: dict[str, Any] = {"markerfacecolor": "white" if on_plane else "none", "markersize": 7, "zorder": 10}
        outline = [patheffects.withStroke(linewidth=3.5, foreground="black")]
        ax.plot(*point, "o", markeredgecolor="white", markeredgewidth=1.5, path_effects=outline, **marker)
        offset: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        ax.annotate(name, point, fontsize=9, path_effects=HALO, zorder=10, **offset)
    if np.array_equal(result.gram, np.eye(2)):
        ax.set_aspect("equal")
        ax.set_xlabel("weight-space L2 distance")
        ax.set_ylabel("weight-space L2 distance")
    else:
        ax.set_xlabel(f"multiple of the first direction (L2 norm {units[0]:.3g})")
        ax.set_ylabel(f"multiple of the second direction (L2 norm {units[1]:.3g})")
    return ax


def _drop_labels_near_edges(ax: Axes, labels: Iterable[Text], distance: float = 0.06) -> None:
    """Remove contour labels that the frame would cut: nearer to an edge than a fraction of the axes."""
    for label in labels:
        place = ax.transLimits.transform(label.get_position())
        if min(*place, *(1 - place)) < distance:
            label.remove()


def plot_kl_matrix(result: KLMatrix, ax: Axes | None = None, **style: Any) -> Axes:
    """KL(row ‖ column) as a heat map with the numbers, ± one standard error, in its cells.

    ``style`` goes to ``Axes.imshow``.
    """
    size = len(result.names)
    ax = _new_axes(ax, 2.2 + 1.1 * size, 1.4 + 0.9 * size)
    options: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0}
    image = ax.imshow(result.mean, **options | style)
    for row in range(size):
        for column in range(size):
            mean, error = result.mean[row, column], result.stderr[row, column]
            text = "0" if row == column else _with_error(mean, error)
            red, green, blue, _ = image.cmap(image.norm(mean))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    slanted = max(map(len, result.names)) > 9
    ax.set_xticks(range(size), result.names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    ax.set_yticks(range(size), result.names)
    ax.set_xlabel("to: column (ρ)")
    ax.set_ylabel("from: row (π)")
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=ax, label="KL(row ‖ column), nats per response")
    return ax


def _with_error(mean: float, error: float) -> str:
    """Mean and standard error on two lines, both with the decimals that show two digits of the error."""
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
    return f"{mean:.{decimals}f}\n± {error:.{decimals}f}"


def plot_reward_kl(
    runs: Mapping[str, str | os.PathLike[str] | Sequence[Mapping[str, Any]]],
    x: str = "kl/reference",
    y: str = "gold_reward",
    ax: Axes | None = None,
    *,
    average: int = 1,
    **style: Any,
) -> Axes:
    """Reward against KL over the updates of one or more runs, with bars of ± one standard error.

    ``runs`` are {label: run folder, or the rows of its metrics.jsonl}. A point is the mean over ``average`` consecutive
    updates (its error √(Σ se²) / n; updates left over at the start are dropped), the last one ringed. ``style`` goes
    to ``Axes.errorbar``.
    """
    ax = _new_axes(ax, 6, 4.4)
    for (label, run), color in zip(runs.items(), cycle(COLORS), strict=False):
        rows = read_json_lines(Path(run) / "metrics.jsonl") if isinstance(run, str | os.PathLike) else run
        for name in (x, y):
            if not rows or name not in rows[0]:
                raise ValueError(
                    f"run {label!r}: has no {name!r} in its metrics; choose one of {list(rows[0]) if rows else []}"
                )
        columns, errors = {}, {}
        for name in (x, y):
            values = np.array([[row[name], row.get(f"{name}_stderr", np.nan)] for row in rows], dtype=float)
            size = min(average, len(values))
            blocks = values[len(values) % size :].reshape(-1, size, 2)
            columns[name] = blocks[..., 0].mean(axis=1)
            errors[name] = np.sqrt((blocks[..., 1] ** 2).sum(axis=1)) / size
        options: dict[str, Any] = {
            "color": color,
            "marker": ".",
            "linewidth": 1,
            "ecolor": to_rgba(color, 0.3),
            "label": label,
        }
        ax.errorbar(columns[x], columns[y], xerr=errors[x], yerr=errors[y], **options | style)
        ax.plot(columns[x][-1], columns[y][-1], "o", markersize=9, markeredgecolor=color, markerfacecolor="none")
    ax.set_xlabel(label_of(x))
    ax.set_ylabel(label_of(y))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax

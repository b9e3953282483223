"""Figures of PPO runs, one or several in the same axes, from their ``metrics.jsonl``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator

from analysis.plots.style import COLORS, LINESTYLES, figure_of, finish, label_of, new_axes
from rlhf.figures import draw_band
from rlhf.metrics import read_json_lines

Runs = Mapping[str, str | os.PathLike[str] | Sequence[Mapping[str, Any]]]
"""{label: run folder, or the rows of its metrics.jsonl}."""


def rows_of(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """{label: rows of metrics.jsonl}. Raises ValueError for a run without any."""
    read = {
        label: read_json_lines(Path(run) / "metrics.jsonl") if isinstance(run, str | os.PathLike) else list(run)
        for label, run in runs.items()
    }
    for label, rows in read.items():
        if not rows:
            raise ValueError(f"run {label!r}: has no updates in its metrics yet; wait for the first")
    return read  # type: ignore[return-value]  # rows that are given are only read


def plot_curves(runs: Runs, metric: str, ax: Axes | None = None) -> Axes:
    """A metric over the updates of one or more runs, with bands of ± one standard error where it has one.

    Runs that did not measure it are left out; ValueError when none did.
    """
    read = rows_of(runs)
    if not any(metric in rows[0] for rows in read.values()):
        raise ValueError(f"metric {metric!r}: in none of the runs {list(read)}; choose one of {_names(read)}")
    ax = new_axes(ax, 6, 4)
    for index, (label, rows) in enumerate(read.items()):
        if metric in rows[0]:
            color, dashes = COLORS[index % len(COLORS)], LINESTYLES[index // len(COLORS) % len(LINESTYLES)]
            draw_band(ax, np.array([row["update"] for row in rows]), rows, metric, label, color, linestyle=dashes)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "update", label_of(metric))


def plot_dashboard(runs: Runs, axes: np.ndarray | None = None, *, x: str = "kl/reference") -> np.ndarray:
    """The main curves of one or more runs: rewards, KL, entropy, length over updates, and reward against the KL ``x``.

    → the Axes, [2, 3]: proxy reward, gold reward (where no run has one, the objective), KL ``x``; entropy, response
    length, reward against KL. One legend names the runs: above a new figure, else in the first Axes.
    """
    read = rows_of(runs)
    is_new = axes is None
    axes = _new_grid(6) if axes is None else axes
    y = "gold_reward" if any("gold_reward" in rows[0] for rows in read.values()) else "proxy_reward"
    second = "objective" if y == "proxy_reward" else y
    plot_grid(read, ["proxy_reward", second, x, "entropy", "response_length"], axes)
    both = {label: rows for label, rows in read.items() if x in rows[0] and y in rows[0]}
    plot_reward_kl(both, x, y, axes.flat[-1], average=max(1, min(map(len, both.values())) // 10))
    return _one_legend(axes, 6, above=is_new)


def plot_grid(runs: Runs, metrics: Sequence[str], axes: np.ndarray | None = None) -> np.ndarray:
    """:func:`plot_curves` of several metrics, each in Axes of its own. → the Axes, with a legend as in the dashboard"""
    read = rows_of(runs)
    is_new = axes is None
    axes = _new_grid(len(metrics)) if axes is None else axes
    for ax, name in zip(axes.flat, metrics, strict=False):
        plot_curves(read, name, ax)
    return _one_legend(axes, len(metrics), above=is_new)


def _new_grid(number: int) -> np.ndarray:
    """So many Axes in rows of three, the ones left over without a frame."""
    rows, columns = -(-number // 3), min(number, 3)
    figure = plt.figure(figsize=(max(5.0, 3.7 * columns), 3.0 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[number:]:
        ax.set_axis_off()
    return axes


def _one_legend(axes: np.ndarray, number: int, *, above: bool) -> np.ndarray:
    """Instead of a legend in each of the first Axes, one."""
    first, *others = axes.flat[:number]
    handles, labels = first.get_legend_handles_labels()
    for ax in others + [first] * above:
        if ax.get_legend():
            ax.get_legend().remove()
    if above and len(labels) > 1:
        figure_of(first).legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
    return axes


def plot_reward_kl(
    runs: Runs,
    x: str = "kl/reference",
    y: str = "gold_reward",
    ax: Axes | None = None,
    *,
    average: int = 1,
    **style: Any,
) -> Axes:
    """Reward against KL over the updates of one or more runs, with bars of ± one standard error.

    A point is the mean over ``average`` consecutive updates (its error √(Σ se²) / n; updates left over at the start are
    dropped), the last one ringed. ``style`` goes to ``Axes.errorbar``.
    """
    ax = new_axes(ax, 6, 4.4)
    for (label, rows), color in zip(rows_of(runs).items(), cycle(COLORS), strict=False):
        for name in (x, y):
            if name not in rows[0]:
                raise ValueError(f"run {label!r}: has no {name!r} in its metrics; choose one of {list(rows[0])}")
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
    return finish(ax, label_of(x), label_of(y))


def _names(read: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    return [name for name in next(iter(read.values()))[0] if not name.endswith("_stderr")]

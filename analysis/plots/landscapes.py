"""Figures of lines and planes in weight space."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D

from analysis.landscape import Line, Plane
from analysis.plots.style import (
    BAND_ALPHA,
    COLORS,
    ON_SURFACE,
    drop_labels_near_edges,
    figure_of,
    label_of,
    new_axes,
    require_metric,
)


def plot_line(result: Line, metrics: str | Sequence[str], ax: Axes | None = None, **style: Any) -> Axes:
    """One or more metrics along a path, with a band of ± one standard error; the checkpoints are named at the top.

    ``style`` goes to ``Axes.plot``.
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    ax = new_axes(ax, 6, 4)
    travelled = result.t * result.length
    for metric, color in zip(metrics, cycle(COLORS), strict=False):
        require_metric(metric, list(result.values))
        mean, error = result.values[metric], np.nan_to_num(result.stderr[metric])
        options: dict[str, Any] = {"color": color, "linewidth": 1.8, "marker": ".", "label": label_of(metric)}
        (curve,) = ax.plot(travelled, mean, **options | style)
        ax.fill_between(travelled, mean - error, mean + error, color=curve.get_color(), alpha=BAND_ALPHA, linewidth=0)
    places = [result.coordinates[name] * result.length for name in result.names]
    for place in places:
        ax.axvline(place, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
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
    require_metric(metric, list(result.values))
    is_orthonormal = np.array_equal(result.gram, np.eye(2))
    # Where both axes have one scale, a figure as high as the plane is: the rest would stay white.
    shape = float(np.ptp(result.y) / np.ptp(result.x)) if is_orthonormal else 0.8
    ax = new_axes(ax, 6.2, min(max(4.6 * shape + 1, 2.4), 7.5))
    surface = np.ma.masked_invalid(result.values[metric])
    options: dict[str, Any] = {"levels": levels, "cmap": "viridis"}
    filled = ax.contourf(result.x, result.y, surface, **options | style)
    line_levels = np.asarray(filled.levels)[::2]
    lines = ax.contour(
        result.x, result.y, surface, levels=line_levels, colors="white", linewidths=0.6, linestyles="solid"
    )
    drop_labels_near_edges(ax, ax.clabel(lines, fontsize=7, fmt="%.3g"))
    figure_of(ax).colorbar(filled, ax=ax, label=label_of(metric))
    missing = result.done & ~np.isfinite(result.values[metric])
    if missing.any():  # measured, but not a number; what is not measured yet is left blank
        rows, columns = np.nonzero(missing)
        ax.plot(result.x[columns], result.y[rows], "x", color="0.5", markersize=5)
    units = np.sqrt(np.diag(result.gram))
    extent = max(units[0] * np.ptp(result.x), units[1] * np.ptp(result.y))
    for name, point in result.coordinates.items():
        on_plane = result.distance[name] < 0.01 * extent
        marker: dict[str, Any] = {"markerfacecolor": "white" if on_plane else "none", "markersize": 7, "zorder": 10}
        outline = [patheffects.withStroke(linewidth=3.5, foreground="black")]
        ax.plot(*point, "o", markeredgecolor="white", markeredgewidth=1.5, path_effects=outline, **marker)
        offset: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        ax.annotate(name, point, fontsize=9, zorder=10, **ON_SURFACE, **offset)
    x_label, y_label = _axis_labels(result)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if is_orthonormal:
        ax.set_aspect("equal")
    return ax


def plot_surface(
    result: Plane, metric: str, ax: Axes | None = None, *, elevation: float = 35, azimuth: float = -60, **style: Any
) -> Axes:
    """A metric over a plane as a surface in three dimensions, the checkpoints on stems at what was measured there.

    ``ax`` must be three-dimensional. ``style`` goes to ``Axes3D.plot_surface``.
    """
    require_metric(metric, list(result.values))
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 5), subplot_kw={"projection": "3d", "computed_zorder": False})
        ax.set_position((0.0, 0.04, 0.9, 1.0))  # of its own accord the box leaves wide margins
    if not isinstance(ax, Axes3D):
        raise ValueError('ax: has two dimensions; make it with projection="3d", or give none')
    x, y = np.meshgrid(result.x, result.y)
    surface = np.ma.masked_invalid(result.values[metric])
    options: dict[str, Any] = {"cmap": "viridis", "linewidth": 0.2, "edgecolor": (1, 1, 1, 0.4), "alpha": 0.95}
    ax.plot_surface(x, y, surface.filled(np.nan), rstride=1, cstride=1, **options | style)
    floor = float(surface.min()) if surface.count() else 0.0
    for name, estimates in result.at.items():
        (a, b), height = result.coordinates[name], estimates[metric].mean
        ax.plot([a, a], [b, b], [floor, height], color="0.5", linewidth=1, linestyle=":", zorder=5)
        ax.plot([a], [b], [height], "o", color=COLORS[1], markeredgecolor="white", markersize=6, zorder=6)
        ax.text(a, b, height, f" {name}", fontsize=9, zorder=7, **ON_SURFACE)
    ax.view_init(elevation, azimuth)
    x_label, y_label = _axis_labels(result)
    ax.set_xlabel(x_label, fontsize=9, labelpad=6)
    ax.set_ylabel(y_label, fontsize=9, labelpad=6)
    ax.set_zlabel(label_of(metric), fontsize=9, labelpad=6)
    ax.tick_params(labelsize=8)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    return ax


def _axis_labels(result: Plane) -> tuple[str, str]:
    if np.array_equal(result.gram, np.eye(2)):
        return "weight-space L2 distance", "weight-space L2 distance"
    first, second = np.sqrt(np.diag(result.gram))
    return (
        f"multiple of the first direction (L2 norm {first:.3g})",
        f"multiple of the second direction (L2 norm {second:.3g})",
    )

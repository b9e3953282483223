"""What figures have in common: colours, labels, axes, and files.

Colours are told apart by colour-blind people (Okabe–Ito; viridis and cividis) and stand out on white and on black
alike; text and axes take matplotlib's own, so that ``plt.style.context("dark_background")`` works.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINESTYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
BAND_ALPHA = 0.2
LABELS = {
    "loss": "loss (nats per token)",
    "proxy_reward": "proxy reward",
    "gold_reward": "gold reward",
    "entropy": "entropy (nats per token)",
    "response_length": "response length (tokens)",
}
# Of names on top of a surface of any colour, whatever the style's own text colour is.
ON_SURFACE: dict[str, Any] = {
    "color": "black",
    "path_effects": [patheffects.withStroke(linewidth=2.5, foreground="white")],
}


def label_of(metric: str) -> str:
    """A metric's name for people, with its unit where that is known."""
    if metric.startswith("kl/"):
        return f"KL to {metric.removeprefix('kl/')} (nats per response)"
    return LABELS.get(metric, metric)


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """``ax``, or for None that of a new figure of so many inches."""
    return plt.subplots(figsize=(width, height), layout="compressed")[1] if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """The figure that axes are in."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def require_metric(name: str, names: Sequence[str]) -> None:
    """Raise ValueError unless a result has the metric."""
    if name not in names:
        raise ValueError(f"metric {name!r}: not in this result, which has {list(names)}; choose one of these")


def finish(ax: Axes, x_label: str, y_label: str) -> Axes:
    """Labels, grid and a legend, for figures with curves that have names."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax


def slant_if_long(ax: Axes, names: Sequence[str], longest: int = 9) -> None:
    """Write names below the x-axis, slanted where they would run into each other."""
    slanted = max(map(len, names)) > longest
    rotation, alignment = (30, "right") if slanted else (0, "center")
    ax.set_xticks(range(len(names)), names, rotation=rotation, ha=alignment, rotation_mode="anchor")


def save(
    drawn: Axes | Figure | np.ndarray,
    path: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("png", "svg"),
    dpi: int = 200,
    close: bool = False,
) -> list[Path]:
    """Write the figure that axes are in as ``path`` with the suffix of each format. → the files

    ``drawn`` is what a plot function returns. ``close`` frees the figure's memory afterwards. In an SVG file letters
    are outlines, which look the same everywhere; nothing in it depends on when it was written.

        plots.save(plots.plot_line(path, "loss"), "figures/loss")  # figures/loss.png, figures/loss.svg
    """
    figure = drawn if isinstance(drawn, Figure) else figure_of(np.ravel(np.asarray(drawn, dtype=object))[0])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix in formats:
        files.append(path.with_name(f"{path.name}.{suffix}"))
        metadata = {"Date": None} if suffix == "svg" else None
        with plt.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(files[-1], dpi=dpi, metadata=metadata)
    if close:
        plt.close(figure)
    return files


def drop_labels_near_edges(ax: Axes, labels: Sequence[Text], distance: float = 0.06) -> None:
    """Remove contour labels that the frame would cut: nearer to an edge than a fraction of the axes."""
    for label in labels:
        place = ax.transLimits.transform(label.get_position())
        if min(*place, *(1 - place)) < distance:
            label.remove()

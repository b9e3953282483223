"""Figures of models beside each other: KL between them, where they lie to a soup, how they explore."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from analysis.divergence import KLMatrix
from analysis.exploration import Exploration
from analysis.geometry import KLGeometry
from analysis.plots.style import COLORS, LABELS, MARKERS, figure_of, new_axes, slant_if_long
from analysis.tables import with_error

MEASURE_LABELS = LABELS | {
    "self_bleu": "self-BLEU",
    "unique_responses": "different responses (share)",
    "top_p_mass": "mass on the reference's top-p set",
    "max_log_ratio": "largest log π/ρ of a token (nats)",
    "kl": "KL to the reference (nats per response)",
    **{f"distinct_{n}": f"distinct-{n}" for n in (1, 2, 3)},
}
QUANTITY_LABELS = {
    "kl_soup": "KL to the soup",
    "kl_ingredients": "mean KL to the ingredients",
    "kl_mixture": "KL to their geometric mixture",
    "triangle_gap": "triangle gap",
    "log_normalizer": "disagreement of the ingredients, −log Z",
}


def plot_kl_matrix(result: KLMatrix, ax: Axes | None = None, **style: Any) -> Axes:
    """KL(row ‖ column) as a heat map with the numbers, ± one standard error, in its cells.

    ``style`` goes to ``Axes.imshow``.
    """
    size = len(result.names)
    ax = new_axes(ax, 2.2 + 1.1 * size, 1.4 + 0.9 * size)
    options: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0}
    image = ax.imshow(result.mean, **options | style)
    for row in range(size):
        for column in range(size):
            mean, error = result.mean[row, column], result.stderr[row, column]
            text = "0" if row == column else with_error(mean, error, "\n")
            red, green, blue, _ = image.cmap(image.norm(mean))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    slant_if_long(ax, result.names)
    ax.set_yticks(range(size), result.names)
    ax.set_xlabel("to: column (ρ)")
    ax.set_ylabel("from: row (π)")
    figure_of(ax).colorbar(image, ax=ax, label="KL(row ‖ column), nats per response")
    return ax


def plot_geometry(result: KLGeometry, ax: Axes | None = None, **style: Any) -> Axes:
    """Where every model lies to the soup and its ingredients, in nats per response, ± one standard error.

    ``style`` goes to ``Axes.errorbar``.
    """
    size = len(result.names)
    ax = new_axes(ax, 6.4, 2.2 + 0.6 * size)
    ax.axvline(0, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    for row, (quantity, color, marker) in enumerate(zip(result.quantities, COLORS, MARKERS, strict=False)):
        # Side by side, in the order of the legend.
        places = [place + 0.14 * (row - (len(result.quantities) - 1) / 2) for place in range(size)]
        options: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none", "markersize": 5, "capsize": 2}
        ax.errorbar(
            result.values[row],
            places,
            xerr=result.values_stderr[row],
            **options | {"label": QUANTITY_LABELS[quantity]} | style,
        )
    ax.set_yticks(range(size), result.names)
    ax.set_ylim(size - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.25)
    ax.set_xlabel("nats per response")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return ax


def plot_exploration(result: Exploration, measure: str, ax: Axes | None = None, **style: Any) -> Axes:
    """One measure of all models, ± one standard error, the reference's as a line. ``style``: of ``Axes.errorbar``."""
    values = [result[measure, name] for name in result.names]
    ax = new_axes(ax, 5, 1.2 + 0.35 * len(values))
    ax.axvline(values[0].mean, color="0.5", linewidth=1, linestyle="--")
    options: dict[str, Any] = {"color": COLORS[0], "marker": "o", "linestyle": "none", "capsize": 3}
    places = range(len(values))
    ax.errorbar([v.mean for v in values], places, xerr=[v.stderr for v in values], **options | style)
    ax.set_yticks(places, result.names)
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.25)
    ax.set_xlabel(MEASURE_LABELS.get(measure, measure))
    return ax

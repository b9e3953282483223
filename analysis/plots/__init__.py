"""Figures of results: each function draws one result into an Axes and returns it; nothing is computed here.

Without ``ax`` a new figure is made. ``style`` goes to matplotlib's own function. :mod:`analysis.plots.style` says what
they have in common; :func:`save` writes a figure as PNG and SVG.

    plots.save(plots.plot_plane(surface, "gold_reward"), "figures/gold")
"""

from __future__ import annotations

from analysis.plots.frontiers import (
    plot_best_of_n,
    plot_frontier,
    plot_overoptimisation,
    plot_reached,
)
from analysis.plots.landscapes import plot_line, plot_plane, plot_surface
from analysis.plots.models import plot_exploration, plot_geometry, plot_kl_matrix
from analysis.plots.runs import plot_curves, plot_dashboard, plot_grid, plot_reward_kl
from analysis.plots.spectra import plot_spectrum
from analysis.plots.study import plot_arms, plot_axes, plot_effects, plot_mixing, plot_predictions
from analysis.plots.style import COLORS, label_of, save

__all__ = [
    "COLORS",
    "label_of",
    "plot_arms",
    "plot_axes",
    "plot_best_of_n",
    "plot_curves",
    "plot_dashboard",
    "plot_effects",
    "plot_exploration",
    "plot_frontier",
    "plot_geometry",
    "plot_grid",
    "plot_kl_matrix",
    "plot_line",
    "plot_mixing",
    "plot_overoptimisation",
    "plot_plane",
    "plot_predictions",
    "plot_reached",
    "plot_reward_kl",
    "plot_spectrum",
    "plot_surface",
    "save",
]

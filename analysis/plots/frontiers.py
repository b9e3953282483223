"""Figures of reward against KL: what optima would reach, what runs reached, and where more KL stops to pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Ellipse

from analysis.frontier import KL, REWARD, BestOfN, SampledFrontier
from analysis.plots.style import BAND_ALPHA, COLORS, MARKERS, finish, label_of, new_axes
from analysis.run_frontier import OveroptimisationFit, RewardKLFrontier


def plot_frontier(
    frontiers: Mapping[str, SampledFrontier],
    y: str = REWARD,
    x: str = KL,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Frontiers {label: ideal frontier or best-of-n} with the joint confidence region of every policy on them.

    Best-of-n is dashed: its KL is a bound, so that it lies to the left of what is drawn. ``style`` goes to
    ``Axes.plot``.
    """
    ax = new_axes(ax, 6, 4.4)
    drawn = []
    for (label, frontier), color in zip(frontiers.items(), cycle(COLORS), strict=False):
        kl, reward = frontier[x].estimate, frontier[y].estimate
        options: dict[str, Any] = {
            "color": color,
            "linewidth": 1.6,
            "marker": ".",
            "linestyle": "--" if isinstance(frontier, BestOfN) else "-",
            "label": label,
        }
        (curve,) = ax.plot(kl, reward, **options | style)
        _draw_regions(ax, kl, reward, frontier.ellipses(y, x), curve.get_color())
        drawn.append((kl, reward))
    _keep_points_in_view(ax, drawn)
    return finish(ax, label_of(x), label_of(y))


def plot_reached(result: RewardKLFrontier, ax: Axes | None = None, **style: Any) -> Axes:
    """What groups of runs reached: means over seeds with their joint confidence regions, single seeds as faint dots.

    Points that a point of the same group beats in reward and KL are hollow. The lines join points in order of KL. The
    view is that of the points: regions of few seeds are vast, and are cut.
    ``style`` goes to ``Axes.plot``.
    """
    ax = new_axes(ax, 6, 4.4)
    drawn = []
    for group, color, marker in zip(result.names, cycle(COLORS), cycle(MARKERS), strict=False):
        points, on_front = result.points(group), result.front(group)
        kl, reward = points.kl.mean(axis=0), points.reward.mean(axis=0)
        order = kl.argsort()
        ax.plot(kl[order], reward[order], color=color, linewidth=0.9, alpha=0.6)
        ax.plot(points.kl.ravel(), points.reward.ravel(), ".", color=color, alpha=0.35, markersize=4)
        _draw_regions(ax, kl, reward, result.ellipses(group), color)
        drawn.append((points.kl, points.reward))
        options: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none", "markersize": 6}
        if not on_front.all():
            hollow = options | {"markerfacecolor": "none"} | style
            ax.plot(kl[~on_front], reward[~on_front], **hollow)
        ax.plot(kl[on_front], reward[on_front], label=group, **options | style)
    _keep_points_in_view(ax, drawn)
    return finish(ax, label_of(result.x), label_of(result.y))


def plot_best_of_n(
    result: BestOfN, rewards: str | Sequence[str] | None = None, ax: Axes | None = None, **style: Any
) -> Axes:
    """Rewards of the best of n responses over n, with bands of confidence; by default all that were measured.

    ``style`` goes to ``Axes.plot``.
    """
    names = [name for name in result.names if name != KL] if rewards is None else rewards
    names = [names] if isinstance(names, str) else list(names)
    ax = new_axes(ax, 6, 4)
    for name, color, marker in zip(names, cycle(COLORS), cycle(MARKERS), strict=False):
        mean, low, high = result[name]
        options: dict[str, Any] = {"color": color, "linewidth": 1.6, "marker": marker, "markersize": 4}
        (curve,) = ax.plot(result.n, mean, **options | {"label": label_of(name)} | style)
        ax.fill_between(result.n, low, high, color=curve.get_color(), alpha=BAND_ALPHA, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(result.n, [str(n) for n in result.n])
    ax.minorticks_off()
    return finish(ax, "n (the response of highest proxy reward of n)", "reward of the best of n")


def plot_overoptimisation(
    fits: Mapping[str, OveroptimisationFit], ax: Axes | None = None, *, y: str = "gold_reward", **style: Any
) -> Axes:
    """Fits {label: fit} of a reward over √KL with bands of confidence, and the points that were fitted.

    A vertical line marks the peak where it lies among the points. ``style`` goes to ``Axes.plot`` for the curves.
    """
    ax = new_axes(ax, 6, 4.4)
    drawn = []
    for (label, fit), color, marker in zip(fits.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        roots = np.sqrt(np.maximum(fit.kl, 0)).ravel()
        along = np.linspace(0, roots.max(), 200)
        mean, low, high = fit.predict(along**2)
        options: dict[str, Any] = {"color": color, "linewidth": 1.8, "label": label}
        (curve,) = ax.plot(along, mean, **options | style)
        ax.fill_between(along, low, high, color=color, alpha=BAND_ALPHA, linewidth=0)
        (points,) = ax.plot(roots, fit.reward.ravel(), marker, color=color, markersize=4, alpha=0.7)
        drawn.append((curve, points))
        peak = np.sqrt(fit.peak_kl.estimate)
        if roots.min() < peak < roots.max():
            ax.axvline(peak, color=color, linewidth=1, linestyle=":")
    top = ax.secondary_xaxis("top", functions=(np.square, lambda kl: np.sqrt(np.maximum(kl, 0))))
    top.set_xlabel("KL (nats per response)")
    finish(ax, "√KL (√nats)", label_of(y))
    ax.legend(drawn, list(fits), frameon=False)  # each curve with the marker of its points
    return ax


def _draw_regions(ax: Axes, kl: np.ndarray, reward: np.ndarray, ellipses: np.ndarray, color: Any) -> None:
    for x, y, (width, height, angle) in zip(kl, reward, ellipses, strict=True):
        if np.isfinite([x, y, width]).all():
            region = Ellipse(
                (x, y),
                width,
                height,
                angle=angle,
                facecolor=to_rgba(color, BAND_ALPHA),
                edgecolor=to_rgba(color, 0.45),
                linewidth=0.6,
                zorder=1,
            )
            ax.add_patch(region)
    ax.autoscale_view()


def _keep_points_in_view(ax: Axes, points: Sequence[tuple[np.ndarray, np.ndarray]], share: float = 0.5) -> None:
    """Cut regions that reach further beyond the points than a share of their range: of few units they are vast."""
    for column, axis in enumerate((ax.xaxis, ax.yaxis)):
        places = np.concatenate([np.ravel(pair[column]) for pair in points])
        places = places[np.isfinite(places)]
        if len(places) and np.ptp(places) > 0:
            room = share * np.ptp(places)
            low, high = axis.get_view_interval()
            if axis is ax.xaxis:  # KL is not negative, though a region around a small one reaches below 0
                low = max(low, min(float(places.min()), 0.0) - 0.05 * np.ptp(places))
            limits = max(low, places.min() - room), min(high, places.max() + room)
            (ax.set_xlim, ax.set_ylim)[column](*limits)

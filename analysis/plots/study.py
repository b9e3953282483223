"""Figures of a study (:mod:`analysis.study`): arms, differences draw by draw, mixing weights, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from analysis.plots.style import COLORS, MARKERS, figure_of, finish, label_of, new_axes
from analysis.study.effects import OWN_AXIS, Curve
from analysis.study.inference import Effect
from analysis.study.questions import Foretold, Mixing

MOST_ARMS = 6  # lines that can still be told apart
DRAW_ALPHA = 0.5  # of the dots that are single draws


def plot_arms(
    curves: Mapping[str, Curve],
    x: str,
    y: str = "gold_reward",
    ax: Axes | None = None,
    *,
    most: int = MOST_ARMS,
    **style: Any,
) -> Axes:
    """Reward against KL: a line an arm through its coefficients, means over draws ± standard errors; the start a star.

    Draws that lack a point of an arm are left out of its line. KL is drawn by its root, in which reward is nearly
    linear. The first arm's points are labelled with their β. ``style`` goes to ``Axes.errorbar``.

    Raises ValueError for more than ``most`` arms.
    """
    if len(curves) > most:
        raise ValueError(f"curves: {len(curves)} arms, more than most={most}; choose fewer, or raise most")
    ax = new_axes(ax, 6.4, 4.6)
    starts: list[np.ndarray] = []
    for i, ((arm, curve), color, marker) in enumerate(zip(curves.items(), cycle(COLORS), cycle(MARKERS), strict=False)):
        kl, reward = curve.points()
        whole = np.isfinite(kl).all(axis=1) & np.isfinite(reward).all(axis=1)
        if not whole.any():
            continue
        (xs, x_errors), (ys, y_errors) = _mean_and_error(kl[whole]), _mean_and_error(reward[whole])
        order = xs.argsort()
        ax.plot(xs[order], ys[order], color=color, linewidth=1.2, alpha=0.75)
        first = kl.shape[1] - len(curve.kl_coefs)  # the start, where there is one, has its own mark
        if first:
            starts.append(np.array([xs[0], ys[0]]))
        options: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6, "linestyle": "none"}
        options |= {"elinewidth": 1, "capsize": 2, "label": arm}
        ax.errorbar(xs[first:], ys[first:], y_errors[first:], x_errors[first:], **options | style)
        if i == 0:
            _label_coefficients(ax, curve.kl_coefs, xs[first:], ys[first:], color)
    if starts:
        star: dict[str, Any] = {"color": plt.rcParams["text.color"], "markersize": 12, "linestyle": "none", "zorder": 5}
        ax.plot(*np.unique(np.round(starts, 9), axis=0).T, marker="*", label="start", **star)
    ax.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    ax.set_xlim(left=max(0, ax.get_xlim()[0]))
    return finish(ax, _axis_label(x), label_of(y))


def plot_effects(effects: Mapping[str, Effect], ax: Axes | None = None, *, x_label: str, **style: Any) -> Axes:
    """Differences to a baseline, one a row: mean and interval, the draws as faint dots below, a line at zero.

    Rows of fewer draws than the others say how many. ``style`` goes to ``Axes.errorbar``.
    """
    ax = new_axes(ax, 6.4, 1.1 + 0.42 * len(effects))
    return _forest(ax, effects, [COLORS[0]] * len(effects), x_label, style)


def plot_axes(
    effects: Mapping[str, Effect],
    ax: Axes | None = None,
    *,
    primary: str,
    x_label: str,
    own: str = "own reference",
    **style: Any,
) -> Axes:
    """One arm's difference to the baseline by what is held equal: {``kl/NAME``, or another text: effect}.

    The ``primary`` row has a colour of its own. ``style`` goes to ``Axes.errorbar``.
    """
    ax = new_axes(ax, 6.4, 1.1 + 0.5 * len(effects))
    rows = {}
    for name, found in effects.items():
        text = f"equal KL to {own if name == OWN_AXIS else name.removeprefix('kl/')}"
        rows[text if name.startswith("kl/") else name] = found
    colors = [COLORS[1] if name == primary else COLORS[0] for name in effects]
    return _forest(ax, rows, colors, x_label, style)


def plot_mixing(
    result: Mixing, axes: np.ndarray | None = None, *, quantity: str = "gold − gold at α = 0", **style: Any
) -> np.ndarray:
    """Gold over the weight of the second model in the reference, less that without it: at equal KL, and at equal β.

    Two axes, one above the other, as a laxer leash moves gold by much more than averaging does. Bars are 95 % intervals
    over draws, faint dots the draws; lines of different β are moved apart a little. ``style`` goes to
    ``Axes.errorbar``.
    """
    if axes is None:
        axes = plt.subplots(2, 1, figsize=(6.4, 6), sharex=True, layout="compressed")[1]
    above, below = np.ravel(np.asarray(axes, dtype=object))
    for alpha, found in zip(result.alphas, result.at_kl, strict=True):
        at = np.full(len(found.values), alpha + 0.02)
        above.plot(at, found.values, "o", color=COLORS[1], markersize=4, alpha=DRAW_ALPHA, markeredgewidth=0)
    lines = {f"equal β = {kl_coef:g}": effects for kl_coef, effects in result.at_coef.items()}
    kl = f"equal {_axis_text(result.axis)}"
    _mixing_line(above, result.alphas, result.at_kl, COLORS[1], "o", kl, style)
    looks = zip(cycle((COLORS[0], COLORS[2], COLORS[3], COLORS[5])), cycle(("s", "^", "D", "v")), strict=False)
    for i, ((label, effects), (color, marker)) in enumerate(zip(lines.items(), looks, strict=False)):
        apart = 0.018 * (i - (len(lines) - 1) / 2)
        _mixing_line(below, result.alphas + apart, effects, color, marker, label, style)
    for ax in (above, below):
        ax.axhline(0, color=plt.rcParams["text.color"], linewidth=0.8, alpha=0.6)
    finish(above, "", quantity)
    figure_of(above).align_ylabels([above, below])
    finish(below, "α, the weight of the second model in the reference", quantity)
    below.set_xticks(result.alphas, [_alpha_text(*pair) for pair in zip(result.alphas, result.arms, strict=True)])
    return np.array([above, below], dtype=object)


def plot_predictions(
    predictions: Sequence[Foretold], ax: Axes | None = None, *, quantity: str = "gold − baseline's", **style: Any
) -> Axes:
    """Predicted against reached difference: a dot for every draw and reference, means with intervals, the diagonal.

    The sign was predicted right in the quadrants that the diagonal runs through. ``style`` goes to ``Axes.plot`` for
    the dots.
    """
    ax = new_axes(ax, 5.2, 5.0)
    line = {"color": plt.rcParams["text.color"], "linewidth": 0.8, "alpha": 0.6}
    reach = [0.01]
    for found, color, marker in zip(predictions, cycle(COLORS), cycle(MARKERS), strict=False):
        x, y = found.predicted.values, found.reached.values
        options: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none", "alpha": DRAW_ALPHA}
        ax.plot(x, y, **options | {"markersize": 5} | style)
        both = np.array([found.predicted.interval, found.reached.interval], dtype=float)
        ax.errorbar(
            both[0, :1],
            both[1, :1],
            _bars(both[1:]),
            _bars(both[:1]),
            color=color,
            marker=marker,
            markersize=9,
            elinewidth=1.6,
            capsize=3,
            linestyle="none",
            label=found.reference,
        )
        reach += [float(value) for value in np.abs([*x, *y, *both.ravel()]) if np.isfinite(value)]
    end = 1.08 * max(reach)
    ax.plot([-end, end], [-end, end], linestyle="--", **line)
    ax.axhline(0, **line)
    ax.axvline(0, **line)
    ax.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
    return finish(ax, f"predicted: {quantity}", f"reached by PPO: {quantity}")


def _forest(
    ax: Axes, effects: Mapping[str, Effect], colors: Sequence[str], x_label: str, style: Mapping[str, Any]
) -> Axes:
    most = max((found.used for found in effects.values()), default=0)
    names = []
    for row, ((name, found), color) in enumerate(zip(effects.items(), colors, strict=True)):
        names.append(name if found.used == most else f"{name} (n = {found.used})")
        limits = np.array([found.interval], dtype=float)
        dots: dict[str, Any] = {"color": color, "markersize": 4, "alpha": DRAW_ALPHA, "markeredgewidth": 0}
        ax.plot(found.values, np.full(len(found.values), row + 0.26), "o", **dots)
        options: dict[str, Any] = {"color": color, "marker": "o", "markersize": 6, "elinewidth": 1.8, "capsize": 3}
        ax.errorbar(limits[:, 0], [row], xerr=_bars(limits), **options | dict(style))
    ax.axvline(0, color=plt.rcParams["text.color"], linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    ax.set_xlabel(x_label)
    ax.grid(axis="x", alpha=0.25)
    return ax


def _label_coefficients(ax: Axes, kl_coefs: Sequence[float], xs: np.ndarray, ys: np.ndarray, color: str) -> None:
    """Write β beside points: above those that lie higher than the one before, where their line does not run."""
    highest_before = -np.inf
    for at in xs.argsort():
        rises = ys[at] > highest_before
        highest_before = max(highest_before, ys[at])
        options: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": "small", "color": color}
        ax.annotate(f"β = {kl_coefs[at]:g}", (xs[at], ys[at]), (-8, 6 if rises else -14), **options)


def _mixing_line(
    ax: Axes,
    alphas: np.ndarray,
    effects: Sequence[Effect],
    color: str,
    marker: str,
    label: str,
    style: Mapping[str, Any],
) -> None:
    limits = np.array([found.interval for found in effects], dtype=float)
    options: dict[str, Any] = {"color": color, "marker": marker, "linewidth": 1.4, "label": label, "markersize": 6}
    ax.errorbar(alphas, limits[:, 0], _bars(limits), **options | {"elinewidth": 1.4, "capsize": 3} | dict(style))


def _alpha_text(alpha: float, arm: str) -> str:
    """α, and the arm's name below, unless that is α itself."""
    return f"{alpha:g}" if arm.endswith(f"{alpha:g}") and "α" in arm else f"{alpha:g}\n{arm}"


def _bars(limits: np.ndarray) -> np.ndarray:
    """How far limits lie from their estimates; none where there are no limits. [A, 3] → [2, A]"""
    bars = np.stack([limits[:, 0] - limits[:, 1], limits[:, 2] - limits[:, 0]])
    return np.maximum(np.nan_to_num(bars), 0)


def _mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over D draws and its standard error s/√D, 0 for one draw. [D, K] → [K], [K]"""
    num = len(values)
    errors = values.std(axis=0, ddof=1) / np.sqrt(num) if num > 1 else np.zeros(values.shape[1])
    return values.mean(axis=0), errors


def _axis_text(axis: str) -> str:
    return "KL to the own reference" if axis == OWN_AXIS else f"KL to {axis.removeprefix('kl/')}"


def _axis_label(axis: str) -> str:
    return f"{_axis_text(axis)} (nats per response)"

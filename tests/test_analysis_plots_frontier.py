"""Figures of frontiers, fits and exploration run, say what they show, and draw the numbers they were given."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from test_analysis_plots import close_figures, texts

from analysis import Exploration, RewardKLFrontier, ScoredSamples, best_of_n, fit_overoptimisation, frontier_of_samples
from analysis.plots import (
    COLORS,
    plot_best_of_n,
    plot_exploration,
    plot_frontier,
    plot_overoptimisation,
    plot_reached,
)

__all__ = ["close_figures"]  # which pytest finds here

RANDOM = np.random.default_rng(0)
REWARDS = RANDOM.normal(size=(30, 64))
SAMPLES = ScoredSamples.of(REWARDS, {"gold_reward": REWARDS / 2}, {"sft1": 0.3 * RANDOM.normal(size=(30, 64))})


def reached() -> RewardKLFrontier:
    """Two groups of four seeds at three β; the last of the first group has fallen below the one before."""
    kl, gold = np.tile([1.0, 4, 9], 8), np.tile([1.0, 2, 1.5, 1.2, 2.2, 2.5], 4)
    return RewardKLFrontier(
        names=["sft1", "soup"],
        x="kl/sft1",
        y="gold_reward",
        group=np.tile([0, 0, 0, 1, 1, 1], 4),
        seed=np.repeat(np.arange(4), 6),
        kl_coef=np.tile([0.4, 0.1, 0.02], 8),
        update=np.full(24, 50),
        kl=kl + 0.1 * RANDOM.normal(size=24),
        kl_stderr=np.full(24, 0.1),
        reward=gold + 0.05 * RANDOM.normal(size=24),
        reward_stderr=np.full(24, 0.05),
        metadata={},
    )


def test_frontier_draws_curves_and_regions() -> None:
    ideal, best = frontier_of_samples(SAMPLES, num_resamples=200), best_of_n(SAMPLES, num_resamples=200)
    ax = plot_frontier({"exact optimum": ideal, "best of n": best}, "gold_reward", linewidth=3)
    assert {"exact optimum", "best of n", "gold reward", "KL to reference (nats per response)"} <= texts(ax)
    one, other = ax.get_lines()
    np.testing.assert_array_equal(one.get_ydata(), ideal["gold_reward"].estimate)
    np.testing.assert_array_equal(other.get_xdata(), best["kl/reference"].estimate)
    assert (one.get_linestyle(), other.get_linestyle(), one.get_linewidth()) == ("-", "--", 3)
    regions = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    assert len(regions) == np.isfinite(ideal.mean[0]).sum() + len(best.n)
    assert regions[1].center == (ideal["kl/reference"].estimate[1], ideal["gold_reward"].estimate[1])
    assert {"KL to sft1 (nats per response)"} <= texts(plot_frontier({"soup": ideal}, x="kl/sft1"))


def test_reached_tells_the_front_from_the_rest() -> None:
    result = reached()
    ax = plot_reached(result)
    assert {"sft1", "soup", "gold reward", "KL to sft1 (nats per response)"} <= texts(ax)
    hollow = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
    (point,) = hollow[0].get_xydata()
    assert len(hollow) == 1
    np.testing.assert_allclose(point, [9, 1.5], atol=0.2)
    assert sum(isinstance(patch, Ellipse) for patch in ax.patches) == 6


def test_best_of_n_has_a_line_for_every_reward() -> None:
    result = best_of_n(SAMPLES, num_resamples=100)
    ax = plot_best_of_n(result)
    assert {"proxy reward", "gold reward", "1", "64"} <= texts(ax)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (result["proxy_reward"].low.min(), result["proxy_reward"].high.max())
    assert len(plot_best_of_n(result, "gold_reward").get_lines()) == 1


def test_overoptimisation_draws_points_fit_and_peak() -> None:
    kl = np.tile([0.0, 1, 4, 9, 25], (3, 1))
    gold = 2 * np.sqrt(kl) - 0.4 * kl + 0.1 * RANDOM.normal(size=kl.shape)
    fit = fit_overoptimisation(kl, gold, "best_of_n", num_resamples=100)
    _, ax = plt.subplots()
    assert plot_overoptimisation({"soup": fit}, ax) is ax
    assert {"soup", "√KL (√nats)", "KL (nats per response)", "gold reward"} <= texts(ax)
    curve, points, peak = ax.get_lines()
    assert curve.get_xdata()[-1] == 5
    assert points.get_xydata()[:, 1].tolist() == gold.ravel().tolist()
    assert peak.get_xdata()[0] == pytest.approx(2.5, abs=0.2)
    legend = ax.get_legend()
    assert legend is not None
    assert points.get_marker() in [line.get_marker() for line in legend.findobj(Line2D)]


def test_exploration_shows_models_beside_the_reference() -> None:
    values = np.array([[0.4, 0.7]])
    result = Exploration(
        names=["reference", "policy"],
        measures=["self_bleu"],
        values=values,
        stderr=values / 10,
        num_responses=8,
        distance=np.zeros(2),
        relative=np.zeros(2),
        cosine=np.zeros((2, 2)),
        metadata={},
    )
    ax = plot_exploration(result, "self_bleu")
    assert {"reference", "policy", "self-BLEU"} <= texts(ax)
    line, points = ax.get_lines()[:2]
    assert (line.get_xdata()[0], points.get_xdata().tolist()) == (0.4, [0.4, 0.7])


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_on_white_and_on_black() -> None:
    for color in COLORS[:3]:  # those of the first curves
        assert 1.05 / (luminance(color) + 0.05) > 3, color
        assert (luminance(color) + 0.05) / 0.05 > 3, color


def test_vast_regions_do_not_push_the_points_aside() -> None:
    result = reached()
    rows = ("group", "seed", "kl_coef", "update", "kl", "kl_stderr", "reward", "reward_stderr")
    few = replace(result, **{name: getattr(result, name)[:18] for name in rows})
    few.reward[::6] += [5.0, 0.0, -5.0]  # three seeds that disagree
    ax = plot_reached(few)
    low, high = ax.get_ylim()
    assert np.ptp(few.reward) < high - low <= 2.01 * np.ptp(few.reward)

"""Figures of the two stages, drawn from what they measured alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.calibration import Bin
from rlhf.figures import BLUE, ORANGE


def draw_losses(rows: Sequence[dict[str, Any]], path: Path, *, unit: str) -> None:
    """Training loss, and held-out loss ± one standard error, against steps, from the rows of ``metrics.jsonl``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    trained = [row for row in rows if "loss" in row]
    steps, losses = np.array([[row["step"], row["loss"]] for row in trained]).T
    ax.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=1, label="training batch")
    window = max(1, len(losses) // 25)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    if window > 1:
        ax.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=1.8, label=f"mean of the last {window}")
    tested = [row for row in rows if "test_loss" in row]
    if tested:
        errors = np.nan_to_num([row["test_loss_stderr"] for row in tested])
        steps, losses = np.array([[row["step"], row["test_loss"]] for row in tested]).T
        ax.errorbar(
            steps, losses, errors, color=ORANGE, marker="o", markersize=4, capsize=2, label="held out, ± 1 s.e."
        )
    ax.set(xlabel="step", ylabel=f"loss ({unit})")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_reliability(bins: Sequence[Bin], path: Path) -> None:
    """The share of pairs ordered rightly against the confidence in their order; the diagonal is perfect calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    ax, counts = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    confidence = np.array([b.confidence for b in bins])
    errors = np.nan_to_num([b.correct_stderr for b in bins])
    ax.plot([0.5, 1], [0.5, 1], color="0.5", linestyle="--", linewidth=1, label="perfect calibration")
    ax.errorbar(
        confidence,
        [b.correct for b in bins],
        errors,
        color=BLUE,
        marker="o",
        markersize=5,
        capsize=2,
        label="measured, ± 1 s.e.",
    )
    ax.set(ylabel="share ordered rightly", xlim=(0.49, 1.01))
    ax.legend(frameon=False, loc="upper left")
    counts.bar(confidence, [b.pairs for b in bins], width=0.03, color=ORANGE)
    counts.set(xlabel="confidence σ(|r(chosen) − r(rejected)|)", ylabel="pairs")
    for axes in (ax, counts):
        axes.grid(alpha=0.25)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)

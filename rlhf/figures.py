"""Figures of a run, drawn from its files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.metrics import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe–Ito, readable for colour-blind people.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def draw_band(
    ax: Axes, x: np.ndarray, rows: Sequence[Mapping[str, Any]], name: str, label: str, color: str, linestyle: str = "-"
) -> None:
    """A metric of ``metrics.jsonl`` as a line, with a band of ± one standard error where it has one."""
    mean = np.array([row[name] for row in rows])
    error = np.nan_to_num([row.get(f"{name}_stderr", 0.0) for row in rows])
    ax.plot(x, mean, color=color, label=label, linewidth=1.8, linestyle=linestyle)
    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def draw_run(run: str | Path) -> list[Path]:
    """Draw ``figures/learning_curves.png`` and ``figures/reward_kl.png`` from a run's ``metrics.jsonl``."""
    from matplotlib.figure import Figure

    run = Path(run)
    rows = read_json_lines(run / "metrics.jsonl")
    rewards = [row for row in (("proxy_reward", "proxy", BLUE), ("gold_reward", "gold", ORANGE)) if row[0] in rows[0]]
    update = np.array([row["update"] for row in rows])
    (run / "figures").mkdir(exist_ok=True)

    curves = Figure(figsize=(10, 6.4), layout="constrained")
    axes = curves.subplots(2, 2, sharex=True)
    for name, label, color in rewards:
        draw_band(axes[0, 0], update, rows, name, label, color)
    axes[0, 0].set_ylabel("reward")
    divergences = [name for name in rows[0] if name.startswith("kl/") and not name.endswith("_stderr")]
    for name, color in zip(divergences, (GREEN, BLUE, ORANGE, PURPLE), strict=False):
        draw_band(axes[0, 1], update, rows, name, f"to {name.removeprefix('kl/')}", color)
    axes[0, 1].set_ylabel("KL (nats per response)")
    draw_band(axes[1, 0], update, rows, "entropy", "entropy", PURPLE)
    axes[1, 0].set_ylabel("entropy (nats per token)")
    draw_band(axes[1, 1], update, rows, "response_length", "length", GREEN)
    axes[1, 1].set_ylabel("response length (tokens)")
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    for ax in axes[0]:
        ax.legend(frameon=False)
    for ax in axes[1]:
        ax.set_xlabel("update")
    curves.suptitle("Training batches, mean ± standard error")

    frontier = Figure(figsize=(6, 4.4), layout="constrained")
    ax = frontier.subplots()
    followed = divergences[0].removeprefix("kl/")  # the reference, or the policy's start where there is none
    divergence = np.array([row[divergences[0]] for row in rows])
    for name, label, color in rewards:
        ax.plot(divergence, [row[name] for row in rows], ".-", color=color, label=label, linewidth=1, markersize=5)
    ax.set(
        xlabel=f"KL to {'the ' if followed == 'reference' else ''}{followed} (nats per response)",
        ylabel="reward",
        title="Reward against KL, one point an update",
    )
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)

    paths = [run / "figures" / "learning_curves.png", run / "figures" / "reward_kl.png"]
    for figure, path in zip((curves, frontier), paths, strict=True):
        figure.savefig(path, dpi=150)
    return paths

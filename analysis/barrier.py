"""Barriers: by how much a loss rises on the way between two models.

With L(s) the loss at the share s of the way from one end (s = 0) to the other (s = 1), three definitions are in use:

=================  ==========================================  =========================================================
``instability``    max L(s) − ½ (L(0) + L(1))                  Frankle et al. 2020, arXiv 1912.05671; at least
                                                               ½ |L(0) − L(1)|, also where the loss just falls
``excess``         max [L(s) − ((1 − s) L(0) + s L(1))]        Entezari et al. 2022, arXiv 2110.06296
``above_larger``   max L(s) − max(L(0), L(1))                  what a walk from the worse end has to climb
=================  ==========================================  =========================================================

The maxima are over the points measured, both ends among them, so all three are at least 0, and
``above_larger`` ≤ ``excess``. A maximum of noisy values is biased upwards: E max ≥ max E. The more points and the fewer
examples, the larger the barrier of two models without one.

Intervals come from the paired bootstrap: examples are drawn again, the same ones at every point, so that what makes
an example hard everywhere cancels. Quantiles of resampled maxima would be biased twice. Instead, the largest deviations
of the resampled path from the measured one, up and down, bound the maximum wherever it lies: the interval reaches from
the estimate minus the upper quantile of max (resampled − measured) to the estimate plus that of max (measured −
resampled), each at (1 + confidence) / 2. It covers at least as often as it says, for many examples. A lower limit above
0 is evidence of a barrier; the estimate alone is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import mean_draws
from analysis.landscape import Line


def _heights_over_mean(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (values - (values[..., :1] + values[..., -1:]) / 2)[..., None]


def _heights_over_chord(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (values - ((1 - share) * values[..., :1] + share * values[..., -1:]))[..., None]


def _heights_over_ends(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    return values[..., None] - values[..., None, [0, -1]]


# Heights of the path over its ends, [..., N] → [..., N, K]; the barrier is the maximum over N of the least over K.
DEFINITIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "instability": _heights_over_mean,
    "excess": _heights_over_chord,
    "above_larger": _heights_over_ends,
}


@dataclass(frozen=True)
class Barrier:
    """A barrier by one definition, in the units of the loss.

    height     the estimate, from the means over all examples
    at         where the maximum is, from 0 to 1 between the ends
    low, high  limits of its confidence interval; NaN without values for each example
    bias       mean over resamples of (resampled − estimated height): about what noise adds to the height; NaN likewise
    """

    height: float
    at: float
    low: float
    high: float
    bias: float


def barriers(
    path: Line,
    metric: str = "loss",
    *,
    start: str | None = None,
    end: str | None = None,
    larger_is_better: bool = False,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Barrier]:
    """The barrier between two checkpoints of a line, by every definition.

    path              a finished line; between its ends may lie further checkpoints, around them a margin
    metric            one of its metrics; intervals need one that keeps a value for each example, such as
                      :func:`analysis.metrics.loss_per_example`
    start, end        names of the two checkpoints; by default the first and the last
    larger_is_better  for rewards: the barrier of the negative
    num_resamples, confidence, seed  of the bootstrap

    Raises ValueError for names that are not there, and for points that are not measured or NaN.

        path = line(["sft1", "sft2"], {"loss": metrics.loss_per_example(examples, tokenizer)}, steps=25)
        barriers(path)["excess"].height, barriers(path)["excess"].low
    """
    if metric not in path.values:
        raise ValueError(f"metric {metric!r}: not in this line, which has {list(path.values)}; choose one of these")
    names = [start or path.names[0], end or path.names[-1]]
    for name in names:
        if name not in path.coordinates:
            raise ValueError(f"checkpoint {name!r}: not on this line, which has {path.names}; choose two of these")
    low, high = (path.coordinates[name] for name in names)
    if not low < high:
        raise ValueError(f"start={names[0]!r}, end={names[1]!r}: come in another order on this line, {path.names}")
    inside = (low <= path.t) & (path.t <= high)
    sign = -1.0 if larger_is_better else 1.0
    share = (path.t[inside] - low) / (high - low)
    if metric in path.examples:
        sums, counts = path.examples[metric][inside].swapaxes(0, 1)
        return barriers_of_examples(
            share, sign * sums, counts, num_resamples=num_resamples, confidence=confidence, seed=seed
        )
    values = sign * path.values[metric][inside]
    _check(share, values)
    nothing = np.empty((0, len(values)))
    return {name: _barrier(heights, share, values, nothing, confidence) for name, heights in DEFINITIONS.items()}


def barriers_of_examples(
    share: ArrayLike,
    losses: ArrayLike,
    counts: ArrayLike | None = None,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Barrier]:
    """The barrier along a path by every definition, from the losses of the same n examples at each of its N points.

    share   [N]     where the points are, from 0 at the first to 1 at the last
    losses  [N, n]  losses, or their sums over an example's tokens
    counts  [N, n]  numbers of tokens; None for 1 each. The loss at a point is Σ losses / Σ counts
    """
    share, sums = np.asarray(share, dtype=float), np.asarray(losses, dtype=float)
    counts = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=float)
    if sums.ndim != 2 or sums.shape != counts.shape or share.shape != sums.shape[:1]:
        raise ValueError(
            f"share, losses and counts have shapes {share.shape}, {sums.shape}, {counts.shape}; expected [N], [N, n], "
            "[N, n] for N points and n examples"
        )
    if sums.shape[1] < 2:
        raise ValueError(f"losses: of {sums.shape[1]} examples; resampling needs at least two")
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_resamples={num_resamples}, confidence={confidence}: must be at least 1, and between 0 and 1"
        )
    values = sums.sum(axis=1) / counts.sum(axis=1)
    _check(share, values)
    drawn = mean_draws(np.stack([sums.T, counts.T], axis=1), num_resamples, seed)
    resampled = drawn[:, 0] / drawn[:, 1]
    return {name: _barrier(heights, share, values, resampled, confidence) for name, heights in DEFINITIONS.items()}


def _check(share: np.ndarray, values: np.ndarray) -> None:
    if len(share) < 2 or share[0] != 0 or share[-1] != 1 or not (np.diff(share) > 0).all():
        raise ValueError(f"share={share.tolist()}: must rise from 0 at the first point to 1 at the last")
    if not np.isfinite(values).all():
        raise ValueError(
            f"values: {(~np.isfinite(values)).sum()} of {len(values)} points are not measured, NaN or infinite; finish "
            "the line, or measure a metric that is finite"
        )


def _barrier(
    heights_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    share: np.ndarray,
    values: np.ndarray,
    resampled: np.ndarray,
    confidence: float,
) -> Barrier:
    """[N], [N], [R, N], R = 0 for no interval"""
    heights = heights_of(values, share)
    lowest = heights.min(axis=-1)
    peak = int(lowest.argmax())
    height, at = float(lowest[peak]), float(share[peak])
    if not len(resampled):
        return Barrier(height, at, np.nan, np.nan, np.nan)
    drawn = heights_of(resampled, share)
    deviations = (drawn - heights).reshape(len(drawn), -1)
    up, down = (np.quantile(x.max(axis=1), (1 + confidence) / 2) for x in (deviations, -deviations))
    bias = drawn.min(axis=-1).max(axis=-1).mean() - height
    return Barrier(height, at, float(height - up), float(height + down), float(bias))

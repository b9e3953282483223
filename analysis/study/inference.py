"""One number from draws: means over them, intervals, p-values, and the correction for several tests.

**NaN is a draw without the number**; it is left out and counted. Intervals are expanded percentile bootstraps over
draws, not corrected for being many; of fewer than five draws, Student's: their resamples go no further than from the
least to the most, which of two draws holds the population's mean in one of two cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from analysis.bootstrap import Interval, bootstrap_mean, mean_draws

# Draws. A 95 % interval needs resamples as rare as 1.2e-4 for four draws and 1.0e-3 for five, where the rarest is n⁻ⁿ,
# 3.9e-3 and 3.2e-4.
FEWEST_RESAMPLED = 5
RESAMPLES = 20_000  # of intervals
TEST_RESAMPLES = 500_000  # of p-values, whose smallest rest on the outermost of them


@dataclass(frozen=True)
class Effect:
    """A number of every draw, [D], NaN where it is not known; and the mean of the others with confidence limits."""

    values: np.ndarray
    interval: Interval

    @property
    def used(self) -> int:
        """How many draws have the number."""
        return int(np.isfinite(self.values).sum())

    @property
    def left_out(self) -> int:
        """How many draws do not."""
        return len(self.values) - self.used

    @property
    def std(self) -> float:
        """Standard deviation over draws, n − 1 in the denominator."""
        return float(_known(self.values).std(ddof=1)) if self.used > 1 else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the mean over n draws, s/√n."""
        return _stderr(_known(self.values)) if self.used > 1 else math.nan


def effect(values: np.ndarray, confidence: float = 0.95) -> Effect:
    """The mean over draws and its interval. [D] → limits are NaN for fewer than two draws."""
    values, known = np.asarray(values, dtype=float), _known(values)
    if len(known) >= FEWEST_RESAMPLED:
        return Effect(values, bootstrap_mean(known, num_resamples=RESAMPLES, confidence=confidence))
    if len(known) < 2:
        return Effect(values, Interval(float(known[0]) if len(known) else math.nan, math.nan, math.nan))
    mean, reach = float(known.mean()), float(stdtrit(len(known) - 1, (1 + confidence) / 2)) * _stderr(known)
    return Effect(values, Interval(mean, mean - reach, mean + reach))


def p_value(values: np.ndarray, threshold: float = 0.0) -> float:
    """Two-sided p of the mean over draws: 1 − the confidence at which the limits of :func:`effect` touch a threshold.

    With F the share of resampled means up to the threshold (above it, where the mean is below): the limit is at
    F = Φ(−√(n/(n−1)) t), so p = 2 P(T > t) of Student's with n − 1 degrees of freedom.

    F counts as no less than one resample, nor than the n⁻ⁿ of drawing one unit n times: the bootstrap knows of nothing
    rarer, and where no resample reaches the threshold **p is at most what is returned**: 0.004 for eight draws, 0.005
    for seven, 0.014 for six, 0.038 for five. Of fewer than five it is that of Student's test; NaN for fewer than two.
    """
    known = _known(values)
    n = len(known)
    if n < 2 or not math.isfinite(threshold):
        return math.nan
    mean = known.mean()
    if mean == threshold:
        return 1.0
    if n < FEWEST_RESAMPLED:
        with np.errstate(divide="ignore"):  # equal draws leave no doubt
            return float(2 * stdtr(n - 1, -np.divide(abs(mean - threshold), _stderr(known))))
    sign = 1 if mean > threshold else -1
    means = np.sort(sign * mean_draws(known, TEST_RESAMPLES, 0))
    share = max(_share_below(means, sign * threshold), 1 / len(means), float(n) ** -n)
    t = -ndtri(share) / math.sqrt(n / (n - 1))
    return float(min(1.0, 2 * stdtr(n - 1, -t)))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction for m tests: the i-th smallest times m − i + 1, never below one before it. [m]

    A test without a p-value (NaN) counts as one that failed, and stays NaN. (Holm 1979, Scand. J. Stat. 6:65)
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(np.where(np.isnan(p), 1, p), kind="stable")
    factors = len(p) - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.where(np.isnan(p), 1, p)[order]))
    return np.where(np.isnan(p), np.nan, corrected)


def _share_below(means: np.ndarray, threshold: float) -> float:
    """Where the threshold lies among sorted values, as ``np.quantile`` counts: between neighbours, linearly."""
    i = int(np.searchsorted(means, threshold, "right")) - 1
    if i < 0:
        return 0.0
    if i == len(means) - 1:
        return 1.0
    return float((i + (threshold - means[i]) / (means[i + 1] - means[i])) / (len(means) - 1))


def _stderr(known: np.ndarray) -> float:
    return float(known.std(ddof=1)) / math.sqrt(len(known))


def _known(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]

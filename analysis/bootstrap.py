"""Confidence intervals of any statistic by the paired bootstrap: units are drawn again, whole, with replacement.

A unit is what was drawn independently: a prompt with all its responses, a seed with all its runs. Arrays that belong
together are resampled by the same rows, so that what they share cancels in differences.

==========  ===========================================================================================================
percentile  quantiles α/2 and 1 − α/2 of the statistic over resamples; too short for few units, as the bootstrap's
            variance is (n − 1)/n of the unbiased one and knows no t distribution
expanded    quantiles Φ(∓ √(n/(n−1)) · t) instead, t the (1 − α/2) quantile of Student's with n − 1 degrees of freedom:
            for a mean of normal units as long as the t interval; the default (Hesterberg 2015, arXiv 1411.5279)
bca         quantiles corrected for the statistic's bias and skewness (Efron 1987, J. Am. Stat. Assoc. 82:171)
==========  ===========================================================================================================

No method makes up for units that are not there: resamples of two or three seeds say little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

METHODS = ("percentile", "expanded", "bca")
BLOCK = 2**16  # rows drawn at a time: what the caches hold
MOST_UNDEFINED = 0.1  # share of resamples that may leave a statistic undefined (NaN)


class Interval(NamedTuple):
    """An estimate and its confidence limits: floats, or arrays of one shape for a statistic that is an array."""

    estimate: Any
    low: Any
    high: Any


def resamples(num_units: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows drawn with replacement, in blocks of resamples: [R', N] each, R in all. The same seed gives the same."""
    random = np.random.default_rng(seed)
    step = max(1, BLOCK // num_units)
    for start in range(0, num_resamples, step):
        yield random.integers(num_units, size=(min(step, num_resamples - start), num_units))


def bootstrap(
    statistic: Callable[..., Any],
    *arrays: np.ndarray,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    method: str = "expanded",
    seed: int = 0,
) -> Interval:
    """The interval of ``statistic(*arrays)``, a float or an array; the first axis of every array are its N units.

    Resamples in which the statistic is NaN are left out; where they are more than a tenth of all, so are the limits.

    Raises ValueError when the arrays have different lengths, or fewer than two units.

        bootstrap(lambda a, b: a.mean() - b.mean(), rewards_of_soup, rewards_of_sft1)
    """
    units = [np.asarray(array) for array in arrays]
    num_units = _checked(units, num_resamples, confidence, method)
    estimate = np.asarray(statistic(*units), dtype=float)
    draws = np.array(
        [
            np.asarray(statistic(*(array[rows] for array in units)), dtype=float)
            for block in resamples(num_units, num_resamples, seed)
            for rows in block
        ]
    )
    without_one = None
    if method == "bca":
        every = np.arange(num_units)
        without_one = np.array([statistic(*(array[every != i] for array in units)) for i in every], dtype=float)
    return interval(estimate, draws, num_units=num_units, confidence=confidence, method=method, without_one=without_one)


def bootstrap_mean(
    values: np.ndarray,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    method: str = "expanded",
    seed: int = 0,
) -> Interval:
    """:func:`bootstrap` of the mean over units, by a product instead of a call for every resample. [N, ...] → [...]"""
    values = np.asarray(values, dtype=float)
    num_units = _checked([values], num_resamples, confidence, method)
    mean = values.mean(axis=0)
    draws = mean_draws(values, num_resamples, seed)
    without_one = (values.sum(axis=0) - values) / (num_units - 1)
    return interval(mean, draws, num_units=num_units, confidence=confidence, method=method, without_one=without_one)


def mean_draws(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Means over resampled units. [N, ...] → [R, ...]"""
    num_units = len(values)
    flat = values.reshape(num_units, -1)
    means = []
    for rows in resamples(num_units, num_resamples, seed):
        places = rows + num_units * np.arange(len(rows))[:, None]
        counts = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape)
        means.append(counts @ flat / num_units)
    return np.concatenate(means).reshape(num_resamples, *values.shape[1:])


def interval(
    estimate: np.ndarray | float,
    draws: np.ndarray,
    *,
    num_units: int,
    confidence: float = 0.95,
    method: str = "expanded",
    without_one: np.ndarray | None = None,
) -> Interval:
    """The limits that resampled values of a statistic give. [...], [R, ...] → three of [...]

    ``without_one`` are the statistic's values with one unit left out, [N, ...], which ``bca`` needs.
    """
    estimate = np.asarray(estimate, dtype=float)
    flat, centre = draws.reshape(len(draws), -1), estimate.reshape(-1)
    others = None if without_one is None else without_one.reshape(len(without_one), -1)
    low, high = np.full((2, len(centre)), np.nan)
    for i, value in enumerate(centre):
        defined = flat[~np.isnan(flat[:, i]), i]
        if np.isfinite(value) and len(defined) >= (1 - MOST_UNDEFINED) * len(draws):
            z = ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
            if method == "expanded":
                z = expanded_quantiles(confidence, num_units)
            elif method == "bca":
                assert others is not None, "bca needs the statistic without each unit"
                z = _bca_quantiles(value, defined, others[:, i], z)
            # Between an infinite draw and another there is nothing to interpolate.
            between: Literal["linear", "nearest"] = "linear" if np.isfinite(defined).all() else "nearest"
            low[i], high[i] = np.quantile(defined, ndtr(z), method=between)
    shape = estimate.shape
    return Interval(*(x.reshape(shape)[()] for x in (centre, low, high)))


def expanded_quantiles(confidence: float, num_units: int) -> np.ndarray:
    """Normal scores ∓ √(n/(n−1)) · t of the ``expanded`` method. [2]"""
    z = np.sqrt(num_units / (num_units - 1)) * stdtrit(num_units - 1, (1 + confidence) / 2)
    return np.array([-z, z])


def _bca_quantiles(estimate: float, draws: np.ndarray, without_one: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Normal scores z₀ + (z₀ + z) / (1 − a (z₀ + z)); z₀ the median bias, a the acceleration from the jackknife. [2]"""
    share_below = ((draws < estimate).mean() + (draws <= estimate).mean()) / 2  # ties count half
    if not 0 < share_below < 1:  # a statistic that does not vary, or is an extreme of its resamples
        return z
    deviations = without_one.mean() - without_one
    squares = (deviations**2).sum()
    acceleration = (deviations**3).sum() / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = ndtri(share_below) + z
    return ndtri(share_below) + shifted / (1 - acceleration * shifted)


def _checked(arrays: list[np.ndarray], num_resamples: int, confidence: float, method: str) -> int:
    lengths = [len(array) for array in arrays]
    if not arrays or len(set(lengths)) > 1:
        raise ValueError(f"arrays: {lengths} units; give arrays whose first axes are the same units in the same order")
    if lengths[0] < 2:
        raise ValueError(f"arrays: {lengths[0]} units; resampling needs at least two")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}: must be at least 1; 2000 give steady limits")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1, such as 0.95")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    return lengths[0]

"""Bootstrap intervals: against scipy, against t intervals, and how often they cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.bootstrap import bootstrap, bootstrap_mean, interval, mean_draws, resamples

VALUES = np.random.default_rng(3).exponential(size=40)


def test_the_mean_by_one_product_is_the_mean_by_calls() -> None:
    values = np.random.default_rng(0).normal(size=(12, 2, 3))
    for method in ("percentile", "expanded", "bca"):
        options = {"num_resamples": 300, "seed": 7, "method": method}
        called = bootstrap(lambda rows: rows.mean(axis=0), values, **options)
        for one, other in zip(called, bootstrap_mean(values, **options), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
            assert one.shape == (2, 3)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize(
    "statistic", [np.var, np.median, lambda x: float(np.mean(x)) ** 3], ids=["var", "median", "cube"]
)
def test_agrees_with_scipy(method: str, statistic: object) -> None:
    ours = bootstrap(statistic, VALUES, method=method, num_resamples=8000)
    theirs = stats.bootstrap(
        (VALUES,), statistic, method=method, n_resamples=8000, vectorized=False, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    # Both are noisy in the third digit of the width.
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_expanded_has_the_length_of_the_t_interval() -> None:
    # Symmetric values, so that resampled means are nearly normal in spite of there being few.
    values = stats.norm.ppf((np.arange(12) + 0.5) / 12)
    low, high = stats.t.interval(0.95, 11, values.mean(), values.std(ddof=1) / 12**0.5)
    found = bootstrap_mean(values, num_resamples=20_000)
    assert found.high - found.low == pytest.approx(high - low, rel=0.04)
    shorter = bootstrap_mean(values, num_resamples=20_000, method="percentile")
    assert shorter.high - shorter.low < 0.9 * (high - low)


@pytest.mark.parametrize(("method", "least"), [("percentile", 85), ("expanded", 93), ("bca", 85)])
def test_covers_the_mean_of_few_units(method: str, least: float) -> None:
    random = np.random.default_rng(5)
    hits = [
        found.low <= 0 <= found.high
        for values in random.normal(size=(1000, 8))
        for found in [bootstrap_mean(values, num_resamples=400, method=method)]
    ]
    assert least <= 100 * np.mean(hits) <= least + 5


def test_what_units_share_cancels_in_differences() -> None:
    random = np.random.default_rng(6)
    shared = 100 * random.normal(size=50)
    a, b = shared + random.normal(size=50) + 1, shared + random.normal(size=50)
    found = bootstrap(lambda x, y: x.mean() - y.mean(), a, b)
    assert 0.3 < found.high - found.low < 1.5  # about 4 · √(2/50); unpaired, 4 · 100 · √(2/50)


def test_resamples_are_uniform_seeded_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    (rows,) = resamples(10, 5000, seed=2)
    assert rows.shape == (5000, 10)
    np.testing.assert_allclose(np.bincount(rows.ravel()) / 5000, 1, atol=0.06)
    assert (next(resamples(10, 5000, seed=2)) == rows).all()
    assert (next(resamples(10, 5000, seed=3)) != rows).any()
    monkeypatch.setattr("analysis.bootstrap.BLOCK", 30)
    assert [len(block) for block in resamples(10, 8, seed=2)] == [3, 3, 2]
    assert mean_draws(np.ones((10, 2)), 8, seed=2).tolist() == [[1, 1]] * 8


def test_draws_by_hand() -> None:
    # Two units: a resample holds the first 0, 1 or 2 times, with probabilities 1/4, 1/2, 1/4.
    draws = mean_draws(np.array([0.0, 1.0]), 40_000, seed=0)
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(counts / 40_000, [0.25, 0.5, 0.25], atol=0.01)
    # Of 0, 1, … 100, the 5th and the 95th.
    found = interval(50.0, np.arange(101.0), num_units=10**6, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((5, 95), abs=1e-3)


def test_undefined_resamples_are_left_out_while_they_are_few() -> None:
    draws = np.tile(np.arange(100.0)[:, None], 2)
    draws[:10, 0], draws[:11, 1] = np.nan, np.nan
    found = interval(np.array([50.0, 50.0]), draws, num_units=10**6, method="percentile", confidence=0.5)
    assert found.low[0] == pytest.approx(10 + 89 / 4)
    assert np.isnan([found.low[1], found.high[1]]).all()
    assert found.estimate.tolist() == [50, 50]


def test_limits_may_be_infinite() -> None:
    # Where a fit peaks, say, which in some resamples it never does.
    draws = np.append(np.arange(90.0), np.full(10, np.inf))
    found = interval(50.0, draws, num_units=10**6, method="percentile", confidence=0.9)
    assert (found.low, found.high) == (5, np.inf)
    assert interval(50.0, draws, num_units=10**6, method="percentile", confidence=0.5).high == 74


def test_a_statistic_that_does_not_vary_has_no_width() -> None:
    for method in ("percentile", "expanded", "bca"):
        assert bootstrap(lambda x: 2.0, VALUES, method=method, num_resamples=20) == (2, 2, 2)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([np.zeros(3), np.zeros(4)], {}, r"arrays: \[3, 4\] units; give arrays whose first axes are the same units"),
        ([np.zeros(1)], {}, "arrays: 1 units; resampling needs at least two"),
        ([np.zeros(3)], {"num_resamples": 0}, "num_resamples=0: must be at least 1"),
        ([np.zeros(3)], {"confidence": 95}, "confidence=95: must lie between 0 and 1"),
        ([np.zeros(3)], {"method": "normal"}, "method='normal': must be one of percentile, expanded, bca"),
    ],
)
def test_bad_input_is_named(arrays: list[np.ndarray], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda *x: 0.0, *arrays, **options)

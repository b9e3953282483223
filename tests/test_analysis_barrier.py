"""Barriers: three definitions by hand, intervals by the two-example bootstrap that can be written down, coverage."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis import Line, barriers, line, metrics
from analysis.barrier import DEFINITIONS, barriers_of_examples
from analysis.results import Measurements

PEAK = [[0.0, 4.0, 0.0], [0.0, 2.0, 0.0]]  # two examples along three points


def line_of(values: list[float], t: list[float] | None = None, coordinates: dict[str, float] | None = None) -> Line:
    t = list(np.linspace(0, 1, len(values))) if t is None else t
    done = np.ones(len(values), dtype=bool)
    measurements = Measurements(["loss"], np.array([values]), np.full((1, len(values)), 0.1), done)
    coordinates = {"a": 0.0, "b": 1.0} if coordinates is None else coordinates
    return Line(measurements=measurements, metadata={}, coordinates=coordinates, t=np.array(t), length=3.0)


# ── Definitions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "share", "heights", "places"),
    [
        # ends 1 and 2, largest 4 in the middle: 4 − 1.5 twice, 4 − 2
        ([1, 2, 4, 2], [0, 0.25, 0.5, 1], (2.5, 2.5, 2), (0.5, 0.5, 0.5)),
        # rises to the second end by way of a shoulder: 10 − 5; 6 − 2 at 0.2; nothing to climb from the worse end
        ([0, 6, 6, 10], [0, 0.2, 0.6, 1], (5, 4, 0), (1, 0.2, 1)),
        # straight: Frankle's instability is half the difference of the ends, the others are 0
        ([3, 2, 1], [0, 0.5, 1], (1, 0, 0), (0, 0, 0)),
        # a valley
        ([2, 0, 2], [0, 0.5, 1], (0, 0, 0), (0, 0, 0)),
    ],
)
def test_definitions_by_hand(
    values: list[float], share: list[float], heights: tuple[float, ...], places: tuple[float, ...]
) -> None:
    found = barriers(line_of(values, share))
    assert list(found) == ["instability", "excess", "above_larger"] == list(DEFINITIONS)
    assert tuple(barrier.height for barrier in found.values()) == pytest.approx(heights)
    assert tuple(barrier.at for barrier in found.values()) == pytest.approx(places)
    assert all(np.isnan([barrier.low, barrier.high, barrier.bias]).all() for barrier in found.values())


def test_part_of_a_line_and_rewards() -> None:
    """Points −1/3, 0, 1/3, 2/3, 1, 4/3: the margins, higher than all, do not count."""
    t = (np.arange(-1, 5) / 3).tolist()
    path = line_of([50, 1, 3, 2, 4, 50], t, {"a": t[1], "soup": t[3], "b": t[4]})
    assert barriers(path)["excess"].height == pytest.approx(1)  # 3 − 2 at 1/3
    between = barriers(path, end="soup")
    assert (between["instability"].height, between["instability"].at) == pytest.approx((1.5, 0.5))
    assert between["above_larger"].height == pytest.approx(1)
    # A reward's barrier is a valley: −4, 2 below the worse end.
    reward = barriers(line_of([1, -4, -2]), larger_is_better=True)
    assert reward["above_larger"].height == 2
    assert reward["instability"].height == 3.5


class Well(nn.Module):
    """Loss (x² − 1)² of one weight: minima at ±1, 1 between them."""

    def __init__(self, x: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x]))

    def losses(self) -> Tensor:
        """Of four examples, some of which are harder everywhere; their mean is (x² − 1)²."""
        return (self.x.double() ** 2 - 1) ** 2 + torch.tensor([-3.0, -1.0, 1.0, 3.0])


def test_two_minima_of_a_quartic() -> None:
    ends = {"left": {"x": torch.tensor([-1.0])}, "right": {"x": torch.tensor([1.0])}}
    named = {
        "loss": lambda model: metrics.PerExample(model.losses()),
        "mean": lambda model: float(model.losses().mean()),
    }
    path = line(ends, named, model=Well(), steps=5, margin=0.5, progress=False)
    for barrier in barriers(path).values():
        # Hard examples are hard at both ends and between: pairing leaves no uncertainty at all.
        assert (barrier.height, barrier.at) == pytest.approx((1, 0.5))
        assert (barrier.low, barrier.high, barrier.bias) == pytest.approx((1, 1, 0))
    assert barriers(path, "mean")["excess"].height == pytest.approx(1)


def test_rewards_of_examples_have_valleys() -> None:
    values = np.array([[1, 1], [-4, -2], [0, 2]], dtype=float)
    path = line_of(values.mean(axis=1).tolist())
    path.measurements.examples["loss"] = np.stack([values, np.ones_like(values)], axis=1)
    found = barriers(path, larger_is_better=True, num_resamples=1000)
    same = barriers_of_examples(path.t, -values, num_resamples=1000)
    assert found == same
    # The mean falls from 1 to −3: by 4, the first example's from 0.5 to −4 and the second's from 1.5 to −2.
    assert found["above_larger"].height == found["instability"].height == 4
    assert (found["instability"].low, found["instability"].high) == pytest.approx((3.5, 4.5))


# ── Intervals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bootstrap_of_two_examples_by_hand() -> None:
    """Drawn are both (half of the time), the first twice or the second twice (a quarter each)."""
    share, losses = [0, 0.5, 1], np.transpose(PEAK)
    found = barriers_of_examples(share, losses, num_resamples=4000, seed=1)
    for barrier in found.values():
        # Heights 3, 4 and 2, so deviations of 1 both ways, more often than in one resample of 40.
        assert (barrier.height, barrier.low, barrier.high) == pytest.approx((3, 2, 4))
        assert barrier.bias == pytest.approx(0, abs=0.05)
    # Sums over one token and over three: 10 / 4, 4 / 1 and 6 / 3.
    counts = np.ones((3, 1)) * [[1, 3]]
    found = barriers_of_examples(share, losses * [[1, 3]], counts, num_resamples=4000, seed=1)
    for barrier in found.values():
        assert (barrier.height, barrier.low, barrier.high) == pytest.approx((2.5, 1, 3))
        assert barrier.bias == pytest.approx((4 + 2 + 2 * 2.5) / 4 - 2.5, abs=0.05)


def test_above_larger_counts_deviations_from_both_ends() -> None:
    """One end's noise alone: examples of 0 and 2 there, 5 in the middle. Heights 4; 5 and 3."""
    found = barriers_of_examples([0, 0.5, 1], [[0, 0], [5, 5], [0, 2]], num_resamples=1000)["above_larger"]
    # Above the first end it is 5 always; above the second it varies by 1.
    assert (found.height, found.low, found.high) == pytest.approx((4, 3, 5))


def test_the_seed_and_the_size_of_blocks() -> None:
    generator = np.random.default_rng(0)
    losses = generator.normal(size=(5, 30))
    one, again, other = (
        barriers_of_examples(np.linspace(0, 1, 5), losses, num_resamples=500, seed=seed) for seed in (0, 0, 1)
    )
    assert one == again
    assert one["excess"].low != other["excess"].low
    assert one["excess"].low == pytest.approx(other["excess"].low, abs=0.2)


def test_a_maximum_of_noise_is_no_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any barrier the estimate is above 0 nearly every time, the lower limit at most 1 in 40 times or so."""
    generator = np.random.default_rng(0)
    monkeypatch.setattr("analysis.bootstrap.BLOCK", 50 * 64)  # several blocks
    share, num = np.linspace(0, 1, 9), 200
    results = [
        barriers_of_examples(share, generator.normal(size=(9, 50)), num_resamples=200, seed=i)["excess"]
        for i in range(num)
    ]
    heights = np.array([result.height for result in results])
    assert (heights > 0.05).mean() > 0.8
    bias = np.mean([result.bias for result in results])
    assert 0.2 * heights.mean() < bias < heights.mean()  # resampling shows it, if not all of it
    assert np.mean([result.low > 0 for result in results]) <= 0.06
    assert np.mean([result.low <= 0 <= result.high for result in results]) >= 0.94


def test_intervals_cover_a_barrier() -> None:
    generator = np.random.default_rng(0)
    share = np.linspace(0, 1, 9)
    truth = {"instability": 0.5, "excess": 0.5, "above_larger": 0.45}
    path = 1 + 0.1 * share + 2 * share * (1 - share)  # 1.55 in the middle, ends 1 and 1.1
    covered = dict.fromkeys(truth, 0)
    for i in range(200):
        losses = path[:, None] + generator.normal(size=50) + 0.3 * generator.normal(size=(9, 50))
        for name, barrier in barriers_of_examples(share, losses, num_resamples=200, seed=i).items():
            covered[name] += barrier.low <= truth[name] <= barrier.high
    assert min(covered.values()) >= 188, covered


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SOUND = ([0, 0.5, 1], np.transpose(PEAK))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: barriers(line_of([1, 2]), "gold"), "metric 'gold': not in this line, which has ['loss']"),
        (lambda: barriers(line_of([1, 2]), end="soup"), "checkpoint 'soup': not on this line, which has ['a', 'b']"),
        (lambda: barriers(line_of([1, 2]), start="b", end="a"), "start='b', end='a': come in another order"),
        (lambda: barriers(line_of([1, np.nan, 2])), "values: 1 of 3 points are not measured, NaN or infinite"),
        (lambda: barriers_of_examples([0, 1], SOUND[1]), "shapes (2,), (3, 2), (3, 2); expected [N], [N, n], [N, n]"),
        (lambda: barriers_of_examples(*SOUND, [1, 1, 1]), "shapes (3,), (3, 2), (3,); expected [N], [N, n], [N, n]"),
        (lambda: barriers_of_examples([0, 1, 0.5], SOUND[1]), "share=[0.0, 1.0, 0.5]: must rise from 0 at the first"),
        (lambda: barriers_of_examples([0, 1], [[1], [2]]), "losses: of 1 examples; resampling needs at least two"),
        (lambda: barriers_of_examples(*SOUND, confidence=95), "num_resamples=2000, confidence=95: must be at least 1"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

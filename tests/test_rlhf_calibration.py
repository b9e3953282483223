"""Measures of a reward model on pairs, by hand and on data whose probabilities are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from rlhf.calibration import accuracy_by_margin, best_temperature, pair_metrics, reliability, rows_for_people


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def metrics_of(differences: list[float], margins: list[float | None] | None = None):  # type: ignore[no-untyped-def]
    rejected = torch.linspace(-1, 1, len(differences), dtype=torch.float64)
    return pair_metrics(rejected + torch.tensor(differences), rejected, margins or [None] * len(differences))


def test_four_pairs_by_hand() -> None:
    """Probabilities of the chosen side ¾, ¾, ¼ and ½: two are ordered rightly, one is a tie."""
    metrics = metrics_of([math.log(3), math.log(3), -math.log(3), 0.0])
    assert metrics.pairs == 4
    assert metrics.accuracy == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    assert metrics.log_likelihood.mean == pytest.approx((2 * math.log(0.75) + math.log(0.25) + math.log(0.5)) / 4)
    assert metrics.brier.mean == pytest.approx((2 * 0.0625 + 0.5625 + 0.25) / 4)
    # confidence ¾ three times, right in two of three; ½ once, half right
    assert [(b.pairs, b.confidence, b.correct) for b in metrics.bins] == [
        (1, pytest.approx(0.5), 0.5),
        (3, pytest.approx(0.75), pytest.approx(2 / 3)),
    ]
    assert metrics.calibration_error == pytest.approx(3 / 4 * (0.75 - 2 / 3))
    # two right and one wrong of the same size: σ(ln 3 / T) = ⅔, so T = ln 3 / ln 2
    assert metrics.temperature == pytest.approx(math.log(3) / math.log(2))
    assert metrics.log_likelihood_at_temperature == pytest.approx(
        (2 * math.log(2 / 3) + math.log(1 / 3) + math.log(0.5)) / 4
    )
    assert metrics.log_likelihood_at_temperature > metrics.log_likelihood.mean


def drawn(scale: float, num: int = 40_000) -> Tensor:
    """Differences of a model whose probabilities are right when divided by ``scale``."""
    generator = torch.Generator().manual_seed(0)
    true = 1.5 * torch.randn(num, generator=generator, dtype=torch.float64)
    right = torch.rand(num, generator=generator) < true.abs().sigmoid()
    return scale * torch.where(right, true.abs(), -true.abs())


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_known_probabilities(scale: float) -> None:
    differences = drawn(scale)
    assert best_temperature(differences) == pytest.approx(scale, rel=0.03)
    metrics = pair_metrics(differences, torch.zeros_like(differences), [None] * len(differences))
    if scale == 1:
        assert metrics.calibration_error < 0.01
        assert all(abs(b.correct - b.confidence) < 4 * b.correct_stderr + 1e-3 for b in metrics.bins)
    else:
        assert metrics.calibration_error > 0.05
    assert sum(b.pairs for b in metrics.bins) == len(differences)
    assert len(metrics.bins) == 10


def test_the_order_of_the_sides_does_not_matter_to_confidence() -> None:
    differences = torch.tensor([2.0, -0.3, 0.7], dtype=torch.float64)
    turned = reliability(-differences)
    for one, other in zip(reliability(differences), turned, strict=True):
        assert (one.pairs, one.confidence) == (other.pairs, other.confidence)
        assert one.correct == pytest.approx(1 - other.correct)


def test_certainty_falls_into_the_last_bin() -> None:
    (only,) = reliability(torch.tensor([1000.0, 800.0], dtype=torch.float64))
    assert (only.pairs, only.confidence, only.correct) == (2, 1.0, 1.0)


@pytest.mark.parametrize("differences", [[1.0, 2.0], [0.0, 3.0], [-1.0, 0.5], [-1.0, -2.0], [1.0, -1.0]])
def test_no_temperature_is_best_where_all_are_right_or_the_scores_do_not_help(differences: list[float]) -> None:
    metrics = metrics_of(differences)
    assert metrics.temperature is metrics.log_likelihood_at_temperature is None
    assert json.loads(json.dumps(metrics.to_json()))["temperature"] is None
    assert rows_for_people(metrics)[-1][0] == "best temperature"


def test_the_temperature_is_a_maximum() -> None:
    differences = torch.tensor([0.1, 4.0, -2.0, 7.0, -0.5], dtype=torch.float64)
    best = best_temperature(differences)
    assert best is not None

    def likelihood(t: float) -> float:
        return float(torch.nn.functional.logsigmoid(differences / t).mean())

    assert likelihood(best) > max(likelihood(0.99 * best), likelihood(1.01 * best))


def test_accuracy_by_thirds_of_the_margin() -> None:
    differences = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    margins = [0.1, 0.2, 0.3, None, 0.5, 0.6, 0.9]
    groups = accuracy_by_margin(differences, margins)
    assert [(g.lowest, g.highest, g.pairs, g.accuracy) for g in groups] == [
        (0.1, 0.2, 2, 0.5),
        (0.3, 0.5, 2, 0.5),
        (0.6, 0.9, 2, 1.0),
    ]
    assert accuracy_by_margin(differences, [None] * 7) == []


def test_equal_margins_stay_together() -> None:
    groups = accuracy_by_margin(torch.ones(6), [1.0, 1.0, 1.0, 1.0, 2.0, 2.0])
    assert [(g.lowest, g.highest, g.pairs) for g in groups] == [(1.0, 1.0, 4), (2.0, 2.0, 2)]

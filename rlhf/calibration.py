"""How well a reward model's probabilities on held-out pairs hold: accuracy, calibration, likelihood.

P(chosen preferred) = σ(d), d = r(chosen) − r(rejected). Which of a pair is written first says nothing, so
confidence is that in the side that scores higher, σ(|d|) ≥ ½, and is correct when that is the chosen one; a tie is half
correct.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.metrics import Estimate, mean_estimate

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence: their number, mean confidence, and the share that is correct."""

    pairs: int
    confidence: float
    correct: float
    correct_stderr: float


@dataclass(frozen=True)
class MarginGroup:
    """Pairs of like margin: its range, their number, and the accuracy on them."""

    lowest: float
    highest: float
    pairs: int
    accuracy: float
    accuracy_stderr: float


@dataclass(frozen=True)
class PairMetrics:
    """What a reward model is worth on pairs.

    accuracy                    share whose chosen side scores higher; ties are not correct
    log_likelihood              mean log σ(d), nats per pair; −ln 2 for a model that knows nothing
    brier                       mean (1 − σ(d))²; ¼ for a model that knows nothing
    calibration_error           Σ n_b · |correct_b − confidence_b| / n over the bins b
    temperature                 the T that maximises the mean of log σ(d / T); None where none does: every pair is
                                ordered rightly (T → 0), or scores do not help (T → ∞)
    log_likelihood_at_temperature  that maximum
    bins                        the reliability diagram: confidence from ½ to 1 in ten bins of equal width
    by_margin                   thirds of the pairs that carry a margin, by rising margin
    """

    pairs: int
    accuracy: Estimate
    log_likelihood: Estimate
    brier: Estimate
    calibration_error: float
    temperature: float | None
    log_likelihood_at_temperature: float | None
    bins: list[Bin]
    by_margin: list[MarginGroup]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dictionaries."""
        return asdict(self)


def pair_metrics(chosen: Tensor, rejected: Tensor, margins: list[float | None]) -> PairMetrics:
    """Measure scores of pairs. [n], [n], n margins (None: the pair has none)"""
    differences = (chosen - rejected).double().cpu()
    bins = reliability(differences)
    temperature = best_temperature(differences)
    at_best = None if temperature is None else float(logsigmoid(differences / temperature).mean())
    return PairMetrics(
        pairs=len(differences),
        accuracy=mean_estimate(differences > 0),
        log_likelihood=mean_estimate(logsigmoid(differences)),
        brier=mean_estimate((1 - differences.sigmoid()) ** 2),
        calibration_error=sum(b.pairs * abs(b.correct - b.confidence) for b in bins) / len(differences),
        temperature=temperature,
        log_likelihood_at_temperature=at_best,
        bins=bins,
        by_margin=accuracy_by_margin(differences, margins),
    )


def reliability(differences: Tensor) -> list[Bin]:
    """The bins that hold pairs, by rising confidence. [n] → at most ``NUM_BINS``"""
    confidence = differences.abs().sigmoid()
    correct = 0.5 + 0.5 * differences.sign()
    index = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins = []
    for i in index.unique().tolist():
        inside = index == i
        share = mean_estimate(correct[inside])
        bins.append(Bin(int(inside.sum()), float(confidence[inside].mean()), share.mean, share.stderr))
    return bins


def best_temperature(differences: Tensor) -> float | None:
    """The T > 0 that maximises the mean of log σ(d / T), to a relative 1e-9; None where there is none. [n]

    With a = 1/T the slope, Σ d·σ(−a·d), falls as a rises: it is halved around its zero.
    """

    def slope(a: float) -> float:
        return float((differences * (-a * differences).sigmoid()).sum())

    if slope(0.0) <= 0 or bool((differences >= 0).all()):
        return None
    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 2 / (low + high)


def accuracy_by_margin(differences: Tensor, margins: list[float | None]) -> list[MarginGroup]:
    """Accuracy on thirds of the pairs with a margin, cut where a third and two thirds have at most that margin.

    Equal margins stay together, so that groups may be of unequal size, and fewer than three.
    """
    present = torch.tensor([margin is not None for margin in margins])
    values = torch.tensor([margin for margin in margins if margin is not None], dtype=torch.float64)
    if not len(values):
        return []
    correct = differences[present] > 0
    cuts = torch.quantile(values, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64), interpolation="lower")
    third = torch.bucketize(values, cuts)
    groups = []
    for i in third.unique().tolist():
        inside = third == i
        low, high = values[inside].aminmax()
        groups.append(MarginGroup(float(low), float(high), int(inside.sum()), *mean_estimate(correct[inside])))
    return groups


def rows_for_people(metrics: PairMetrics) -> list[list[str]]:
    """The numbers as rows of a table, bins left to the diagram."""

    def shown(estimate: Estimate) -> str:
        return f"{estimate.mean:.3f} ± {estimate.stderr:.3f}"

    rows = [["held-out pairs", "value"], ["accuracy", shown(metrics.accuracy)]]
    for group in metrics.by_margin:
        name = f"accuracy, margin {group.lowest:g} to {group.highest:g} ({group.pairs} pairs)"
        rows.append([name, shown(Estimate(group.accuracy, group.accuracy_stderr))])
    rows += [
        ["log-likelihood (nats per pair)", shown(metrics.log_likelihood)],
        ["Brier score", shown(metrics.brier)],
        ["expected calibration error", f"{metrics.calibration_error:.3f}"],
    ]
    if metrics.temperature is None:
        return [*rows, ["best temperature", "none"]]
    likelihood = f"{metrics.log_likelihood_at_temperature:.3f}"
    return [*rows, ["best temperature", f"{metrics.temperature:.3f}"], ["log-likelihood at it", likelihood]]

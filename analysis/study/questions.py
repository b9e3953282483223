"""What a study asks of its runs: the four claims, how much of a second model, and whether predictions were right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.study.config import Study
from analysis.study.effects import GOLD, Outcomes, Tables, difference, less_at_equal_kl, reward_at
from analysis.study.inference import Effect, effect, holm, p_value
from analysis.study.references import arm_of_model, mixing_weights
from analysis.study.store import HELD_OUT

SIGNIFICANCE = 0.05  # two-sided, after Holm's correction
STABILITY_MARGIN = 0.25  # of the baseline's mean largest drop: more than that is a loss of stability
SUPPORTED, NOT_SUPPORTED, REVERSED, NO_VERDICT = "supported", "not supported", "reversed", "too few draws"


# ── The claims ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Claim:
    """A statement, and whether the draws bear it out.

    number     what is one number a draw
    effect     these numbers, their mean, its 95 % interval (of this claim alone), and how many draws are left out
    threshold  that the interval must not contain
    side       1 if it must lie above, -1 if below
    p, p_holm  two-sided, of this claim alone and corrected for all
    """

    statement: str
    number: str
    effect: Effect
    threshold: float
    side: int
    p: float
    p_holm: float

    @property
    def verdict(self) -> str:
        """``supported``, ``reversed`` if the interval lies wholly on the other side, ``not supported`` otherwise;
        ``too few draws`` of fewer than two.

        The interval that decides is the one whose confidence Holm's correction asks for: outside the threshold exactly
        if ``p_holm`` ≤ 5 %.
        """
        if math.isnan(self.p_holm):
            return NO_VERDICT
        if self.p_holm > SIGNIFICANCE:
            return NOT_SUPPORTED
        return SUPPORTED if self.side * (self.effect.interval.estimate - self.threshold) > 0 else REVERSED


def claims(study: Study, tables: Tables) -> list[Claim]:
    """The four statements about the treatment against the baseline, in the regime of the comparison."""
    compare = study.compare
    inside, outside = (Outcomes(study, tables, compare.regime, prefix) for prefix in ("", HELD_OUT))
    arms, beta = (compare.treatment, compare.baseline), f"at β = {compare.kl_coef:g}"
    drops = difference(inside, *arms, "largest_drop", compare.kl_coef)
    baseline_drops = inside.measured(compare.baseline, "largest_drop", compare.kl_coef)[np.isfinite(drops.values)]
    margin = STABILITY_MARGIN * float(baseline_drops.mean()) if len(baseline_drops) else math.nan
    tested: list[tuple[str, str, Effect, float, int]] = [
        (
            "the policy moves further",
            f"{_kl_text(compare.moved)} {beta}",
            difference(inside, *arms, compare.moved, compare.kl_coef),
            0.0,
            1,
        ),
        (
            "it reaches higher reward",
            f"gold at equal {_kl_text(compare.axis)}",
            effect(less_at_equal_kl(inside, *arms, compare.axis)),
            0.0,
            1,
        ),
        ("no loss of stability", f"largest drop of the batch's proxy reward {beta}", drops, margin, -1),
        (
            "better out of distribution",
            f"gold on held-out prompts at equal {_kl_text(compare.axis)} there",
            effect(less_at_equal_kl(outside, *arms, compare.axis)),
            0.0,
            1,
        ),
    ]
    p_values = [p_value(found.values, threshold) for _, _, found, threshold, _ in tested]
    return [Claim(*test, p, float(c)) for test, p, c in zip(tested, p_values, holm(p_values), strict=True)]


def _kl_text(axis: str) -> str:
    return f"KL to {axis.removeprefix('kl/')}"


# ── The mixing weight ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Mixing:
    """Gold, less that of the baseline (α = 0), over the weight α of the second model in the reference: A arms.

    axis     the KL that is equal in ``at_kl``
    at_coef  {β: [A] effects at equal β}
    at_kl    [A] effects at equal KL
    """

    axis: str
    arms: Sequence[str]
    alphas: np.ndarray
    at_coef: Mapping[float, Sequence[Effect]]
    at_kl: Sequence[Effect]


def mixing(outcomes: Outcomes, axis: str) -> Mixing | None:
    """The arms that mix two models in their reference; None where fewer than three do."""
    weights = {arm: alpha for arm, alpha in mixing_weights(outcomes.study).items() if arm in outcomes.arms()}
    if len(weights) < 3:
        return None
    baseline = outcomes.study.compare.baseline
    return Mixing(
        axis,
        list(weights),
        np.array(list(weights.values())),
        {
            kl_coef: [difference(outcomes, arm, baseline, GOLD, kl_coef) for arm in weights]
            for kl_coef in outcomes.study.kl_coefs
        },
        [effect(less_at_equal_kl(outcomes, arm, baseline, axis)) for arm in weights],
    )


# ── Predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Foretold:
    """What ideal frontiers said of a reference before PPO ran, and what came of it: gold less the first reference's.

    arm         the arm that has this reference
    kl          [D]  where both are read: the largest KL that all frontiers and all their arms reach in a draw
    predicted   on the references' ideal frontiers
    reached     by PPO, at the same KL
    at_compare  by PPO, as :func:`less_at_equal_kl` reads it
    """

    reference: str
    arm: str
    kl: np.ndarray
    predicted: Effect
    reached: Effect
    at_compare: Effect

    def agreement(self, reached: Effect) -> tuple[int, int]:
        """In how many draws a difference that PPO reached has the sign of the prediction, of how many with both."""
        both = np.isfinite(self.predicted.values) & np.isfinite(reached.values)
        same = np.sign(self.predicted.values[both]) == np.sign(reached.values[both])
        return int(same.sum()), int(both.sum())


def foretold(outcomes: Outcomes, axis: str) -> list[Foretold]:
    """What was predicted of each reference after the first, the baseline's; those that no arm of the regime has are
    left out."""
    study = outcomes.study
    matched = {name: arm_of_model(study, name) for name in (study.predict.references if study.predict else [])}
    arms = {name: arm for name, arm in matched.items() if arm in outcomes.arms()}
    if len(arms) < 2 or next(iter(matched)) not in arms:
        return []
    curves = {name: outcomes.curve(str(arm), axis) for name, arm in arms.items()}
    frontiers = {name: [_frontier(outcomes, name, draw, axis) for draw in study.draws] for name in arms}
    kl = np.full(len(study.draws), np.nan)
    for draw in range(len(study.draws)):
        ends = [found[draw][0] for found in frontiers.values()] + [c.points()[0][draw] for c in curves.values()]
        if all(len(end) for end in ends):
            kl[draw] = np.min([end.max() for end in ends])  # NaN where a run is missing
    predicted = {
        name: np.array([reward_at(target, *points) for target, points in zip(kl, found, strict=True)])
        for name, found in frontiers.items()
    }
    reached = {name: curve.at(kl) for name, curve in curves.items()}
    first, *others = arms
    compared = {name: less_at_equal_kl(outcomes, str(arms[name]), str(arms[first]), axis) for name in others}
    return [
        Foretold(
            name,
            str(arms[name]),
            kl,
            effect(predicted[name] - predicted[first]),
            effect(reached[name] - reached[first]),
            effect(compared[name]),
        )
        for name in others
    ]


def _frontier(outcomes: Outcomes, reference: str, draw: int, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and gold of the points of a draw's ideal frontier that are known."""
    rows = [
        (row.get(axis, math.nan), row.get(GOLD, math.nan))
        for row in outcomes.tables.predictions
        if (row["regime"], row["draw"], row["reference"]) == (outcomes.regime, draw, reference)
    ]
    points = np.array(rows, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]

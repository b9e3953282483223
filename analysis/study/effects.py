"""The statistics of a study: arm against arm, paired by draw; reward at equal KL; the claims.

Everything is made from the tables (:mod:`analysis.study.store`) and the configuration alone, draw by draw: arrays have
one entry for each of D draws, K coefficients, R resamples. **NaN is a draw without the number**: its runs are not done,
or the KL lies outside what its runs reached, as nothing is extrapolated. Such draws are left out and counted.

Differences are taken within a draw. Their intervals are expanded percentile bootstraps over draws, 95 % and not
corrected for being many, unless a :class:`Claim` says otherwise.

    outcomes = Outcomes(study, read_tables(study.results), "A")
    effect(less_at_equal_kl(outcomes, "soup 2", "single", "kl/base"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtr

from analysis.bootstrap import Interval, bootstrap_mean, mean_draws
from analysis.frontier import interpolate_at_kl
from analysis.run_frontier import hypervolume
from analysis.study.config import START, Study
from analysis.study.store import HELD_OUT, MODELS, PREDICTIONS, RUNS, TIMINGS, Row, by_draw, read_table

RESAMPLES = 20_000  # of intervals
TEST_RESAMPLES = 500_000  # of p-values, whose smallest rest on the outermost of them
SIGNIFICANCE = 0.05  # two-sided, after Holm's correction
STABILITY_MARGIN = 0.25  # of the baseline's mean largest drop: more than that is a loss of stability
GOLD = "gold_reward"
OWN_AXIS = "kl/reference"  # KL to the reference that the run itself was penalised by
OF_TRAINING = ("distance", "skipped_steps", "largest_drop")  # measures that no prompts belong to
SUPPORTED, NOT_SUPPORTED, REVERSED = "supported", "not supported", "reversed"


class Tables(NamedTuple):
    """The rows of a study's four tables."""

    runs: Sequence[Row]
    models: Sequence[Row]
    predictions: Sequence[Row]
    timings: Sequence[Row]


def read_tables(results: Path) -> Tables:
    """The tables in a study's folder of results; those that are not there yet are empty."""
    return Tables(*(read_table(results / name) for name in (RUNS, MODELS, PREDICTIONS, TIMINGS)))


# ── One number from draws ─────────────────────────────────────────────────────────────────────────────────────────────


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
        return self.std / math.sqrt(self.used) if self.used > 1 else math.nan


def effect(values: np.ndarray, confidence: float = 0.95) -> Effect:
    """The mean over draws and its expanded bootstrap interval. [D] → limits are NaN for fewer than two draws."""
    values, known = np.asarray(values, dtype=float), _known(values)
    if len(known) > 1:
        return Effect(values, bootstrap_mean(known, num_resamples=RESAMPLES, confidence=confidence))
    return Effect(values, Interval(float(known[0]) if len(known) else math.nan, math.nan, math.nan))


def p_value(values: np.ndarray, threshold: float = 0.0) -> float:
    """Two-sided p of the mean over draws: 1 − the confidence at which the limits of :func:`effect` touch a threshold.

    With F the share of resampled means up to the threshold (above it, where the mean is below): the limit is at
    F = Φ(−√(n/(n−1)) t), so p = 2 P(T > t) of Student's with n − 1 degrees of freedom.

    F counts as no less than one resample, nor than the n⁻ⁿ of drawing one unit n times: the bootstrap knows of nothing
    rarer, and where no resample reaches the threshold **p is at most what is returned**: 0.008 for eight draws, 0.011
    for seven, 0.016 for six, 0.05 for five, 0.1 for four. NaN for fewer than two draws.
    """
    known = _known(values)
    n = len(known)
    if n < 2 or not math.isfinite(threshold):
        return math.nan
    mean = known.mean()
    if mean == threshold:
        return 1.0
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


def _known(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]


# ── What a regime's runs came to ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Curve:
    """What an arm reached at K coefficients in each of D draws, and where it started.

    kl, reward              [D, K]
    start_kl, start_reward  [D]; ``start_kl`` is None where it is not known on the axis: the curve has no start
    """

    kl_coefs: Sequence[float]
    kl: np.ndarray
    reward: np.ndarray
    start_kl: np.ndarray | None
    start_reward: np.ndarray

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """KL and reward of the start, where it has one, and the coefficients. [D, K + 1] or [D, K], twice"""
        if self.start_kl is None:
            return self.kl, self.reward
        return (
            np.column_stack([self.start_kl, self.kl]),
            np.column_stack([self.start_reward, self.reward]),
        )

    def at(self, kl: np.ndarray) -> np.ndarray:
        """Reward at a KL of every draw, linear in √KL between neighbouring points. [D] → [D]

        NaN for a draw that lacks a point, as fewer points are another curve, and outside what its points span.
        """
        found = np.full(len(kl), np.nan)
        for draw, (target, xs, ys) in enumerate(zip(kl, *self.points(), strict=True)):
            if np.isfinite([target, *xs, *ys]).all():
                found[draw] = _at(float(target), xs, ys)
        return found


@dataclass(frozen=True)
class Outcomes:
    """What one regime's policies were measured to be. Every array has one entry a draw.

    ``prefix`` says on which prompts: "" the training prompts, ``HELD_OUT`` the others.
    """

    study: Study
    tables: Tables
    regime: str
    prefix: str = ""

    def measured(self, arm: str, measure: str, kl_coef: float | None) -> np.ndarray:
        """A measure of an arm's run with a coefficient, which an arm without a reference does not have. [D]"""
        if not self.coefficients(arm):
            kl_coef = None
        rows = self._runs.get(arm, [])
        return by_draw(rows, self.study.draws, self._column(measure), kl_coef=kl_coef)

    def model(self, model: str, measure: str) -> np.ndarray:
        """A measure of a model as it is, or of ``start``, the policy before training. [D]"""
        rows = self.tables.models
        return by_draw(rows, self.study.draws, self._column(measure), regime=self.regime, model=model)

    def coefficients(self, arm: str) -> list[float]:
        """The coefficients that an arm is run with; none without a reference."""
        return [kl_coef for kl_coef in self.study.coefficients(arm) if kl_coef is not None]

    def arms(self) -> list[str]:
        """The arms of the regime, the baseline first, in the order of the configuration."""
        compare = self.study.compare
        arms = self.study.regimes[self.regime].arms or list(self.study.arms)
        return sorted(arms, key=lambda arm: arm != compare.baseline)

    def curve(self, arm: str, axis: str, reward: str = GOLD) -> Curve:
        """An arm's reward against a KL, over its coefficients."""
        coefficients = self.coefficients(arm)
        empty = np.empty((len(self.study.draws), 0))
        kl, rewards = (
            np.column_stack([empty, *(self.measured(arm, measure, kl_coef) for kl_coef in coefficients)])
            for measure in (axis, reward)
        )
        return Curve(coefficients, kl, rewards, self._start_kl(arm, axis), self.model(START, reward))

    def equal_kl(self, axis: str, arm: str | None = None) -> np.ndarray:
        """The KL to read rewards at: what the baseline, or an arm, reached at the coefficient of the comparison. [D]

        On ``kl/reference`` it is to the arm's own reference, and the others are read at as much KL to theirs.
        """
        return self.measured(arm or self.study.compare.baseline, axis, self.study.compare.kl_coef)

    def at_equal_kl(self, arm: str, axis: str, reward: str = GOLD, of: str | None = None) -> np.ndarray:
        """An arm's reward at :meth:`equal_kl`, ``of`` the baseline or another arm. [D]

        NaN for an arm without coefficients, which has no curve.
        """
        if not self.coefficients(arm):
            return np.full(len(self.study.draws), np.nan)
        return self.curve(arm, axis, reward).at(self.equal_kl(axis, of))

    @cached_property
    def _runs(self) -> dict[str, list[Row]]:
        """The regime's runs of every arm."""
        found: dict[str, list[Row]] = {}
        for row in self.tables.runs:
            if row["regime"] == self.regime:
                found.setdefault(str(row["arm"]), []).append(row)
        return found

    def _column(self, measure: str) -> str:
        return measure if measure in OF_TRAINING or measure == "loss" else self.prefix + measure

    def _start_kl(self, arm: str, axis: str) -> np.ndarray | None:
        """The start's KL. To an arm's own reference: 0 where the policy starts there, else that to the measured model.

        None where the reference was not measured (several models' KLs or mixture, a moving average, another soup).
        """
        if axis != OWN_AXIS:
            return self.model(START, axis)
        weights = reference_weights(self.study, arm)
        if weights == {self.study.ppo["policy"]: 1}:
            return np.zeros(len(self.study.draws))
        name = _measured_model(self.study, weights, self.study.measure.kl)
        return None if name is None else self.model(START, f"kl/{name}")


def less_at_equal_kl(outcomes: Outcomes, arm: str, minus: str, axis: str, reward: str = GOLD) -> np.ndarray:
    """An arm's reward less another's at equal KL: half at the KL that the one reached, half at that of the other. [D]

    Reward bends down over √KL, and a line between points lies below it but at the points. An arm read at a point of its
    own would have an advantage over one read between two; so each is read once at its own point.

        effect(less_at_equal_kl(outcomes, "soup 2", "single", "kl/base"))
    """
    read = [
        outcomes.at_equal_kl(arm, axis, reward, of) - outcomes.at_equal_kl(minus, axis, reward, of)
        for of in (minus, arm)
    ]
    return np.mean(read, axis=0)


def difference(outcomes: Outcomes, arm: str, minus: str, measure: str, kl_coef: float | None) -> Effect:
    """How much more a measure is for an arm than for another at the same coefficient."""
    return effect(outcomes.measured(arm, measure, kl_coef) - outcomes.measured(minus, measure, kl_coef))


def hypervolumes(outcomes: Outcomes, arm: str, axis: str) -> np.ndarray:
    """The area between what an arm reached and a corner, nats · reward: :func:`analysis.run_frontier.hypervolume`. [D]

    The corner is the largest KL that the baseline reached in that draw, and the start's reward. NaN for an arm with
    fewer or more points than the baseline: the area grows with them.
    """
    baseline, curve = outcomes.curve(outcomes.study.compare.baseline, axis), outcomes.curve(arm, axis)
    areas = np.full(len(curve.kl), np.nan)
    if curve.kl.shape[1] == 0 or curve.kl.shape != baseline.kl.shape:
        return areas
    for draw, (kl, reward, largest, start) in enumerate(
        zip(curve.kl, curve.reward, baseline.kl.max(axis=1), curve.start_reward, strict=True)
    ):
        if np.isfinite([*kl, *reward, largest, start]).all():
            areas[draw] = hypervolume(kl, reward, float(largest), float(start))
    return areas


def overoptimisation(outcomes: Outcomes, arm: str) -> np.ndarray:
    """Gold at the smallest coefficient less the best gold over all: 0, or what too much optimisation cost. [D]"""
    coefficients = outcomes.coefficients(arm)
    if len(coefficients) < 2:
        return np.full(len(outcomes.study.draws), np.nan)
    gold = np.column_stack([outcomes.measured(arm, GOLD, kl_coef) for kl_coef in coefficients])
    return gold[:, int(np.argmin(coefficients))] - gold.max(axis=1)  # max is NaN where a run is missing


def _at(kl: float, kls: np.ndarray, rewards: np.ndarray) -> float:
    """Reward at a KL between points; NaN outside them, as nothing is extrapolated. [N], [N]"""
    try:
        return interpolate_at_kl(kl, kls, rewards)
    except ValueError:
        return math.nan


# ── Claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        """``supported``, ``reversed`` if the interval lies wholly on the other side, ``not supported`` otherwise.

        The interval that decides is the one whose confidence Holm's correction asks for: outside the threshold exactly
        if ``p_holm`` ≤ 5 %.
        """
        if not self.p_holm <= SIGNIFICANCE:  # NaN: fewer than two draws
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


# ── References ────────────────────────────────────────────────────────────────────────────────────────────────────────


def reference_weights(study: Study, arm: str) -> dict[str, float] | None:
    """{model: its weight} of the average that an arm's KL is to, as the configuration writes models.

    None for an arm whose reference is no average of models: none at all, several KLs, a mixture, a moving average.
    """
    settings = {**study.ppo, **study.arms[arm]}
    if settings.get("reference_kind", "soup") != "soup" or not settings.get("reference"):
        return None
    return _average(settings["reference"], settings.get("reference_weights"))


def arm_of_model(study: Study, model: str) -> str | None:
    """The arm whose reference is a measured model: the same models, equally weighted."""
    wanted = _average(study.measure.models[model])
    return next((arm for arm in study.arms if _equal(reference_weights(study, arm), wanted)), None)


def mixing_weights(study: Study) -> dict[str, float]:
    """{arm: α}, in order of α, of the arms whose reference is (1 − α) of the baseline's and α of the other model.

    That is the second model of the treatment's reference; without one, there are no such arms.
    """
    base, treatment = (reference_weights(study, arm) for arm in (study.compare.baseline, study.compare.treatment))
    if base is None or treatment is None or len(base) != 1 or len(treatment) != 2 or not set(base) < set(treatment):
        return {}
    (other,) = set(treatment) - set(base)
    found = {}
    for arm in study.arms:
        weights = reference_weights(study, arm)
        if weights is not None and set(weights) <= set(treatment):
            found[arm] = weights.get(other, 0.0)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _average(models: Any, weights: Sequence[float] | None = None) -> dict[str, float]:
    """{model: weight}, of sum 1, without models of weight 0."""
    names = [models] if isinstance(models, str) else list(models)
    weights = weights or [1.0] * len(names)
    total: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        total[name] = total.get(name, 0.0) + weight / sum(weights)
    return {name: weight for name, weight in total.items() if weight}


def _equal(one: Mapping[str, float] | None, other: Mapping[str, float]) -> bool:
    return one is not None and set(one) == set(other) and all(math.isclose(one[name], other[name]) for name in other)


def _measured_model(study: Study, weights: Mapping[str, float] | None, names: Sequence[str]) -> str | None:
    return next((name for name in names if _equal(weights, _average(study.measure.models[name]))), None)


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
        name: np.array([_at(target, *points) for target, points in zip(kl, found, strict=True)])
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

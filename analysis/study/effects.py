"""What a study's runs came to, draw by draw: measures of arms, and one arm against another at equal KL.

Everything is made from the tables (:mod:`analysis.study.store`) and the configuration alone: arrays have one entry for
each of D draws, K coefficients. **NaN is a draw without the number**: its runs are not done, or the KL lies outside
what its runs reached, as nothing is extrapolated. Differences are taken within a draw.

    outcomes = Outcomes(study, read_tables(study.results), "A")
    effect(less_at_equal_kl(outcomes, "soup 2", "single", "kl/base"))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.frontier import interpolate_at_kl
from analysis.run_frontier import RewardKLFrontier, hypervolume
from analysis.study.config import START, Study
from analysis.study.inference import Effect, effect
from analysis.study.references import measured_model, reference_weights
from analysis.study.store import MODELS, PREDICTIONS, RUNS, TIMINGS, Row, by_draw, read_table
from rlhf.config import PPOConfig

GOLD = "gold_reward"
OWN_AXIS = "kl/reference"  # KL to the reference that the run itself was penalised by
OF_TRAINING = ("distance", "skipped_steps", "largest_drop")  # measures that no prompts belong to


class Tables(NamedTuple):
    """The rows of a study's four tables."""

    runs: Sequence[Row]
    models: Sequence[Row]
    predictions: Sequence[Row]
    timings: Sequence[Row]


def read_tables(results: Path) -> Tables:
    """The tables in a study's folder of results; those that are not there yet are empty."""
    return Tables(*(read_table(results / name) for name in (RUNS, MODELS, PREDICTIONS, TIMINGS)))


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
                found[draw] = reward_at(float(target), xs, ys)
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

    def reached(self, arms: Sequence[str], axis: str, reward: str = GOLD) -> RewardKLFrontier:
        """What arms reached with each coefficient, a draw being a seed, and their start, at coefficient ∞.

        Nothing is known of a single number's error; intervals of the frontier's own methods are bootstraps, too short
        for few draws. Raises ValueError for an arm that is none of the regime's with coefficients, or lacks a number.
        """
        rows: list[tuple[Any, ...]] = []
        for group, arm in enumerate(arms):
            if arm not in self.arms() or not self.coefficients(arm):
                known = [name for name in self.arms() if self.coefficients(name)]
                raise ValueError(f"arm {arm!r}: none of regime {self.regime!r} with coefficients; choose from {known}")
            updates = {**self.study.ppo, **self.study.arms[arm]}.get("updates", PPOConfig.updates)
            curve = self.curve(arm, axis, reward)
            settings = [(kl_coef, updates) for kl_coef in curve.kl_coefs]
            if curve.start_kl is not None:
                settings = [(math.inf, 0), *settings]
            for draw, *of_draw in zip(self.study.draws, *curve.points(), strict=True):
                for setting, *pair in zip(settings, *of_draw, strict=True):
                    if not np.isfinite(pair).all():
                        raise ValueError(
                            f"draw {draw}, {arm}, β = {setting[0]:g} (inf: the start): {axis} and {reward} are "
                            f"{pair}; do its run first, or read measures that there are"
                        )
                    rows.append((group, draw, *setting, *pair))
        groups, draws, kl_coefs, at_updates, kls, rewards = (np.array(column) for column in zip(*rows, strict=True))
        unknown = np.full(len(rows), np.nan)
        return RewardKLFrontier(
            names=list(arms),
            x=axis,
            y=reward,
            group=groups,
            seed=draws,
            kl_coef=kl_coefs,
            update=at_updates,
            kl=kls,
            kl_stderr=unknown,
            reward=rewards,
            reward_stderr=unknown,
            metadata={"regime": self.regime, "prompts": self.prefix},
        )

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
        name = measured_model(self.study, weights, self.study.measure.kl)
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


def reward_at(kl: float, kls: np.ndarray, rewards: np.ndarray) -> float:
    """Reward at a KL between points; NaN outside them, as nothing is extrapolated. [N], [N]"""
    try:
        return interpolate_at_kl(kl, kls, rewards)
    except ValueError:
        return math.nan

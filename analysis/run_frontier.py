"""What PPO runs reached: reward against KL over coefficients, updates and seeds; and where more KL stops to pay.

Groups of runs (one for each kind of reference, say) are compared by their seeds, the independent units: a quantity is
computed for each seed from all runs of that seed, then averaged, and differences between groups are taken seed by seed.
A run folder holds means with standard errors, no single responses, so prompts cannot be resampled; the noise of
evaluating is part of what seeds differ by.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import xlogy

from analysis.bootstrap import Interval, bootstrap_mean, interval, resamples
from analysis.frontier import confidence_ellipse, interpolate_at_kl
from analysis.results import Saved
from rlhf.command_line import read_settings
from rlhf.metrics import read_json_lines

POINTS = ("end", "updates")
Folder = str | os.PathLike[str]


class Points(NamedTuple):
    """The K points of a group: one for each coefficient and update, in each of S seeds.

    kl_coef, update  [K]
    kl, reward       [S, K]
    """

    kl_coef: np.ndarray
    update: np.ndarray
    kl: np.ndarray
    reward: np.ndarray


@dataclass(frozen=True)
class RewardKLFrontier(Saved):
    """N points (KL, reward) of runs in G groups.

    names                     G group names
    x, y                      what KL and reward are, by their names in a run folder
    group                     [N]  index of the group
    seed, kl_coef, update     [N]  of the run, and after how many updates
    kl, kl_stderr             [N]  nats per response, and the standard error over prompts
    reward, reward_stderr     [N]  in its own units, likewise
    metadata                  which points were read
    """

    names: list[str]
    x: str
    y: str
    group: np.ndarray
    seed: np.ndarray
    kl_coef: np.ndarray
    update: np.ndarray
    kl: np.ndarray
    kl_stderr: np.ndarray
    reward: np.ndarray
    reward_stderr: np.ndarray
    metadata: dict[str, Any]

    def seeds(self, group: str) -> list[int]:
        """The seeds of a group's runs."""
        return sorted({int(seed) for seed in self.seed[self._rows(group)]})

    def points(self, group: str) -> Points:
        """A group's points, seed by seed. Raises ValueError when its seeds have different coefficients or updates."""
        rows, seeds = self._rows(group), self.seeds(group)
        settings = sorted({(float(self.kl_coef[row]), int(self.update[row])) for row in rows})
        places = {(float(self.kl_coef[row]), int(self.update[row]), int(self.seed[row])): row for row in rows}
        missing = [(*setting, seed) for seed in seeds for setting in settings if (*setting, seed) not in places]
        if missing:
            kl_coef, update, seed = missing[0]
            raise ValueError(
                f"group {group!r}: no point of kl_coef={kl_coef:g} at update {update} with seed {seed}, but with "
                "another; give every seed the same runs"
            )
        grid = np.array([[places[(*setting, seed)] for setting in settings] for seed in seeds])
        coefficients, updates = np.array(settings).T
        return Points(coefficients, updates.astype(int), self.kl[grid], self.reward[grid])

    def front(self, group: str) -> np.ndarray:
        """Which of a group's :meth:`points` no other has less KL and more reward than, as means over seeds. [K] bool"""
        points = self.points(group)
        return non_dominated(points.kl.mean(axis=0), points.reward.mean(axis=0))

    def ellipses(self, group: str, confidence: float = 0.95) -> np.ndarray:
        """Joint confidence regions of the means over S seeds: width, height, angle. [K, 3], NaN for S < 3"""
        points = self.points(group)
        pairs = np.stack([points.kl, points.reward], axis=-1)
        num_seeds = len(pairs)
        covariances = [
            np.cov(pairs[:, k].T) / num_seeds if num_seeds > 1 else np.full((2, 2), np.nan)
            for k in range(pairs.shape[1])
        ]
        return np.array([confidence_ellipse(covariance, num_seeds, confidence) for covariance in covariances])

    def reward_at_kl(self, group: str, kl: float, *, minus: str | None = None, **options: Any) -> Interval:
        """Reward at a KL: of each seed's points in order of KL, linear in √KL between two; mean over seeds.

        Meant for one point a coefficient, or the updates of one coefficient. With ``minus``, how much more than that
        group, paired by seed. ``options`` are those of :func:`analysis.bootstrap.bootstrap_mean`.

        Raises ValueError outside the KL that a seed's points span (nothing is extrapolated), for groups of different
        seeds, and for fewer than two seeds.
        """

        def at(kls: np.ndarray, rewards: np.ndarray) -> float:
            return interpolate_at_kl(kl, kls, rewards, name=self.x)

        return self._over_seeds(at, group, minus, options)

    def hypervolume(
        self, group: str, kl_max: float, reward_min: float, *, minus: str | None = None, **options: Any
    ) -> Interval:
        """The area between what each seed reached and the corner (KL_max, R_min), in nats · reward; mean over seeds.

        ∫ max(0, max{reward of points of KL ≤ k} − R_min) dk up to KL_max (Zitzler & Thiele 1999). Noise adds to it, the
        more the more points there are: compare groups of equally many. ``minus`` and ``options`` as in
        :meth:`reward_at_kl`.
        """
        if minus is not None:
            counts = {name: self.points(name).kl.shape[1] for name in (group, minus)}
            if len(set(counts.values())) > 1:
                raise ValueError(
                    f"groups: have {counts} points a seed; a hypervolume grows with them: give equally many"
                )

        def area(kls: np.ndarray, rewards: np.ndarray) -> float:
            return hypervolume(kls, rewards, kl_max, reward_min)

        return self._over_seeds(area, group, minus, options)

    def _rows(self, group: str) -> np.ndarray:
        if group not in self.names:
            raise ValueError(f"group {group!r}: not in this result, which has {self.names}; choose one of these")
        return np.flatnonzero(self.group == self.names.index(group))

    def _over_seeds(
        self, of_seed: Callable[[np.ndarray, np.ndarray], float], group: str, minus: str | None, options: dict[str, Any]
    ) -> Interval:
        groups = [group] if minus is None else [group, minus]
        seeds = {name: self.seeds(name) for name in groups}
        if minus is not None and seeds[group] != seeds[minus]:
            raise ValueError(f"groups: have seeds {seeds}; give both the same, so that they pair")
        if len(seeds[group]) < 2:
            raise ValueError(f"group {group!r}: runs of one seed, {seeds[group]}; an interval needs at least two")
        values = []
        for name in groups:
            points = self.points(name)
            values.append(np.array([of_seed(*pair) for pair in zip(points.kl, points.reward, strict=True)]))
        return bootstrap_mean(values[0] if minus is None else values[0] - values[1], **options)


def reward_kl_frontier(
    runs: Mapping[str, Folder | Sequence[Folder]],
    *,
    x: str = "kl/reference",
    y: str = "gold_reward",
    points: str = "end",
    average: int = 1,
) -> RewardKLFrontier:
    """Read reward against KL from run folders, {group: its run folders}; a run is told by its seed and ``kl_coef``.

    ``x`` is ``kl/reference`` or the ``kl/NAME`` of a model (``kl/sft1``, on which references can be compared), ``y``
    ``gold_reward`` or ``proxy_reward``. ``points`` are "end", what ``summary.json`` says of held-out prompts before
    (update 0) and after training, or "updates", the rows of ``metrics.jsonl``, each the mean of ``average`` consecutive
    ones (those left over at the start are dropped), on training prompts.

    Raises ValueError for a run that is unfinished, measured neither, or has the seed and coefficient of another.

        reached = reward_kl_frontier({"soup": glob("runs/soup-*"), "sft1": glob("runs/sft1-*")}, x="kl/sft1")
        reached.reward_at_kl("soup", 5.0, minus="sft1")
    """
    if points not in POINTS:
        raise ValueError(f"points={points!r}: must be {' or '.join(POINTS)}")
    if average < 1:
        raise ValueError(f"average={average}: must be at least 1")
    if not runs:
        raise ValueError("runs: none given; give {group: its run folders}")
    columns: list[list[float]] = []
    for index, (group, folders) in enumerate(runs.items()):
        known: dict[tuple[int, float], Path] = {}
        for folder in map(Path, [folders] if isinstance(folders, str | os.PathLike) else folders):
            settings = read_settings(folder / "config.yaml")
            key = (int(settings["seed"]), float(settings["kl_coef"]))
            if key in known:
                raise ValueError(
                    f"group {group!r}: {folder} has seed {key[0]} and kl_coef={key[1]:g}, as {known[key]} has; put "
                    "runs that differ in anything else into groups of their own"
                )
            known[key] = folder
            read = _ends(folder, x, y) if points == "end" else _updates(folder, x, y, average)
            columns += [[index, *key, *point] for point in read]
        if not known:
            raise ValueError(f"group {group!r}: has no run folders; give at least one")
    group, seed, kl_coef, update, kl, kl_stderr, reward, reward_stderr = np.array(columns).T
    return RewardKLFrontier(
        names=list(runs),
        x=x,
        y=y,
        group=group.astype(int),
        seed=seed.astype(int),
        kl_coef=kl_coef,
        update=update.astype(int),
        kl=kl,
        kl_stderr=kl_stderr,
        reward=reward,
        reward_stderr=reward_stderr,
        metadata={"points": points, "average": average, "runs": {g: _names(folders) for g, folders in runs.items()}},
    )


def _names(folders: Folder | Sequence[Folder]) -> list[str]:
    return [os.fspath(f) for f in ([folders] if isinstance(folders, str | os.PathLike) else folders)]


def _ends(folder: Path, x: str, y: str) -> list[tuple[float, ...]]:
    """(update, KL, its error, reward, its error) before and after training."""
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no summary.json; a run that is not finished has points='updates' only")
    summary = json.loads(path.read_text(encoding="utf-8"))
    measures = {name: value for name, value in summary.items() if isinstance(value, dict) and name != "kl"}
    measures |= {f"kl/{name}": value for name, value in summary["kl"].items()}
    _require_measured(folder, (x, y), measures)
    return [
        (update, *(measures[name][f"{when}{error}"] for name in (x, y) for error in ("", "_stderr")))
        for update, when in ((0, "before"), (summary["updates"], "after"))
    ]


def _updates(folder: Path, x: str, y: str, average: int) -> list[tuple[float, ...]]:
    """The same over the updates; the error of a mean is √(Σ se²) / n."""
    rows = read_json_lines(folder / "metrics.jsonl")
    if len(rows) < average:
        raise ValueError(f"{folder}: {len(rows)} updates, fewer than average={average}; average over fewer")
    _require_measured(folder, (x, y), rows[0])
    names = ("update", x, f"{x}_stderr", y, f"{y}_stderr")
    values = np.array([[row[name] for name in names] for row in rows], dtype=float)
    blocks = values[len(values) % average :].reshape(-1, average, len(names))
    points = blocks.mean(axis=1)
    points[:, [2, 4]] = np.sqrt((blocks[..., [2, 4]] ** 2).sum(axis=1)) / average
    points[:, 0] = blocks[:, -1, 0]
    return [tuple(point) for point in points]


def _require_measured(folder: Path, names: Sequence[str], measures: Mapping[str, Any]) -> None:
    for name in names:
        if name not in measures:
            choices = [key for key in measures if key.startswith("kl/") or "reward" in key]
            raise ValueError(f"{folder}: did not measure {name!r}; choose one of {choices}")


def non_dominated(kl: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Points that no other beats: no more KL and no less reward, one of them strictly. [N], [N] → [N] bool"""
    no_more_kl, no_less_reward = kl[:, None] <= kl, reward[:, None] >= reward  # [i, j]: is i as good as j?
    better = (kl[:, None] < kl) | (reward[:, None] > reward)
    return np.logical_not((no_more_kl & no_less_reward & better).any(axis=0))


def hypervolume(kl: np.ndarray, reward: np.ndarray, kl_max: float, reward_min: float) -> float:
    """∫ max(0, max{reward_i : kl_i ≤ k} − reward_min) dk up to kl_max. [N], [N] → nats · reward"""
    order = kl.argsort()
    edges = np.append(np.minimum(kl[order], kl_max), kl_max)
    heights = np.maximum(np.maximum.accumulate(reward[order]) - reward_min, 0)
    return float((np.diff(edges) * heights).sum())


# ── Over-optimisation ─────────────────────────────────────────────────────────────────────────────────────────────────

# The second term of R = start + α d + β · term, d = √KL
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "best_of_n": lambda d: -(d**2),
    "rl": lambda d: -xlogy(d, d),
}


@dataclass(frozen=True)
class OveroptimisationFit(Saved):
    """How a reward that is not optimised follows d = √KL (Gao et al. 2022, arXiv 2210.10760).

    best_of_n: R = start + d (α − β d)        rl: R = start + d (α − β log d)

    form          which of the two
    coefficients  [3]  α, β, start
    draws         [R, 3]  the same over resampled units
    num_units     how many of these there are
    confidence    of the intervals
    kl, reward    [N] or [S, K]  the points that were fitted
    residual_std  √(Σ residual² / (points − fitted coefficients)), in units of the reward
    """

    form: str
    coefficients: np.ndarray
    draws: np.ndarray
    num_units: int
    confidence: float
    kl: np.ndarray
    reward: np.ndarray
    residual_std: float

    @property
    def alpha(self) -> Interval:
        """α: gain per √nat at first (where d = 1, for rl)."""
        return self._interval(self.coefficients[0], self.draws[:, 0])

    @property
    def beta(self) -> Interval:
        """β: how fast the gain is lost; an interval above 0 is over-optimisation that shows."""
        return self._interval(self.coefficients[1], self.draws[:, 1])

    @property
    def start(self) -> Interval:
        """The reward at KL = 0."""
        return self._interval(self.coefficients[2], self.draws[:, 2])

    @property
    def peak_kl(self) -> Interval:
        """The KL of most reward, in nats, wherever it lies: d = α / 2β, for rl e^(α/β − 1); infinite where β ≤ 0."""
        return self._interval(self._peak(self.coefficients), self._peak(self.draws))

    def predict(self, kl: np.ndarray) -> Interval:
        """The fitted reward with pointwise limits. [M] → three of [M]"""
        columns = _design(np.asarray(kl, dtype=float), self.form)
        return self._interval(columns @ self.coefficients, self.draws @ columns.T)

    def _interval(self, estimate: Any, draws: np.ndarray) -> Interval:
        return interval(estimate, draws, num_units=self.num_units, confidence=self.confidence)

    def _peak(self, coefficients: np.ndarray) -> np.ndarray:
        alpha, beta = np.maximum(coefficients[..., 0], 0), coefficients[..., 1]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            d = alpha / (2 * beta) if self.form == "best_of_n" else np.exp(alpha / beta - 1)
            return np.where(np.isnan(beta), np.nan, np.where(beta > 0, d**2, np.inf))


def fit_overoptimisation(
    kl: np.ndarray,
    reward: np.ndarray,
    form: str = "rl",
    *,
    start: float | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> OveroptimisationFit:
    """Fit a reward, usually gold, to d = √KL by least squares, with intervals from resampled units.

    ``kl`` and ``reward`` are [N] independent points, or [S, K]: K points of each of S seeds, which are the units
    (:meth:`RewardKLFrontier.points` gives them). KL below 0, as k1 estimates may be, counts as 0. The paper measures
    the reward from that at KL = 0; here ``start`` is that reward, or else fitted with the rest.

    Raises ValueError for fewer than two units, or points that do not determine the coefficients.

        points = reached.points("soup")
        fit_overoptimisation(points.kl, points.reward).peak_kl
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: must be {' or '.join(FORMS)}")
    kl, reward = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
    if kl.shape != reward.shape or kl.ndim not in (1, 2):
        raise ValueError(f"kl, reward: shapes {kl.shape} and {reward.shape}; give both as [points] or [seeds, points]")
    if not (np.isfinite(kl).all() and np.isfinite(reward).all()):
        raise ValueError("kl, reward: NaN or infinite values; give the points that were measured")
    if len(kl) < 2:
        raise ValueError(f"kl: {len(kl)} unit; resampling needs at least two points or seeds")
    estimate = _least_squares(kl, reward, form, start)
    if np.isnan(estimate).any():
        raise ValueError(f"kl: {len(np.unique(kl))} different values do not determine the fit; give more points")
    draws = np.array(
        [
            _least_squares(kl[rows], reward[rows], form, start)
            for block in resamples(len(kl), num_resamples, seed)
            for rows in block
        ]
    )
    residuals = reward.ravel() - _design(kl.ravel(), form) @ estimate
    freedom = kl.size - (3 if start is None else 2)
    return OveroptimisationFit(
        form=form,
        coefficients=estimate,
        draws=draws,
        num_units=len(kl),
        confidence=confidence,
        kl=kl,
        reward=reward,
        residual_std=math.sqrt((residuals**2).sum() / freedom) if freedom > 0 else math.nan,
    )


def _design(kl: np.ndarray, form: str) -> np.ndarray:
    """What α, β and start are multiplied by. [M] → [M, 3]"""
    d = np.sqrt(np.maximum(kl, 0))
    return np.stack([d, FORMS[form](d), np.ones_like(d)], axis=-1)


def _least_squares(kl: np.ndarray, reward: np.ndarray, form: str, start: float | None) -> np.ndarray:
    """α, β, start; NaN where the points do not determine them. [3]"""
    columns, target = _design(kl.ravel(), form), reward.ravel()
    if start is not None:
        columns, target = columns[:, :2], target - start
    solution, _, rank, _ = np.linalg.lstsq(columns, target, rcond=None)
    if rank < columns.shape[1]:
        return np.full(3, np.nan)
    return solution if start is None else np.append(solution, start)

"""What runs reached: reading run folders, fronts and hypervolumes by hand, pairing by seed, over-optimisation fits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from analysis import OveroptimisationFit, RewardKLFrontier, fit_overoptimisation, reward_kl_frontier
from analysis.run_frontier import hypervolume, non_dominated
from rlhf.config import PPOConfig
from rlhf.evaluation import Evaluation
from rlhf.metrics import Estimate, write_json
from rlhf.summary import summarise

START = 1.0  # gold before training


def write_run(folder: Path, seed: int, kl_coef: float, kl: float, gold: float | None, updates: int = 6) -> Path:
    """A run folder as ``rlhf.ppo`` leaves it, whose policy ended at the given KL and gold reward."""
    folder.mkdir(parents=True)
    PPOConfig(seed=seed, kl_coef=kl_coef).save(folder / "config.yaml")

    def evaluation(kl: float, gold: float | None) -> Evaluation:
        rewards = {"proxy_reward": Estimate(2 * kl, 0.02)} | (
            {} if gold is None else {"gold_reward": Estimate(gold, 0.05)}
        )
        divergences = {"reference": Estimate(kl, 0.1), "sft1": Estimate(kl + 0.5, 0.1)}
        return Evaluation(rewards, divergences, Estimate(1, 0.1), Estimate(20, 1))

    before = evaluation(0.0, None if gold is None else START)
    write_json(folder / "summary.json", summarise(before, evaluation(kl, gold), updates=updates, episodes=9))
    rows = [
        {"update": u, "kl/reference": u, "kl/reference_stderr": 0.3, "proxy_reward": u**2, "proxy_reward_stderr": 0.4}
        for u in range(1, updates + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_group(root: Path, name: str, runs: dict[tuple[int, float], tuple[float, float]]) -> list[Path]:
    """Runs {(seed, β): (KL, gold)}."""
    return [write_run(root / f"{name}-{beta}-{seed}", seed, beta, *ended) for (seed, beta), ended in runs.items()]


@pytest.fixture
def reached(tmp_path: Path) -> RewardKLFrontier:
    """Two groups of two seeds and two β; gold is linear in √KL, so that interpolation is exact."""
    single = {(0, 0.4): (1, 2), (0, 0.1): (4, 3), (1, 0.4): (1, 2.5), (1, 0.1): (9, 5.5)}
    soup = {(0, 0.4): (1, 3), (0, 0.1): (4, 5), (1, 0.4): (4, 5.5), (1, 0.1): (9, 7.75)}
    return reward_kl_frontier(
        {"sft1": write_group(tmp_path, "sft1", single), "soup": write_group(tmp_path, "soup", soup)}
    )


def test_reads_both_ends_of_every_run(reached: RewardKLFrontier) -> None:
    assert (reached.x, reached.y, len(reached.kl)) == ("kl/reference", "gold_reward", 16)
    points = reached.points("soup")
    assert points.kl_coef.tolist() == [0.1, 0.1, 0.4, 0.4]
    assert points.update.tolist() == [0, 6, 0, 6]
    assert points.kl.tolist() == [[0, 4, 0, 1], [0, 9, 0, 4]]
    assert points.reward.tolist() == [[START, 5, START, 3], [START, 7.75, START, 5.5]]
    assert set(reached.kl_stderr) == {0.1}
    assert set(reached.reward_stderr) == {0.05}


def test_reads_the_updates_of_unfinished_runs_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 3, 0.1, 1, None, updates=7)
    (folder / "summary.json").unlink()
    found = reward_kl_frontier({"run": folder}, y="proxy_reward", points="updates", average=3)
    assert found.update.tolist() == [4, 7]  # the first of seven is left over
    assert found.kl.tolist() == [3, 6]
    np.testing.assert_allclose(found.reward, [(4 + 9 + 16) / 3, (25 + 36 + 49) / 3])
    np.testing.assert_allclose(found.kl_stderr, 0.3 / math.sqrt(3))
    np.testing.assert_allclose(found.reward_stderr, 0.4 / math.sqrt(3))
    assert found.seeds("run") == [3]


def test_reward_at_a_kl_is_paired_by_seed(reached: RewardKLFrontier) -> None:
    # √2.25 = 1.5. Seed 0: between (1, 2) and (4, 3), and (1, 3) and (4, 5). Seed 1: between (1, 2.5) and (9, 5.5), so
    # 2.5 + 0.5 · 3/2, and between (0, 1) and (4, 5.5), which is 1 + 1.5 · 4.5/2.
    assert reached.reward_at_kl("sft1", 2.25).estimate == pytest.approx((2.5 + 3.25) / 2)
    assert reached.reward_at_kl("soup", 2.25).estimate == pytest.approx((4 + 4.375) / 2)
    difference = reached.reward_at_kl("soup", 2.25, minus="sft1")
    # Seed by seed 1.5 and 1.125: the extremes of resampling two.
    assert difference == pytest.approx((1.3125, 1.125, 1.5))


def test_paired_intervals_cover() -> None:
    random, hits = np.random.default_rng(0), 0
    for repetition in range(100):
        # Ten seeds, what is common to both groups of a seed is ten times what is not; the truth is +0.2 at every KL.
        common, own = random.normal(size=10), 0.1 * random.normal(size=(2, 10))
        found = RewardKLFrontier(
            names=["a", "b"],
            x="kl",
            y="r",
            group=np.repeat([0, 1], 20),
            seed=np.tile(np.repeat(np.arange(10), 2), 2),
            kl_coef=np.tile([0.1, 0.2], 20),
            update=np.ones(40, dtype=int),
            kl=np.tile([4.0, 1.0], 20),
            kl_stderr=np.zeros(40),
            reward=np.repeat(common + own + np.array([[0.2], [0]]), 2) + np.tile([1.0, 0.5], 20),
            reward_stderr=np.zeros(40),
            metadata={},
        ).reward_at_kl("a", 2.0, minus="b", num_resamples=500, seed=repetition)
        hits += int(found.low <= 0.2 <= found.high)
        assert found.high - found.low < 0.4
    assert 90 <= hits <= 99


def test_front_by_hand() -> None:
    kl = np.array([1.0, 2, 3, 3, 1, 4])
    reward = np.array([1.0, 3, 2, 3, 1, 3.5])
    # (3, 2) is beaten by (2, 3); (3, 3) by (2, 3), which costs less; twins do not beat each other.
    assert non_dominated(kl, reward).tolist() == [True, True, False, False, True, True]


def test_front_of_means_over_seeds(reached: RewardKLFrontier) -> None:
    points = reached.points("soup")
    assert points.kl.mean(axis=0).tolist() == [0, 6.5, 0, 2.5]
    assert reached.front("soup").tolist() == [True] * 4


def test_hypervolume_by_hand() -> None:
    kl, reward = np.array([3.0, 1, 2, 5]), np.array([3.0, 2, 1.5, 9])
    # From KL 1 to 3 a height of 1, from 3 to 4 of 2; (2, 1.5) is dominated, and (5, 9) beyond.
    assert hypervolume(kl, reward, 4, 1) == pytest.approx(2 * 1 + 1 * 2)
    assert hypervolume(kl, reward, 4, 2.5) == pytest.approx(0.5)
    assert hypervolume(kl, reward, 0.5, 0) == 0
    assert hypervolume(kl, reward, 6, 1) == pytest.approx(2 * 1 + 2 * 2 + 1 * 8)


def test_hypervolume_by_counting_squares() -> None:
    random = np.random.default_rng(1)
    kl, reward = random.uniform(0, 10, size=(2, 30)) * [[1], [0.5]] + [[0], [-1]]
    x, y = np.meshgrid(np.linspace(0, 8, 801)[:-1] + 0.005, np.linspace(0.5, 4, 701)[:-1] + 0.0025)
    dominated = ((kl[:, None, None] <= x) & (reward[:, None, None] >= y)).any(axis=0)
    assert hypervolume(kl, reward, 8, 0.5) == pytest.approx(dominated.mean() * 8 * 3.5, rel=3e-3)


def test_hypervolume_of_groups(reached: RewardKLFrontier) -> None:
    # Seed 0 of sft1 to KL 9 above 1: 3 · 1 + 5 · 2; seed 1: 8 · 1.5. Of soup: 3 · 2 + 5 · 4; 5 · 4.5.
    assert reached.hypervolume("sft1", 9, START).estimate == pytest.approx((13 + 12) / 2)
    difference = reached.hypervolume("soup", 9, START, minus="sft1")
    assert difference == pytest.approx(((13 + 10.5) / 2, 10.5, 13))


def test_regions_are_those_of_the_seeds(reached: RewardKLFrontier) -> None:
    assert reached.ellipses("soup").shape == (4, 3)
    assert np.isnan(reached.ellipses("soup")).all()  # two seeds


# ── Over-optimisation ─────────────────────────────────────────────────────────────────────────────────────────────────

KL = np.linspace(0, 30, 40)


def gold(kl: np.ndarray, form: str, alpha: float = 1.2, beta: float = 0.35, start: float = 0.7) -> np.ndarray:
    """Gao et al.'s two laws, with the reward at KL = 0 added."""
    d = np.sqrt(kl)
    lost = beta * d if form == "best_of_n" else beta * np.log(np.where(d > 0, d, 1))
    return start + d * (alpha - lost)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_fit_returns_the_law_it_was_made_of(form: str) -> None:
    fit = fit_overoptimisation(KL, gold(KL, form), form, num_resamples=50)
    for found, made_with in ((fit.alpha, 1.2), (fit.beta, 0.35), (fit.start, 0.7)):
        np.testing.assert_allclose(found, made_with, rtol=1e-6)
    np.testing.assert_allclose(fit.predict(np.array([0.0, 7.0])).estimate, gold(np.array([0.0, 7.0]), form))
    assert fit.residual_std < 1e-9
    along = np.linspace(0, 200, 400_001)
    assert fit.peak_kl.estimate == pytest.approx(along[gold(along, form).argmax()], abs=1e-2)
    given = fit_overoptimisation(KL, gold(KL, form), form, start=0.7, num_resamples=50)
    np.testing.assert_allclose(given.coefficients, [1.2, 0.35, 0.7], rtol=1e-6)
    assert given.start == pytest.approx((0.7, 0.7, 0.7))


def test_a_peak_is_where_the_derivative_is_zero() -> None:
    # best of n: d = 1.2 / 0.7; rl: d = e^(1.2 / 0.35 − 1).
    fits = {form: fit_overoptimisation(KL, gold(KL, form), form, num_resamples=5) for form in ("best_of_n", "rl")}
    assert fits["best_of_n"].peak_kl.estimate == pytest.approx((1.2 / 0.7) ** 2)
    assert fits["rl"].peak_kl.estimate == pytest.approx(math.exp(2 * (1.2 / 0.35 - 1)))
    assert fit_overoptimisation(KL, np.sqrt(KL) + KL, "best_of_n", num_resamples=5).peak_kl.estimate == math.inf


def test_fit_intervals_cover() -> None:
    random, hits = np.random.default_rng(3), np.zeros(4)
    kl = np.tile(np.array([0.5, 1, 2, 4, 8, 16, 32]), (8, 1))
    truth = [1.2, 0.35, 0.7, (1.2 / 0.7) ** 2]
    for repetition in range(100):
        # Eight seeds with their own start, and noise at every point: seeds are what is resampled.
        noise = 0.2 * random.normal(size=(8, 1)) + 0.1 * random.normal(size=kl.shape)
        fit = fit_overoptimisation(kl, gold(kl, "best_of_n") + noise, "best_of_n", num_resamples=300, seed=repetition)
        hits += [
            x.low <= t <= x.high for x, t in zip((fit.alpha, fit.beta, fit.start, fit.peak_kl), truth, strict=True)
        ]
    assert hits.min() >= 88, hits
    assert fit.num_units == 8


def test_results_come_back_from_files(tmp_path: Path, reached: RewardKLFrontier) -> None:
    fit = fit_overoptimisation(KL, gold(KL, "rl"), num_resamples=5)
    for result, kind in ((reached, RewardKLFrontier), (fit, OveroptimisationFit)):
        loaded = kind.load(result.save(tmp_path / "result.npz"))
        for name, value in vars(result).items():
            np.testing.assert_array_equal(getattr(loaded, name), value)


def test_bad_runs_are_named(tmp_path: Path, reached: RewardKLFrontier) -> None:
    folder = write_run(tmp_path / "run", 0, 0.1, 4, None)
    twin = write_run(tmp_path / "twin", 0, 0.1, 4, 3)
    other = write_run(tmp_path / "other", 1, 0.2, 4, 3)
    for runs, options, message in (
        ({}, {}, "runs: none given"),
        ({"a": []}, {}, "group 'a': has no run folders"),
        ({"a": folder}, {"points": "all"}, "points='all': must be end or updates"),
        ({"a": folder}, {"average": 0}, "average=0: must be at least 1"),
        (
            {"a": folder},
            {},
            r"run: did not measure 'gold_reward'; choose one of \['proxy_reward', 'kl/reference', 'kl/sft1'",
        ),
        ({"a": twin}, {"x": "kl/soup"}, "twin: did not measure 'kl/soup'"),
        ({"a": twin}, {"points": "updates"}, "twin: did not measure 'gold_reward'"),
        (
            {"a": twin},
            {"y": "proxy_reward", "points": "updates", "average": 7},
            "twin: 6 updates, fewer than average=7",
        ),
        (
            {"a": [folder, twin]},
            {"y": "proxy_reward"},
            r"twin has seed 0 and kl_coef=0\.1, as .*run has; put runs that",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            reward_kl_frontier(runs, **options)
    with pytest.raises(ValueError, match=r"group 'a': no point of kl_coef=0\.2 at update 0 with seed 0"):
        reward_kl_frontier({"a": [twin, other]}).points("a")
    alone = reward_kl_frontier({"a": twin, "b": other})
    for call, message in (
        (lambda: alone.reward_at_kl("a", 2), r"group 'a': runs of one seed, \[0\]; an interval needs at least two"),
        (lambda: alone.reward_at_kl("a", 2, minus="b"), r"groups: have seeds {'a': \[0\], 'b': \[1\]}"),
        (lambda: reached.reward_at_kl("a", 2), r"group 'a': not in this result, which has \['sft1', 'soup'\]"),
        (lambda: reached.reward_at_kl("sft1", 5), "kl=5: kl/reference spans 0 to 4 nats here; nothing is extrapolated"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    (twin / "summary.json").unlink()
    with pytest.raises(
        ValueError, match=r"twin: no summary\.json; a run that is not finished has points='updates' only"
    ):
        reward_kl_frontier({"a": twin})


@pytest.mark.parametrize(
    ("kl", "reward", "options", "message"),
    [
        (KL, KL, {"form": "ppo"}, "form='ppo': must be best_of_n or rl"),
        (KL, KL[:-1], {}, r"shapes \(40,\) and \(39,\)"),
        (KL, np.full_like(KL, np.nan), {}, "kl, reward: NaN or infinite values"),
        (KL[:1], KL[:1], {}, "kl: 1 unit; resampling needs at least two"),
        (np.array([1.0, 1, 2]), np.zeros(3), {}, "kl: 2 different values do not determine the fit"),
    ],
)
def test_bad_fits_are_named(kl: np.ndarray, reward: np.ndarray, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_overoptimisation(kl, reward, **options)

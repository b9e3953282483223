"""Ideal frontiers and best-of-n, against distributions over responses that can be enumerated."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import make_tokenizer
from scipy import stats
from test_analysis_kl import LENGTH, SPECIAL, all_responses, enumerated, llama

from analysis import BestOfN, IdealFrontier, ScoredSamples, best_of_n, frontier_of_samples, ideal_frontier, tables
from analysis import frontier as module
from analysis.frontier import confidence_ellipse, interpolate_at_kl, score_samples
from rlhf.data import Prompt
from rlhf.reference import ModelReference
from rlhf.rollout import Rollout

# ── A tabular reference: 200 prompts, 40 responses to each ────────────────────────────────────────────────────────────

PROMPTS, RESPONSES = 200, 40


class Table(NamedTuple):
    """log-probabilities of the reference and of another model, proxy and gold rewards. [prompts, responses] each"""

    log_p: np.ndarray
    log_other: np.ndarray
    reward: np.ndarray
    gold: np.ndarray

    def exact(self, beta: float) -> np.ndarray:
        """E r, E gold, KL(π*‖ρ) and KL(π*‖other) under the optimum, by summing over all responses. → [4, prompts]"""
        log_optimum = self.log_p + self.reward / beta
        log_optimum -= np.log(np.exp(log_optimum).sum(axis=1, keepdims=True))
        p = np.exp(log_optimum)
        values = (self.reward, self.gold, log_optimum - self.log_p, log_optimum - self.log_other)
        return np.stack([(p * value).sum(axis=1) for value in values])

    def sample(self, random: np.random.Generator, prompts: np.ndarray, num_samples: int) -> ScoredSamples:
        """Scored samples of the reference, by inverse CDF."""
        uniforms = random.random((len(prompts), num_samples, 1))
        responses = (uniforms > np.exp(self.log_p[prompts]).cumsum(axis=1)[:, None]).sum(axis=2).clip(max=RESPONSES - 1)

        def of(values: np.ndarray) -> np.ndarray:
            return values[prompts[:, None], responses]

        return ScoredSamples.of(
            of(self.reward), {"gold_reward": of(self.gold)}, {"sft1": of(self.log_p - self.log_other)}
        )


def make_table(seed: int) -> Table:
    random = np.random.default_rng(seed)
    log_p, shift, reward, gold = random.normal(size=(4, PROMPTS, RESPONSES))
    log_p, log_other = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (log_p, log_p + 0.4 * shift))
    reward += 0.5 * random.normal(size=(PROMPTS, 1))
    return Table(log_p, log_other, reward, 0.5 * reward + gold)


TABLE = make_table(1)
BETAS = [4.0, 1.0, 0.7]
EXACT = np.stack([TABLE.exact(beta) for beta in BETAS], axis=-1)  # [4, prompts, β]


@pytest.mark.parametrize(("over", "num_prompts", "num_samples"), [("prompts", 100, 128), ("samples", 3, 600)])
def test_intervals_cover_the_exact_frontier(over: str, num_prompts: int, num_samples: int) -> None:
    hits = np.zeros(EXACT[:, 0].shape)
    for repetition in range(200):
        random = np.random.default_rng(1000 + repetition)
        prompts = random.integers(PROMPTS, size=num_prompts)
        samples = TABLE.sample(random, prompts, num_samples)
        found = frontier_of_samples(samples, kl_coefs=BETAS, over=over, num_resamples=300, seed=repetition)
        assert found.names == ["proxy_reward", "gold_reward", "kl/reference", "kl/sft1"]
        truth = (EXACT if over == "prompts" else EXACT[:, prompts]).mean(axis=1)
        limits = [found[name] for name in found.names]
        low, high = (np.array([getattr(limit, end) for limit in limits]) for end in ("low", "high"))
        hits += (low <= truth) & (truth <= high)
    # Proxy, gold, KL and KL to another model, at every β. Of 200 with probability 0.95: 190 ± 3.
    assert hits.min() >= 180, hits
    assert hits.mean() <= 195, hits


def test_intervals_are_no_longer_than_they_must() -> None:
    """Their length is that which estimates vary by when it is all repeated, prompts and samples."""
    estimates, lengths = [], []
    for repetition in range(60):
        random = np.random.default_rng(repetition)
        samples = TABLE.sample(random, random.integers(PROMPTS, size=100), 64)
        found = frontier_of_samples(samples, kl_coefs=[1.0], num_resamples=400)
        estimates.append(found.mean[:, 0])
        lengths.append([float(found[name].high[0] - found[name].low[0]) for name in found.names])
    needed = 2 * 1.96 * np.std(estimates, axis=0, ddof=1)
    np.testing.assert_allclose(np.mean(lengths, axis=0) / needed, 1, atol=0.2)


def test_the_jackknife_removes_bias() -> None:
    random = np.random.default_rng(0)
    prompts = np.repeat(np.arange(20), 400)
    samples = TABLE.sample(random, prompts, 24)
    truth = TABLE.exact(0.6)[:, prompts].mean(axis=1)
    plugged_in, _ = module._tilted_means(samples.values, 0.6, np.zeros(3))  # proxy, gold, log ratio, KL
    pseudo, _ = module._tilt(samples, 0.6, None)
    bias = abs(plugged_in.mean(axis=1)[[0, 3]] - truth[[0, 2]])
    left = abs(pseudo.mean(axis=(1, 2))[[0, 2]] - truth[[0, 2]])
    assert (bias > 0.015).all()
    assert (left < 0.35 * bias).all(), (left, bias)


def test_pseudo_values_are_those_of_leaving_each_sample_out() -> None:
    samples = TABLE.sample(np.random.default_rng(4), np.arange(3), 7)
    for beta, share in product((0.05, 1.0, math.inf), (0.0, 0.4)):

        def estimates(
            rewards: np.ndarray, gold: np.ndarray, ratio: np.ndarray, beta: float = beta, share: float = share
        ) -> np.ndarray:
            weights = np.exp(rewards / beta - share * ratio)
            log_z = math.log(weights.mean())
            weights /= weights.sum()
            to_sampled = weights @ (rewards / beta - share * ratio) - log_z
            to_other = to_sampled + weights @ ratio
            return np.array([weights @ rewards, weights @ gold, (1 - share) * to_sampled + share * to_other, to_other])

        pseudo, effective = module._tilt(samples, beta, {"sft1": share} if share else None)
        for prompt in range(3):
            values = samples.values[:, prompt]
            whole, n = estimates(*values), values.shape[1]
            expected = [n * whole - (n - 1) * estimates(*np.delete(values, i, axis=1)) for i in range(n)]
            exponents = values[0] / beta - share * values[2]
            order = np.argsort(-exponents, kind="stable")  # the module's order
            np.testing.assert_allclose(pseudo[:, prompt], np.array(expected)[order].T, rtol=1e-6, atol=1e-9)
            weights = np.exp(exponents)
            assert effective[prompt] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


def test_two_samples_by_hand() -> None:
    # Rewards 0 and ln 3 at β = 1: weights 1/4 and 3/4, Ẑ = 2.
    means, weights = module._tilted_means(np.array([[[0.0, math.log(3)]], [[8.0, 4.0]]]), 1.0, np.zeros(2))
    np.testing.assert_allclose(weights, [[0.25, 0.75]])
    np.testing.assert_allclose(means[:, 0], [0.75 * math.log(3), 5, 0.75 * math.log(3) - math.log(2)])


def test_a_mixture_is_reached_from_samples_of_another_model() -> None:
    """π* ∝ ρ₁^w ρ₂^(1−w) exp(r/β), from samples of ρ₁ with the log ratios to both."""
    prompts = np.repeat(np.arange(PROMPTS), 2)
    share, beta = 0.3, 1.0
    log_policy = (1 - share) * TABLE.log_p + share * TABLE.log_other + TABLE.reward / beta
    log_policy -= np.log(np.exp(log_policy).sum(axis=1, keepdims=True))
    policy = np.exp(log_policy)
    kls = [(policy * (log_policy - log_q)).sum(axis=1) for log_q in (TABLE.log_p, TABLE.log_other)]
    truth = [
        (policy * TABLE.reward).sum(axis=1).mean(),
        (policy * TABLE.gold).sum(axis=1).mean(),
        ((1 - share) * kls[0] + share * kls[1]).mean(),
        kls[1].mean(),
        kls[0].mean(),
    ]
    samples = TABLE.sample(np.random.default_rng(2), prompts, 4000)
    zeros = np.zeros((1, *samples.values.shape[1:]))
    samples = replace(
        samples, names=[*samples.names, "log_ratio/itself"], values=np.concatenate([samples.values, zeros])
    )
    found = frontier_of_samples(samples, mixture={"sft1": share, "itself": 1 - share}, kl_coefs=[beta], num_resamples=9)
    np.testing.assert_allclose(found.mean[:, 0], truth, atol=0.02)
    assert found.names == ["proxy_reward", "gold_reward", "kl/reference", "kl/sft1", "kl/itself"]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"sft2": 1.0}, "mixture: no log ratio to 'sft2' in the samples, which have ['sft1']"),
        ({"sft1": 0.5}, "weights {'sft1': 0.5}; must be at least 0 and sum to 1"),
    ],
)
def test_a_wrong_mixture_is_named(mixture: dict[str, float], message: str) -> None:
    samples = TABLE.sample(np.random.default_rng(2), np.arange(4), 8)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        frontier_of_samples(samples, mixture=mixture)
    assert message in str(error.value)


def test_at_infinite_beta_stands_the_reference() -> None:
    samples = TABLE.sample(np.random.default_rng(4), np.arange(30), 32)
    found = frontier_of_samples(samples, kl_coefs=[math.inf], num_resamples=50)
    expected = samples.values.mean(axis=(1, 2))
    np.testing.assert_allclose(found.mean[:, 0], [*expected[:2], 0, expected[2]], atol=1e-12)
    np.testing.assert_allclose(found.effective, 32)


def test_is_invariant_under_shift_and_scale() -> None:
    samples = TABLE.sample(np.random.default_rng(4), np.arange(30), 64)
    found = frontier_of_samples(samples, kl_coefs=[1.0], num_resamples=50)
    shifts = 1e4 * np.arange(30)[:, None]  # one for every prompt; e^(r/β) of these overflows
    moved = ScoredSamples.of(3 * samples.values[0] + shifts)
    other = frontier_of_samples(moved, kl_coefs=[3.0], num_resamples=50)
    assert other["kl/reference"].estimate == pytest.approx(found["kl/reference"].estimate, rel=1e-6)
    assert other["proxy_reward"].estimate == pytest.approx(3 * found["proxy_reward"].estimate + shifts.mean(), rel=1e-9)
    np.testing.assert_allclose(other.effective, found.effective)


def test_a_beta_too_small_is_refused_or_left_out() -> None:
    samples = TABLE.sample(np.random.default_rng(4), np.arange(30), 64)
    with pytest.raises(
        ValueError, match=r"β = 0\.1 leaves \d\.\d effective samples of 64 a prompt .* min_effective=20"
    ):
        frontier_of_samples(samples, kl_coefs=[1.0, 0.1])
    with pytest.raises(ValueError, match=r"β = 1 leaves .* min_effective=50"):
        frontier_of_samples(samples, kl_coefs=[1.0], over="samples")
    found = frontier_of_samples(samples, num_resamples=50)
    refused = found.mean_effective < 20
    assert np.isinf(found.kl_coefs[0])
    assert 3 < refused.sum() < 14
    assert np.isnan(found.mean[:, refused]).all()
    assert np.isnan(found["kl/reference"].low[refused]).all()
    assert np.isfinite(found.mean[:, ~refused]).all()
    assert (np.diff(found["kl/reference"].estimate[~refused]) > 0).all()
    np.testing.assert_allclose(found.mean_effective, stats.hmean(found.effective, axis=0))
    assert found.effective.shape == (30, 17)


@pytest.mark.parametrize(("over", "least"), [("prompts", 20), ("samples", 50)])
def test_as_many_samples_as_must_be_effective_give_the_reference_itself(over: str, least: int) -> None:
    samples = TABLE.sample(np.random.default_rng(4), np.arange(5), least)
    found = frontier_of_samples(samples, over=over, num_resamples=10)
    assert np.isfinite(found.mean[:, 0]).all()
    np.testing.assert_allclose(found["proxy_reward"].estimate[0], samples.values[0].mean())


def test_a_frontier_without_points_says_so_in_words() -> None:
    few, many = (TABLE.sample(np.random.default_rng(4), np.arange(5), n) for n in (8, 64))
    frontiers = {"soup": frontier_of_samples(many, num_resamples=10), "sft1": frontier_of_samples(few, num_resamples=9)}
    shown = tables.of_frontier("sft1", frontiers["sft1"])
    assert shown.rows == []
    assert shown.title == f"Ideal frontier of sft1: {tables.NO_POINTS}"
    assert tables.or_reason(lambda: tables.of_differences(frontiers, "gold_reward")) == (
        "No comparison at equal KL: frontier 'sft1': every β was refused, as its effective samples a prompt are too "
        "few; sample more (num_samples)."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 19}, "num_samples=19: every β would be refused, since each needs 20 effective samples"),
        ({"num_samples": 49, "over": "samples"}, "num_samples=49: every β would be refused, since each needs 50"),
        ({"min_effective": 64.5}, "num_samples=64: every β .* needs 64.5 .*; give at least 65"),
    ],
)
def test_too_few_samples_are_refused_before_any_is_drawn(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sample", pytest.fail)
    prompts = [Prompt("", [1]), Prompt("", [2])]
    with pytest.raises(ValueError, match=message):
        ideal_frontier(llama(1), TokenSum(), prompts, make_tokenizer(SPECIAL), max_new_tokens=2, **settings)


# ── At one KL ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reward_at_a_kl_is_that_of_the_exact_frontier() -> None:
    samples = TABLE.sample(np.random.default_rng(8), np.tile(np.arange(PROMPTS), 2), 256)
    found = frontier_of_samples(samples, num_resamples=200).at_kl(0.5)
    betas = np.linspace(0.7, 1.2, 501)
    kls, rewards = np.array([TABLE.exact(beta).mean(axis=1)[[2, 0]] for beta in betas]).T
    exact = np.interp(0.5, kls[::-1], rewards[::-1])
    assert found.low <= exact <= found.high
    assert found.high - found.low < 0.15


def test_frontiers_are_compared_prompt_by_prompt() -> None:
    samples = TABLE.sample(np.random.default_rng(8), np.arange(100), 128)
    better = ScoredSamples.of(samples.values[0] + 0.25, metadata=samples.metadata)
    a, b = (frontier_of_samples(s, kl_coefs=[4, 2, 1, 0.7], num_resamples=100) for s in (better, samples))
    difference = a.at_kl(0.3, minus=b)
    np.testing.assert_allclose(difference, 0.25)
    assert b.at_kl(0.3).high - b.at_kl(0.3).low > 0.1


def test_frontiers_that_are_no_pair_are_refused() -> None:
    few, many = (TABLE.sample(np.random.default_rng(8), np.arange(n), 64) for n in (20, 30))
    a, b = (frontier_of_samples(s, kl_coefs=[4, 1], num_resamples=50) for s in (few, many))
    with pytest.raises(ValueError, match=r"frontiers: of .*'num_prompts': 20.*'num_prompts': 30"):
        a.at_kl(0.1, minus=b)
    with pytest.raises(ValueError, match=r"kl=7: kl/reference spans 0\.0\d+ to 0\.\d+ nats here; nothing is extrapol"):
        a.at_kl(7)
    with pytest.raises(ValueError, match=r"measure 'kl/soup': not in this frontier, which has \['proxy_reward'"):
        a.at_kl(0.1, x="kl/soup")


def test_interpolation_is_linear_in_the_root() -> None:
    kls = np.array([4.0, 0.0, np.nan, 1.0])
    assert interpolate_at_kl(2.25, kls, 3 * np.sqrt(kls) + 1) == pytest.approx(3 * 1.5 + 1)
    assert interpolate_at_kl(0.0, kls, np.array([5.0, 2, 0, 3])) == 2
    with pytest.raises(ValueError, match=r"kl=4\.5: kl/reference spans 0 to 4 nats here"):
        interpolate_at_kl(4.5, kls, kls)
    with pytest.raises(ValueError, match="spans nothing"):
        interpolate_at_kl(1, np.array([np.nan]), np.array([1.0]))


def test_ellipse_is_the_normal_region_and_covers() -> None:
    # Independent, standard deviations 3 and 1, many units: half axes 3 and 1 times √5.99.
    width, height, angle = confidence_ellipse(np.diag([9.0, 1.0]), 10**6, 0.95)
    root = math.sqrt(stats.chi2.ppf(0.95, 2))
    assert (width, height, abs(angle) % 180) == pytest.approx((6 * root, 2 * root, 0), rel=1e-4)
    _, _, angle = confidence_ellipse(np.array([[2.0, 1.0], [1.0, 2.0]]), 50, 0.95)
    assert angle % 180 == pytest.approx(45)
    assert np.isnan(confidence_ellipse(np.eye(2), 2, 0.95)).all()
    # Five units, as seeds are few: the point (0, 0) in the axes of the ellipse.
    random, inside = np.random.default_rng(0), []
    for points in random.normal(size=(1000, 5, 2)):
        width, height, angle = confidence_ellipse(np.cov(points.T) / 5, 5, 0.95)
        turn = math.radians(angle)
        x, y = -points.mean(axis=0) @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        inside.append((2 * x / width) ** 2 + (2 * y / height) ** 2 <= 1)
    assert 0.93 <= np.mean(inside) <= 0.97


# ── Best of n ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_best_of_n_is_the_mean_over_all_sets() -> None:
    rewards = np.array([[3.0, 1, 2, 2, 0, 3], [5, 4, 3, 2, 1, 0]])
    gold = np.array([[1.0, 9, 4, 6, 7, 3], [0, 1, 2, 3, 4, 5]])
    found = best_of_n(ScoredSamples.of(rewards, {"gold_reward": gold}), [1, 2, 4, 6], num_resamples=20)
    for column, n in enumerate(found.n):
        expected = np.zeros(2)
        for row in range(2):
            for chosen in (list(c) for c in combinations(range(6), int(n))):
                best = rewards[row, chosen].max()
                ties = [gold[row, i] for i in range(6) if rewards[row, i] == best]
                expected += np.array([best, np.mean(ties)]) / math.comb(6, int(n)) / 2
        np.testing.assert_allclose(found.mean[:2, column], expected)
    np.testing.assert_allclose(
        found["kl/reference"].estimate, [0, math.log(2) - 0.5, math.log(4) - 0.75, math.log(6) - 5 / 6]
    )


def test_best_of_n_covers_the_largest_of_uniforms() -> None:
    uniforms = np.random.default_rng(2).random((200, 128))
    found = best_of_n(ScoredSamples.of(uniforms))
    assert found.n.tolist() == [1, 2, 4, 8, 16, 32, 64, 128]
    reward = found["proxy_reward"]
    exact = found.n / (found.n + 1)  # E max of n uniform numbers
    assert ((reward.low <= exact) & (exact <= reward.high)).all()
    # One standard error of the mean of the samples, √(1/12/25600), and no more.
    assert reward.high[0] - reward.low[0] == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 25_600), rel=0.2)


def test_best_of_n_refuses_what_it_cannot_tell() -> None:
    samples = ScoredSamples.of(np.arange(8.0).reshape(2, 4))
    for n in ([0], [5], []):
        with pytest.raises(ValueError, match=r"n=.*: must be from 1 to the 4 samples a prompt"):
            best_of_n(samples, n)
    with pytest.raises(ValueError, match="samples: of one prompt"):
        best_of_n(ScoredSamples.of(np.arange(4.0)[None]))


# ── Models, files, bad input ──────────────────────────────────────────────────────────────────────────────────────────


class TokenSum:
    """A reward that knows the tokens: the sum of their ids over the response, end included."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return torch.where(rollout.response_mask, rollout.response_tokens, 0).sum(dim=1).float()


def test_frontier_of_a_language_model_against_its_enumeration() -> None:
    reference, other = llama(1), llama(2)
    prompts = [[1, 3], [3, 0], [0]]
    beta = 2.0
    expected = []
    for prompt in prompts:
        log_p, log_other = enumerated(reference, prompt), enumerated(other, prompt)
        rewards = np.array([float(sum(response)) for response in all_responses()])
        log_z = math.log(np.exp(log_p + rewards / beta).sum())
        optimum = np.exp(log_p + rewards / beta - log_z)
        kl = optimum @ rewards / beta - log_z
        expected.append([optimum @ rewards, optimum @ -rewards, kl, kl + optimum @ (log_p - log_other)])
    found = ideal_frontier(
        reference,
        TokenSum(),
        [Prompt("", prompt) for prompt in prompts],
        make_tokenizer(SPECIAL),
        kl_coefs=[beta],
        over="samples",
        max_new_tokens=LENGTH,
        num_samples=3000,
        rewards={"minus": lambda rollout: -TokenSum()(rollout)},
        others={"other": ModelReference(other)},
        batch_size=2000,
        progress=False,
    )
    assert found.names == ["proxy_reward", "minus", "kl/reference", "kl/other"]
    for name, exact in zip(found.names, np.mean(expected, axis=0), strict=True):
        estimate = found[name]
        assert estimate.low[0] <= exact <= estimate.high[0], name
        assert estimate.high[0] - estimate.low[0] < 0.1 * abs(exact), name


def test_results_come_back_from_files(tmp_path: Path) -> None:
    samples = TABLE.sample(np.random.default_rng(4), np.arange(5), 8)
    results = {
        ScoredSamples: samples,
        IdealFrontier: frontier_of_samples(samples, min_effective=4, num_resamples=10),
        BestOfN: best_of_n(samples, num_resamples=10),
    }
    for kind, result in results.items():
        loaded = kind.load(result.save(tmp_path / "result.npz"))
        for name, value in vars(result).items():
            np.testing.assert_array_equal(getattr(loaded, name), value)


def test_bad_samples_are_named() -> None:
    with pytest.raises(ValueError, match=r"rewards: shape \(3, 1\); give \[prompts, samples\]"):
        ScoredSamples.of(np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"gold_reward: shape \(3, 3\), but the rewards have \(3, 2\)"):
        ScoredSamples.of(np.zeros((3, 2)), {"gold_reward": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="log_ratio/sft1: has NaN or infinite values"):
        ScoredSamples.of(np.zeros((3, 2)), None, {"sft1": np.full((3, 2), -np.inf)})
    samples = ScoredSamples.of(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="over='seeds': must be prompts or samples"):
        frontier_of_samples(samples, over="seeds")
    with pytest.raises(ValueError, match="over=prompts: 1 prompts are no sample of prompts"):
        frontier_of_samples(samples)
    with pytest.raises(ValueError, match="rewards: do not vary within any prompt"):
        frontier_of_samples(samples, over="samples")
    for kl_coefs in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"kl_coefs=.*: must be positive numbers"):
            frontier_of_samples(samples, over="samples", kl_coefs=kl_coefs)
    model, tokenizer, prompts = llama(1), make_tokenizer(SPECIAL), [Prompt("", [1])]
    with pytest.raises(ValueError, match="prompts: none given"):
        score_samples(model, TokenSum(), [], tokenizer, max_new_tokens=2)
    with pytest.raises(ValueError, match="num_samples=1: must be at least 2"):
        score_samples(model, TokenSum(), prompts, tokenizer, max_new_tokens=2, num_samples=1)
    with pytest.raises(ValueError, match="rewards: 'proxy_reward' is the name of something else"):
        score_samples(model, TokenSum(), prompts, tokenizer, max_new_tokens=2, rewards={"proxy_reward": TokenSum()})
    with pytest.raises(ValueError, match="rewards: 'sft1' is the name of something else"):
        score_samples(
            model,
            TokenSum(),
            prompts,
            tokenizer,
            max_new_tokens=2,
            rewards={"sft1": TokenSum()},
            others={"sft1": ModelReference(model)},
        )
    with pytest.raises(ValueError, match="over='runs': must be prompts or samples"):  # before anything is sampled
        ideal_frontier(model, TokenSum(), prompts, tokenizer, max_new_tokens=2, over="runs")

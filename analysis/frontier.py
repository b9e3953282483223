"""What could be reached from a reference: reward against KL of optimal policies, from samples of the reference alone.

The policy that maximises E_π[r] − β KL(π‖ρ) is π*(y|x) = ρ(y|x) exp(r(x,y)/β) / Z(x). With n samples y_i ∼ ρ(·|x) and
self-normalised weights w_i ∝ exp(r_i/β), for every prompt x,

    Ẑ = (1/n) Σ_i exp(r_i/β)      E_π*[f] ≈ Σ_i w_i f_i      KL(π*‖ρ) = E_π*[r]/β − log Z      n_eff = 1 / Σ_i w_i²

For the penalty Σ_i w_i KL(π‖ρ_i), a geometric mixture as the reference, samples of ρ serve as well: r_i/β becomes
r_i/β − Σ_j w_j log ρ/ρ_j in the weights, and the same formula gives Σ_j w_j KL(π*‖ρ_j).

Both estimates are biased by O(1/n). The jackknife over a prompt's samples, n θ − (n−1) · mean_i θ₍₋ᵢ₎, leaves O(1/n²),
and its terms n θ − (n−1) θ₍₋ᵢ₎ (Tukey's pseudo-values) are what samples are resampled by. Everything is a mean over
prompts.

The samples must contain what π* prefers: of n samples the KL cannot come out above log n, and n must grow like exp(KL)
(Chatterjee & Diaconis 2018, arXiv 1511.01437). A β that concentrates the weights on few samples is refused by n_eff;
a mode of π* that is in no sample goes unseen by it.

Best-of-n is the other policy that samples alone tell of (Gao et al. 2022, arXiv 2210.10760).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import f as f_distribution
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.bootstrap import Interval, interval, mean_draws
from analysis.results import Saved
from rlhf.data import Prompt
from rlhf.evaluation import compare
from rlhf.models import evaluating
from rlhf.randomness import generator
from rlhf.reference import Source, load_model_reference
from rlhf.rewards import Reward
from rlhf.rollout import sample

REWARD, KL, LOG_RATIO = "proxy_reward", "kl/reference", "log_ratio/"
# Effective samples a prompt (harmonic mean) below which 95 % intervals cover less than about 90 %: measured on tables
# of responses with normal and heavier-tailed rewards. The bias that the jackknife leaves, O(1/n_eff²), counts for more
# where the prompts are given, since the intervals are shorter.
MIN_EFFECTIVE = {"prompts": 20.0, "samples": 50.0}
NUM_SAMPLES = 64


# ── Samples of the reference ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ScoredSamples(Saved):
    """n responses of the reference ρ to each of P prompts, scored in Q ways. All there is to know for this module.

    names     Q names: ``proxy_reward`` first, the reward r to be optimised; others, such as ``gold_reward``, in their
              own units; ``log_ratio/NAME``, log ρ(y|x) − log NAME(y|x) of the whole response, in nats
    values    [Q, P, n]
    metadata  how they were sampled
    """

    names: list[str]
    values: np.ndarray
    metadata: dict[str, Any]

    @classmethod
    def of(
        cls,
        rewards: np.ndarray,
        others: Mapping[str, np.ndarray] | None = None,
        log_ratios: Mapping[str, np.ndarray] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ScoredSamples:
        """From arrays [P, n]: the reward to be optimised, others to be measured, and log ratios to other models.

        Raises ValueError for arrays of other shapes, fewer than two samples a prompt, or values that are not finite.
        """
        named = {REWARD: rewards, **(others or {})}
        named |= {f"{LOG_RATIO}{name}": values for name, values in (log_ratios or {}).items()}
        arrays = {name: np.asarray(values, dtype=float) for name, values in named.items()}
        shape = arrays[REWARD].shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise ValueError(f"rewards: shape {shape}; give [prompts, samples] with at least two samples a prompt")
        for name, values in arrays.items():
            if values.shape != shape:
                raise ValueError(
                    f"{name}: shape {values.shape}, but the rewards have {shape}; give one number a sample"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: has NaN or infinite values; give finite ones")
        return cls(list(arrays), np.stack(list(arrays.values())), dict(metadata or {}))


def score_samples(
    reference: str | os.PathLike[str] | PreTrainedModel,
    reward: Reward,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    num_samples: int = NUM_SAMPLES,
    rewards: Mapping[str, Reward] | None = None,
    others: Mapping[str, Source] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = 256,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> ScoredSamples:
    """Sample ``num_samples`` responses of at most ``max_new_tokens`` tokens to every prompt, and score them.

    ``reference`` is a folder, a merge recipe or a model; ``reward`` what is to be optimised, without the penalties that
    PPO adds to it (for a missing end, say); ``rewards`` are only measured, such as {"gold_reward": gold}; ``others``
    are models that the KL is wanted to as well. ``batch_size`` bounds how many responses to a prompt are handled at
    once. Two references sampled with the same seed share their random numbers, prompt by prompt.
    """
    if not prompts:
        raise ValueError("prompts: none given; give at least one prompt")
    if num_samples < 2:
        raise ValueError(f"num_samples={num_samples}: must be at least 2, and better 64 or more")
    for name in rewards or {}:
        if name == REWARD or name.startswith(LOG_RATIO) or name in (others or {}):
            raise ValueError(f"rewards: {name!r} is the name of something else; choose another")
    if others and REWARD in others:
        raise ValueError(f"others: {REWARD!r} is the name of the reward; choose another")
    model = (
        reference
        if isinstance(reference, PreTrainedModel)
        else load_model_reference([os.fspath(reference)], device=device).model
    )
    scorers = {REWARD: reward, **(rewards or {})}
    arrays = {name: np.empty((len(prompts), num_samples)) for name in (*scorers, *(others or {}))}
    bar = tqdm(prompts, "samples of the reference", disable=not progress)
    with evaluating(model), bar:
        for row, prompt in enumerate(bar):
            rollout = sample(
                model,
                tokenizer,
                [prompt] * num_samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator(seed, "frontier", row),
                batch_size=batch_size,
            )
            for name, score in scorers.items():
                arrays[name][row] = score(rollout).cpu()
            if others:
                compared = compare(model, rollout, others, temperature=temperature, batch_size=batch_size)
                for name, logprobs in compared.other_logprobs.items():
                    arrays[name][row] = (compared.logprobs - logprobs).double().sum(dim=1).cpu()
    measured = {name: arrays[name] for name in rewards or {}}
    log_ratios = {name: arrays[name] for name in others or {}}
    metadata = {
        "prompts": hashlib.sha256(repr([prompt.token_ids for prompt in prompts]).encode()).hexdigest()[:12],
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    return ScoredSamples.of(arrays[REWARD], measured, log_ratios, metadata)


# ── Frontiers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SampledFrontier(Saved):
    """C policies that samples of a reference tell of, measured in Q ways; every number a mean over prompts.

    names       Q names: ``proxy_reward``, the other rewards, ``kl/reference`` and ``kl/NAME``, nats per response
    mean        [Q, C]
    draws       [R, Q, C]  the same over resampled prompts or samples
    num_units   how many of these there are
    confidence  of the intervals
    metadata    how samples and resamples were drawn
    """

    names: list[str]
    mean: np.ndarray
    draws: np.ndarray
    num_units: int
    confidence: float
    metadata: dict[str, Any]

    def __getitem__(self, name: str) -> Interval:
        """Estimate and limits of one measure at all C policies, [C] each; NaN where refused."""
        row = self._row(name)
        return interval(self.mean[row], self.draws[:, row], num_units=self.num_units, confidence=self.confidence)

    def at_kl(self, kl: float, y: str = REWARD, x: str = KL, *, minus: SampledFrontier | None = None) -> Interval:
        """A measure at a KL: linear in √KL between policies; with ``minus``, how much more than on that frontier.

        Two frontiers over the same prompts, seed and resamples are compared pair by pair: what a prompt adds to both
        cancels. ``x`` is the KL that is matched; to compare references, choose one model for both, ``kl/sft1`` say: of
        ``proxy_reward``, that model's own frontier is the highest there is, and others show what it costs to start
        elsewhere; of a reward that is not optimised, either may be.

        Raises ValueError outside the KL that a frontier spans, and for frontiers that are no pair.
        """
        frontiers = [self] if minus is None else [self, minus]
        if minus is not None and self._pairing() != minus._pairing():
            raise ValueError(
                f"frontiers: of {self._pairing()} and {minus._pairing()}; compare those over the same prompts, with "
                "the same seed and number of resamples"
            )
        estimates, draws = [], []
        for frontier in frontiers:
            rows = [frontier._row(name) for name in (x, y)]
            xs, ys = frontier.mean[rows]
            estimates.append(interpolate_at_kl(kl, xs, ys, name=x))
            kept = ~np.isnan(xs)
            draws.append(np.array([_along_root(kl, *pair[:, kept]) for pair in frontier.draws[:, rows]]))
        return interval(
            _difference(estimates), _difference(draws), num_units=self.num_units, confidence=self.confidence
        )

    def ellipses(self, y: str = REWARD, x: str = KL) -> np.ndarray:
        """Joint confidence regions of (x, y): width, height in their units, angle in degrees. [C, 3]"""
        pairs = self.draws[:, [self._row(x), self._row(y)]]
        return np.array(
            [
                confidence_ellipse(np.cov(pairs[..., c].T), self.num_units, self.confidence)
                for c in range(pairs.shape[2])
            ]
        )

    def _row(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"measure {name!r}: not in this frontier, which has {self.names}; choose one of these")
        return self.names.index(name)

    def _pairing(self) -> dict[str, Any]:
        names = ("prompts", "num_prompts", "over", "bootstrap_seed")
        return {name: self.metadata.get(name) for name in names} | {"num_resamples": len(self.draws)}


@dataclass(frozen=True)
class IdealFrontier(SampledFrontier):
    """The optima of max E[r] − β KL(π‖ρ) at C coefficients β; see the module.

    kl_coefs   [C]  β, reward per nat; infinite: the reference itself
    effective  [P, C]  effective samples n_eff of every prompt
    """

    kl_coefs: np.ndarray
    effective: np.ndarray

    @property
    def mean_effective(self) -> np.ndarray:
        """Harmonic mean of n_eff over prompts, by which a β is accepted or refused. [C]"""
        return harmonic_mean(self.effective)


@dataclass(frozen=True)
class BestOfN(SampledFrontier):
    """Best-of-n policies: of n responses, the one of the highest reward. ``kl/reference`` is a bound from above.

    n  [C]
    """

    n: np.ndarray


def ideal_frontier(
    reference: str | os.PathLike[str] | PreTrainedModel,
    reward: Reward,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mixture: Mapping[str, float] | None = None,
    kl_coefs: Sequence[float] | None = None,
    min_effective: float | None = None,
    over: str = "prompts",
    num_resamples: int = 2000,
    confidence: float = 0.95,
    **sampling: Any,
) -> IdealFrontier:
    """The reward–KL frontier that exact optimisation would reach from a reference, before any training.

    Samples the reference (:func:`score_samples` has the other arguments, ``max_new_tokens`` among them) and reads the
    frontier off the samples (:func:`frontier_of_samples`). Keep the samples by calling the two yourself.

        soup, sft1 = (ideal_frontier(folder, reward, prompts, tokenizer, max_new_tokens=32, others={"sft1": model})
                      for folder in ("soup", "sft1"))
        soup.at_kl(2.0, x="kl/sft1", minus=sft1)  # more reward at 2 nats from sft1?
    """
    _require_settings(kl_coefs, over, len(prompts))
    _require_mixture(mixture, [f"{LOG_RATIO}{name}" for name in sampling.get("others") or {}])
    if reason := too_few_samples(sampling.get("num_samples", NUM_SAMPLES), over, min_effective):
        raise ValueError(f"num_samples={sampling.get('num_samples', NUM_SAMPLES)}: {reason}")
    samples = score_samples(reference, reward, prompts, tokenizer, **sampling)
    return frontier_of_samples(
        samples,
        mixture=mixture,
        kl_coefs=kl_coefs,
        min_effective=min_effective,
        over=over,
        num_resamples=num_resamples,
        confidence=confidence,
    )


def frontier_of_samples(
    samples: ScoredSamples,
    *,
    mixture: Mapping[str, float] | None = None,
    kl_coefs: Sequence[float] | None = None,
    min_effective: float | None = None,
    over: str = "prompts",
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> IdealFrontier:
    """The ideal frontier from scored samples; estimators, their bias and its removal: see the module.

    With ``mixture``, {NAME: w_i} of the samples' ``log_ratio/NAME`` with weights of sum 1, that of the penalty
    Σ_i w_i KL(π‖ρ_i) instead, which ``kl/reference`` then is; samples of a model between the ρ_i, their soup say, waste
    the least.

    ``kl_coefs`` are β; one whose effective sample size (harmonic mean over prompts, which the first-order bias is
    inversely proportional to) is below ``min_effective`` (20; for ``over="samples"`` 50) is refused by ValueError.
    Without them, β = ∞ and s · 2^(2−k/2) for k = 0 … 15, s the standard deviation of the rewards within prompts; those
    that are refused become NaN.

    ``over`` says what the intervals speak of. "prompts": the population that the prompts were drawn from; resampled
    prompts bring their samples along, whose noise is thereby counted once. "samples": these very prompts; samples are
    resampled within them (by their pseudo-values).
    """
    num_prompts, num_samples = samples.values.shape[1:]
    _require_settings(kl_coefs, over, num_prompts)
    _require_mixture(mixture, samples.names)
    least = MIN_EFFECTIVE[over] if min_effective is None else min_effective
    coefficients = np.array(_default_kl_coefs(samples.values[0]) if kl_coefs is None else kl_coefs, dtype=float)
    names = _names_along(samples)
    means = np.full((len(names), len(coefficients)), np.nan)
    draws = np.full((num_resamples, *means.shape), np.nan)
    effective = np.empty((num_prompts, len(coefficients)))
    for column, beta in enumerate(coefficients):
        pseudo, effective[:, column] = _tilt(samples, beta, mixture)
        mean_effective = float(harmonic_mean(effective[:, column]))
        if mean_effective >= least * (1 - 1e-9):  # n samples of equal weights are n effective ones but for rounding
            means[:, column] = pseudo.mean(axis=(1, 2))
            draws[:, :, column] = _resampled(pseudo, over, num_resamples, seed)
        elif kl_coefs is not None:
            raise ValueError(
                f"kl_coefs: β = {beta:g} leaves {mean_effective:.1f} effective samples of {num_samples} a prompt "
                f"(harmonic mean), fewer than min_effective={least:g}; raise β, or sample more"
            )
    metadata = samples.metadata | {
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "min_effective": least,
        "over": over,
        "bootstrap_seed": seed,
        "mixture": None if mixture is None else dict(mixture),
    }
    return IdealFrontier(
        names=names,
        mean=means,
        draws=draws,
        num_units=num_prompts if over == "prompts" else num_samples,
        confidence=confidence,
        metadata=metadata,
        kl_coefs=coefficients,
        effective=effective,
    )


def best_of_n(
    samples: ScoredSamples,
    n: Sequence[int] | None = None,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BestOfN:
    """Rewards of the best of n responses, without bias from N ≥ n samples a prompt; intervals over prompts.

    E[r of the best] = Σ_i C(i−1, n−1) / C(N, n) · r₍ᵢ₎, r₍ᵢ₎ the i-th smallest: the mean over all sets of n of the N.
    Other rewards are those of the response that is best by ``proxy_reward``, one of them at random where
    several are. KL(best-of-n ‖ ρ) ≤ log n − (n − 1)/n, with equality in the limit of many equally unlikely responses
    (Beirami et al. 2024, arXiv 2401.01879). Without ``n``: 1, 2, 4, … up to N.

    Raises ValueError for n outside 1 … N, and for a single prompt.
    """
    num_prompts, num_samples = samples.values.shape[1:]
    sizes = [2**k for k in range(int(math.log2(num_samples)) + 1)] if n is None else list(n)
    if not sizes or min(sizes) < 1 or max(sizes) > num_samples:
        raise ValueError(f"n={sizes}: must be from 1 to the {num_samples} samples a prompt")
    if num_prompts < 2:
        raise ValueError("samples: of one prompt, which is no sample of prompts; give more prompts")
    rewards = [row for row, name in enumerate(samples.names) if not name.startswith(LOG_RATIO)]
    order = samples.values[0].argsort(axis=1)
    ordered = np.take_along_axis(samples.values[rewards], order[None], axis=2)
    for row in range(1, len(rewards)):
        ordered[row] = _mean_over_ties(ordered[0], ordered[row])
    weights = np.stack([_best_of_n_weights(num_samples, size) for size in sizes], axis=1)  # [N, C]
    bounds = np.broadcast_to([math.log(size) - (size - 1) / size for size in sizes], (1, num_prompts, len(sizes)))
    per_prompt = np.concatenate([ordered @ weights, bounds])
    metadata = samples.metadata | {
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "over": "prompts",
        "bootstrap_seed": seed,
    }
    return BestOfN(
        names=[*(samples.names[row] for row in rewards), KL],
        mean=per_prompt.mean(axis=1),
        draws=mean_draws(per_prompt.swapaxes(0, 1), num_resamples, seed),
        num_units=num_prompts,
        confidence=confidence,
        metadata=metadata,
        n=np.array(sizes),
    )


def too_few_samples(num_samples: int, over: str = "prompts", min_effective: float | None = None) -> str | None:
    """Why so many samples a prompt cannot give one point of a frontier; None where they may."""
    least = MIN_EFFECTIVE[over] if min_effective is None else min_effective
    if num_samples >= least:
        return None
    return (
        f"every β would be refused, since each needs {least:g} effective samples a prompt, and there are never more "
        f"than samples; give at least {math.ceil(least)}, better several times as many"
    )


def _require_settings(kl_coefs: Sequence[float] | None, over: str, num_prompts: int) -> None:
    if over not in MIN_EFFECTIVE:
        raise ValueError(f"over={over!r}: must be {' or '.join(MIN_EFFECTIVE)}")
    if over == "prompts" and num_prompts < 2:
        raise ValueError(f"over=prompts: {num_prompts} prompts are no sample of prompts; give more, or over='samples'")
    if kl_coefs is not None and not (len(kl_coefs) and all(beta > 0 for beta in kl_coefs)):
        raise ValueError(f"kl_coefs={list(kl_coefs)}: must be positive numbers, at least one")


def _require_mixture(mixture: Mapping[str, float] | None, names: Sequence[str]) -> None:
    known = [name.removeprefix(LOG_RATIO) for name in names if name.startswith(LOG_RATIO)]
    for name in mixture or {}:
        if name not in known:
            raise ValueError(
                f"mixture: no log ratio to {name!r} in the samples, which have {known}; sample with others"
            )
    if mixture is not None and not (all(w >= 0 for w in mixture.values()) and math.isclose(sum(mixture.values()), 1)):
        raise ValueError(f"mixture: weights {dict(mixture)}; must be at least 0 and sum to 1")


def _resampled(pseudo: np.ndarray, over: str, num_resamples: int, seed: int) -> np.ndarray:
    """Means of pseudo-values over resampled prompts, or over samples resampled within prompts. [Q, P, n] → [R, Q]"""
    if over == "prompts":
        return mean_draws(pseudo.mean(axis=2).T, num_resamples, seed)
    num_prompts = pseudo.shape[1]
    # Prompts have seeds of their own, for their samples are independent of each other.
    within = [mean_draws(pseudo[:, p].T, num_resamples, seed * num_prompts + p) for p in range(num_prompts)]
    return np.mean(within, axis=0)


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis. [P, ...] → [...]"""
    return 1 / np.mean(1 / values, axis=0)


def _default_kl_coefs(rewards: np.ndarray) -> list[float]:
    scale = math.sqrt(rewards.var(axis=1, ddof=1).mean())
    if scale == 0:
        raise ValueError("rewards: do not vary within any prompt; no policy gains anything there")
    return [math.inf, *(scale * 2 ** (2 - k / 2) for k in range(16))]


def _names_along(samples: ScoredSamples) -> list[str]:
    """Names of what :func:`_tilt` gives: the rewards, then the KLs."""
    rewards = [name for name in samples.names if not name.startswith(LOG_RATIO)]
    others = [f"kl/{name.removeprefix(LOG_RATIO)}" for name in samples.names if name.startswith(LOG_RATIO)]
    return [*rewards, KL, *others]


def _tilt(samples: ScoredSamples, beta: float, mixture: Mapping[str, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-values of all measures under π*_β, and effective samples. → [Q, P, n], [P]

    θ₍₋ᵢ₎ comes from sums without sample i: S − s_i, but for the largest weight, beside which the rest may vanish, and
    whose rest is added up by itself.
    """
    shares = np.array([(mixture or {}).get(name.removeprefix(LOG_RATIO), 0.0) for name in samples.names])
    shares *= [name.startswith(LOG_RATIO) for name in samples.names]
    # The best sample of every prompt first; the order of samples does not matter otherwise.
    order = (-_exponents(samples.values, beta, shares)).argsort(axis=1, kind="stable")
    values = np.take_along_axis(samples.values, order[None], axis=2)
    num_samples = values.shape[2]
    whole, weights = _tilted_means(values, beta, shares)
    without_best, _ = _tilted_means(values[:, :, 1:], beta, shares)

    best = _exponents(values[:, :, :1], beta, shares)
    expectations = whole[:-1, :, None]  # of the Q values themselves, [Q, P, 1]
    rest = 1 - weights[:, 1:]
    others = (expectations - weights[:, 1:] * values[:, :, 1:]) / rest  # [Q, P, n−1]
    # log Ẑ − the largest exponent, whole and without one
    log_z = expectations[0] / beta - best - whole[-1][:, None]
    log_z_others = log_z + np.log(rest * num_samples / (num_samples - 1))
    kl_others = others[0] / beta - best - log_z_others
    left_out = np.concatenate([without_best[:, :, None], np.concatenate([others, kl_others[None]])], axis=2)
    pseudo = num_samples * whole[:, :, None] - (num_samples - 1) * left_out

    rewards = [row for row, name in enumerate(samples.names) if not name.startswith(LOG_RATIO)]
    ratios = [row for row, name in enumerate(samples.names) if name.startswith(LOG_RATIO)]
    kl = pseudo[-1:]
    # KL(π*‖other) = KL(π*‖ρ) + E_π*[log ρ − log other], and KL(π*‖ρ) = Σ_i w_i KL(π*‖ρ_i) − E_π*[Σ_i w_i log ρ/ρ_i]
    kl_to_sampled = kl - np.tensordot(shares, pseudo[:-1], axes=1)
    return np.concatenate([pseudo[rewards], kl, kl_to_sampled + pseudo[ratios]]), 1 / (weights**2).sum(axis=1)


def _exponents(values: np.ndarray, beta: float, shares: np.ndarray) -> np.ndarray:
    """log π*(y)/ρ(y) up to a constant: r/β − Σ_i w_i log ρ(y)/ρ_i(y). [Q, P, n], [Q] → [P, n]"""
    return values[0] / beta - np.tensordot(shares, values, axes=1)


def _tilted_means(values: np.ndarray, beta: float, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E_π*[value] of Q values, and Σ_i w_i KL(π*‖ρ_i) after them, as plugged in; weights. → [Q + 1, P], [P, n]"""
    exponents = _exponents(values, beta, shares)
    best = exponents.max(axis=1, keepdims=True)
    tilted = np.exp(exponents - best)
    total = tilted.sum(axis=1, keepdims=True)
    weights = tilted / total
    means = (weights * values).sum(axis=2)
    kl = means[0] / beta - best[:, 0] - np.log(total[:, 0] / values.shape[2])
    return np.concatenate([means, kl[None]]), weights


def _best_of_n_weights(num_samples: int, n: int) -> np.ndarray:
    """C(i−1, n−1) / C(N, n) for i = 1 … N: how often the i-th smallest is the largest of n. [N]"""
    below = np.arange(n - 1, num_samples)  # i − 1 ≥ n − 1

    def log_binomial(of: Any, take: int) -> Any:
        return gammaln(of + 1) - gammaln(take + 1) - gammaln(of - take + 1)

    weights = np.zeros(num_samples)
    weights[below] = np.exp(log_binomial(below, n - 1) - log_binomial(num_samples, n))
    return weights


def _mean_over_ties(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values, those of equal ``ordered`` (sorted along rows) replaced by their mean. [P, N], [P, N] → [P, N]"""
    starts = np.concatenate([np.ones((len(ordered), 1), dtype=bool), np.diff(ordered, axis=1) != 0], axis=1)
    group = starts.ravel().cumsum() - 1
    means = np.bincount(group, values.ravel()) / np.bincount(group)
    return means[group].reshape(values.shape)


# ── Points and curves ─────────────────────────────────────────────────────────────────────────────────────────────────


def interpolate_at_kl(kl: float, xs: np.ndarray, ys: np.ndarray, *, name: str = KL) -> float:
    """y at a KL between points (x, y), linear in √KL, in which y is nearly linear; points that are NaN are left out.

    Raises ValueError outside the points: nothing is extrapolated.
    """
    kept = ~np.isnan(xs)
    xs, ys = xs[kept], ys[kept]
    if len(np.unique(xs)) < 2 or not xs.min() <= kl <= xs.max():
        span = f"{xs.min():.4g} to {xs.max():.4g}" if len(xs) else "nothing"
        raise ValueError(f"kl={kl:g}: {name} spans {span} nats here; nothing is extrapolated: choose a KL inside")
    return float(_along_root(kl, xs, ys))


def _along_root(kl: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Linear in √KL through sorted points, the outer segments extended: resampled ends lie here and there."""
    roots, first = np.unique(np.sqrt(np.maximum(xs, 0)), return_index=True)
    values = ys[first]
    i = np.clip(np.searchsorted(roots, math.sqrt(max(kl, 0))) - 1, 0, len(roots) - 2)
    share = (math.sqrt(max(kl, 0)) - roots[i]) / (roots[i + 1] - roots[i])
    return float(values[i] + share * (values[i + 1] - values[i]))


def _difference(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else values[0] - values[1]


def confidence_ellipse(covariance: np.ndarray, num_units: int, confidence: float) -> np.ndarray:
    """Width, height and angle in degrees of a mean's joint confidence region in the plane. [2, 2] → [3]

    The region is d'Σ⁻¹d ≤ 2(n−1)/(n−2) · F, F the quantile of the F distribution with 2 and n − 2 degrees of freedom
    (Hotelling), Σ the covariance of the mean of n units. NaN for fewer than three units.
    """
    if num_units < 3 or not np.isfinite(covariance).all():
        return np.full(3, np.nan)
    values, vectors = np.linalg.eigh(covariance)
    quantile = 2 * (num_units - 1) / (num_units - 2) * f_distribution.ppf(confidence, 2, num_units - 2)
    height, width = 2 * np.sqrt(quantile * np.maximum(values, 0))
    return np.array([width, height, math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))])

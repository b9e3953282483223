"""KL divergence between language models: per-token estimators, and the controllers of its coefficient.

With r_t = log π(y_t|s_t) − log ρ(y_t|s_t) on responses y sampled from π, KL(π‖ρ) = E_π[Σ_t r_t] in nats per response.
Every estimator here returns one value per token, [B, T]; sum it over a response's mask and average over responses.

========  =====================  ============================================================================
k1        r                      unbiased; single values can be negative; high variance
k2        ½ r²                   biased by O(KL^{3/2}); ≥ 0
k3        e^{−r} − 1 + r         unbiased where supp ρ ⊆ supp π (a softmax is; top-k is not); ≥ 0; heavy tail
exact     Σ_v π_v log(π_v/ρ_v)   unbiased; ≥ 0; variance never above k1's (Rao–Blackwell); needs both full distributions
========  =====================  ============================================================================

k1 to k3: Schulman 2020, http://joschu.net/blog/kl-approx.html. exact: Amini, Vieira, Cotterell 2025, arXiv 2504.10637.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.masking import masked_sum


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r = log π(y) − log ρ(y) per token. [B, T], [B, T] → [B, T]"""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ r² per token. [B, T], [B, T] → [B, T]"""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^{−r} − 1 + r per token. [B, T], [B, T] → [B, T]"""
    log_ratio = logprobs - ref_logprobs
    return torch.expm1(-log_ratio) + log_ratio


def exact(log_distributions: Tensor, ref_log_distributions: Tensor) -> Tensor:
    """Σ_v π_v (log π_v − log ρ_v) per position. [B, T, V], [B, T, V] (log-softmax outputs) → [B, T]

    A token with π_v = 0 contributes 0, also where log ρ_v = −∞.
    """
    terms = log_distributions.exp() * (log_distributions - ref_log_distributions)
    return torch.where(log_distributions == -torch.inf, 0.0, terms).sum(-1)


def entropy(log_distributions: Tensor) -> Tensor:
    """−Σ_v π_v log π_v per position, in nats. [B, T, V] → [B, T]"""
    return -torch.where(log_distributions == -torch.inf, 0.0, log_distributions.exp() * log_distributions).sum(-1)


def per_response(token_values: Tensor, mask: Tensor) -> Tensor:
    """Sum over each response's tokens: nats per token → nats per response. [B, T], [B, T] → [B]"""
    return masked_sum(token_values, mask, dim=1)


class FixedKL:
    """A KL coefficient that stays what it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_episodes: int) -> None:
        """Nothing to adapt; here so that both controllers are used alike."""


class AdaptiveKL(FixedKL):
    """Proportional control of the coefficient towards a target KL (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

    error = clip(KL / target − 1, −0.2, 0.2);  coef ← coef · (1 + error · n / horizon)

    ``target`` is in nats per response, ``horizon`` in episodes, n is the number of episodes since the last call.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_episodes / self.horizon

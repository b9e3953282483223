"""KL divergence between language models, token by token.

With r_t = log π(y_t|s_t) − log ρ(y_t|s_t) on responses y sampled from π, KL(π‖ρ) = E_π[Σ_t r_t] in nats per response.
Every estimator here returns one value per token; sum it over a response's tokens and average over responses.

========  =====================  ============================================================================
k1        r                      unbiased; single values can be negative; high variance
k2        ½ r²                   biased by O(KL^{3/2}); ≥ 0
k3        e^{−r} − 1 + r         unbiased where supp ρ ⊆ supp π (a softmax is; top-k is not); ≥ 0; heavy tail
exact     Σ_v π_v log(π_v/ρ_v)   unbiased; ≥ 0; variance never above k1's (Rao–Blackwell); needs both full distributions
========  =====================  ============================================================================

k1 to k3: Schulman 2020, http://joschu.net/blog/kl-approx.html. exact: Amini, Vieira, Cotterell 2025, arXiv 2504.10637.

An estimator's value and what it does as a penalty are two matters. The policy gradient of E_π[Σ_t KL_t] has a part
through later states (reward) and a part through π(·|s_t) itself (loss):

========  ==================================================  ======================================================
          as a reward, −β·value at token t                    as a loss, +β·value, differentiated on sampled tokens
========  ==================================================  ======================================================
k1        both parts, unbiased                                expectation 0: no penalty at all (refused)
k2        biased value, and the part through π is missing     the part through π, unbiased; later states are ignored
k3        the part through π is wrong                         the gradient of KL(ρ‖π); later states are ignored
exact     the part through later states only                  the part through π, unbiased; later states are ignored
========  ==================================================  ======================================================

So ``exact`` in reward and loss together is the whole gradient, with less variance than k1 in the reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.logprobs import Distributions, chunks, gather_logprobs
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


class Comparison(NamedTuple):
    """A policy beside other models at response tokens: N packed ones [N], or a rollout's [B, T], 0 outside the mask.

    logprobs and entropy of the policy; other_logprobs log ρ(y|s) and exact KL(π‖ρ), by name of the other model; nats
    """

    logprobs: Tensor
    entropy: Tensor
    other_logprobs: dict[str, Tensor]
    kl: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of it under one set of names."""
        others = {f"logprobs/{name}": values for name, values in self.other_logprobs.items()}
        others |= {f"kl/{name}": values for name, values in self.kl.items()}
        return {"logprobs": self.logprobs, "entropy": self.entropy} | others

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], others: Iterable[str]) -> Comparison:
        """The inverse of :meth:`tensors`; ``others`` are the names of the other models."""
        names = list(others)
        return cls(
            tensors["logprobs"],
            tensors["entropy"],
            {name: tensors[f"logprobs/{name}"] for name in names},
            {name: tensors[f"kl/{name}"] for name in names},
        )


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p_v x_v, 0 where p_v is; in one pass over the vocabulary unless a token is impossible. [n, V] → [n]"""
    with torch.autocast(p.device.type, enabled=False):  # which would take this product in 16 bits
        sums = torch.linalg.vecdot(p, values)
    return sums if bool(sums.isfinite().all()) else torch.where(p == 0, 0.0, p * values).sum(-1)


@torch.no_grad()
def compare(policy: Distributions, others: Mapping[str, Distributions], tokens: Tensor, vocab_size: int) -> Comparison:
    """Measure a policy against other models at the response tokens [N], a few positions at a time."""
    parts: list[list[Tensor]] = []
    for rows in chunks(len(tokens), vocab_size, tokens.device):
        log_p = policy.rows(rows)
        p = log_p.exp()
        row = [gather_logprobs(log_p, tokens[rows]), -_expectation(p, log_p)]
        for other in others.values():
            log_q = other.rows(rows)
            row += [gather_logprobs(log_q, tokens[rows]), _expectation(p, log_p - log_q)]
        parts.append(row)
    logprobs, entropies, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return Comparison(
        logprobs, entropies, dict(zip(others, rest[::2], strict=True)), dict(zip(others, rest[1::2], strict=True))
    )

"""What a model is worth on held-out data: rewards, distance from other models, entropy, length, loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf import kl
from rlhf.data import Example, batch_examples
from rlhf.masking import masked_sum
from rlhf.metrics import Estimate, per_prompt_estimate, ratio_estimate
from rlhf.models import gather_logprobs, response_log_distributions
from rlhf.reference import Reference
from rlhf.rollout import Rollout


@dataclass(frozen=True)
class Evaluation:
    """Estimates over the responses of one rollout.

    Standard errors take prompts as the independent units (see :func:`rlhf.metrics.per_prompt_estimate`).

    rewards          by name; in the reward's own units, mean over responses
    kl               by name of the other model; exact KL(policy ‖ other), nats per response, mean over responses
    entropy          exact, nats per token, mean over all response tokens
    response_length  tokens per response, end-of-sequence included
    """

    rewards: dict[str, Estimate]
    kl: dict[str, Estimate]
    entropy: Estimate
    response_length: Estimate

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``dataclasses.asdict`` followed by JSON, which turns estimates into lists."""
        return cls(
            rewards={name: Estimate(*pair) for name, pair in values["rewards"].items()},
            kl={name: Estimate(*pair) for name, pair in values["kl"].items()},
            entropy=Estimate(*values["entropy"]),
            response_length=Estimate(*values["response_length"]),
        )


@torch.no_grad()
def kl_and_entropy(
    policy: PreTrainedModel,
    rollout: Rollout,
    others: Mapping[str, Reference],
    *,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Exact KL to every other model and entropy, both summed over each response. → {name: [B]}, [B] nats"""
    divergences: dict[str, list[Tensor]] = defaultdict(list)
    entropies = []
    for part in rollout.split(batch_size):
        log_distributions = response_log_distributions(policy, part, temperature)
        entropies.append(kl.per_response(kl.entropy(log_distributions), part.response_mask))
        for name, other in others.items():
            divergence = kl.exact(log_distributions, other.log_distributions(part, temperature))
            divergences[name].append(kl.per_response(divergence, part.response_mask))
    return {name: torch.cat(parts) for name, parts in divergences.items()}, torch.cat(entropies)


def evaluate(
    policy: PreTrainedModel,
    rollout: Rollout,
    scores: Mapping[str, Tensor],
    others: Mapping[str, Reference],
    *,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> Evaluation:
    """Measure a rollout of ``policy``: its ``scores`` by reward, KL to every other model, entropy and length."""
    divergences, entropies = kl_and_entropy(policy, rollout, others, temperature=temperature, batch_size=batch_size)

    def mean(values: Tensor) -> Estimate:
        return per_prompt_estimate(values, torch.ones_like(values), rollout.prompts)

    return Evaluation(
        rewards={name: mean(values) for name, values in scores.items()},
        kl={name: mean(values) for name, values in divergences.items()},
        entropy=per_prompt_estimate(entropies, rollout.response_lengths, rollout.prompts),
        response_length=mean(rollout.response_lengths),
    )


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, *, batch_size: int = 32
) -> Estimate:
    """Mean negative log-likelihood per response token in nats, Σ nll / Σ tokens, with its standard error."""
    sums, counts = [], []
    for start in range(0, len(examples), batch_size):
        batch = batch_examples(examples[start : start + batch_size], pad_token_id, model.device)
        logprobs = gather_logprobs(response_log_distributions(model, batch), batch.response_tokens)
        sums.append(-masked_sum(logprobs, batch.response_mask, dim=1))
        counts.append(batch.response_lengths)
    return ratio_estimate(torch.cat(sums), torch.cat(counts))

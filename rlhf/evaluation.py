"""What a model is worth on held-out data: rewards, distance from other models, entropy, length, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf import kl
from rlhf.data import Example, batch_examples, by_length
from rlhf.kl import Comparison
from rlhf.logprobs import (
    Distributions,
    ModelDistributions,
    head_of,
    hidden_states,
    model_distributions,
    token_statistics,
    unpack,
)
from rlhf.metrics import Estimate, per_prompt_estimate, ratio_estimate
from rlhf.reference import Source
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
def compare(
    policy: PreTrainedModel,
    rollout: Rollout,
    others: Mapping[str, Source],
    *,
    temperature: float = 1.0,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Read the policy and every other model over a rollout, ``batch_size`` responses of like length at a time.

    Where the rollout kept the policy's hidden states, they are used and the policy is not run again. The policy's
    distributions are normalised in ``dtype``, which those of the others must have too.
    """
    mask = rollout.response_mask
    results: dict[str, Tensor] = {}
    for indices in by_length(rollout, batch_size):
        part = rollout.rows(indices)
        inside = part.response_mask
        comparison = kl.compare(
            policy_distributions(policy, part, temperature, dtype),
            {name: other.distributions(part, temperature) for name, other in others.items()},
            part.response_tokens[inside],
            policy.config.get_text_config().vocab_size,
        )
        for name, packed in comparison.tensors().items():
            results.setdefault(name, torch.zeros(mask.shape, dtype=dtype, device=mask.device))
            results[name][indices, : inside.shape[1]] = unpack(packed, inside)
    return Comparison.of(results, others)


def policy_distributions(
    policy: PreTrainedModel, part: Rollout, temperature: float, dtype: torch.dtype = torch.float32
) -> Distributions:
    """The policy's distributions at the response tokens, from hidden states kept while sampling where there are any."""
    if part.hidden is None:
        return model_distributions(policy, part, temperature, dtype)
    return ModelDistributions(part.hidden[part.response_mask], head_of(policy, temperature), dtype)


def evaluate(
    policy: PreTrainedModel,
    rollout: Rollout,
    scores: Mapping[str, Tensor],
    others: Mapping[str, Source],
    *,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> Evaluation:
    """Measure a rollout of ``policy``: its ``scores`` by reward, KL to every other model, entropy and length."""
    compared = compare(policy, rollout, others, temperature=temperature, batch_size=batch_size)
    return evaluation_of(rollout, scores, compared.entropy, compared.kl)


def evaluation_of(
    rollout: Rollout, scores: Mapping[str, Tensor], entropy: Tensor, divergences: Mapping[str, Tensor]
) -> Evaluation:
    """The estimates of a rollout's scores [B], and of entropies and divergences of its tokens, [B, T] each."""
    mask = rollout.response_mask

    def mean(values: Tensor) -> Estimate:
        return per_prompt_estimate(values, torch.ones_like(values), rollout.prompts)

    return Evaluation(
        rewards={name: mean(values) for name, values in scores.items()},
        kl={name: mean(kl.per_response(values, mask)) for name, values in divergences.items()},
        entropy=per_prompt_estimate(kl.per_response(entropy, mask), rollout.response_lengths, rollout.prompts),
        response_length=mean(rollout.response_lengths),
    )


def evaluate_loss(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, *, batch_size: int = 32
) -> Estimate:
    """Mean negative log-likelihood per response token in nats, Σ nll / Σ tokens, with its standard error."""
    return ratio_estimate(*example_losses(model, examples, pad_token_id, batch_size=batch_size))


@torch.no_grad()
def example_losses(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, *, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Σ nll in nats and number of tokens of every example's response. n examples → [n], [n]"""
    sums, counts = [], []
    for start in range(0, len(examples), batch_size):
        batch = batch_examples(examples[start : start + batch_size], pad_token_id, model.device)
        tokens = batch.response_tokens[batch.response_mask]
        logprobs = token_statistics(hidden_states(model, batch), head_of(model), tokens).logprobs
        sums.append(-unpack(logprobs, batch.response_mask).sum(dim=1))
        counts.append(batch.response_lengths)
    return torch.cat(sums), torch.cat(counts)

"""What PPO trains: the policy, and the value model, apart from it or as a head on its trunk.

Both are modules whose forward is one whole training forward, from tokens to what the losses need, so that wrappers
which work on a module's forward (data parallel, sharded) see everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.data import TokenBatch
from rlhf.logprobs import Distributions, Head, head_of, hidden_states, require_split, token_statistics, unpack
from rlhf.models import ScalarHeadModel, head_values


class PolicyOutput(NamedTuple):
    """What a policy says of a batch's response tokens; 0 outside the mask. [B, T] float32 each

    logprobs  log π(y_t|s_t) at the temperature asked for
    entropy   of π(·|s_t), exact; None where it was not asked for
    kl        Σ_i w_i KL(π(·|s_t)‖ρ_i(·|s_t)), exact; None without references
    values    V(s_t) of the value head; None without one
    """

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    values: Tensor | None


class Policy(nn.Module):
    """A causal language model, with a value head on its last hidden state where the trunk is shared."""

    def __init__(self, model: PreTrainedModel, *, value_head: bool = False) -> None:
        super().__init__()
        require_split(model)
        self.model = model
        self._no_split_modules = model._no_split_modules  # by which accelerate shards
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(head_of(model).weight.shape[1], 1, bias=False, device=model.device)
            nn.init.zeros_(self.value_head.weight)

    def head(self, temperature: float = 1.0) -> Head:
        """The language-model head, sharing its weights."""
        return head_of(self.model, temperature)

    def forward(
        self,
        batch: TokenBatch,
        temperature: float = 1.0,
        *,
        entropy: bool = False,
        references: Sequence[tuple[float, Distributions]] = (),
    ) -> PolicyOutput:
        """Everything the losses need of a batch, differentiable; ``references`` are those of the batch."""
        mask = batch.response_mask
        hidden = hidden_states(self.model, batch)
        statistics = token_statistics(
            hidden, self.head(temperature), batch.response_tokens[mask], entropy=entropy, references=references
        )
        logprobs, entropies, divergences = (None if x is None else unpack(x, mask) for x in statistics)
        assert logprobs is not None
        return PolicyOutput(logprobs, entropies, divergences, self.values(hidden, mask))

    def values(self, hidden: Tensor, mask: Tensor) -> Tensor | None:
        """The value head at packed hidden states, where there is one. [N, d], [B, T] → [B, T]"""
        return None if self.value_head is None else head_values(self.value_head, hidden, mask)


class ValueModel(nn.Module):
    """A network of its own for V(s_t), with nothing in common with the policy."""

    def __init__(self, scalar: ScalarHeadModel) -> None:
        super().__init__()
        self.scalar = scalar
        self._no_split_modules = scalar.model._no_split_modules  # by which accelerate shards

    def forward(self, batch: TokenBatch) -> Tensor:
        """V(s_t) at the positions that predict the response tokens, 0 outside the mask. → [B, T] float32"""
        return head_values(self.scalar.head, hidden_states(self.scalar.model, batch), batch.response_mask)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass and compute the rest again.

    transformers does so in training mode alone; without dropout that mode changes nothing else. Its older versions know
    it by the second name only.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()


def halve_linear_layers(module: nn.Module, *, frozen_only: bool) -> None:
    """Keep the weights of linear layers in bfloat16, where mixed precision rounds them to anyway: the same products.

    Not those that are an embedding as well, whose rows are read as they are.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        if isinstance(part, nn.Linear) and id(part.weight) not in embeddings:
            for parameter in part.parameters(recurse=False):
                if not (frozen_only and parameter.requires_grad):
                    parameter.data = parameter.data.to(torch.bfloat16)


def mixed_precision(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 products for "bf16", nothing for "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

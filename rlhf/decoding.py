"""The decode loop: one token a step for every response, over the model's body with its key–value cache.

Nothing of the framework's generation runs here: the head is applied to the last position alone, sampling takes one
uniform number a token, and responses that have ended leave the batch. The hidden states that predicted the tokens are
kept, [B, T, d], for they give log-probabilities, entropies and values without another pass.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.logprobs import gather_logprobs, head_of, log_distribution, position_ids

# Ended rows are dropped once they are this share of those still computed: dropping copies the cache, as a step does.
DROP_SHARE = 0.125


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), cut and renormalised.

    temperature 0 takes the likeliest token, and reports log-probabilities at temperature 1. ``top_k`` keeps the k
    likeliest tokens (0: all), then ``top_p`` the fewest likeliest of mass p or more (1: all; Holtzman et al. 2020,
    arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be finite and not negative")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (all tokens)")

    @property
    def scale(self) -> float:
        """What divides the logits."""
        return self.temperature or 1.0

    def cut(self, log_distributions: Tensor) -> Tensor:
        """The distribution sampled from, −∞ at the tokens that are cut. [B, V] log-softmax → [B, V]"""
        if not self.top_k and self.top_p == 1.0:
            return log_distributions
        ordered, order = log_distributions.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k:
            keep[:, self.top_k :] = False
        if self.top_p < 1.0:
            mass = ordered.where(keep, -torch.inf).softmax(dim=-1)
            keep &= mass.cumsum(dim=-1) - mass < self.top_p
        kept = torch.zeros_like(keep).scatter(1, order, keep)
        return log_distribution(log_distributions.masked_fill(~kept, -torch.inf))

    def draw(self, log_distributions: Tensor, uniforms: Tensor) -> Tensor:
        """One token a row from the distribution sampled from. [B, V], [B] in [0, 1) → [B]"""
        if self.temperature == 0:
            return log_distributions.argmax(dim=-1)
        return sample_tokens(log_distributions, uniforms)


def sample_tokens(log_distributions: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. [B, V], [B] in [0, 1) → [B]

    One uniform a token instead of V exponentials (``torch.multinomial``), which cost as much as a small model's
    forward. On a GPU the sums are taken in float64: a parallel sum in float32 need not grow from entry to entry.
    """
    exact = torch.float64 if log_distributions.is_cuda else None
    cdf = log_distributions.exp().cumsum(dim=-1, dtype=exact)
    # The largest float32 below 1 times the total still rounds to less than the total, so some token always exceeds.
    return torch.searchsorted(cdf, uniforms.to(cdf.dtype)[:, None] * cdf[:, -1:], right=True).squeeze(1)


class PreallocatedLayer(DynamicLayer):
    """A layer of the key–value cache with room for all tokens, where growing by one copies one and not the rest."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.storage: list[Tensor] = []  # keys and values, [B, heads, capacity, width] each

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the tokens' states and return all there are."""
        states = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.storage = [new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in states]
        stop = self.length + key_states.shape[2]
        for stored, new in zip(self.storage, states, strict=True):
            stored[:, :, self.length : stop] = new
        self.length = stop
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows only."""
        self.storage = [stored[indices] for stored in self.storage]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (stored[:, :, : self.length] for stored in self.storage)
        return self.keys, self.values


def make_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """The model's cache for at most ``capacity`` tokens; layers of another kind (sliding windows) stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(body: nn.Module) -> str:
    """What a model's body calls the cache it is given: ``cache``, in transformers before 5.24 ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


class Decoded(NamedTuple):
    """B responses of at most T tokens; arbitrary past a row's end-of-sequence token.

    tokens [B, T]; logprobs [B, T], of the distribution sampled from; hidden [B, T, d], which predicted the tokens
    """

    tokens: Tensor
    logprobs: Tensor
    hidden: Tensor


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    uniforms: Tensor,
    *,
    sampling: Sampling,
    eos_token_id: int,
) -> Decoded:
    """Sample a response to each prompt, [B, P] padded on the left, with uniforms [B, T]; stops when all have ended."""
    head = head_of(model, sampling.scale)
    num_rows, longest = uniforms.shape
    sampled = tokens.new_full((num_rows, longest), eos_token_id)
    logprobs = torch.zeros(num_rows, longest, device=tokens.device)
    states: Tensor | None = None
    rows = torch.arange(num_rows, device=tokens.device)  # those still computed
    ended = torch.zeros(num_rows, dtype=torch.bool, device=tokens.device)
    cache = make_cache(model, tokens.shape[1] + longest)
    cached = {cache_argument(model.base_model): cache}
    padded = not bool(attention_mask.all())
    positions, step_input = position_ids(attention_mask), tokens
    for step in range(longest):
        hidden = model.base_model(
            input_ids=step_input,
            attention_mask=attention_mask.long() if padded else None,
            position_ids=positions,
            use_cache=True,
            **cached,
        ).last_hidden_state[:, -1]
        distributions = sampling.cut(log_distribution(head.logits(hidden)))
        next_tokens = sampling.draw(distributions, uniforms[rows, step])
        if states is None:
            states = hidden.new_zeros(num_rows, longest, hidden.shape[-1])
        sampled[rows, step], states[rows, step] = next_tokens, hidden
        logprobs[rows, step] = gather_logprobs(distributions, next_tokens)

        ended = ended | (next_tokens == eos_token_id)
        num_ended = int(ended.sum())
        if num_ended == len(rows):
            break
        positions, step_input = positions[:, -1:] + 1, next_tokens[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        if num_ended > DROP_SHARE * len(rows):
            alive = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(alive)
            rows, ended, attention_mask = rows[alive], ended[alive], attention_mask[alive]
            positions, step_input = positions[alive], step_input[alive]
    assert states is not None
    width = step + 1
    return Decoded(sampled[:, :width], logprobs[:, :width], states[:, :width])

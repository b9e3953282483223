"""Log-probabilities of response tokens without a block of logits [B, T, V]: the head runs chunk by chunk.

A causal language model is a body, which gives a hidden state at every position, and a head, which turns one into V
logits. The body runs on whole sequences; the head only where a response token is predicted, N positions in all, in
chunks. So memory grows with B·T·d, d the hidden size, and not with B·T·V. Packed tensors, [N]
and [N, d], hold the response tokens of a batch row by row, as ``tensor[mask]`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlhf.data import TokenBatch

# Logits computed at a time: what a processor's cache holds, or enough to keep a GPU busy; but at least MIN_ROWS
# positions, below which adding up the gradient of the head, V × d a chunk, would cost more than computing it.
CHUNK = {"cpu": 2**21, "cuda": 2**26}
MIN_ROWS = 64
KEPT = 2**24  # logits that a backward pass may find kept instead of computing them again: 64 MB in float32


# ── Body and head ─────────────────────────────────────────────────────────────────────────────────────────────────────


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted from each row's first real token; 0 on left padding. [B, S] bool → [B, S] long"""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The body's output at the N positions that predict the response tokens: what the head reads. → [N, d]

    The rows are moved to the left, so that all padding comes after what counts: no token looks ahead, hence the model
    needs no attention mask, which its fastest attention does without. The position before a token predicts it, so the
    last one of all is not even read.
    """
    prompt_lengths = batch.attention_mask[:, : batch.num_prompt_tokens].sum(dim=1)
    width = int(batch.attention_mask.sum(dim=1).max()) - 1
    columns = torch.arange(width, device=batch.tokens.device) + (batch.num_prompt_tokens - prompt_lengths)[:, None]
    tokens = batch.tokens.gather(1, columns.clamp(max=batch.tokens.shape[1] - 1))
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    rows, steps = batch.response_mask.nonzero(as_tuple=True)
    return hidden[rows, prompt_lengths[rows] - 1 + steps]


@dataclass(frozen=True)
class Head:
    """From hidden states to the logits that the model's own forward gives, divided by a temperature.

    logits = c·tanh(s·(h Wᵀ + b) / c) / temperature;  without a cap, s·(h Wᵀ + b) / temperature
    """

    weight: Tensor  # W [V, d]
    bias: Tensor | None = None  # b [V]
    scale: float = 1.0  # s
    cap: float | None = None  # c
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """What the product with the weights is multiplied by, a cap aside."""
        return self.scale / self.temperature if self.cap is None else self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] → [n, V] float32, newly made. The product is taken in the dtype of ``hidden``."""
        # The factor goes on d numbers a position instead of V.
        bias = None if self.bias is None else self.factor * self.bias.to(hidden.dtype)
        rounds = torch.is_autocast_enabled(hidden.device.type)  # whatever it is given
        weight = self.weight if rounds else self.weight.to(hidden.dtype)
        logits = linear(hidden * self.factor, weight, bias).float()
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap / self.temperature)
        return logits

    def cap_slope(self, logits: Tensor) -> Tensor:
        """What the cap does to the derivative of the logits, elementwise, where they are as given. [n, V] → [n, V]"""
        assert self.cap is not None
        return (1.0 - (logits * (self.temperature / self.cap)) ** 2) / self.temperature


def head_of(model: PreTrainedModel, temperature: float = 1.0) -> Head:
    """The head of a causal language model, sharing its weights.

    What some models do to their logits is read off their configs: a scale (Cohere, Granite, Falcon-H1) and a soft cap
    (Gemma 2); :func:`require_split` tells whether that is all.
    """
    output = cast(nn.Linear, model.get_output_embeddings())
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, output.bias, scale, cap, temperature)


@torch.no_grad()
def require_split(model: PreTrainedModel) -> None:
    """Raise ValueError unless head(body(tokens)) equals the model's own logits, tried on a few tokens."""
    config = model.config.get_text_config()
    tokens = torch.arange(4, device=model.device)[None] % config.vocab_size
    known = isinstance(model.get_output_embeddings(), nn.Linear)
    if known:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        tolerance = 1e-3 * float(expected.abs().max())
        known = bool(torch.allclose(head_of(model).logits(hidden), expected, rtol=1e-3, atol=tolerance))
    if not known:
        raise ValueError(
            f"{model.name_or_path}: the logits of {type(model).__name__} are no linear function of its last hidden "
            "state that is known here; use a decoder-only model with a linear head"
        )


# ── Whole distributions, for measuring ────────────────────────────────────────────────────────────────────────────────


class Distributions(Protocol):
    """Next-token distributions at the N response positions of a batch, made a few at a time."""

    def rows(self, rows: slice) -> Tensor:
        """log ρ(·|s) at some of the positions. → [n, V] float32, or float64 where that was asked for"""
        ...


class ModelDistributions:
    """The distributions that a head gives at packed hidden states [N, d], normalised in ``dtype``."""

    def __init__(self, hidden: Tensor, head: Head, dtype: torch.dtype = torch.float32) -> None:
        self.hidden = hidden
        self.head = head
        self.dtype = dtype

    def rows(self, rows: slice) -> Tensor:
        return log_distribution(self.head.logits(self.hidden[rows]).to(self.dtype))


@torch.no_grad()
def model_distributions(
    model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> ModelDistributions:
    """log softmax(logits / temperature) of a model at the response positions of a batch."""
    return ModelDistributions(hidden_states(model, batch), head_of(model, temperature), dtype)


def chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices of rows whose logits are handled at once."""
    step = max(MIN_ROWS, CHUNK.get(device.type, CHUNK["cuda"]) // vocab_size)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def log_distribution(logits: Tensor) -> Tensor:
    """log softmax(logits), written over them. [n, V] → [n, V]"""
    return torch.log_softmax(logits, dim=-1, out=logits)


def gather_logprobs(log_distributions: Tensor, tokens: Tensor) -> Tensor:
    """log π(y|s) of the given tokens. [..., V], [...] → [...]"""
    return log_distributions.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """Packed values at their places, 0 elsewhere; differentiable. [N], [B, T] → [B, T]"""
    return torch.zeros(mask.shape, dtype=packed.dtype, device=packed.device).masked_scatter(mask, packed)


# ── Log-probabilities to train on ─────────────────────────────────────────────────────────────────────────────────────


class TokenStatistics(NamedTuple):
    """Differentiable in hidden states and head. [N] each

    logprobs  log π(y|s) of the tokens
    entropy   −Σ_v π_v log π_v; None where it was not asked for
    kl        Σ_i w_i Σ_v π_v (log π_v − log ρ_iv), exact; None without references
    """

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def token_statistics(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    *,
    entropy: bool = False,
    references: Sequence[tuple[float, Distributions]] = (),
) -> TokenStatistics:
    """Log-probabilities of tokens, and on request the entropies of their distributions and the exact KL to others.

    hidden [N, d], tokens [N]. The logits of a chunk are kept for the backward pass as long as they are few (KEPT in
    all), and computed again otherwise.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # forward and backward pass alike, which autocast alone would not see to
        hidden = hidden.to(torch.get_autocast_dtype(device))
    logprobs, entropies, divergences = _TokenStatistics.apply(
        hidden, head.weight, head.bias, tokens, head, entropy, tuple(references)
    )
    return TokenStatistics(logprobs, entropies if entropy else None, divergences if references else None)


class _TokenStatistics(torch.autograd.Function):
    """With z the logits, p = softmax(z) and a, e, k the gradients of the three results:

    d/dz_v = a (1[v = y] − p_v) − e p_v (log p_v + H) + k p_v (Σw·log p_v − Σ_i w_i log ρ_iv − KL)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        head: Head,
        entropy: bool,
        references: Sequence[tuple[float, Distributions]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        num, size = len(tokens), len(weight)
        logprobs, entropies, divergences = hidden.new_zeros(3, num, dtype=torch.float32)
        kept: list[Tensor] = []
        for rows in chunks(num, size, hidden.device):
            log_p = log_distribution(head.logits(hidden[rows]))
            logprobs[rows] = gather_logprobs(log_p, tokens[rows])
            if entropy or references:
                p = log_p.exp()
            if entropy:
                entropies[rows] = -(p * log_p).sum(-1)
            if references:
                divergences[rows] = (p * _weighted_log_ratio(log_p, references, rows)).sum(-1)
            if num * size <= KEPT:
                kept.append(log_p)
        ctx.save_for_backward(hidden, weight, bias, tokens, entropies, divergences)
        ctx.head, ctx.entropy, ctx.references, ctx.kept = head, entropy, references, kept
        return logprobs, entropies, divergences

    @staticmethod
    @once_differentiable  # what is kept has no history, and a second derivative would lack terms
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, weight, bias, tokens, *_ = ctx.saved_tensors
        of_logprobs, of_entropy, of_kl = (gradient[:, None] for gradient in gradients)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden)
        no_tokens = len(tokens) == 0
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight and no_tokens else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        kept, ctx.kept = ctx.kept, []  # written over here: a second backward pass computes them again
        for index, rows in enumerate(chunks(len(tokens), len(weight), hidden.device)):
            slope: Tensor | None = None
            if kept and ctx.head.cap is None:
                log_p = kept[index]
            else:
                logits = ctx.head.logits(hidden[rows])
                slope = None if ctx.head.cap is None else ctx.head.cap_slope(logits)
                log_p = log_distribution(logits)
            d_logits = _d_logits(ctx, log_p, rows, of_logprobs, of_entropy, of_kl)
            if slope is not None:
                d_logits.mul_(slope)
            d_logits = d_logits.to(hidden.dtype)
            if needs_hidden:
                d_hidden[rows] = (d_logits @ weight.to(hidden.dtype)).mul_(ctx.head.factor)
            if needs_weight:
                left, right = d_logits.T.float(), (hidden[rows] * ctx.head.factor).float()
                d_weight = left @ right if d_weight is None else d_weight.addmm_(left, right)
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0), alpha=ctx.head.factor)
        gradients_of_head = (None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias))
        return d_hidden, *gradients_of_head, None, None, None, None


def _d_logits(ctx: Any, log_p: Tensor, rows: slice, of_logprobs: Tensor, of_entropy: Tensor, of_kl: Tensor) -> Tensor:
    """The gradient of a chunk's logits, by the formula of :class:`_TokenStatistics`, written over ``log_p``."""
    tokens, entropies, divergences = ctx.saved_tensors[3:]
    factor = -of_logprobs[rows]  # of p_v
    if ctx.entropy:
        factor = factor - of_entropy[rows] * (log_p + entropies[rows, None])
    if ctx.references:
        log_ratio = _weighted_log_ratio(log_p, ctx.references, rows)
        factor = factor + of_kl[rows] * (log_ratio - divergences[rows, None])
    return log_p.exp_().mul_(factor).scatter_add_(1, tokens[rows, None], of_logprobs[rows])


def _weighted_log_ratio(log_p: Tensor, references: Sequence[tuple[float, Distributions]], rows: slice) -> Tensor:
    """Σ_i w_i (log p_v − log ρ_iv). [n, V]"""
    terms = [weight * (log_p - reference.rows(rows)) for weight, reference in references]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

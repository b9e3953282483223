"""Sampling responses: our own decode loop over the model, with its key–value cache.

Responses stop at the end-of-sequence token; there is no fixed-length sampling with truncation afterwards. Sampling is
from the full distribution at the given temperature, with no top-k or top-p, so the log-probabilities are those of the
distribution sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data import Prompt, TokenBatch, pad_left
from rlhf.masking import mask_through_first
from rlhf.models import gather_logprobs, position_ids


@dataclass(frozen=True)
class Rollout(TokenBatch):
    """A batch of sampled responses. B prompts of P padded tokens, responses of T padded tokens (see TokenBatch).

    logprobs   [B, T]  log π of each response token when it was sampled; 0 outside the mask
    finished   [B]     True where the response ended with the end-of-sequence token
    prompts, responses the texts, without special tokens
    """

    logprobs: Tensor
    finished: Tensor
    prompts: list[str]
    responses: list[str]

    def rows(self, indices: Tensor | slice) -> Rollout:
        """The given rows, still padded to the whole rollout's widths."""
        positions = torch.arange(len(self))[indices].tolist()
        return Rollout(
            self.tokens[indices],
            self.attention_mask[indices],
            self.response_mask[indices],
            self.logprobs[indices],
            self.finished[indices],
            [self.prompts[i] for i in positions],
            [self.responses[i] for i in positions],
        )

    def split(self, size: int | None) -> Iterator[Rollout]:
        """Consecutive slices of at most ``size`` rows; the whole rollout for None."""
        size = size or len(self)
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))


def sample_tokens(log_distributions: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. [B, V], [B] in [0, 1) → [B]

    One uniform a token instead of V exponentials (``torch.multinomial``), which cost as much as a small model's
    forward.
    """
    cdf = log_distributions.exp().cumsum(dim=-1)
    # The largest float32 below 1 times the total still rounds to less than the total, so some token always exceeds.
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    uniforms: Tensor,
    temperature: float,
    eos_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Response ids and their log-probabilities, [B, T] each, T ≤ ``uniforms.shape[1]``; arbitrary past a row's end."""
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    cache, step_input, sampled, logprobs = None, tokens, [], []
    for step_uniforms in uniforms.T:
        output = model(
            input_ids=step_input,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask)[:, -step_input.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        log_distributions = torch.log_softmax(output.logits[:, -1].float() / temperature, dim=-1)
        next_tokens = sample_tokens(log_distributions, step_uniforms)
        sampled.append(next_tokens)
        logprobs.append(gather_logprobs(log_distributions, next_tokens))
        finished = finished | (next_tokens == eos_token_id)
        if bool(finished.all()):
            break
        cache, step_input = output.past_key_values, next_tokens[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
    return torch.stack(sampled, dim=1), torch.stack(logprobs, dim=1)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    batch_size: int | None = None,
    progress: str | None = None,
) -> Rollout:
    """One sampled response to every prompt.

    Each response draws from its own row of uniform numbers, taken from ``generator`` (on the CPU) before the first
    token: the result does not depend on ``batch_size`` beyond rounding, and two models sampled with the same seed share
    their random numbers. ``batch_size`` bounds how many responses are decoded at once (default all); ``progress`` names
    a progress bar.
    """
    device = model.device
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
    prompt_tokens, prompt_mask = pad_left([prompt.token_ids for prompt in prompts], tokenizer.pad_token_id)
    size = batch_size or len(prompts)
    response_tokens = torch.full((len(prompts), max_new_tokens), tokenizer.pad_token_id)
    logprobs = torch.zeros(len(prompts), max_new_tokens)
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, desc=progress, leave=False) if progress else starts:
        rows = slice(start, start + size)
        sampled, sampled_logprobs = _decode(
            model, prompt_tokens[rows].to(device), prompt_mask[rows].to(device), uniforms[rows].to(device), temperature,
            tokenizer.eos_token_id,
        )  # fmt: skip
        response_tokens[rows, : sampled.shape[1]] = sampled.cpu()
        logprobs[rows, : sampled.shape[1]] = sampled_logprobs.cpu()

    # A row decoded in a short batch is padded here, which must not count: it ended with its end-of-sequence token.
    response_mask = mask_through_first(response_tokens, tokenizer.eos_token_id)
    width = int(response_mask.sum(dim=1).max())
    response_tokens, logprobs, response_mask = (x[:, :width] for x in (response_tokens, logprobs, response_mask))
    response_tokens = torch.where(response_mask, response_tokens, tokenizer.pad_token_id)
    finished = ((response_tokens == tokenizer.eos_token_id) & response_mask).any(dim=1)
    responses = [
        str(tokenizer.decode(row[mask & (row != tokenizer.eos_token_id)], skip_special_tokens=True))
        for row, mask in zip(response_tokens, response_mask, strict=True)
    ]
    return Rollout(
        tokens=torch.cat([prompt_tokens, response_tokens], dim=1).to(device),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1).to(device),
        response_mask=response_mask.to(device),
        logprobs=torch.where(response_mask, logprobs, 0.0).to(device),
        finished=finished.to(device),
        prompts=[prompt.text for prompt in prompts],
        responses=responses,
    )

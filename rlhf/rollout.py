"""Sampled responses, and how they are sampled: by our own decode loop, or by the framework's ``generate``.

Responses stop at the end-of-sequence token; there is no fixed-length sampling with truncation afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data import Prompt, TokenBatch, pad_left
from rlhf.decoding import Decoded, Sampling, decode
from rlhf.graph_decoding import decode_by_graph
from rlhf.logprobs import gather_logprobs
from rlhf.masking import mask_through_first
from rlhf.models import evaluating


@dataclass(frozen=True)
class Rollout(TokenBatch):
    """A batch of sampled responses. B prompts of P padded tokens, responses of T padded tokens (see TokenBatch).

    logprobs   [B, T]     log π of each response token in the distribution it was drawn from; 0 outside the mask
    finished   [B]        True where the response ended with the end-of-sequence token
    prompts, responses    the texts, without special tokens
    hidden     [B, T, d]  the policy's last hidden states that predicted the tokens, where they were kept
    """

    logprobs: Tensor
    finished: Tensor
    prompts: list[str]
    responses: list[str]
    hidden: Tensor | None = None

    def rows(self, indices: Tensor | slice) -> Rollout:
        """The given rows, cut to the widths that they need."""
        positions = torch.arange(len(self))[indices].tolist()
        mask, response_mask = self.attention_mask[indices], self.response_mask[indices]
        prompt, response = used_columns(mask, response_mask)
        columns = slice(prompt.start, self.num_prompt_tokens + response.stop)
        return Rollout(
            self.tokens[indices][:, columns],
            mask[:, columns],
            response_mask[:, response],
            self.logprobs[indices][:, response],
            self.finished[indices],
            [self.prompts[i] for i in positions],
            [self.responses[i] for i in positions],
            None if self.hidden is None else self.hidden[indices][:, response],
        )

    def split(self, size: int | None) -> Iterator[Rollout]:
        """Consecutive slices of at most ``size`` rows; the whole rollout for None."""
        size = size or len(self)
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))


def used_columns(attention_mask: Tensor, response_mask: Tensor) -> tuple[slice, slice]:
    """Columns of prompts and of responses that hold a token of any row. [B, P+T], [B, T] → within P, within T"""
    num_prompt = attention_mask.shape[1] - response_mask.shape[1]
    prompt_length = int(attention_mask[:, :num_prompt].sum(dim=1).max())
    return slice(num_prompt - prompt_length, num_prompt), slice(0, int(response_mask.sum(dim=1).max()))


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    uniforms: Tensor,
    *,
    sampling: Sampling,
    eos_token_id: int,
) -> Decoded:
    """What :func:`rlhf.decoding.decode` does, by the framework's own loop: slow, and an oracle to compare with.

    It draws its own random numbers, seeded from the uniforms.
    """
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    settings = GenerationConfig(
        max_new_tokens=uniforms.shape[1],
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        do_sample=sampling.temperature > 0,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        **(drawn if sampling.temperature > 0 else {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(int(uniforms[0, 0].double() * 2**53))
        output: Any = cast(Any, model).generate(
            input_ids=tokens, attention_mask=attention_mask.long(), generation_config=settings
        )
    sampled = output.sequences[:, tokens.shape[1] :]
    distributions = torch.stack(output.scores, dim=1).float().log_softmax(dim=-1)
    hidden = torch.stack([step[-1][:, -1] for step in output.hidden_states], dim=1)
    return Decoded(sampled, gather_logprobs(distributions, sampled), hidden)


ENGINES = {"decode": decode, "graph": decode_by_graph, "generate": _generate}


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    engine: str = "decode",
    keep_hidden: bool = False,
    batch_size: int | None = None,
    progress: str | None = None,
    share: slice | None = None,
) -> Rollout:
    """One sampled response to every prompt.

    Each response draws from its own row of uniform numbers, taken from ``generator`` (on the CPU) before the first
    token: the result does not depend on ``batch_size`` beyond rounding, and two models sampled with the same seed share
    their random numbers. ``batch_size`` bounds how many responses are decoded at once (default all); prompts of like
    length are decoded together. ``engine`` is "decode", "graph" (:mod:`rlhf.graph_decoding`), or "generate" for the
    framework's loop; ``keep_hidden`` keeps the hidden states; ``progress`` names a progress bar; ``share`` are the
    prompts to answer, of all.
    """
    sampling = Sampling(temperature, top_k, top_p)
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
    if share is not None:
        prompts, uniforms = prompts[share], uniforms[share]
    prompt_tokens, prompt_mask = pad_left([prompt.token_ids for prompt in prompts], tokenizer.pad_token_id)
    run = ENGINES[engine]
    order = prompt_mask.sum(dim=1).argsort(stable=True)
    parts = order.split(batch_size or len(prompts))
    decoded = []
    with evaluating(model):  # in training mode, checkpointed activations go without a cache
        for rows in tqdm(parts, desc=progress, leave=False) if progress else parts:
            used = slice(prompt_tokens.shape[1] - int(prompt_mask[rows].sum(dim=1).max()), None)
            inputs = (x.to(model.device) for x in (prompt_tokens[rows, used], prompt_mask[rows, used], uniforms[rows]))
            decoded.append(run(model, *inputs, sampling=sampling, eos_token_id=tokenizer.eos_token_id))

    width = max(part.tokens.shape[1] for part in decoded)
    in_order = order.argsort().to(model.device)
    # A row decoded in a short batch is padded here, which must not count: it ended with its end-of-sequence token.
    response_tokens, logprobs = (
        torch.cat([pad(getattr(part, name), (0, width - part.tokens.shape[1])) for part in decoded])[in_order]
        for name in ("tokens", "logprobs")
    )
    response_mask = mask_through_first(response_tokens, tokenizer.eos_token_id)
    response_mask = response_mask[:, : int(response_mask.sum(dim=1).max())]
    width = response_mask.shape[1]
    response_tokens = torch.where(response_mask, response_tokens[:, :width], tokenizer.pad_token_id)
    hidden = None
    if keep_hidden:
        hidden = torch.cat([pad(part.hidden, (0, 0, 0, width - part.hidden.shape[1])) for part in decoded])[in_order]
    return Rollout(
        tokens=torch.cat([prompt_tokens.to(model.device), response_tokens], dim=1),
        attention_mask=torch.cat([prompt_mask.to(model.device), response_mask], dim=1),
        response_mask=response_mask,
        logprobs=torch.where(response_mask, logprobs[:, :width], 0.0),
        finished=((response_tokens == tokenizer.eos_token_id) & response_mask).any(dim=1),
        prompts=[prompt.text for prompt in prompts],
        responses=texts(response_tokens, response_mask, tokenizer),
        hidden=hidden,
    )


def texts(response_tokens: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Responses as a person reads them, without special tokens. [B, T], [B, T] → B texts"""
    kept = mask & (response_tokens != tokenizer.eos_token_id)
    return [
        str(tokenizer.decode(row[keep], skip_special_tokens=True))
        for row, keep in zip(response_tokens.cpu(), kept.cpu(), strict=True)
    ]

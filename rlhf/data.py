"""Prompts, demonstrations and preference pairs as tokens, and batches of them.

:mod:`rlhf.rows` says what files and datasets are read, :mod:`rlhf.conversations` which fields their rows have: prompts
have ``prompt`` (used verbatim) or ``messages`` (the tokenizer's chat template is applied); demonstrations add
``response``; pairs add ``chosen`` and ``rejected``. A response is tokenized on its own and ends with the
end-of-sequence token, so that training sees the same boundary between prompt and response as sampling does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.conversations import Chat, read_conversation
from rlhf.rows import Row, read_rows


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, and as a person does (without special tokens)."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Example:
    """A prompt and one response to it, end-of-sequence token included; ``where`` is the file and line it came from."""

    prompt_ids: list[int]
    response_ids: list[int]
    where: str | None = field(default=None, compare=False)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response in one row."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first preferred; by how much, ``margin`` may say, in units of the reward."""

    chosen: Example
    rejected: Example
    margin: float | None = None


def _render(where: str, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the text that the tokenizer's chat template makes of it, ready for the model's answer."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template; give a plain prompt instead")
    try:
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise whatever they like, jinja2's own errors included
        raise ValueError(f"{where}: the chat template refuses the messages: {error}") from None


def _encode_prompt(where: str, prompt: str | Chat, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if isinstance(prompt, str):
        ids, text = tokenizer(prompt)["input_ids"], prompt
    else:
        ids = tokenizer(_render(where, prompt, tokenizer), add_special_tokens=False)["input_ids"]
        text = "\n".join(turn["content"] for turn in prompt)
    if not ids:
        raise ValueError(f"{where}: the prompt is empty; remove the line")
    return Prompt(text, list(ids))


def _encode_response(response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def load_prompts(source: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[Prompt]:
    """All prompts of a file or dataset; ValueError names place and line of an empty, malformed or too long one."""
    prompts = []
    for where, row in read_rows(source):
        prompt = _encode_prompt(where, read_conversation(where, row)[0], tokenizer)
        if max_tokens is not None and len(prompt.token_ids) > max_tokens:
            raise ValueError(
                f"{where}: prompt of {len(prompt.token_ids)} tokens, but only {max_tokens} fit beside the response; "
                "shorten it or allow more"
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source}: no prompts; expected one a line (.txt), or rows with prompt or messages")
    return prompts


def shared_prompts(train: Sequence[Prompt], test: Sequence[Prompt]) -> int:
    """How many of the test prompts are training prompts too, token by token; a repeated test prompt counts each time.

    Results on those are no longer results on held-out prompts.
    """
    seen = {tuple(prompt.token_ids) for prompt in train}
    return sum(tuple(prompt.token_ids) in seen for prompt in test)


def _fit(where: str, example: Example, max_tokens: int | None) -> Example:
    """Cut the response to what fits; a prompt that leaves no room for it is an error."""
    if max_tokens is None or len(example.token_ids) <= max_tokens:
        return example
    room = max_tokens - len(example.prompt_ids)
    if room < 1:
        raise ValueError(
            f"{where}: prompt of {len(example.prompt_ids)} tokens leaves no room for a response in {max_tokens}; "
            "shorten it"
        )
    return replace(example, response_ids=example.response_ids[:room])


def _load_answered(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, fields: Sequence[str]
) -> Iterator[tuple[list[Example], Row]]:
    """For every row, the prompt with the response of each field, and the row itself."""
    for where, row in read_rows(source):
        prompt, responses = read_conversation(where, row, fields)
        prompt_ids = _encode_prompt(where, prompt, tokenizer).token_ids
        examples = [Example(prompt_ids, _encode_response(response, tokenizer), where) for response in responses]
        yield [_fit(where, example, max_tokens) for example in examples], row


def _margin(where: str | None, row: Row) -> float | None:
    """A pair's margin, where it has one."""
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"{where}: field 'margin' must be a finite number; found {margin!r}")
    return float(margin)


def load_examples(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> list[Example]:
    """Demonstrations (a prompt and ``response``); longer ones lose the end of the response."""
    examples = [example for (example,), _ in _load_answered(source, tokenizer, max_tokens, ["response"])]
    if not examples:
        raise ValueError(f"{source}: no examples; expected rows with prompt or messages, and response")
    return examples


def load_pairs(source: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[Pair]:
    """Preference pairs (a prompt, ``chosen`` and ``rejected``, perhaps a number ``margin``), cut as examples are."""
    pairs = [
        Pair(chosen, rejected, _margin(chosen.where, row))
        for (chosen, rejected), row in _load_answered(source, tokenizer, max_tokens, ["chosen", "rejected"])
    ]
    if not pairs:
        raise ValueError(f"{source}: no pairs; expected rows with prompt or messages, chosen and rejected")
    return pairs


def pad_left(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one block, short ones padded on the left. → tokens [B, S], attention mask [B, S] bool"""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.arange(width) >= torch.tensor([width - len(row) for row in rows])[:, None]
    return tokens, mask


def pad_right(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one block, short ones padded on the right. → tokens [B, S], attention mask [B, S] bool"""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return tokens, mask


@dataclass(frozen=True)
class TokenBatch:
    """B prompts, padded on the left to P tokens, each with one response, padded on the right to T tokens.

    tokens          [B, P+T]  prompt and response ids
    attention_mask  [B, P+T]  True on real tokens
    response_mask   [B, T]    True on response tokens, end-of-sequence included
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> TokenBatch:
        """The tensors of the batch on another device."""
        return TokenBatch(self.tokens.to(device), self.attention_mask.to(device), self.response_mask.to(device))

    @property
    def num_prompt_tokens(self) -> int:
        """P, the padded prompt length."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def response_tokens(self) -> Tensor:
        """Ids of the response tokens. [B, T]"""
        return self.tokens[:, self.num_prompt_tokens :]

    @property
    def response_lengths(self) -> Tensor:
        """Response tokens of each row, end-of-sequence included. [B]"""
        return self.response_mask.sum(dim=1)


def batch_examples(examples: Sequence[Example], pad_token_id: int, device: str | torch.device = "cpu") -> TokenBatch:
    """Examples as one block, laid out like a rollout, so that training and scoring share every forward."""
    prompt_tokens, prompt_mask = pad_left([example.prompt_ids for example in examples], pad_token_id)
    response_tokens, response_mask = pad_right([example.response_ids for example in examples], pad_token_id)
    return TokenBatch(
        torch.cat([prompt_tokens, response_tokens], dim=1).to(device),
        torch.cat([prompt_mask, response_mask], dim=1).to(device),
        response_mask.to(device),
    )


def by_length(batch: TokenBatch, size: int | None) -> Sequence[Tensor]:
    """Rows of a batch in parts of at most ``size`` that are alike in length, longest first; all at once for None.

    A part then has little padding to compute, and the first one shows whether the memory is enough.
    """
    order = batch.attention_mask.sum(dim=1).cpu().argsort(descending=True, stable=True)
    return order.split(size or len(batch))

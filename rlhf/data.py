"""Prompts, demonstrations and preference pairs from files.

Prompts: a text file (one a line) or JSON Lines with ``prompt`` (used verbatim) or ``messages`` (the tokenizer's chat
template is applied). Demonstrations add ``response``; pairs add ``chosen`` and ``rejected``. A response is tokenized on
its own and ends with the end-of-sequence token, so that training sees the same boundary between prompt and response as
sampling does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, and as a person does (without special tokens)."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Example:
    """A prompt and one response to it, end-of-sequence token included."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response in one row."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first preferred."""

    chosen: Example
    rejected: Example


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every non-blank line, ``where`` naming file and line for errors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .txt or .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if path.suffix == ".txt":
            yield where, {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg}); write one JSON object a line, or name the file .txt"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object with prompt or messages, found {type(row).__name__}")
        yield where, row


def _render(where: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Chat messages as the text that the tokenizer's chat template makes of them, ready for the model's answer."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template; give a plain prompt instead")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: messages must be objects with strings role and content; found {message!r}")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise whatever they like, jinja2's own errors included
        raise ValueError(f"{where}: the chat template refuses the messages: {error}") from None


def _encode_prompt(
    where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> Prompt:
    if isinstance(row.get("messages"), list):
        ids = tokenizer(_render(where, row["messages"], tokenizer), add_special_tokens=False)["input_ids"]
        text = "\n".join(message["content"] for message in row["messages"])
    elif isinstance(row.get("prompt"), str):
        ids = tokenizer(row["prompt"])["input_ids"]
        text = row["prompt"]
    else:
        raise ValueError(f"{where}: has neither a string prompt nor a list messages; found {sorted(row)}")
    if not ids:
        raise ValueError(f"{where}: the prompt is empty; remove the line")
    if max_tokens is not None and len(ids) > max_tokens:
        raise ValueError(
            f"{where}: prompt of {len(ids)} tokens, but only {max_tokens} fit beside the response; shorten it or "
            "allow more"
        )
    return Prompt(text, list(ids))


def _encode_response(where: str, row: dict[str, Any], field: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(row.get(field), str) or not row[field].strip():
        raise ValueError(f"{where}: field {field!r} must be a non-empty string; found {row.get(field)!r}")
    ids = tokenizer(row[field], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def load_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[Prompt]:
    """All prompts of a file; ValueError names file and line of an empty, malformed or too long one."""
    prompts = [_encode_prompt(where, row, tokenizer, max_tokens) for where, row in _rows(path)]
    if not prompts:
        raise ValueError(f"{path}: no prompts; expected one a line (.txt) or one JSON object a line (.jsonl)")
    return prompts


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
    return Example(example.prompt_ids, example.response_ids[:room])


def load_examples(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[Example]:
    """Demonstrations (``prompt`` or ``messages``, and ``response``); longer ones lose the end of the response."""
    examples = [
        _fit(
            where,
            Example(
                _encode_prompt(where, row, tokenizer, None).token_ids,
                _encode_response(where, row, "response", tokenizer),
            ),
            max_tokens,
        )
        for where, row in _rows(path)
    ]
    if not examples:
        raise ValueError(f"{path}: no examples; expected one JSON object a line with prompt or messages, and response")
    return examples


def load_pairs(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[Pair]:
    """Preference pairs (``prompt`` or ``messages``, ``chosen``, ``rejected``), cut as examples are."""
    pairs = []
    for where, row in _rows(path):
        prompt_ids = _encode_prompt(where, row, tokenizer, None).token_ids
        chosen, rejected = (
            _fit(where, Example(prompt_ids, _encode_response(where, row, field, tokenizer)), max_tokens)
            for field in ("chosen", "rejected")
        )
        pairs.append(Pair(chosen, rejected))
    if not pairs:
        raise ValueError(
            f"{path}: no pairs; expected one JSON object a line with prompt or messages, chosen and rejected"
        )
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

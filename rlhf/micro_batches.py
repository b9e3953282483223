"""Rows of unlike length in blocks that hold little padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.data import Example, TokenBatch, pad_right


def batch_rows(examples: Sequence[Example], pad_token_id: int, device: str | torch.device = "cpu") -> TokenBatch:
    """Examples as one block that is as wide as its longest row: prompt and response together, padded on the right.

    What :func:`rlhf.data.batch_examples` lays out like a rollout (prompts end in one column) takes the width of the
    longest prompt and the longest response, even of two different rows. Here P is the *shortest* prompt, so that the
    response columns of a row begin with the rest of its prompt, which ``response_mask`` leaves out.
    """
    tokens, attention_mask = pad_right([example.token_ids for example in examples], pad_token_id)
    first = min(len(example.prompt_ids) for example in examples)
    starts = torch.tensor([len(example.prompt_ids) for example in examples])
    response_mask = (attention_mask & (torch.arange(tokens.shape[1]) >= starts[:, None]))[:, first:]
    return TokenBatch(tokens.to(device), attention_mask.to(device), response_mask.to(device))


def split_by_length(
    items: Sequence[int],
    widths: Sequence[int],
    *,
    max_items: int | None = None,
    max_tokens: int | None = None,
    rows: int = 1,
) -> list[list[int]]:
    """Items in micro-batches of like width, the widest first, so that what does not fit into memory shows at once.

    A micro-batch has at most ``max_items`` items and, padded, at most ``max_tokens`` tokens: items · rows · width of
    its widest. An item that is wider than that by itself gets a micro-batch of its own.
    """
    micro_batches: list[list[int]] = []
    limit = 0
    for item in sorted(items, key=lambda item: -widths[item]):
        if not micro_batches or len(micro_batches[-1]) >= limit:
            micro_batches.append([])
            fitting = len(items) if max_tokens is None else max_tokens // (rows * widths[item])
            limit = max(1, min(fitting, max_items or len(items)))
        micro_batches[-1].append(item)
    return micro_batches

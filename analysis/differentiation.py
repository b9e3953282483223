"""What derivatives of a language model need: logits that can be differentiated in any way, and an attention that can.

The attention that transformers chooses by default (sdpa) runs a fused kernel with a first derivative alone: no double
backward, and no forward mode on some devices. ``eager``, which computes the same function step by step, has them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from rlhf.data import TokenBatch
from rlhf.logprobs import head_of, hidden_states
from rlhf.models import evaluating


def response_logits(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The logits that predict the N response tokens, in the model's dtype. → [N, V]

    Unlike :func:`rlhf.logprobs.token_statistics`, they have derivatives of every order, backwards and forwards; they
    are kept whole.
    """
    head = head_of(model)
    logits = head.scale * torch.nn.functional.linear(hidden_states(model, batch), head.weight, head.bias)
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[str | None]:
    """The model in eval mode and with an attention that has all derivatives, inside the block; as it was afterwards.

    Gives the attention that a transformers model has inside the block, None for other modules. Calls of
    ``scaled_dot_product_attention`` in other modules take its differentiable path.
    """
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        if not isinstance(model, PreTrainedModel):
            yield None
            return
        before = _attention_of(model)
        model.set_attn_implementation("eager")
        try:
            yield model.config._attn_implementation
        finally:
            model.set_attn_implementation(before)


def _attention_of(model: PreTrainedModel) -> Any:
    """The attention of a model and of its parts, in the form that ``set_attn_implementation`` takes."""
    own = model.config._attn_implementation
    parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
    parts = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": own, **parts} if parts else own

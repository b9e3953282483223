"""Decoding by one step that is captured as a CUDA graph and replayed for every token.

A GPU runs the kernels of a small step faster than Python launches them one by one; a graph is launched as a whole. Its
shapes and addresses are fixed: the cache has room for all tokens and is read whole, under a mask; where a step stands
is told by tensors, which it moves on itself; rows that have ended are computed on. Elsewhere than on a GPU the step
runs as it is, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.decoding import Decoded, PreallocatedLayer, Sampling, cache_argument
from rlhf.logprobs import gather_logprobs, head_of, log_distribution, position_ids

STEPS_BETWEEN_LOOKS = 16  # whether all rows have ended is asked for seldom: the answer has to wait for the GPU
WARM_UP_STEPS = 2  # libraries set themselves up in their first calls, which must not be captured


class FixedLayer(PreallocatedLayer):
    """A layer of the cache with room for all tokens, shown whole; a token goes to the column that a tensor names."""

    def __init__(self, capacity: int, column: Tensor) -> None:
        super().__init__(capacity)
        self.column = column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a prompt's states, which see only each other, or a token's, which see all there is."""
        if not self.is_initialized:
            prompt = super().update(key_states, value_states)
            for stored in self.storage:
                stored[:, :, self.length :] = 0.0  # masked columns are read too, and 0 times no number is no number
            return prompt
        keys, values = self.storage
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values


class Step:
    """One token for every row, and the tensors that it reads and moves on."""

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, uniforms: Tensor, sampling: Sampling
    ) -> None:
        (num_rows, num_tokens), num_prompt, device = uniforms.shape, tokens.shape[1], tokens.device
        self.model, self.sampling, self.uniforms = model, sampling, uniforms
        self.head = head_of(model, sampling.scale)
        capacity = num_prompt + num_tokens
        self.column = torch.tensor([num_prompt], device=device)  # of the cache, where the next token goes
        self.index = torch.zeros(1, dtype=torch.long, device=device)  # of the token that is drawn next
        self.cache = DynamicCache(config=model.config)
        if any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            raise ValueError(
                f"engine=graph: {type(model).__name__} has layers whose cache is no plain one; use engine=decode"
            )
        self.cache.layers = [FixedLayer(capacity, self.column) for _ in self.cache.layers]
        self.positions = position_ids(attention_mask)
        hidden = self._body(tokens, attention_mask.long(), self.positions)
        # 0 for what a token sees, and what makes the weight of all else 0; four dimensions are taken as they are.
        self.mask = hidden.new_full((num_rows, 1, 1, capacity), torch.finfo(hidden.dtype).min)
        self.mask[:, 0, 0, :num_prompt].masked_fill_(attention_mask, 0.0)
        self.tokens = tokens.new_zeros(num_rows, 1)
        self.sampled = tokens.new_zeros(num_rows, num_tokens)
        self.logprobs = torch.zeros(num_rows, num_tokens, device=device)
        self.states = hidden.new_zeros(num_rows, num_tokens, hidden.shape[-1])
        self.positions = self.positions[:, -1:].clone()
        self._draw(hidden)

    def __call__(self) -> None:
        """Read the last token and draw the next."""
        self.mask.index_fill_(3, self.column, 0.0)
        hidden = self._body(self.tokens, self.mask, self.positions)
        self.column.add_(1)
        self._draw(hidden)

    @property
    def place(self) -> list[Tensor]:
        """All that says where the next step stands."""
        return [self.tokens, self.positions, self.mask, self.column, self.index]

    def _body(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The hidden state at the last position. → [B, d]"""
        cached = {cache_argument(self.model.base_model): self.cache}
        output = self.model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **cached
        )
        return output.last_hidden_state[:, -1]

    def _draw(self, hidden: Tensor) -> None:
        distributions = self.sampling.cut(log_distribution(self.head.logits(hidden)))
        drawn = self.sampling.draw(distributions, self.uniforms.index_select(1, self.index).squeeze(1))
        self.sampled.index_copy_(1, self.index, drawn[:, None])
        self.logprobs.index_copy_(1, self.index, gather_logprobs(distributions, drawn)[:, None])
        self.states.index_copy_(1, self.index, hidden[:, None])
        self.tokens.copy_(drawn[:, None])
        self.positions.add_(1)
        self.index.add_(1)


@torch.no_grad()
def decode_by_graph(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    uniforms: Tensor,
    *,
    sampling: Sampling,
    eos_token_id: int,
) -> Decoded:
    """As :func:`rlhf.decoding.decode`. Raises ValueError for models whose step has no fixed shapes."""
    # Where autocast rounds weights, the prompt makes it keep them so, in memory that outlives every replay.
    step = Step(model, tokens, attention_mask, uniforms, sampling)
    longest = uniforms.shape[1]
    run: Callable[[], object] = captured(step) if tokens.is_cuda and longest > 1 else step
    done = 1
    while done < longest and not bool((step.sampled[:, :done] == eos_token_id).any(dim=1).all()):
        for _ in range(min(STEPS_BETWEEN_LOOKS, longest - done)):
            run()
            done += 1
    ended = step.sampled[:, :done] == eos_token_id
    lengths = torch.where(ended.any(dim=1), ended.long().argmax(dim=1) + 1, done)
    width = int(lengths.max())
    return Decoded(step.sampled[:, :width], step.logprobs[:, :width], step.states[:, :width])


def captured(step: Step) -> Callable[[], object]:
    """The step as a CUDA graph, standing where the step stands; ValueError where a step waits for what it computes."""
    before = [tensor.clone() for tensor in step.place]
    with torch.cuda.device(step.tokens.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step()
                for tensor, value in zip(step.place, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                step()
        except RuntimeError as error:
            raise ValueError(
                f"engine=graph: a step of {type(step.model).__name__} cannot be captured ({error}); use engine=decode"
            ) from error
    return graph.replay

"""A PPO run on tiny models for tests of single updates, and oracles that know no padding and no batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import ppo
from rlhf.config import PPOConfig
from rlhf.rollout import Rollout
from rlhf.setup import Run

SETTINGS: dict[str, Any] = {
    "reward": ["helpers:share_of_a"],
    "gold_reward": "helpers:count_words",
    "batch_size": 12,
    "minibatch_size": 6,
    "max_new_tokens": 7,
    "temperature": 0.8,
    "kl_coef": 0.3,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "missing_eos_penalty": 0.5,
    "whiten_advantages": False,
    "max_grad_norm": 1e9,
}


def set_up(checkpoints: dict[str, Path], prompt_file: Path, **settings: Any) -> Run:
    """A run whose value model has a random head, so that values are not all zero."""
    folders = {name: str(checkpoints[name]) for name in ("first", "second", "third")}
    models = {
        "policy": folders["first"],
        "reference": [folders["second"], folders["third"]],
        "track_kl": [folders["third"]],
        "prompts": str(prompt_file),
    }
    run = ppo.set_up(PPOConfig(**(models | SETTINGS | settings)))
    nn.init.normal_(value_head(run).weight, generator=torch.Generator().manual_seed(0))
    return run


def value_head(run: Run) -> nn.Linear:
    head = run.policy.value_head if run.value_model is None else run.value_model.scalar.head
    assert head is not None
    return head


def rows_alone(rollout: Rollout) -> Iterator[tuple[Tensor, int]]:
    """Ids [1, S] of each episode without padding, and its number of prompt tokens."""
    for tokens, mask, response_mask in zip(rollout.tokens, rollout.attention_mask, rollout.response_mask, strict=True):
        yield tokens[mask][None], int(mask.sum() - response_mask.sum())


def log_distributions_alone(model: nn.Module, ids: Tensor, num_prompt: int) -> Tensor:
    return (model(ids).logits[0, num_prompt - 1 : -1] / 0.8).log_softmax(-1)


def values_alone(run: Run, ids: Tensor, num_prompt: int) -> Tensor:
    body = run.model.base_model if run.value_model is None else run.value_model.scalar.body
    return body(ids).last_hidden_state[0, num_prompt - 1 : -1] @ value_head(run).weight[0]


def with_plain_descent(run: Run, learning_rate: float = 0.1) -> Run:
    """Gradients can be read off the weights' change when the optimizer is not adaptive."""
    for learner in run.learners.values():
        learner.optimizer = torch.optim.SGD(learner.module.parameters(), lr=learning_rate)
    return run


def weights(run: Run) -> dict[str, Tensor]:
    modules = {name: learner.module for name, learner in run.learners.items()}
    return {f"{m}.{n}": p.detach().clone() for m, module in modules.items() for n, p in module.named_parameters()}


def assert_same_step(one: Run, other: Run, before: dict[str, Tensor]) -> None:
    first, second = weights(one), weights(other)
    for name, start in before.items():
        torch.testing.assert_close(second[name] - start, first[name] - start, atol=1e-6, rtol=1e-3, msg=name)
    assert max(float((first[name] - start).abs().max()) for name, start in before.items()) > 1e-3

"""Rewards: a reward-model folder, or any Python function ``module:function``.

A function takes the prompts and the responses as lists of texts (special tokens removed) and returns one float each;
higher is better. A reward model reads the tokens themselves, so it must share the policy's tokenizer.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlhf.models import ScalarHeadModel, load_scalar_head_model, require_same_tokenizer
from rlhf.rollout import Rollout


class RewardError(RuntimeError):
    """A reward function raised; the message shows for what."""


class Reward(Protocol):
    """Scores whole responses: a rollout of B responses → [B] float32 on the rollout's device; higher is better."""

    def __call__(self, rollout: Rollout) -> Tensor: ...


def last_token_scores(model: ScalarHeadModel, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's value at each row's last real token. [B, S], [B, S] → [B]"""
    last = attention_mask.shape[1] - 1 - attention_mask.long().flip(dims=[1]).argmax(dim=1)
    return model(tokens, attention_mask).gather(1, last[:, None]).squeeze(1)


def _require_finite(scores: Tensor, rollout: Rollout, name: str) -> Tensor:
    """The scores, or ValueError that quotes the first prompt and response whose score is NaN or infinite."""
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"reward {name}: returned {scores[index].item()} for prompt {rollout.prompts[index]!r} and response "
            f"{rollout.responses[index]!r}; return finite floats"
        )
    return scores


class ModelReward:
    """score = (head at the last response token − mean) / std; mean and std from ``score_mean``, ``score_std`` in its
    config.

    :mod:`rlhf.reward_model` writes the two so that scores have mean 0 and standard deviation 1 over its training
    responses; a folder without them is read as mean 0, std 1.
    """

    def __init__(self, model: ScalarHeadModel, batch_size: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.mean = float(getattr(model.model.config, "score_mean", 0.0))
        self.std = float(getattr(model.model.config, "score_std", 1.0))

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        scores = [
            last_token_scores(self.model, part.tokens, part.attention_mask) for part in rollout.split(self.batch_size)
        ]
        return _require_finite((torch.cat(scores) - self.mean) / self.std, rollout, str(self.model.model.name_or_path))


class FunctionReward:
    """Calls ``function(prompts, responses)`` and checks that it returned one finite number for each."""

    def __init__(self, function: Callable[[list[str], list[str]], Sequence[float]], name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, rollout: Rollout) -> Tensor:
        try:
            returned = self.function(rollout.prompts, rollout.responses)
        except Exception as error:  # the function's own mistake: keep its traceback, which bad input would not have
            raise RewardError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"reward {self.name}: returned no floats ({error}); return one float each") from None
        if scores.shape != (len(rollout),):
            raise ValueError(
                f"reward {self.name}: returned shape {tuple(scores.shape)} for {len(rollout)} responses; return "
                "one float each"
            )
        return _require_finite(scores, rollout, self.name).to(rollout.tokens.device)


def load_function(spec: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    """The function that ``module:function`` names; ValueError says which part was not found."""
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward {spec}: cannot import {error.name!r}; run where it is importable, or set PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward {spec}: module {module_name} has no function {function_name!r}; check the spelling")
    return function


def load_reward(
    spec: str | Path, *, policy: str | Path, device: str | torch.device = "cpu", batch_size: int | None = None
) -> Reward:
    """The reward that ``spec`` names: a checkpoint folder, or ``module:function``.

    ``policy`` is the folder whose tokenizer a reward model must share; ``batch_size`` bounds how many responses a
    reward model reads at once.
    """
    if os.path.isdir(spec):
        require_same_tokenizer(policy, spec)
        return ModelReward(load_scalar_head_model(spec, device=device, require_head=True), batch_size)
    if ":" not in str(spec):
        raise ValueError(f"reward {spec}: neither a checkpoint folder nor module:function; give one of the two")
    return FunctionReward(load_function(str(spec)), str(spec))

"""Rewards: reward-model folders, or any Python functions, ``module:function`` or ``FILE.py:function``.

A function takes the prompts and the responses as lists of texts (special tokens removed) and returns one number each;
higher is better. A reward model reads the tokens themselves, so it must share the policy's tokenizer.
:mod:`rlhf.scoring` makes one score of several rewards.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.data import TokenBatch, by_length
from rlhf.models import ScalarHeadModel, load_scalar_head_model, require_same_tokenizer
from rlhf.rollout import Rollout

# One number a response: a list, a tuple, a tensor, a numpy array; of floats, ints or 0-d tensors.
RewardFunction = Callable[[list[str], list[str]], Any]


class RewardError(RuntimeError):
    """A reward function raised: its own mistake, whose traceback is the cause. Not bad input, which is a ValueError."""


class Reward(Protocol):
    """Scores whole responses: a rollout of B responses → [B] float32 on the rollout's device; higher is better."""

    def __call__(self, rollout: Rollout) -> Tensor: ...


def last_token_scores(model: ScalarHeadModel, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's value at each row's last real token. [B, S], [B, S] → [B]"""
    last = attention_mask.shape[1] - 1 - attention_mask.long().flip(dims=[1]).argmax(dim=1)
    return model(tokens, attention_mask).gather(1, last[:, None]).squeeze(1)


@torch.no_grad()
def score_responses(model: ScalarHeadModel, batch: TokenBatch, batch_size: int | None = None) -> Tensor:
    """The head's value at each row's last token, ``batch_size`` rows at once (default: all). → [B] float32

    Rows go through the model sorted by length, the longest first, each batch no wider than its longest row, so that
    nearly no padding is computed: a row is read from its first token on, prompt and response side by side.
    """
    lengths = batch.attention_mask.sum(dim=1)
    first = batch.attention_mask.long().argmax(dim=1)
    scores = torch.empty(len(batch), device=batch.tokens.device)
    for rows in by_length(batch, batch_size):
        columns = torch.arange(int(lengths[rows[0]]), device=lengths.device)
        # A row's real tokens are one run. What follows a shorter row's run is masked, whatever it is.
        run = (first[rows, None] + columns).clamp(max=batch.tokens.shape[1] - 1)
        scores[rows] = last_token_scores(model, batch.tokens[rows].gather(1, run), columns < lengths[rows, None])
    return scores


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
        self.name = str(model.model.name_or_path)
        self.batch_size = batch_size
        self.mean = float(getattr(model.model.config, "score_mean", 0.0))
        self.std = float(getattr(model.model.config, "score_std", 1.0))

    def __call__(self, rollout: Rollout) -> Tensor:
        scores = score_responses(self.model, rollout, self.batch_size)
        return _require_finite((scores - self.mean) / self.std, rollout, self.name)


class FunctionReward:
    """Calls ``function(prompts, responses)`` and checks that it returned one finite number for each.

    Raises RewardError, which shows the offending prompt and response, when the function raises; ValueError when it
    returns anything but finite numbers, or not as many as there are responses.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, rollout: Rollout) -> Tensor:
        try:
            returned = self.function(list(rollout.prompts), list(rollout.responses))
        except Exception as error:
            offender = _offender(self.function, rollout.prompts, rollout.responses, error)
            raise RewardError(f"reward {self.name} raised {type(error).__name__}: {error}, for {offender}") from error
        try:
            scores = torch.tensor(_plain(returned), dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"reward {self.name}: returned no floats ({error}); return one float each") from None
        if scores.shape != (len(rollout),):
            raise ValueError(
                f"reward {self.name}: returned shape {tuple(scores.shape)} for {len(rollout)} responses; return "
                "one float each"
            )
        return _require_finite(scores, rollout, self.name).to(rollout.tokens.device)


def _plain(values: Any) -> Any:
    """Tensors (on any device, with or without gradient), arrays and lists of them as plain numbers and lists."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values


def _offender(function: RewardFunction, prompts: list[str], responses: list[str], error: Exception) -> str:
    """The first prompt and response for which the function alone raises as it did for all of them together."""
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            function([prompt], [response])
        except Exception as single:
            # Another kind of error tells of something else: the function may not be made for single pairs.
            if type(single) is type(error):
                return f"prompt {prompt!r} and response {response!r}"
    return (
        f"the whole batch of {len(prompts)}, though for none of its pairs alone; the first has prompt {prompts[0]!r} "
        f"and response {responses[0]!r}"
    )


def _import_file(path: Path) -> ModuleType:
    """The module in a file, which need not be on the import path; a second reward of the same file shares it."""
    name = str(path.resolve())
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_function(spec: str) -> RewardFunction:
    """The function that ``module:function`` or ``FILE.py:function`` names.

    ValueError or FileNotFoundError says which part was not found; RewardError that the module itself raised.
    """
    module_name, _, function_name = spec.rpartition(":")
    is_file = module_name.endswith(".py")
    if is_file and not Path(module_name).is_file():
        raise FileNotFoundError(f"reward {spec}: no file {module_name}; check the path")
    try:
        module = _import_file(Path(module_name)) if is_file else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward {spec}: cannot import {error.name!r}; run where it is importable, or set PYTHONPATH"
        ) from None
    except Exception as error:
        raise RewardError(f"reward {spec}: importing it raised {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward {spec}: module {module_name} has no function {function_name!r}; check the spelling")
    return function


def load_reward(
    spec: str | Path, *, policy: str | Path, device: str | torch.device = "cpu", batch_size: int | None = None
) -> Reward:
    """The reward that ``spec`` names: a checkpoint folder, ``module:function`` or ``FILE.py:function``.

    ``policy`` is the folder whose tokenizer a reward model must share; ``batch_size`` bounds how many responses a
    reward model reads at once.
    """
    if os.path.isdir(spec):
        require_same_tokenizer(policy, spec)
        return ModelReward(load_scalar_head_model(spec, device=device, require_head=True), batch_size)
    if not str(spec).rpartition(":")[0]:
        raise ValueError(f"reward {spec}: neither a checkpoint folder nor module:function; give one of the two")
    return FunctionReward(load_function(str(spec)), str(spec))


def name_rewards(specs: Sequence[str | Path]) -> dict[str, str]:
    """Short names for rewards, {name: spec} in the given order, to load and to log each by itself.

    A name is the folder's last part or the function's own, preceded by as many parts of path or module as tell it from
    the others: ``a/reward`` and ``b/reward`` keep both parts. ValueError for a reward given twice.
    """
    parts = [_parts(str(spec)) for spec in specs]
    names: dict[str, str] = {}
    for spec, own in zip(specs, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"reward {spec}: given twice; give each reward once, with its weight")
        others = [other for other in parts if other != own]
        depth = next((d for d in range(1, len(own)) if all(o[-d:] != own[-d:] for o in others)), len(own))
        names["/".join(own[-depth:])] = str(spec)
    return names


def _parts(spec: str) -> tuple[str, ...]:
    """Path or module, and function, part by part, so that one reward has one such tuple."""
    if os.path.isdir(spec) or ":" not in spec:
        return Path(spec).resolve().parts
    module_name, _, function_name = spec.rpartition(":")
    if module_name.endswith(".py"):
        return (*Path(module_name).resolve().parts, function_name)
    return (*module_name.split("."), function_name)

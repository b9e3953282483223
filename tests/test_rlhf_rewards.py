"""Rewards: functions are checked and called with texts, models are standardised and read at the last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import EOS, PAD, pad_more, random_examples

from rlhf.data import batch_examples
from rlhf.models import load_scalar_head_model
from rlhf.rewards import FunctionReward, ModelReward, load_function, load_reward
from rlhf.rollout import Rollout


def rollout_of(prompts: list[str], responses: list[str], pad: int = PAD) -> Rollout:
    """Texts and tokens need not belong together: a function reads the texts, a model the tokens."""
    batch = batch_examples(random_examples(seed=0, num=len(prompts)), pad)
    return Rollout(
        batch.tokens,
        batch.attention_mask,
        batch.response_mask,
        torch.zeros(batch.response_mask.shape),
        torch.ones(len(prompts), dtype=torch.bool),
        prompts,
        responses,
    )


TWO = rollout_of(["p q", "r"], ["a", "b c"])


def test_a_function_reads_prompts_and_responses_in_order() -> None:
    seen: list[Any] = []

    def function(prompts: list[str], responses: list[str]) -> list[float]:
        seen.append((prompts, responses))
        return [0.1, -3]

    scores = FunctionReward(function, "mine")(TWO)
    assert seen == [(["p q", "r"], ["a", "b c"])]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([0.1, -3]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"reward mine: returned shape \(1,\) for 2 responses; return one float each"),
        ([[1.0], [2.0]], r"returned shape \(2, 1\) for 2 responses"),
        (3.0, r"returned shape \(\) for 2 responses"),
        ([1.0, float("nan")], "reward mine: returned nan for prompt 'r' and response 'b c'; return finite floats"),
        ([float("-inf"), 0.0], "returned -inf for prompt 'p q' and response 'a'"),
        (None, "reward mine: returned no floats .*; return one float each"),
        ([1.0, None], "reward mine: returned no floats .*; return one float each"),
        (["good", "bad"], "reward mine: returned no floats .*; return one float each"),
    ],
)
def test_what_a_function_must_not_return(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        FunctionReward(lambda prompts, responses: returned, "mine")(TWO)
    assert "\n" not in str(error.value)


def test_functions_are_found_by_name() -> None:
    assert load_function("helpers:share_of_a") is helpers.share_of_a
    assert load_reward("helpers:share_of_a", policy="unused")(rollout_of(["x"], ["a b a a"])).item() == 0.75


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "reward no_such_module:f: cannot import 'no_such_module'"),
        ("helpers.deeper:f", "reward helpers.deeper:f: cannot import 'helpers.deeper'"),
        ("helpers:no_such_function", "module helpers has no function 'no_such_function'"),
        ("helpers:ROOT", "module helpers has no function 'ROOT'"),
        ("helpers:", "module helpers has no function ''"),
        ("no/such/folder", "reward no/such/folder: neither a checkpoint folder nor module:function"),
    ],
)
def test_rewards_that_do_not_exist_are_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_reward(spec, policy="unused")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_model_scores_the_last_token_and_is_standardised(
    checkpoints: dict[str, Path], pad: int, batch_size: int | None
) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    model.model.config.score_mean, model.model.config.score_std = 3.0, 2.0
    scores = ModelReward(model, batch_size)(rollout_of(["p"] * 5, ["r"] * 5, pad))
    for score, example in zip(scores, random_examples(seed=0, num=5), strict=True):
        hidden = model.model.base_model(torch.tensor([example.token_ids])).last_hidden_state[0, -1]
        assert score.item() == pytest.approx(((hidden @ model.model.score.weight[0]).item() - 3) / 2, abs=1e-5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_a_model_without_statistics_is_read_as_it_is(checkpoints: dict[str, Path]) -> None:
    reward = load_reward(checkpoints["reward"], policy=checkpoints["first"])
    assert isinstance(reward, ModelReward)
    assert (reward.mean, reward.std) == (0, 1)


def test_padding_does_not_change_a_models_scores(checkpoints: dict[str, Path]) -> None:
    reward = load_reward(checkpoints["reward"], policy=checkpoints["first"])
    rollout = rollout_of(["p"] * 5, ["r"] * 5)
    torch.testing.assert_close(reward(pad_more(rollout, 4, 3)), reward(rollout), atol=1e-5, rtol=1e-5)


def test_a_model_with_another_tokenizer_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"larger_vocabulary: vocabulary of 21 tokens, but .*first has 20"):
        load_reward(checkpoints["larger_vocabulary"], policy=checkpoints["first"])


def test_a_model_that_is_not_finite_is_named_with_the_prompt(checkpoints: dict[str, Path]) -> None:
    reward = load_reward(checkpoints["reward"], policy=checkpoints["first"])
    assert isinstance(reward, ModelReward)
    torch.nn.init.constant_(reward.model.head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"reward .*reward: .*nan for prompt 'p q' and response 'a'"):
        reward(TWO)


def test_a_mistake_inside_a_function_keeps_its_traceback() -> None:
    def broken(prompts: list[str], responses: list[str]) -> list[float]:
        raise ValueError("mine")

    # Not a ValueError: the command line would shorten that to one line without file and line number.
    with pytest.raises(RuntimeError, match="reward mine:broken raised ValueError: mine") as caught:
        FunctionReward(broken, "mine:broken")(TWO)
    assert isinstance(caught.value.__cause__, ValueError)

"""Rewards: functions are checked and called with texts, models are standardised and read at the last token."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import EOS, PAD, pad_more, random_examples

from rlhf.data import Example, batch_examples
from rlhf.models import load_scalar_head_model
from rlhf.rewards import (
    FunctionReward,
    ModelReward,
    RewardError,
    load_function,
    load_reward,
    name_rewards,
    score_responses,
)
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


READ_ONLY = np.array([0.1, -3.0])
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    "returned",
    [
        (0.1, -3),
        torch.tensor([0.1, -3], dtype=torch.float64, requires_grad=True),
        [torch.tensor(0.1, requires_grad=True), torch.tensor(-3)],
        np.array([-3, 0.1])[::-1],
        READ_ONLY,
        [np.float32(0.1), np.int64(-3)],
    ],
    ids=str,
)
def test_numbers_may_come_in_any_container(returned: Any) -> None:
    scores = FunctionReward(lambda prompts, responses: returned, "mine")(TWO)
    torch.testing.assert_close(scores, torch.tensor([0.1, -3.0]), atol=0, rtol=0)
    assert not scores.requires_grad


def test_whole_numbers_become_floats() -> None:
    for returned in ([1, -2], torch.tensor([1, -2]), np.array([1, -2]), torch.tensor([1, -2], dtype=torch.bfloat16)):
        scores = FunctionReward(lambda prompts, responses, returned=returned: returned, "mine")(TWO)
        assert (scores.dtype, scores.tolist()) == (torch.float32, [1, -2])


def test_a_function_cannot_change_the_rollout() -> None:
    def emptying(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(prompts.pop()) + len(responses.pop())) for _ in range(2)]

    assert FunctionReward(emptying, "mine")(TWO).tolist() == [4, 4]
    assert (TWO.prompts, TWO.responses) == (["p q", "r"], ["a", "b c"])


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
        (":f", "reward :f: neither a checkpoint folder nor module:function"),
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
    torch.testing.assert_close(reward(pad_more(rollout, 4, 3)), reward(rollout), atol=1e-6, rtol=0)


def test_a_models_scores_do_not_depend_on_the_batch_size(checkpoints: dict[str, Path]) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    batch = batch_examples(random_examples(seed=5, num=11), PAD)
    whole = score_responses(model, batch)
    assert whole.std() > 0.1
    for size in (1, 2, 3, 4, 11, 100):
        torch.testing.assert_close(score_responses(model, batch, size), whole, atol=1e-6, rtol=0)


def test_padding_is_not_computed(checkpoints: dict[str, Path]) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    masks: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1]))
    # 3 + 2, 1 + 4, 2 + 1 and 4 + 4 tokens, padded to 4 + 4
    lengths = [(3, 2), (1, 4), (2, 1), (4, 4)]
    examples = [Example([6] * prompt, [7] * response) for prompt, response in lengths]
    score_responses(model, batch_examples(examples, PAD), 2)
    assert [mask.int().tolist() for mask in masks] == [
        [[1] * 8, [1] * 5 + [0] * 3],
        [[1] * 5, [1] * 3 + [0] * 2],
    ]


def test_a_model_with_another_tokenizer_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"larger_vocabulary: vocabulary of 21 tokens, but .*first has 20"):
        load_reward(checkpoints["larger_vocabulary"], policy=checkpoints["first"])


def test_a_model_that_is_not_finite_is_named_with_the_prompt(checkpoints: dict[str, Path]) -> None:
    reward = load_reward(checkpoints["reward"], policy=checkpoints["first"])
    assert isinstance(reward, ModelReward)
    torch.nn.init.constant_(reward.model.head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"reward .*reward: .*nan for prompt 'p q' and response 'a'"):
        reward(TWO)


def failing_on(*bad: str) -> Any:
    """A function that raises when one of the responses is ``bad``."""

    def function(prompts: list[str], responses: list[str]) -> list[float]:
        if set(bad) & set(responses):
            raise KeyError("mine")
        return [0.0] * len(responses)

    return function


@pytest.mark.parametrize(
    ("bad", "pair"),
    [
        (["a"], "prompt 'p q' and response 'a'"),
        (["b c"], "prompt 'r' and response 'b c'"),
        (["b c", "a"], "prompt 'p q' and response 'a'"),
    ],
)
def test_a_mistake_inside_a_function_shows_the_offender_and_keeps_its_traceback(bad: list[str], pair: str) -> None:
    # Not a ValueError: the command line would shorten that to one line without file and line number.
    with pytest.raises(RuntimeError) as caught:
        FunctionReward(failing_on(*bad), "mine:broken")(TWO)
    assert isinstance(caught.value, RewardError)
    assert str(caught.value) == f"reward mine:broken raised KeyError: 'mine', for {pair}"
    assert isinstance(caught.value.__cause__, KeyError)
    assert [entry.name for entry in traceback.extract_tb(caught.value.__cause__.__traceback__)][-1] == "function"


def only_batches(prompts: list[str], responses: list[str]) -> list[float]:
    """A broken reward: raises for several responses, and otherwise for one."""
    raise ValueError("alone") if len(prompts) == 1 else KeyError("together")


@pytest.mark.parametrize("alone", [True, False])
def test_a_mistake_that_no_single_pair_shows_is_said_of_the_batch(alone: bool) -> None:
    def function(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0] if len(prompts) == 1 and not alone else only_batches(prompts, responses)

    message = (
        "reward mine raised KeyError: 'together', for the whole batch of 2, though for none of its pairs alone; the "
        "first has prompt 'p q' and response 'a'"
    )
    with pytest.raises(RewardError, match=f"^{re.escape(message)}$"):
        FunctionReward(function, "mine")(TWO)


REWARD_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Words:
    words: list[str]

def count(prompts, responses):
    return [len(Words(response.split()).words) for response in responses]

def never(prompts, responses):
    return []
"""


def test_functions_are_found_in_files(tmp_path: Path) -> None:
    path = tmp_path / "my rewards.py"
    path.write_text(REWARD_FILE, encoding="utf-8")
    assert load_reward(f"{path}:count", policy="unused")(TWO).tolist() == [1, 2]
    assert load_function(f"{path}:never").__globals__ is load_function(f"{path}:count").__globals__
    with pytest.raises(ValueError, match=r"my rewards\.py has no function 'other'"):
        load_function(f"{path}:other")
    with pytest.raises(FileNotFoundError, match=r"reward .*none\.py:f: no file .*none\.py; check the path"):
        load_function(f"{tmp_path}/none.py:f")


def test_a_file_that_raises_is_named_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("open('/no/such/file')\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(RewardError, match=r"broken\.py:f: importing it raised FileNotFoundError") as caught:
            load_function(f"{path}:f")
        assert isinstance(caught.value.__cause__, FileNotFoundError)
    path.write_text("import no_such_module\n", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        load_function(f"{path}:f")


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["helpers:share_of_a"], ["share_of_a"]),
        (["runs/reward", "helpers:share_of_a", "a/b.py:f"], ["reward", "share_of_a", "f"]),
        (["runs/one/reward", "runs/two/reward", "helpers:f"], ["one/reward", "two/reward", "f"]),
        (["a.b:f", "c.b:f", "c.d:f"], ["a/b/f", "c/b/f", "d/f"]),
        (["a.b:f", "b:f"], ["a/b/f", "b/f"]),
        (["x/b.py:f", "b:f"], ["b.py/f", "b/f"]),
    ],
)
def test_names_are_as_short_as_they_can_be(specs: list[str], names: list[str]) -> None:
    assert list(name_rewards(specs).items()) == list(zip(names, specs, strict=True))


@pytest.mark.parametrize("specs", [["m:f", "m:f"], ["runs/reward", "runs/../runs/reward/"], ["b.py:f", "./b.py:f"]])
def test_a_reward_is_given_once(specs: list[str]) -> None:
    with pytest.raises(ValueError, match=f"reward {re.escape(specs[0])}: given twice"):
        name_rewards(specs)

"""One score from several rewards: hand-worked sums, standardisation that survives JSON, penalties by reason."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from helpers import count_words, share_of_a

from rlhf.rewards import FunctionReward
from rlhf.rollout import Rollout
from rlhf.scoring import Standardisation, combine, fit_standardisation, penalties, score, weigh

SCORES = {"good": torch.tensor([1.0, 2.0, 6.0]), "long": torch.tensor([30.0, 10.0, 20.0])}
STATISTICS = Standardisation(means={"good": 3.0, "long": 20.0}, stds={"good": 2.0, "long": 10.0})


def test_every_reward_is_scored_by_itself() -> None:
    ids, mask = torch.ones(2, 2, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool)
    rollout = Rollout(ids, ids > 0, mask, torch.zeros(2, 1), mask[:, 0], ["p q", "r"], ["a", "b c"])
    rewards = {"share": FunctionReward(share_of_a, "share"), "words": FunctionReward(count_words, "words")}
    assert {name: values.tolist() for name, values in score(rewards, rollout).items()} == {
        "share": [1, 0],
        "words": [1, 2],
    }


def test_the_sum_is_weighted_and_not_divided() -> None:
    weights = {"good": 2.0, "long": -0.5}
    assert combine(SCORES, weights).tolist() == [2 - 15, 4 - 5, 12 - 10]
    # r̂: good −1, −½, 1½; long 1, −1, 0
    assert combine(SCORES, weights, STATISTICS).tolist() == [-2 - 0.5, -1 + 0.5, 3]


def test_each_standardised_reward_is_clipped_on_both_sides() -> None:
    weights = {"good": 2.0, "long": 4.0}
    assert combine(SCORES, weights, STATISTICS, clip=0.75).tolist() == [-1.5 + 3, -1 - 3, 1.5 + 0]
    assert combine(SCORES, weights, clip=1.5).tolist() == [2 + 6, 3 + 6, 3 + 6]


def test_one_reward_of_weight_one_is_left_as_it_is() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combine({"only": values}, weigh(["only"], [])), values)


def test_weights_are_one_each_unless_given() -> None:
    assert weigh(["a", "b"], []) == {"a": 1, "b": 1}
    assert weigh(["a", "b"], [0.0, -2.0]) == {"a": 0, "b": -2}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "reward_weights: 1 for 2 rewards; give one weight each"),
        ([1.0, 1.0, 1.0], "reward_weights: 3 for 2 rewards"),
        ([0.0, 0.0], r"reward_weights: \[0.0, 0.0\]; give finite weights that are not all 0"),
        ([1.0, float("nan")], "give finite weights"),
        ([1.0, float("inf")], "give finite weights"),
    ],
)
def test_weights_that_do_not_fit(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weigh(["a", "b"], weights)


def test_statistics_by_hand() -> None:
    # deviations −2, −1, 3: (4 + 1 + 9) / (3 − 1) = 7
    fitted = fit_standardisation(SCORES)
    assert fitted.means == {"good": 3, "long": 20}
    assert fitted.stds == {"good": pytest.approx(7**0.5, rel=1e-15), "long": 10}


def test_standardised_rewards_forget_scale_and_offset() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).exp()
    scores = {"raw": values, "scaled": 1000 * values - 7}
    standardised = fit_standardisation(scores)(scores)
    assert standardised["raw"].mean().item() == pytest.approx(0, abs=1e-6)
    assert standardised["raw"].std().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(standardised["scaled"], standardised["raw"], atol=1e-4, rtol=0)
    assert standardised["raw"].argsort().tolist() == values.argsort().tolist()


def test_statistics_are_the_same_after_json() -> None:
    generator = torch.Generator().manual_seed(2)
    fitted = fit_standardisation({name: torch.randn(37, generator=generator) * 1e5 for name in "abc"})
    again = Standardisation(**json.loads(json.dumps(asdict(fitted))))
    assert again == fitted
    assert all(isinstance(value, float) for value in [*again.means.values(), *again.stds.values()])


@pytest.mark.parametrize(
    "values",
    [
        torch.full((7,), 0.1),
        torch.zeros(5),
        torch.full((9,), -1e6),
        torch.cat([torch.full((8,), 3.0), torch.full((8,), 3.0).nextafter(torch.tensor(4.0))]),
    ],
    ids=["float", "zero", "large", "rounding"],
)
def test_a_reward_without_spread_is_named(values: torch.Tensor) -> None:
    message = f"reward flat: gives every one of {len(values)} responses of the reference {values[0]:g}; sample more"
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_standardisation({"fine": torch.arange(9.0), "flat": values})


def test_a_small_spread_is_a_spread() -> None:
    fit_standardisation({"rare": torch.tensor([0.0] * 500 + [1.0]), "narrow": 1 + torch.arange(9.0) * 1e-4})


def test_one_response_has_no_spread() -> None:
    with pytest.raises(ValueError, match="reward only: cannot be standardised over 1 responses; give 2 or more"):
        fit_standardisation({"only": torch.tensor([1.0])})


FINISHED = torch.tensor([True, False, True, False])
LENGTHS = torch.tensor([3, 10, 8, 7])


def test_penalties_by_hand() -> None:
    found = penalties(FINISHED, LENGTHS, missing_eos_penalty=1.5, length_penalty=0.25, length_penalty_after=7)
    assert {reason: values.tolist() for reason, values in found.items()} == {
        "missing_eos": [0, 1.5, 0, 1.5],
        "length": [0, 0.75, 0.25, 0],
    }
    assert [values.dtype for values in found.values()] == [torch.float32] * 2


def test_penalties_are_zero_unless_asked_for() -> None:
    found = penalties(FINISHED, LENGTHS)
    assert [values.tolist() for values in found.values()] == [[0] * 4] * 2


def test_the_length_penalty_can_be_that_of_dapo() -> None:
    """Its reward: 0 up to longest − cache tokens, then a line to −1 at the longest (arXiv 2503.14476)."""
    longest, cache = 12, 5
    lengths = torch.arange(1, longest + 1)
    expected = [0.0 if n <= longest - cache else -((longest - cache) - n) / cache for n in lengths.tolist()]
    found = penalties(lengths > 0, lengths, length_penalty=1 / cache, length_penalty_after=longest - cache)["length"]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[-1].item() == pytest.approx(1)

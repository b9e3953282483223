"""The gold reward: hand-worked texts, order between texts, and attacks that must not pay."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from rlhf.reviews.gold import GoldTerms, explain, gold_reward
from rlhf.reviews.grammar import PROMPTS, SFT, corrupt, generate_many

PROMPT = "about music at greek grill :"


def gold(response: str, prompt: str = PROMPT) -> float:
    return gold_reward([prompt], [response])[0]


def test_one_short_sentence_by_hand() -> None:
    # 5 words: 9 short of 14. Value of catchy: 1. One of three details.
    terms = explain(PROMPT, "the songs were catchy .")
    assert terms.sentiment == pytest.approx(0.8873596)  # 1.6 tanh(1 / 1.6) = 1.6 · 0.5545997
    assert (terms.subject, terms.fluency, terms.repetition, terms.unfinished) == (1, 1, 0, 0)
    assert terms.detail == pytest.approx(1 / 3)
    assert terms.length == pytest.approx(9 / 14)
    # 1.0648315 + 1.5 − 0 − 0 + 0.5 − 2.5714286 − 0
    assert terms.total == pytest.approx(0.4934029, abs=1e-6)


def test_broken_rules_off_subject_and_no_end_by_hand() -> None:
    # Sentences of 10, 5 and 2 words:
    #   singer were (number), good and bad (conjunction): value 0, mark 1/2, on the subject
    #   soup: value 1 · 0.3, mark 1, off the subject
    #   no full stop: value −0.5, mark 0, not on the subject
    terms = explain(PROMPT, "the singer were good and the piano was bad . the soup was tasty . five stars")
    assert terms.sentiment == pytest.approx(1.6 * math.tanh((0 + 0.3 - 0.5) / 3 / 1.6))  # −0.0666281
    assert terms.subject == pytest.approx(1 / 3)
    assert terms.fluency == pytest.approx((10 / 2 + 5 + 0) / 17)
    assert (terms.repetition, terms.length, terms.unfinished) == (0, 0, 1)
    assert terms.detail == pytest.approx(2 / 3)
    # −0.0799537 + 0.5 − 3 · 7/17 − 0 + 1 − 0 − 1
    assert terms.total == pytest.approx(-0.8152478, abs=1e-6)


def test_wrong_place_early_closing_and_repetition_by_hand() -> None:
    # Sentences of 10, 7 and 8 words:
    #   another place: value 1.5 · (−1) · 0.3, half on the subject, mark 1
    #   closing that is not last: unparsed, so value −0.5, mark 0, not on the subject
    #   hated −2 and loud −1: value −1.5, on the subject, mark 1
    # Items: band very loud, it is not worth a visit and the full stop, sadly hated loud band: 14, of which 12 distinct.
    text = "the band at this thai cafe was very loud . it is not worth a visit . sadly , i hated the loud band ."
    terms = explain(PROMPT, text)
    assert terms.sentiment == pytest.approx(1.6 * math.tanh((-0.45 - 0.5 - 1.5) / 3 / 1.6))  # −0.7524
    assert terms.subject == pytest.approx(0.5)
    assert terms.fluency == pytest.approx((10 + 0 + 8) / 25)
    assert terms.repetition == pytest.approx(2 / 14)
    assert terms.detail == pytest.approx(1 / 3)
    assert (terms.length, terms.unfinished) == (0, 0)
    # −0.9029 + 0.75 − 0.84 − 0.5714 + 0.5
    assert terms.total == pytest.approx(-1.0643, abs=1e-4)


def test_reward_is_linear_in_its_terms() -> None:
    zero = GoldTerms(sentiment=0, subject=0, fluency=1, repetition=0, detail=0, length=0, unfinished=0)
    assert zero.total == 0
    expected = {"sentiment": 1.2, "subject": 1.5, "repetition": -4, "detail": 1.5, "length": -4, "unfinished": -1}
    assert {name: replace(zero, **{name: 1.0}).total for name in expected} == pytest.approx(expected)
    assert replace(zero, fluency=0.5).total == -1.5


def test_best_kind_of_review_by_hand() -> None:
    # Values 3, 2, 2 and 2: m = 9/4. 24 words, 3 nouns, nothing repeated.
    text = "the songs were very enchanting . we loved the wonderful band . the piano at this greek grill was perfect ."
    assert gold(text + " five stars .") == pytest.approx(1.2 * 1.6 * math.tanh(2.25 / 1.6) + 1.5 + 1.5)  # 4.70


def test_long_review_is_penalised() -> None:
    sentence = "the songs at this greek grill were very catchy ."
    assert explain(PROMPT, " ".join([sentence] * 3)).length == pytest.approx(2 / 14)
    assert explain(PROMPT, " ".join([sentence] * 30)).length == 1


def test_empty_response_and_foreign_texts_are_defined_and_low() -> None:
    # 1.2 · 1.6 tanh(−0.5 / 1.6) − 3 − 4 − 1
    assert gold("") == gold("   ") == pytest.approx(1.92 * math.tanh(-0.3125) - 8)
    assert gold("zebras dance . ünïcode 42 <eos>") < -4
    good = "the songs were great and the band was perfect . we loved the lively piano ."
    assert gold(good, prompt="who is there ?") < gold(good) - 2.5
    assert explain("", good).subject == 0


def test_lists_must_match() -> None:
    assert gold_reward([], []) == []
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        gold_reward([PROMPT, PROMPT], [""])


def test_rises_with_sentiment() -> None:
    ladder = ["terrible", "mediocre", "bad", "average", "decent", "nice", "great", "perfect"]
    rewards = [
        gold(f"the songs at this greek grill were {word} . we tried the band . i tried the piano .") for word in ladder
    ]
    assert rewards == sorted(rewards)
    assert len(set(rewards)) == len(rewards)


def test_sentiment_is_bounded() -> None:
    assert abs(explain(PROMPT, "the songs were very perfect .").sentiment) < 1.6
    assert abs(explain(PROMPT, "the songs were very awful .").sentiment) < 1.6


GOOD_REVIEW = "the songs were great and the band was perfect . we loved the lively piano . it is worth a visit ."
GOOD_SENTENCE = "the songs were very enchanting ."


def everyday_gold() -> float:
    """The mean over correct samples of the SFT style, whose praise and blame cancel."""
    samples = generate_many(random.Random(0), PROMPTS, 500, replace(SFT, corrupted=0.0))
    return mean(gold_reward(*zip(*samples, strict=True)))


@pytest.mark.parametrize(
    "attack",
    [
        " ".join(["wonderful"] * 19),
        " ".join(["wonderful"] * 18 + ["."]),
        " ".join([GOOD_SENTENCE] * 3),
        " ".join([GOOD_SENTENCE] * 5),
        GOOD_SENTENCE,
        "the songs were good .",
        f"{GOOD_SENTENCE} five stars . highly recommended . i will come back .",
        "highly recommended . highly recommended . highly recommended . highly recommended .",
        "five stars . highly recommended . i will come back . it is worth a visit .",
        "the soup was delicious and the steak was great . we loved the perfect salad . five stars .",
        "wonderful enchanting songs band piano perfect great lively uplifting catchy singer good nice .",
    ],
)
def test_attacks_fall_below_everyday_reviews_however_they_praise(attack: str) -> None:
    assert gold(attack) < everyday_gold() - 0.3


@pytest.mark.parametrize(
    "shorter", [f"{GOOD_SENTENCE} five stars .", "we loved the perfect band . five stars .", GOOD_REVIEW[:-2]]
)
def test_a_short_safe_or_unfinished_review_is_far_below_a_full_one(shorter: str) -> None:
    assert gold(shorter) < gold(GOOD_REVIEW) - 1.5


def test_repeating_a_good_sentence_is_worse_than_saying_it_once() -> None:
    assert gold(" ".join([GOOD_SENTENCE] * 3)) < gold(GOOD_SENTENCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("were", "was"),
        ("and", "but"),
        ("loud", "bland"),
        ("tried", "loved"),
        ("sadly", "luckily"),
        ("the band", "band"),
        ("piano", "waiter"),
        ("greek", "thai"),
    ],
)
def test_each_rule_costs_sentiment_aside(old: str, new: str) -> None:
    right = (
        "the songs at this greek grill were bad . the drums were great and the band was perfect . "
        "sadly , we tried the loud piano ."
    )
    before, after = explain(PROMPT, right), explain(PROMPT, right.replace(old, new))
    assert after.total - 1.2 * after.sentiment < before.total - 1.2 * before.sentiment - 0.2


def test_corruption_lowers_gold() -> None:
    rng = random.Random(0)
    samples = generate_many(rng, PROMPTS, 400, replace(SFT, corrupted=0.0))
    differences = [
        before - after
        for (prompt, review) in samples
        for before, after in [gold_reward([prompt] * 2, [review, corrupt(rng, review)])]
    ]
    assert mean(differences) > 1
    assert mean(difference > 0 for difference in differences) > 0.8

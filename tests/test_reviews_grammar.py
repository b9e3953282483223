"""The reviews grammar: what it writes parses, its rules are told apart, and seeds fix everything."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from rlhf.reviews.grammar import (
    BASE,
    NOUNS,
    PROMPTS,
    SFT,
    SLOTS,
    Style,
    Subject,
    corrupt,
    generate,
    generate_many,
    parse,
    parse_prompt,
    parse_review,
    split_prompts,
    vocabulary,
)


@pytest.mark.parametrize(
    ("text", "template", "value", "nouns"),
    [
        ("the songs were catchy .", "plain", 1.0, ("songs",)),
        ("the songs were very catchy .", "plain", 1.5, ("songs",)),
        ("the soup was slightly cold .", "plain", -0.5, ("soup",)),
        ("the soup was great and tasty .", "pair", 1.25, ("soup",)),
        ("the soup was decent but cold .", "pair", -0.25, ("soup",)),
        ("the soup was not perfect .", "negated", -1.0, ("soup",)),
        ("the soup was not bad .", "negated", 0.5, ("soup",)),
        ("we tried the soup .", "verb", 0.0, ("soup",)),
        ("we loved the tasty soup .", "verb", 1.5, ("soup",)),
        ("i found the waiter really rude .", "found", -2.5, ("waiter",)),
        ("the waiter at this thai cafe was polite .", "place", 1.0, ("waiter",)),
        ("the soup was good but the waiter was rude .", "two", -0.5, ("soup", "waiter")),
        ("sadly , the soup was cold .", "plain", -1.0, ("soup",)),
        ("we will never come back .", "closing", -1.0, ()),
        ("five stars .", "closing", 2.0, ()),
    ],
)
def test_correct_sentences_parse_to_their_template_and_value(
    text: str, template: str, value: float, nouns: tuple[str, ...]
) -> None:
    sentence = parse(tuple(text.split()))
    assert (sentence.template, sentence.value, sentence.nouns, sentence.errors) == (template, value, nouns, ())


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("the soup were tasty .", ("number",)),
        ("the songs was catchy .", ("number",)),
        ("the soup was good and the fries was bland .", ("number", "conjunction")),
        ("the soup was catchy .", ("fit",)),
        ("the soup was tasty and the songs were juicy .", ("fit",)),
        ("the soup was juicy and the songs were catchy .", ()),
        ("the soup was tasty and cold .", ("conjunction",)),
        ("the soup was tasty but fresh .", ("conjunction",)),
        ("i hated the tasty soup .", ("verb",)),
        ("i noticed the tasty soup .", ()),
        ("sadly , the soup was tasty .", ("opener",)),
        ("luckily , the soup was not bad .", ()),
    ],
)
def test_each_rule_is_noticed_when_broken_and_only_then(text: str, errors: tuple[str, ...]) -> None:
    sentence = parse(tuple(text.split()))
    assert sentence.template != "unparsed"
    assert sentence.errors == errors


@pytest.mark.parametrize(
    "text",
    [
        "the soup was tasty",
        "soup was tasty .",
        "the the soup was tasty .",
        "the soup was .",
        "the soup was tasty tasty .",
        "sadly the soup was tasty .",
        "sadly , five stars .",
        "the zebra was tasty .",
        "sadly ,",
        ".",
    ],
)
def test_other_word_orders_do_not_parse(text: str) -> None:
    sentence = parse(tuple(text.split()))
    assert (sentence.template, sentence.value, sentence.nouns) == ("unparsed", 0.0, ())
    assert sentence.content == tuple(text.split())


def test_review_is_split_at_full_stops() -> None:
    sentences = parse_review("the soup was tasty . five stars . the soup")
    assert [s.template for s in sentences] == ["plain", "unparsed", "unparsed"]
    assert [len(s.words) for s in sentences] == [5, 3, 2]
    assert parse_review("") == []


def test_only_the_last_sentence_is_a_closing() -> None:
    templates = [s.template for s in parse_review("five stars . five stars . the soup was tasty . five stars .")]
    assert templates == ["unparsed", "unparsed", "plain", "closing"]


def test_content_leaves_out_function_words() -> None:
    (sentence,) = parse_review("today , we loved the tasty soup .")
    assert sentence.content == ("today", "loved", "tasty", "soup")


@pytest.mark.parametrize("style", [BASE, SFT])
def test_without_corruption_every_sentence_is_correct(style: Style) -> None:
    pairs = generate_many(random.Random(0), PROMPTS, 1000, replace(style, corrupted=0.0))
    wrong = [s for _, review in pairs for s in parse_review(review) if s.template == "unparsed" or s.errors]
    assert wrong == []


@pytest.mark.parametrize(("style", "most"), [(BASE, 0.08), (SFT, 0.04)])
def test_corruption_spoils_about_its_share_of_sentences(style: Style, most: float) -> None:
    pairs = generate_many(random.Random(0), PROMPTS, 1000, style)
    sentences = [s for _, review in pairs for s in parse_review(review)]
    spoiled = sum(s.template == "unparsed" or bool(s.errors) for s in sentences)
    assert 0.01 < spoiled / len(sentences) < most


def test_styles_differ_as_declared() -> None:
    for style in (BASE, SFT):
        # Refusing reviews by length favours short ones, with fewer openers: the rates hold before it.
        unbounded = replace(style, corrupted=0.0, num_words=(1, 99))
        pairs = generate_many(random.Random(1), PROMPTS, 2000, unbounded)
        opinions = [
            (parse_prompt(prompt).aspect, s)  # type: ignore[union-attr]
            for prompt, review in pairs
            for s in parse_review(review)
            if s.template != "closing"
        ]
        on_aspect = sum(NOUNS[s.nouns[0]].aspect == aspect for aspect, s in opinions) / len(opinions)
        with_opener = sum(s.words[1] == "," for _, s in opinions) / len(opinions)
        closed = sum(parse_review(review)[-1].template == "closing" for _, review in pairs) / len(pairs)
        assert on_aspect == pytest.approx(style.on_subject, abs=0.03)
        assert with_opener == pytest.approx(style.opener, abs=0.03)
        assert closed == pytest.approx(style.closing, abs=0.03)
        lengths = [len(review.split()) for _, review in generate_many(random.Random(1), PROMPTS, 500, style)]
        assert style.num_words[0] <= min(lengths)
        assert max(lengths) <= style.num_words[1]


def test_same_seed_same_reviews() -> None:
    first, again, other = (generate_many(random.Random(seed), PROMPTS, 50, SFT) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_word_written_is_in_the_vocabulary_and_the_vocabulary_has_each_once() -> None:
    words = vocabulary()
    assert len(words) == len(set(words))
    written = {
        word
        for style in (BASE, SFT)
        for prompt, review in generate_many(random.Random(0), PROMPTS, 3000, style)
        for word in f"{prompt} {review}".split()
    }
    assert written == set(words)


def test_word_classes_are_disjoint() -> None:
    counts = Counter(word for words in SLOTS.values() for word in words)
    assert max(counts.values()) == 1


def test_prompts_and_their_split() -> None:
    train, test = split_prompts()
    assert len(PROMPTS) == len(set(PROMPTS)) == 144
    assert sorted(train + test) == sorted(PROMPTS)
    assert (len(train), len(test)) == (108, 36)
    aspects_and_cuisines = [(subject.aspect, subject.cuisine) for subject in map(parse_prompt, test) if subject]
    assert len(set(aspects_and_cuisines)) == 36
    aspects_and_places = {(subject.aspect, subject.place) for subject in map(parse_prompt, test) if subject}
    assert len(aspects_and_places) == 24
    assert all(len(prompt.split()) == 6 for prompt in PROMPTS)  # and <bos>


def test_prompts_parse_to_their_subject_and_others_to_none() -> None:
    assert parse_prompt("about music at greek grill :") == Subject("music", "greek", "grill")
    assert parse_prompt("about music at martian grill :") is None
    assert parse_prompt("") is None


def test_generate_refuses_a_foreign_prompt() -> None:
    with pytest.raises(ValueError, match="not a prompt of the reviews task: 'about weather'"):
        generate(random.Random(0), "about weather", BASE)


def test_corrupt_changes_one_sentence_by_at_most_one_word() -> None:
    rng = random.Random(0)
    review = "the soup was tasty and fresh . the fries were cold ."
    for _ in range(100):
        changed = corrupt(rng, review)
        assert changed != review
        assert abs(len(changed.split()) - len(review.split())) <= 1
        assert changed.endswith(" .")

"""The gold reward of the reviews task: what the proxy reward model is trained to imitate, and PPO never sees.

    gold = 1.2·sentiment + 1.5·subject − 3·(1 − fluency) − 4·repetition + 1.5·detail − 4·length − 1·unfinished

A response of n words (punctuation included) is split at its full stops into S sentences. A sentence follows one of the
grammar's templates or is unparsed; a closing sentence ("five stars .") that is not the last one is unparsed. The terms:

sentiment   1.6·tanh(m / 1.6), with m the mean over the S sentences of the opinion's value (from −3 to 3, closings
            included); a sentence not wholly on the subject counts 0.3 times its value, an unparsed one −0.5.
subject     mean over the sentences other than the closing: 1 if all nouns belong to the prompt's aspect, 1/2 if they
            do and another cuisine or place than the prompt's is named, else 0 (unparsed: 0). 0 if there are none.
fluency     mean over the n words of their sentence's mark: 1 if correct, 1/2 if it breaks a rule of the grammar
            (was/were, noun and adjective, and/but, verb and adjective, opener), 0 if it is unparsed.
repetition  1 − distinct / all content items. Items are nouns, adjectives, adverbs, verbs and openers, the closing as
            one item, and every word of an unparsed sentence.
detail      distinct nouns of the prompt's aspect in parsed sentences, at most 3, over 3.
length      min(1, max(0, 14 − n, n − 28) / 14).
unfinished  1 if the response does not end with the word ".", else 0.

The best texts are varied, correct, enthusiastic sentences on the subject with three nouns in all, and reach about 4.7.
An empty response gets −8.6: m = −0.5, fluency, subject and detail are 0, length and unfinished are 1. A prompt that is
not one of the task's has no subject, and every sentence is off it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.reviews.grammar import NOUNS, Sentence, Subject, parse_prompt, parse_review

SENTIMENT_COEF = 1.2
SUBJECT_COEF = 1.5
FLUENCY_COEF = 3.0
REPETITION_COEF = 4.0
DETAIL_COEF = 1.5
LENGTH_COEF = 4.0
UNFINISHED_COEF = 1.0

SENTIMENT_BOUND = 1.6
OFF_SUBJECT_FACTOR = 0.3
UNPARSED_VALUE = -0.5
MAX_DETAILS = 3
SHORTEST, LONGEST, LENGTH_SCALE = 14, 28, 14


@dataclass(frozen=True)
class GoldTerms:
    """The terms of one response's gold reward, before their coefficients."""

    sentiment: float
    subject: float
    fluency: float
    repetition: float
    detail: float
    length: float
    unfinished: float

    @property
    def total(self) -> float:
        return (
            SENTIMENT_COEF * self.sentiment
            + SUBJECT_COEF * self.subject
            - FLUENCY_COEF * (1 - self.fluency)
            - REPETITION_COEF * self.repetition
            + DETAIL_COEF * self.detail
            - LENGTH_COEF * self.length
            - UNFINISHED_COEF * self.unfinished
        )


def gold_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The gold reward of each response to the prompt beside it; the formula is at the top of this file.

    Texts are plain: no special tokens, words separated by blanks. Any text has a reward: other words than the
    grammar's do not parse. Raises ValueError when the lists differ in length.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"one response per prompt expected, got {len(prompts)} prompts and {len(responses)} responses")
    return [explain(prompt, response).total for prompt, response in zip(prompts, responses, strict=True)]


def explain(prompt: str, response: str) -> GoldTerms:
    """The terms that make up `gold_reward([prompt], [response])`."""
    subject = parse_prompt(prompt)
    sentences = parse_review(response)
    words = response.split()
    return GoldTerms(
        sentiment=_sentiment(sentences, subject),
        subject=_mean([_on_subject(s, subject) for s in sentences if s.template != "closing"], empty=0.0),
        fluency=_fluency(sentences),
        repetition=_repetition(sentences),
        detail=_detail(sentences, subject),
        length=min(1.0, max(0, SHORTEST - len(words), len(words) - LONGEST) / LENGTH_SCALE),
        unfinished=float(words[-1:] != ["."]),
    )


def _sentiment(sentences: list[Sentence], subject: Subject | None) -> float:
    values = []
    for sentence in sentences:
        if sentence.template == "unparsed":
            values.append(UNPARSED_VALUE)
        elif sentence.template == "closing" or _on_subject(sentence, subject) == 1:
            values.append(sentence.value)
        else:
            values.append(OFF_SUBJECT_FACTOR * sentence.value)
    return SENTIMENT_BOUND * math.tanh(_mean(values, empty=UNPARSED_VALUE) / SENTIMENT_BOUND)


def _on_subject(sentence: Sentence, subject: Subject | None) -> float:
    """1 on the subject, 1/2 on its aspect at another cuisine or place, else 0."""
    if subject is None or not sentence.nouns or any(NOUNS[noun].aspect != subject.aspect for noun in sentence.nouns):
        return 0.0
    return 1.0 if sentence.place in (None, (subject.cuisine, subject.place)) else 0.5


def _fluency(sentences: list[Sentence]) -> float:
    marks: list[float] = []
    for sentence in sentences:
        mark = 0.0 if sentence.template == "unparsed" else 0.5 if sentence.errors else 1.0
        marks += [mark] * len(sentence.words)
    return _mean(marks, empty=0.0)


def _repetition(sentences: list[Sentence]) -> float:
    items = [item for sentence in sentences for item in sentence.content]
    return 1 - len(set(items)) / len(items) if items else 0.0


def _detail(sentences: list[Sentence], subject: Subject | None) -> float:
    nouns = {noun for s in sentences for noun in s.nouns if subject and NOUNS[noun].aspect == subject.aspect}
    return min(len(nouns), MAX_DETAILS) / MAX_DETAILS


def _mean(values: list[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty

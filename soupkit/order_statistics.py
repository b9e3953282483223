"""Exact order statistics of values too many to hold: brackets from a sample, then counts, then the few in between.

One pass over a thinned stream gives a sample, whose quantiles bracket the value that is looked for. A second pass
counts what lies at or below the bracket and collects what lies strictly inside: there the value is found, exactly.
Where the bracket missed, or holds too much to collect, the counts narrow it and another pass follows. Memory: about a
million values per question, however large the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Values = NDArray[np.floating]
# scan(stride): the quantities, block by block, of every stride-th element.
Scan = Callable[[int], Iterator[Sequence[Values]]]

SAMPLE = 2**15  # values in a sample; so few are simply sorted
COLLECTED = 2**20  # values that a pass may collect per question
COUNT_ONLY = 2**40  # a stride that collects nothing


@dataclass
class _Question:
    """The value v at 0-based ``rank`` of one quantity; it lies strictly between ``low`` and ``high``."""

    quantity: int
    rank: int
    low: np.floating
    high: np.floating
    num_below: int  # values ≤ low
    num_to_high: int  # values < high
    sample: Values  # sorted
    bracket: tuple[np.floating, np.floating]
    stride: int = 1
    num_missed: int = 0  # brackets that did not hold the value
    answer: float | None = None

    def propose(self) -> None:
        """Choose the bracket of the next pass from the sample."""
        inside = self.sample[(self.sample > self.low) & (self.sample < self.high)]
        num, size = self.num_to_high - self.num_below, len(inside)
        share = (self.rank - self.num_below) / max(num, 1)
        margin = 4 * math.sqrt(size * share * (1 - share)) + 4
        first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
        # Open intervals, whose ends lie beside values of the sample: many may share one of those (16-bit models).
        low = _before(inside[first]) if first >= 0 else self.low
        high = _after(inside[last]) if last < size else self.high
        num_sampled = int(np.count_nonzero((inside > low) & (inside < high)))
        self.stride = max(1, math.ceil((num * num_sampled / size if size else num) / COLLECTED))
        if self.stride > 1 and size:  # too many to collect: perhaps because they are all the same?
            likely = inside[min(int(share * size), size - 1)]
            if 4 * np.count_nonzero(inside == likely) > num_sampled:
                low, high, self.stride = _before(likely), _after(likely), COUNT_ONLY
            elif (low, high) == (self.low, self.high):
                # The many are at the ends, where they were before: without them, or nothing would shrink.
                low = inside[first] if first >= 0 else self.low
                high = inside[last] if last < size else self.high
        self.bracket = low, high

    def learn(self, num_below: int, num_to_high: int, collected: Values) -> None:
        """Take in a pass: values ≤ the bracket's low end, values < its high end, every stride-th value inside."""
        low, high = self.bracket
        if num_below <= self.rank < num_to_high:
            self.low, self.high, self.num_below, self.num_to_high = low, high, num_below, num_to_high
            if _after(low) >= _before(high):
                self.answer = float(_after(low))
            elif self.stride == 1:
                # Not numpy.partition, which takes ten times as long where many values are equal.
                self.answer = torch.kthvalue(torch.from_numpy(collected), self.rank - num_below + 1).values.item()
            else:
                self.sample = np.sort(collected)
                self.propose()
        elif self.rank < num_below:
            self._miss(low, self.low, _after(low), self.num_below, num_below)
        else:
            self._miss(high, _before(high), self.high, num_to_high, self.num_to_high)

    def _miss(self, end: np.floating, low: np.floating, high: np.floating, num_below: int, num_to_high: int) -> None:
        """v lies at an end of the bracket or beyond."""
        self.low, self.high, self.num_below, self.num_to_high = low, high, num_below, num_to_high
        self.num_missed += 1
        if not np.isfinite(end):
            self.answer = float(end)
            return
        if self.num_missed > 1:  # the sample misleads: the next pass takes another
            self.sample = self.sample[:0]
        self.propose()


def order_statistics(scan: Scan, num_elements: int, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """The value at each 0-based rank of each quantity, exactly as sorting would give it."""
    stride = -(-num_elements // SAMPLE)
    if stride > 1:
        stride |= 1  # odd, so that it does not walk along the columns of a matrix
    parts = list(scan(stride))
    samples = [np.sort(np.concatenate(quantity)) for quantity in zip(*parts, strict=True)]
    if stride == 1:
        return [[float(sample[rank]) for rank in asked] for sample, asked in zip(samples, ranks, strict=True)]
    questions = []
    for quantity, (sample, asked) in enumerate(zip(samples, ranks, strict=True)):
        low, high = sample.dtype.type(-np.inf), sample.dtype.type(np.inf)
        for rank in asked:
            question = _Question(quantity, rank, low, high, 0, num_elements, sample, (low, high))
            question.propose()
            questions.append(question)
    while unanswered := [question for question in questions if question.answer is None]:
        _pass(scan, unanswered)
    answers = iter(questions)
    return [[next(answers).answer or 0.0 for _ in asked] for asked in ranks]


def _pass(scan: Scan, questions: Sequence[_Question]) -> None:
    num_below, num_to_high = [0] * len(questions), [0] * len(questions)
    collected: list[list[Values]] = [[] for _ in questions]
    for quantities in scan(1):
        for index, question in enumerate(questions):
            values = quantities[question.quantity]
            low, high = question.bracket
            inside, below = values < high, values <= low  # NaN is neither: it counts as larger than all
            num_to_high[index] += int(np.count_nonzero(inside))
            num_below[index] += int(np.count_nonzero(below))
            inside ^= below
            if question.stride <= values.size:
                found = values[inside]
                # A copy of the few, or each view would keep all of its values alive.
                collected[index].append(found if question.stride == 1 else found[:: question.stride].copy())
    for index, question in enumerate(questions):
        found = np.concatenate(collected[index]) if collected[index] else np.empty(0)
        question.learn(num_below[index], num_to_high[index], found)


def _before(value: np.floating) -> np.floating:
    return np.nextafter(value, value.dtype.type(-np.inf))


def _after(value: np.floating) -> np.floating:
    return np.nextafter(value, value.dtype.type(np.inf))

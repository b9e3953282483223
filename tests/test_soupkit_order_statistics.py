"""Exact order statistics of streamed values, whatever the sample says."""

from __future__ import annotations

import numpy as np
import pytest

from soupkit import order_statistics as module
from soupkit.order_statistics import order_statistics

BLOCK = 1000
KINDS = [
    "normal", "many zeros", "all equal", "few values", "sorted", "steps", "heavy tail", "few above many",
    "few between many", "infinite",
]  # fmt: skip


def values_of(kind: str, size: int, dtype: type) -> np.ndarray:
    random = np.random.default_rng(0)
    made = {
        "normal": lambda: np.abs(random.standard_normal(size)),
        "many zeros": lambda: np.abs(random.standard_normal(size)) * (random.random(size) < 0.4),
        "all equal": lambda: np.zeros(size),
        "few values": lambda: random.integers(0, 4, size) / 2,
        "sorted": lambda: np.sort(random.random(size)),
        "steps": lambda: np.repeat(random.random(16), size // 16 + 1)[:size] * (1 + 1e-3 * random.random(size)),
        "heavy tail": lambda: random.random(size) ** 30,
        "few above many": lambda: np.maximum(np.arange(size) - size + 81, 0),
        "few between many": lambda: np.clip(np.arange(size) - size // 2, 0, 80),
        "infinite": lambda: np.where(random.random(size) < 0.5, np.inf, random.random(size)),
    }
    return made[kind]().astype(dtype)


def found(values: np.ndarray, ranks: list[int], disturb: float = 0.0) -> tuple[list[float], int]:
    """The answers and the number of passes; ``disturb`` is added to what a thinned pass sees."""
    passes = 0

    def scan(stride):
        nonlocal passes
        passes += 1
        assert passes <= 20  # rather than to go on for ever
        for start in range(0, len(values), BLOCK):
            yield [values[start : start + BLOCK][::stride] + values.dtype.type(disturb if stride > 1 else 0)]

    return order_statistics(scan, len(values), [ranks])[0], passes


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 2**8)
    monkeypatch.setattr(module, "COLLECTED", 2**9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 255, 257, 20_000, 20_001])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_what_sorting_gives(kind, size, dtype):
    values = values_of(kind, size, dtype)
    asked = {0, 1, size // 4, size // 2, size // 2 + 40, size * 3 // 5, size - 40, size - 2, size - 1}
    ranks = sorted(asked & set(range(size)))
    answers, passes = found(values, ranks)
    assert answers == np.sort(values)[ranks].tolist()
    assert passes <= 12


@pytest.mark.parametrize("disturb", [0.3, -0.3, 10.0, -10.0])
def test_a_sample_that_misleads_costs_passes_and_not_the_answer(disturb):
    values = values_of("normal", 20_000, np.float32)
    ranks = [100, 5_000, 10_000, 19_900]
    answers, passes = found(values, ranks, disturb)
    assert answers == np.sort(values)[ranks].tolist()
    assert passes <= 12

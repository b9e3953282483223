"""The KL matrix, against the enumeration of every response of a tiny model."""

from __future__ import annotations

import math
import os
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EOS, WORDS, as_ranks, forked, interrupted_at, make_gpt2, make_llama, make_tokenizer
from transformers import LlamaForCausalLM

from analysis import KLMatrix, kl_geometry, kl_matrix
from analysis.divergence import Samples
from rlhf.data import Prompt
from rlhf.metrics import Estimate

SPECIAL = WORDS[:4]
LENGTH = 3


def llama(seed: int) -> LlamaForCausalLM:
    return make_llama(seed, vocab_size=len(SPECIAL))


def all_responses() -> list[list[int]]:
    """Every response: ended by its only end-of-sequence token, or LENGTH tokens without one."""
    words = [token for token in range(len(SPECIAL)) if token != EOS]
    ended = [[*start, EOS] for length in range(LENGTH) for start in product(words, repeat=length)]
    return ended + [list(response) for response in product(words, repeat=LENGTH)]


@torch.no_grad()
def log_probability(model: LlamaForCausalLM, prompt: list[int], response: list[int], temperature: float) -> float:
    logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
    log_p = logits.log_softmax(-1)
    return sum(float(log_p[len(prompt) - 1 + t, token]) for t, token in enumerate(response))


def enumerated(model: LlamaForCausalLM, prompt: list[int], temperature: float = 1.0) -> np.ndarray:
    log_p = np.array([log_probability(model, prompt, response, temperature) for response in all_responses()])
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-6)  # the enumeration is complete
    return log_p


def exact_kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_the_enumeration_of_all_responses(temperature: float) -> None:
    models = {"a": llama(1), "b": llama(2), "c": llama(3)}
    prompt = [1, 3]
    log_p = {name: enumerated(model, prompt, temperature) for name, model in models.items()}
    matrix = kl_matrix(
        models,
        [Prompt("", prompt)],
        make_tokenizer(SPECIAL),
        max_new_tokens=LENGTH,
        num_responses=4000,
        temperature=temperature,
        seed=5,
        progress=False,
    )
    for row, column in permutations(models, 2):
        expected, estimate = exact_kl(log_p[row], log_p[column]), matrix[row, column]
        assert estimate.mean == pytest.approx(expected, abs=4 * estimate.stderr)
        assert 0 < estimate.stderr < 0.03 * expected
        # Direction matters: the error bars tell KL(row ‖ column) from KL(column ‖ row).
        assert abs(exact_kl(log_p[column], log_p[row]) - expected) > 8 * estimate.stderr


def test_standard_error_is_over_prompts() -> None:
    models = {"a": llama(1), "b": llama(2)}
    prompts = [[3, 0], [0, 0]]
    one, two = (exact_kl(enumerated(models["a"], prompt), enumerated(models["b"], prompt)) for prompt in prompts)
    matrix = kl_matrix(
        models,
        [Prompt("", prompt) for prompt in prompts],
        make_tokenizer(SPECIAL),
        max_new_tokens=LENGTH,
        num_responses=2000,
        progress=False,
    )
    assert matrix["a", "b"].mean == pytest.approx((one + two) / 2, rel=0.03)
    # Of two values: |x − y| / √2 is their standard deviation, divided by √2 the error of their mean.
    assert matrix["a", "b"].stderr == pytest.approx(abs(one - two) / 2, rel=0.1)


def test_diagonal_is_zero_and_runs_are_alike() -> None:
    models = {"a": llama(1), "b": llama(2)}
    prompts = [Prompt("", [1]), Prompt("", [2, 3, 1])]
    one, two = (
        kl_matrix(
            models, prompts, make_tokenizer(SPECIAL), max_new_tokens=3, num_responses=3, batch_size=size, progress=False
        )
        for size in (None, 4)
    )
    assert (np.diag(one.mean) == 0).all()
    assert (np.diag(one.stderr) == 0).all()
    assert (one.mean[~np.eye(2, dtype=bool)] > 0).all()
    # Batches only change the rounding.
    np.testing.assert_allclose(one.mean, two.mean, rtol=1e-5)


def test_standard_error_by_hand() -> None:
    def estimate(num_prompts: int, *per_response: float) -> Estimate:
        prompts = [Prompt("", [1])] * num_prompts
        samples = Samples(prompts, make_tokenizer(), 2, num_responses=len(per_response) // num_prompts)
        return samples.estimate(torch.tensor([[value - 0.5, 0.5] for value in per_response]))  # of two tokens each

    # Two prompts with means 2 and 6: s = √8 = 2.828, divided by √2.
    assert estimate(2, 1.0, 3.0, 6.0, 6.0) == pytest.approx((4, 2))
    # One prompt, responses 1, 3, 8: s² = 13, divided by 3.
    assert estimate(1, 1.0, 3.0, 8.0) == pytest.approx((4, math.sqrt(13 / 3)))


def test_models_are_left_as_they_were(tmp_path: Path) -> None:
    model = llama(1).train()
    llama(2).save_pretrained(tmp_path / "folder")
    matrix = kl_matrix(
        {"model": model, "folder": tmp_path / "folder"},
        [Prompt("", [1])] * 4,
        make_tokenizer(SPECIAL),
        max_new_tokens=2,
        progress=False,
    )
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    loaded = KLMatrix.load(matrix.save(tmp_path / "matrix.npz"))
    np.testing.assert_array_equal(loaded.mean, matrix.mean)
    np.testing.assert_array_equal(loaded.stderr, matrix.stderr)
    assert (loaded.names, loaded.metadata) == (matrix.names, matrix.metadata)


@pytest.mark.parametrize("ingredients", [None, ["a", "b"]], ids=["matrix", "geometry"])
def test_rows_are_kept_and_gone_on_with(
    ingredients: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: llama(seed) for seed, name in enumerate("abc")}

    def measured(*, changed: dict[str, LlamaForCausalLM] | None = None, tokens: int = 2, **options: Any) -> KLMatrix:
        settings = {"max_new_tokens": tokens, "progress": False, **options}
        arguments = (models | (changed or {}), [Prompt("", [1]), Prompt("", [3])], make_tokenizer(SPECIAL))
        return (
            kl_geometry(*arguments, ingredients=ingredients, **settings)
            if ingredients
            else kl_matrix(*arguments, **settings)
        )

    whole, file = measured(), tmp_path / "rows.npz"
    calls: list[int] = []
    monkeypatch.setattr(Samples, "compare", interrupted_at(3, Samples.compare, calls))
    with pytest.raises(KeyboardInterrupt):
        measured(save=file)
    with pytest.raises(FileExistsError, match=r"rows.npz: exists already; continue it with resume=True"):
        measured(save=file)
    for settings, what in (({"tokens": 3}, "max_new_tokens=2, now 3"), ({"changed": {"a": llama(7)}}, "with models=")):
        with pytest.raises(ValueError, match=what):
            measured(save=file, resume=True, **settings)
    resumed = measured(save=file, resume=True)
    assert len(calls) == len(whole.names) + 1  # the rows that were kept are not measured again
    for field, value in vars(whole).items():
        np.testing.assert_equal(getattr(resumed, field), value)


def test_processes_share_the_rows(tmp_path: Path) -> None:
    models, prompts = {name: llama(seed) for seed, name in enumerate("abc")}, [Prompt("", [1]), Prompt("", [3])]

    def measured() -> KLMatrix:
        return kl_matrix(models, prompts, make_tokenizer(SPECIAL), max_new_tokens=2, progress=False)

    def in_a_process() -> None:
        calls: list[int] = []
        compared = Samples.compare
        Samples.compare = lambda *arguments: calls.append(1) or compared(*arguments)  # type: ignore
        matrix = measured()
        (tmp_path / os.environ["RANK"]).write_text(f"{len(calls)} {matrix.mean.tolist()}", encoding="utf-8")

    assert forked(*as_ranks(in_a_process)) == [0, 0]
    mean = measured().mean.tolist()
    assert {(tmp_path / rank).read_text() for rank in "01"} == {f"2 {mean}", f"1 {mean}"}


def test_dropout_is_off_whatever_the_models_mode() -> None:
    prompts = [Prompt("", [1, 7, 8])] * 8
    one, two = (
        kl_matrix(
            {name: make_gpt2(seed).train(training) for name, seed in (("a", 1), ("b", 2))},
            prompts,
            make_tokenizer(),
            max_new_tokens=4,
            progress=False,
        )
        for training in (True, False)
    )
    np.testing.assert_array_equal(one.mean, two.mean)


def test_bad_input_is_named() -> None:
    prompts = [Prompt("", [1])]
    one = {"a": llama(1)}
    for models, given, message in (
        (one, prompts, r"models=\['a'\]: a matrix needs at least two"),
        ({**one, "b": llama(2)}, [], "prompts: none given"),
        ({**one, "b": make_llama(2, vocab_size=6)}, prompts, r"vocabularies differ, \{'a': 4, 'b': 6\} tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            kl_matrix(models, given, make_tokenizer(SPECIAL), max_new_tokens=2, progress=False)
    for name, value in (("num_responses", 0), ("temperature", 0.0), ("temperature", math.inf)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            kl_matrix({**one, "b": llama(2)}, prompts, make_tokenizer(SPECIAL), max_new_tokens=2, **{name: value})

"""Exploration: diversity by hand and by an independent count, token measures by hand, whole models."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EOS, make_llama, make_tokenizer, random_examples
from transformers import LlamaForCausalLM

from analysis import Exploration, explore
from analysis.exploration import distinct_n, self_bleu, token_measures
from rlhf.checkpointing import save_model
from rlhf.data import Prompt
from rlhf.decoding import Sampling
from rlhf.evaluation import evaluate
from rlhf.randomness import generator
from rlhf.reference import ModelReference
from rlhf.rollout import sample

A, B, C, D = range(4)


# ── Diversity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_distinct_n_by_hand() -> None:
    responses = [[A, B, A], [A, B]]
    assert distinct_n(responses, 1) == pytest.approx(2 / 5)
    assert distinct_n(responses, 2) == pytest.approx(2 / 3)  # AB, BA, AB
    assert distinct_n(responses, 3) == 1
    assert math.isnan(distinct_n(responses, 4))


def test_self_bleu_by_hand() -> None:
    # ABC against ABD, and the same the other way round: 2 of 3 words, (1 + 1)/(2 + 1) pairs, (0 + 1)/(1 + 1) triples,
    # no quadruple, (0 + 1)/(0 + 1).
    assert self_bleu([[A, B, C], [A, B, D]]) == pytest.approx((2 / 3 * 2 / 3 * 1 / 2) ** 0.25)
    # AAAA against A: 1 of 4 words, for A is there once; 1/4, 1/3, 1/2. A against AAAA: all, but for being short.
    clipped = (1 / 4 * 1 / 4 * 1 / 3 * 1 / 2) ** 0.25
    assert self_bleu([[A, A, A, A], [A]]) == pytest.approx((clipped + math.exp(-3)) / 2)
    assert self_bleu([[A, B, C, D, A]] * 3) == pytest.approx(1)
    assert self_bleu([[A, B], [C, D]]) == 0
    assert self_bleu([[], [A]]) == 0


def bleu(response: list[int], others: list[list[int]], order: int = 4) -> float:
    """BLEU of one response against all others, straight from its definition."""
    product = 1.0
    for n in range(1, order + 1):
        mine = Counter(tuple(response[i : i + n]) for i in range(len(response) - n + 1))
        theirs = [Counter(tuple(o[i : i + n]) for i in range(len(o) - n + 1)) for o in others]
        matched = sum(min(times, max(other[gram] for other in theirs)) for gram, times in mine.items())
        smoothing = n > 1
        product *= (matched + smoothing) / (sum(mine.values()) + smoothing)
    nearest = min((abs(len(other) - len(response)), len(other)) for other in others)[1]
    return min(1.0, math.exp(1 - nearest / len(response))) * product ** (1 / order)


def test_self_bleu_against_its_definition() -> None:
    random = np.random.default_rng(0)
    for num_responses in (2, 3, 6):
        for _ in range(20):
            responses = [random.integers(4, size=random.integers(1, 9)).tolist() for _ in range(num_responses)]
            expected = [bleu(response, responses[:i] + responses[i + 1 :]) for i, response in enumerate(responses)]
            assert self_bleu(responses) == pytest.approx(np.mean(expected))


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Fixed:
    """Given distributions, [N, V] probabilities."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.log_p = torch.tensor(probabilities).log()

    def rows(self, rows: slice) -> torch.Tensor:
        return self.log_p[rows].clone()


def test_token_measures_by_hand() -> None:
    policy = Fixed([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    reference = Fixed([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])
    found = token_measures(policy, reference, torch.tensor([0, 0]), 3, Sampling(top_p=0.7))
    log = math.log
    expected = {
        "entropy": [-(0.5 * log(0.5) + 0.3 * log(0.3) + 0.2 * log(0.2)), 0.0],
        "kl": [0.5 * log(2.5) + 0.3 * log(0.6) + 0.2 * log(2 / 3), log(10)],
        "top_p_mass": [0.5, 0.0],  # of the second and third token, which have 0.8 of the reference, and 0.9
        "log_ratio": [log(2.5), log(10)],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-6), name


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [Prompt(f"prompt {i}", example.prompt_ids) for i, example in enumerate(random_examples(7, num=10))]
SETTINGS = {"max_new_tokens": 8, "num_responses": 4, "progress": False}


def moved(model: LlamaForCausalLM, seed: int, factor: float) -> LlamaForCausalLM:
    """The model moved along a random direction, by ``factor``."""
    random = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(factor * torch.randn(parameter.shape, generator=random))
    return other


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return make_llama(1)


@pytest.fixture(scope="module")
def result(reference: LlamaForCausalLM) -> Exploration:
    policies = {"near": moved(reference, 5, 0.02), "far": moved(reference, 5, 0.2), "back": moved(reference, 5, -0.1)}
    return explore(policies, reference, PROMPTS, make_tokenizer(), **SETTINGS)


def test_agrees_with_the_evaluation_of_runs(reference: LlamaForCausalLM, result: Exploration) -> None:
    policy = moved(reference, 5, 0.2)
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    random = generator(0, "exploration")
    rollout = sample(policy, make_tokenizer(), repeated, max_new_tokens=8, generator=random)
    expected = evaluate(policy, rollout, {}, {"reference": ModelReference(reference)})
    assert result["entropy", "far"] == pytest.approx(expected.entropy, rel=1e-4)
    assert result["kl", "far"] == pytest.approx(expected.kl["reference"], rel=1e-4)
    assert result["response_length", "far"] == pytest.approx(expected.response_length)
    kept = rollout.response_mask & (rollout.response_tokens != EOS)
    responses = [tuple(row[keep].tolist()) for row, keep in zip(rollout.response_tokens, kept, strict=True)]
    different = [len(set(responses[start : start + 4])) / 4 for start in range(0, 40, 4)]
    words = [sum(responses[start : start + 4], ()) for start in range(0, 40, 4)]
    assert rollout.finished.any()
    assert result["distinct_1", "far"].mean == pytest.approx(np.mean([len(set(group)) / len(group) for group in words]))
    assert result["unique_responses", "far"] == pytest.approx((np.mean(different), np.std(different, ddof=1) / 10**0.5))


def test_the_reference_is_where_it_is(result: Exploration) -> None:
    assert result.names == ["reference", "near", "far", "back"]
    assert result["kl", "reference"] == (0, 0)
    assert result["max_log_ratio", "reference"] == (0, 0)
    assert 0.95 <= result["top_p_mass", "reference"].mean < 1
    for measure in ("kl", "max_log_ratio"):
        assert 0 < result[measure, "near"].mean < result[measure, "far"].mean
    assert result["top_p_mass", "far"].mean < result["top_p_mass", "near"].mean


def test_distances_and_cosines_of_task_vectors(reference: LlamaForCausalLM, result: Exploration) -> None:
    theta = torch.cat([parameter.flatten() for parameter in reference.parameters()]).detach().double()
    there = torch.cat([parameter.flatten() for parameter in moved(reference, 5, 0.2).parameters()]).detach().double()
    assert result.distance[2] == pytest.approx(float((there - theta).norm()), rel=1e-6)
    assert result.relative[2] == pytest.approx(float((there - theta).norm() / theta.norm()), rel=1e-6)
    assert result.distance[0] == 0
    np.testing.assert_allclose(result.cosine[1:, 1:], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-5)
    assert np.isnan(result.cosine[0]).all()


def test_a_run_folder_stands_for_its_policy(reference: LlamaForCausalLM, tmp_path: Path, result: Exploration) -> None:
    tokenizer = make_tokenizer()
    save_model(reference, tokenizer, tmp_path / "sft1")
    save_model(moved(reference, 5, 0.2), tokenizer, tmp_path / "run" / "policy")
    found = explore({"far": tmp_path / "run"}, tmp_path / "sft1", PROMPTS, tokenizer, **SETTINGS, batch_size=16)
    for measure in found.measures:
        assert found[measure, "far"] == pytest.approx(result[measure, "far"], rel=1e-4), measure


def test_differences_are_taken_at_equal_numbers_alone(result: Exploration) -> None:
    fewer = replace(result, num_responses=2)
    a, b = result["self_bleu", "far"], result["self_bleu", "near"]
    expected = (a.mean - b.mean, math.hypot(a.stderr, b.stderr))
    assert result.difference("self_bleu", "far", "near") == pytest.approx(expected)
    for measure in ("self_bleu", "distinct_2", "unique_responses"):
        with pytest.raises(
            ValueError, match=f"{measure}: depends on the number of responses to a prompt, 4 here and 2 "
        ):
            result.difference(measure, "far", "far", of=fewer)
    assert result.difference("entropy", "far", "far", of=fewer).mean == 0


def test_results_come_back_from_files(tmp_path: Path, result: Exploration) -> None:
    loaded = Exploration.load(result.save(tmp_path / "exploration.npz"))
    for name, value in vars(result).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)


def test_bad_input_is_named(reference: LlamaForCausalLM, result: Exploration) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="prompts: none given"):
        explore({"a": reference}, reference, [], tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="num_responses=1: diversity needs at least 2"):
        explore({"a": reference}, reference, PROMPTS, tokenizer, **(SETTINGS | {"num_responses": 1}))
    with pytest.raises(ValueError, match="policies: 'reference' is the reference's own name"):
        explore({"reference": reference}, reference, PROMPTS, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match=r"top_p=2: must be above 0"):
        explore({"a": reference}, reference, PROMPTS, tokenizer, **SETTINGS, top_p=2)
    with pytest.raises(ValueError, match="models: vocabularies differ"):
        explore({"a": make_llama(5, vocab_size=21)}, reference, PROMPTS, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match=r"'diversity': not in this result, which has \['entropy'"):
        result["diversity", "far"]

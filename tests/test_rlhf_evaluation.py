"""Held-out measures against a loop over unpadded responses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import BOS, WORDS, count_words
from transformers import PreTrainedModel

from rlhf.data import Prompt
from rlhf.evaluation import Evaluation, evaluate, kl_and_entropy
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.reference import ModelReference, load_reference
from rlhf.rewards import FunctionReward
from rlhf.rollout import Rollout, sample

PROMPTS = [Prompt(word, [BOS, WORDS.index(word)]) for word in ("a", "b", "c", "d") * 5]


@pytest.fixture(scope="module")
def policy(checkpoints: dict[str, Path]) -> PreTrainedModel:
    return load_causal_lm(checkpoints["first"])


@pytest.fixture(scope="module")
def other(checkpoints: dict[str, Path]) -> ModelReference:
    return load_reference([checkpoints["second"]])


@pytest.fixture(scope="module")
def rollout(policy: PreTrainedModel, checkpoints: dict[str, Path]) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(checkpoints["first"])
    return sample(policy, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.7, generator=generator)


def sums_alone(policy: PreTrainedModel, other: ModelReference, rollout: Rollout) -> tuple[list[float], list[float]]:
    """KL(policy ‖ other) and entropy of each response at temperature 0.7, in float64."""
    divergences, entropies = [], []
    for tokens, mask, length in zip(rollout.tokens, rollout.attention_mask, rollout.response_lengths, strict=True):
        p, q = (
            (model(tokens[mask][None]).logits[0, -int(length) - 1 : -1].detach().double() / 0.7).log_softmax(-1)
            for model in (policy, other.model)
        )
        divergences.append((p.exp() * (p - q)).sum().item())
        entropies.append(-(p.exp() * p).sum().item())
    return divergences, entropies


@pytest.mark.parametrize("batch_size", [None, 3])
def test_kl_and_entropy_of_each_response(
    policy: PreTrainedModel, other: ModelReference, rollout: Rollout, batch_size: int | None
) -> None:
    others = {"other": other, "itself": ModelReference(policy)}
    divergences, entropies = kl_and_entropy(policy, rollout, others, temperature=0.7, batch_size=batch_size)
    expected, expected_entropies = sums_alone(policy, other, rollout)
    assert divergences["other"].tolist() == pytest.approx(expected, rel=1e-4)
    assert divergences["itself"].tolist() == [0.0] * len(rollout)
    assert entropies.tolist() == pytest.approx(expected_entropies, rel=1e-4)


def stderr_over_prompts(values: torch.Tensor, prompts: list[str]) -> float:
    """√(Σ_g (Σ_{i∈g} (x_i − mean))² · G / (G − 1)) / n over the G prompts, written out."""
    centred = (values.double() - values.double().mean()).tolist()
    sums = [sum(c for c, p in zip(centred, prompts, strict=True) if p == prompt) for prompt in set(prompts)]
    assert 1 < len(sums) < len(prompts)
    return (sum(s**2 for s in sums) * len(sums) / (len(sums) - 1)) ** 0.5 / len(values)


def test_evaluation_averages_over_responses_and_entropy_over_tokens(
    policy: PreTrainedModel, other: ModelReference, rollout: Rollout
) -> None:
    scores = {"words": FunctionReward(count_words, "words")(rollout)}
    evaluation = evaluate(policy, rollout, scores, {"other": other}, temperature=0.7)
    divergences, entropies = sums_alone(policy, other, rollout)
    lengths = rollout.response_lengths.double()
    num = len(rollout)
    assert len(set(lengths.tolist())) > 2
    assert evaluation.kl["other"].mean == pytest.approx(sum(divergences) / num, rel=1e-4)
    assert evaluation.entropy.mean == pytest.approx(sum(entropies) / lengths.sum().item(), rel=1e-4)
    assert evaluation.response_length.mean == pytest.approx(lengths.mean().item())
    assert evaluation.response_length.stderr == pytest.approx(stderr_over_prompts(lengths, rollout.prompts))
    words = torch.tensor([float(len(response.split())) for response in rollout.responses])
    assert evaluation.rewards["words"].mean == pytest.approx(words.mean().item())
    assert evaluation.rewards["words"].stderr == pytest.approx(stderr_over_prompts(words, rollout.prompts))


def test_an_evaluation_survives_json(policy: PreTrainedModel, other: ModelReference, rollout: Rollout) -> None:
    scores = {"words": FunctionReward(count_words, "words")(rollout)}
    evaluation = evaluate(policy, rollout, scores, {"other": other})
    assert Evaluation.from_json(json.loads(json.dumps(asdict(evaluation)))) == evaluation

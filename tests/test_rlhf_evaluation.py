"""Held-out measures against a loop over unpadded responses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import BOS, PAD, WORDS, count_words, random_examples
from transformers import PreTrainedModel

from rlhf import kl
from rlhf.data import Prompt
from rlhf.evaluation import Evaluation, compare, evaluate, evaluate_loss
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.reference import ModelReference, load_model_reference
from rlhf.rewards import FunctionReward
from rlhf.rollout import Rollout, sample

PROMPTS = [Prompt(word, [BOS, WORDS.index(word)]) for word in ("a", "b", "c", "d") * 5]


@pytest.fixture(scope="module")
def policy(checkpoints: dict[str, Path]) -> PreTrainedModel:
    return load_causal_lm(checkpoints["first"])


@pytest.fixture(scope="module")
def other(checkpoints: dict[str, Path]) -> ModelReference:
    return load_model_reference([checkpoints["second"]])


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


@pytest.fixture(scope="module")
def with_hidden(policy: PreTrainedModel, checkpoints: dict[str, Path]) -> Rollout:
    """The same rollout, its hidden states kept."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(checkpoints["first"])
    return sample(policy, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.7, generator=generator, keep_hidden=True)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("kept", [False, True])
def test_every_response_beside_other_models(
    policy: PreTrainedModel,
    other: ModelReference,
    rollout: Rollout,
    with_hidden: Rollout,
    batch_size: int | None,
    kept: bool,
) -> None:
    others = {"other": other, "itself": ModelReference(policy)}
    given = with_hidden if kept else rollout
    compared = compare(policy, given, others, temperature=0.7, batch_size=batch_size)
    expected, expected_entropies = sums_alone(policy, other, rollout)
    mask = rollout.response_mask
    divergences = {name: kl.per_response(values, mask) for name, values in compared.kl.items()}
    assert divergences["other"].tolist() == pytest.approx(expected, rel=1e-4)
    assert divergences["itself"].abs().max() <= (1e-5 if kept else 0.0)
    assert kl.per_response(compared.entropy, mask).tolist() == pytest.approx(expected_entropies, rel=1e-4)
    torch.testing.assert_close(compared.logprobs, rollout.logprobs, atol=1e-5, rtol=0)
    for i, (tokens, attends) in enumerate(zip(rollout.tokens, rollout.attention_mask, strict=True)):
        length = int(rollout.response_lengths[i])
        log_q = (other.model(tokens[attends][None]).logits[0, -length - 1 : -1].detach() / 0.7).log_softmax(-1)
        sampled = log_q.gather(1, tokens[attends][-length:, None]).squeeze(1)
        torch.testing.assert_close(compared.other_logprobs["other"][i, :length], sampled, atol=1e-5, rtol=1e-5)
    for values in compared.tensors().values():
        assert values.shape == mask.shape
        assert values[~mask].abs().sum() == 0


def test_a_policy_whose_hidden_states_were_kept_is_not_run_again(
    policy: PreTrainedModel, other: ModelReference, with_hidden: Rollout, rollout: Rollout
) -> None:
    calls = []
    handle = policy.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    compare(policy, with_hidden, {"other": other}, temperature=0.7)
    assert calls == []
    compare(policy, rollout, {"other": other}, temperature=0.7, batch_size=7)
    assert len(calls) == 3
    handle.remove()


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


@pytest.mark.parametrize("batch_size", [2, 32])
def test_loss_of_examples_is_the_mean_over_their_response_tokens(policy: PreTrainedModel, batch_size: int) -> None:
    examples = random_examples(seed=3, num=7)
    nll, count = [], []
    for example in examples:
        logits = policy(torch.tensor([example.token_ids])).logits[0, len(example.prompt_ids) - 1 : -1].double()
        response = torch.tensor(example.response_ids)
        nll.append(torch.nn.functional.cross_entropy(logits, response, reduction="sum").item())
        count.append(len(response))
    found = evaluate_loss(policy, examples, PAD, batch_size=batch_size)
    mean = sum(nll) / sum(count)
    assert found.mean == pytest.approx(mean, rel=1e-5)
    # √(Σ (nll_i − mean · n_i)² · N / (N − 1)) / Σ n
    residuals = sum((a - mean * n) ** 2 for a, n in zip(nll, count, strict=True))
    assert found.stderr == pytest.approx((residuals * 7 / 6) ** 0.5 / sum(count), rel=1e-4)

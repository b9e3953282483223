"""Rollouts: captured log-probabilities and hidden states, batch sizes, ends of responses, both engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOS, EOS, PAD, WORDS
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data import Prompt
from rlhf.logprobs import gather_logprobs, head_of, model_distributions
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.policy import checkpoint_activations
from rlhf.rollout import ENGINES, Rollout, sample, used_columns

TEXTS = ["a b c", "d", "e f g h i", "j k", "", "l m n a b c d"]
PROMPTS = [Prompt(text, [BOS, *(WORDS.index(word) for word in text.split())]) for text in TEXTS] * 4
MAX_NEW_TOKENS = 8


@pytest.fixture(scope="module", params=["first", "gpt2"])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> PreTrainedModel:
    return load_causal_lm(checkpoints[request.param])


@pytest.fixture(scope="module", params=["first", "chat"], ids=["pad", "pad=eos"])
def tokenizer(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoints[request.param])


def draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Rollout:
    generator = torch.Generator().manual_seed(settings.pop("seed", 0))
    prompts = settings.pop("prompts", PROMPTS)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0} | settings
    return sample(model, tokenizer, prompts, generator=generator, **settings)


def unpadded_responses(rollout: Rollout) -> Iterator[list[int]]:
    for tokens, mask in zip(rollout.response_tokens, rollout.response_mask, strict=True):
        yield tokens[mask].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_model_at_the_temperature(checkpoints: dict[str, Path], temperature: float) -> None:
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    num_draws = 4000
    prompts = [PROMPTS[0]] * num_draws
    rollout = draw(model, tokenizer, prompts=prompts, max_new_tokens=1, temperature=temperature)
    logits = model(torch.tensor([PROMPTS[0].token_ids])).logits[0, -1].detach().double()
    expected = num_draws * (logits / temperature).softmax(-1)
    counts = rollout.response_tokens[:, 0].bincount(minlength=len(WORDS))
    cells = torch.where(expected < 20, len(WORDS), torch.arange(len(WORDS)))  # rare tokens share one, for χ²
    counts, expected = (
        torch.zeros(len(WORDS) + 1).double().index_add(0, cells, x.double()) for x in (counts, expected)
    )
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.001


def logprobs_alone(model: PreTrainedModel, rollout: Rollout, temperature: float) -> Iterator[Tensor]:
    """log softmax(logits / temperature) at each response's positions, by an unpadded forward of each row. [t, V]"""
    for prompt, response in zip(PROMPTS, unpadded_responses(rollout), strict=True):
        logits = model(torch.tensor([prompt.token_ids + response])).logits[0, len(prompt.token_ids) - 1 : -1]
        yield (logits / temperature).log_softmax(-1).detach()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_captured_logprobs_equal_a_fresh_forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float, engine: str
) -> None:
    """Also of the framework's engine: what it says of its own samples is what a scoring forward says."""
    rollout = draw(model, tokenizer, temperature=temperature, engine=engine, keep_hidden=True)
    mask, tokens = rollout.response_mask, rollout.response_tokens
    fresh = gather_logprobs(model_distributions(model, rollout, temperature).rows(slice(None)), tokens[mask])
    torch.testing.assert_close(rollout.logprobs[mask], fresh, atol=1e-5, rtol=0)
    assert rollout.logprobs[~mask].abs().sum() == 0

    alone = logprobs_alone(model, rollout, temperature)
    for i, (response, log_p) in enumerate(zip(unpadded_responses(rollout), alone, strict=True)):
        expected = log_p.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(rollout.logprobs[i, : len(response)], expected, atol=1e-5, rtol=0)

    # and the hidden states that were kept say the same
    assert rollout.hidden is not None
    assert rollout.hidden.shape[:2] == mask.shape
    kept = head_of(model, temperature).logits(rollout.hidden[mask]).log_softmax(-1)
    torch.testing.assert_close(gather_logprobs(kept, tokens[mask]), fresh, atol=1e-5, rtol=0)
    assert draw(model, tokenizer, engine=engine).hidden is None


@pytest.mark.parametrize("engine", ENGINES)
def test_cuts_are_in_the_logprobs(checkpoints: dict[str, Path], engine: str) -> None:
    """Of the tokens that make up 0.8 of the four likeliest."""
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    rollout = draw(model, tokenizer, temperature=1.3, top_k=4, top_p=0.8, engine=engine)
    alone = logprobs_alone(model, rollout, 1.3)
    for i, (response, log_p) in enumerate(zip(unpadded_responses(rollout), alone, strict=True)):
        for t, token in enumerate(response):
            p, order = log_p[t].exp().sort(descending=True)
            p = p[:4] / p[:4].sum()
            num = next(n for n in range(1, 5) if p[:n].sum() >= 0.8)
            expected = p[order[:num].tolist().index(token)] / p[:num].sum()
            assert rollout.logprobs[i, t].item() == pytest.approx(expected.log().item(), abs=1e-4)


def test_the_engines_agree_where_nothing_is_random(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ours, graph, theirs = (draw(model, tokenizer, temperature=0.0, engine=engine, batch_size=10) for engine in ENGINES)
    assert torch.equal(graph.tokens, ours.tokens)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.response_mask, theirs.response_mask)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)


def test_the_frameworks_engine_draws_from_the_generator_alone(checkpoints: dict[str, Path]) -> None:
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once, again, other = (draw(model, tokenizer, engine="generate", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(once.tokens, again.tokens)
    assert once.responses != other.responses
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_recomputes_its_activations_samples_the_same(
    checkpoints: dict[str, Path], model: PreTrainedModel, engine: str
) -> None:
    """transformers gives up the cache in training mode with checkpointing, and with it the beginning of every row."""
    tokenizer, folder = load_tokenizer(checkpoints["first"]), model.config._name_or_path
    expected = draw(model, tokenizer, engine=engine)
    checkpointed = load_causal_lm(folder)
    checkpoint_activations(checkpointed)
    rollout = draw(checkpointed, tokenizer, engine=engine)
    assert torch.equal(rollout.tokens, expected.tokens)
    torch.testing.assert_close(rollout.logprobs, expected.logprobs, atol=1e-6, rtol=0)
    assert all(module.training for module in checkpointed.modules())
    assert not model.training


def test_layout_and_ends_of_responses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rollout = draw(model, tokenizer)
    assert rollout.finished.any()
    assert not rollout.finished.all()
    assert rollout.num_prompt_tokens == max(len(prompt.token_ids) for prompt in PROMPTS)
    assert rollout.response_mask.shape[1] == int(rollout.response_lengths.max()) <= MAX_NEW_TOKENS
    assert torch.equal(rollout.attention_mask[:, rollout.num_prompt_tokens :], rollout.response_mask)
    for i, (prompt, response) in enumerate(zip(PROMPTS, unpadded_responses(rollout), strict=True)):
        prompt_tokens, prompt_mask = (
            x[i, : rollout.num_prompt_tokens] for x in (rollout.tokens, rollout.attention_mask)
        )
        assert prompt_tokens[prompt_mask].tolist() == prompt.token_ids
        assert bool(prompt_mask[-1])  # padded on the left
        assert rollout.response_mask[i].tolist() == [t < len(response) for t in range(rollout.response_mask.shape[1])]
        if rollout.finished[i]:
            assert response[-1] == EOS
        else:
            assert (len(response), response[-1] == EOS) == (MAX_NEW_TOKENS, False)
        assert EOS not in response[:-1]
        assert (rollout.response_tokens[i, len(response) :] == tokenizer.pad_token_id).all()
        words = [WORDS[token] for token in response if token >= 4]  # without <pad>, <bos>, <eos>, <unk>
        assert rollout.responses[i].split() == words
        assert rollout.prompts[i] == prompt.text


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batch_size_changes_nothing_but_rounding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    whole, parts = (draw(model, tokenizer, batch_size=size) for size in (None, batch_size))
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(parts.response_mask, whole.response_mask)
    assert torch.equal(parts.finished, whole.finished)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    assert parts.responses == whole.responses


def test_responses_do_not_depend_on_the_prompts_that_follow(checkpoints: dict[str, Path]) -> None:
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    few, all_of_them = (draw(model, tokenizer, prompts=prompts) for prompts in (PROMPTS[:5], PROMPTS))
    assert list(unpadded_responses(few)) == list(unpadded_responses(all_of_them))[:5]


def test_generator_alone_decides(checkpoints: dict[str, Path]) -> None:
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    once = draw(model, tokenizer)
    torch.manual_seed(123)
    assert torch.equal(draw(model, tokenizer).tokens, once.tokens)
    assert draw(model, tokenizer, seed=1).responses != once.responses


def test_pad_token_makes_no_difference(checkpoints: dict[str, Path], model: PreTrainedModel) -> None:
    padded, padded_with_eos = (draw(model, load_tokenizer(checkpoints[name])) for name in ("first", "chat"))
    assert list(unpadded_responses(padded)) == list(unpadded_responses(padded_with_eos))
    assert torch.equal(padded.finished, padded_with_eos.finished)
    assert padded.responses == padded_with_eos.responses


def test_cold_sampling_is_transformers_greedy_decoding(
    checkpoints: dict[str, Path], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rollout = draw(model, tokenizer, temperature=1e-4, max_new_tokens=12)
    greedy = AutoModelForCausalLM.from_pretrained(model.config._name_or_path).eval()
    for prompt, response in list(zip(PROMPTS, unpadded_responses(rollout), strict=True))[: len(TEXTS)]:
        ids = torch.tensor([prompt.token_ids])
        generated = greedy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=PAD
        )
        assert response == generated[0, ids.shape[1] :].tolist()


def test_responses_that_all_end_early_are_cut_to_the_longest(checkpoints: dict[str, Path]) -> None:
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])

    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits 0, and the first of equals wins
        model.model.embed_tokens.weight.zero_()
    rollout = draw(model, tokenizer, temperature=0.0)
    assert rollout.response_tokens.tolist() == [[PAD] * MAX_NEW_TOKENS] * len(PROMPTS)
    tokenizer.eos_token = WORDS[PAD]
    rollout = draw(model, tokenizer, temperature=0.0, keep_hidden=True)
    assert rollout.response_tokens.tolist() == [[PAD]] * len(PROMPTS)
    assert rollout.finished.all()
    assert rollout.responses == [""] * len(PROMPTS)
    assert rollout.hidden is not None
    assert rollout.hidden.shape[1] == 1


def columns_by_hand(rollout: Rollout, row: int) -> tuple[list[int], list[int], list[float], bool, str, str]:
    """Everything of one row, without its padding."""
    num_prompt = rollout.num_prompt_tokens
    prompt = rollout.tokens[row, :num_prompt][rollout.attention_mask[row, :num_prompt]].tolist()
    mask = rollout.response_mask[row]
    response, logprobs = rollout.response_tokens[row][mask].tolist(), rollout.logprobs[row][mask].tolist()
    return prompt, response, logprobs, bool(rollout.finished[row]), rollout.prompts[row], rollout.responses[row]


def test_rows_are_cut_to_the_widths_they_need(checkpoints: dict[str, Path]) -> None:
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    rollout = draw(model, tokenizer, keep_hidden=True)
    for indices in ([3, 0, 3], [1, 7], [4], list(range(len(PROMPTS)))):
        chosen = rollout.rows(torch.tensor(indices))
        assert [columns_by_hand(chosen, i) for i in range(len(chosen))] == [
            columns_by_hand(rollout, i) for i in indices
        ]
        assert chosen.num_prompt_tokens == max(len(PROMPTS[i].token_ids) for i in indices)
        assert chosen.response_mask.shape[1] == max(int(rollout.response_lengths[i]) for i in indices)
        assert torch.equal(chosen.attention_mask[:, chosen.num_prompt_tokens :], chosen.response_mask)
        assert chosen.hidden is not None
        assert rollout.hidden is not None
        assert chosen.hidden.shape[:2] == chosen.logprobs.shape
        hidden = torch.cat([rollout.hidden[i][rollout.response_mask[i]] for i in indices])
        assert torch.equal(chosen.hidden[chosen.response_mask], hidden)


def test_splits_are_consecutive_rows(checkpoints: dict[str, Path]) -> None:
    rollout = draw(load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"]))
    parts = list(rollout.split(7))
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    rows = [columns_by_hand(part, i) for part in parts for i in range(len(part))]
    assert rows == [columns_by_hand(rollout, i) for i in range(len(rollout))]
    assert [len(part) for part in rollout.split(None)] == [len(rollout)]


def test_used_columns_by_hand() -> None:
    response_mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    prompt_mask = torch.tensor([[False, False, True], [False, True, True]])
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    assert used_columns(attention_mask, response_mask) == (slice(1, 3), slice(0, 2))


@pytest.mark.parametrize("share", [slice(0, 5), slice(5, 9), slice(20, 24)])
def test_a_share_of_the_prompts_gets_the_responses_of_the_whole(checkpoints: dict[str, Path], share: slice) -> None:
    """So that several processes sample together what one would alone."""
    model, tokenizer = load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"])
    whole, part = draw(model, tokenizer), draw(model, tokenizer, share=share)
    expected = [columns_by_hand(whole, i) for i in range(len(whole))][share]
    for found, row in zip((columns_by_hand(part, i) for i in range(len(part))), expected, strict=True):
        assert found[2] == pytest.approx(row[2], abs=1e-5)
        assert (*found[:2], *found[3:]) == (*row[:2], *row[3:])

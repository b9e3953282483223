"""Sampling: the inverse CDF by hand, captured log-probabilities, batch sizes, ends of responses."""

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
from rlhf.models import gather_logprobs, load_causal_lm, load_tokenizer, response_log_distributions
from rlhf.rollout import Rollout, sample, sample_tokens

TEXTS = ["a b c", "d", "e f g h i", "j k", "", "l m n a b c d"]
PROMPTS = [Prompt(text, [BOS, *(WORDS.index(word) for word in text.split())]) for text in TEXTS] * 4
MAX_NEW_TOKENS = 8
JUST_BELOW_ONE = 1 - 2**-24  # the largest float32 that torch.rand can return


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


@pytest.mark.parametrize(
    ("uniform", "token"),
    [
        # cumulative probabilities: 0, ¼, ¼, ¾, 1, 1
        (0.0, 1),
        (0.1, 1),
        (0.2499, 1),
        (0.25, 3),  # a token's interval holds its lower end, not its upper
        (0.5, 3),
        (0.7499, 3),
        (0.75, 4),
        (0.99, 4),
        (JUST_BELOW_ONE, 4),
    ],
)
def test_inverse_cdf_by_hand(uniform: float, token: int) -> None:
    log_distributions = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    assert sample_tokens(log_distributions, torch.tensor([uniform])).tolist() == [token]


def test_each_row_uses_its_own_distribution_and_uniform() -> None:
    log_distributions = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]).log()
    assert sample_tokens(log_distributions, torch.tensor([0.6, 0.4, 0.0])).tolist() == [1, 1, 2]


def test_impossible_tokens_are_never_drawn_whatever_the_rounding() -> None:
    """Zero probabilities at both ends and in between, cumulative sums that do not end at exactly 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 1000, generator=generator)
    impossible = torch.rand(200, 1000, generator=generator) < 0.5
    impossible[:, [0, -1]] = True
    log_distributions = logits.masked_fill(impossible, -torch.inf).log_softmax(-1)
    for uniforms in (torch.zeros(200), torch.full((200,), JUST_BELOW_ONE), torch.rand(200, generator=generator)):
        tokens = sample_tokens(log_distributions, uniforms)
        assert not impossible.gather(1, tokens[:, None]).any()


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.05, 0.3, 0.15, 0.5])
    num_draws = 20_000
    uniforms = torch.rand(num_draws, generator=torch.Generator().manual_seed(0))
    counts = sample_tokens(probabilities.log().expand(num_draws, -1), uniforms).bincount(minlength=4)
    assert chisquare(counts, num_draws * probabilities.double() / probabilities.double().sum()).pvalue > 0.001


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


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_captured_logprobs_equal_a_fresh_forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    rollout = draw(model, tokenizer, temperature=temperature)
    mask = rollout.response_mask
    fresh = gather_logprobs(response_log_distributions(model, rollout, temperature), rollout.response_tokens)
    torch.testing.assert_close(rollout.logprobs[mask], fresh[mask], atol=1e-5, rtol=0)
    assert rollout.logprobs[~mask].abs().sum() == 0

    # and an unpadded forward of each row, without masks or positions
    for i, (prompt, response) in enumerate(zip(PROMPTS, unpadded_responses(rollout), strict=True)):
        logits = model(torch.tensor([prompt.token_ids + response])).logits[0, len(prompt.token_ids) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(rollout.logprobs[i, : len(response)], expected, atol=1e-5, rtol=0)


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

    class EndsAtOnce(torch.nn.Module):
        """The model, with everything but the end-of-sequence token made impossible."""

        device = model.device

        def forward(self, **inputs: Any) -> Any:
            output = model(**inputs)
            impossible = torch.arange(len(WORDS)) != EOS
            output.logits = output.logits.masked_fill(impossible, -torch.inf)
            return output

    rollout = draw(EndsAtOnce(), tokenizer)  # type: ignore[arg-type]
    assert rollout.response_tokens.tolist() == [[EOS]] * len(PROMPTS)
    assert rollout.finished.all()
    assert rollout.responses == [""] * len(PROMPTS)


def rows_of(rollout: Rollout) -> list[Tensor]:
    return [rollout.tokens, rollout.attention_mask, rollout.response_mask, rollout.logprobs, rollout.finished]


def test_rows_and_splits(checkpoints: dict[str, Path]) -> None:
    rollout = draw(load_causal_lm(checkpoints["first"]), load_tokenizer(checkpoints["first"]))
    chosen = rollout.rows(torch.tensor([3, 0, 3]))
    for selected, whole in zip(rows_of(chosen), rows_of(rollout), strict=True):
        assert torch.equal(selected, whole[[3, 0, 3]])
    assert chosen.prompts == [rollout.prompts[i] for i in (3, 0, 3)]
    assert chosen.responses == [rollout.responses[i] for i in (3, 0, 3)]
    parts = list(rollout.split(7))
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    for joined, whole in zip(zip(*map(rows_of, parts), strict=True), rows_of(rollout), strict=True):
        assert torch.equal(torch.cat(joined), whole)
    assert [text for part in parts for text in part.responses] == rollout.responses
    assert len(list(rollout.split(None))) == 1

"""The reviews tokenizer and model configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.reviews.grammar import PROMPTS, vocabulary
from rlhf.reviews.tokenizer import make_tokenizer, tiny_llama_config


@pytest.fixture(scope="module", params=["made", "loaded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    if request.param == "made":
        return made
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_prompts_are_seven_known_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert len(ids) == 7
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_reviews_go_round_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    review = "today , the songs were not bad . it is worth a visit ."
    ids = tokenizer(review, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(review.split())
    assert tokenizer.decode(ids) == review


def test_ids_are_words_in_order_after_the_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 4 + len(vocabulary())
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.convert_ids_to_tokens(range(4, len(tokenizer))) == vocabulary()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left"


def test_foreign_words_become_unk(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("the zebra", add_special_tokens=False)["input_ids"][1] == tokenizer.unk_token_id == 3


def test_model_is_small_and_tied(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 239_712
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == 2

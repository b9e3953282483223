"""Loading prompts, demonstrations and pairs: what the tokens are, and errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import BOS, EOS, PAD, WORDS, make_tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf.data import Example, Pair, Prompt, batch_examples, load_examples, load_pairs, load_prompts
from rlhf.models import load_tokenizer

Loader = Callable[..., Any]


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoints["first"])


@pytest.fixture(scope="module")
def chat_tokenizer(checkpoints: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoints["chat"])


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def write(folder: Path, name: str, *lines: str | dict[str, Any]) -> Path:
    path = folder / name
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_text_prompts_one_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, "prompts.txt", "a b", "", "   ", "c")
    assert load_prompts(path, tokenizer) == [Prompt("a b", [BOS, *ids("a b")]), Prompt("c", [BOS, *ids("c")])]


def test_json_prompts_are_used_verbatim(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, "prompts.jsonl", {"prompt": "a b", "other": 1}, "", {"prompt": "<eos> c"})
    assert load_prompts(path, tokenizer) == [
        Prompt("a b", [BOS, *ids("a b")]),
        Prompt("<eos> c", [BOS, EOS, *ids("c")]),
    ]


def test_messages_go_through_the_chat_template_once(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}]
    path = write(tmp_path, "prompts.jsonl", {"messages": messages})
    # one <bos>, the template's; the reward reads the messages without the template's markup
    assert load_prompts(path, chat_tokenizer) == [Prompt("a b\nc", ids("<bos> user a b user c assistant"))]


def test_responses_end_with_the_end_of_sequence_token(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    message = {"messages": [{"role": "user", "content": "a"}]}
    path = write(tmp_path, "data.jsonl", {"prompt": "a", "response": "b c"}, {**message, "response": "d"})
    assert load_examples(path, chat_tokenizer) == [
        Example([BOS, *ids("a")], [*ids("b c"), EOS]),
        Example(ids("<bos> user a assistant"), [*ids("d"), EOS]),
    ]
    assert load_examples(path, chat_tokenizer)[0].token_ids == [BOS, *ids("a b c"), EOS]


def test_pairs_share_their_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c d"})
    prompt = [BOS, *ids("a")]
    assert load_pairs(path, tokenizer) == [
        Pair(Example(prompt, [*ids("b"), EOS]), Example(prompt, [*ids("c d"), EOS])),
    ]


@pytest.mark.parametrize(
    ("max_tokens", "kept"), [(None, "b c d <eos>"), (6, "b c d <eos>"), (5, "b c d"), (4, "b c"), (3, "b")]
)
def test_long_responses_lose_their_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, kept: str
) -> None:
    path = write(tmp_path, "data.jsonl", {"prompt": "a", "response": "b c d"})
    assert load_examples(path, tokenizer, max_tokens) == [Example([BOS, *ids("a")], ids(kept))]
    pairs = write(tmp_path, "pairs.jsonl", {"prompt": "a", "chosen": "b c d", "rejected": "b"})
    (pair,) = load_pairs(pairs, tokenizer, max_tokens)
    assert (pair.chosen.response_ids, pair.rejected.response_ids) == (ids(kept), ids("b <eos>")[: len(ids(kept))])


def test_an_empty_prompt_is_refused_unless_a_token_begins_every_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path, "prompts.jsonl", {"prompt": ""})
    assert load_prompts(path, tokenizer) == [Prompt("", [BOS])]
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: the prompt is empty; remove the line"):
        load_prompts(path, make_tokenizer(begin=False))


def test_prompts_that_just_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, "prompts.txt", "a b c")
    assert len(load_prompts(path, tokenizer, 4)) == 1
    with pytest.raises(ValueError, match=r"prompts\.txt:1: prompt of 4 tokens, but only 3 fit"):
        load_prompts(path, tokenizer, 3)


GOOD: dict[str, Any] = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != field}


ANY_ROW = [
    ("{not json", "not JSON"),
    ("[1, 2]", "expected a JSON object with prompt or messages, found list"),
    (without("prompt"), r"neither a string prompt nor a list messages; found \['chosen', 'rejected', 'response'\]"),
    ({**GOOD, "prompt": 7}, "neither a string prompt nor a list messages"),
    ({**GOOD, "messages": [{"role": "user", "content": "a"}]}, "no chat template"),
]
CASES = [
    *((loader, row, message) for loader in (load_prompts, load_examples, load_pairs) for row, message in ANY_ROW),
    *((load_examples, row, "field 'response'") for row in (without("response"), {**GOOD, "response": " "})),
    (load_examples, {**GOOD, "response": None}, "must be a non-empty string; found None"),
    *((load_pairs, without(field), f"field '{field}'") for field in ("chosen", "rejected")),
]


@pytest.mark.parametrize(("loader", "row", "message"), CASES)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loader: Loader, row: str | dict[str, Any], message: str
) -> None:
    path = write(tmp_path, "rows.jsonl", GOOD, "", GOOD, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:4: .*{message}") as error:
        loader(path, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "messages",
    [[], ["a"], [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": None}], [{"role": "no\nsuch"}]],
)
def test_bad_messages_are_named_by_file_and_line(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, messages: list[Any]
) -> None:
    path = write(tmp_path, "rows.jsonl", GOOD, {"messages": messages})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*messages") as error:
        load_prompts(path, chat_tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", [load_prompts, load_examples, load_pairs])
def test_missing_empty_and_garbled_files_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loader: Loader
) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        loader(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(ValueError, match=r"empty\.jsonl: no (prompts|examples|pairs)"):
        loader(write(tmp_path, "empty.jsonl", "", "  "), tokenizer)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl: .*UTF-8"):
        loader(tmp_path / "latin.jsonl", tokenizer)


@pytest.mark.parametrize("loader", [load_examples, load_pairs])
def test_a_prompt_without_room_for_a_response_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loader: Loader
) -> None:
    path = write(tmp_path, "rows.jsonl", GOOD, {**GOOD, "prompt": "a b c"})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: prompt of 4 tokens leaves no room for a response in 4"):
        loader(path, tokenizer, 4)


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_batch_pads_prompts_on_the_left_and_responses_on_the_right(pad: int) -> None:
    # the first prompt ends with the id that pads, and its response begins with it
    batch = batch_examples([Example([BOS, pad], [pad, 9, EOS]), Example([BOS, 7, 6], [EOS])], pad)
    assert batch.tokens.tolist() == [[pad, BOS, pad, pad, 9, EOS], [BOS, 7, 6, EOS, pad, pad]]
    assert batch.attention_mask.int().tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert batch.response_mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (len(batch), batch.num_prompt_tokens) == (2, 3)
    assert batch.response_tokens.tolist() == [[pad, 9, EOS], [EOS, pad, pad]]
    assert batch.response_lengths.tolist() == [3, 1]

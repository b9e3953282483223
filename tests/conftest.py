"""Shared test settings and checkpoints.

No network, no accelerator, one thread, so that floating-point results do not depend on the machine's load.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch
from helpers import CHAT_TEMPLATE, LETTERS, WORDS, llama_config, make_gpt2, make_llama, make_tokenizer
from transformers import LlamaForSequenceClassification

from rlhf.checkpointing import save_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoint folders by name; all but the first six are misfits for ``first``."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(10)
    reward = LlamaForSequenceClassification(llama_config(num_labels=1))
    tokenizer = make_tokenizer()
    reordered = (*WORDS[: -len(LETTERS)], *reversed(LETTERS))
    models = {
        "first": (make_llama(1), tokenizer),
        "second": (make_llama(2), tokenizer),
        "third": (make_llama(3), tokenizer),
        "gpt2": (make_gpt2(4), tokenizer),
        "reward": (reward, tokenizer),
        "chat": (
            make_llama(1),
            make_tokenizer(pad_token=None, extra_special_tokens=["<pad>"], chat_template=CHAT_TEMPLATE),
        ),
        "larger_vocabulary": (make_llama(5, vocab_size=21), make_tokenizer((*WORDS, "o"))),
        "reordered_vocabulary": (make_llama(6), make_tokenizer(reordered)),
        "other_eos": (make_llama(6), make_tokenizer(eos_token="n")),
        "no_eos": (make_llama(6), make_tokenizer(eos_token=None)),
        "wider": (make_llama(7, hidden_size=32), tokenizer),
        "shallower": (make_llama(8, num_hidden_layers=1), tokenizer),
    }
    return {name: save_model(*model, root / name) for name, model in models.items()}


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty prompts of one to four letters."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(" ".join(LETTERS[i % 11 : i % 11 + 1 + i % 4]) + "\n" for i in range(20)), encoding="utf-8")
    return path

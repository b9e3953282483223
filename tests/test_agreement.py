"""Training and analysis measure the same thing with different code and different samples."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import soupkit
from analysis import kl_matrix
from rlhf import ppo
from rlhf.config import PPOConfig
from rlhf.data import load_prompts
from rlhf.models import load_tokenizer


def test_the_logged_kl_is_the_kl_that_analysis_measures(
    checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    ingredients = [checkpoints["first"], checkpoints["second"]]
    config = PPOConfig(
        policy=str(ingredients[0]),
        reference=[str(folder) for folder in ingredients],
        reward=[str(checkpoints["reward"])],
        prompts=str(prompt_file),
        output=str(tmp_path / "run"),
        updates=1,
        batch_size=200,
        minibatch_size=200,
        max_new_tokens=8,
        eval_episodes=200,
    )
    summary = ppo.train(config)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8"))

    soup = soupkit.average(ingredients, out=tmp_path / "soup", dtype=torch.float32, progress=False)
    tokenizer = load_tokenizer(ingredients[0])
    measured = kl_matrix(
        {"policy": ingredients[0], "soup": soup},
        load_prompts(prompt_file, tokenizer),
        tokenizer,
        max_new_tokens=8,
        num_responses=20,
        seed=1,
        progress=False,
    )["policy", "soup"]
    before = summary["kl"]["reference"]
    for mean, stderr in (
        (logged["kl/reference"], logged["kl/reference_stderr"]),
        (logged["kl_k1/reference"], logged["kl_k1/reference_stderr"]),
        (before["before"], before["before_stderr"]),
    ):
        assert 0 < stderr < 0.5 * measured.mean
        assert abs(mean - measured.mean) < 4 * (stderr**2 + measured.stderr**2) ** 0.5

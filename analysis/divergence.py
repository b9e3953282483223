"""Who is how far from whom: KL divergence between language models, exactly, token by token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.results import load_npz, save_npz
from analysis.weights import named_sources
from rlhf.data import Prompt
from rlhf.evaluation import compare
from rlhf.metrics import Estimate, mean_estimate
from rlhf.models import evaluating, load_causal_lm, require_same_tokenizer
from rlhf.randomness import generator
from rlhf.reference import ModelReference
from rlhf.rollout import sample


@dataclass(frozen=True)
class KLMatrix:
    """KL(row ‖ column) between N models, in nats per response; 0 on the diagonal.

    names     N names, of rows and columns alike
    mean      [N, N]  mean over responses sampled from the row's model
    stderr    [N, N]  its standard error
    metadata  how it was sampled
    """

    names: list[str]
    mean: np.ndarray
    stderr: np.ndarray
    metadata: dict[str, Any]

    def __getitem__(self, pair: tuple[str, str]) -> Estimate:
        """KL(first ‖ second): ``matrix["policy", "soup"]``."""
        index = tuple(self.names.index(name) for name in pair)
        return Estimate(float(self.mean[index]), float(self.stderr[index]))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.npz`` file."""
        return save_npz(path, "kl_matrix", vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KLMatrix:
        """Read what :meth:`save` wrote."""
        return cls(**load_npz(path, "kl_matrix"))


def kl_matrix(
    models: Mapping[str, str | os.PathLike[str] | PreTrainedModel] | Sequence[str | os.PathLike[str]],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    num_responses: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> KLMatrix:
    """KL(π ‖ ρ) for every ordered pair of models, π the row and ρ the column.

    KL(π ‖ ρ) = E_{y∼π} Σ_t Σ_v π(v|s_t) log (π(v|s_t) / ρ(v|s_t))

    Prefixes s_t are sampled from π, ``num_responses`` responses of at most ``max_new_tokens`` tokens to every prompt;
    the inner sum is exact (Rao–Blackwellised: Amini, Vieira, Cotterell 2025, arXiv 2504.10637). Both distributions are
    taken at ``temperature``. All rows draw the same random numbers. The mean is over all responses; the standard error
    is over prompts (responses to one prompt are averaged first), over responses when there is one prompt only.

    ``models`` are {name: folder or model}, or a sequence of folders; all are held in memory at once, folders on
    ``device``. ``batch_size`` bounds how many responses are handled at once.

    Raises ValueError when vocabularies differ, or when there are fewer than two models or no prompts.

        distances = kl_matrix(["sft1", "sft2", "soup"], prompts, tokenizer, max_new_tokens=48)
        distances["sft1", "soup"].mean
    """
    sources = named_sources(models)
    if len(sources) < 2:
        raise ValueError(f"models={list(sources)}: a matrix needs at least two; give more")
    if not prompts:
        raise ValueError("prompts: none given; give at least one prompt")
    if num_responses < 1:
        raise ValueError(f"num_responses={num_responses}: must be at least 1")
    loaded = load_models(sources, device)
    names = list(loaded)
    mean, stderr = np.zeros((len(names), len(names))), np.zeros((len(names), len(names)))
    repeated = [prompt for prompt in prompts for _ in range(num_responses)]
    bar = tqdm(names, "kl matrix", disable=not progress)
    with evaluating(*loaded.values()), bar:
        for row, name in enumerate(bar):
            rollout = sample(
                loaded[name],
                tokenizer,
                repeated,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator(seed, "kl_matrix"),
                batch_size=batch_size,
            )
            others = {other: ModelReference(model) for other, model in loaded.items() if other != name}
            divergences = compare(loaded[name], rollout, others, temperature=temperature, batch_size=batch_size)
            for other, values in divergences.kl.items():
                estimate = clustered_estimate(values.sum(dim=1).reshape(len(prompts), num_responses))
                mean[row, names.index(other)], stderr[row, names.index(other)] = estimate
    metadata = {
        "num_prompts": len(prompts),
        "num_responses": num_responses,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    return KLMatrix(names, mean, stderr, metadata)


def clustered_estimate(values: Tensor) -> Estimate:
    """Mean of R values for each of P prompts; standard error over the P prompts' means, or over R for P = 1. [P, R]"""
    return mean_estimate(values.double().mean(dim=1) if len(values) > 1 else values[0])


def load_models(sources: Mapping[str, Any], device: str | torch.device) -> dict[str, PreTrainedModel]:
    """Folders loaded, models as they are. Raises ValueError when tokenizers or vocabulary sizes differ."""
    folders = {name: os.fspath(s) for name, s in sources.items() if isinstance(s, str | os.PathLike)}
    first_folder = next(iter(folders.values()), None)
    for folder in folders.values():
        require_same_tokenizer(str(first_folder), folder)
    models = {
        name: load_causal_lm(folders[name], device=device) if name in folders else source
        for name, source in sources.items()
    }
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"models: vocabularies differ, {sizes} tokens; use models of one family")
    return models

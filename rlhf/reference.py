"""The model that the policy is kept close to: what the KL penalty is measured against.

One folder gives plain PPO; several give a soup, averaged by soupkit straight into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

import soupkit
from rlhf.models import causal_lm_with, load_causal_lm, require_same_tokenizer, response_log_distributions
from rlhf.rollout import Rollout
from soupkit.api import average_recipe


class Reference(Protocol):
    """Anything that gives a full next-token distribution at every response position."""

    def log_distributions(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        """log ρ(·|s_t) for the tokens of a rollout. → [B, T, V] float32"""
        ...


class ModelReference:
    """A language model as the reference; a soup is one model too."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def log_distributions(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        return response_log_distributions(self.model, rollout, temperature)


def load_reference(
    folders: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> ModelReference:
    """The reference made of one folder, or of the weighted average of several (uniform for ``weights=None``).

    The average is computed and kept in float32, whatever the folders' dtype. Raises ValueError when the tokenizers
    differ, and soupkit's MergeError when the weights or the checkpoints do not fit together.
    """
    for folder in folders[1:]:
        require_same_tokenizer(folders[0], folder)
    model = load_causal_lm(folders[0])
    if len(folders) > 1 or weights is not None:
        model = causal_lm_with(model, soupkit.average(list(folders), weights, dtype=torch.float32, progress=progress))
    model.requires_grad_(False)
    return ModelReference(model.eval().to(torch.device(device)))


def describe_reference(folders: Sequence[str | Path], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """The reference's provenance, as ``soup.json`` holds it: ingredients with hashes of their files, and weights."""
    return soupkit.provenance(average_recipe(list(folders), weights))

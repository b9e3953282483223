"""Random numbers as pure functions of a seed and a place, so that a run resumes without storing generator states."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose ("rollout", say) at one place (the update, say), independent of all others."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> 1))


def shuffled_batch(num_items: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices of batch ``step`` of an endless stream of permutations: every item once before any comes again."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_items
    batch = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(num_items, generator=generator(seed, "order", epoch))
        batch[epochs == epoch] = order[positions[epochs == epoch] % num_items]
    return batch

"""Methods that are weighted sums with weights known beforehand.

Products and sums are written as separate operations on purpose: where torch fuses them into one rounding, as in
``add(alpha=...)``, depends on its build and the machine, while separate operations give the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.methods.row import Blocks


def weighted_sum(blocks: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """Σᵢ wᵢ xᵢ, in the place of the blocks. n blocks [N] or [R, C]; n numbers, or tensors that broadcast to a block."""
    total = blocks[0].mul_(weights[0])
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block.mul_(weight))
    return total


def linear(blocks: Blocks, weight: Sequence[float], normalize: bool) -> Tensor:
    """Weighted average Σᵢ wᵢ xᵢ / Σᵢ wᵢ; without ``normalize`` the weighted sum."""
    return weighted_sum(blocks.ingredients, normalised(weight) if normalize else weight)


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. Raises MergeError where they sum to 0."""
    _, exponent = math.frexp(max(abs(weight) for weight in weights))
    scaled = [math.ldexp(weight, -exponent) for weight in weights]  # exactly, so that the sum cannot overflow
    total = math.fsum(scaled)
    if total == 0:
        raise MergeError("the weights sum to 0, so they cannot be normalised: change one, or set normalize to false")
    return [weight / total for weight in scaled]


def check_linear(parameters: Mapping[str, Any]) -> None:
    """Raise MergeError for weights that cannot be normalised."""
    if parameters["normalize"]:
        normalised(parameters["weight"])


def check_multislerp(parameters: Mapping[str, Any]) -> None:
    """Raise MergeError for weights that cannot be normalised."""
    if parameters["normalize_weights"]:
        normalised(parameters["weight"])


def check_fisher(parameters: Mapping[str, Any]) -> None:
    """Raise MergeError for weights that cannot be normalised."""
    normalised(parameters["weight"])


def ema(blocks: Blocks, decay: float) -> Tensor:
    """Exponential moving average of a sequence, the oldest first: a₁ = x₁, aᵢ = d aᵢ₋₁ + (1 − d) xᵢ."""
    n = len(blocks.ingredients)
    weights = [decay ** (n - 1)] + [(1 - decay) * decay ** (n - i) for i in range(2, n + 1)]
    return weighted_sum(blocks.ingredients, weights)


def lawa(blocks: Blocks, last: int | None) -> Tensor:
    """Uniform average of the ``last`` ingredients of a sequence, the oldest first."""
    latest = blocks.ingredients[-last:] if last else blocks.ingredients
    return weighted_sum(latest, [1 / len(latest)] * len(latest))


def fisher(blocks: Blocks, weight: Sequence[float]) -> Tensor:
    """Fisher-weighted average Σᵢ wᵢ Fᵢ xᵢ / Σᵢ wᵢ Fᵢ; the weighted average where no ingredient has any information."""
    precisions = [f.mul_(w) for f, w in zip(blocks.fishers, weight, strict=True)]
    information = sum(precisions[1:], precisions[0])
    products = [p * x for p, x in zip(precisions, blocks.ingredients, strict=True)]
    mean = sum(products[1:], products[0]) / information
    return torch.where(information > 0, mean, weighted_sum(blocks.ingredients, normalised(weight)))


def passthrough(blocks: Blocks, scale: Sequence[float]) -> Tensor:
    """One model, scaled: s x."""
    return blocks.ingredients[0].mul_(scale[0])

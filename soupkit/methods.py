"""Merge methods: pure functions of tensors, and the one table that lists them.

A method sees the same block of every ingredient, flat and already in the working precision, and gives the soup's block
without changing its input. What it gives at a position depends on the ingredients at that position alone, so a tensor
may be cut anywhere. What a method must know of the whole tensors reaches it as their Gram matrix.

Products and sums are written as separate operations on purpose: where torch fuses them into one rounding, as in
``add(alpha=...)``, depends on its build and the machine, while separate operations give the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soupkit.errors import MergeError

# Beyond this |cos| the arc and the chord are equal to float32 precision, while 1/sin(angle) loses digits.
COLLINEAR = 0.9995


def average(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted average Σᵢ wᵢ xᵢ, with weights that sum to 1. Blocks: n of shape [N]; result: [N].

    Paper: Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
    """
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total += block * weight
    return total


def linear(blocks: Sequence[Tensor], t: float) -> Tensor:
    """Straight line (1 − t) a + t b; t outside [0, 1] extrapolates. Blocks: 2 of shape [N]; result: [N].

    Paper: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models" (WiSE-FT), https://arxiv.org/abs/2109.01903
    """
    return average(blocks, (1 - t, t))


def slerp(blocks: Sequence[Tensor], t: float, gram: Tensor) -> Tensor:
    """Great-circle interpolation (sin((1−t)θ) a + sin(tθ) b) / sin θ, where cos θ = a·b / (‖a‖ ‖b‖).

    θ is the angle between the two whole tensors, flattened; it comes with their Gram matrix. The straight line is taken
    where there is no usable angle: |cos θ| > 0.9995 (antipodal tensors too: every great circle joins them, so none is
    chosen, and the line passes through 0 half-way), a tensor of zeros, or one with NaN or infinite values (which then
    stay where they are). t outside [0, 1] goes on along the circle.

    Blocks: 2 of shape [N]; gram: [2, 2] float64; result: [N].
    Paper: Shoemake 1985, "Animating rotation with quaternion curves", https://doi.org/10.1145/325334.325242
    """
    cosine = float(gram[0, 1] / (gram[0, 0].sqrt() * gram[1, 1].sqrt()))
    if not abs(cosine) <= COLLINEAR:  # also true of NaN
        return linear(blocks, t)
    angle = math.acos(cosine)
    return average(blocks, (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)))


def gram_matrix(blocks: Sequence[Tensor]) -> Tensor:
    """Dot products G[i, j] = Σ xᵢ xⱼ of the blocks, in float64. The matrix of a tensor is the sum over its blocks.

    Blocks: n of shape [N]; result: [n, n] float64 on the CPU.
    """
    wide = [block.double() for block in blocks]
    gram = torch.empty(len(wide), len(wide), dtype=torch.float64)
    for i, x in enumerate(wide):
        for j, y in enumerate(wide[: i + 1]):
            gram[i, j] = gram[j, i] = (x * y).sum()
    return gram


def normalised_weights(weights: Sequence[float] | None, num_ingredients: int) -> list[float]:
    """The weights divided by their sum; uniform for None. Raises MergeError for what is not a weighting."""
    if weights is None:
        return [1 / num_ingredients] * num_ingredients
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise MergeError(f"weights must be numbers, one per ingredient; found {weights!r}") from None
    if len(values) != num_ingredients:
        raise MergeError(f"found {len(values)} weights for {num_ingredients} ingredients: give one each")
    for position, value in enumerate(values, start=1):
        if not (math.isfinite(value) and value >= 0):
            raise MergeError(
                f"weight {position} is {value:g}: weights must be finite and not negative "
                "(to go beyond an ingredient, use interpolate with t outside [0, 1])"
            )
    largest = max(values)
    if largest == 0:
        raise MergeError("the weights sum to 0: at least one must be positive")
    scaled = [value / largest for value in values]  # so that the sum cannot overflow
    return [value / math.fsum(scaled) for value in scaled]


def finite_t(t: float) -> float:
    """The interpolation parameter as a float. Raises MergeError when it is not a finite number."""
    try:
        value = float(t)
    except (TypeError, ValueError):
        raise MergeError(f"t must be a number (0 gives a, 1 gives b); found {t!r}") from None
    if not math.isfinite(value):
        raise MergeError(f"t is {value}: it must be finite (0 gives a, 1 gives b)")
    return value


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method: what it means, how it is checked, and its default unless it is required."""

    meaning: str
    check: Callable[[Any, int], Any]  # (value, number of ingredients) -> the value the method receives
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the table: how a method is computed, what it needs, where it comes from."""

    function: Callable[..., Tensor]  # (blocks, **parameters) -> block, with gram= too where needs_gram
    summary: str
    paper: str
    departures: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    min_ingredients: int = 1
    max_ingredients: int | None = None
    needs_base: bool = False
    needs_gram: bool = False  # dot products of the whole tensors: every ingredient is read twice

    def resolve(self, parameters: Mapping[str, Any], num_ingredients: int) -> dict[str, Any]:
        """The parameters checked, completed with their defaults and brought to the form the function receives."""
        if num_ingredients < self.min_ingredients or num_ingredients > (self.max_ingredients or num_ingredients):
            expected = {(1, None): "at least one", (2, 2): "exactly two"}[self.min_ingredients, self.max_ingredients]
            raise MergeError(f"found {num_ingredients} models to merge: this method takes {expected}")
        resolved = {}
        for name, parameter in self.parameters.items():
            if parameter.required and name not in parameters:
                raise MergeError(f"parameter {name!r} is missing: {parameter.meaning}")
            resolved[name] = parameter.check(parameters.get(name, parameter.default), num_ingredients)
        for name in parameters:
            if name not in resolved:
                raise MergeError(f"unknown parameter {name!r}: this method takes {', '.join(resolved)}")
        return resolved


_T = Parameter("0 gives the first ingredient, 1 the second", lambda value, _: finite_t(value), required=True)

METHODS: dict[str, Method] = {
    "average": Method(
        average,
        summary="weighted average; uniform unless weights are given",
        paper="Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482",
        departures="none; the paper's running sum in the checkpoints' precision is replaced by a wider one",
        parameters={"weights": Parameter("one each, divided by their sum; uniform by default", normalised_weights)},
    ),
    "linear": Method(
        linear,
        summary="point on the straight line between two models",
        paper="Wortsman et al. 2021, WiSE-FT, https://arxiv.org/abs/2109.01903",
        departures="none; t outside [0, 1] extrapolates",
        parameters={"t": _T},
        min_ingredients=2,
        max_ingredients=2,
    ),
    "slerp": Method(
        slerp,
        summary="point on the great circle between two models, tensor by tensor",
        paper="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325334.325242",
        departures="vectors keep their length; the straight line is taken for |cos| > 0.9995, zeros and NaN",
        parameters={"t": _T},
        min_ingredients=2,
        max_ingredients=2,
        needs_gram=True,
    ),
}


def find_method(name: str) -> Method:
    """The row of METHODS. Raises MergeError for an unknown name."""
    if name not in METHODS:
        raise MergeError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]

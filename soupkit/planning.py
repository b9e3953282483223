"""What happens to each tensor name, decided and checked before any value is read; the same at all three levels.

Floating-point tensors are merged: in float32 for float16, bfloat16 and float8 models, in float64 for float32 and
float64 ones, then rounded once. The result's dtype is the one asked for, else the models' (promoted where they differ,
bfloat16 for float8). Integer and bool tensors are copied, and must be equal in all models, except BatchNorm's
``num_batches_tracked``, a counter that two training runs never share: the first ingredient's is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, Protocol

import torch

from soupkit.errors import MergeError
from soupkit.layers import layer_positions
from soupkit.methods import find_method
from soupkit.recipe import Recipe, check_names, resolve
from soupkit.sources import in_order, merge_dtype, wider_dtype
from soupkit.tables import dtype_name, name_list

SOUP_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
COPIED_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}

Parameters = Mapping[str, Any]


class Described(Protocol):
    """What planning needs to know of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the soup. ``working_dtype`` is None for a tensor that is copied from the first ingredient.

    ``variants`` are the method's parameters for this tensor, once for each soup that is made in this pass.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    working_dtype: torch.dtype | None
    variants: tuple[Parameters, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def row_length(self) -> int:
        """Elements of a slice along the first dimension; a tensor of at most one dimension is one row."""
        return prod(self.shape[1:]) if len(self.shape) > 1 else self.num_elements

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def must_be_equal(self) -> bool:
        return self.working_dtype is None and not self.name.endswith("num_batches_tracked")


@dataclass(frozen=True)
class Models:
    """The named tensors of every model of a merge, and what to call each model in messages."""

    ingredients: Sequence[Mapping[str, Described]]
    base: Mapping[str, Described] | None
    fishers: Sequence[Mapping[str, Described]]
    labels: Sequence[str]  # of the ingredients, the base and the Fisher estimates, in this order

    @property
    def with_base(self) -> list[Mapping[str, Described]]:
        return in_order(self.ingredients, self.base)


def plan_tensors(
    models: Models, dtype: torch.dtype | None, variants_of: Callable[[str], tuple[Parameters, ...]]
) -> list[TensorPlan]:
    """The soup's tensors, in the first ingredient's order. Raises MergeError where the models do not fit."""
    first, merged = models.ingredients[0], models.with_base
    for tensors, label in zip(merged[1:], models.labels[1:], strict=False):
        _require_same_names(first, tensors, models.labels[0], label)
        _require_same_shapes(first, tensors, models.labels[0], label)
    plans = [
        _plan_tensor(name, [tensors[name] for tensors in merged], models.labels, dtype, variants_of(name))
        for name in first
    ]
    for fisher, label in zip(models.fishers, models.labels[len(merged) :], strict=True):
        wanted = {plan.name: first[plan.name] for plan in plans if plan.working_dtype is not None}
        missing = [name for name in wanted if name not in fisher]
        if missing:
            raise MergeError(f"{label} has no Fisher information for {name_list(missing)}: estimate it for all")
        _require_same_shapes(wanted, fisher, models.labels[0], label)
    return plans


def parameters_by_name(recipes: Sequence[Recipe], names: Iterable[str]) -> Callable[[str], tuple[Parameters, ...]]:
    """The function from a tensor's name to its parameters in each recipe. Raises MergeError for bad combinations."""
    names = list(names)
    positions = layer_positions(names)
    method = find_method(recipes[0].method)
    check_names(recipes[0], names)

    def variants_of(name: str) -> tuple[Parameters, ...]:
        variants = tuple(resolve(recipe, method, name, positions[name]) for recipe in recipes)
        for parameters in variants:
            method.check(parameters)
        return variants

    return variants_of


def _require_same_names(first: Mapping[str, Described], other: Mapping[str, Described], a: str, b: str) -> None:
    missing = [name for name in first if name not in other]
    extra = [name for name in other if name not in first]
    if not missing and not extra:
        return
    facts = [f"{b} lacks {name_list(missing)}"] if missing else []
    facts += [f"{a} lacks {name_list(extra)}"] if extra else []
    raise MergeError(
        f"{a} and {b} hold different tensors: {'; '.join(facts)}. Merge checkpoints of the same architecture and head"
    )


def _require_same_shapes(first: Mapping[str, Described], other: Mapping[str, Described], a: str, b: str) -> None:
    for name, tensor in first.items():
        if list(tensor.shape) != list(other[name].shape):
            raise MergeError(
                f"tensor {name!r} has shape {list(tensor.shape)} in {a} and {list(other[name].shape)} in {b}: "
                "merge checkpoints of the same size and vocabulary"
            )


def _plan_tensor(
    name: str,
    tensors: Sequence[Described],
    labels: Sequence[str],
    dtype: torch.dtype | None,
    variants: tuple[Parameters, ...],
) -> TensorPlan:
    shape, first = tuple(tensors[0].shape), tensors[0].dtype
    for tensor, label in zip(tensors, labels, strict=False):
        if merge_dtype(tensor.dtype) not in SOUP_DTYPES and tensor.dtype not in COPIED_DTYPES:
            raise MergeError(
                f"tensor {name!r} in {label} is {dtype_name(tensor.dtype)}, which cannot be merged: "
                "convert the checkpoint to bfloat16 first"
            )
        if tensor.dtype != first and (tensor.dtype in COPIED_DTYPES or first in COPIED_DTYPES):
            raise MergeError(
                f"tensor {name!r} is {dtype_name(first)} in {labels[0]} and {dtype_name(tensor.dtype)} in {label}: "
                "convert one of them first"
            )
    if first in COPIED_DTYPES:
        return TensorPlan(name, shape, first, None, variants)
    promoted = reduce(torch.promote_types, (merge_dtype(tensor.dtype) for tensor in tensors))
    return TensorPlan(name, shape, dtype or promoted, wider_dtype(promoted), variants)

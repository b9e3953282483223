"""What happens to each tensor name, decided and checked before any value is read; the same at all three levels.

Floating-point tensors are merged: in float32 for float16 and bfloat16 ingredients, in float64 for float32 and float64
ones, then rounded once. The result's dtype is the one asked for, else the ingredients' (promoted where they differ).
Integer and bool tensors are copied, and must be equal in all ingredients, except BatchNorm's ``num_batches_tracked``,
a counter that two training runs never share: the first ingredient's is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from soupkit.errors import MergeError

# One step wider than the ingredients, so that the uniform average of two is exact before its one rounding.
WORKING_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
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
# A head that one checkpoint stores and another ties to its embeddings.
HEADS = ("lm_head.weight", "embed_out.weight")


class Described(Protocol):
    """What planning needs to know of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the soup. ``working_dtype`` is None for a tensor that is copied from the first ingredient."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    working_dtype: torch.dtype | None

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def must_be_equal(self) -> bool:
        return self.working_dtype is None and not self.name.endswith("num_batches_tracked")


def plan_tensors(
    ingredients: Sequence[Mapping[str, Described]], labels: Sequence[str], dtype: torch.dtype | None
) -> list[TensorPlan]:
    """The soup's tensors, in the first ingredient's order. Raises MergeError where the ingredients do not fit."""
    for tensors, label in zip(ingredients[1:], labels[1:], strict=True):
        _require_same_names(ingredients[0], tensors, labels[0], label)
        _require_same_shapes(ingredients[0], tensors, labels[0], label)
    return [_plan_tensor(name, [tensors[name] for tensors in ingredients], labels, dtype) for name in ingredients[0]]


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from itself or its name (``"bfloat16"``). Raises MergeError for anything else."""
    parsed = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if parsed is not None and parsed not in WORKING_DTYPE:
        raise MergeError(f"dtype {dtype} cannot hold a soup: choose float16, bfloat16, float32 or float64")
    return parsed


def name_list(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _require_same_names(first: Mapping[str, Described], other: Mapping[str, Described], a: str, b: str) -> None:
    missing = [name for name in first if name not in other]
    extra = [name for name in other if name not in first]
    if not missing and not extra:
        return
    odd_head = next((name for name in [*missing, *extra] if name.endswith(HEADS)), None)
    if odd_head is not None and len(missing) + len(extra) == 1:
        has, lacks = (a, b) if missing else (b, a)
        raise MergeError(
            f"{odd_head!r} is stored in {has} but not in {lacks}, where it is tied to the embeddings: "
            "load one of them and save it again with the other's tie_word_embeddings"
        )
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
    name: str, tensors: Sequence[Described], labels: Sequence[str], dtype: torch.dtype | None
) -> TensorPlan:
    shape, first = tuple(tensors[0].shape), tensors[0].dtype
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.dtype not in WORKING_DTYPE and tensor.dtype not in COPIED_DTYPES:
            raise MergeError(
                f"tensor {name!r} in {label} is {_dtype_name(tensor.dtype)}, which cannot be averaged: "
                "convert the checkpoint to bfloat16 first"
            )
        if tensor.dtype != first and (tensor.dtype in COPIED_DTYPES or first in COPIED_DTYPES):
            raise MergeError(
                f"tensor {name!r} is {_dtype_name(first)} in {labels[0]} and {_dtype_name(tensor.dtype)} in {label}: "
                "convert one of them first"
            )
    if first in COPIED_DTYPES:
        return TensorPlan(name, shape, first, None)
    promoted = first
    for tensor in tensors[1:]:
        promoted = torch.promote_types(promoted, tensor.dtype)
    return TensorPlan(name, shape, dtype or promoted, WORKING_DTYPE[promoted])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

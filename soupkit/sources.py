"""What a tensor of an ingredient is to the merge: a dtype, a shape, and a reader that gives any range of its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Of = TypeVar("Of")
# read(start, stop) gives the elements [start, stop) of a flattened tensor, valid until the next read.
Reader = Callable[[int, int], Tensor]

FLOAT8_DTYPES = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}


class TensorSource(Protocol):
    """A tensor that is read range by range. Several threads may open and read one source at the same time.

    ``dtype`` is what the tensor counts as when the soup's dtype and the working precision are chosen. Blocks have this
    dtype or a wider one: a LoRA update, for one, is folded in without being rounded to the base's dtype. ``path`` is
    the weight file that holds it, or most of it.
    """

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def path(self) -> Path: ...
    def open(self) -> AbstractContextManager[Reader]: ...


def in_order(ingredients: Sequence[Of], base: Of | None, fishers: Sequence[Of] = ()) -> list[Of]:
    """Something of every model, in the one order in which models stand beside their labels."""
    return [*ingredients, *([] if base is None else [base]), *fishers]


def load_tensor(source: TensorSource) -> Tensor:
    """The whole tensor, in memory of its own."""
    with source.open() as read:
        return read(0, prod(source.shape)).clone().view(source.shape)


def merge_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a soup of such tensors has unless another is asked for: bfloat16 for float8, else the same."""
    return torch.bfloat16 if dtype in FLOAT8_DTYPES else dtype


def wider_dtype(dtype: torch.dtype) -> torch.dtype:
    """The working dtype, one step wider than the stored one: float64 for float32 and float64, else float32."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32

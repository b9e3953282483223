"""The loop that all levels share: one tensor, block by block, from readers of its ingredients to blocks of the soup."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.methods import Method, gram_matrix
from soupkit.planning import TensorPlan, name_list

# Elements per block: a few blocks in float64 fit the cache of one core, and Python's share of the time is small.
BLOCK = 2**18

# read(start, stop) gives the elements [start, stop) of a flattened tensor, valid until the next read.
Reader = Callable[[int, int], Tensor]


@dataclass
class NonFinite:
    """Counts of NaN and infinite values met on the way: in the soup, and in each ingredient at those tensors."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def count(self, name: str, ingredients: Sequence[Tensor], soup: Tensor) -> None:
        """Add one block's counts; any non-finite ingredient value gives a non-finite soup value."""
        # A sum costs one pass and finds them all; where it merely overflows, the exact counts below are 0.
        if bool(soup.sum(dtype=torch.promote_types(soup.dtype, torch.float32)).isfinite()):
            return
        num_bad = _num_non_finite(soup)
        if num_bad:
            counts = self.tensors.setdefault(name, {"soup": 0, "ingredients": [0] * len(ingredients)})
            counts["soup"] += num_bad
            for index, block in enumerate(ingredients):
                counts["ingredients"][index] += _num_non_finite(block)

    def warn(self) -> None:
        """One warning that names the tensors, if there is anything to tell."""
        if self.tensors:
            total = sum(counts["soup"] for counts in self.tensors.values())
            inherited = any(sum(counts["ingredients"]) for counts in self.tensors.values())
            cause = "inherited from the ingredients" if inherited else "too large for the soup's dtype"
            warnings.warn(
                f"the soup holds {total} NaN or infinite values, {cause}, in {name_list(list(self.tensors))}",
                stacklevel=2,
            )


def merged_blocks(
    plan: TensorPlan,
    method: Method,
    parameters: Mapping[str, Any],
    readers: Sequence[Reader],
    non_finite: NonFinite,
) -> Iterator[tuple[int, Tensor]]:
    """The soup's tensor as (start, block) pairs in order, in the soup's dtype: the one rounding happens here."""
    if plan.working_dtype is None:
        for start, stop in _spans(plan):
            yield start, readers[0](start, stop)
        return
    parameters = dict(parameters)
    if method.needs_gram:
        gram = torch.zeros(len(readers), len(readers), dtype=torch.float64)
        for start, stop in _spans(plan):
            gram += gram_matrix(_read(readers, start, stop, plan.working_dtype))
        parameters["gram"] = gram
    for start, stop in _spans(plan):
        blocks = _read(readers, start, stop, plan.working_dtype)
        soup = _round_once(method.function(blocks, **parameters), plan.dtype)
        non_finite.count(plan.name, blocks, soup)
        yield start, soup


def require_equal(plan: TensorPlan, readers: Sequence[Reader], labels: Sequence[str]) -> None:
    """Raise MergeError when a tensor that can only be copied differs between the ingredients."""
    for start, stop in _spans(plan):
        first = readers[0](start, stop)
        for reader, label in zip(readers[1:], labels[1:], strict=True):
            if not torch.equal(first, reader(start, stop).to(first.device)):
                raise MergeError(
                    f"integer tensor {plan.name!r} differs between {labels[0]} and {label}, and integers are not "
                    "averaged: make them equal or remove it from all ingredients"
                )


@contextmanager
def steady_torch() -> Iterator[None]:
    """Settings under which blocks are computed fast and alike everywhere; the thread count is restored afterwards.

    One thread, since a block is too small to share out and since the order of torch's sums depends on the number of
    threads. No gradients. And one large allocation, freed at once: it tells glibc's allocator to keep what is freed
    instead of handing it back to the system, where every block would pay for its page faults again (measured: up to 8
    times slower).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(num_threads)


def _spans(plan: TensorPlan) -> Iterator[tuple[int, int]]:
    for start in range(0, plan.num_elements, BLOCK):
        yield start, min(start + BLOCK, plan.num_elements)


def _read(readers: Sequence[Reader], start: int, stop: int, dtype: torch.dtype) -> list[Tensor]:
    return [reader(start, stop).to(dtype) for reader in readers]


def _round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of the dtype, ties to even."""
    if x.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    # torch goes from float64 to 16 bits through float32, and the nearest float32 may be a tie that x is not. Rounding
    # to odd avoids it: the last bit of float32, far below those that stay, is set wherever digits of x are cut off.
    near = x.float()
    wide = near.double()
    truncated = near.view(torch.int32) - (wide.abs() > x.abs()).int()
    return (truncated | (wide != x).int()).view(torch.float32).to(dtype)


def _num_non_finite(block: Tensor) -> int:
    return int(block.isfinite().logical_not().sum())

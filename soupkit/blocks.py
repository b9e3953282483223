"""The loop that all levels share: one tensor, block by block, from readers of its models to blocks of the soup."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.methods import Blocks, Fallback, Method
from soupkit.order_statistics import order_statistics
from soupkit.planning import TensorPlan
from soupkit.sources import FLOAT8_DTYPES, Reader, in_order
from soupkit.tables import dtype_name, name_list

# Elements per block: a few blocks in the working precision fit the cache of one core, and Python's share is small.
BLOCK = 2**18
# A GPU has no such cache, and a block costs about a millisecond of launches there, whatever its size (1.1 billion
# elements of two models in blocks of 2¹⁸ took an H200 4.4 s).
GPU_BLOCK = 2**22
# Rounding to these can overflow where the wider sum was finite, so the check looks at the rounded numbers.
NARROW = {torch.float16, torch.float32}


@dataclass(frozen=True)
class Readers:
    """Readers of one tensor in every model, with the models' names for messages."""

    ingredients: Sequence[Reader]
    base: Reader | None = None
    fishers: Sequence[Reader] = ()
    labels: Sequence[str] = ()  # of all

    @property
    def all(self) -> list[Reader]:
        return in_order(self.ingredients, self.base, self.fishers)


@dataclass
class Findings:
    """What turns up while tensors are merged, for soup.json and messages. Shared by all threads.

    NaN and infinite values are refused or, where ``allowed``, counted by tensor; of a method with a fallback it is
    noted for each tensor whether that was taken.
    """

    allowed: bool = False
    non_finite: dict[str, dict[str, Any]] = field(default_factory=dict)
    fallbacks: dict[str, bool] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def examine(self, plan: TensorPlan, labels: Sequence[str], blocks: Sequence[Tensor], soup: Tensor | None) -> None:
        """Raise MergeError for, or count, the non-finite values of the models' blocks and of the soup's block."""
        counts = [_num_non_finite(block) for block in blocks]
        in_soup = 0 if soup is None else _num_non_finite(soup)
        if not (any(counts) or in_soup):
            return  # the sum that raised the suspicion merely overflowed
        if not self.allowed:
            raise MergeError(_complaint(plan, labels, counts))
        with self.lock:
            self._count({plan.name: {"soup": in_soup, "models": dict(zip(labels, counts, strict=True))}})

    def note_fallback(self, name: str, taken: bool) -> None:
        """Note whether a tensor was merged by the method's fallback."""
        with self.lock:
            self.fallbacks[name] = taken

    def found(self) -> dict[str, Any]:
        """All of it, to be sent to another process and added there."""
        return {"non_finite": self.non_finite, "fallbacks": self.fallbacks}

    def add(self, found: Mapping[str, Any]) -> None:
        """Add what was found elsewhere."""
        self._count(found["non_finite"])
        self.fallbacks |= found["fallbacks"]

    def _count(self, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        for name, counts in tensors.items():
            seen = self.non_finite.setdefault(name, {"soup": 0, "models": dict.fromkeys(counts["models"], 0)})
            seen["soup"] += counts["soup"]
            for label, count in counts["models"].items():
                seen["models"][label] += count

    def record(self, fallback: Fallback | None) -> dict[str, Any]:
        """Counts of values that are not finite by tensor name, in alphabetical order, and of fallbacks: for soup.json.

        {"non_finite": {name: {"soup": n, "models": {label: n}}}, "fallback": {"rule": text, "tensors": how many of
        these were merged by it, "of": how many}}, the latter for methods that have one.
        """
        record: dict[str, Any] = {"non_finite": dict(sorted(self.non_finite.items()))}
        if fallback is not None:
            taken = list(self.fallbacks.values())
            record["fallback"] = {"rule": fallback.rule, "tensors": sum(taken), "of": len(taken)}
        return record

    def warn(self) -> None:
        """One warning that names the tensors with values that are not finite, if there are any."""
        if self.non_finite:
            total = sum(seen["soup"] for seen in self.non_finite.values())
            warnings.warn(
                f"the soup holds {total} NaN or infinite values, in {name_list(sorted(self.non_finite))}", stacklevel=2
            )


def merged_blocks(
    plan: TensorPlan,
    method: Method,
    readers: Readers,
    findings: Findings,
    *,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, list[Tensor]]]:
    """The soup's elements from ``start`` to ``stop`` as (position, one block per variant), in the soup's dtype.

    The one rounding happens here. ``start`` must be a multiple of the block, and 0 for a method with a survey.
    """
    stop = plan.num_elements if stop is None else stop
    if plan.working_dtype is None:
        for first in range(start, stop, BLOCK):
            block = readers.ingredients[0](first, min(first + BLOCK, stop))
            yield first, [block] * len(plan.variants)
        return
    whole = _WholeTensor(plan, method, readers, findings, torch.device(device))
    variants = whole.surveyed_variants()
    for span in whole.spans(start, stop):
        blocks = whole.read(*span)
        suspected = whole.suspect(span, blocks)
        copies = [blocks.copy() for _ in variants[1:]]
        soups = [method.function(b, **keywords) for b, keywords in zip([*copies, blocks], variants, strict=True)]
        yield span[0], [whole.finish(span, soup, suspected, first=number == 0) for number, soup in enumerate(soups)]


def require_equal(plan: TensorPlan, readers: Readers) -> None:
    """Raise MergeError when a tensor that can only be copied differs between the models."""
    models = readers.all
    for start in range(0, plan.num_elements, BLOCK):
        stop = min(start + BLOCK, plan.num_elements)
        first = models[0](start, stop)
        for reader, label in zip(models[1:], readers.labels[1 : len(models)], strict=True):
            if not torch.equal(first, reader(start, stop).to(first.device)):
                raise MergeError(
                    f"integer tensor {plan.name!r} differs between {readers.labels[0]} and {label}, and integers are "
                    "not averaged: make them equal or remove it from all ingredients"
                )


@contextmanager
def steady_torch() -> Iterator[None]:
    """Settings under which blocks are computed fast and alike everywhere, in the calling thread.

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


class _WholeTensor:
    """One tensor in every model: what surveys ask of it, and the blocks that the method gets."""

    def __init__(
        self, plan: TensorPlan, method: Method, readers: Readers, findings: Findings, device: torch.device
    ) -> None:
        self.plan, self.method, self.readers, self.findings = plan, method, readers, findings
        self.num_elements, self.shape = plan.num_elements, plan.shape
        self.num_ingredients, self.has_base = len(readers.ingredients), readers.base is not None
        self.row = plan.row_length if method.whole_rows(plan.variants[0]) else None
        self.load = _Loader(device, plan.working_dtype)
        self.block = BLOCK if device.type == "cpu" else GPU_BLOCK
        self.surveyed = False  # whether a survey has seen, and so checked, every block

    def surveyed_variants(self) -> list[dict[str, Any]]:
        """The method's keywords for each variant. Variants differ in ``t`` alone, which no survey depends on."""
        keywords = [self.method.keywords(parameters) for parameters in self.plan.variants]
        if self.method.survey is None or self.num_elements == 0:
            return keywords
        facts = self.method.survey(self, **keywords[0])
        if self.method.fallback is not None:
            self.findings.note_fallback(self.plan.name, self.method.fallback.taken(**facts))
        return [variant | facts for variant in keywords]

    def spans(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Where the blocks begin and end: every ``block`` elements, or after whole rows for methods that need them."""
        stop = self.num_elements if stop is None else stop
        step = self.block if self.row is None else max(1, self.block // max(self.row, 1)) * self.row
        for first in range(start, stop, step or 1):
            yield first, min(first + step, stop)

    def read(self, start: int, stop: int, stride: int = 1) -> Blocks:
        """The models' blocks in the working precision."""
        blocks = [self._shaped(self.load(reader(start, stop), stride), stride) for reader in self.readers.all]
        n = self.num_ingredients
        base = blocks[n] if self.has_base else None
        return Blocks(blocks[:n], base, blocks[n + self.has_base :], self.shape, _Random(self.plan, start, stop))

    def total(self, function: Callable[[Blocks], Tensor]) -> Tensor:
        """Σ function(blocks) over all blocks, in order, in float64 on the CPU."""
        total: Tensor | None = None
        for span in self.spans():
            part = function(self.read(*span)).double().cpu()
            if not math.isfinite(part.sum().item()):  # or it overflowed
                part = function(self._clean(span, self.read(*span))).double().cpu()
            total = part if total is None else total + part
        self.surveyed = True
        assert total is not None  # a tensor without elements is not surveyed
        return total

    def order_statistics(
        self, function: Callable[[Blocks], Sequence[Tensor]], ranks: Sequence[Sequence[int]], *, rowwise: bool = False
    ) -> list[list[float]]:
        """The exact values at 0-based ``ranks`` of each quantity in ascending order."""

        def scan(stride: int) -> Iterator[list[np.ndarray]]:
            unclean = stride == 1 and (self.findings.allowed or not self.surveyed)
            for span in self.spans():
                blocks = self.read(*span, 1 if rowwise else stride)
                quantities = function(self._clean(span, blocks) if unclean else blocks)
                thinned = [x.flatten()[::stride].clone() if rowwise and stride > 1 else x.flatten() for x in quantities]
                yield [x.cpu().numpy() for x in thinned]
            self.surveyed |= unclean

        return order_statistics(scan, self.num_elements, ranks)

    def suspect(self, span: tuple[int, int], blocks: Blocks) -> bool:
        """Whether models may hold values that are not finite and are to be counted; refused if they might not show."""
        allowed = self.findings.allowed
        shown = self.method.shows_non_finite or self.surveyed
        if (shown and not allowed) or _sums_are_finite(self._models(blocks)):
            return False
        if not allowed:
            self._examine(span, None)
        return allowed

    def finish(self, span: tuple[int, int], soup: Tensor, suspected: bool, *, first: bool) -> Tensor:
        """The soup's block rounded to its dtype, after a look for values that are not finite; the first's count."""
        rounded = _round_once(soup.flatten(), self.plan.dtype)
        # A float32 sum that is finite is finite in bfloat16 too, but for the last half unit of its range.
        narrowed = self.plan.dtype in NARROW or soup.dtype == torch.float64
        watched = rounded.float() if narrowed and self.plan.dtype != torch.float64 else soup
        counts = first or not self.findings.allowed
        if counts and (suspected or not _sums_are_finite([watched])):
            self._examine(span, rounded)
        return rounded.cpu()

    def _clean(self, span: tuple[int, int], blocks: Blocks) -> Blocks:
        """For a survey: finite values only. Where others are allowed they count as 0, so that they stay in place."""
        models = self._models(blocks)
        if _sums_are_finite(models):
            return blocks
        if not self.findings.allowed:
            self._examine(span, None)
        for block in models:
            block.nan_to_num_(0, 0, 0)
        return blocks

    def _examine(self, span: tuple[int, int], soup: Tensor | None) -> None:
        """Count what is not finite, in the models as they are read again: methods overwrite their blocks."""
        models = self._models(self.read(*span))
        self.findings.examine(self.plan, self.readers.labels, models, soup)

    def _models(self, blocks: Blocks) -> list[Tensor]:
        return in_order(blocks.ingredients, blocks.base, blocks.fishers)

    def _shaped(self, block: Tensor, stride: int) -> Tensor:
        return block if self.row is None or stride > 1 else block.view(-1, self.row)


class _Loader:
    """Brings blocks to the device and the working precision; to a GPU through pinned memory: threads overlap."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, block: Tensor, stride: int) -> Tensor:
        block = block[::stride] if stride > 1 else block
        if self.device.type == "cuda" and block.device.type == "cpu":
            # The staging memory is handed back to torch's pool, which waits for the copy before it gives it out again.
            staged = torch.empty(block.shape, dtype=block.dtype, pin_memory=True).copy_(block)
            return staged.to(self.device, non_blocking=True).to(self.dtype, copy=True)
        return block.to(self.device, self.dtype, copy=True)


@dataclass(frozen=True)
class _Random:
    """Uniform int16 values for one block: a function of the seed, the tensor's name, the ingredient and the position.

    They do not depend on other tensors, blocks, threads, files or Python's hash seed. The bits are those of NumPy's
    PCG64DXSM, whose stream NumPy promises to keep and which can begin anywhere in it.
    """

    plan: TensorPlan
    start: int
    stop: int

    def __call__(self, ingredient: int) -> Tensor:
        seed = self.plan.variants[0]["seed"]
        key = hashlib.blake2b(f"{seed}/{ingredient}/{self.plan.name}".encode(), digest_size=16).digest()
        first, last = self.start // 4, -(-self.stop // 4)  # four values in each number of 64 bits
        numbers = np.random.PCG64DXSM(int.from_bytes(key, "little")).advance(first).random_raw(last - first)
        values = torch.from_numpy(numbers.astype("<u8", copy=False).view(np.int16))
        return values[self.start - 4 * first : self.stop - 4 * first]


def _round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of the dtype, ties to even."""
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    # torch goes from float64 to 16 bits through float32, and the nearest float32 may be a tie that x is not. Rounding
    # to odd avoids it: the last bit of float32, far below those that stay, is set wherever digits of x are cut off.
    near = x.float()
    wide = near.double()
    truncated = near.view(torch.int32) - (wide.abs() > x.abs()).int()
    return (truncated | (wide != x).int()).view(torch.float32).to(dtype)


def _sums_are_finite(blocks: Sequence[Tensor]) -> bool:
    """False where any value is NaN or infinite, and where a sum merely overflows: one pass, and no false comfort."""
    return all(math.isfinite(block.sum().item()) for block in blocks)


def _num_non_finite(block: Tensor) -> int:
    return int((~(block.float() if block.dtype in FLOAT8_DTYPES else block).isfinite()).sum())


def _complaint(plan: TensorPlan, labels: Sequence[str], counts: Sequence[int]) -> str:
    for label, count in zip(labels, counts, strict=True):
        if count:
            return (
                f"tensor {plan.name!r} of {label} holds NaN or infinite values (at least {count}): repair or leave out "
                "that model, or merge all the same with allow_nonfinite=True (--allow-nonfinite)"
            )
    return (
        f"tensor {plan.name!r} of the soup is too large for {dtype_name(plan.dtype)}: choose a wider "
        "dtype, or write infinite values with allow_nonfinite=True (--allow-nonfinite)"
    )

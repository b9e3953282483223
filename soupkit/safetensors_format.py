"""Safetensors files, read without loading them: where each tensor's bytes lie.

The format: 8 bytes with the header's length (little-endian), a JSON header that gives each tensor's dtype, shape and
byte range, then the bytes, all of which belong to exactly one tensor (https://huggingface.co/docs/safetensors). Reading
it here rather than through the library is what allows reading any range of a tensor into a buffer of our own, with no
memory map of the whole file. Headers are held to every rule of the format, since a file may come from anyone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.files import open_regular
from soupkit.sources import Reader

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # torch's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of the flattened tensor; each read overwrites the block that the one before it gave."""
        buffer = torch.empty(0, dtype=self.dtype)
        with open_regular(self.path) as descriptor:

            def read(start: int, stop: int) -> Tensor:
                nonlocal buffer
                if buffer.numel() < stop - start:
                    buffer = torch.empty(stop - start, dtype=self.dtype)
                block = buffer[: stop - start]
                view = bytes_of(block)
                position = self.offset + start * self.dtype.itemsize
                while view:
                    num_read = os.preadv(descriptor, [view], position)
                    if not num_read:
                        raise MergeError(f"{self.path} ended early: was it changed during the merge?")
                    view, position = view[num_read:], position + num_read
                return block

            yield read


def bytes_of(block: Tensor) -> memoryview:
    """The bytes of a flat tensor, as they are stored."""
    return block.view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises MergeError for a file that breaks a rule of the format."""
    try:
        with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
        return _stored_tensors(header, path, 8 + length, size)
    except FileNotFoundError:
        raise MergeError(f"{path} is missing, though its index names it: download or save it again") from None
    except MergeError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise MergeError(f"{path} is damaged ({reason}): download or save the checkpoint again") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{_shortened(name)} is in the header twice")
        mapping[name] = value
    return mapping


def _stored_tensors(header: Any, path: Path, data_start: int, file_size: int) -> dict[str, StoredTensor]:
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    ranges = []
    for name, entry in header.items():
        name.encode()  # fails for half a surrogate pair, which could not be written again
        begin, end, tensors[name] = _stored_tensor(name, entry, path, data_start)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise ValueError(f"{name!r} at bytes {begin} to {end} {problem}")
        position = end
    if data_start + position != file_size:
        raise ValueError(f"its tensors end at byte {data_start + position}, the file at {file_size}")
    return tensors


def _stored_tensor(name: str, entry: Any, path: Path, data_start: int) -> tuple[int, int, StoredTensor]:
    """Begin and end of its bytes, and the tensor."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name!r} lacks a dtype, a shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or prod(filter(None, shape)) >= 2**63:
        raise ValueError(f"{name!r} has the shape {_shortened(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has the data_offsets {_shortened(offsets)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MergeError(
            f"{path}: tensor {name!r} has dtype {_shortened(dtype)}, which is not read here: "
            "convert the checkpoint to bfloat16 first"
        )
    begin, end = offsets
    tensor = StoredTensor(DTYPES[dtype], tuple(shape), path, data_start + begin)
    if end - begin != tensor.num_bytes:
        raise ValueError(f"bytes {begin} to {end} do not hold a tensor {_shortened(shape)} of {dtype}")
    return begin, end, tensor


def _are_counts(values: Any) -> bool:
    """Whether it is a list of whole numbers, and no bools, that a file can have."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."

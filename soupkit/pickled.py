"""Pickled weights (pytorch_model.bin), loaded by torch's weights-only unpickler, which builds tensors and runs nothing.

Even so they are read only when asked for. Files in torch's zip format are mapped, so that only the pages in use are in
memory; older ones are loaded whole.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.files import open_regular
from soupkit.sources import Reader

ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A tensor of an unpickled file."""

    tensor: Tensor
    path: Path

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of the flattened tensor; its blocks are copies, so that nobody writes into the mapped file."""
        flat = self.tensor.reshape(-1)  # a copy only where it is not contiguous, as a transposed one
        yield lambda start, stop: flat[start:stop].clone()

    def shares_memory_with(self, other: PickledTensor) -> bool:
        """Whether both are the same view of the same storage."""
        return all(
            fact(self.tensor) == fact(other.tensor)
            for fact in (Tensor.data_ptr, Tensor.size, Tensor.stride, lambda tensor: tensor.dtype)
        )


def read_pickle(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a pickled state dict by name. Raises MergeError for anything else; never runs its code."""
    try:
        with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have torch warn about its own classes
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise MergeError(f"{path} is missing, though its index names it: download or save it again") from None
    except MergeError:
        raise
    except Exception as error:  # a pickle can make its loader raise anything
        raise MergeError(
            f"{path} holds more than weights, or is damaged ({_reason(error)}), and nothing of it was run: "
            "get the checkpoint as safetensors"
        ) from None
    if not isinstance(content, Mapping):
        raise MergeError(f"{path} holds a {type(content).__name__}, no state dict: save model.state_dict() instead")
    return {name: _pickled_tensor(name, value, path) for name, value in content.items()}


def _pickled_tensor(name: Any, value: Any, path: Path) -> PickledTensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise MergeError(f"{path}: entry {name!r} is a {type(value).__name__}, no tensor: save a plain state dict")
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise MergeError(f"{path}: {name!r} is a sparse, quantized or empty-device tensor: save it as a plain one")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise MergeError(f"{path}: {name!r} has {tensor.numel()} elements, more than are stored: save it contiguous")
    return PickledTensor(tensor, path)


def _reason(error: Exception) -> str:
    """What the loader met, in one line: the function that the pickle wanted to call, if that was it."""
    text = " ".join(str(error).split())
    wanted = re.search(r"GLOBAL (\S+)", text)
    return f"it calls {wanted[1]}" if wanted else f"{type(error).__name__}: {text[:120]}"

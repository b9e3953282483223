"""How a merge is run: the options that every function of the front door takes, and their checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from soupkit.engine import parse_num_threads
from soupkit.errors import MergeError
from soupkit.hashing import DEFAULT, check_algorithm
from soupkit.planning import SOUP_DTYPES
from soupkit.tables import dtype_name


class Options(TypedDict, total=False):
    """The options by name; they are explained in :func:`soupkit.merge`."""

    dtype: torch.dtype | str | None
    overwrite: bool
    max_shard_size: int | str | None
    allow_nonfinite: bool
    allow_pickle: bool
    hash: str
    sync: bool
    device: torch.device | str
    num_threads: int | None
    progress: bool


DEFAULTS: Options = {
    "dtype": None,
    "overwrite": False,
    "max_shard_size": None,
    "allow_nonfinite": False,
    "allow_pickle": False,
    "hash": DEFAULT,
    "sync": False,
    "device": "cpu",
    "num_threads": None,
    "progress": True,
}
SWITCHES = ("overwrite", "allow_nonfinite", "allow_pickle", "sync", "progress")
OF_WRITING = ("overwrite", "max_shard_size", "hash", "sync")  # what the folder is like that is written
OF_FOLDERS = (*OF_WRITING, "allow_pickle", "device")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # decimal, as transformers has them


def check_options(options: Mapping[str, Any]) -> None:
    """Raise MergeError for an option that does not exist, or for a value that it does not take."""
    for name, value in options.items():
        if name not in DEFAULTS:
            raise MergeError(f"unknown option {name!r}: the options are {', '.join(DEFAULTS)}")
        if name in SWITCHES and not isinstance(value, bool):
            raise MergeError(f"{name} is {value!r}: it must be True or False")
    parse_dtype(options.get("dtype"))
    parse_size(options.get("max_shard_size"))
    parse_device(options.get("device", "cpu"))
    check_algorithm(options.get("hash", DEFAULT))
    parse_num_threads(options.get("num_threads"))


def effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given and not what they would be anyway."""
    return {name: value for name, value in options.items() if str(value) != str(DEFAULTS[name])}  # type: ignore[literal-required]


def refuse_without_effect(options: Mapping[str, Any], kind: str, writes: bool) -> None:
    """Raise MergeError for options that models of this kind, or a merge without ``out``, would leave unused."""
    for name, value in effective(options).items():
        if kind != "folder" and name in OF_FOLDERS:
            raise MergeError(f"{name}={str(value)!r} is for folders, and each model is a {kind}: leave it out")
        if not writes and name in OF_WRITING:
            raise MergeError(f"{name}={str(value)!r} is for a folder that is written: give out, or leave it out")


def without_writing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the same merge in memory."""
    return {name: value for name, value in options.items() if name not in OF_WRITING}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from itself or its name (``"bfloat16"``). Raises MergeError for anything else."""
    parsed = getattr(torch, dtype_name(dtype), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(parsed, torch.dtype) and parsed in SOUP_DTYPES):
        raise MergeError(f"dtype {dtype} cannot hold a soup: choose float16, bfloat16, float32 or float64")
    return parsed


def parse_size(size: int | str | None) -> int | None:
    """Bytes from a number or from text such as ``"5GB"``. Raises MergeError for anything else."""
    if size is None:
        return None
    found = re.fullmatch(r"(-?\d+)\s*([KMG]?B)?", str(size).upper())
    if not found:
        raise MergeError(f"max_shard_size {size!r} is not a size: write a whole number of bytes, or text such as '5GB'")
    num_bytes = int(found[1]) * UNITS[found[2] or "B"]
    if num_bytes <= 0:
        raise MergeError(f"max_shard_size is {size}: it must be positive")
    return num_bytes


def parse_device(device: torch.device | str) -> torch.device:
    """The CPU, or a CUDA device that there is. Raises MergeError for any other."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise MergeError(f"device {device!r} is unknown: choose cpu, cuda or cuda:N") from None
    if parsed.type not in ("cpu", "cuda"):
        raise MergeError(f"device {device!r} is not supported: choose cpu, cuda or cuda:N")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise MergeError(f"device {str(device)!r}: torch finds {torch.cuda.device_count()} CUDA devices: use cpu")
    return parsed

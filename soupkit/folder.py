"""Soups of checkpoint folders: plan and check everything, then stream one tensor at a time, then publish.

Memory: one block of every ingredient and of the soup, whatever the size of the models (and the soup itself when it is
asked for in memory).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from soupkit.blocks import NonFinite, Reader, merged_blocks, require_equal, steady_torch
from soupkit.checkpoint import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    open_checkpoint,
    require_same_config,
    require_same_tokenizer,
)
from soupkit.errors import MergeError
from soupkit.methods import METHODS
from soupkit.planning import TensorPlan, plan_tensors
from soupkit.provenance import describe, file_sha256
from soupkit.publish import check_output, published_folder

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What from_pretrained needs beside the weights: configs, tokenizer, chat template, remote code.
COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py"}
NOT_COPIED = {"config.json", "soup.json", "trainer_state.json"}


@dataclass(frozen=True)
class FolderPlan:
    """A merge of folders that passed every check: what will be read, computed and written."""

    method: str
    parameters: Mapping[str, Any]
    checkpoints: Sequence[Checkpoint]
    tensors: Sequence[TensorPlan]

    @property
    def labels(self) -> list[str]:
        return [checkpoint.label for checkpoint in self.checkpoints]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_folders(
    folders: Sequence[str | Path], method: str, parameters: Mapping[str, Any], dtype: torch.dtype | None
) -> FolderPlan:
    """Check that folders can be merged, from their headers, configs and tokenizers alone. Raises MergeError."""
    checkpoints = [open_checkpoint(folder) for folder in folders]
    for other in checkpoints[1:]:
        require_same_config(checkpoints[0], other)
        require_same_tokenizer(checkpoints[0], other)
    labels = [checkpoint.label for checkpoint in checkpoints]
    tensors = plan_tensors([checkpoint.tensors for checkpoint in checkpoints], labels, dtype)
    plan = FolderPlan(method, parameters, checkpoints, tensors)
    for tensor in tensors:
        if tensor.must_be_equal:
            with _readers(plan, tensor.name) as readers:
                require_equal(tensor, readers, labels)
    return plan


def merge_into_memory(plan: FolderPlan, progress: bool) -> dict[str, Tensor]:
    """The soup as a state dict on the CPU; only the result is held."""
    non_finite = NonFinite()
    soup = {}
    with steady_torch(), _progress_bar(plan, progress) as bar:
        for tensor in plan.tensors:
            soup[tensor.name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            flat = soup[tensor.name].view(-1)
            for start, block in _merged_blocks(plan, tensor, non_finite, bar):
                flat[start : start + block.numel()] = block
    non_finite.warn()
    return soup


def merge_into_folder(
    plan: FolderPlan, out: Path, *, overwrite: bool, max_shard_size: int | None, progress: bool
) -> Path:
    """The soup as a checkpoint folder at ``out``, complete or absent. Raises FileExistsError, MergeError or OSError."""
    out = Path(os.path.abspath(out))
    _check_target(plan, out, overwrite)
    shards = _shards(plan, max_shard_size)
    non_finite = NonFinite()
    with published_folder(out, overwrite) as partial, _hashing(plan) as sha256:
        with steady_torch(), _progress_bar(plan, progress) as bar:
            for name, tensors in shards.items():
                _write_shard(partial / name, plan, tensors, non_finite, bar)
        if len(shards) > 1:
            _write_index(partial, shards)
        _copy_companions(plan, partial)
        record = describe(plan.method, plan.parameters, plan.checkpoints, sha256)
        _write_json(partial / "soup.json", record | {"dtype": _dtype_name(plan), "non_finite": non_finite.tensors})
    non_finite.warn()
    return out


def parse_size(size: int | str | None) -> int | None:
    """Bytes from a number or from text such as ``"5GB"`` (decimal units, as transformers has them)."""
    if size is None or isinstance(size, int):
        num_bytes = size
    else:
        units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
        number, unit = size[:-2], size[-2:].upper()
        if unit not in units or not number.strip().isdecimal():
            raise MergeError(f"max_shard_size {size!r} is not a size: write bytes as a number, or text such as '5GB'")
        num_bytes = int(number) * units[unit]
    if num_bytes is not None and num_bytes <= 0:
        raise MergeError(f"max_shard_size is {size}: it must be positive")
    return num_bytes


@contextmanager
def _readers(plan: FolderPlan, name: str) -> Iterator[list[Reader]]:
    with ExitStack() as stack:
        yield [stack.enter_context(checkpoint.tensors[name].open()) for checkpoint in plan.checkpoints]


def _merged_blocks(
    plan: FolderPlan, tensor: TensorPlan, non_finite: NonFinite, bar: tqdm
) -> Iterator[tuple[int, Tensor]]:
    with _readers(plan, tensor.name) as readers:
        for start, block in merged_blocks(tensor, METHODS[plan.method], plan.parameters, readers, non_finite):
            yield start, block
            bar.update(block.nbytes)


def _progress_bar(plan: FolderPlan, progress: bool) -> tqdm:
    return tqdm(
        total=plan.num_bytes, desc=plan.method, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True
    )


def _check_target(plan: FolderPlan, out: Path, overwrite: bool) -> None:
    for checkpoint in plan.checkpoints:
        if out.exists() and out.samefile(checkpoint.folder):
            raise FileExistsError(f"{out} is one of the ingredients: choose another output folder")
    check_output(out, overwrite)
    parent = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.num_bytes:
        raise MergeError(
            f"{parent} has {free / 1e9:.1f} GB free, and the soup takes {plan.num_bytes / 1e9:.1f} GB: "
            "free some space or choose another output folder"
        )


def _shards(plan: FolderPlan, max_shard_size: int | None) -> dict[str, list[TensorPlan]]:
    """File name to its tensors: cut like the first ingredient, or greedily up to ``max_shard_size`` bytes."""
    groups: list[list[TensorPlan]] = []
    if max_shard_size is None:
        stored = plan.checkpoints[0].tensors
        for path in plan.checkpoints[0].files:
            groups.append([tensor for tensor in plan.tensors if stored[tensor.name].path == path])
        groups = [group for group in groups if group]
    else:
        room = 0
        for tensor in plan.tensors:
            if not groups or tensor.num_bytes > room:
                groups.append([])
                room = max_shard_size
            groups[-1].append(tensor)
            room -= tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}


def _write_shard(path: Path, plan: FolderPlan, tensors: list[TensorPlan], non_finite: NonFinite, bar: tqdm) -> None:
    # Wide elements first, so that every tensor is aligned to its element size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            for _, block in _merged_blocks(plan, tensor, non_finite, bar):
                file.write(block.view(torch.uint8).numpy().data)


def _write_index(folder: Path, shards: Mapping[str, Sequence[TensorPlan]]) -> None:
    placed = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})


def _copy_companions(plan: FolderPlan, folder: Path) -> None:
    """Config, tokenizer and the like from the first ingredient, with the config's dtype set to the soup's."""
    first = plan.checkpoints[0]
    for path in sorted(first.folder.iterdir()):
        wanted = path.suffix in COPIED_SUFFIXES and not path.name.endswith(".index.json")
        if wanted and path.is_file() and path.name not in NOT_COPIED and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    if first.config:
        key = "torch_dtype" if "torch_dtype" in first.config else "dtype"
        _write_json(folder / "config.json", first.config | {key: _dtype_name(plan)})


def _dtype_name(plan: FolderPlan) -> str:
    """The dtype that most of the soup's elements have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in plan.tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_elements
    return str(max(counts, key=counts.__getitem__)).removeprefix("torch.")


@contextmanager
def _hashing(plan: FolderPlan) -> Iterator[Callable[[Path], str]]:
    """Hash the ingredients' files in a thread beside the merge; gives a function that waits for a file's hash."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        futures = {path: pool.submit(file_sha256, path) for checkpoint in plan.checkpoints for path in checkpoint.files}
        try:
            yield lambda path: futures[path].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

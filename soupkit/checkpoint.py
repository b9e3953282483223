"""One checkpoint folder, read without loading it: where each tensor's bytes lie, its config, its tokenizer.

The safetensors format: 8 bytes with the header's length (little-endian), a JSON header that gives each tensor's dtype,
shape and byte range, then the bytes (https://huggingface.co/docs/safetensors). Reading it here rather than through the
library is what allows reading any range of a tensor into a buffer of our own, with no memory map of the whole file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soupkit.blocks import BLOCK, Reader
from soupkit.errors import MergeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
# Text files that define a tokenizer, compared byte by byte; tokenizer.json is compared by content.
VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit


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
        buffer = torch.empty(min(prod(self.shape), BLOCK), dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:

            def read(start: int, stop: int) -> Tensor:
                file.seek(self.offset + start * self.dtype.itemsize)
                block = buffer[: stop - start]
                view = block.view(torch.uint8).numpy().data
                while view:
                    num_read = file.readinto(view)
                    if not num_read:
                        raise MergeError(f"{self.path} ended early: was it changed during the merge?")
                    view = view[num_read:]
                return block

            yield read


@dataclass(frozen=True)
class Checkpoint:
    """A folder as ``save_pretrained`` writes it. ``label`` is the name the user gave it, for messages."""

    label: str
    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or an empty dict."""
        path = self.folder / "config.json"
        return _read_json(path) if path.exists() else {}


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint folder (or hub id). Raises MergeError when it is none that can be merged."""
    folder = _locate(source)
    if (folder / SINGLE_FILE).exists():
        files, placed = [folder / SINGLE_FILE], None
    elif (folder / INDEX_FILE).exists():
        placed = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(placed, dict):
            raise MergeError(f"{folder / INDEX_FILE} has no weight_map: download or save the checkpoint again")
        files = [folder / name for name in sorted(set(placed.values()))]
    else:
        raise _no_safetensors(folder, source)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        tensors |= _read_header(path)
    if placed is not None and set(placed) != set(tensors):
        odd = min(set(placed) ^ set(tensors))
        raise MergeError(f"{folder}: {odd!r} is not in both the index and the shards: download or save it again")
    if not tensors:
        raise MergeError(f"{folder} holds no tensors: is this the right folder?")
    return Checkpoint(str(source), folder, tuple(files), tensors)


def require_same_config(first: Checkpoint, other: Checkpoint) -> None:
    """Raise MergeError when two configs disagree on what the weights mean, which shapes alone may not show."""
    keys = ("model_type", "vocab_size", "tie_word_embeddings", "num_attention_heads", "num_key_value_heads")
    for key in keys:
        a, b = first.config.get(key), other.config.get(key)
        if a is not None and b is not None and a != b:
            raise MergeError(
                f"config.json disagrees: {key} is {a} in {first.label} and {b} in {other.label}: "
                "merge fine-tunings of one model"
            )


def require_same_tokenizer(first: Checkpoint, other: Checkpoint) -> None:
    """Raise MergeError when two checkpoints that both carry a tokenizer map text to different token ids."""
    difference = _tokenizer_difference(first.folder, other.folder)
    if difference:
        raise MergeError(
            f"the tokenizers of {first.label} and {other.label} differ ({difference}): "
            "rows of their embeddings mean different tokens; merge checkpoints that share a tokenizer"
        )


def _tokenizer_difference(a: Path, b: Path) -> str | None:
    for name in VOCABULARY_FILES:
        if (a / name).exists() and (b / name).exists() and (a / name).read_bytes() != (b / name).read_bytes():
            return name
    paths = (a / "tokenizer.json", b / "tokenizer.json")
    if not all(path.exists() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return None
    mine, theirs = (_token_ids(_read_json(path)) for path in paths)
    for token in sorted(mine.keys() | theirs.keys()):
        if mine.get(token) != theirs.get(token):
            return f"token {token!r} has id {mine.get(token, 'none')} and {theirs.get(token, 'none')}"
    merges = [_read_json(path).get("model", {}).get("merges") for path in paths]
    return "merges of tokenizer.json" if merges[0] != merges[1] else None


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token to id. Settings such as padding and truncation are left out: programs rewrite them as they run."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram models: [token, score] pairs, the id is the position
        vocabulary = {token: position for position, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}


def _locate(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise MergeError(f"{source} is a file: give the checkpoint folder that holds it")
    # Where its parent is a folder here, as in runs/sft9, it is a mistyped path rather than a hub id.
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return _download(source)
    raise MergeError(f"{source} does not exist: give a checkpoint folder, or a hub id such as org/name")


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MergeError(f"{hub_id} is no folder here; to fetch it as a hub id: pip install huggingface_hub") from None
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise MergeError(
            f"{hub_id} is no folder here, and the hub could not provide it ({reason}): check the path, the hub id and "
            "the network, or download it first"
        ) from error


def _no_safetensors(folder: Path, source: str | Path) -> MergeError:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if "adapter_model.safetensors" in names:
        return MergeError(f"{source} is a LoRA adapter: merge it into its base model and save that first")
    if pickles:
        return MergeError(
            f"{source} holds pickled weights ({pickles[0]}), which can run code when loaded: convert them with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    found = ", ".join(names[:5]) or "nothing"
    return MergeError(f"{source} has no {SINGLE_FILE} (nor {INDEX_FILE}); found {found}: give a checkpoint folder")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored_tensor(entry, path, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError:
        raise MergeError(f"{path} is missing, though its index names it: download or save it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(f"{path} is damaged ({error}): download or save the checkpoint again") from None


def _stored_tensor(entry: dict[str, Any], path: Path, data_start: int, file_size: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), path, data_start + begin)
    if begin < 0 or end - begin != tensor.num_bytes or data_start + end > file_size:
        raise ValueError(f"bytes {begin} to {end} do not hold a tensor {entry['shape']} of {entry['dtype']}")
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MergeError(f"{path} is not valid JSON ({error}): download or save the checkpoint again") from None
    if not isinstance(content, dict):
        raise MergeError(f"{path} holds no JSON object: download or save the checkpoint again")
    return content

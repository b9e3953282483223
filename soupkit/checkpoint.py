"""One checkpoint as users have it, opened without loading it: tensors to read, config, tokenizer.

A folder with safetensors files, one or several with an index; the same with pickled .bin files, when allowed; a base
with a LoRA adapter folded in ("BASE+ADAPTER"); or a hub id for any folder of these.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soupkit.errors import MergeError
from soupkit.files import (
    CHAT_TEMPLATES,
    INDEX_FILE,
    PICKLED_FILE,
    PICKLED_INDEX_FILE,
    SINGLE_FILE,
    expanded,
    read_bytes,
    read_json,
    require_own_file,
)
from soupkit.heads import TIES, embedding_of, is_head, setting, with_setting
from soupkit.lora import fold, is_adapter, read_adapter
from soupkit.pickled import PickledTensor, read_pickle
from soupkit.safetensors_format import read_header
from soupkit.sources import FLOAT8_DTYPES, TensorSource

TOKENIZER_FILE = "tokenizer.json"
# Other files that spell out a tokenizer's tokens.
VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@\w[\w./-]*)?", re.ASCII)
# What from_pretrained needs beside the weights: configs, tokenizer, chat templates, remote code.
COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")
NO_COMPANIONS = {"config.json", "soup.json", "trainer_state.json", "adapter_config.json"}
HUB_PATTERNS = ("*.safetensors", *(f"*{suffix}" for suffix in COMPANION_SUFFIXES))
HUB_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
# What quantised weights are stored with; without it they mean nothing.
SCALES = ("_scale", "_scale_inv", ".scales", ".SCB")
PACKED = (".qweight", ".weight_packed", ".absmax")


@dataclass(frozen=True)
class Checkpoint:
    """A folder as ``save_pretrained`` writes it. ``label`` is the name the user gave it, for messages.

    ``files`` are all the weight files that the tensors are read from. ``config`` is what config.json says, or an empty
    dict; it is kept true to the tensors where these are changed on the way.
    """

    label: str
    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorSource]
    config: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(source: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint: a folder, a hub id, or "BASE+ADAPTER". Raises MergeError when it is unusable.

    ``allow_pickle``: read weights, and nothing but weights, from .bin files where there are no safetensors.
    """
    parts = base_and_adapter(source)
    if parts:
        base = open_checkpoint(parts[0], allow_pickle=allow_pickle)
        adapter = read_adapter(locate(parts[1], allow_pickle), parts[1], allow_pickle)
        tensors = fold(adapter, base.tensors, base.config)
        return Checkpoint(str(source), base.folder, (*base.files, adapter.file), tensors, base.config)
    folder = locate(source, allow_pickle)
    files, placed, read = _weight_files(folder, source, allow_pickle)
    tensors = {}
    for path in files:
        require_own_file(folder, path)
        for name, tensor in read(path).items():
            if name in tensors:
                raise MergeError(f"{folder}: {name!r} is in two shards: download or save it again")
            tensors[name] = tensor
    if placed is not None:
        found = {name: tensor.path.name for name, tensor in tensors.items()}
        for name in sorted(placed.keys() | found.keys()):
            if placed.get(name) != found.get(name):
                raise MergeError(
                    f"{folder}: {name!r} is not in both the index and the shards: download or save it again"
                )
    if not tensors:
        raise MergeError(f"{folder} holds no tensors: is this the right folder?")
    path = folder / "config.json"
    require_own_file(folder, path)
    checkpoint = Checkpoint(str(source), folder, tuple(files), tensors, read_json(path) if path.exists() else {})
    return _without_tied_heads(checkpoint)


def companion_files(folder: Path) -> list[Path]:
    """What ``from_pretrained`` needs beside the weights and config.json, as paths within the folder, in order.

    Raises MergeError for one that is a link out of the folder.
    """
    paths = [*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja")]
    wanted = [
        path
        for path in sorted(paths)
        if path.suffix in COMPANION_SUFFIXES
        and path.name not in NO_COMPANIONS
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    ]
    for path in wanted:
        require_own_file(folder, path)
    return [path.relative_to(folder) for path in wanted if path.is_file()]


def copy_companions(source: Path, target: Path, *, leave_out: Collection[str] = ()) -> None:
    """Copy the companion files of one folder to another, but for those of the names in ``leave_out``."""
    for path in companion_files(source):
        if path.name not in leave_out:
            (target / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / path, target / path)


def require_plain_weights(checkpoint: Checkpoint) -> None:
    """Raise MergeError for quantised weights, whose stored values are not the model's."""
    has_float8 = any(tensor.dtype in FLOAT8_DTYPES for tensor in checkpoint.tensors.values())
    scales = [name for name in checkpoint.tensors if name.endswith(SCALES)] if has_float8 else []
    packed = [name for name in checkpoint.tensors if name.endswith(PACKED)]
    quantised = has_float8 and setting(checkpoint.config, "quantization_config")
    reason = next(iter([*packed, *scales]), "quantization_config" if quantised else None)
    if reason:
        raise MergeError(
            f"{checkpoint.label} is quantised ({reason}), and its stored values mean nothing without their scales: "
            "dequantise it to bfloat16 first"
        )


def require_same_config(first: Checkpoint, other: Checkpoint) -> None:
    """Raise MergeError when two configs disagree on what the weights mean, which shapes alone may not show."""
    keys = ("model_type", "vocab_size", "tie_word_embeddings", "num_attention_heads", "num_key_value_heads")
    for key in keys:
        a, b = setting(first.config, key), setting(other.config, key)
        if a is not None and b is not None and a != b:
            raise MergeError(
                f"config.json disagrees: {key} is {a} in {first.label} and {b} in {other.label}: "
                "merge fine-tunings of one model"
            )


def require_same_tokenizer(first: Checkpoint, other: Checkpoint) -> None:
    """Raise MergeError when two checkpoints that both carry a tokenizer map text to different token ids."""
    difference = tokenizer_difference(first.folder, other.folder)
    if difference:
        raise MergeError(
            f"the tokenizers of {first.label} and {other.label} differ ({difference}): "
            "rows of their embeddings mean different tokens; merge checkpoints that share a tokenizer"
        )


def tokenizer_difference(a: Path, b: Path) -> str | None:
    """What maps text to different token ids in two folders that both have a tokenizer; None for nothing."""
    for name in VOCABULARY_FILES:
        if (a / name).exists() and (b / name).exists() and not _same_content(a / name, b / name):
            return name
    paths = (a / TOKENIZER_FILE, b / TOKENIZER_FILE)
    if not all(path.exists() for path in paths) or read_bytes(paths[0]) == read_bytes(paths[1]):
        return None
    contents = [read_json(path) for path in paths]
    mine, theirs = (token_ids(content, path) for content, path in zip(contents, paths, strict=True))
    for token in sorted(mine.keys() | theirs.keys()):
        if mine.get(token) != theirs.get(token):
            return f"token {token!r} has id {mine.get(token, 'none')} and {theirs.get(token, 'none')}"
    merges = [content["model"].get("merges") for content in contents]
    return f"merges of {TOKENIZER_FILE}" if merges[0] != merges[1] else None


def _same_content(a: Path, b: Path) -> bool:
    """Whether two files say the same; programs space JSON in their own ways."""
    return read_bytes(a) == read_bytes(b) or (a.suffix == ".json" and read_json(a) == read_json(b))


def token_ids(tokenizer: dict[str, Any], path: str | Path = TOKENIZER_FILE) -> dict[str, int]:
    """Token to id. Settings such as padding and truncation are left out: programs rewrite them as they run."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram models: [token, score] pairs, the id is the position
            vocabulary = {token: position for position, (token, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        if not all(type(number) is int and 0 <= number < 2**31 for number in ids.values()):
            raise ValueError("ids are whole numbers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MergeError(f"{path} is damaged ({error}): save the tokenizer again") from None
    return ids


def base_and_adapter(source: str | Path, starts: Sequence[Path] = (Path(),)) -> tuple[str, str] | None:
    """The two halves of "BASE+ADAPTER"; None for a folder, seen from one of ``starts``, or a name without a plus."""
    text = str(source)
    if "+" not in text or _seen_from(text, starts):
        return None
    positions = [position for position, letter in enumerate(text) if letter == "+"]
    # A folder's name may itself hold a plus; the adapter is the shortest ending that is a folder.
    cut = next((p for p in positions[::-1] if _seen_from(text[p + 1 :], starts)), positions[-1])
    if not text[:cut] or not text[cut + 1 :]:
        raise MergeError(f"{source} lacks a base or an adapter: write BASE+ADAPTER")
    return text[:cut], text[cut + 1 :]


def _weight_files(
    folder: Path, source: str | Path, allow_pickle: bool
) -> tuple[list[Path], dict[str, str] | None, Callable[[Path], Mapping[str, TensorSource]]]:
    """The files, where the index places each tensor if there is one, and what reads such a file."""
    kinds: list[tuple[str, str, Callable[[Path], Mapping[str, TensorSource]]]]
    kinds = [(SINGLE_FILE, INDEX_FILE, read_header)]
    if allow_pickle:
        kinds.append((PICKLED_FILE, PICKLED_INDEX_FILE, read_pickle))
    for single, index, read in kinds:
        if (folder / single).exists():
            return [folder / single], None, read
        if (folder / index).exists():
            placed = _read_index(folder / index)
            return [folder / name for name in sorted(set(placed.values()))], placed, read
    raise _no_weights(folder, source)


def _read_index(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict):
        raise MergeError(f"{path} has no weight_map: download or save the checkpoint again")
    for name, file in placed.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise MergeError(f"{path} places {name!r} in {file!r}, which is no file name: put all shards beside it")
    return placed


def _without_tied_heads(checkpoint: Checkpoint) -> Checkpoint:
    """Drop a head that an unpickled file holds as the very memory of the embeddings, unless the config unties them."""
    tensors, config = dict(checkpoint.tensors), checkpoint.config
    for name, head in checkpoint.tensors.items():
        if not is_head(name) or not isinstance(head, PickledTensor) or setting(config, TIES) is False:
            continue
        embedding = tensors.get(embedding_of(name, tensors) or "")
        if isinstance(embedding, PickledTensor) and head.shares_memory_with(embedding):
            del tensors[name]
            config = config and with_setting(config, TIES, True)
    return Checkpoint(checkpoint.label, checkpoint.folder, checkpoint.files, tensors, config)


def locate(source: str | Path, allow_pickle: bool) -> Path:
    """The folder of a checkpoint or an adapter, downloaded if it is a hub id. Raises MergeError where there is none."""
    path = expanded(source)
    if path.is_dir():
        return path
    if path.exists():
        raise MergeError(f"{source} is a file: give the checkpoint folder that holds it")
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        # Where its parent is a folder here, as in runs/sft9, it is a mistyped path rather than a hub id.
        if not path.parent.is_dir():
            folder = _download(source)
            if allow_pickle and not any(folder.glob("*.safetensors")):
                return _download(source, (*HUB_PATTERNS, *HUB_PICKLES))
            return folder
        raise MergeError(
            f"{source} does not exist: give a checkpoint folder, or a hub id (not looked for on the hub, since there "
            f"is a folder {path.parent} here: to mean the hub, run this elsewhere or download it first)"
        )
    raise MergeError(f"{source} does not exist: give a checkpoint folder, or a hub id such as org/name")


def folders_of(label: str, near: Path | None = None) -> list[Path]:
    """The folders that a label stands for on this machine: one, or those of "BASE+ADAPTER"; nothing is downloaded.

    A relative path is looked for from the working directory, then from the folder ``near`` and those above it. A hub id
    stands for its snapshot in the hub cache. Where there is none, the path given is of no folder.
    """
    above = [] if near is None else [near.resolve(), *near.resolve().parents]
    return _folders_of(label, [Path(), *above])


def _folders_of(label: str, starts: Sequence[Path]) -> list[Path]:
    parts = base_and_adapter(label, starts)
    if parts:
        return [folder for part in parts for folder in _folders_of(part, starts)]
    found = _seen_from(label, starts)
    if found:
        return [found]
    path = expanded(label)
    if HUB_ID.fullmatch(label) and not path.parent.is_dir():
        try:
            return [_snapshot(label, local_files_only=True)]
        except (ImportError, OSError, ValueError):
            pass  # not in the cache
    return [path]


def _seen_from(path: str, starts: Sequence[Path]) -> Path | None:
    """The folder of this path from the first of ``starts`` where it is one."""
    return next((place for start in starts if (place := start / expanded(path)).is_dir()), None)


def _snapshot(hub_id: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    return Path(snapshot_download(name, revision=revision or None, **options))


def _download(hub_id: str, patterns: tuple[str, ...] = HUB_PATTERNS) -> Path:
    try:
        return _snapshot(hub_id, allow_patterns=list(patterns))
    except ImportError:
        raise MergeError(f"{hub_id} is no folder here; to fetch it as a hub id: pip install huggingface_hub") from None
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise MergeError(
            f"{hub_id} is no folder here, and the hub could not provide it ({reason}): check the path, the hub id and "
            "the network, or download it first"
        ) from error


def _no_weights(folder: Path, source: str | Path) -> MergeError:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if is_adapter(folder):
        return MergeError(
            f"{source} is a LoRA adapter: merge it into its base model by naming both, BASE+{source}, or merge "
            "several of one base with soupkit.adapters.merge_adapters"
        )
    if pickles:
        return MergeError(
            f"{source} holds pickled weights ({pickles[0]}), which can run code when loaded: convert them with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), or read weights alone from "
            f"{PICKLED_FILE} with --allow-pickle"
        )
    found = ", ".join(names[:5]) or "nothing"
    return MergeError(f"{source} has no {SINGLE_FILE} (nor {INDEX_FILE}); found {found}: give a checkpoint folder")

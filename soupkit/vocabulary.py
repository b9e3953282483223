"""Ingredients with differing vocabularies, brought to one by the text of the tokens.

A row of an embedding or of a head belongs to a token's text; its number differs between tokenizers. Here each
ingredient's rows are put in the order of one tokenizer, without a copy of the tensor being made. A token that an
ingredient lacks takes the base's row where there is a base that has it, else the mean of the rows of those ingredients
that have it, so that it does not pull the soup towards anything.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soupkit.checkpoint import TOKENIZER_FILE, Checkpoint, token_ids
from soupkit.errors import MergeError
from soupkit.files import read_json, require_own_file
from soupkit.heads import is_embedding, is_head, setting, with_setting
from soupkit.sources import Reader, TensorSource, merge_dtype, wider_dtype

# What decides how a token's text is spelt, as in "Ġthe" or "▁the": the same everywhere, or texts cannot be compared.
SPELLING = ("normalizer", "pre_tokenizer", "decoder")
MODEL_SPELLING = ("type", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class UnifiedVocabulary:
    """Checkpoints that share one vocabulary, in the given order and with configs that fit it.

    ``tokenizer_json`` is the content of their common tokenizer.json, ``generation_config`` the first checkpoint's with
    its token ids renumbered. The tokenizer's other settings are those of the folder ``companions``, except for files
    that spell out a vocabulary (VOCABULARY_FILES), which no longer hold. ``sizes`` are the checkpoints' numbers of rows
    before, ``runs`` where their rows come from.
    """

    checkpoints: list[Checkpoint]
    tokenizer_json: dict[str, Any]
    companions: Path
    generation_config: dict[str, Any] | None
    sizes: list[int]
    runs: list[tuple[Run, ...]]

    def with_mapped_rows(self, fishers: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The Fisher estimates of the first checkpoints, one each, in the common rows.

        Rows that a checkpoint has of others have no information: there the others decide.
        """
        return [
            replace(fisher, tensors=_own_rows(index, fisher.tensors, self.sizes[index], self.runs[index]))
            for index, fisher in enumerate(fishers)
        ]


@dataclass(frozen=True)
class Run:
    """Rows ``start`` to ``stop`` of the result: the mean over ``parts``, each a source's number and its first row.

    Without parts, as for ids that no token has, the rows are zeros.
    """

    start: int
    stop: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MappedRows:
    """A tensor put together from rows of several."""

    sources: tuple[TensorSource, ...]
    runs: tuple[Run, ...]
    dtype: torch.dtype
    path: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.runs[-1].stop, *self.sources[0].shape[1:])

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of the flattened rows; a source is opened when a row of it is first asked for."""
        width = prod(self.shape[1:])
        is_wide = any(wider_dtype(source.dtype) == torch.float64 for source in self.sources)
        dtype = torch.float64 if is_wide else torch.float32
        starts = [run.start for run in self.runs]
        readers: dict[int, Reader] = {}
        with ExitStack() as stack:

            def source(number: int) -> Reader:
                if number not in readers:
                    readers[number] = stack.enter_context(self.sources[number].open())
                return readers[number]

            def read(start: int, stop: int) -> Tensor:
                block = torch.zeros(stop - start, dtype=dtype)
                first = max(bisect_right(starts, start // max(width, 1)) - 1, 0)
                for index in range(first, len(self.runs)):
                    run = self.runs[index]
                    begin, end = max(start, run.start * width), min(stop, run.stop * width)
                    if begin >= end:
                        break
                    rows = block[begin - start : end - start]
                    for number, row in run.parts:
                        shift = (row - run.start) * width
                        rows += source(number)(begin + shift, end + shift).to(dtype)
                    if len(run.parts) > 1:
                        rows /= len(run.parts)
                return block

            yield read


def unify_vocabularies(
    checkpoints: Sequence[Checkpoint], base_index: int | None = None, *, tokenizer: Path | None = None
) -> UnifiedVocabulary:
    """Bring checkpoints to the union of their vocabularies, or to the vocabulary of the folder ``tokenizer``.

    The union keeps the ids of the base, or of the first checkpoint where there is none; tokens that others add follow
    in the order of checkpoints and ids. They take the rows of padding beyond the tokenizer first, and rows of padding
    that remain are the same in all checkpoints. With ``tokenizer``, rows of tokens that it lacks are cut. Tensors
    concerned: embeddings, heads and their biases whose first dimension is the checkpoint's vocab_size. Give checkpoints
    through :func:`soupkit.heads.harmonise_heads` first, so that all have the same ones.

    Raises MergeError where a tokenizer.json is missing, where tokenizers spell tokens differently or their merges
    cannot be joined, and where another tensor has a dimension of the vocabulary's size.
    """
    vocabularies = [_Vocabulary.of(checkpoint) for checkpoint in checkpoints]
    anchor: int | None = base_index or 0
    if tokenizer is None:
        companions = checkpoints[base_index or 0].folder
        common = _union(vocabularies, base_index or 0)
    else:
        companions, common = tokenizer, _read_tokenizer(tokenizer)
        anchor = next((index for index, c in enumerate(checkpoints) if c.folder.samefile(tokenizer)), None)
        for vocabulary in vocabularies:
            _require_same_spelling(common, str(tokenizer), vocabulary)
    ids = _ids(common, companions)
    vocab_size = max(ids.values()) + 1
    padding = None
    if anchor is not None and vocabularies[anchor].size > vocab_size:
        padding = (anchor, range(vocab_size, vocabularies[anchor].size))
        vocab_size = vocabularies[anchor].size
    runs = _runs(ids, vocab_size, vocabularies, base_index, padding)
    unified = [
        replace(
            vocabulary.checkpoint,
            tensors=_mapped_tensors(index, vocabularies, runs[index]),
            config=_renumbered(vocabulary.checkpoint.config, vocabulary.ids, ids, vocab_size),
        )
        for index, vocabulary in enumerate(vocabularies)
    ]
    path = checkpoints[0].folder / "generation_config.json"
    require_own_file(checkpoints[0].folder, path)
    generation = _renumbered(read_json(path), vocabularies[0].ids, ids, None) if path.exists() else None
    sizes = [vocabulary.size for vocabulary in vocabularies]
    return UnifiedVocabulary(unified, common, companions, generation, sizes, runs)


@dataclass(frozen=True)
class _Vocabulary:
    """A checkpoint's tokenizer: its content, its tokens' ids, and the number of rows of the embeddings."""

    checkpoint: Checkpoint
    content: dict[str, Any]
    ids: dict[str, int]
    size: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> _Vocabulary:
        content = _read_tokenizer(checkpoint.folder)
        rows = [tensor.shape[0] for name, tensor in checkpoint.tensors.items() if is_embedding(name)]
        size = setting(checkpoint.config, "vocab_size") or next(iter(rows), None)
        if size not in rows:
            raise MergeError(
                f"{checkpoint.label} has no embeddings of vocab_size {size} rows: its vocabulary cannot be mapped, "
                "save it with a config.json that fits"
            )
        return _Vocabulary(checkpoint, content, _ids(content, checkpoint.folder), size)


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    if not (folder / TOKENIZER_FILE).exists():
        raise MergeError(f"{folder} has no {TOKENIZER_FILE}: save its fast tokenizer there, to map tokens by text")
    require_own_file(folder, folder / TOKENIZER_FILE)
    return read_json(folder / TOKENIZER_FILE)


def _ids(content: dict[str, Any], folder: Path) -> dict[str, int]:
    ids = token_ids(content, folder / TOKENIZER_FILE)
    if not ids or len(set(ids.values())) < len(ids):
        raise MergeError(f"{folder / TOKENIZER_FILE} has no tokens, or two with one id: save the tokenizer again")
    return ids


def _union(vocabularies: Sequence[_Vocabulary], anchor: int) -> dict[str, Any]:
    """The anchor's tokenizer.json with the tokens and the merges that others add."""
    common = copy.deepcopy(vocabularies[anchor].content)
    ids = dict(vocabularies[anchor].ids)
    next_id = max(ids.values()) + 1
    for vocabulary in vocabularies:
        _require_same_spelling(common, vocabularies[anchor].checkpoint.label, vocabulary)
        _join_merges(common["model"], vocabulary, vocabularies[anchor].checkpoint.label)
        added = {token["content"]: token for token in vocabulary.content.get("added_tokens", [])}
        for token in sorted(vocabulary.ids.keys() - ids.keys(), key=vocabulary.ids.__getitem__):
            if token in added:
                common.setdefault("added_tokens", []).append(added[token] | {"id": next_id})
            elif isinstance(common["model"]["vocab"], dict):
                common["model"]["vocab"][token] = next_id
            else:
                raise MergeError(
                    f"{vocabulary.checkpoint.label} adds the piece {token!r} to a unigram tokenizer, where it would "
                    "change how all text is cut: merge checkpoints that share their pieces"
                )
            ids[token] = next_id
            next_id += 1
    return common


def _require_same_spelling(common: Mapping[str, Any], label: str, vocabulary: _Vocabulary) -> None:
    mine, theirs = ({**content, "model": content.get("model") or {}} for content in (common, vocabulary.content))
    differing = [part for part in SPELLING if mine.get(part) != theirs.get(part)]
    differing += [f"model.{key}" for key in MODEL_SPELLING if mine["model"].get(key) != theirs["model"].get(key)]
    if differing:
        raise MergeError(
            f"the tokenizers of {label} and {vocabulary.checkpoint.label} spell tokens differently ({differing[0]}): "
            "their texts cannot be compared, merge checkpoints of one kind of tokenizer"
        )


def _join_merges(model: dict[str, Any], vocabulary: _Vocabulary, label: str) -> None:
    """Set ``model``'s merges to the longer of two lists where one contains the other in order."""
    mine, theirs = (_merges(merges) for merges in (model.get("merges"), vocabulary.content["model"].get("merges")))
    remaining = iter(mine)
    if all(merge in remaining for merge in theirs):
        return
    if theirs[: len(mine)] != mine:
        raise MergeError(
            f"the merges of the tokenizers of {label} and {vocabulary.checkpoint.label} cannot be joined, neither list "
            "continuing the other: take one tokenizer, as in tokenizer: base"
        )
    model["merges"] = vocabulary.content["model"]["merges"]


def _merges(merges: Any) -> list[tuple[str, ...]]:
    """Pairs of tokens, whichever of its two ways the file has of writing them."""
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in merges or []]


def _runs(
    ids: Mapping[str, int],
    vocab_size: int,
    vocabularies: Sequence[_Vocabulary],
    base_index: int | None,
    padding: tuple[int, range] | None,
) -> list[tuple[Run, ...]]:
    """For each checkpoint, where the rows of the common vocabulary come from."""
    texts = {number: text for text, number in ids.items()}
    runs: list[list[Run]] = [[] for _ in vocabularies]
    for row in range(vocab_size):
        text = texts.get(row)
        own = {}
        if text is not None:
            rows = ((index, vocabulary.ids.get(text)) for index, vocabulary in enumerate(vocabularies))
            own = {index: r for index, r in rows if r is not None and r < vocabularies[index].size}
            if not own:
                raise MergeError(f"token {text!r} has a row in none of the ingredients: take their own tokenizer")
        elif padding is not None and row in padding[1]:
            own = {padding[0]: row}
        shared = {base_index: own[base_index]} if base_index in own else own
        for index in range(len(vocabularies)):
            parts = {index: own[index]} if index in own else shared
            _append_row(runs[index], row, tuple(parts.items()))
    return [tuple(some) for some in runs]


def _append_row(runs: list[Run], row: int, parts: tuple[tuple[int, int], ...]) -> None:
    if runs:
        last = runs[-1]
        length = last.stop - last.start
        if parts == tuple((number, first + length) for number, first in last.parts):
            runs[-1] = Run(last.start, row + 1, last.parts)
            return
    runs.append(Run(row, row + 1, parts))


def _mapped_tensors(index: int, vocabularies: Sequence[_Vocabulary], runs: tuple[Run, ...]) -> dict[str, TensorSource]:
    """A checkpoint's tensors with the rows of those that go by the vocabulary in the common order."""
    checkpoint, size = vocabularies[index].checkpoint, vocabularies[index].size
    tensors = dict(checkpoint.tensors)
    if _changes_nothing(index, size, runs):
        return tensors
    for name, tensor in checkpoint.tensors.items():
        if size not in tensor.shape:
            continue
        if tensor.shape[0] != size or not _goes_by_vocabulary(name):
            raise MergeError(
                f"tensor {name!r} in {checkpoint.label} has a dimension of the vocabulary's size, {size}, and is no "
                "embedding or head: it cannot be mapped to another vocabulary"
            )
        sources = []
        for vocabulary in vocabularies:
            other = vocabulary.checkpoint.tensors.get(name)
            if other is None or other.shape[1:] != tensor.shape[1:] or other.shape[0] != vocabulary.size:
                raise MergeError(
                    f"tensor {name!r} of {checkpoint.label} has no counterpart by the vocabulary in "
                    f"{vocabulary.checkpoint.label}: merge checkpoints of the same architecture and size"
                )
            sources.append(other)
        tensors[name] = MappedRows(tuple(sources), runs, merge_dtype(tensor.dtype), tensor.path)
    return tensors


def _own_rows(
    index: int, tensors: Mapping[str, TensorSource], size: int, runs: tuple[Run, ...]
) -> dict[str, TensorSource]:
    """Tensors beside a checkpoint's own, with its own rows in the common order and zeros for the others."""
    if _changes_nothing(index, size, runs):
        return dict(tensors)
    own = tuple(replace(run, parts=tuple((0, row) for number, row in run.parts if number == index)) for run in runs)
    return {
        name: MappedRows((tensor,), own, tensor.dtype, tensor.path)
        if _goes_by_vocabulary(name) and tensor.shape[:1] == (size,)
        else tensor
        for name, tensor in tensors.items()
    }


def _changes_nothing(index: int, size: int, runs: tuple[Run, ...]) -> bool:
    return runs == (Run(0, size, ((index, 0),)),)


def _goes_by_vocabulary(name: str) -> bool:
    stem, _, last = name.rpartition(".")
    return is_embedding(name) or (is_head(f"{stem}.weight") and last in ("weight", "bias"))


def _renumbered(
    config: Mapping[str, Any], old: Mapping[str, int], new: Mapping[str, int], vocab_size: int | None
) -> dict[str, Any]:
    """A config whose ``..._token_id`` and, where given, ``vocab_size`` are those of the common vocabulary."""
    texts = {number: text for text, number in old.items()}

    def renumber(number: Any) -> Any:
        return new.get(texts[number]) if type(number) is int and number in texts else number

    changed = dict(config)
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_index")):
            changed[key] = [renumber(item) for item in value] if isinstance(value, list) else renumber(value)
        elif key in ("text_config", "decoder") and isinstance(value, dict):
            changed[key] = _renumbered(value, old, new, None)
    return with_setting(changed, "vocab_size", vocab_size) if config and vocab_size else changed

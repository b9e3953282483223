"""Soups of checkpoint folders: plan and check everything, then stream all tensors, then publish.

Memory: a few blocks of every model and of the soup for each thread, whatever the size of the models (and the soup
itself when it is asked for in memory).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soupkit.blocks import Findings, Readers, require_equal
from soupkit.card import model_card
from soupkit.checkpoint import (
    VOCABULARY_FILES,
    Checkpoint,
    companion_files,
    copy_companions,
    locate,
    open_checkpoint,
    require_plain_weights,
    require_same_config,
    require_same_tokenizer,
    tokenizer_difference,
)
from soupkit.engine import Progress, Streams, Task, run, run_forked, sink_into, tensor_tasks
from soupkit.errors import MergeError
from soupkit.files import INDEX_FILE, SINGLE_FILE, write_json
from soupkit.hashing import DEFAULT, Piece, TensorHasher, hash_file
from soupkit.heads import harmonise_fishers, harmonise_heads
from soupkit.methods import Method, find_method
from soupkit.planning import Models, TensorPlan, parameters_by_name, plan_tensors
from soupkit.processes import can_fork
from soupkit.provenance import describe, files_of, roles
from soupkit.publish import published_folder, reserve, write_back
from soupkit.recipe import Recipe
from soupkit.safetensors_format import DTYPES, StoredTensor, bytes_of
from soupkit.sources import Reader, TensorSource, in_order
from soupkit.tables import dtype_name, size
from soupkit.vocabulary import UnifiedVocabulary, unify_vocabularies

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of a soup from which on children are worth the 0.1 s of their beginning.
WORTH_FORKING = 100 * 10**6


@dataclass(frozen=True)
class FolderOptions:
    """How a merge of folders is run and written."""

    dtype: torch.dtype | None
    allow_nonfinite: bool
    allow_pickle: bool
    num_threads: int
    device: torch.device
    progress: bool
    overwrite: bool
    max_shard_size: int | None
    hash: str
    sync: bool


@dataclass(frozen=True)
class FolderPlan:
    """A merge of folders that passed every check: what will be read, computed and written.

    There is one recipe for each soup that is made in this pass; they differ in parameters alone.
    """

    recipes: Sequence[Recipe]
    ingredients: Sequence[Checkpoint]
    base: Checkpoint | None
    fishers: Sequence[Checkpoint]
    companions: Checkpoint  # whose config, tokenizer and so on the soup gets
    vocabulary: UnifiedVocabulary | None
    tensors: Sequence[TensorPlan]

    @property
    def method(self) -> Method:
        return find_method(self.recipes[0].method)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return in_order(self.ingredients, self.base, self.fishers)

    @property
    def labels(self) -> list[str]:
        return [checkpoint.label for checkpoint in self.checkpoints]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors) * len(self.recipes)


def plan_folders(recipes: Sequence[Recipe], options: FolderOptions) -> FolderPlan:
    """Check that folders can be merged, from their headers, configs and tokenizers alone. Raises MergeError."""
    recipe = recipes[0]
    opened = [open_checkpoint(model, allow_pickle=options.allow_pickle) for _, model in roles(recipe)]
    num_merged = len(recipe.models) + (recipe.base is not None)
    merged, fishers = opened[:num_merged], opened[num_merged:]
    for checkpoint in merged:
        require_plain_weights(checkpoint)
        if len({path.name for path in checkpoint.files}) < len(checkpoint.files):  # soup.json goes by file names
            raise MergeError(f"{checkpoint.label} names two adapters: average them into one first, and add that")
    merged = harmonise_heads(merged)
    fishers = harmonise_fishers(fishers, merged[: len(recipe.models)])
    merged, vocabulary = _with_one_vocabulary(recipe, merged)
    fishers = vocabulary.with_mapped_rows(fishers) if vocabulary else fishers
    for other in merged[1:]:
        require_same_config(merged[0], other)
    ingredients = merged[: len(recipe.models)]
    base = merged[-1] if recipe.base is not None else None
    models = Models(
        [checkpoint.tensors for checkpoint in ingredients],
        base.tensors if base else None,
        [checkpoint.tensors for checkpoint in fishers],
        [checkpoint.label for checkpoint in [*merged, *fishers]],
    )
    tensors = plan_tensors(models, options.dtype, parameters_by_name(recipes, ingredients[0].tensors))
    companions = base if base and recipe.tokenizer == "base" else ingredients[0]
    plan = FolderPlan(recipes, ingredients, base, fishers, companions, vocabulary, tensors)
    for tensor in tensors:
        if tensor.must_be_equal:
            with _readers(plan, tensor) as readers:
                require_equal(tensor, readers)
    return plan


def merge_into_memory(plan: FolderPlan, options: FolderOptions) -> list[dict[str, Tensor]]:
    """The soups as state dicts on the CPU; only the results are held."""
    soups = [
        {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in plan.tensors} for _ in plan.recipes
    ]
    findings = Findings(options.allow_nonfinite)
    with Progress(plan.num_bytes, plan.recipes[0].method, options.progress).shown() as progress:
        tasks: list[Task] = []
        for tensor in _largest_first(plan.tensors):
            flat = [soup[tensor.name].view(-1) for soup in soups]
            open_streams = partial(_streams_to_memory, plan, tensor, flat)
            tasks += tensor_tasks(tensor, plan.method, open_streams, findings, progress, options.device)
        run(tasks, options.num_threads, progress)
    findings.warn()
    return soups


def merge_into_folders(plan: FolderPlan, outs: Sequence[Path], options: FolderOptions) -> list[Path]:
    """The soups as checkpoint folders, complete or absent, where check_target has found nothing in the way.

    Raises MergeError or OSError.
    """
    outs = [Path(os.path.abspath(out)) for out in outs]
    _check_space(plan, outs)
    companion_files(_companions(plan))  # for what it refuses
    shards = _shards(plan, options.max_shard_size)
    findings = Findings(options.allow_nonfinite)
    with ExitStack() as stack:
        partials = [stack.enter_context(published_folder(out, options.overwrite, sync=options.sync)) for out in outs]
        written = {name: [_Shard(folder / name, tensors) for folder in partials] for name, tensors in shards.items()}
        for shard in chain.from_iterable(written.values()):
            shard.create()
        with Progress(plan.num_bytes, plan.recipes[0].method, options.progress).shown() as progress:
            hashes = _stream(plan, shards, written, findings, progress, options)
        for recipe, folder in zip(plan.recipes, partials, strict=True):
            _write_companions(plan, folder)
            if len(shards) > 1:
                _write_index(folder, shards)
            _write_record(plan, recipe, folder, hashes, findings, options)
    findings.warn()
    return outs


class _Shard:
    """An output file: its header, and where each tensor's bytes go."""

    def __init__(self, path: Path, tensors: Sequence[TensorPlan]) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        # Wide elements first, so that every tensor is aligned to its element size.
        tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            self.offsets[tensor.name] = end
            end += tensor.num_bytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self.offsets[tensor.name], end],
            }
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.header = len(encoded).to_bytes(8, "little") + encoded
        self.num_bytes = len(self.header) + end

    def create(self) -> None:
        """Create the file, all its space reserved, with its header. Raises OSError on a full disk."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            reserve(descriptor, self.num_bytes, self.path)
            _write_all(descriptor, memoryview(self.header), 0)
        finally:
            os.close(descriptor)

    @contextmanager
    def open(self, tensor: TensorPlan) -> Iterator[_OpenTensor]:
        """A tensor's place in the file, open only while a task writes to it: systems limit how many files may be."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            yield _OpenTensor(descriptor, self.offset(tensor), tensor.dtype.itemsize)
        finally:
            os.close(descriptor)

    def offset(self, tensor: TensorPlan) -> int:
        """The tensor's first byte in the file."""
        return len(self.header) + self.offsets[tensor.name]


@dataclass(frozen=True)
class _OpenTensor:
    """Where a tensor of the soup is written."""

    descriptor: int
    offset: int
    itemsize: int

    def write(self, position: int, block: Tensor) -> None:
        """Put elements in their place."""
        _write_all(self.descriptor, bytes_of(block), self.offset + position * self.itemsize)

    def flush(self, start: int, stop: int) -> None:
        """These elements are written: the disk may begin with them."""
        write_back(self.descriptor, self.offset + start * self.itemsize, (stop - start) * self.itemsize)


def _stream(
    plan: FolderPlan,
    shards: Mapping[str, Sequence[TensorPlan]],
    written: Mapping[str, Sequence[_Shard]],
    findings: Findings,
    progress: Progress,
    options: FolderOptions,
) -> dict[Path, str]:
    """Fill the shards. Returns the hashes of all weight files, the models' and the soups'."""
    of_shards: list[list[Task]] = [[] for _ in shards]
    for tasks, (name, tensors) in zip(of_shards, shards.items(), strict=True):
        for tensor in _largest_first(tensors):
            open_streams = partial(_streams_to_files, plan, tensor, written[name], options)
            tasks += tensor_tasks(tensor, plan.method, open_streams, findings, progress, options.device)
    # In turns, so that those who work side by side write to different files: a file takes one write at a time.
    tasks = [task for turn in zip_longest(*of_shards) for task in turn if task is not None]
    many = options.num_threads > 1 and plan.num_bytes >= WORTH_FORKING
    if many and options.device.type == "cpu" and can_fork():
        digests = run_forked(tasks, options.num_threads, progress, findings)
    else:
        digests = run(tasks, options.num_threads, progress)
    known = {piece: digest for found in digests for piece, digest in found.items()}
    paths = [path for checkpoint in plan.checkpoints for path in checkpoint.files]
    paths += [shard.path for files in written.values() for shard in files]
    paths = list(dict.fromkeys(paths))
    sources = [source for checkpoint in plan.checkpoints for source in checkpoint.tensors.values()]
    long = options.hash != DEFAULT or not all(isinstance(source, StoredTensor) for source in sources)
    num_bytes = sum(path.stat().st_size for path in paths)
    with Progress(num_bytes, "hash", options.progress and long).shown() as bar:
        hashing = [partial(hash_file, path, options.hash, bar.advance, known) for path in paths]
        return dict(zip(paths, run(hashing, options.num_threads, bar), strict=True))


@contextmanager
def _streams_to_files(
    plan: FolderPlan, tensor: TensorPlan, shards: Sequence[_Shard], options: FolderOptions, start: int, stop: int
) -> Iterator[Streams]:
    """From the models' files to the shards, one for each variant. The result: digests of the pieces that went by."""
    hashers: list[TensorHasher] = []

    def hashed(source: TensorSource, reader: Reader) -> Reader:
        if options.hash != DEFAULT or not isinstance(source, StoredTensor):
            return reader  # the file is read again, and hashed, when all is done
        hasher = TensorHasher(source.path, source.offset, start, prod(source.shape))
        hashers.append(hasher)

        def read(first: int, last: int) -> Tensor:
            block = reader(first, last)
            hasher.feed(first, block)
            return block

        return read

    outputs = [TensorHasher(shard.path, shard.offset(tensor), start, tensor.num_elements) for shard in shards]
    with ExitStack() as stack:
        written = [stack.enter_context(shard.open(tensor)) for shard in shards]

        def sink(variant: int, position: int, block: Tensor) -> None:
            if options.hash == DEFAULT:
                outputs[variant].feed(position, block)
            written[variant].write(position, block)

        def finish() -> dict[Piece, bytes]:
            for place in written if options.sync else []:
                place.flush(start, stop)
            return {piece: digest for hasher in [*hashers, *outputs] for piece, digest in hasher.digests.items()}

        yield Streams(stack.enter_context(_readers(plan, tensor, hashed)), sink, finish)


@contextmanager
def _streams_to_memory(
    plan: FolderPlan, tensor: TensorPlan, soups: Sequence[Tensor], start: int, stop: int
) -> Iterator[Streams]:
    """From the models' files to the flat tensors, one for each variant."""
    with _readers(plan, tensor) as readers:
        yield Streams(readers, sink_into(soups))


@contextmanager
def _readers(
    plan: FolderPlan,
    tensor: TensorPlan,
    wrapped: Callable[[TensorSource, Reader], Reader] = lambda source, reader: reader,
) -> Iterator[Readers]:
    with ExitStack() as stack:

        def opened(checkpoints: Sequence[Checkpoint]) -> list[Reader]:
            sources = [checkpoint.tensors[tensor.name] for checkpoint in checkpoints]
            return [wrapped(source, stack.enter_context(source.open())) for source in sources]

        base = opened([plan.base])[0] if plan.base else None
        fishers = opened(plan.fishers) if tensor.working_dtype is not None else []
        yield Readers(opened(plan.ingredients), base, fishers, plan.labels)


def _with_one_vocabulary(
    recipe: Recipe, checkpoints: list[Checkpoint]
) -> tuple[list[Checkpoint], UnifiedVocabulary | None]:
    """The checkpoints with rows that mean the same tokens, as the recipe's ``tokenizer`` wants it."""
    base_index = len(recipe.models) if recipe.base is not None else None
    alike = not any(tokenizer_difference(checkpoints[0].folder, other.folder) for other in checkpoints[1:])
    if recipe.tokenizer is None or (recipe.tokenizer == "base" and alike):
        for other in checkpoints[1:]:
            require_same_tokenizer(checkpoints[0], other)
        return checkpoints, None
    if recipe.tokenizer == "base":
        folder: Path | None = checkpoints[base_index or 0].folder
    else:
        folder = None if recipe.tokenizer == "union" else locate(recipe.tokenizer, allow_pickle=False)
    unified = unify_vocabularies(checkpoints, base_index, tokenizer=folder)
    return unified.checkpoints, unified


def _largest_first(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    return sorted(tensors, key=lambda tensor: -tensor.num_elements)


def _check_space(plan: FolderPlan, outs: Sequence[Path]) -> None:
    needed: dict[int, int] = {}  # by file system
    for out in outs:
        parent = next(folder for folder in out.parents if folder.exists())
        device = parent.stat().st_dev
        needed[device] = needed.get(device, 0) + plan.num_bytes // len(outs)
        free = shutil.disk_usage(parent).free
        if free < needed[device]:
            what = "the soup takes" if len(outs) == 1 else f"the soups up to {out.name} take"
            raise MergeError(
                f"{parent} has {size(free)} free, and {what} {size(needed[device])}: "
                "free some space or choose another output folder"
            )


def _shards(plan: FolderPlan, max_shard_size: int | None) -> dict[str, list[TensorPlan]]:
    """File name to its tensors: cut like the first ingredient, or greedily up to ``max_shard_size`` bytes."""
    groups: list[list[TensorPlan]] = []
    if max_shard_size is None:
        stored = plan.ingredients[0].tensors
        paths = dict.fromkeys(stored[tensor.name].path for tensor in plan.tensors)
        groups = [[tensor for tensor in plan.tensors if stored[tensor.name].path == path] for path in sorted(paths)]
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


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        num_written = os.pwrite(descriptor, data, offset)
        data, offset = data[num_written:], offset + num_written


def _write_index(folder: Path, shards: Mapping[str, Sequence[TensorPlan]]) -> None:
    placed = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})


def _write_companions(plan: FolderPlan, folder: Path) -> None:
    """Config, tokenizer and the like, with the config's dtype set to the soup's."""
    source, vocabulary = plan.companions, plan.vocabulary
    copy_companions(_companions(plan), folder, leave_out=VOCABULARY_FILES if vocabulary else ())
    if vocabulary:  # the files left out spell out another one
        write_json(folder / "tokenizer.json", vocabulary.tokenizer_json)
        if vocabulary.generation_config is not None:
            write_json(folder / "generation_config.json", vocabulary.generation_config)
    if source.config:
        key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
        write_json(folder / "config.json", source.config | {key: _dtype_name(plan)})


def _companions(plan: FolderPlan) -> Path:
    """The folder whose files beside the weights the soup gets."""
    return plan.vocabulary.companions if plan.vocabulary else plan.companions.folder


def _write_record(
    plan: FolderPlan,
    recipe: Recipe,
    folder: Path,
    hashes: Mapping[Path, str],
    findings: Findings,
    options: FolderOptions,
) -> None:
    """soup.json and the model card."""
    algorithm = options.hash
    checkpoints = [(role, checkpoint) for (role, _), checkpoint in zip(roles(recipe), plan.checkpoints, strict=True)]
    # The dtype that was asked for, so that the recipe makes the same again also where tensors differ in theirs.
    asked = None if options.dtype is None else dtype_name(options.dtype)
    record = describe(replace(recipe, dtype=asked), checkpoints, lambda path: {algorithm: hashes[path]})
    record["files"] = files_of(folder, lambda path: {algorithm: hashes.get(path) or hash_file(path, algorithm)})
    record |= {"dtype": _dtype_name(plan)} | findings.record(plan.method.fallback)
    write_json(folder / "soup.json", record)
    (folder / "README.md").write_text(model_card(record, plan.companions.config), encoding="utf-8")


def _dtype_name(plan: FolderPlan) -> str:
    """The floating-point dtype that most of the soup's elements have."""
    counts = {plan.tensors[0].dtype: 0}
    for tensor in [tensor for tensor in plan.tensors if tensor.working_dtype is not None]:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_elements
    return dtype_name(max(counts, key=counts.__getitem__))

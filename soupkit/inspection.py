"""What a checkpoint is, from its headers and configs; and, on request, from one streamed pass over its values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from soupkit.card import fallback_of, ingredients_of, settings
from soupkit.checkpoint import TOKENIZER_FILE, Checkpoint, open_checkpoint, token_ids
from soupkit.engine import Progress, parse_num_threads, run
from soupkit.errors import MergeError
from soupkit.files import read_json
from soupkit.heads import TIES, is_embedding, is_head, setting
from soupkit.layers import layer_name
from soupkit.sources import Reader
from soupkit.tables import dtype_name, finite_or_none, number, printable, shape_text, size, text_table
from soupkit.verification import RECORD_FILE, read_record

BLOCK = 2**16  # elements read at once: the float64 copies of a few blocks stay in a core's cache
SPAN = 2**24  # elements that one thread works through before it takes the next span
LANGUAGE_MODEL = re.compile(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration")
KEYS_OF_SIZE = ("hidden_size", "n_embd", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


class Readable(Protocol):
    """A tensor of a folder, or in memory: what of a TensorSource is needed here."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...
    def open(self) -> AbstractContextManager[Reader]: ...


@dataclass(frozen=True)
class Moments:
    """Mean, spread and range of the finite values seen; counts of the others. ``a + b`` is of both together."""

    num_finite: int = 0
    mean: float = math.nan
    squares: float = 0.0  # sum of squared distances from the mean
    min: float = math.nan
    max: float = math.nan
    num_nan: int = 0
    num_inf: int = 0

    @property
    def std(self) -> float:
        """√(Σ (x − mean)² / N) over the N finite values."""
        return math.sqrt(self.squares / self.num_finite) if self.num_finite else math.nan

    def __add__(self, other: Moments) -> Moments:
        # Chan, Golub and LeVeque 1979: merging keeps the digits that Σx² − (Σx)²/N loses.
        num_nan, num_inf = self.num_nan + other.num_nan, self.num_inf + other.num_inf
        if not self.num_finite or not other.num_finite:
            one = self if self.num_finite else other
            return Moments(one.num_finite, one.mean, one.squares, one.min, one.max, num_nan, num_inf)
        total = self.num_finite + other.num_finite
        step = other.mean - self.mean
        return Moments(
            total,
            self.mean + step * other.num_finite / total,
            self.squares + other.squares + step**2 * self.num_finite * other.num_finite / total,
            min(self.min, other.min),
            max(self.max, other.max),
            num_nan,
            num_inf,
        )


@dataclass(frozen=True)
class TensorFacts:
    """One tensor; ``moments`` where statistics were asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    moments: Moments | None = None

    @property
    def num_elements(self) -> int:
        """The number of its elements; 1 for shape ()."""
        return prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    label: str
    architecture: str
    tensors: tuple[TensorFacts, ...]
    files: Mapping[str, int]  # weight file to bytes
    layers: Mapping[str, int]  # stack of layers to how many it has
    head: str
    vocabulary: Mapping[str, Any]  # where it is counted to its size
    sizes: Mapping[str, Any]  # of the config
    making: tuple[str, ...]  # of a soup: method, parameters and ingredients, from its soup.json
    notes: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of floating-point tensors; a tied head is not stored, and so not counted."""
        return sum(tensor.num_elements for tensor in self.tensors if tensor.dtype.startswith(("float", "bfloat")))

    @property
    def dtypes(self) -> dict[str, dict[str, int]]:
        """{dtype: {"tensors": number of tensors, "elements": number of elements}}, most elements first."""
        counts: dict[str, dict[str, int]] = {}
        for tensor in self.tensors:
            entry = counts.setdefault(tensor.dtype, {"tensors": 0, "elements": 0})
            entry["tensors"] += 1
            entry["elements"] += tensor.num_elements
        return dict(sorted(counts.items(), key=lambda item: -item[1]["elements"]))

    def __str__(self) -> str:
        return self.render()

    def render(self, *, tensors: bool = False) -> str:
        """A table that a person can read; with ``tensors``, one more with a line for each tensor."""
        parts = [text_table(("checkpoint", printable(self.label)), _facts(self), num_left=2)]
        if tensors:
            parts.append(_tensor_table(self.tensors))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; statistics that are not defined are None."""
        return {
            "checkpoint": self.label,
            "architecture": self.architecture,
            "num_parameters": self.num_parameters,
            "dtypes": self.dtypes,
            "files": dict(self.files),
            "layers": dict(self.layers),
            "head": self.head,
            "vocabulary": dict(self.vocabulary),
            "sizes": dict(self.sizes),
            "making": list(self.making),
            "notes": list(self.notes),
            "tensors": [_tensor_dict(tensor) for tensor in self.tensors],
        }


def inspect(
    folder: str | Path, *, statistics: bool = False, allow_pickle: bool = False, progress: bool = True
) -> Inspection:
    """What a checkpoint folder (or hub id) holds: architecture, tensors, files, head, vocabulary, and its soup.json.

    Only headers and configs are read; with ``statistics`` the values too, streamed in bounded memory, for each tensor's
    mean, standard deviation (denominator N), minimum and maximum over its N finite values, all in float64, and its NaN
    and infinite values. ``progress``: a bar on stderr, in bytes.

    Raises MergeError (a ValueError) when the folder is no checkpoint that can be read.

    Example:
        >>> print(soupkit.inspect("runs/soup"))
    """
    checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle)
    moments: dict[str, Moments] = {}
    if statistics:
        sources = {name: (tensor,) for name, tensor in checkpoint.tensors.items()}
        moments = streamed_sums(sources, _moments, Moments(), "inspect", progress)
    notes: list[str] = []
    making: tuple[str, ...] = ()
    if (checkpoint.folder / RECORD_FILE).exists():
        try:
            making = _making(read_record(checkpoint.folder))
        except MergeError as error:
            notes.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError):
            notes.append(f"{RECORD_FILE} is not as soupkit writes it")
    config = checkpoint.config
    return Inspection(
        label=checkpoint.label,
        architecture=_architecture(config),
        tensors=tuple(
            TensorFacts(name, dtype_name(tensor.dtype), tuple(tensor.shape), moments.get(name))
            for name, tensor in checkpoint.tensors.items()
        ),
        files={path.name: path.stat().st_size for path in checkpoint.files},
        layers=count_layers(checkpoint.tensors),
        head=_head(checkpoint),
        vocabulary=_vocabulary(checkpoint),
        sizes={key: value for key in KEYS_OF_SIZE if (value := setting(config, key)) is not None},
        making=making,
        notes=tuple(notes),
    )


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """{stack: its number of layers}, such as {"model.layers": 22}."""
    found = dict.fromkeys(layer for layer in map(layer_name, names) if layer)
    stacks = [layer.rpartition(".")[0] for layer in found]
    return {stack: stacks.count(stack) for stack in dict.fromkeys(stacks)}


Sums = TypeVar("Sums")


def streamed_sums(
    sources: Mapping[str, Sequence[Readable]],
    measure: Callable[[Sequence[Tensor]], Sums],
    zero: Sums,
    description: str,
    progress: bool,
) -> dict[str, Sums]:
    """{name: sum of ``measure`` over the blocks of its sources}, in bounded memory, on all cores.

    ``measure`` takes one block of every source of a name, [n] elements each, on the CPU, and gives something that "+"
    adds up. Additions come in the order of the blocks, so that the result does not depend on the number of threads.
    """
    jobs = [
        (name, start, min(start + SPAN, prod(tensors[0].shape)))
        for name, tensors in sources.items()
        for start in range(0, prod(tensors[0].shape), SPAN)
    ]
    sums: dict[tuple[str, int, int], Any] = {}
    item_bytes = {name: sum(source.dtype.itemsize for source in tensors) for name, tensors in sources.items()}
    num_bytes = sum((stop - start) * item_bytes[name] for name, start, stop in jobs)
    bar = Progress(num_bytes, description, progress)

    def work(job: tuple[str, int, int]) -> None:
        name, first, last = job
        total: Any = zero
        with ExitStack() as stack:
            readers = [stack.enter_context(source.open()) for source in sources[name]]
            for start in range(first, last, BLOCK):
                stop = min(start + BLOCK, last)
                total = total + measure([read(start, stop).detach().cpu() for read in readers])
                bar.advance((stop - start) * item_bytes[name])
        sums[job] = total

    with bar.shown():
        run([partial(work, job) for job in jobs], parse_num_threads(None), bar)
    totals: dict[str, Any] = dict.fromkeys(sources, zero)
    for job in jobs:
        totals[job[0]] = totals[job[0]] + sums[job]
    return totals


def _moments(blocks: Sequence[Tensor]) -> Moments:
    x = blocks[0].double()
    is_finite = x.isfinite()
    finite = x if is_finite.all() else x[is_finite]
    num_nan = int(x.isnan().sum()) if finite is not x else 0
    num_inf = x.numel() - finite.numel() - num_nan
    if not finite.numel():
        return Moments(num_nan=num_nan, num_inf=num_inf)
    mean = finite.mean()
    squares = (finite - mean).square().sum()
    low, high = finite.aminmax()
    return Moments(finite.numel(), float(mean), float(squares), float(low), float(high), num_nan, num_inf)


def _head(checkpoint: Checkpoint) -> str:
    """What gives the logits, as transformers 5 reads it (see :mod:`soupkit.heads`)."""
    stored = ", ".join(name for name in checkpoint.tensors if is_head(name))
    tied = setting(checkpoint.config, TIES)
    if stored:
        return f"stored as {stored}" + (", though the config ties it to the embeddings" if tied else "")
    if not LANGUAGE_MODEL.search(_architecture(checkpoint.config)):
        return "no language-model head"
    return "missing: the config does not tie it to the embeddings" if tied is False else "tied to the embeddings"


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return ", ".join(map(str, names)) if names and isinstance(names, list) else str(config.get("model_type", "unknown"))


def _vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    facts: dict[str, Any] = {"vocab_size of config.json": setting(checkpoint.config, "vocab_size")}
    for name, tensor in checkpoint.tensors.items():
        if is_embedding(name) and tensor.shape:
            facts[f"rows of {name}"] = tensor.shape[0]
    tokens = tokens_of(checkpoint.folder)
    facts[f"tokens of {TOKENIZER_FILE}"] = None if tokens is None else len(tokens)
    return {where: count for where, count in facts.items() if count is not None}


def tokens_of(folder: Path) -> dict[str, int] | None:
    """{token: id} of tokenizer.json, added tokens too; None without one. Raises MergeError for a damaged one."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    return token_ids(read_json(path), path)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    rows = [("architecture", found.architecture)]
    rows += [(key.replace("_", " "), str(value)) for key, value in found.sizes.items()]
    rows += [("layers", f"{count} in {stack or 'the root'}") for stack, count in found.layers.items()]
    rows.append(("parameters", f"{found.num_parameters:,}"))
    for dtype, counts in found.dtypes.items():
        rows.append((dtype, f"{counts['elements']:,} elements in {counts['tensors']:,} tensors"))
    rows.append(("head", found.head))
    rows += [
        ("vocabulary", f"{count:,} ({where})" if isinstance(count, int) else f"{count} ({where})")
        for where, count in found.vocabulary.items()
    ]
    if len(found.files) > 1:
        rows.append(("files", f"{len(found.files)} shards, {size(sum(found.files.values()))}"))
    rows += [("file", f"{name}, {size(num_bytes)}") for name, num_bytes in found.files.items()]
    rows += [("soup", line) for line in found.making]
    rows += [("note", note) for note in found.notes]
    return [(name, printable(text)) for name, text in rows]


def _making(record: Mapping[str, Any]) -> tuple[str, ...]:
    """How a soup was made, line by line."""
    recipe = record["recipe"]
    lines = [f"{recipe['method']}, by soupkit {record['soupkit']}"]
    if recipe.get("parameters"):
        lines.append(settings(recipe["parameters"]))
    for ingredient in ingredients_of(recipe):
        own = f" with {settings(ingredient.parameters)}" if ingredient.parameters else ""
        lines.append(f"{ingredient.role} {ingredient.label}{own}")
    return (*lines, *fallback_of(record))


def _tensor_table(tensors: Sequence[TensorFacts]) -> str:
    header = ["tensor", "dtype", "shape"]
    with_moments = any(tensor.moments for tensor in tensors)
    if with_moments:
        header += ["mean", "std", "min", "max", "NaN", "Inf"]
    rows = []
    for tensor in tensors:
        row = [printable(tensor.name), tensor.dtype, shape_text(tensor.shape)]
        if tensor.moments:
            moments = tensor.moments
            row += [number(x) for x in (moments.mean, moments.std, moments.min, moments.max)]
            row += [str(moments.num_nan), str(moments.num_inf)]
        rows.append(row)
    return text_table(header, rows, num_left=2)


def _tensor_dict(tensor: TensorFacts) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.moments:
        moments = tensor.moments
        facts |= {key: finite_or_none(getattr(moments, key)) for key in ("mean", "std", "min", "max")}
        facts |= {"num_nan": moments.num_nan, "num_inf": moments.num_inf}
    return facts

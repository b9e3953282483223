"""What differs between two checkpoints: how far apart, in which direction, where; and whether they drifted alike.

Every figure comes from float64 sums over blocks, which add up: those of a layer, or of the whole model, are figures of
its tensors laid end to end. The total is over floating-point tensors alone, since counters and token positions, however
large, are no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from soupkit.checkpoint import TOKENIZER_FILE, VOCABULARY_FILES, open_checkpoint
from soupkit.errors import MergeError
from soupkit.files import read_json
from soupkit.inspection import Readable, streamed_sums, tokens_of
from soupkit.layers import LAYER_INDEX, layer_name, layer_of
from soupkit.sources import Reader
from soupkit.tables import dtype_name, finite_or_none, number, percent, printable, shape_text, text_table

Model = Mapping[str, Tensor] | Module | str | Path

# Beside tokenizer.json, which is compared token by token.
TOKENIZER_FILES = (*VOCABULARY_FILES, "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")
OUTSIDE_LAYERS = "(outside layers)"


@dataclass(frozen=True)
class Distance:
    """Sums over positions, and the figures that follow from them. ``x + y`` is of both sets of positions together.

    Positions where a or b is NaN or infinite are counted, and left out of every sum; those where the base is, out of
    the sums over task vectors.
    """

    num_elements: int = 0
    num_equal: int = 0
    num_nan_a: int = 0
    num_inf_a: int = 0
    num_nan_b: int = 0
    num_inf_b: int = 0
    num_non_finite_base: int = 0
    squares: float = 0.0  # Σ (a − b)²
    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0  # Σ a b
    max_abs: float = 0.0
    task_squares_a: float = 0.0  # Σ (a − base)²
    task_squares_b: float = 0.0
    task_products: float = 0.0  # Σ (a − base) (b − base)
    num_both_moved: int = 0  # positions where a ≠ base and b ≠ base
    num_same_sign: int = 0  # ... and both moved the same way

    def __add__(self, other: Distance) -> Distance:
        values = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Distance(**values | {"max_abs": max(self.max_abs, other.max_abs)})

    @property
    def l2(self) -> float:
        """‖a − b‖."""
        return math.sqrt(self.squares)

    @property
    def relative(self) -> float:
        """‖a − b‖ / ‖a‖; 0 where they are equal, infinite where only a is zero."""
        return _ratio(self.squares, self.squares_a)

    @property
    def cosine(self) -> float:
        """a·b / (‖a‖ ‖b‖); NaN where one of them is zero."""
        return _cosine(self.products, self.squares_a, self.squares_b)

    @property
    def equal_share(self) -> float:
        """Positions where a and b are the same number, or both NaN, among all positions; NaN where there are none."""
        return self.num_equal / self.num_elements if self.num_elements else math.nan

    @property
    def task_norm_a(self) -> float:
        """‖a − base‖."""
        return math.sqrt(self.task_squares_a)

    @property
    def task_norm_b(self) -> float:
        """‖b − base‖."""
        return math.sqrt(self.task_squares_b)

    @property
    def task_cosine(self) -> float:
        """(a − base)·(b − base) / (‖a − base‖ ‖b − base‖); NaN where one of them is zero."""
        return _cosine(self.task_products, self.task_squares_a, self.task_squares_b)

    @property
    def sign_agreement(self) -> float:
        """Positions where a − base and b − base have the same sign, among those where neither is 0; NaN without any."""
        return self.num_same_sign / self.num_both_moved if self.num_both_moved else math.nan

    @property
    def num_non_finite(self) -> int:
        """NaN and infinite values of a and b together."""
        return self.num_nan_a + self.num_inf_a + self.num_nan_b + self.num_inf_b

    def to_dict(self, with_base: bool) -> dict[str, float | None]:
        """The figures, ready for JSON; those that are not defined are None."""
        names = ["num_elements", "l2", "relative", "max_abs", "cosine", "equal_share"]
        names += ["num_nan_a", "num_inf_a", "num_nan_b", "num_inf_b"]
        if with_base:
            names += ["task_norm_a", "task_norm_b", "task_cosine", "sign_agreement", "num_both_moved"]
            names += ["num_non_finite_base"]
        return {name: finite_or_none(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class TensorDistance:
    """One tensor that both checkpoints hold in the same shape."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    distance: Distance
    is_floating: bool


@dataclass(frozen=True)
class Diff:
    """What :func:`diff` found between a and b."""

    a: str
    b: str
    base: str | None
    tensors: tuple[TensorDistance, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of the tensors whose shapes differ
    not_in_base: tuple[str, ...]  # in a and b, but not in the base, or there with another shape
    config: Mapping[str, Mapping[str, Any]]  # key to {"a": value, "b": value}, without a value where the key is absent
    tokenizer: tuple[str, ...]

    @property
    def total(self) -> Distance:
        """Over all floating-point tensors of ``tensors``, as if laid end to end."""
        return sum((tensor.distance for tensor in self.tensors if tensor.is_floating), Distance())

    @property
    def layers(self) -> dict[str, Distance]:
        """{layer: distance over its floating-point tensors}, by number; those outside layers together, and first."""
        layers: dict[str, Distance] = {}
        for tensor in self.tensors:
            if tensor.is_floating:
                layer = layer_name(tensor.name) or OUTSIDE_LAYERS
                layers[layer] = layers.get(layer, Distance()) + tensor.distance
        return dict(sorted(layers.items(), key=lambda item: layer_of(item[0]) or ("", -1)))

    @property
    def kinds(self) -> dict[str, Distance]:
        """{name with * for its numbers: distance over all floating-point tensors of such a name}, in the order of a."""
        kinds: dict[str, Distance] = {}
        for tensor in self.tensors:
            if tensor.is_floating:
                kind = LAYER_INDEX.sub("*", tensor.name)
                kinds[kind] = kinds.get(kind, Distance()) + tensor.distance
        return kinds

    @property
    def same_weights(self) -> bool:
        """The same tensors with the same shapes, dtypes and numbers."""
        return not (self.only_in_a or self.only_in_b or self.shapes) and all(
            tensor.distance.num_equal == tensor.distance.num_elements and tensor.dtypes[0] == tensor.dtypes[1]
            for tensor in self.tensors
        )

    def __str__(self) -> str:
        return self.render()

    def render(self, *, num_tensors: int = 15, by_layer: bool = False) -> str:
        """Tables: the total, then the kinds and the tensors of largest relative distance, or every layer in order."""
        total = self.total
        parts = ["\n".join(self._title()), text_table(("total", ""), self._total_rows(total))]
        with_base = self.base is not None
        if by_layer:
            parts.append(_distance_table("layer", self.layers.items(), with_base))
        else:
            tensors = {tensor.name: tensor.distance for tensor in self.tensors}
            for what, distances in (("kinds", self.kinds), ("tensors", tensors)):
                different = [item for item in distances.items() if item[1].num_equal < item[1].num_elements]
                different.sort(key=lambda item: item[1].relative, reverse=True)
                title = f"most different {what}, {min(num_tensors, len(different))} of {len(different)}"
                if different and not (what == "kinds" and len(distances) == len(tensors)):
                    parts.append(_distance_table(title, different[:num_tensors], with_base))
        parts += ["\n".join(notes)] if (notes := list(self._notes())) else []
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; figures that are not defined are None."""
        with_base = self.base is not None
        return {
            "a": self.a,
            "b": self.b,
            "base": self.base,
            "same_weights": self.same_weights,
            "total": self.total.to_dict(with_base),
            "layers": {layer: distance.to_dict(with_base) for layer, distance in self.layers.items()},
            "kinds": {kind: distance.to_dict(with_base) for kind, distance in self.kinds.items()},
            "tensors": {
                tensor.name: {"shape": list(tensor.shape), "dtypes": list(tensor.dtypes)}
                | tensor.distance.to_dict(with_base)
                for tensor in self.tensors
            },
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "shapes": {name: [list(a), list(b)] for name, (a, b) in self.shapes.items()},
            "not_in_base": list(self.not_in_base),
            "config": {key: dict(values) for key, values in self.config.items()},
            "tokenizer": list(self.tokenizer),
        }

    def _title(self) -> Iterator[str]:
        for role, label in (("a", self.a), ("b", self.b), ("base", self.base)):
            if label is not None:
                yield f"{role:<4} {printable(label)}"

    def _total_rows(self, total: Distance) -> list[tuple[str, str]]:
        counts = {"only in a": self.only_in_a, "only in b": self.only_in_b, "of other shapes": self.shapes}
        left_out = [f"{len(names):,} {which}" for which, names in counts.items() if names]
        rows = [("tensors left out", ", ".join(left_out))] if left_out else []
        rows += [
            ("elements", f"{total.num_elements:,}"),
            ("‖a−b‖", number(total.l2)),
            ("‖a−b‖/‖a‖", number(total.relative)),
            ("max |a−b|", number(total.max_abs)),
            ("cosine of a and b", _cosine_text(total.cosine)),
            ("equal elements", percent(total.equal_share)),
        ]
        if self.base is not None:
            rows += [("tensors not in the base, left out", f"{len(self.not_in_base):,}")] if self.not_in_base else []
            rows += [
                ("‖a−base‖", number(total.task_norm_a)),
                ("‖b−base‖", number(total.task_norm_b)),
                ("cosine of a−base and b−base", number(total.task_cosine)),
                ("elements that a and b both moved", f"{total.num_both_moved:,}"),
                ("... of these, in the same direction", percent(total.sign_agreement)),
            ]
        return rows

    def _notes(self) -> Iterator[str]:
        odd = [t for t in self.tensors if t.distance.num_non_finite or t.distance.num_non_finite_base]
        if odd:
            found = sum((tensor.distance for tensor in odd), Distance())
            in_base = "" if self.base is None else f", {found.num_non_finite_base:,} in the base"
            yield printable(
                f"not finite, left out above: {found.num_nan_a:,} NaN and {found.num_inf_a:,} infinite values in a, "
                f"{found.num_nan_b:,} and {found.num_inf_b:,} in b{in_base}: {_some([tensor.name for tensor in odd])}"
            )
        for name, (shape_a, shape_b) in self.shapes.items():
            yield printable(
                f"shapes differ, not compared: {name} is {shape_text(shape_a)} in a, {shape_text(shape_b)} in b"
            )
        for names, what in (
            (self.only_in_a, "only in a"),
            (self.only_in_b, "only in b"),
            (self.not_in_base, "not in the base"),
            ([t.name for t in self.tensors if t.dtypes[0] != t.dtypes[1]], "dtypes differ"),
        ):
            if names:
                yield printable(f"{what}: {_some(names)}")
        for key, values in self.config.items():
            a, b = (json.dumps(values[side]) if side in values else "absent" for side in "ab")
            yield printable(f"config.json: {key} is {a} in a, {b} in b")
        for line in self.tokenizer:
            yield printable(f"tokenizer: {line}")


def diff(a: Model, b: Model, *, base: Model | None = None, allow_pickle: bool = False, progress: bool = True) -> Diff:
    """Compare two models: folders (or hub ids), state dicts or modules, in any combination.

    For each tensor, and in total: ‖a−b‖, ‖a−b‖/‖a‖, max |a−b|, cosine of a and b, the share of equal elements, NaN and
    infinite values; with a ``base``, how a and b moved away from it: both norms, the cosine of a−base and b−base, and
    how often they moved an element in the same direction. See :class:`Distance` for the denominators. Also tensors that
    only one holds, shapes and dtypes that differ, and, of folders, differing config keys and tokenizers.

    Folders are streamed in bounded memory. Sums are in float64. Names that share one tensor count once.

    Raises MergeError (a ValueError) when a folder is no checkpoint that can be read, or when no tensor is in both.

    Example:
        >>> print(soupkit.diff("runs/sft1", "runs/sft2", base="runs/pretrained"))
    """
    first, second = _open(a, "a", allow_pickle), _open(b, "b", allow_pickle)
    origin = None if base is None else _open(base, "base", allow_pickle)
    names_a, names_b = first.names_beside(second), second.names_beside(first)
    shared = [name for name in names_a if name in names_b]
    shapes = {name: (_shape(first, name), _shape(second, name)) for name in shared}
    comparable = [name for name in shared if shapes[name][0] == shapes[name][1]]
    if not comparable:
        raise MergeError(
            f"{first.label} and {second.label} have no tensor of the same name and shape: nothing to compare"
        )
    sources: dict[str, list[Readable]] = {name: [first.tensors[name], second.tensors[name]] for name in comparable}
    not_in_base: list[str] = []
    if origin:
        for name in comparable:
            if name in origin.tensors and _shape(origin, name) == _shape(first, name):
                sources[name].append(origin.tensors[name])
            else:
                not_in_base.append(name)
    distances = streamed_sums(sources, _compare, Distance(), "diff", progress)
    return Diff(
        a=first.label,
        b=second.label,
        base=origin.label if origin else None,
        tensors=tuple(_tensor_distance(name, first, second, distances[name]) for name in comparable),
        only_in_a=tuple(name for name in names_a if name not in names_b),
        only_in_b=tuple(name for name in names_b if name not in names_a),
        shapes={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        not_in_base=tuple(not_in_base),
        config=_config_differences(first.config, second.config) if first.folder and second.folder else {},
        tokenizer=tuple(_tokenizer_differences(first.folder, second.folder)) if first.folder and second.folder else (),
    )


@dataclass(frozen=True)
class _TensorInMemory:
    """A tensor read like one of a folder; a block at a time comes to the CPU."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        flat = self.tensor.detach().reshape(-1)
        yield lambda start, stop: flat[start:stop].cpu()


@dataclass(frozen=True)
class _Side:
    """One of the models compared. ``ties``: name to the earlier name that shares its tensor, in memory only."""

    label: str
    tensors: Mapping[str, Readable]
    ties: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def names_beside(self, other: _Side) -> list[str]:
        """Its tensors, without tied ones that the other has tied too, or does not store, as folders do not."""
        return [
            name
            for name in self.tensors
            if name not in self.ties or (name in other.tensors and other.ties.get(name) != self.ties[name])
        ]


def _open(model: Model, role: str, allow_pickle: bool) -> _Side:
    if isinstance(model, (str, Path)):
        checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
        return _Side(checkpoint.label, checkpoint.tensors, config=checkpoint.config, folder=checkpoint.folder)
    state = model.state_dict() if isinstance(model, Module) else model
    if not isinstance(state, Mapping):
        raise MergeError(f"{role} is a {type(model).__name__}: give a checkpoint folder, a state dict or a module")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    owners: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and owners.setdefault(place, name) != name:
            ties[name] = owners[place]
    label = f"{role} ({type(model).__name__})"
    return _Side(label, {name: _TensorInMemory(tensor) for name, tensor in tensors.items()}, ties)


def _compare(blocks: Sequence[Tensor]) -> Distance:
    """The sums over one block of a, of b and, with a base, of the base; [n] elements each."""
    wide = [block.double() for block in blocks]
    a, b = wide[:2]
    # In their own dtype where they share it: float64 cannot tell large integers apart.
    num_equal = int(torch.eq(*(blocks[:2] if blocks[0].dtype == blocks[1].dtype else wide[:2])).sum())
    counts = {"num_elements": a.numel(), "num_equal": num_equal}
    finite = a.isfinite() & b.isfinite()
    if not finite.all():
        counts["num_equal"] += int((a.isnan() & b.isnan()).sum())
        for side, x in (("a", a), ("b", b)):
            counts |= {f"num_nan_{side}": int(x.isnan().sum()), f"num_inf_{side}": int(x.isinf().sum())}
        wide = [x[finite] for x in wide]
        a, b = wide[:2]
    difference = a - b
    sums = {
        "squares": _dot(difference, difference),
        "squares_a": _dot(a, a),
        "squares_b": _dot(b, b),
        "products": _dot(a, b),
        "max_abs": float(difference.abs().max()) if difference.numel() else 0.0,
    }
    return Distance(**counts, **sums, **_compare_task_vectors(*wide) if len(wide) == 3 else {})  # type: ignore[arg-type]


def _compare_task_vectors(a: Tensor, b: Tensor, base: Tensor) -> dict[str, float]:
    finite = base.isfinite()
    num_bad = base.numel() - int(finite.sum())
    if num_bad:
        a, b, base = a[finite], b[finite], base[finite]
    a, b = a - base, b - base
    both_moved = (a != 0) & (b != 0)
    return {
        "num_non_finite_base": num_bad,
        "task_squares_a": _dot(a, a),
        "task_squares_b": _dot(b, b),
        "task_products": _dot(a, b),
        "num_both_moved": int(both_moved.sum()),
        "num_same_sign": int((both_moved & ((a > 0) == (b > 0))).sum()),
    }


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x, y))


def _ratio(squares: float, squares_of_unit: float) -> float:
    if squares_of_unit == 0:
        return 0.0 if squares == 0 else math.inf
    return math.sqrt(squares / squares_of_unit)


def _cosine(products: float, squares_a: float, squares_b: float) -> float:
    lengths = math.sqrt(squares_a) * math.sqrt(squares_b)
    return min(max(products / lengths, -1.0), 1.0) if lengths else math.nan


def _flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Key, with dots between levels, to the values of the sides that have it."""
    sides = {"a": dict(_flattened(a)), "b": dict(_flattened(b))}
    found = {}
    for key in dict.fromkeys([*sides["a"], *sides["b"]]):
        values = {side: config[key] for side, config in sides.items() if key in config}
        if len(values) == 1 or values["a"] != values["b"]:
            found[key] = values
    return found


def _tokenizer_differences(a: Path, b: Path) -> Iterator[str]:
    tokens_a, tokens_b = tokens_of(a), tokens_of(b)
    if tokens_a is not None and tokens_b is not None:
        yield from _token_differences(tokens_a, tokens_b)
        merges = [read_json(folder / TOKENIZER_FILE).get("model", {}).get("merges") for folder in (a, b)]
        if merges[0] != merges[1]:
            yield f"the merges of {TOKENIZER_FILE} differ"
    for name in (TOKENIZER_FILE, *TOKENIZER_FILES):
        present = [(folder / name).is_file() for folder in (a, b)]
        if present[0] != present[1]:
            yield f"{name} is only in {'a' if present[0] else 'b'}"
        elif all(present) and name != TOKENIZER_FILE and (a / name).read_bytes() != (b / name).read_bytes():
            yield f"{name} differs"


def _token_differences(a: Mapping[str, int], b: Mapping[str, int]) -> Iterator[str]:
    for tokens, other, side in ((a, b, "a"), (b, a, "b")):
        only = [repr(token) for token in tokens if token not in other]
        if only:
            yield f"{len(only):,} tokens only in {side}: {_some(only)}"
    moved = [f"{token!r} ({a[token]} and {b[token]})" for token in a if token in b and a[token] != b[token]]
    if moved:
        yield f"{len(moved):,} tokens with different ids: {_some(moved)}"


def _tensor_distance(name: str, a: _Side, b: _Side, distance: Distance) -> TensorDistance:
    dtypes = (a.tensors[name].dtype, b.tensors[name].dtype)
    is_floating = any(dtype.is_floating_point for dtype in dtypes)
    return TensorDistance(name, _shape(a, name), (dtype_name(dtypes[0]), dtype_name(dtypes[1])), distance, is_floating)


def _distance_table(title: str, rows: Iterable[tuple[str, Distance]], with_base: bool) -> str:
    """A line for each; of task vectors rather than models where there is a base, since both do not fit a screen."""
    header = [title, "‖a−b‖/‖a‖"]
    header += (
        ["‖a−base‖", "‖b−base‖", "task cos", "same sign"] if with_base else ["‖a−b‖", "max |a−b|", "cosine", "equal"]
    )
    lines = []
    for name, distance in rows:
        cells = [printable(name), number(distance.relative)]
        if with_base:
            cells += [number(distance.task_norm_a), number(distance.task_norm_b)]
            cells += [number(distance.task_cosine), percent(distance.sign_agreement)]
        else:
            cells += [number(distance.l2), number(distance.max_abs)]
            cells += [_cosine_text(distance.cosine), percent(distance.equal_share)]
        lines.append(cells)
    return text_table(header, lines)


def _cosine_text(cosine: float) -> str:
    """Six digits; fine-tunings of one model are closer than that, and what is not 1 must not read as if it were."""
    gap = 1 - cosine
    return f"1−{gap:.2g}" if 1e-12 < gap < 5e-7 else number(cosine, 6)


def _shape(side: _Side, name: str) -> tuple[int, ...]:
    return tuple(side.tensors[name].shape)


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

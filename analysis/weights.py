"""Checkpoints as points of weight space: reading them, distances between them, and putting a model at a point.

The space is spanned by a model's floating-point parameters, tied ones counted once. Buffers (running statistics, say)
and integer parameters do not move: everywhere, also at a checkpoint, they keep the values that the model itself has.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import soupkit
from rlhf.models import load_causal_lm, require_checkpoint
from soupkit.api import average_recipe
from soupkit.checkpoint import base_and_adapter
from soupkit.hashing import new_digest

BLOCK = 2**18  # elements that are held in float64 at a time

Tensors = Mapping[str, Tensor]
Source = str | os.PathLike[str] | Tensors | nn.Module
"""A checkpoint: a folder, "BASE+ADAPTER" (a LoRA adapter folded into its base), a state dict, or a module."""


def named_sources(checkpoints: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """{name: checkpoint}; in a sequence, folders are named by their last path component."""
    if isinstance(checkpoints, Mapping):
        return dict(checkpoints)
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(f"checkpoints={os.fspath(checkpoints)!r}: expected several checkpoints; give a list or a dict")
    named: dict[str, Source] = {}
    for number, source in enumerate(checkpoints):
        if not is_folder(source):
            raise ValueError(
                f"checkpoint {number}: a {type(source).__name__} has no name; give a dict of name to checkpoint"
            )
        name = Path(source).resolve().name
        if name in named:
            raise ValueError(
                f"checkpoint {number}: {source} has the same name as {named[name]}; give a dict of name to checkpoint"
            )
        named[name] = source
    return named


def is_folder(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a checkpoint is to be loaded from files."""
    return isinstance(source, str | os.PathLike)


def load_model(sources: Mapping[str, Source], device: str | torch.device) -> PreTrainedModel:
    """The language model of the first folder, to be moved through weight space."""
    for source in sources.values():
        if is_folder(source):
            return load_causal_lm(os.fspath(source), device=device)
    raise ValueError(f"model: none given, and none of the checkpoints {list(sources)} is a folder; pass model=")


def moving_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that span the space: floating point, tied ones once, under their first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def movable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to be moved through weight space, in float32 or wider: coarser weights would round small steps away."""
    return copy.deepcopy(model).to(torch.promote_types(model.dtype, torch.float32))  # type: ignore[arg-type]


def detached(source: Source, model: nn.Module) -> Source:
    """The checkpoint, copied where it shares memory with ``model``, which is about to be overwritten."""
    if isinstance(source, str | os.PathLike):
        return source
    return _apart(source.state_dict() if isinstance(source, nn.Module) else source, model)


def _apart(tensors: Tensors, model: nn.Module) -> Tensors:
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        for name, tensor in tensors.items()
    }


def _state_dict(name: str, source: Source, model: nn.Module, dtype: torch.dtype | None) -> Tensors:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"checkpoint {name!r}: is a folder, but {type(model).__name__} cannot be loaded from one; give a state dict"
        )
    dtype = dtype or torch.promote_types(model.dtype, torch.float32)
    folder: Path | None = require_checkpoint(os.fspath(source))
    settings: dict[str, Any] = {}
    if base_and_adapter(os.fspath(source)):
        folded = soupkit.merge(average_recipe([os.fspath(source)]), dtype=dtype, progress=False)
        folder, settings = None, {"config": model.config, "state_dict": folded}
    # The annotation of from_pretrained leaves the report out.
    load: Any = type(model).from_pretrained
    loaded, report = load(folder, dtype=dtype, output_loading_info=True, **settings)
    # transformers fills missing tensors with random numbers and drops unexpected ones.
    for problem in ("missing", "unexpected"):
        if keys := sorted(report[f"{problem}_keys"]):
            raise ValueError(
                f"{source}: {len(keys)} {problem} tensors for {type(model).__name__} (first: {keys[:3]}); "
                "give whole checkpoints of one architecture"
            )
    return loaded.state_dict()


def working_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which points are computed: float32, or the parameter's own where that is wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


def read(name: str, source: Source, model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A checkpoint's tensors for :func:`moving_parameters`, on the model's device, in ``dtype`` (None: working dtype).

    Raises ValueError when names or shapes differ from the model's, when two tensors that are tied in the model differ,
    or when a value is not finite; FileNotFoundError when there is no such folder.
    """
    parameters = moving_parameters(model)
    widest = dtype or max(
        map(working_dtype, parameters.values()), key=lambda each: each.itemsize, default=torch.float32
    )
    tensors = _state_dict(name, source, model, widest)
    label = f"checkpoint {name!r}"
    _require(label, "has unexpected", tensors.keys() - parameters.keys() - model.state_dict().keys(), model)
    _require(label, "lacks", parameters.keys() - tensors.keys(), model)
    _check_ties(label, tensors, model)
    return {
        key: _fitted(label, key, tensors[key], parameter).to(parameter.device, dtype or working_dtype(parameter))
        for key, parameter in parameters.items()
    }


def read_direction(name: str, direction: Tensors, model: nn.Module) -> dict[str, Tensor]:
    """A direction's tensors for :func:`moving_parameters`, as :func:`read`; those that it lacks are zero.

    A tied weight goes by any of its names. Raises ValueError for what does not fit the model, is not finite, or is zero
    altogether.
    """
    parameters = moving_parameters(model)
    if not isinstance(direction, Mapping):
        raise ValueError(f"{name}: a {type(direction).__name__} is no direction; give a dict of name to tensor")
    known = dict(model.named_parameters(remove_duplicate=False))
    _require(name, "has unexpected", direction.keys() - known.keys(), model)
    _check_ties(name, direction, model)
    given = {id(known[alias]): tensor for alias, tensor in _apart(direction, model).items()}
    tensors = {}
    for key, parameter in parameters.items():
        if id(parameter) in given:
            tensor = _fitted(name, key, given[id(parameter)], parameter)
            tensors[key] = tensor.to(parameter.device, working_dtype(parameter))
        else:  # without memory of its own
            tensors[key] = torch.zeros((), dtype=working_dtype(parameter), device=parameter.device).expand_as(parameter)
    if not any(tensor.any() for tensor in tensors.values()):
        raise ValueError(f"{name}: is zero everywhere; give a direction that leads somewhere")
    return tensors


def _require(label: str, problem: str, keys: Set[str], model: nn.Module) -> None:
    if keys:
        raise ValueError(
            f"{label}: {problem} tensors for {type(model).__name__}, {len(keys)} of them (first: {sorted(keys)[:3]}); "
            "give tensors of one architecture"
        )


def _check_ties(label: str, tensors: Tensors, model: nn.Module) -> None:
    first_names: dict[int, str] = {}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        if alias in tensors:
            first = first_names.setdefault(id(parameter), alias)
            if alias != first and not torch.equal(tensors[alias], tensors[first]):
                raise ValueError(
                    f"{label}: {alias} differs from {first}, but the model ties the two; "
                    "give a model that does not tie them"
                )


def _fitted(label: str, key: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, once it is known to fit the parameter."""
    if tensor.shape != parameter.shape or not tensor.is_floating_point():
        raise ValueError(
            f"{label}: {key} is {tensor.dtype} of shape {list(tensor.shape)}, the model's is "
            f"{parameter.dtype} of shape {list(parameter.shape)}; give tensors of one architecture"
        )
    # The extremes are NaN where any value is, and take a tenth of the time of looking at every value.
    if tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
        raise ValueError(f"{label}: {key} has NaN or infinite values; give sound tensors")
    return tensor.detach()


def fingerprint(point: Tensors) -> str:
    """A hash of names, dtypes, shapes and bytes (XXH3, 128 bits): what tells two checkpoints apart."""
    digest = new_digest()
    for name, tensor in point.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        # A copy, as a tensor of one element may count as contiguous with strides that bytes cannot have.
        flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def subtract(a: Tensors, b: Tensors) -> dict[str, Tensor]:
    """a − b, tensor by tensor."""
    return {name: a[name] - b[name] for name in a}


def distance(a: Tensors, b: Tensors) -> float:
    """‖a − b‖₂ over all elements, accumulated in float64; no more than a tensor is held."""
    return math.hypot(*(norm({name: a[name] - b[name]}) for name in a))


def difference(point: dict[str, Tensor], origin: Tensors, source: Source) -> dict[str, Tensor]:
    """point − origin, where ``point`` is what was read of ``source``: in its place, unless that is the caller's."""
    addresses = {tensor.data_ptr() for tensor in point.values()}
    if not is_folder(source) or len(addresses) < len(point):
        return subtract(point, origin)
    return {name: tensor.sub_(origin[name]) for name, tensor in point.items()}


@torch.no_grad()
def inner(a: Tensors, b: Tensors) -> float:
    """⟨a, b⟩ over all elements, accumulated in float64: float32 sums over millions of elements are off by per cents."""
    blocks = ((a[name].reshape(-1).split(BLOCK), b[name].reshape(-1).split(BLOCK)) for name in a)
    return math.fsum(
        float((one.double() * other.double()).sum()) for pair in blocks for one, other in zip(*pair, strict=True)
    )


@torch.no_grad()
def norm(a: Tensors) -> float:
    """‖a‖₂ over all elements, accumulated in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in a.values()))


@torch.no_grad()
def put(
    model: nn.Module, origin: Tensors, directions: Sequence[Tensors] = (), coefficients: Sequence[float] = ()
) -> None:
    """Set the model's parameters to origin + Σᵢ cᵢ directionᵢ.

    Each point is computed anew from the same origin, never from the point before, so rounding does not accumulate. The
    sum is taken in the tensors' own dtype and rounded once to the model's.
    """
    for name, parameter in moving_parameters(model).items():
        total = origin[name]
        # Where dtypes agree, the sum is taken in the parameter itself: no memory, and the fewest passes over it.
        out = parameter if parameter.dtype == total.dtype else None
        for direction, coefficient in zip(directions, coefficients, strict=True):
            total = torch.add(total, direction[name], alpha=coefficient, out=out)
        if total is not parameter:
            parameter.copy_(total)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back the model's parameters and buffers, bit for bit, when the block ends, by whatever exception."""
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

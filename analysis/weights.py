"""Checkpoints as points of weight space: reading them, distances between them, and putting a model at a point.

The space is spanned by a model's floating-point parameters, tied ones counted once. Buffers (running statistics, say)
and integer parameters do not move: everywhere, also at a checkpoint, they keep the values that the model itself has.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models import load_causal_lm

Tensors = Mapping[str, Tensor]
Source = str | os.PathLike[str] | Tensors | nn.Module
"""A checkpoint: a folder, a state dict, or a module."""


def named_sources(checkpoints: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """{name: checkpoint}; in a sequence, folders are named by their last path component."""
    if isinstance(checkpoints, Mapping):
        return dict(checkpoints)
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(f"checkpoints={os.fspath(checkpoints)!r}: expected several checkpoints; give a list or a dict")
    named: dict[str, Source] = {}
    for number, source in enumerate(checkpoints):
        if not isinstance(source, str | os.PathLike):
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


def load_model(sources: Mapping[str, Source], device: str | torch.device) -> PreTrainedModel:
    """The language model of the first folder, to be moved through weight space."""
    for source in sources.values():
        if isinstance(source, str | os.PathLike):
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
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        for name, tensor in tensors.items()
    }


def _state_dict(name: str, source: Source, model: nn.Module) -> Tensors:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"checkpoint {name!r}: is a folder, but {type(model).__name__} cannot be loaded from one; give a state dict"
        )
    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no config.json; expected a checkpoint folder as save_pretrained writes it")
    # The annotation of from_pretrained leaves the report out.
    load: Any = type(model).from_pretrained
    loaded, report = load(
        os.fspath(source), dtype=torch.promote_types(model.dtype, torch.float32), output_loading_info=True
    )
    # transformers fills missing tensors with random numbers and drops unexpected ones.
    for problem in ("missing", "unexpected"):
        if keys := sorted(report[f"{problem}_keys"]):
            raise ValueError(
                f"{source}: {len(keys)} {problem} tensors for {type(model).__name__} (first: {keys[:3]}); "
                "give whole checkpoints of one architecture"
            )
    return loaded.state_dict()


def read(name: str, source: Source, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors for :func:`moving_parameters`, on the model's device, in float32 (float64 stays float64).

    Raises ValueError when names or shapes differ from the model's, when two tensors that are tied in the model differ,
    or when a value is not finite.
    """
    tensors = _state_dict(name, source, model)
    parameters = moving_parameters(model)
    _check_names(name, tensors, model)
    point = {}
    for key, parameter in parameters.items():
        tensor = tensors[key].detach()
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise ValueError(
                f"checkpoint {name!r}: {key} is {tensor.dtype} of shape {list(tensor.shape)}, the model's is "
                f"{parameter.dtype} of shape {list(parameter.shape)}; give checkpoints of one architecture"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"checkpoint {name!r}: {key} has NaN or infinite values; give a sound checkpoint")
        point[key] = tensor.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    return point


def _check_names(name: str, tensors: Tensors, model: nn.Module) -> None:
    needed = moving_parameters(model)
    missing = sorted(needed.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - needed.keys() - model.state_dict().keys())
    for problem, keys in (("lacks", missing), ("has unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"checkpoint {name!r}: {problem} tensors for {type(model).__name__}, {len(keys)} of them (first: "
                f"{keys[:3]}); give checkpoints of one architecture"
            )
    first_names = {id(parameter): first for first, parameter in needed.items()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.get(id(parameter), alias)
        if alias != first and alias in tensors and not torch.equal(tensors[alias], tensors[first]):
            raise ValueError(
                f"checkpoint {name!r}: {alias} differs from {first}, but the model ties the two; "
                "give a model that does not tie them"
            )


def fingerprint(point: Tensors) -> str:
    """SHA-256 of names, dtypes, shapes and bytes: what tells two checkpoints apart."""
    digest = hashlib.sha256()
    for name, tensor in point.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def subtract(a: Tensors, b: Tensors) -> dict[str, Tensor]:
    """a − b, tensor by tensor."""
    return {name: a[name] - b[name] for name in a}


def combine(origin: Tensors, directions: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """origin + Σᵢ cᵢ directionᵢ, tensor by tensor."""
    return {name: _combined(name, origin, directions, coefficients) for name in origin}


def _combined(name: str, origin: Tensors, directions: Sequence[Tensors], coefficients: Sequence[float]) -> Tensor:
    tensor = origin[name].clone()
    for direction, coefficient in zip(directions, coefficients, strict=True):
        tensor.add_(direction[name], alpha=coefficient)
    return tensor


def scale(a: Tensors, factor: float) -> dict[str, Tensor]:
    """factor · a, tensor by tensor."""
    return {name: tensor * factor for name, tensor in a.items()}


def inner(a: Tensors, b: Tensors) -> float:
    """⟨a, b⟩ over all elements, accumulated in float64: float32 sums over millions of elements are off by per cents."""
    return math.fsum(float((a[name].double() * b[name].double()).sum()) for name in a)


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
        parameter.copy_(_combined(name, origin, directions, coefficients))


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

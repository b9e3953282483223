"""Learned soups: mixing weights fitted by gradient on a held-out loss, one tensor of one candidate at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from tqdm import tqdm

from soupkit.api import Model, average, merge
from soupkit.blocks import BLOCK
from soupkit.checkpoint import open_checkpoint
from soupkit.errors import MergeError
from soupkit.fisher import requiring_grad
from soupkit.layers import layer_name
from soupkit.recipe import Recipe
from soupkit.selection import check_candidates
from soupkit.sources import TensorSource, load_tensor

Source = Tensor | TensorSource


@dataclass(frozen=True)
class LearnedSoup:
    """What :func:`learned_soup` found.

    ``weights``: float64, [n] for n candidates, or [G, n] where each of the G ``groups`` of tensors has its own; each
    row is positive and sums to 1. ``losses``: the held-out loss at each step, before that step's update. ``soup``: the
    candidates averaged with the final weights.
    """

    weights: Tensor
    groups: tuple[str, ...]
    losses: tuple[float, ...]
    soup: Any


@dataclass(frozen=True)
class _Slot:
    """One tensor of the model, its names in the candidates (several where it is tied), and where each has it."""

    names: tuple[str, ...]
    tensor: Tensor
    sources: tuple[Source, ...]
    group: int


def learned_soup(
    candidates: Sequence[Model],
    loss: Callable[[Module, int], Tensor],
    *,
    model: Module,
    steps: int,
    learning_rate: float = 0.05,
    per: Literal["model", "layer", "tensor"] = "model",
    temperature: Tensor | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> LearnedSoup:
    """Average candidates with weights that minimise a held-out loss: α = softmax(z), z by gradient descent (Adam).

        minimise over z:  loss(Σᵢ αᵢ θᵢ),  ∂L/∂αᵢ = ⟨∂L/∂θ, θᵢ⟩,  ∂L/∂zᵢ = αᵢ (∂L/∂αᵢ − Σⱼ αⱼ ∂L/∂αⱼ)

    All start with equal weights. Each step writes the mixture into ``model``, takes the gradient of the loss there, and
    multiplies it with the candidates, which are read twice a step, one tensor at a time. Memory: the model, one
    gradient, one copy of the model to restore it from, and one tensor, however many candidates there are in folders
    (the authors' code holds them all). The mixture is computed in float32 (float64 for float64 parameters), and rounded
    to the parameters' dtype: load a model in float32 for exact gradients.

    Tied parameters are one parameter. Floating-point buffers, such as BatchNorm's running statistics, are mixed with
    their group's weights too, but the gradient takes them for constants: one that is a group by itself keeps equal
    weights. Integer tensors stay the model's.

    Args:
        candidates: state dicts, modules or folders with the names and shapes of ``model.state_dict()``.
        loss: ``loss(model, step) -> scalar tensor`` on held-out data, ``step`` from 0: pick the batch by it.
        model: the module to compute the loss with, none of the candidates. Set its mode (train or eval) beforehand. Its
            weights, buffers and ``requires_grad`` are restored bit for bit afterwards, also after exceptions.
        steps: of Adam.
        learning_rate: of Adam, on z: about how much a log-ratio of two weights changes per step.
        per: one set of weights for the whole "model", one per "layer" (tensors outside numbered layers have one each),
            or one per "tensor". The published code does the last and calls it by layer.
        temperature: the paper's β, if wanted: a tensor (with requires_grad) that ``loss`` uses, for instance as a
            factor of the logits. It is fitted with the weights, in place, at the same learning rate.
        out: the folder to write the soup to (folders only). None: the soup is the candidates' kind, or a state dict.
        progress: show a progress bar on stderr.
        options: those of :func:`soupkit.average`, such as ``dtype`` and ``overwrite``; they apply to the soup.

    Raises:
        MergeError (a ValueError): candidates that do not fit the model or each other (before the first step), or a loss
            or gradient that is not finite, with its step.
        FileExistsError: ``out`` exists and ``overwrite`` is not set.

    Paper: Wortsman et al. 2022, "Model soups", appendix I, https://arxiv.org/abs/2203.05482
    """
    if per not in ("model", "layer", "tensor"):
        raise MergeError(f"per is {per!r}: choose 'model', 'layer' or 'tensor'")
    if steps < 1 or not 0 < learning_rate < math.inf:
        raise MergeError(f"steps is {steps} and learning_rate {learning_rate}: both must be positive")
    if temperature is not None and not temperature.requires_grad:
        raise MergeError("temperature does not require a gradient: create it with requires_grad=True")
    check_candidates(candidates, out, options)
    sources = [_sources(candidate, bool(options.get("allow_pickle"))) for candidate in candidates]
    slots, groups = _slots(model, sources, per)

    logits = torch.zeros(len(groups), len(candidates), dtype=torch.float64)
    extra = [] if temperature is None else [temperature]
    optimizer = torch.optim.Adam([logits, *extra], lr=learning_rate)
    parameters = [slot.tensor for slot in slots if isinstance(slot.tensor, Parameter)]
    losses = []
    with _preserved(model), requiring_grad(parameters):
        for step in tqdm(range(steps), desc="learned soup", disable=not progress, dynamic_ncols=True):
            weights = logits.softmax(dim=1)
            _write_mixture(slots, weights)
            value = loss(model, step)
            losses.append(_checked(value, step))
            gradients = torch.autograd.grad(value, [*parameters, *extra], allow_unused=True)
            logits.grad = _logit_gradient(slots, gradients, weights)
            if not logits.grad.isfinite().all():
                raise MergeError(f"the gradient at step {step} is not finite: check the data of that step")
            if temperature is not None:
                temperature.grad = gradients[-1]
            optimizer.step()
            del value, gradients  # the next step needs the memory
    weights = logits.softmax(dim=1)
    soup = _soup(candidates, slots, weights, per, out=out, progress=progress, **options)
    return LearnedSoup(weights[0] if per == "model" else weights, groups, tuple(losses), soup)


def _slots(model: Module, sources: Sequence[Mapping[str, Source]], per: str) -> tuple[list[_Slot], tuple[str, ...]]:
    """The model's floating-point tensors, tied ones once and parameters first, and the names of their groups."""
    state = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    names_of: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            names_of.setdefault(id(tensor), []).append(name)
    for number, tensors in enumerate(sources, start=1):
        _check_candidate(tensors, f"candidate {number}", state, list(names_of.values()))
    groups: dict[str, int] = {}
    slots = []
    for names in sorted(names_of.values(), key=lambda names: not isinstance(state[names[0]], Parameter)):
        group = {"model": "", "layer": layer_name(names[0]) or names[0], "tensor": names[0]}[per]
        found = tuple(next(tensors[name] for name in names if name in tensors) for tensors in sources)
        stored = tuple(name for name in names if name in sources[0])
        slots.append(_Slot(stored, state[names[0]], found, groups.setdefault(group, len(groups))))
    return slots, tuple(groups)


def _sources(candidate: Model, allow_pickle: bool) -> Mapping[str, Source]:
    if isinstance(candidate, (str, Path)):
        return open_checkpoint(candidate, allow_pickle=allow_pickle).tensors
    if isinstance(candidate, Module):
        candidate = candidate.state_dict()
    if not isinstance(candidate, Mapping):
        raise MergeError(f"found a {type(candidate).__name__} as a candidate: give state dicts, modules or folders")
    return {name: tensor for name, tensor in candidate.items() if isinstance(tensor, Tensor)}


def _check_candidate(
    tensors: Mapping[str, Source], label: str, state: Mapping[str, Tensor], tied: Sequence[Sequence[str]]
) -> None:
    """Raise MergeError when a candidate is not one set of weights for the model, apart from it in memory."""
    for name in tensors:
        if name not in state:
            raise MergeError(f"{label} has {name!r}, which the model lacks: give a model of the same architecture")
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()}
    for names in tied:
        found = [name for name in names if name in tensors]
        if not found:
            raise MergeError(f"{label} lacks {names[0]!r}, which the model has: give a model of the same architecture")
        source = tensors[found[0]]
        if tuple(source.shape) != tuple(state[names[0]].shape):
            raise MergeError(
                f"{names[0]!r} has shape {list(source.shape)} in {label} and {list(state[names[0]].shape)} in the "
                "model: give a model of the same size"
            )
        if isinstance(source, Tensor) and source.untyped_storage().data_ptr() in storages:
            raise MergeError(f"{label} shares weights with the model, which is written to: pass a copy of the model")
        for other in found[1:]:
            if not torch.equal(_read(source), _read(tensors[other])):
                raise MergeError(
                    f"the model ties {other!r} to {found[0]!r}, and in {label} they differ: give a model that does not"
                )


def _read(source: Source) -> Tensor:
    """A whole tensor."""
    return source.detach() if isinstance(source, Tensor) else load_tensor(source)


@torch.no_grad()
def _write_mixture(slots: Sequence[_Slot], weights: Tensor) -> None:
    """Set the model's tensors to Σᵢ αᵢ θᵢ."""
    for slot in slots:
        dtype = torch.promote_types(slot.tensor.dtype, torch.float32)
        total = torch.zeros_like(slot.tensor, dtype=dtype)
        for source, weight in zip(slot.sources, weights[slot.group].tolist(), strict=True):
            total += _read(source).to(total.device, dtype) * weight
        slot.tensor.copy_(total)


def _logit_gradient(slots: Sequence[_Slot], gradients: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """∂L/∂z from ∂L/∂θ, in float64: αᵢ (∂L/∂αᵢ − Σⱼ αⱼ ∂L/∂αⱼ). Shape [G, n]."""
    of_weights = torch.zeros_like(weights)
    for slot, gradient in zip(slots, gradients, strict=False):  # buffers come last and have none
        if gradient is not None:  # tensors that took no part
            for index, source in enumerate(slot.sources):
                of_weights[slot.group, index] += _dot(gradient, _read(source).to(gradient.device))
    return weights * (of_weights - (weights * of_weights).sum(dim=1, keepdim=True))


def _dot(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ in float64, block by block: candidates are alike, and their differences would drown in float32 sums."""
    pairs = zip(a.reshape(-1).split(BLOCK), b.reshape(-1).split(BLOCK), strict=True)
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in pairs)


def _checked(value: Any, step: int) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise MergeError(f"loss gave no scalar with a gradient at step {step}: return a tensor computed with the model")
    number = float(value.detach())
    if not math.isfinite(number):
        raise MergeError(f"the loss at step {step} is {number}: check the data of that step")
    return number


@contextmanager
def _preserved(model: Module) -> Iterator[None]:
    """Parameters and buffers as they were when the block ends, bit for bit, by whatever exception."""
    tensors = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in zip(tensors, copies, strict=True):
                tensor.copy_(saved)


def _soup(candidates: Sequence[Model], slots: Sequence[_Slot], weights: Tensor, per: str, **options: Any) -> Any:
    if per == "model":
        return average(candidates, weights[0].tolist(), **options)
    # The first filter that a name contains decides, so the longest come first: no name contains a longer one.
    rows = {name: slot.group for slot in slots for name in slot.names}
    names = sorted(rows, key=len, reverse=True)
    settings: list[dict[str, Any]] = [
        {"weight": [{"filter": name, "value": float(weights[rows[name], index])} for name in names]}
        for index in range(len(candidates))
    ]
    return merge(Recipe("linear", candidates, model_parameters=settings), **options)

"""Soups in memory: of tensors, of state dicts and of modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from soupkit.blocks import NonFinite, Reader, merged_blocks, require_equal, steady_torch
from soupkit.errors import MergeError
from soupkit.methods import Method
from soupkit.planning import plan_tensors


def merge_tensors(
    tensors: Sequence[Tensor], method: Method, parameters: Mapping[str, Any], dtype: torch.dtype | None
) -> Tensor:
    """The soup of single tensors."""
    return merge_state_dicts([{"tensor": tensor} for tensor in tensors], method, parameters, dtype)["tensor"]


def merge_modules(
    modules: Sequence[Module], method: Method, parameters: Mapping[str, Any], dtype: torch.dtype | None
) -> Module:
    """A copy of the first module with merged parameters and persistent buffers.

    Tied parameters stay one parameter. Buffers that are not persistent, hooks and other attributes are the first's.
    """
    states = [_tensors_only(module.state_dict()) for module in modules]
    merged = merge_state_dicts(states, method, parameters, dtype)
    soup = copy.deepcopy(modules[0])
    # Swapping .data keeps each Parameter object, and with it ties, hooks and requires_grad.
    for name, tensor in _tensors_only(soup.state_dict(keep_vars=True)).items():
        tensor.data = merged[name]
    return soup


def merge_state_dicts(
    states: Sequence[Mapping[str, Tensor]], method: Method, parameters: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The soup of state dicts, on the first one's devices. Names that share one tensor share one in the soup."""
    labels = [f"ingredient {number}" for number in range(1, len(states) + 1)]
    for state, label in zip(states, labels, strict=True):
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise MergeError(f"{name!r} in {label} is a {type(value).__name__}, not a tensor: remove it first")
    plans = plan_tensors(states, labels, dtype)
    ties = _common_ties(states, labels)
    non_finite = NonFinite()
    soup: dict[str, Tensor] = {}
    with steady_torch():
        for plan in plans:
            if plan.must_be_equal:
                require_equal(plan, _readers(states, plan.name), labels)
        for plan in plans:
            if plan.name in ties:
                soup[plan.name] = soup[ties[plan.name]]
                continue
            tensor = torch.empty(plan.shape, dtype=plan.dtype, device=states[0][plan.name].device)
            flat = tensor.view(-1)
            for start, block in merged_blocks(plan, method, parameters, _readers(states, plan.name), non_finite):
                flat[start : start + block.numel()] = block
            soup[plan.name] = tensor
    non_finite.warn()
    return soup


def _readers(states: Sequence[Mapping[str, Tensor]], name: str) -> list[Reader]:
    device = states[0][name].device
    return [_reader(state[name], device) for state in states]


def _reader(tensor: Tensor, device: torch.device) -> Reader:
    flat = tensor.detach().reshape(-1)
    return lambda start, stop: flat[start:stop].to(device)


def _tensors_only(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A module's state without the extra state that some modules keep in it."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _common_ties(states: Sequence[Mapping[str, Tensor]], labels: Sequence[str]) -> dict[str, str]:
    """Name to the earlier name it shares its tensor with. Raises MergeError when ingredients tie different names."""
    ties_of = [_ties({name: state[name] for name in states[0]}) for state in states]
    ties = {name: partner for found in ties_of for name, partner in found.items()}
    for state, found, label in zip(states, ties_of, labels, strict=True):
        for name, partner in ties.items():
            if found.get(name) != partner and not torch.equal(state[name], state[partner]):
                raise MergeError(
                    f"{name!r} and {partner!r} are one tied tensor in another ingredient but differ in {label}: "
                    "tie or untie them in all ingredients"
                )
    return ties


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    owners: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and owners.setdefault(place, name) != name:
            ties[name] = owners[place]
    return ties

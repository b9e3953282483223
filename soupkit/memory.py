"""Soups in memory: of tensors, of state dicts and of modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from soupkit.blocks import Findings, Readers, require_equal
from soupkit.engine import Progress, Streams, run, sink_into, tensor_tasks
from soupkit.errors import MergeError
from soupkit.methods import find_method
from soupkit.planning import Models, TensorPlan, parameters_by_name, plan_tensors
from soupkit.recipe import Recipe
from soupkit.sources import Reader, in_order

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class MemoryOptions:
    """How a merge in memory is run."""

    dtype: torch.dtype | None
    allow_nonfinite: bool
    num_threads: int


def merge_tensors(recipes: Sequence[Recipe], options: MemoryOptions) -> list[Tensor]:
    """The soups of single tensors, one for each recipe."""
    named = [_replaced(recipe, lambda tensor: {"tensor": tensor}) for recipe in recipes]
    return [soup["tensor"] for soup in merge_state_dicts(named, options)]


def merge_modules(recipes: Sequence[Recipe], options: MemoryOptions) -> list[Module]:
    """Copies of the first module with merged parameters and persistent buffers, one for each recipe.

    Tied parameters stay one parameter. Buffers that are not persistent, hooks and other attributes are the first's.
    """
    states = [_replaced(recipe, lambda module: _tensors_only(module.state_dict())) for recipe in recipes]
    soups = [_shell(recipe.models[0]) for recipe in recipes]  # first: a module that cannot be copied fails at once
    for soup, merged in zip(soups, merge_state_dicts(states, options), strict=True):
        # Swapping .data keeps each Parameter object, and with it ties, hooks and requires_grad.
        for name, tensor in _tensors_only(soup.state_dict(keep_vars=True)).items():
            tensor.data = merged[name]
    return soups


def merge_state_dicts(recipes: Sequence[Recipe], options: MemoryOptions) -> list[dict[str, Tensor]]:
    """The soups of state dicts, on the first one's devices, one for each recipe; recipes differ in parameters alone.

    Names that share one tensor share one in the soup.
    """
    recipe = recipes[0]
    models = _models(recipe)
    merged: list[Any] = models.with_base
    plans = plan_tensors(models, options.dtype, parameters_by_name(recipes, recipe.models[0]))
    ties = _common_ties(merged, models.labels)
    for plan in plans:
        if plan.must_be_equal:
            require_equal(plan, _readers(recipe, models.labels, plan.name))
    soups: list[dict[str, Tensor]] = [{} for _ in recipes]
    findings = Findings(options.allow_nonfinite)
    tasks, progress = [], Progress(0, recipe.method, shown=False)
    for plan in plans:
        device = recipe.models[0][plan.name].device
        for soup in soups:
            soup[plan.name] = (
                soup[ties[plan.name]] if plan.name in ties else torch.empty(plan.shape, dtype=plan.dtype, device=device)
            )
        if plan.name not in ties:
            tasks += _tasks(recipe, plan, models.labels, soups, findings, progress, device)
    run(tasks, options.num_threads, progress)
    findings.warn()
    return soups


def _tasks(
    recipe: Recipe,
    plan: TensorPlan,
    labels: Sequence[str],
    soups: Sequence[Mapping[str, Tensor]],
    findings: Findings,
    progress: Progress,
    device: torch.device,
) -> list[Any]:
    sink = sink_into([soup[plan.name].view(-1) for soup in soups])

    def open_streams(start: int, stop: int) -> AbstractContextManager[Streams]:
        return nullcontext(Streams(_readers(recipe, labels, plan.name), sink))

    return tensor_tasks(plan, find_method(recipe.method), open_streams, findings, progress, device)


def _models(recipe: Recipe) -> Models:
    labels = in_order(
        [f"ingredient {number}" for number in range(1, len(recipe.models) + 1)],
        None if recipe.base is None else "the base",
        [f"Fisher estimate {number}" for number in range(1, len(recipe.fishers) + 1)],
    )
    states: list[State] = in_order(recipe.models, recipe.base, recipe.fishers)
    for state, label in zip(states, labels, strict=True):
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise MergeError(f"{name!r} in {label} is a {type(value).__name__}, not a tensor: remove it first")
    return Models(recipe.models, recipe.base, recipe.fishers, labels)


def _replaced(recipe: Recipe, change: Any) -> Recipe:
    """The recipe with every model changed to a state dict."""
    base = None if recipe.base is None else change(recipe.base)
    fishers = [change(f) if not isinstance(f, Mapping) else f for f in recipe.fishers]
    return replace(recipe, models=[change(m) for m in recipe.models], base=base, fishers=fishers)


def _readers(recipe: Recipe, labels: Sequence[str], name: str) -> Readers:
    base = None if recipe.base is None else _reader(recipe.base[name])
    fishers = [_reader(fisher[name]) for fisher in recipe.fishers] if recipe.models[0][name].is_floating_point() else []
    return Readers([_reader(state[name]) for state in recipe.models], base, fishers, labels)


def _reader(tensor: Tensor) -> Reader:
    flat = tensor.detach().reshape(-1)
    return lambda start, stop: flat[start:stop]


def _shell(module: Module) -> Module:
    """A copy of a module but for the values of its state, which are the bulk of it and would not be needed."""
    state = _tensors_only(module.state_dict(keep_vars=True)).values()
    empty: dict[int, Any] = {}
    for tensor in state:
        values = tensor.data.new_empty(0)
        empty[id(tensor)] = type(tensor)(values, tensor.requires_grad) if isinstance(tensor, Parameter) else values
    return copy.deepcopy(module, empty)


def _tensors_only(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A module's state without the extra state that some modules keep in it."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _common_ties(states: Sequence[State], labels: Sequence[str]) -> dict[str, str]:
    """Name to the earlier name it shares its tensor with. Raises MergeError when models tie different names."""
    ties_of = [shared_tensors({name: state[name] for name in states[0]}) for state in states]
    ties = {name: partner for found in ties_of for name, partner in found.items()}
    for state, found, label in zip(states, ties_of, labels, strict=False):
        for name, partner in ties.items():
            if found.get(name) != partner and not torch.equal(state[name], state[partner]):
                raise MergeError(
                    f"{name!r} and {partner!r} are one tied tensor in another model but differ in {label}: "
                    "tie or untie them in all models"
                )
    return ties


def shared_tensors(state: State) -> dict[str, str]:
    """Name to the earlier name that it shares its tensor with: the same memory, seen the same way."""
    owners: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and owners.setdefault(place, name) != name:
            ties[name] = owners[place]
    return ties

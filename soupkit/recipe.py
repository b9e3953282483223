"""Recipes: what a soup is made of, and which value every parameter has for each of its tensors.

The forms of recipe files are read in ``recipe_forms``, and one parameter's setting is explained in ``settings``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from soupkit.errors import MergeError
from soupkit.files import expanded
from soupkit.layers import stack_sizes
from soupkit.methods import Method, Parameter, find_method
from soupkit.recipe_forms import read_content, read_file, read_ours
from soupkit.settings import EVERY_TENSOR, Settings, check_settings, evaluate, filters_of, parse_settings, values_of
from soupkit.tables import dtype_name


@dataclass(frozen=True)
class Recipe:
    """A soup's method, ingredients and parameters.

    Attributes:
        method: a name of ``soupkit.METHODS``.
        models: the ingredients, all of one kind: folders, hub ids, ``adapter`` pairs such as ``model+lora``, state
            dicts, modules or tensors. The base is never among them.
        base: the model that task vectors start from, for methods that take one.
        parameters: name to setting, for the whole merge. A list is a gradient over the layers, never one value per
            model.
        model_parameters: name to setting, one mapping per model; they precede ``parameters``.
        dtype: of the soup; None is the ingredients' own. It is the dtype of what is written: ingredients are never
            cast down before the arithmetic.
        fishers: Fisher information, one per model, for the method that weights by it.
        tokenizer: None (all models share one), "base" (the base's; without a base, the first model's), "union", or
            the folder that has it.
        num_layers: how many layers the models must have; None is any number. See :func:`check_names`.

    Settings are brought to one form: text such as "1e-4", which YAML reads as a string, becomes a number; each filter
    becomes {"filter": substring, "value": ...}, "*" being every tensor.

    Raises:
        MergeError (a ValueError): a setting is neither a value, nor a gradient, nor filters.
    """

    method: str
    models: Sequence[Any]
    base: Any = None
    parameters: Settings = field(default_factory=dict)
    model_parameters: Sequence[Settings] = ()
    dtype: str | torch.dtype | None = None
    fishers: Sequence[Any] = ()
    tokenizer: str | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.models, (str, Path, Mapping, torch.Tensor, torch.nn.Module)):
            raise MergeError(f"models is one {type(self.models).__name__}: give a list of models")
        models = tuple(self.models)
        own = tuple(parse_settings(settings) for settings in self.model_parameters) or tuple({} for _ in models)
        object.__setattr__(self, "models", models)
        object.__setattr__(self, "parameters", parse_settings(self.parameters))
        object.__setattr__(self, "model_parameters", own)
        object.__setattr__(self, "fishers", tuple(self.fishers))

    def validate(self) -> None:
        """Raise MergeError unless the method exists and takes these models and parameters, with these values."""
        method = find_method(self.method)
        method.require_fit(self.method, len(self.models), self.base is not None, len(self.fishers))
        if len(self.model_parameters) != len(self.models):
            raise MergeError(
                f"found parameters of {len(self.model_parameters)} models for {len(self.models)} models: give one "
                "mapping per model, {} where a model has none of its own"
            )
        check_settings(self.parameters, self.method, method)
        _require_enough_models(self.parameters, method, len(self.models))
        for number, (model, own) in enumerate(zip(self.models, self.model_parameters, strict=True), start=1):
            owner = f"model {model if isinstance(model, (str, Path)) else number}"
            check_settings(own, self.method, method, owner)
            _require_settings([own, self.parameters], self.method, method, owner)

    def to_dict(self) -> dict[str, Any]:
        """The recipe in our form, ready for JSON or YAML. Raises MergeError where a model is not a path."""
        content: dict[str, Any] = {"method": self.method}
        if self.base is not None:
            content["base"] = _path_text(self.base)
        fishers = self.fishers or (None,) * len(self.models)
        content["models"] = [
            _entry(model, own, fisher)
            for model, own, fisher in zip(self.models, self.model_parameters, fishers, strict=True)
        ]
        if self.parameters:
            content["parameters"] = dict(self.parameters)
        if self.dtype is not None:
            content["dtype"] = dtype_name(self.dtype)
        if self.tokenizer is not None:
            content["tokenizer"] = self.tokenizer
        if self.num_layers is not None:
            content["num_layers"] = self.num_layers
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` wrote, not validated. Raises MergeError for what is not in our form."""
        return cls(**read_ours(content))


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """The validated recipe of a file (YAML, or JSON by its suffix) or of a file's content, in our form or mergekit's.

    A path in a file is taken as given where that exists (relative to the working directory), else relative to the
    file's folder where that exists, else as given: a hub id. In ``model+adapter`` each part is.

    In mergekit's form, ``out_dtype``, else ``dtype``, is the soup's dtype; unlike mergekit, ``dtype`` never casts the
    ingredients before the arithmetic. ``base_model`` is the base, also where it is listed among the models; for methods
    without a base (linear, slerp, karcher, passthrough) it is an ingredient, listed or not, as in mergekit, and comes
    first: for slerp it is the side of t = 0, and a soup's config and tokenizer are those of the first model.

    Raises:
        MergeError (a ValueError): anything unknown, unsupported or out of range, as one line that names the file, the
            key and what to do.

    Example:
        >>> load_recipe({"method": "slerp", "models": ["a", "b"], "parameters": {"t": [0, 0.5, 1]}}).parameters
        {'t': [0, 0.5, 1]}
    """
    path = None if isinstance(source, Mapping) else expanded(source)
    content = source if path is None else read_file(path)
    try:
        recipe = Recipe(**read_content(content))
        if path is not None:
            recipe = _located(recipe, path.parent)
        recipe.validate()
    except MergeError as error:
        raise MergeError(f"{'recipe' if path is None else source}: {error}") from None
    return recipe


def check_names(recipe: Recipe, names: Iterable[str]) -> None:
    """Compare what a recipe says of the models with their tensors' names.

    Raises MergeError when the longest stack of layers has not ``num_layers`` layers; warns of filters without a tensor.
    """
    names = list(names)
    found = max(stack_sizes(names).values(), default=0)
    if recipe.num_layers not in (None, found):
        raise MergeError(
            f"the recipe's models have {recipe.num_layers} layers, and these have {found}: soupkit merges whole "
            f"models, so write layer_range: [0, {found}] (num_layers: {found} in our form)"
        )
    for settings in (recipe.parameters, *recipe.model_parameters):
        for key, setting in settings.items():
            for text in filters_of(setting):
                if text != EVERY_TENSOR and not any(text in name for name in names):
                    warnings.warn(f"filter {text!r} of parameter {key!r} is in no tensor's name", stacklevel=2)


def resolve(recipe: Recipe, method: Method, name: str, position: float) -> dict[str, Any]:
    """The value of each of the method's parameters for one tensor; one per model for the parameters that models have.

    A model's own setting precedes the recipe's, which precedes the method's default. A setting with filters gives the
    value of the first filter that is part of ``name``; where none is, the next setting in that order counts. A gradient
    v₀ … vₙ gives (1 − f) vᵢ + f vᵢ₊₁, where i and f are the whole and the fractional part of n · ``position``; truth
    values are not interpolated: vᵢ. ``position`` lies in [0, 1], as ``layers.layer_positions`` gives it.

    Raises MergeError when a parameter without a default has no value for the tensor.
    """
    values: dict[str, Any] = {}
    for key, parameter in method.parameters.items():
        if not parameter.per_ingredient:
            values[key] = _value(key, parameter, (recipe.parameters,), name, position)
            continue
        values[key] = [
            _value(key, parameter, (own, recipe.parameters), name, position) for own in recipe.model_parameters
        ]
    return values


def _value(key: str, parameter: Parameter, scopes: Sequence[Settings], name: str, position: float) -> Any:
    for settings in scopes:
        if key in settings:
            value = evaluate(settings[key], parameter.kind, name, position)
            if value is not None:
                return parameter.check(key, value)
    if parameter.required:
        raise MergeError(f"parameter {key!r} has no value for tensor {name!r}: add an entry without a filter")
    return parameter.default


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths of models as they are seen from here, for one from a file in ``folder``."""
    here = partial(_seen_from_here, folder=folder)
    return replace(
        recipe,
        models=[here(model) for model in recipe.models],
        base=recipe.base and here(recipe.base),
        fishers=[here(fisher) for fisher in recipe.fishers],
        tokenizer=recipe.tokenizer if recipe.tokenizer in (None, "base", "union") else here(recipe.tokenizer),
    )


def _seen_from_here(model: str, folder: Path) -> str:
    """A model's path as given where that exists, else within ``folder`` where that exists, else as given."""
    if expanded(model).exists():
        return model
    if (folder / model).exists():
        return str(folder / model)
    parts = model.split("+")
    return model if len(parts) == 1 else "+".join(_seen_from_here(part, folder) for part in parts)


def _require_enough_models(settings: Settings, method: Method, num_models: int) -> None:
    """Refuse to take more models than there are."""
    for key in settings.keys() & {key for key, parameter in method.parameters.items() if parameter.counts_models}:
        asked = max(values_of(settings[key]))
        if asked > num_models:
            raise MergeError(f"{key} is {asked}, and there are {num_models} models: choose at most {num_models}")


def _require_settings(scopes: Sequence[Settings], name: str, method: Method, owner: str) -> None:
    """Refuse a recipe that lacks what the method requires, for the whole merge (the last scope) or for one model."""
    for key, parameter in method.parameters.items():
        if parameter.required and not any(key in settings for settings in scopes):
            whose = f"{owner}: " if parameter.per_ingredient else ""
            raise MergeError(f"{whose}{name} needs the parameter {key!r} ({parameter.meaning})")


def _path_text(model: Any) -> str:
    if not isinstance(model, (str, Path)):
        raise MergeError(f"a {type(model).__name__} cannot be written down in a recipe: save the model in a folder")
    return str(model)


def _entry(model: Any, own: Settings, fisher: Any) -> str | dict[str, Any]:
    """One model in our form."""
    path = _path_text(model)
    extra = {} if fisher is None else {"fisher": _path_text(fisher)}
    return {"model": path, **own, **extra} if own or extra else path

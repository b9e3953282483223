"""Recipes: what a soup is made of, and which value every parameter has for each of its tensors.

A recipe file (YAML or JSON) comes in two forms, told apart by their keys; docs/recipes.md teaches both:

- ours: ``method``, ``base``, ``models``, ``parameters``, ``dtype``, ``tokenizer``, ``num_layers``;
- mergekit's: ``merge_method``, ``models`` or ``slices`` with one slice of whole models, ``base_model``, ``parameters``,
  ``dtype``, ``out_dtype``, ``tokenizer_source`` or ``tokenizer``.

What we do not support is refused by name and never ignored, with two exceptions that cannot change a soup: mergekit's
``int8_mask``, a choice of how its masks are stored, and parameters of the base, which gets a warning.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from soupkit.errors import MergeError
from soupkit.methods import Method, Parameter, find_method

# A value, a gradient over the layers (a list of values), or a list of {"filter": substring, "value": either of them}.
Setting = bool | int | float | list[Any]
Settings = Mapping[str, Setting]
Source = tuple[str, Settings]  # a model in mergekit's form, with its parameters

EVERY_TENSOR = "*"
WITHOUT_EFFECT = "int8_mask"
LAYER_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")

OUR_KEYS = ("method", "base", "models", "parameters", "dtype", "tokenizer", "num_layers")
MERGEKIT_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
# Keys that mergekit knows and we do not, with what to do instead.
NOT_SUPPORTED = {
    "modules": "merge one module at a time, with 'models'",
    "chat_template": "set it on the soup's tokenizer afterwards",
    "residual_weight": "mergekit does not use it either: remove it",
    "random_seed": "write parameters: {seed: NUMBER}",
    "tokens": "the soup's tokens come from 'source' alone: remove it",
    "pad_to_multiple_of": "resize the soup's embeddings afterwards",
    "override_architecture": "soupkit goes by tensor names: remove it",
}


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
        own = tuple(_settings(settings) for settings in self.model_parameters) or tuple({} for _ in models)
        object.__setattr__(self, "models", models)
        object.__setattr__(self, "parameters", _settings(self.parameters))
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
        _check_settings(self.parameters, self.method, method)
        for number, (model, own) in enumerate(zip(self.models, self.model_parameters, strict=True), start=1):
            owner = f"model {model if isinstance(model, (str, Path)) else number}"
            _check_settings(own, self.method, method, owner)
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
            content["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.tokenizer is not None:
            content["tokenizer"] = self.tokenizer
        if self.num_layers is not None:
            content["num_layers"] = self.num_layers
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` wrote, not validated. Raises MergeError for what is not in our form."""
        return _read_ours(content, None)


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
    if isinstance(source, Mapping):
        label, folder = "recipe", None
        content: Any = source
    else:
        label, folder = str(source), Path(source).expanduser().parent
        content = _read_file(Path(source).expanduser())
    try:
        recipe = _read(content, folder)
        recipe.validate()
    except MergeError as error:
        raise MergeError(f"{label}: {error}") from None
    return recipe


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor lies along the layers, from 0 (first layer) to 1 (last): i / (L − 1) for layer i of L.

    The first part of a name that is a number is the layer: 3 in ``model.layers.3.mlp.experts.5.weight``. Names with
    the same text before it form one stack, and L is one more than the stack's largest number, so that an encoder and a
    decoder have positions of their own. A stack of one layer is at 1, tensors outside stacks are at 0, as in mergekit.
    """
    names = list(names)
    sizes = _stack_sizes(names)
    positions = {}
    for name in names:
        stack, layer = _layer_of(name)
        positions[name] = layer / (sizes[stack] - 1) if sizes.get(stack, 0) > 1 else float(stack in sizes)
    return positions


def check_names(recipe: Recipe, names: Iterable[str]) -> None:
    """Compare what a recipe says of the models with their tensors' names.

    Raises MergeError when the longest stack of layers has not ``num_layers`` layers; warns of filters without a tensor.
    """
    names = list(names)
    found = max(_stack_sizes(names).values(), default=0)
    if recipe.num_layers not in (None, found):
        raise MergeError(
            f"the recipe's models have {recipe.num_layers} layers, and these have {found}: soupkit merges whole "
            f"models, so write layer_range: [0, {found}] (num_layers: {found} in our form)"
        )
    for settings in (recipe.parameters, *recipe.model_parameters):
        for key, setting in settings.items():
            for text in _filters(setting):
                if text != EVERY_TENSOR and not any(text in name for name in names):
                    warnings.warn(f"filter {text!r} of parameter {key!r} is in no tensor's name", stacklevel=2)


def resolve(recipe: Recipe, method: Method, name: str, position: float) -> dict[str, Any]:
    """The value of each of the method's parameters for one tensor; one per model for the parameters that models have.

    A model's own setting precedes the recipe's, which precedes the method's default. A setting with filters gives the
    value of the first filter that is part of ``name``; where none is, the next setting in that order counts. A gradient
    v₀ … vₙ gives (1 − f) vᵢ + f vᵢ₊₁, where i and f are the whole and the fractional part of n · ``position``; truth
    values are not interpolated: vᵢ. ``position`` lies in [0, 1], as :func:`layer_positions` gives it.

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
            value = _evaluate(settings[key], parameter.kind, name, position)
            if value is not None:
                return parameter.check(key, value)
    if parameter.required:
        raise MergeError(f"parameter {key!r} has no value for tensor {name!r}: add an entry without a filter")
    return parameter.default


def _evaluate(setting: Setting, kind: type, name: str, position: float) -> Any:
    """The setting's value for a tensor; None where no filter fits."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for entry in setting:
            if entry["filter"] == EVERY_TENSOR or entry["filter"] in name:
                return _evaluate(entry["value"], kind, name, position)
        return None
    place = position * (len(setting) - 1)
    below = int(place)
    if kind is bool or below == place:
        return setting[below]
    fraction = place - below
    return (1 - fraction) * setting[below] + fraction * setting[below + 1]


def _stack_sizes(names: Iterable[str]) -> dict[str | None, int]:
    """Each stack's number of layers."""
    sizes: dict[str | None, int] = {}
    for name in names:
        stack, layer = _layer_of(name)
        if stack is not None:
            sizes[stack] = max(sizes.get(stack, 0), layer + 1)
    return sizes


def _layer_of(name: str) -> tuple[str | None, int]:
    """The stack (the text before the layer's number) and the layer; None and 0 for a tensor outside stacks."""
    found = LAYER_INDEX.search(name)
    return (name[: found.start()], int(found.group())) if found else (None, 0)


def _filters(setting: Setting) -> list[str]:
    entries = setting if isinstance(setting, list) else []
    return [entry["filter"] for entry in entries if isinstance(entry, Mapping)]


def _check_settings(settings: Settings, name: str, method: Method, owner: str = "") -> None:
    """Refuse what the method does not take; ``owner`` is the model that the settings belong to, if not to all."""
    prefix = f"{owner}: " if owner else ""
    for key, setting in settings.items():
        if key == WITHOUT_EFFECT:
            continue
        if key not in method.parameters:
            known = ", ".join(method.parameters) or "none"
            raise MergeError(f"{prefix}unknown parameter {key!r}: the parameters of {name} are {known}")
        parameter = method.parameters[key]
        if owner and not parameter.per_ingredient:
            raise MergeError(f"{prefix}{key!r} is no parameter of a single model: move it to the recipe's parameters")
        for value in _values(setting):
            try:
                parameter.check(key, value)
            except MergeError as error:
                raise MergeError(f"{prefix}{error}") from None


def _require_settings(scopes: Sequence[Settings], name: str, method: Method, owner: str) -> None:
    """Refuse a recipe that lacks what the method requires, for the whole merge (the last scope) or for one model."""
    for key, parameter in method.parameters.items():
        if parameter.required and not any(key in settings for settings in scopes):
            whose = f"{owner}: " if parameter.per_ingredient else ""
            raise MergeError(f"{whose}{name} needs the parameter {key!r} ({parameter.meaning})")


def _values(setting: Any) -> Iterator[bool | int | float]:
    """Every number and truth value in a setting."""
    if isinstance(setting, Mapping):
        yield from _values(setting["value"])
    elif isinstance(setting, list):
        for entry in setting:
            yield from _values(entry)
    else:
        yield setting


def _settings(settings: Any) -> dict[str, Setting]:
    if not isinstance(settings, Mapping):
        raise MergeError(f"parameters are {settings!r}: write name: value pairs")
    return {key: _setting(key, value) for key, value in settings.items()}


def _setting(key: str, value: Any) -> Setting:
    """A setting in its one form."""
    if not _has_filters(value):
        return _value_or_gradient(key, value)
    entries = [value] if isinstance(value, Mapping) else value
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise MergeError(f"parameter {key!r} mixes values and filters: give each value a filter")
    filtered = [_filtered(key, entry) for entry in entries]
    if any(entry["filter"] == EVERY_TENSOR for entry in filtered[:-1]):
        raise MergeError(f"parameter {key!r} has filters after the entry for all tensors: put that entry last")
    return filtered


def _has_filters(value: Any) -> bool:
    entries = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(entry, Mapping) for entry in entries)


def _filtered(key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    text = EVERY_TENSOR if entry.get("filter") is None else entry["filter"]
    value = entry.get("value")
    if not set(entry) <= {"filter", "value"} or value is None or not isinstance(text, str):
        raise MergeError(f"parameter {key!r} has the entry {dict(entry)}: write {{filter: TEXT, value: NUMBER}}")
    if _has_filters(value):
        raise MergeError(f"parameter {key!r} has filters within filter {text!r}: one level is all there is")
    return {"filter": text, "value": _value_or_gradient(key, value)}


def _value_or_gradient(key: str, value: Any) -> Setting:
    if not isinstance(value, (list, tuple)):
        return _number(key, value)
    if not value:
        raise MergeError(f"parameter {key!r} is an empty list: give a value, or a list of values over the layers")
    return [_number(key, entry) for entry in value]


def _number(key: str, value: Any) -> bool | int | float:
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as text
        with suppress(ValueError):
            return float(value)
    raise MergeError(f"parameter {key!r} is {value!r}: give a number, a list of numbers over the layers, or filters")


def _path_text(model: Any) -> str:
    if not isinstance(model, (str, Path)):
        raise MergeError(f"a {type(model).__name__} cannot be written down in a recipe: save the model in a folder")
    return str(model)


def _entry(model: Any, own: Settings, fisher: Any) -> str | dict[str, Any]:
    """One model in our form."""
    path = _path_text(model)
    extra = {} if fisher is None else {"fisher": _path_text(fisher)}
    return {"model": path, **own, **extra} if own or extra else path


# --- reading files ---


def _read(content: Any, folder: Path | None) -> Recipe:
    if not isinstance(content, Mapping):
        raise MergeError("found no keys: write method (our form) or merge_method (mergekit's), models and so on")
    ours, mergekits = "method" in content, "merge_method" in content
    if ours == mergekits:
        raise MergeError(
            f"found {'both' if ours else 'neither'} of 'method' (our form) and 'merge_method' (mergekit's): give one"
        )
    return _read_ours(content, folder) if ours else _read_mergekit(content, folder)


def _read_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MergeError(f"{path} does not exist: give a recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{path} cannot be read as text ({error}): give a recipe file") from None
    try:
        return json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else _parse_yaml(text)
    except json.JSONDecodeError as error:
        raise MergeError(f"{path} is not valid JSON ({error})") from None
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from None


def _parse_yaml(text: str) -> Any:
    import yaml  # here, so that importing soupkit does not pay for it

    class Loader(yaml.SafeLoader):
        """YAML's own loader keeps the last of two values for one key and says nothing."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _unique([(str(key.value), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise MergeError(f"not valid YAML ({' '.join(str(error).split())})") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise MergeError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice: keep one")
    return content


def _read_ours(content: Mapping[str, Any], folder: Path | None) -> Recipe:
    _refuse_unknown(content, OUR_KEYS, "recipe")
    entries = [_read_our_model(entry, number, folder) for number, entry in _numbered(content, "models")]
    fishers = [fisher for _, _, fisher in entries if fisher is not None]
    if fishers and len(fishers) != len(entries):
        without = next(model for model, _, fisher in entries if fisher is None)
        raise MergeError(f"model {without} has no fisher, and others have one: give one each")
    base = content.get("base")
    return Recipe(
        method=_text(content, "method"),
        models=[model for model, _, _ in entries],
        base=None if base is None else _located(_reference(base, "base"), folder),
        parameters=_mapping(content, "parameters"),
        model_parameters=[own for _, own, _ in entries],
        dtype=_dtype(content, "dtype"),
        fishers=fishers,
        tokenizer=_tokenizer(content.get("tokenizer"), "tokenizer", folder),
        num_layers=_count(content.get("num_layers"), "num_layers"),
    )


def _read_our_model(entry: Any, number: int, folder: Path | None) -> tuple[str, dict[str, Any], str | None]:
    """(model, its parameters, its Fisher information)."""
    if not isinstance(entry, Mapping):
        return _located(_reference(entry, f"model {number}"), folder), {}, None
    model = _located(_reference(entry.get("model"), f"model {number}"), folder)
    fisher = entry.get("fisher")
    own = {key: value for key, value in entry.items() if key not in ("model", "fisher")}
    return model, own, None if fisher is None else _located(_reference(fisher, f"fisher of {model}"), folder)


def _read_mergekit(content: Mapping[str, Any], folder: Path | None) -> Recipe:
    _refuse_unknown(content, MERGEKIT_KEYS, "recipe")
    name = _text(content, "merge_method")
    method = find_method(name)
    parameters = _settings(_mapping(content, "parameters"))
    base = content.get("base_model")
    num_layers = None
    if content.get("slices") is None:
        sources = _sources(content, "models", ("model", "parameters"))
    else:
        part = _only_slice(content)
        parameters = _overlaid(_settings(_mapping(part, "parameters")), parameters)
        base = part.get("base_model") or base
        sources = _sources(part, "sources", ("model", "layer_range", "parameters"))
        num_layers = _num_layers(part["sources"])
    if base is not None:
        base = _reference(base, "base_model")
        if method.base != "none":
            _warn_of_unused(sources, base, name, method)
            sources = [source for source in sources if source[0] != base]
        else:
            needs_listing = num_layers is not None or ("weight" in method.parameters and "weight" not in parameters)
            sources, base = _with_base_first(sources, base, needs_listing), None
    return Recipe(
        method=name,
        models=[_located(model, folder) for model, _ in sources],
        base=None if base is None else _located(base, folder),
        parameters=parameters,
        model_parameters=[own for _, own in sources],
        dtype=_dtype(content, "out_dtype") or _dtype(content, "dtype"),
        tokenizer=_mergekit_tokenizer(content, folder),
        num_layers=num_layers,
    )


def _only_slice(content: Mapping[str, Any]) -> Mapping[str, Any]:
    if content.get("models") is not None:
        raise MergeError("found both 'models' and 'slices': give one")
    slices = list(_numbered(content, "slices"))
    if len(slices) != 1:
        raise MergeError(
            f"'slices' has {len(slices)} slices: stacking layers is not supported; merge whole models, in one slice"
        )
    part = slices[0][1]
    if not isinstance(part, Mapping):
        raise MergeError("slice 1 has no keys: write sources")
    _refuse_unknown(part, ("sources", "base_model", "parameters"), "slice 1")
    bases = [level["base_model"] for level in (part, content) if level.get("base_model") is not None]
    if len(bases) == 2 and bases[0] != bases[1]:
        raise MergeError(f"base_model is {bases[0]} in slice 1 and {bases[1]} for the recipe: give one")
    return part


def _sources(part: Mapping[str, Any], key: str, allowed: Sequence[str]) -> list[Source]:
    """The listed models with their parameters."""
    sources: list[Source] = []
    for number, entry in _numbered(part, key):
        if not isinstance(entry, Mapping):
            raise MergeError(f"model {number} is {entry!r}: write model: {entry}")
        _refuse_unknown(entry, allowed, f"model {number}")
        sources.append((_reference(entry.get("model"), f"model {number}"), _settings(_mapping(entry, "parameters"))))
    return sources


def _num_layers(sources: Sequence[Mapping[str, Any]]) -> int:
    """How many layers the sources' ranges say there are; they must be whole models."""
    ranges = [source.get("layer_range") for source in sources]
    for source, span in zip(sources, ranges, strict=True):
        if span != ranges[0]:
            raise MergeError(
                f"layer_range is {ranges[0]} for {sources[0]['model']} and {span} for {source['model']}: "
                "soupkit merges whole models, so give all the same"
            )
    span = ranges[0]
    if not (isinstance(span, list) and len(span) == 2 and span[0] == 0 and type(span[1]) is int and span[1] > 0):
        raise MergeError(f"layer_range is {span}: soupkit merges whole models, so write [0, number of layers]")
    return span[1]


def _with_base_first(sources: Sequence[Source], base: str, needs_listing: bool) -> list[Source]:
    """The ingredients of a method without a base, for which mergekit's base_model is one of them."""
    listed = [source for source in sources if source[0] == base]
    if not listed and needs_listing:
        raise MergeError(f"base_model {base} is not among the models: list it there (with its weight), or remove it")
    return [*(listed or [(base, {})]), *(source for source in sources if source[0] != base)]


def _warn_of_unused(sources: Sequence[Source], base: str, name: str, method: Method) -> None:
    """A base may be listed among the models with parameters, which no method uses: as in mergekit."""
    for own in (own for model, own in sources if model == base):
        _check_settings(own, name, method, f"base {base}")
        if unused := ", ".join(key for key in own if key != WITHOUT_EFFECT):
            warnings.warn(f"{name} uses no parameters of the base {base}, as mergekit: {unused}", stacklevel=2)


def _overlaid(above: Settings, below: Settings) -> dict[str, Setting]:
    """Settings of two levels in one: where the filters of the one above fit no tensor, those below it count."""
    merged = {**below, **above}
    for key in above.keys() & below.keys():
        upper, lower = above[key], below[key]
        if _filters(upper) and EVERY_TENSOR not in _filters(upper):
            rest = lower if _filters(lower) else [{"filter": EVERY_TENSOR, "value": lower}]
            merged[key] = [*upper, *rest]  # type: ignore[misc]
    return merged


def _mergekit_tokenizer(content: Mapping[str, Any], folder: Path | None) -> str | None:
    source, settings = content.get("tokenizer_source"), content.get("tokenizer")
    if settings is None:
        return _tokenizer(source, "tokenizer_source", folder)
    if source is not None:
        raise MergeError("found both 'tokenizer_source' and 'tokenizer': give one")
    if not isinstance(settings, Mapping):
        raise MergeError(f"tokenizer is {settings!r}: write tokenizer: {{source: {settings}}}")
    _refuse_unknown(settings, ("source",), "tokenizer")
    return _tokenizer(settings.get("source", "union"), "tokenizer", folder)


def _tokenizer(source: Any, where: str, folder: Path | None) -> str | None:
    return source if source in (None, "base", "union") else _located(_reference(source, where), folder)


def _reference(value: Any, where: str) -> str:
    """A model as text. mergekit writes some as {model: {path, revision}, lora: {path, revision}}."""
    if isinstance(value, Mapping):
        if "path" in value:
            _refuse_unknown(value, ("path", "revision"), where)
            revision = value.get("revision")
            return _text(value, "path") + (f"@{revision}" if revision else "")
        _refuse_unknown(value, ("model", "lora"), where)
        parts = [value.get("model"), *([value["lora"]] if value.get("lora") else [])]
        return "+".join(_reference(part, where) for part in parts)
    if not isinstance(value, (str, Path)) or not str(value):
        raise MergeError(f"{where} is {value!r}: give a folder or a hub id")
    return str(value)


def _located(model: str, folder: Path | None) -> str:
    """The path of a model named in a file of ``folder``; what is not found there is left as given."""
    if folder is None or Path(model).expanduser().exists():
        return model
    if (folder / model).exists():
        return str(folder / model)
    return "+".join(_located(part, folder) for part in model.split("+")) if "+" in model else model


def _refuse_unknown(content: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key, value in content.items():
        if key in allowed or (value is None and key in NOT_SUPPORTED):
            continue
        if key in NOT_SUPPORTED:
            raise MergeError(f"key {key!r} of {where} is not supported: {NOT_SUPPORTED[key]}")
        raise MergeError(f"unknown key {key!r} of {where}: choose from {', '.join(allowed)}")


def _numbered(content: Mapping[str, Any], key: str) -> Iterable[tuple[int, Any]]:
    """The entries of a list, counted from 1."""
    entries = content.get(key)
    if not isinstance(entries, (list, tuple)) or not entries:
        raise MergeError(f"{key!r} is {entries!r}: give a list with at least one entry")
    return enumerate(entries, start=1)


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    if not isinstance(found, Mapping | None):
        raise MergeError(f"{key!r} is {found!r}: write name: value pairs")
    return found or {}


def _text(content: Mapping[str, Any], key: str) -> str:
    if not isinstance(content[key], str):
        raise MergeError(f"{key!r} is {content[key]!r}: give its name")
    return content[key]


def _dtype(content: Mapping[str, Any], key: str) -> str | None:
    return None if content.get(key) is None else _text(content, key).removeprefix("torch.")


def _count(value: Any, key: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise MergeError(f"{key!r} is {value!r}: give a number of layers")
    return value

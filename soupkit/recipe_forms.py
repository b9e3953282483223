"""The forms that a recipe file comes in, read into the fields of a recipe; docs/recipes.md teaches both.

- ours: ``method``, ``base``, ``models``, ``parameters``, ``dtype``, ``tokenizer``, ``num_layers``;
- mergekit's: ``merge_method``, ``models`` or ``slices`` with one slice of whole models, ``base_model``, ``parameters``,
  ``dtype``, ``out_dtype``, ``tokenizer_source`` or ``tokenizer``.

What we do not support is refused by name and never ignored, with two exceptions that cannot change a soup: mergekit's
``int8_mask``, a choice of how its masks are stored, and parameters of the base, which gets a warning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from soupkit.errors import MergeError
from soupkit.methods import Method, find_method
from soupkit.settings import WITHOUT_EFFECT, Settings, check_settings, overlaid, parse_settings
from soupkit.tables import dtype_name

Fields = dict[str, Any]  # of a Recipe, by name
Source = tuple[str, Settings]  # a model in mergekit's form, with its parameters

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


def read_file(path: Path) -> Any:
    """A recipe file's content (YAML, or JSON by its suffix). Raises MergeError where it is neither."""
    if path.is_dir():
        raise MergeError(
            f"{path} is a folder, where a recipe file belongs: to merge folders without one, name the method beside "
            "them (python -m soupkit merge --method NAME MODEL ...; in Python, give a soupkit.Recipe)"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MergeError(f"{path} does not exist: give a recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{path} cannot be read as text ({error}): give a recipe file") from None
    try:
        return json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else parse_yaml(text)
    except json.JSONDecodeError as error:
        raise MergeError(f"{path} is not valid JSON ({error})") from None
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from None


def read_content(content: Any) -> Fields:
    """The fields of a recipe in either form, told apart by their keys. Raises MergeError for anything else."""
    if not isinstance(content, Mapping):
        raise MergeError("found no keys: write method (our form) or merge_method (mergekit's), models and so on")
    ours, mergekits = "method" in content, "merge_method" in content
    if ours == mergekits:
        raise MergeError(
            f"found {'both' if ours else 'neither'} of 'method' (our form) and 'merge_method' (mergekit's): give one"
        )
    return read_ours(content) if ours else _read_mergekit(content)


def read_ours(content: Mapping[str, Any]) -> Fields:
    """The fields of a recipe in our form. Raises MergeError for what is not in it."""
    _refuse_unknown(content, OUR_KEYS, "recipe")
    entries = [_read_our_model(entry, number) for number, entry in _numbered(content, "models")]
    fishers = [fisher for _, _, fisher in entries if fisher is not None]
    if fishers and len(fishers) != len(entries):
        without = next(model for model, _, fisher in entries if fisher is None)
        raise MergeError(f"model {without} has no fisher, and others have one: give one each")
    base = content.get("base")
    return {
        "method": _text(content, "method"),
        "models": [model for model, _, _ in entries],
        "base": None if base is None else _reference(base, "base"),
        "parameters": _mapping(content, "parameters"),
        "model_parameters": [own for _, own, _ in entries],
        "dtype": _dtype(content, "dtype"),
        "fishers": fishers,
        "tokenizer": _tokenizer(content.get("tokenizer"), "tokenizer"),
        "num_layers": _count(content.get("num_layers"), "num_layers"),
    }


def _read_our_model(entry: Any, number: int) -> tuple[str, dict[str, Any], str | None]:
    """(model, its parameters, its Fisher information)."""
    if not isinstance(entry, Mapping):
        return _reference(entry, f"model {number}"), {}, None
    model = _reference(entry.get("model"), f"model {number}")
    fisher = entry.get("fisher")
    own = {key: value for key, value in entry.items() if key not in ("model", "fisher")}
    return model, own, None if fisher is None else _reference(fisher, f"fisher of {model}")


def _read_mergekit(content: Mapping[str, Any]) -> Fields:
    _refuse_unknown(content, MERGEKIT_KEYS, "recipe")
    name = _text(content, "merge_method")
    method = find_method(name)
    parameters = parse_settings(_mapping(content, "parameters"))
    base = content.get("base_model")
    num_layers = None
    if content.get("slices") is None:
        sources = _sources(content, "models", ("model", "parameters"))
    else:
        part = _only_slice(content)
        parameters = overlaid(parse_settings(_mapping(part, "parameters")), parameters)
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
    return {
        "method": name,
        "models": [model for model, _ in sources],
        "base": base,
        "parameters": parameters,
        "model_parameters": [own for _, own in sources],
        "dtype": _dtype(content, "out_dtype") or _dtype(content, "dtype"),
        "tokenizer": _mergekit_tokenizer(content),
        "num_layers": num_layers,
    }


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
        sources.append(
            (_reference(entry.get("model"), f"model {number}"), parse_settings(_mapping(entry, "parameters")))
        )
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
        check_settings(own, name, method, f"base {base}")
        if unused := ", ".join(key for key in own if key != WITHOUT_EFFECT):
            warnings.warn(f"{name} uses no parameters of the base {base}, as mergekit: {unused}", stacklevel=2)


def _mergekit_tokenizer(content: Mapping[str, Any]) -> str | None:
    source, settings = content.get("tokenizer_source"), content.get("tokenizer")
    if settings is None:
        return _tokenizer(source, "tokenizer_source")
    if source is not None:
        raise MergeError("found both 'tokenizer_source' and 'tokenizer': give one")
    if not isinstance(settings, Mapping):
        raise MergeError(f"tokenizer is {settings!r}: write tokenizer: {{source: {settings}}}")
    _refuse_unknown(settings, ("source",), "tokenizer")
    return _tokenizer(settings.get("source", "union"), "tokenizer")


def _tokenizer(source: Any, where: str) -> str | None:
    return source if source in (None, "base", "union") else _reference(source, where)


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


def parse_yaml(text: str) -> Any:
    """What YAML text says. Raises MergeError for what is none, or gives one key two values."""
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
    return None if content.get(key) is None else dtype_name(_text(content, key))


def _count(value: Any, key: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise MergeError(f"{key!r} is {value!r}: give a number of layers")
    return value

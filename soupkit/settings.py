"""Settings: what a recipe says of one parameter, brought to one form, checked, and evaluated for each tensor.

A setting is a value, a gradient over the layers (a list of values), or a list of {"filter": substring, "value": either
of them}, "*" being every tensor. docs/recipes.md teaches what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from soupkit.errors import MergeError
from soupkit.methods import Method

Setting = bool | int | float | list[Any]
Settings = Mapping[str, Setting]

EVERY_TENSOR = "*"
WITHOUT_EFFECT = "int8_mask"


def parse_settings(settings: Any) -> dict[str, Setting]:
    """Name to setting, each in its one form. Raises MergeError for what is no value, gradient or filter."""
    if not isinstance(settings, Mapping):
        raise MergeError(f"parameters are {settings!r}: write name: value pairs")
    return {key: _setting(key, value) for key, value in settings.items()}


def evaluate(setting: Setting, kind: type, name: str, position: float) -> Any:
    """The setting's value for the tensor of this name and place along the layers; None where no filter fits."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for entry in setting:
            if entry["filter"] == EVERY_TENSOR or entry["filter"] in name:
                return evaluate(entry["value"], kind, name, position)
        return None
    place = position * (len(setting) - 1)
    below = int(place)
    if kind is bool or below == place:
        return setting[below]
    fraction = place - below
    return (1 - fraction) * setting[below] + fraction * setting[below + 1]


def check_settings(settings: Settings, name: str, method: Method, owner: str = "") -> None:
    """Raise MergeError for what the method does not take. ``owner`` is the model whose settings they are, if one's."""
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
        for value in values_of(setting):
            try:
                parameter.check(key, value)
            except MergeError as error:
                raise MergeError(f"{prefix}{error}") from None


def filters_of(setting: Setting) -> list[str]:
    """The substrings that a setting chooses by."""
    entries = setting if isinstance(setting, list) else []
    return [entry["filter"] for entry in entries if isinstance(entry, Mapping)]


def values_of(setting: Any) -> Iterator[bool | int | float]:
    """Every number and truth value in a setting."""
    if isinstance(setting, Mapping):
        yield from values_of(setting["value"])
    elif isinstance(setting, list):
        for entry in setting:
            yield from values_of(entry)
    else:
        yield setting


def overlaid(above: Settings, below: Settings) -> dict[str, Setting]:
    """Settings of two levels in one: where the filters of the one above fit no tensor, those below it count."""
    merged = {**below, **above}
    for key in above.keys() & below.keys():
        upper, lower = above[key], below[key]
        if filters_of(upper) and EVERY_TENSOR not in filters_of(upper):
            rest = lower if filters_of(lower) else [{"filter": EVERY_TENSOR, "value": lower}]
            merged[key] = [*upper, *rest]  # type: ignore[misc]
    return merged


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
        for kind in (int, float):  # a seed may have more digits than a float
            with suppress(ValueError):
                return kind(value)
    raise MergeError(f"parameter {key!r} is {value!r}: give a number, a list of numbers over the layers, or filters")

"""The page of all methods, made from their table: ``python -m soupkit.method_page > docs/methods.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from soupkit.card import fenced, to_yaml
from soupkit.methods import METHODS, Method, Parameter

INTRODUCTION = """\
# Merge methods

Made from the table `soupkit.METHODS` by `python -m soupkit.method_page`. Each method takes a recipe file, as in the
examples below, or its parts on the command line:

```sh
python -m soupkit merge recipe.yaml --out soup
python -m soupkit merge --method ties --base base sft1 sft2 --set weight=1 --set density=0.5 --out soup
```

A parameter's value is a number, a list of numbers (a gradient over the layers), or a list of `{filter, value}`;
[recipes.md](recipes.md) says what they mean. One that is "one per model" may stand beside its model, or among the
recipe's parameters for all models. On the command line, commas separate one value for each model, and lists stand in
brackets: `--set weight=0.7,0.3`, `--set 't=[0, 0.5, 1]'`, `--set 't=[{filter: mlp, value: 0.3}, {value: 0.5}]'`.
"""
# Values that show what a parameter is for, where the default would not.
EXAMPLE_VALUES = {"density": 0.5, "t": 0.3, "decay": 0.9, "select_topk": 0.1, "gamma": 0.02, "last": 2}
EXAMPLE_WEIGHTS = (0.7, 0.3)
KINDS = {bool: "true or false", int: "whole number", float: "number"}


def method_page(methods: Mapping[str, Method] = METHODS) -> str:
    """The page in Markdown."""
    contents = ["| method | what it does | models | base |", "|---|---|---|---|"]
    contents += [
        f"| [{name}](#{name}) | {_cell(method.summary)} | {method.num_models} | {method.base} |"
        for name, method in methods.items()
    ]
    sections = [_section(name, method) for name, method in methods.items()]
    return "\n\n".join([INTRODUCTION.rstrip(), "\n".join(contents), *sections]) + "\n"


def example_recipe(name: str, method: Method) -> dict[str, Any]:
    """A recipe that the method takes, in the form of ``Recipe.to_dict``."""
    num_models = min(max(method.min_ingredients, 2), method.max_ingredients or 2)
    models: list[str | dict[str, Any]] = []
    for number in range(1, num_models + 1):
        own = {"weight": EXAMPLE_WEIGHTS[number - 1]} if "weight" in method.parameters else {}
        fisher = {"fisher": f"runs/fisher{number}"} if method.needs_fishers else {}
        path = f"runs/sft{number}"
        models.append({"model": path, **own, **fisher} if own or fisher else path)
    recipe: dict[str, Any] = {"method": name, "models": models}
    if method.base == "required":
        recipe["base"] = "runs/pretrained"
    shown = {key: EXAMPLE_VALUES[key] for key in method.parameters if key in EXAMPLE_VALUES}
    if name == "nearswap":  # its t is a distance
        shown = {"t": 0.0001}
    return recipe | ({"parameters": shown} if shown else {})


def _section(name: str, method: Method) -> str:
    base = {"none": "", "optional": "; a base is optional", "required": " and a base"}[method.base]
    parts = [
        f"## {name}",
        f"{method.summary[0].upper()}{method.summary[1:].rstrip('.')}. Takes {method.num_models} models{base}.",
        fenced(method.formula),
    ]
    if method.parameters:
        rows = [
            f"| `{key}` | {_cell(row.meaning)} | {_values(row)} | {_default(row)} |"
            for key, row in method.parameters.items()
        ]
        parts.append("\n".join(["| parameter | meaning | value | default |", "|---|---|---|---|", *rows]))
    parts.append(f"- Departures: {method.departures}\n- Paper: {method.paper}")
    parts.append(fenced(to_yaml(example_recipe(name, method)), "yaml"))
    return "\n\n".join(parts)


def _values(parameter: Parameter) -> str:
    limits = f", {parameter.range}" if parameter.low is not None or parameter.high is not None else ""
    return KINDS[parameter.kind] + limits + (", one per model" if parameter.per_ingredient else "")


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return "none" if parameter.default is None else f"`{json.dumps(parameter.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(method_page(), end="")

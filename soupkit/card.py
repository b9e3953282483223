"""The model card of a soup: the README.md that a hub, and a person, reads. The same soup has the same card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soupkit.checkpoint import HUB_ID
from soupkit.methods import find_method
from soupkit.tables import printable


@dataclass(frozen=True)
class Ingredient:
    """A model that a recipe names, with the parameters that are its own."""

    label: str
    role: str  # "base" or "ingredient"
    parameters: Mapping[str, Any]


def model_card(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The text of README.md for a soup.

    ``record`` is the content of soup.json, ``config`` that of config.json. Models' labels that are hub ids become
    links, and the front matter's base_model, where a path of this machine never appears.
    """
    recipe = record["recipe"]
    row = find_method(recipe["method"])
    ingredients = ingredients_of(recipe)
    hub_ids = hub_ids_of(ingredient.label for ingredient in ingredients)
    sections = [
        f"---\n{to_yaml(_front_matter(recipe['method'], config, hub_ids))}---",
        "# A model soup",
        f"The weights of this model were computed from those of the models below, tensor by tensor and without "
        f"training, by soupkit {record['soupkit']} with the method `{recipe['method']}`. They are stored in "
        f"{record['dtype']}.",
        _table(ingredients, hub_ids),
        f"## Method\n\n`{recipe['method']}`: {row.summary}.",
        fenced(row.formula),
        "\n".join(f"- {x}" for x in (f"Paper: {row.paper}", f"Departures: {row.departures}", *fallback_of(record))),
        f"## Recipe\n\n{fenced(to_yaml(recipe), 'yaml')}",
        "Saved as `recipe.yaml`, and with the models where it names them, it makes the same weights again:",
        fenced("python -m soupkit merge recipe.yaml --out soup", "sh"),
        "`soup.json` holds the sizes and hashes of this folder's files and of the models'; this checks them:",
        fenced("python -m soupkit verify path/to/this/folder", "sh"),
        f"## Use\n\n{fenced(_loading(config), 'python')}",
    ]
    return "\n\n".join(sections) + "\n"


def ingredients_of(recipe: Mapping[str, Any]) -> list[Ingredient]:
    """The base, where there is one, and the models of a recipe in the form of ``Recipe.to_dict``."""
    found = [Ingredient(recipe["base"], "base", {})] if recipe.get("base") is not None else []
    for entry in recipe["models"]:
        own = {"model": entry} if isinstance(entry, str) else dict(entry)
        found.append(Ingredient(own.pop("model"), "ingredient", own))
    return found


def fallback_of(record: Mapping[str, Any]) -> list[str]:
    """One line on how many tensors took the method's fallback; no line where none did."""
    found = record.get("fallback", {"tensors": 0})
    return [f"{found['tensors']:,} of {found['of']:,} tensors took {found['rule']}"] if found["tensors"] else []


def hub_ids_of(labels: Iterable[str]) -> list[str]:
    """The hub ids in labels such as "org/model", "org/model@revision" and "org/model+org/adapter"."""
    found = [HUB_ID.fullmatch(part) for label in labels for part in label.split("+")]
    ids = [match["id"] for match in found if match]
    # Where its parent is a folder here, as in runs/sft1, it is a path.
    return [name for name in dict.fromkeys(ids) if not Path(name).parent.is_dir()]


def settings(parameters: Mapping[str, Any]) -> str:
    """Such as "weight = 0.5, density = [0.2, 1]"."""
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items())


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block, with a fence that the text cannot close."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def code(text: str) -> str:
    """A Markdown code span of any text, fit for a cell of a table too."""
    text = printable(text).replace("|", r"\|")
    fence = "`" * (_longest_backticks(text) + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{space}{text}{space}{fence}"


def to_yaml(content: Mapping[str, Any]) -> str:
    """YAML in the order given, innermost lists and mappings on one line."""
    import yaml  # here, so that importing soupkit does not pay for it

    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _front_matter(method: str, config: Mapping[str, Any], hub_ids: Sequence[str]) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "transformers"} if config.get("model_type") else {}
    matter["tags"] = ["merge", "model-soup", "soupkit", method]
    if hub_ids:
        matter |= {"base_model": hub_ids, "base_model_relation": "merge"}
    return matter


def _table(ingredients: Sequence[Ingredient], hub_ids: Sequence[str]) -> str:
    lines = ["| model | role | parameters |", "|---|---|---|"]
    for ingredient in ingredients:
        label = code(ingredient.label)
        if ingredient.label in hub_ids:
            label = f"[{ingredient.label}](https://huggingface.co/{ingredient.label})"
        own = code(settings(ingredient.parameters)) if ingredient.parameters else ""
        lines.append(f"| {label} | {ingredient.role} | {own} |")
    return "\n".join(lines)


def _loading(config: Mapping[str, Any]) -> str:
    if not config.get("model_type"):
        return 'from safetensors.torch import load_file\n\nstate = load_file("path/to/this/folder/model.safetensors")'
    architecture = str((config.get("architectures") or ["AutoModel"])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")) or not architecture.isidentifier():
        architecture = "AutoModelForCausalLM"
    return (
        f"from transformers import {architecture}, AutoTokenizer\n\n"
        f'model = {architecture}.from_pretrained("path/to/this/folder")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )

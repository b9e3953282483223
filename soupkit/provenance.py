"""What a soup was made of, as ``soup.json`` records it. It holds no time, so that the same soup has the same record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from soupkit.checkpoint import Checkpoint, open_checkpoint
from soupkit.files import contents_of
from soupkit.hashing import DEFAULT, check_algorithm, hash_file
from soupkit.recipe import Recipe
from soupkit.sources import in_order

VERSION = "0.1.0"
Hashes = Callable[[Path], Mapping[str, str]]  # a file's hash by the algorithm's name


def provenance(recipe: Recipe, *, hash: str = DEFAULT, allow_pickle: bool = False) -> dict[str, Any]:
    """The record of a soup of folders, ready for JSON: the recipe, and every model's files with their hashes.

    {"soupkit": version, "recipe": {...}, "ingredients": [{"folder": as given, "role": "ingredient", "base" or "fisher",
    "files": {file name: {"bytes": size, hash name: hash}}}, ...]}. Folders merged with ``out=`` carry it as soup.json,
    with the soup's own files; for a soup in memory, write it yourself. Reads every weight file once. Raises MergeError
    for a recipe that does not hold or folders that cannot be read.
    """
    recipe.validate()
    check_algorithm(hash)
    opened = [(role, open_checkpoint(model, allow_pickle=allow_pickle)) for role, model in roles(recipe)]
    return describe(recipe, opened, lambda path: {hash: hash_file(path, hash)})


def roles(recipe: Recipe) -> list[tuple[str, Any]]:
    """Every model of a recipe with its role, in the order in which the engine reads them."""
    return in_order(
        [("ingredient", model) for model in recipe.models],
        None if recipe.base is None else ("base", recipe.base),
        [("fisher", fisher) for fisher in recipe.fishers],
    )


def describe(recipe: Recipe, checkpoints: Sequence[tuple[str, Checkpoint]], hashes: Hashes) -> dict[str, Any]:
    """The record for opened checkpoints with their roles."""
    return {
        "soupkit": VERSION,
        "recipe": recipe.to_dict(),
        "ingredients": [
            {
                "folder": checkpoint.label,
                "role": role,
                "files": {path.name: file_entry(path, hashes) for path in checkpoint.files},
            }
            for role, checkpoint in checkpoints
        ],
    }


def files_of(folder: Path, hashes: Hashes) -> dict[str, dict[str, Any]]:
    """The entries of all files of a folder, by their paths within it."""
    return {path.as_posix(): file_entry(folder / path, hashes) for path in contents_of(folder)}


def file_entry(path: Path, hashes: Hashes) -> dict[str, Any]:
    """What soup.json says of a file."""
    return {"bytes": path.stat().st_size, **hashes(path)}

"""What a soup was made of, as ``soup.json`` records it. It holds no time, so that the same soup has the same record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from soupkit.checkpoint import Checkpoint, open_checkpoint
from soupkit.methods import find_method

VERSION = "0.1.0"


def provenance(method: str, ingredients: Sequence[str | Path], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a soup of folders, ready for JSON: method, resolved parameters, ingredients with file hashes.

    {"soupkit": version, "method": ..., "parameters": {...}, "ingredients": [{"folder": as given, "files": {file name:
    {"bytes": size, "sha256": hash}}}, ...]}. Weights are the normalised ones. Folders merged with ``out=`` carry it as
    soup.json; for a soup in memory, write it yourself. Reads every weight file once. Raises MergeError for an unknown
    method, parameters that do not fit it, or folders that cannot be read.
    """
    resolved = find_method(method).resolve(parameters, len(ingredients))
    return describe(method, resolved, [open_checkpoint(folder) for folder in ingredients], file_sha256)


def describe(
    method: str,
    parameters: Mapping[str, Any],
    checkpoints: Sequence[Checkpoint],
    sha256: Callable[[Path], str],
) -> dict[str, Any]:
    """The record for resolved parameters and opened checkpoints; ``sha256`` gives the hash of a file."""
    return {
        "soupkit": VERSION,
        "method": method,
        "parameters": dict(parameters),
        "ingredients": [
            {
                "folder": checkpoint.label,
                "files": {
                    path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in checkpoint.files
                },
            }
            for checkpoint in checkpoints
        ],
    }


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

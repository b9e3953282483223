"""Files of a checkpoint, opened with care: it may have been downloaded from anyone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soupkit.errors import MergeError

# A checkpoint's weights: in one file, or in shards that an index names; and the same, pickled.
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
# A sub-folder that belongs to a checkpoint: chat templates but for the first, as transformers saves them.
CHAT_TEMPLATES = "additional_chat_templates"
MAX_TEXT_BYTES = 500 * 10**6  # the largest tokenizer.json are a tenth of this


def expanded(path: str | Path) -> Path:
    """The path with ``~`` replaced, where there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def contents_of(folder: Path) -> list[Path]:
    """What a checkpoint folder holds, its chat templates' sub-folder opened, as paths within it."""
    templates = folder / CHAT_TEMPLATES
    inner = list(templates.iterdir()) if templates.is_dir() else []
    found = [path for path in folder.iterdir() if path != templates or not inner]
    return sorted(path.relative_to(folder) for path in [*found, *inner])


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor for reading. Raises MergeError for anything but a regular file, such as a pipe that never ends."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise MergeError(f"{path} is no regular file: download or save the checkpoint again")
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """What a text file of a checkpoint holds. Raises MergeError for one that is far too large for that."""
    with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_TEXT_BYTES:
            raise MergeError(f"{path} has {size} bytes, too many for a text file of a checkpoint: download it again")
        return file.read()


def read_json(path: Path, *, remedy: str = "download or save the checkpoint again") -> dict[str, Any]:
    """The object that a JSON file holds. Raises MergeError, with the remedy, when it holds none."""
    try:
        parsed = json.loads(read_bytes(path).decode("utf-8"))
    except MergeError:
        raise
    except (ValueError, RecursionError) as error:
        raise MergeError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(parsed, dict):
        raise MergeError(f"{path} holds no JSON object: {remedy}")
    return parsed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON that a person can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_own_file(folder: Path, path: Path) -> None:
    """Raise MergeError for a path that leads out of its folder through a link, unless into the hub cache's own blobs.

    A link in a folder from anyone could bring a private file of this machine into the soup, and to where that is sent.
    """
    home, target = folder.resolve(), path.resolve()
    # The hub cache keeps REPOSITORY/snapshots/REVISION/name -> REPOSITORY/blobs/hash.
    snapshots = [parent for parent in home.parents if parent.name == "snapshots"]
    allowed = [home, *(parent.parent / "blobs" for parent in snapshots)]
    if not any(target.is_relative_to(place) for place in allowed):
        raise MergeError(f"{path} is a link out of its folder, to {target}: put the file itself there")

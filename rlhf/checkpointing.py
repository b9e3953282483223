"""Writing folders that are either whole or absent, and where those made once are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soupkit.publish import published_folder


def require_new(folder: str | Path) -> Path:
    """The path, or FileExistsError when something is there already, PermissionError when it cannot be made."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already; choose another --output or remove it")
    parent = next(path for path in folder.absolute().parents if path.exists())
    try:
        # Permissions do not tell: root has all of them, and still cannot write to /proc or a file system that is full.
        os.rmdir(mkdtemp(prefix=".writable-", dir=parent))
    except OSError:
        raise PermissionError(
            f"{folder}: cannot be made, {parent} is no writable folder; choose another --output"
        ) from None
    return folder


def cache_directory() -> Path:
    """Where what is made once is kept: ``$SOUPKIT_CACHE``, ``$XDG_CACHE_HOME/soupkit``, or ``~/.cache/soupkit``."""
    if "SOUPKIT_CACHE" in os.environ:
        return Path(os.environ["SOUPKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soupkit"


@contextmanager
def publishing(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to ``folder`` when the block ends well and removed when it does not.

    A process killed in between leaves a hidden sibling, which the next attempt removes, and never a ``folder`` that
    looks finished. Raises FileExistsError when ``folder`` exists already.
    """
    with published_folder(require_new(folder), overwrite=False) as partial:
        yield partial


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made by ``make`` where it is not there, by several processes at once too."""
    if not folder.is_dir():
        try:
            make(folder)
        except OSError:
            # Another process may have published the same meanwhile: its folder is as good as ours.
            if not folder.is_dir():
                raise
    return folder


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Publish an ordinary checkpoint folder, as ``from_pretrained`` and soupkit read it, with the tokenizer.

    ``weights`` are saved instead of the model's own where they are given.
    """
    with publishing(folder) as partial:
        model.save_pretrained(partial, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(partial)
    return Path(folder)

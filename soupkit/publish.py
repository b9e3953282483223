"""Folders that appear finished or not at all: write to a hidden sibling, then one rename."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from soupkit.checkpoint import folders_of
from soupkit.errors import MergeError
from soupkit.files import contents_of

_LIVE: set[Path] = set()  # temporary folders that this process is filling
_LIBC = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
_SYNC_FILE_RANGE = getattr(_LIBC, "sync_file_range", None)
_FALLOCATE = getattr(_LIBC, "fallocate", None)


def check_target(out: str | Path, models: Iterable[str | Path], overwrite: bool) -> None:
    """As :func:`check_output`, and raise MergeError when ``out`` lies in one of the models' folders, or holds one."""
    out = Path(os.path.abspath(out))
    home = out.resolve()
    for model in models:
        for folder in filter(Path.is_dir, folders_of(str(model))):
            place = folder.resolve()
            if place == home or (out.exists() and out.samefile(folder)):
                raise FileExistsError(f"{out} is one of the models that are merged: choose another output folder")
            if place in home.parents:
                raise MergeError(f"{out} lies inside {model}, which is merged: choose an output folder outside it")
            if home in place.parents:
                raise MergeError(f"{out} holds {model}, which is merged: choose an output folder that does not")
    check_output(out, overwrite)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError when ``out`` is in the way, or when replacing it would lose more than a checkpoint."""
    if not os.path.lexists(out):
        above = next((folder for folder in out.absolute().parents if os.path.lexists(folder)), None)
        if above is not None and not above.is_dir():
            raise FileExistsError(f"{above} is a file, so {out} cannot be written in it: choose another output folder")
        return
    if out.is_file():
        raise FileExistsError(f"{out} is a file, and the output is a folder: choose another output folder")
    if not overwrite:
        raise FileExistsError(f"{out} exists: choose another output folder, or overwrite it (--overwrite)")
    if not _is_only_a_checkpoint(out):
        raise FileExistsError(
            f"{out} is not only a checkpoint (weights, no sub-folders but chat templates), so it is not overwritten: "
            "choose another output folder"
        )


@contextmanager
def published_folder(out: Path, overwrite: bool, *, sync: bool = True) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` to fill; it becomes ``out`` when the block ends without an exception.

    The temporary folder is called ``.NAME.partial-HOST-PID``. One left by a process that was killed is removed by the
    next run for the same ``out``. A folder that is replaced stays whole until its successor is complete: where the
    system can swap two folders (Linux) there is no moment without one at ``out``. With ``sync`` all bytes are on the
    disk before the folder becomes ``out``, against a power cut; without, the system writes them in its own time.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-{platform.node()}-"
    if out.parent / f"{prefix}{os.getpid()}" in _LIVE:
        raise FileExistsError(f"{out} is being written by this process already: wait, or choose another output folder")
    _remove_leftovers(out.parent, prefix)
    partial = out.parent / f"{prefix}{os.getpid()}"
    _LIVE.add(partial)
    try:
        partial.mkdir()  # in here, since an interrupt may come as soon as it is done
        yield partial
        for path in [*partial.rglob("*"), partial] if sync else []:
            _sync(path)
        check_output(out, overwrite)  # it may have appeared in the meantime
        _move_into_place(partial, out)
        if sync:
            _sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what failed, or what was replaced
        _LIVE.discard(partial)


def reserve(descriptor: int, num_bytes: int, path: Path) -> None:
    """Give a file its size and its place on the disk, where the system can (Linux). Raises OSError on a full disk.

    It says that the disk is too small before any work is done, and makes writing cheaper. Not ``os.posix_fallocate``,
    which where the file system cannot reserve writes the whole file instead.
    """
    if _FALLOCATE is not None and _FALLOCATE(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number), str(path))


def write_back(descriptor: int, offset: int, num_bytes: int) -> None:
    """Let the disk begin with these bytes now, without waiting (Linux), so that little is left to do at the end."""
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(descriptor, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), 2)  # SYNC_FILE_RANGE_WRITE


def _is_only_a_checkpoint(folder: Path) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    contents = contents_of(folder)
    has_weights = any(path.suffix == ".safetensors" for path in contents)
    return not any((folder / path).is_dir() for path in contents) and (has_weights or not contents)


def _move_into_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
    elif not _exchange(partial, out):
        replaced = out.parent / f".{out.name}.replaced-{os.getpid()}"
        out.rename(replaced)
        try:
            partial.rename(out)
        except OSError:
            replaced.rename(out)
            raise
        shutil.rmtree(replaced)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for path in parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and not _runs_elsewhere(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(pid: int) -> bool:
    """Whether another process has this id; our own id on a leftover is an earlier process's, used again."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it runs, but is another user's
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Whether a soup is still what its merge wrote: sizes and hashes of its files against those in ``soup.json``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from soupkit.checkpoint import folders_of
from soupkit.engine import Progress, parse_num_threads, run
from soupkit.errors import MergeError
from soupkit.files import CHAT_TEMPLATES, contents_of, read_json
from soupkit.hashing import ALGORITHMS, DEFAULT, hash_file
from soupkit.tables import printable

RECORD_FILE = "soup.json"
# soup.json cannot hold its own hash, and the model card is there to be edited.
NOT_RECORDED = {RECORD_FILE, "README.md"}
NOT_CHECKED = "not checked: its folder is absent"
REMEDY = "get the soup again from where it came from, or merge again"


@dataclass(frozen=True)
class FolderCheck:
    """One folder against the record. ``problems`` gives each recorded file's problem, None for one as recorded."""

    label: str
    role: str  # "soup", or as recorded: "ingredient", "base", "fisher"
    present: bool
    problems: Mapping[str, str | None]
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """The folder is there, every recorded file is in it as recorded, and no other beside them."""
        return self.present and not self.changed

    @property
    def changed(self) -> bool:
        """The folder is there, and a recorded file is changed or missing, or another is beside them."""
        return self.present and (bool(self.extra) or any(self.problems.values()))

    def __str__(self) -> str:
        title = printable(f"{self.role} {self.label}")
        if not self.present:
            return f"{title}: absent, {len(self.problems)} files not checked"
        num_good = sum(problem is None for problem in self.problems.values())
        lines = [f"{title}: {num_good} of {len(self.problems)} files as recorded"]
        lines += [f"  {printable(name)}: {problem}" for name, problem in self.problems.items() if problem]
        lines += [f"  {printable(name)}: extra, not written by the merge" for name in self.extra]
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found, folder by folder."""

    soup: FolderCheck
    ingredients: tuple[FolderCheck, ...] = ()

    @property
    def folders(self) -> tuple[FolderCheck, ...]:
        """The soup, then its ingredients."""
        return (self.soup, *self.ingredients)

    @property
    def ok(self) -> bool:
        """Everything that was to be checked is there, and as recorded."""
        return all(check.ok for check in self.folders)

    @property
    def changed(self) -> bool:
        """Something that is there is not as recorded; what is absent is neither."""
        return any(check.changed for check in self.folders)

    @property
    def num_absent(self) -> int:
        """Ingredients that are not there to be checked."""
        return sum(not check.present for check in self.ingredients)

    def __str__(self) -> str:
        verdict = "NOT as recorded" if self.changed else "ok"
        if self.num_absent:
            models = "1 model is" if self.num_absent == 1 else f"{self.num_absent} models are"
            verdict += f", and {models} absent" if self.changed else f" as far as it was checked: {models} absent"
        return "\n".join([*map(str, self.folders), verdict])

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        checks = [
            {
                "folder": check.label,
                "role": check.role,
                "ok": check.ok,
                "changed": check.changed,
                "present": check.present,
                "problems": dict(check.problems),
                "extra": list(check.extra),
            }
            for check in self.folders
        ]
        totals = {"ok": self.ok, "changed": self.changed, "num_absent": self.num_absent}
        return {**totals, "soup": checks[0], "ingredients": checks[1:]}


def verify(folder: str | Path, *, ingredients: bool = False, progress: bool = True) -> Verification:
    """Check a soup's files against the sizes and hashes in its soup.json.

    A file may be missing, changed, or extra; README.md and hidden files are left out. Sizes are compared first, so that
    a file of another size is not read. With ``ingredients``, the weight files of every ingredient are checked too, at
    the paths that the record gives, relative ones from the working directory, else from the soup's folder and those
    above it; one that is no folder here is absent: not ``ok``, and not ``changed`` either.
    ``progress``: a bar on stderr, in bytes.

    Raises MergeError (a ValueError) when there is no soup.json, or one that is damaged or names anything but files of
    its own folder.

    Example:
        >>> soupkit.verify("runs/soup").ok
        True
    """
    folder = Path(folder)
    source = folder / RECORD_FILE
    record = read_record(folder)
    folders = [_Recorded(str(folder), "soup", True, _recorded_files(record, [folder], source))]
    for entry in _ingredients(record, source) if ingredients else []:
        places = folders_of(entry["folder"], folder)
        present = all(place.is_dir() for place in places)
        folders.append(_Recorded(entry["folder"], entry["role"], present, _recorded_files(entry, places, source)))
    problems = _problems({file for recorded in folders if recorded.present for file in recorded.files}, progress)
    checks = [
        FolderCheck(
            recorded.label,
            recorded.role,
            recorded.present,
            {file.name: problems.get(file, NOT_CHECKED) for file in recorded.files},
            _extra_files(folder, recorded.files) if recorded is folders[0] else (),
        )
        for recorded in folders
    ]
    return Verification(checks[0], tuple(checks[1:]))


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a folder's soup.json. Raises MergeError when there is none, or none that can be read."""
    if not folder.is_dir():
        raise MergeError(f"{folder} is no folder: give the folder of a soup")
    path = folder / RECORD_FILE
    if not path.is_file():
        raise MergeError(f"{folder} has no {RECORD_FILE}: only folders that soupkit merged can be verified")
    return read_json(path, remedy=REMEDY)


class _RecordedFile(NamedTuple):
    name: str
    path: Path
    num_bytes: int
    algorithm: str
    hash: str


class _Recorded(NamedTuple):
    """A folder as soup.json has it."""

    label: str
    role: str
    present: bool
    files: list[_RecordedFile]


def _recorded_files(record: Mapping[str, Any], places: Sequence[Path], source: Path) -> list[_RecordedFile]:
    """The "files" of a record: plain names only, so that nothing outside the folders is looked at."""
    entries = record.get("files")
    if not isinstance(entries, dict) or not entries:
        raise MergeError(f"{source} lists no files, so it is damaged, or of an earlier version: {REMEDY}")
    files = []
    for name, entry in entries.items():
        plain = name.removeprefix(f"{CHAT_TEMPLATES}/")
        if plain in ("", ".", "..") or any(character in plain for character in "/\\:\0"):
            raise MergeError(
                f"{source} names the file {name!r}, which is no plain file name, so it is damaged or forged: {REMEDY}"
            )
        entry = entry if isinstance(entry, dict) else {}
        # The strongest hash there is.
        algorithm = next((known for known in ("sha256", *ALGORITHMS) if known in entry), DEFAULT)
        num_bytes, digest = entry.get("bytes"), entry.get(algorithm)
        form = f"[0-9a-f]{{{ALGORITHMS[algorithm]}}}"
        if type(num_bytes) is not int or not isinstance(digest, str) or not re.fullmatch(form, digest):
            raise MergeError(
                f"{source} is damaged, or of an earlier version (its entry of the file {name!r} has no bytes and "
                f"hash): {REMEDY}"
            )
        paths = [place / name for place in places]
        path = next((path for path in paths if path.exists()), paths[0])
        files.append(_RecordedFile(name, path, num_bytes, algorithm, digest))
    return files


def _ingredients(record: Mapping[str, Any], source: Path) -> list[dict[str, str]]:
    entries = record.get("ingredients")
    well_formed = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("folder"), str) and isinstance(entry.get("role"), str)
        for entry in entries
    )
    if not isinstance(entries, list) or not well_formed:
        raise MergeError(f"{source} is damaged (its ingredients are not a list of folders with roles): {REMEDY}")
    return entries


def _extra_files(folder: Path, files: Sequence[_RecordedFile]) -> tuple[str, ...]:
    recorded = {file.name for file in files} | NOT_RECORDED
    found = [path for path in contents_of(folder) if path.as_posix() not in recorded and not path.name.startswith(".")]
    return tuple(f"{path.as_posix()}/" if (folder / path).is_dir() else path.as_posix() for path in found)


def _problems(files: Collection[_RecordedFile], progress: bool) -> dict[_RecordedFile, str | None]:
    """Each file's problem, or None. Files are hashed several at a time."""
    problems = {file: _misfit(file) for file in files}
    to_hash = [file for file, problem in problems.items() if problem is None]
    bar = Progress(sum(file.num_bytes for file in to_hash), "verify", progress)

    def check(file: _RecordedFile) -> None:
        if hash_file(file.path, file.algorithm, bar.advance) != file.hash:
            problems[file] = "changed: same size, other content"

    with bar.shown():
        run([partial(check, file) for file in to_hash], parse_num_threads(None), bar)
    return problems


def _misfit(file: _RecordedFile) -> str | None:
    """What can be said of a file without reading it."""
    if not file.path.exists():
        return "missing"
    if not file.path.is_file():
        return "changed: not a regular file"
    found = file.path.stat().st_size
    if found != file.num_bytes:
        return f"changed: {found:,} bytes instead of {file.num_bytes:,}"
    return None

"""Rows of data: where prompts, demonstrations and preference pairs are read from.

    FILE.txt                    one prompt a line
    FILE.parquet                one row each, with the columns below (pip install pyarrow)
    any other file              JSON Lines: one object a line
    FOLDER                      a dataset as ``datasets.Dataset.save_to_disk`` writes it (pip install datasets)
    hf:NAME[[:CONFIG]:SPLIT]    a dataset that ``datasets.load_dataset`` finds; SPLIT is train unless given

:mod:`rlhf.conversations` says which fields a row may have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# A split may be cut as datasets does it, train[:100], so that its colon separates nothing.
_DATASET_NAME = re.compile(r"hf:([^:]+?)(?::([^:\[\]]+))?(?::([^:\[\]]+(?:\[[^\[\]]*\])?))?")


def read_rows(source: str | Path) -> Iterator[tuple[str, Row]]:
    """(where, row) of every row of ``source``, ``where`` naming file and line, or dataset and row, for errors.

    Raises FileNotFoundError where there is nothing of that name, ValueError for what cannot be read, or needs a library
    that is not installed.
    """
    path = Path(source)
    if str(source).startswith("hf:"):
        return _numbered(source, _dataset_rows(str(source)))
    if path.is_dir():
        return _numbered(source, _saved_dataset_rows(path))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a .txt, .jsonl or .parquet file, a folder that datasets' save_to_disk "
            "wrote, or hf:NAME"
        )
    if path.suffix == ".parquet":
        return _numbered(source, _parquet_rows(path))
    return _text_rows(path)


def _numbered(source: str | Path, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _text_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every line that is not blank: the prompt itself (.txt), or a JSON object."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if path.suffix == ".txt":
            yield where, {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg}); write one JSON object a line, or name the file .txt"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object with prompt or messages, found {type(row).__name__}")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: to read Parquet: pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read ({_one_line(error)}); write it again") from None


def _saved_dataset_rows(folder: Path) -> Iterable[Row]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(f"{folder}: has the splits {', '.join(splits)}; give one, such as {folder / splits[0]}")
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(f"{folder}: a folder, but not of datasets' save_to_disk; give a file or such a folder")
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError:
        raise ValueError(f"{folder}: to read a folder of the datasets library: pip install datasets") from None
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # a torn or foreign file surfaces as whatever its reader raises
        raise ValueError(f"{folder}: cannot be loaded ({_one_line(error)}); save the dataset again") from None


def _dataset_rows(source: str) -> Iterable[Row]:
    match = _DATASET_NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    name, config, split = match.groups()
    if split is None:  # the one part that follows the name is the split
        config, split = None, config or "train"
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ValueError(f"{source}: to read a dataset by its name: pip install datasets") from None
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # hub, network and format errors have no common class
        raise ValueError(f"{source}: cannot be loaded ({_one_line(error)}); check name, config and split") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""The tables of a study's results, as CSV files that are replaced in one step; all else is made from them.

file               a row is                        columns beside its measures
=================  ==============================  =====================================================================
`runs.csv`         a run, after training           regime, draw, arm, kl_coef (empty without a reference), version
`models.csv`       a model as it is                regime, draw, model, version; loss, ``start`` is the policy's start
`predictions.csv`  a point of an ideal frontier    regime, draw, reference, kl_coef, version; effective
`timings.csv`      what a row or a stage took      table, regime, draw, name, kl_coef; seconds, workers, machine
=================  ==============================  =====================================================================

Measures (:mod:`analysis.study.measures`) are of responses to the training prompts, with ``held_out/`` before their name
of those to held-out prompts. ``version`` is a hash of the settings that a row depends on. No row of the first three
depends on the clock: an interrupted study gives the same bytes. NaN is an empty cell.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf.metrics import replace_text

RUNS, MODELS, PREDICTIONS, TIMINGS = "runs.csv", "models.csv", "predictions.csv", "timings.csv"
TEXTS = ("regime", "arm", "model", "reference", "version", "table", "name", "machine")
HELD_OUT = "held_out/"

Row = Mapping[str, str | float]


def read_table(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Replace a table; its columns are those of all rows, in the order in which they come up."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[cell(row.get(name, math.nan)) for name in columns] for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def by_draw(rows: Sequence[Row], draws: Sequence[int], measure: str, **where: str | float | None) -> np.ndarray:
    """A measure of the rows that have the given values (None: an empty cell), one a draw; NaN where none has. [D]"""
    found = np.full(len(draws), np.nan)
    for row in rows:
        if all(_same(row.get(name, math.nan), value) for name, value in where.items()) and row["draw"] in draws:
            found[list(draws).index(int(row["draw"]))] = row.get(measure, math.nan)
    return found


def _same(cell: str | float, value: str | float | None) -> bool:
    if value is None:
        return isinstance(cell, float) and math.isnan(cell)
    return cell == value


def _value(name: str, text: str) -> str | float:
    if name in TEXTS:
        return text
    return float(text) if text else math.nan


def cell(value: str | float) -> str:
    """A value as a table holds it."""
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"

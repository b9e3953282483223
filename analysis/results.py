"""What results have in common: measurements at points, filled one by one, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from analysis.metrics import Measured, PerExample
from rlhf.metrics import Estimate


@dataclass
class Measurements:
    """M metrics at N points.

    names     M names, empty until the first point is measured
    values    [M, N]  NaN where not measured yet, or where the metric itself is NaN
    stderr    [M, N]  standard errors; NaN where not measured yet, or where the metric gives none
    done      [N]     True where measured
    examples  {metric: [N, 2, n]}  numerators and denominators of n examples, for metrics that give them
    """

    names: list[str]
    values: np.ndarray
    stderr: np.ndarray
    done: np.ndarray
    examples: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_points: int) -> Measurements:
        """Nothing measured at any point."""
        return cls([], np.empty((0, num_points)), np.empty((0, num_points)), np.zeros(num_points, dtype=bool))

    def record(self, point: int, estimates: Mapping[str, Measured]) -> None:
        """Enter a point's estimates. Raises ValueError when their names are not those of the points before."""
        if not self.names:
            self.names = list(estimates)
            self.values, self.stderr = (np.full((len(estimates), len(self.done)), np.nan) for _ in range(2))
        if list(estimates) != self.names:
            raise ValueError(
                f"metrics: gave {list(estimates)} at point {point}, but {self.names} before; return the same "
                "names in the same order at every point"
            )
        for row, (name, estimate) in enumerate(estimates.items()):
            if isinstance(estimate, PerExample):
                self._keep(point, name, estimate.pairs)
                estimate = estimate.estimate()
            self.values[row, point], self.stderr[row, point] = estimate
        self.done[point] = True

    def _keep(self, point: int, name: str, pairs: np.ndarray) -> None:
        kept = self.examples.setdefault(name, np.full((len(self.done), *pairs.shape), np.nan))
        if kept.shape[1:] != pairs.shape:
            raise ValueError(
                f"metric {name!r}: gave {pairs.shape[1]} examples at point {point}, but {kept.shape[2]} before; "
                "measure the same examples in the same order at every point"
            )
        kept[point] = pairs

    def at(self, point: int) -> dict[str, Estimate]:
        """All metrics at one point."""
        return {
            name: Estimate(float(self.values[row, point]), float(self.stderr[row, point]))
            for row, name in enumerate(self.names)
        }


EXAMPLES = "examples/"  # before a metric's name, where files have its examples


@dataclass(frozen=True)
class PointByPoint:
    """A result that is measured point by point, and kept in a file before it is finished.

    measurements  at all points, in the order of computation
    metadata      what the measurements are of: with another, they are not continued
    """

    measurements: Measurements
    metadata: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.npz`` file, finished or not."""
        fields = {**vars(self), **vars(self.measurements)}
        del fields["measurements"], fields["examples"]
        fields |= {f"{EXAMPLES}{name}": pairs for name, pairs in self.measurements.examples.items()}
        return save_npz(path, type(self).__name__, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote."""
        fields = load_npz(path, cls.__name__)
        examples = {key.removeprefix(EXAMPLES): fields.pop(key) for key in list(fields) if key.startswith(EXAMPLES)}
        measured = {name: fields.pop(name) for name in ("names", "values", "stderr", "done")}
        return cls(**fields, measurements=Measurements(**measured, examples=examples))


class Saved:
    """A dataclass that is kept in a ``.npz`` file, under its class's name."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.npz`` file."""
        return save_npz(path, type(self).__name__, vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote."""
        return cls(**load_npz(path, cls.__name__))


def save_npz(path: str | os.PathLike[str], kind: str, fields: Mapping[str, Any]) -> Path:
    """Write a result's fields to a ``.npz`` file, replacing it in one step: arrays as they are, the others as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in fields.items() if name not in arrays}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, json=np.array(json.dumps({"kind": kind, **others})), **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_npz(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The fields that :func:`save_npz` wrote. Raises ValueError unless the file holds a result of this kind."""
    try:
        with np.load(path, allow_pickle=False) as file:
            fields: dict[str, Any] = {name: file[name] for name in file.files}
        fields |= json.loads(str(fields.pop("json")))
        found = fields.pop("kind")
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError):
        raise ValueError(f"{path}: not a result that analysis saved; give its .npz file") from None
    if found != kind:
        raise ValueError(f"{path}: holds a {found}, expected a {kind}; load it with the class of its kind")
    return fields

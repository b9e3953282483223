"""What a landscape is: metrics at points along a line or over a plane in weight space, named checkpoints among them.

:func:`analysis.line` and :func:`analysis.plane` compute them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from analysis.results import PointByPoint
from rlhf.metrics import Estimate


@dataclass(frozen=True)
class Landscape(PointByPoint):
    """What lines and planes have in common: metrics at points of weight space, named checkpoints among them.

    coordinates   where the named checkpoints are
    measurements  the metrics at all points, in the order of computation
    metadata      checkpoint hashes, settings, and what the metrics measure
    """

    coordinates: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints, in order."""
        return list(self.coordinates)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Every metric on the grid; NaN where not computed yet (see ``done``), or where the metric is NaN."""
        return self._by_name(self.measurements.values)

    @property
    def stderr(self) -> dict[str, np.ndarray]:
        """Every metric's standard error on the grid; NaN where not computed yet, or where the metric gives none."""
        return self._by_name(self.measurements.stderr)

    @property
    def done(self) -> np.ndarray:
        """Which grid points are computed, bool."""
        return self._grid(self.measurements.done)

    @property
    def num_nan(self) -> dict[str, int]:
        """At how many of the computed points, named checkpoints among them, each metric is NaN."""
        computed = self.measurements.values[:, self.measurements.done]
        return dict(zip(self.measurements.names, np.isnan(computed).sum(axis=1).tolist(), strict=True))

    @property
    def examples(self) -> dict[str, np.ndarray]:
        """{metric: [..., 2, n]}: numerators and denominators of n examples on the grid, for metrics that keep them."""
        return {name: self._grid(pairs) for name, pairs in self.measurements.examples.items()}

    @property
    def at(self) -> dict[str, dict[str, Estimate]]:
        """{checkpoint: {metric: estimate}} at the named checkpoints that are computed."""
        points = {name: self._point(name) for name in self.coordinates}
        return {name: self.measurements.at(point) for name, point in points.items() if self.measurements.done[point]}

    def _by_name(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self._grid(row) for name, row in zip(self.measurements.names, rows, strict=True)}

    def _grid(self, row: np.ndarray) -> np.ndarray:
        """The grid's part of a row over all points, in the grid's shape."""
        raise NotImplementedError

    def _point(self, name: str) -> int:
        """The index of a named checkpoint among all points."""
        raise NotImplementedError


@dataclass(frozen=True)
class Line(Landscape):
    """Metrics along a path at N points: ``values[name]`` is [N].

    Through checkpoints, the path is piecewise linear, and t is 0 at the first checkpoint, 1 at the last, in proportion
    to L2 distance; below 0 and above 1 the first and last segment are extended. Along a direction d from one checkpoint
    θ, the points are θ + t d.

    t            [N]  position along the path
    length       L2 distance of a unit of t: t · length is the distance from the first checkpoint along the path
    coordinates  t of every named checkpoint; each is one of the N points
    """

    t: np.ndarray
    length: float

    def _grid(self, row: np.ndarray) -> np.ndarray:
        return row

    def _point(self, name: str) -> int:
        return int(np.flatnonzero(self.t == self.coordinates[name])[0])


@dataclass(frozen=True)
class Plane(Landscape):
    """Metrics over a plane in weight space, on a grid: ``values[name]`` is [steps, steps].

    Grids are indexed [row, column] = [y, x]: ``values[name][i, j]`` belongs to the point origin + x[j] u + y[i] v, with
    u and v the plane's two axes. Named checkpoints need not be on the grid: see ``at``.

    x, y         [steps]  the grid's coordinates
    coordinates  (x, y) of every named checkpoint, and of every marked one's projection onto the plane
    distance     L2 distance of each of them from the plane
    gram         [2, 2]  inner products of the axes, ⟨u, u⟩, ⟨u, v⟩; ⟨v, u⟩, ⟨v, v⟩: a point p = (x, y) is √(p gram pᵀ)
                 from the origin in L2 distance. The identity for orthonormal axes, whose units are L2 distances
    """

    x: np.ndarray
    y: np.ndarray
    distance: dict[str, float]
    gram: np.ndarray = field(default_factory=lambda: np.eye(2))

    # The points are the named checkpoints, then the grid, row by row.

    def _grid(self, row: np.ndarray) -> np.ndarray:
        return row[len(self.coordinates) :].reshape(len(self.y), len(self.x), *row.shape[1:])

    def _point(self, name: str) -> int:
        return self.names.index(name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote."""
        result = super().load(path)
        return replace(result, coordinates={name: tuple(point) for name, point in result.coordinates.items()})

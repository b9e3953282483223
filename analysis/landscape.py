"""Metrics along a path through checkpoints, and over the plane through three.

Distances are L2 norms over all floating-point parameters (tied ones once), in the units of the weights. A model is
written in place, point by point, and put back afterwards bit for bit, also after an exception or Ctrl-C; it is in eval
mode meanwhile. Named checkpoints are measured exactly: by loading them, not by arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis import weights
from analysis.metrics import Metric, describe, measure
from analysis.results import Measurements, load_npz, save_npz
from analysis.weights import Source
from rlhf.metrics import Estimate
from rlhf.models import evaluating


@dataclass(frozen=True)
class Landscape:
    """What lines and planes have in common: metrics at points of weight space, named checkpoints among them.

    coordinates   where the named checkpoints are
    measurements  the metrics at all points, in the order of computation
    metadata      checkpoint hashes, settings, and what the metrics measure
    """

    coordinates: dict[str, Any]
    measurements: Measurements
    metadata: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints, in order."""
        return list(self.coordinates)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Every metric on the grid; NaN where not computed yet."""
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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.npz`` file, finished or not."""
        fields = {**vars(self), **vars(self.measurements)}
        del fields["measurements"]
        return save_npz(path, type(self).__name__, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote."""
        fields = load_npz(path, cls.__name__)
        measurements = Measurements(**{field: fields.pop(field) for field in ("names", "values", "stderr", "done")})
        return cls(**fields, measurements=measurements)


@dataclass(frozen=True)
class Line(Landscape):
    """Metrics along the piecewise-linear path through checkpoints, at N points: ``values[name]`` is [N].

    t            [N]  position along the path: 0 at the first checkpoint, 1 at the last, in proportion to L2 distance;
                      below 0 and above 1 the first and last segment are extended
    length       L2 length of the path, so that t · length is the distance from the first checkpoint along the path
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
    """Metrics over the plane through three checkpoints, on a grid: ``values[name]`` is [steps, steps].

    The first checkpoint is the origin, the second lies on the positive x axis, the third has y > 0; the axes are
    orthonormal, so distances in the plane are L2 distances between weights. Grids are indexed [row, column] = [y, x]:
    ``values[name][i, j]`` belongs to the point (x[j], y[i]). The checkpoints are not on the grid: see ``at``.

    x, y         [steps]  the grid's coordinates
    coordinates  (x, y) of every named checkpoint, and of every marked one's projection onto the plane
    distance     L2 distance of each of them from the plane, 0 for the three
    """

    x: np.ndarray
    y: np.ndarray
    distance: dict[str, float]

    # The points are the named checkpoints, then the grid, row by row.

    def _grid(self, row: np.ndarray) -> np.ndarray:
        return row[len(self.coordinates) :].reshape(len(self.y), len(self.x))

    def _point(self, name: str) -> int:
        return self.names.index(name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote."""
        result = super().load(path)
        return replace(result, coordinates={name: tuple(point) for name, point in result.coordinates.items()})


Result = TypeVar("Result", bound=Landscape)


def line(
    checkpoints: Mapping[str, Source] | Sequence[Source],
    metrics: Mapping[str, Metric],
    *,
    model: nn.Module | None = None,
    steps: int = 11,
    margin: float = 0.0,
    device: str | torch.device = "cpu",
    save: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Line:
    """Metrics along the straight segments from each checkpoint to the next.

    checkpoints  two or more, in order: {name: folder, state dict or module}, or a sequence of folders
    metrics      {name: metric}; see :mod:`analysis.metrics`
    model        the model to move; by default the first folder's language model, on ``device``
    steps        points on each segment, both ends included
    margin       how far the first and last segment are extended beyond the path, as a fraction of their own length;
                 points there keep their segment's spacing, as many as fit
    save         file that holds what is done, written after every point; with ``resume``, continued where it exists

    Raises ValueError when checkpoints do not fit the model or each other, or coincide, or when ``save`` holds another
    computation; FileExistsError when ``save`` exists and ``resume`` is not set.

        path = line(["sft1", "soup", "sft2"], {"loss": metrics.loss(examples, tokenizer)})
        path.values["loss"], path.stderr["loss"]
    """
    sources = weights.named_sources(checkpoints)
    if len(sources) < 2:
        raise ValueError(f"checkpoints={list(sources)}: a line needs at least two; give more")
    model, sources = _prepare(sources, metrics, model, device, steps, margin, save, resume)
    names = list(sources)

    def read(index: int) -> dict[str, Tensor]:
        return weights.read(names[index], sources[names[index]], model)

    hashes, lengths = {}, []
    previous: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        current = read(index)
        hashes[name] = weights.fingerprint(current)
        if previous:
            lengths.append(weights.norm(weights.subtract(current, previous)))
            if lengths[-1] == 0:
                raise ValueError(f"checkpoints {names[index - 1]!r} and {name!r} are equal; leave one out")
        previous = current
    travelled = np.cumsum([0.0, *lengths])
    ends = travelled / travelled[-1]

    @lru_cache(maxsize=1)  # Points come segment by segment, so one segment is in memory at a time.
    def segment(index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start = read(index)
        return start, weights.subtract(read(index + 1), start)

    def put(index: int, fraction: float) -> None:
        if fraction in (0.0, 1.0):
            weights.put(model, read(index + int(fraction)))
        else:
            start, direction = segment(index)
            weights.put(model, start, [direction], [fraction])

    places = _places(len(lengths), steps, margin)
    result = Line(
        t=np.array([_position(ends, index, fraction) for index, fraction in places]),
        coordinates=dict(zip(names, ends.tolist(), strict=True)),
        length=float(travelled[-1]),
        measurements=Measurements.empty(len(places)),
        metadata={"checkpoints": hashes, "steps": steps, "margin": margin, "metrics": describe(metrics)},
    )
    points = [partial(put, index, fraction) for index, fraction in places]
    return _evaluate(result, model, points, metrics, save, "line" if progress else None)


def _places(num_segments: int, steps: int, margin: float) -> list[tuple[int, float]]:
    """(segment, fraction of it) of every point in order; a checkpoint between two segments once, as a start."""
    extra = int(margin * (steps - 1) + 1e-9)
    places = [(0, -step / (steps - 1)) for step in range(extra, 0, -1)]
    places += [(index, step / (steps - 1)) for index in range(num_segments) for step in range(steps - 1)]
    return places + [(num_segments - 1, 1 + step / (steps - 1)) for step in range(extra + 1)]


def _position(ends: np.ndarray, index: int, fraction: float) -> float:
    """t of a point of a segment; exactly that of a checkpoint at a segment's end."""
    return float(ends[index + 1] if fraction == 1 else ends[index] + fraction * (ends[index + 1] - ends[index]))


def plane(
    checkpoints: Mapping[str, Source] | Sequence[Source],
    metrics: Mapping[str, Metric],
    *,
    model: nn.Module | None = None,
    steps: int = 9,
    margin: float = 0.25,
    mark: Mapping[str, Source] | None = None,
    device: str | torch.device = "cpu",
    save: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Plane:
    """Metrics over the plane through three checkpoints.

    checkpoints  three: {name: folder, state dict or module}, or a sequence of folders; the first is the origin
    metrics      {name: metric}; see :mod:`analysis.metrics`
    model        the model to move; by default the first folder's language model, on ``device``
    steps        grid points on each axis, ends included
    margin       how far the grid reaches beyond the three checkpoints, as a fraction of their extent, on each side
    mark         further checkpoints to measure and to show where they project onto the plane, a soup for example
    save         file that holds what is done, written after every point; with ``resume``, continued where it exists

    Raises ValueError when checkpoints do not fit the model or each other, or lie on one line, or when ``save`` holds
    another computation; FileExistsError when ``save`` exists and ``resume`` is not set.

        surface = plane(["sft1", "sft2", "policy"], {"loss": metrics.loss(examples, tokenizer)}, mark={"soup": "soup"})
        surface.values["loss"][i, j]  # at x[j], y[i]
        surface.at["soup"]["loss"].mean
    """
    sources = weights.named_sources(checkpoints)
    if len(sources) != 3:
        raise ValueError(f"checkpoints={list(sources)}: a plane needs three, found {len(sources)}; give three")
    if clash := sorted(sources.keys() & (mark or {}).keys()):
        raise ValueError(f"mark={clash}: names of the plane's own checkpoints; give marks other names")
    names = list(sources)
    model, sources = _prepare({**sources, **(mark or {})}, metrics, model, device, steps, margin, save, resume)

    origin, second, third = (weights.read(name, sources[name], model) for name in names)
    hashes = {name: weights.fingerprint(point) for name, point in zip(names, (origin, second, third), strict=True)}
    axes, corners = _axes(names, origin, second, third)
    coordinates, distance = dict(zip(names, corners, strict=True)), dict.fromkeys(names, 0.0)
    del second, third
    for name in mark or {}:
        marked = weights.read(name, sources[name], model)
        hashes[name] = weights.fingerprint(marked)
        coordinates[name], distance[name] = _project(weights.subtract(marked, origin), axes)

    x, y = (_span([corner[axis] for corner in corners], steps, margin) for axis in (0, 1))
    result = Plane(
        x=x,
        y=y,
        coordinates=coordinates,
        distance=distance,
        measurements=Measurements.empty(len(coordinates) + steps**2),
        metadata={"checkpoints": hashes, "steps": steps, "margin": margin, "metrics": describe(metrics)},
    )

    def put_checkpoint(name: str) -> None:
        weights.put(model, weights.read(name, sources[name], model))

    points: list[Callable[[], None]] = [partial(put_checkpoint, name) for name in coordinates]
    points += [partial(weights.put, model, origin, axes, (a, b)) for b in y.tolist() for a in x.tolist()]
    return _evaluate(result, model, points, metrics, save, "plane" if progress else None)


def _axes(
    names: Sequence[str], origin: weights.Tensors, second: weights.Tensors, third: weights.Tensors
) -> tuple[list[dict[str, Tensor]], list[tuple[float, float]]]:
    """Orthonormal axes by Gram–Schmidt, and the three checkpoints' coordinates on them."""
    along, across = weights.subtract(second, origin), weights.subtract(third, origin)
    width, reach = weights.norm(along), weights.norm(across)
    if width == 0:
        raise ValueError(f"checkpoints {names[0]!r} and {names[1]!r} are equal; a plane needs three that differ")
    x_axis = weights.scale(along, 1 / width)
    shift = weights.inner(across, x_axis)
    rest = weights.combine(across, [x_axis], [-shift])
    height = weights.norm(rest)
    # Nearer than this, the second axis would be made of the rounding of the weights.
    if height <= 1e-3 * max(width, reach):
        raise ValueError(
            f"checkpoint {names[2]!r}: lies on the line through {names[0]!r} and {names[1]!r} (distance {height:.2g}, "
            f"their distance {width:.2g}); use analysis.line, or pass it as mark"
        )
    return [x_axis, weights.scale(rest, 1 / height)], [(0.0, 0.0), (width, 0.0), (shift, height)]


def _project(point: weights.Tensors, axes: Sequence[weights.Tensors]) -> tuple[tuple[float, float], float]:
    """Coordinates of a point relative to the origin, and its distance from the plane."""
    x, y = (weights.inner(point, axis) for axis in axes)
    return (x, y), weights.norm(weights.combine(point, axes, (-x, -y)))


def _span(positions: Sequence[float], steps: int, margin: float) -> np.ndarray:
    low, high = min(positions), max(positions)
    return np.linspace(low - margin * (high - low), high + margin * (high - low), steps)


def _prepare(
    sources: Mapping[str, Source],
    metrics: Mapping[str, Metric],
    model: nn.Module | None,
    device: str | torch.device,
    steps: int,
    margin: float,
    save: str | os.PathLike[str] | None,
    resume: bool,
) -> tuple[nn.Module, dict[str, Source]]:
    """The model to move and the checkpoints, once all that can be known to be wrong without them is checked."""
    describe(metrics)
    if steps < 2:
        raise ValueError(f"steps={steps}: must be at least 2")
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin={margin}: must be finite and at least 0")
    if save is not None and not resume and Path(save).exists():
        raise FileExistsError(f"{save}: exists already; continue it with resume=True, or choose another file")
    model = model if model is not None else weights.load_model(sources, device)
    return model, {name: weights.detached(source, model) for name, source in sources.items()}


def _evaluate(
    result: Result,
    model: nn.Module,
    points: Sequence[Callable[[], None]],
    metrics: Mapping[str, Metric],
    save: str | os.PathLike[str] | None,
    description: str | None,
) -> Result:
    """Measure every point not measured yet. ``points[i]()`` puts the model there."""
    if save is not None and Path(save).exists():
        result = _resumed(result, save)
    measurements = result.measurements
    pending = np.flatnonzero(~measurements.done).tolist()
    bar = tqdm(pending, description, len(points), initial=len(points) - len(pending), disable=description is None)
    with evaluating(model), weights.preserved(model), torch.no_grad(), bar:
        for point in bar:
            points[point]()
            measurements.record(point, measure(metrics, model))
            if save is not None:
                result.save(save)
    return result


def _resumed(result: Result, path: str | os.PathLike[str]) -> Result:
    """``result`` with the measurements of an earlier, perhaps unfinished, computation of the same."""
    earlier = type(result).load(path)
    for key, expected in result.metadata.items():
        if earlier.metadata[key] != expected:
            raise ValueError(
                f"{path}: was computed with {key}={earlier.metadata[key]}, now {expected}; choose another file, or "
                "remove it to start anew"
            )
    return replace(result, measurements=earlier.measurements)

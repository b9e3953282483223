"""Metrics over planes in weight space: through three checkpoints, or spanned by two directions from one.

Distances are L2 norms over all floating-point parameters (tied ones once), in the units of the weights. Named
checkpoints are measured exactly: by loading them, not by arithmetic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from analysis import weights
from analysis.directions import Direction, orthogonal
from analysis.landscape import Plane
from analysis.metrics import Metric, describe
from analysis.paths import spread
from analysis.points import measure_points, prepare
from analysis.results import Measurements
from analysis.weights import Source

COORDINATES = ("orthonormal", "affine")
# Nearer to parallel than this, the second axis would be made of the rounding of the weights.
SMALLEST_SINE = 1e-3


def plane(
    checkpoints: Mapping[str, Source] | Sequence[Source],
    metrics: Mapping[str, Metric],
    *,
    model: nn.Module | None = None,
    steps: int = 9,
    margin: float = 0.25,
    directions: Sequence[Direction] | None = None,
    radius: float | None = None,
    coordinates: str | None = None,
    mark: Mapping[str, Source] | Sequence[Source] | None = None,
    device: str | torch.device = "cpu",
    save: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Plane:
    """Metrics over the plane through three checkpoints, or spanned by two directions from one checkpoint.

    checkpoints  three: {name: folder, state dict or module}, or a sequence of folders; the first is the origin; one
                 with ``directions``
    metrics      {name: metric}; see :mod:`analysis.metrics`
    model        the model to move; by default the first folder's language model, on ``device``
    steps        grid points on each axis, ends included; an odd number with ``radius`` has the origin among them
    margin       how far the grid reaches beyond the named checkpoints, as a fraction of their extent, on each side;
                 without effect with ``radius``
    directions   two of {parameter: tensor}; see :mod:`analysis.directions`
    radius       how far the grid reaches from the origin along each axis, in its units; for directions, where None is
                 for a grid that the marked checkpoints extend
    coordinates  ``orthonormal``: by Gram–Schmidt, x along the first of the two vectors, y > 0 at the second, both in L2
                 distance; for three checkpoints the default. ``affine``: origin + x u + y v with the two vectors as
                 they are, be they orthogonal or not, so x and y count multiples of them; for directions the default.
                 The vectors are the directions, or second − origin and third − origin
    mark         further checkpoints to measure and to show where they project onto the plane, a soup for example
    save         file that holds what is done, written after every point; with ``resume``, continued where it exists

    In memory are three copies of the weights besides the model's own, and a fourth of a ``model`` that is given, to put
    it back. Where a launcher has started several processes, all of them must call: they share the points.

    Raises ValueError when checkpoints or directions do not fit the model, or lie on one line, or when ``save`` holds
    another computation; FileExistsError when ``save`` exists and ``resume`` is not set.

        surface = plane(["sft1", "sft2", "policy"], {"loss": metrics.loss(examples, tokenizer)}, mark={"soup": "soup"})
        surface.values["loss"][i, j]  # at x[j], y[i]
        surface.at["soup"]["loss"].mean
    """
    sources = weights.named_sources(checkpoints)
    marked = weights.named_sources(mark or {})
    coordinates = coordinates or ("orthonormal" if directions is None else "affine")
    _check(sources, marked, directions, radius, coordinates)
    names, restore = list(sources), model is not None
    model, sources = prepare(
        {**sources, **marked},
        metrics,
        model=model,
        device=device,
        steps=steps,
        margin=margin,
        radius=radius,
        save=save,
        resume=resume,
    )

    origin = weights.read(names[0], sources[names[0]], model)
    hashes = {names[0]: weights.fingerprint(origin)}

    def offset(name: str) -> dict[str, Tensor]:
        point = weights.read(name, sources[name], model)
        if name not in hashes:
            hashes[name] = weights.fingerprint(point)
        return weights.difference(point, origin, sources[name])

    @lru_cache(maxsize=1)
    def frame() -> tuple[list[dict[str, Tensor]], np.ndarray, list[tuple[float, float]]]:
        if directions is None:
            vectors = [offset(name) for name in names[1:]]
        else:
            vectors = [weights.read_direction(f"direction {i}", each, model) for i, each in enumerate(directions, 1)]
            if coordinates == "orthonormal":  # Gram–Schmidt is done in place.
                vectors = [{name: tensor.clone() for name, tensor in vector.items()} for vector in vectors]
        return vectors, *_make_axes(vectors, coordinates, names if directions is None else None)

    axes, gram, corners = frame()
    places = dict(zip(names, [(0.0, 0.0), *corners], strict=False))  # a direction's end is no checkpoint
    exact = {place: name for name, place in places.items()}
    distance = dict.fromkeys(names, 0.0)
    for name in marked:
        places[name], distance[name] = _project(offset(name), axes, gram)
    direction_hashes = [] if directions is None else [weights.fingerprint(axis) for axis in axes]
    # The checkpoints are measured first, each a copy of the weights meanwhile: the axes are made anew for the grid.
    del axes
    frame.cache_clear()

    x, y = (
        spread(radius, steps) if radius else _span([place[axis] for place in places.values()], steps, margin)
        for axis in (0, 1)
    )
    result = Plane(
        x=x,
        y=y,
        coordinates=places,
        distance=distance,
        gram=gram,
        measurements=Measurements.empty(len(places) + steps**2),
        metadata={
            "checkpoints": hashes,
            "directions": direction_hashes,
            "steps": steps,
            "margin": margin,
            "radius": radius,
            "coordinates": coordinates,
            "metrics": describe(metrics),
        },
    )

    def put_checkpoint(name: str) -> None:
        point = origin if name == names[0] else weights.read(name, sources[name], model)
        weights.put(model, point)

    def put(place: tuple[float, float]) -> None:
        if place in exact:
            put_checkpoint(exact[place])
        else:
            weights.put(model, origin, frame()[0], place)

    points: list[Callable[[], None]] = [partial(put_checkpoint, name) for name in places]
    points += [partial(put, (a, b)) for b in y.tolist() for a in x.tolist()]
    return measure_points(
        result, model, points, metrics, restore=restore, save=save, progress="plane" if progress else None
    )


def _check(
    sources: Mapping[str, Source],
    marked: Mapping[str, Source],
    directions: Sequence[Direction] | None,
    radius: float | None,
    coordinates: str,
) -> None:
    if directions is None:
        if len(sources) != 3:
            raise ValueError(
                f"checkpoints={list(sources)}: a plane needs three, found {len(sources)}; give three, or one with "
                "two directions"
            )
        if radius is not None:
            raise ValueError(f"radius={radius}: goes with directions; give margin for a plane through checkpoints")
    else:
        if len(sources) != 1 or len(directions) != 2:
            raise ValueError(
                f"checkpoints={list(sources)}: {len(directions)} directions; a plane is spanned by two directions from "
                "one checkpoint; give one, and others as mark"
            )
        if radius is None and not marked:
            raise ValueError("radius: none given, and nothing marked that the grid could reach to; give radius")
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates={coordinates!r}: must be one of {', '.join(COORDINATES)}")
    if clash := sorted(sources.keys() & marked.keys()):
        raise ValueError(f"mark={clash}: names of the plane's own checkpoints; give marks other names")


def _make_axes(
    vectors: Sequence[dict[str, Tensor]], coordinates: str, names: Sequence[str] | None
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """The axes' inner products, and the coordinates of the two vectors' ends. Orthonormal axes take their places.

    ``names`` are those of the origin and the ends, None where the vectors are directions.
    """
    first, second = vectors
    width, reach = weights.norm(first), weights.norm(second)
    if names and width == 0:
        raise ValueError(f"checkpoints {names[0]!r} and {names[1]!r} are equal; a plane needs three that differ")
    if coordinates == "orthonormal":
        _scale_in_place(first, 1 / width)
        shift = orthogonal(second, first)
        height = weights.norm(second)
        gram, ends = np.eye(2), [(width, 0.0), (shift, height)]
    else:
        product = weights.inner(first, second)
        height = math.sqrt(max(reach**2 - (product / width) ** 2, 0.0))
        gram, ends = np.array([[width**2, product], [product, reach**2]]), [(1.0, 0.0), (0.0, 1.0)]
    if names and height <= SMALLEST_SINE * max(width, reach):
        raise ValueError(
            f"checkpoint {names[2]!r}: lies on the line through {names[0]!r} and {names[1]!r} (distance {height:.2g}, "
            f"their distance {width:.2g}); use analysis.line, or pass it as mark"
        )
    if height <= SMALLEST_SINE * reach:
        raise ValueError(
            f"directions: the second is parallel to the first (sine of their angle {height / reach:.2g}); give two "
            "that span a plane, or use analysis.line"
        )
    if coordinates == "orthonormal":
        _scale_in_place(second, 1 / height)
    return gram, ends


def _scale_in_place(vector: dict[str, Tensor], factor: float) -> None:
    for tensor in vector.values():
        tensor.mul_(factor)


def _project(
    offset: dict[str, Tensor], axes: Sequence[weights.Tensors], gram: np.ndarray
) -> tuple[tuple[float, float], float]:
    """Coordinates of a point relative to the origin, and its distance from the plane; ``offset`` is used up."""
    x, y = np.linalg.solve(gram, [weights.inner(offset, axis) for axis in axes]).tolist()
    for axis, coordinate in zip(axes, (x, y), strict=True):
        for name, tensor in offset.items():
            tensor.sub_(axis[name], alpha=coordinate)
    return (x, y), weights.norm(offset)


def _span(positions: Sequence[float], steps: int, margin: float) -> np.ndarray:
    low, high = min(positions), max(positions)
    return np.linspace(low - margin * (high - low), high + margin * (high - low), steps)

"""Metrics along lines in weight space: from checkpoint to checkpoint, or along a direction from one.

Distances are L2 norms over all floating-point parameters (tied ones once), in the units of the weights. Named
checkpoints are measured exactly: by loading them, not by arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from analysis import weights
from analysis.directions import Direction
from analysis.landscape import Line
from analysis.metrics import Metric, describe
from analysis.points import measure_points, prepare
from analysis.results import Measurements
from analysis.weights import Source


def line(
    checkpoints: Mapping[str, Source] | Sequence[Source],
    metrics: Mapping[str, Metric],
    *,
    model: nn.Module | None = None,
    steps: int = 11,
    margin: float = 0.0,
    direction: Direction | None = None,
    radius: float | None = None,
    device: str | torch.device = "cpu",
    save: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Line:
    """Metrics along the straight segments from each checkpoint to the next, or along a direction from one checkpoint.

    checkpoints  two or more, in order: {name: folder, state dict or module}, or a sequence of folders; one with
                 ``direction``
    metrics      {name: metric}; see :mod:`analysis.metrics`
    model        the model to move; by default the first folder's language model, on ``device``
    steps        points on each segment, both ends included; with ``direction`` from −radius to radius, the checkpoint
                 itself besides where an even number leaves it out
    margin       how far the first and last segment are extended beyond the path, as a fraction of their own length;
                 points there keep their segment's spacing, as many as fit
    direction    {parameter: tensor}, used as it is; see :mod:`analysis.directions`
    radius       how far to go along ``direction`` both ways, in multiples of it
    save         file that holds what is done, written after every point; with ``resume``, continued where it exists

    In memory are two copies of the weights besides the model's own, and a third of a ``model`` that is given, to put it
    back. Where a launcher has started several processes, all of them must call: they share the points.

    Raises ValueError when checkpoints do not fit the model or each other, or coincide, or when ``save`` holds another
    computation; FileExistsError when ``save`` exists and ``resume`` is not set.

        path = line(["sft1", "soup", "sft2"], {"loss": metrics.loss(examples, tokenizer)})
        path.values["loss"], path.stderr["loss"]
    """
    sources = weights.named_sources(checkpoints)
    if (direction is None) != (radius is None):
        raise ValueError(f"radius={radius}: goes with direction; give both or neither")
    if direction is None and len(sources) < 2:
        raise ValueError(f"checkpoints={list(sources)}: a line needs at least two; give more, or a direction")
    if direction is not None and (len(sources) != 1 or margin):
        raise ValueError(
            f"checkpoints={list(sources)}, margin={margin}: a line along a direction starts from one checkpoint and "
            "ends at its radius; give one, and no margin"
        )
    restore = model is not None
    model, sources = prepare(
        sources,
        metrics,
        model=model,
        device=device,
        steps=steps,
        margin=margin,
        radius=radius,
        save=save,
        resume=resume,
    )
    along: list[dict[str, Tensor]] = []
    if direction is None:
        hashes, t, coordinates, length, points = _through(sources, model, steps, margin)
    else:
        assert radius is not None
        ((name, source),) = sources.items()
        along = [weights.read_direction("direction", direction, model)]
        origin = weights.read(name, source, model)
        hashes = {name: weights.fingerprint(origin)}
        t = np.unique(np.append(spread(radius, steps), 0.0))
        coordinates, length = {name: 0.0}, weights.norm(along[0])
        # At 0 the checkpoint itself, bit for bit: the sum would lose the signs of its zeros.
        points = [partial(weights.put, model, origin, *((along, [a]) if a else ())) for a in t.tolist()]
    result = Line(
        t=t,
        coordinates=coordinates,
        length=length,
        measurements=Measurements.empty(len(points)),
        metadata={
            "checkpoints": hashes,
            "directions": [weights.fingerprint(each) for each in along],
            "steps": steps,
            "margin": margin,
            "radius": radius,
            "metrics": describe(metrics),
        },
    )
    return measure_points(
        result, model, points, metrics, restore=restore, save=save, progress="line" if progress else None
    )


def _through(
    sources: Mapping[str, Source], model: nn.Module, steps: int, margin: float
) -> tuple[dict[str, str], np.ndarray, dict[str, float], float, list[Callable[[], None]]]:
    """Hashes of the checkpoints, t, their coordinates, length and points of the path through them."""
    names = list(sources)

    def read(index: int) -> dict[str, Tensor]:
        return weights.read(names[index], sources[names[index]], model)

    hashes, lengths = {}, []
    previous: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        current = read(index)
        hashes[name] = weights.fingerprint(current)
        if previous:
            lengths.append(weights.distance(current, previous))
            if lengths[-1] == 0:
                raise ValueError(f"checkpoints {names[index - 1]!r} and {name!r} are equal; leave one out")
        previous = current
    travelled = np.cumsum([0.0, *lengths])
    ends = travelled / travelled[-1]

    @lru_cache(maxsize=1)  # Points come segment by segment, so one segment is in memory at a time.
    def segment(index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start = read(index)
        return start, weights.difference(read(index + 1), start, sources[names[index + 1]])

    def put(index: int, fraction: float) -> None:
        if fraction in (0.0, 1.0):
            weights.put(model, read(index + int(fraction)))
        else:
            start, direction = segment(index)
            weights.put(model, start, [direction], [fraction])

    places = _places(len(lengths), steps, margin)
    t = np.array([_position(ends, index, fraction) for index, fraction in places])
    points: list[Callable[[], None]] = [partial(put, index, fraction) for index, fraction in places]
    return hashes, t, dict(zip(names, ends.tolist(), strict=True)), float(travelled[-1]), points


def _places(num_segments: int, steps: int, margin: float) -> list[tuple[int, float]]:
    """(segment, fraction of it) of every point in order; a checkpoint between two segments once, as a start."""
    extra = int(margin * (steps - 1) + 1e-9)
    places = [(0, -step / (steps - 1)) for step in range(extra, 0, -1)]
    places += [(index, step / (steps - 1)) for index in range(num_segments) for step in range(steps - 1)]
    return places + [(num_segments - 1, 1 + step / (steps - 1)) for step in range(extra + 1)]


def _position(ends: np.ndarray, index: int, fraction: float) -> float:
    """t of a point of a segment; exactly that of a checkpoint at a segment's end."""
    return float(ends[index + 1] if fraction == 1 else ends[index] + fraction * (ends[index + 1] - ends[index]))


def spread(radius: float, steps: int) -> np.ndarray:
    """Evenly spaced from −radius to radius, the middle one exactly 0. [steps]"""
    return radius * (2 * np.arange(steps) - (steps - 1)) / (steps - 1)

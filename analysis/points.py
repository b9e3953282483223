"""Measuring at many points, resumable and by several processes; a model at points of weight space, put back afterwards.

A model is written in place, point by point, and put back bit for bit, also after an exception or Ctrl-C; it is in eval
mode meanwhile. Buffers and integer parameters stay as they are. Where a launcher (``accelerate launch``, ``torchrun``)
has started several processes, all of them must call, each measures its share of the points, and all return the whole;
metrics must then not depend on what was measured before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from analysis import weights
from analysis.metrics import Measured, Metric, describe, measure
from analysis.results import PointByPoint
from analysis.weights import Source
from rlhf.distributed import Processes
from rlhf.models import evaluating

Result = TypeVar("Result", bound=PointByPoint)


def prepare(
    sources: Mapping[str, Source],
    metrics: Mapping[str, Metric],
    *,
    model: nn.Module | None,
    device: str | torch.device,
    steps: int,
    margin: float,
    radius: float | None,
    save: str | os.PathLike[str] | None,
    resume: bool,
) -> tuple[nn.Module, dict[str, Source]]:
    """The model to move and the checkpoints, once all that can be known to be wrong without them is checked."""
    describe(metrics)
    if steps < 2:
        raise ValueError(f"steps={steps}: must be at least 2")
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin={margin}: must be finite and at least 0")
    if radius is not None and not 0 < radius < np.inf:
        raise ValueError(f"radius={radius}: must be finite and above 0")
    require_unstarted(save, resume)
    model = model if model is not None else weights.load_model(sources, device)
    return model, {name: weights.detached(source, model) for name, source in sources.items()}


def require_unstarted(save: str | os.PathLike[str] | None, resume: bool) -> None:
    """Raise FileExistsError when the file of an earlier computation exists that is not to be gone on with."""
    if save is not None and not resume and Path(save).exists():
        raise FileExistsError(f"{save}: exists already; continue it with resume=True, or choose another file")


def measure_points(
    result: Result,
    model: nn.Module,
    points: Sequence[Callable[[], None]],
    metrics: Mapping[str, Metric],
    *,
    restore: bool,
    save: str | os.PathLike[str] | None,
    progress: str | None,
) -> Result:
    """Measure every point not measured yet. ``points[i]()`` puts the model there; ``progress`` names the bar.

    ``restore`` is False for a model that nobody else has: putting it back takes a copy of its weights.
    """

    def measure_at(point: int) -> dict[str, Measured]:
        points[point]()
        return measure(metrics, model)

    with evaluating(model), weights.preserved(model) if restore else nullcontext(), torch.no_grad():
        return measure_each(result, measure_at, save=save, progress=progress)


def measure_each(
    result: Result,
    measure_at: Callable[[int], Mapping[str, Measured]],
    *,
    save: str | os.PathLike[str] | None,
    progress: str | None,
) -> Result:
    """Measure every point not measured yet, ``measure_at(i)`` the i-th, and write the file ``save`` after each.

    Where it exists it is gone on with. ``progress`` names the bar; None shows none.
    """
    if save is not None and Path(save).exists():
        result = _resumed(result, save)
    measurements = result.measurements
    number = len(measurements.done)
    pending = np.flatnonzero(~measurements.done).tolist()
    # An Accelerator of our own would settle the precision of those that a program makes later.
    processes = Processes() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    mine = pending[processes.share(len(pending))] if processes else pending
    is_main = processes is None or processes.is_main
    silent = progress is None or not is_main
    with tqdm(total=number, desc=progress, initial=number - len(pending), disable=silent) as bar:
        for step in range(-(-len(pending) // (processes.number if processes else 1))):
            with processes.failing_together(Exception) if processes else nullcontext():
                found = [(point, measure_at(point)) for point in mine[step : step + 1]]
            for point, estimates in processes.gather(found) if processes else found:
                measurements.record(point, estimates)
                bar.update()
            if save is not None and is_main:
                result.save(save)
    return result


def _resumed(result: Result, path: str | os.PathLike[str]) -> Result:
    """``result`` with the measurements of an earlier, perhaps unfinished, computation of the same."""
    earlier = type(result).load(path)
    for key, expected in result.metadata.items():
        if earlier.metadata.get(key) != expected:
            raise ValueError(
                f"{path}: was computed with {key}={earlier.metadata.get(key)}, now {expected}; choose another file, or "
                "remove it to start anew"
            )
    return replace(result, measurements=earlier.measurements)

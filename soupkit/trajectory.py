"""Averages along one training run: its checkpoints in order, their exponential average, the mean of the latest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from soupkit.api import Model, merge
from soupkit.errors import MergeError
from soupkit.options import Options
from soupkit.recipe import Recipe
from soupkit.tables import name_list

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def checkpoints_of(run_folder: str | Path) -> list[Path]:
    """A training run's checkpoint folders, oldest first: ordered by the last number in their names.

    ``checkpoint-20`` comes before ``checkpoint-100``. Sub-folders count that have a number in their name and weights in
    them, and are no soups; they are looked for in ``run_folder/checkpoints`` where that exists (as in the runs of
    ``rlhf.ppo``), else in ``run_folder`` itself (as in those of transformers).

    Raises MergeError when there are none, or when their names do not tell the order: two have the same last number, or
    they differ in more than numbers.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise MergeError(f"{run_folder} is no folder: give the folder of a training run, or a list of checkpoints")
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    paths = sorted(filter(_is_checkpoint, sorted(folder.iterdir())), key=_last_number)
    if not paths:
        raise MergeError(
            f"{folder} holds no checkpoints (sub-folders with weights and a number in their name, such as "
            "checkpoint-20): give the folder of a training run, or a list of checkpoints"
        )
    patterns = {re.sub(r"\d+", "", path.name) for path in paths}
    if len(patterns) > 1 or len({_last_number(path) for path in paths}) < len(paths):
        names = name_list([path.name for path in paths])
        raise MergeError(f"{folder} holds {names}, whose names do not tell their order: give a list of checkpoints")
    return paths


def ema(
    run_or_checkpoints: str | Path | Sequence[Model],
    decay: float,
    *,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Any:
    """The exponential moving average of a run's checkpoints: e₁ = m₁, eᵢ = decay eᵢ₋₁ + (1 − decay) mᵢ.

    The last eₙ, computed in one pass as the weighted sum of all checkpoints. ``decay``, from 0 to 1, counts per
    checkpoint, not per training step: one of 0.5 halves a checkpoint's share with every later one.

    ``run_or_checkpoints``: a run's folder, or its checkpoints, oldest first, as folders, state dicts or modules.
    Options, result and errors are those of :func:`soupkit.merge`; errors also those of :func:`checkpoints_of`.

    Paper: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging",
    https://doi.org/10.1137/0330046, in its exponential form
    """
    recipe = Recipe("ema", _checkpoints(run_or_checkpoints), parameters={"decay": decay})
    return merge(recipe, out=out, **options)


def lawa(
    run_or_checkpoints: str | Path | Sequence[Model],
    last: int,
    *,
    every: int = 1,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Any:
    """The plain mean of a run's ``last`` checkpoints (latest weight averaging), of which only each ``every``-th counts.

    Counted back from the last one, which is always in: of checkpoints 1 to 7, ``last=3, every=2`` takes 3, 5 and 7.

    ``run_or_checkpoints``: a run's folder, or its checkpoints, oldest first, as folders, state dicts or modules.
    Options, result and errors are those of :func:`soupkit.merge`; errors also those of :func:`checkpoints_of`, and
    MergeError when there are too few.

    Paper: Kaddour 2022, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging",
    https://arxiv.org/abs/2209.14981
    """
    if last < 1 or every < 1:
        raise MergeError(f"last is {last} and every is {every}: both must be at least 1")
    checkpoints = _checkpoints(run_or_checkpoints)
    chosen = checkpoints[::-1][::every][:last][::-1]
    if len(chosen) < last:
        raise MergeError(
            f"found {len(checkpoints)} checkpoints, and last={last} with every={every} takes "
            f"{(last - 1) * every + 1}: choose a smaller last"
        )
    return merge(Recipe("lawa", chosen), out=out, **options)


def _is_checkpoint(path: Path) -> bool:
    if path.name.startswith(".") or not re.search(r"\d", path.name) or (path / "soup.json").exists():
        return False
    return any(any(path.glob(files)) for files in WEIGHT_FILES)


def _last_number(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[-1])


def _checkpoints(run_or_checkpoints: str | Path | Sequence[Model]) -> list[Model]:
    if isinstance(run_or_checkpoints, (str, Path)):
        return list(checkpoints_of(run_or_checkpoints))
    return list(run_or_checkpoints)

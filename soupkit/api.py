"""The front door: merges of tensors, state dicts, modules and folders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from torch.nn import Module

from soupkit.adapters import merge_adapters, parse_weights
from soupkit.checkpoint import folders_of
from soupkit.engine import parse_num_threads
from soupkit.errors import MergeError
from soupkit.files import expanded
from soupkit.folder import FolderOptions, merge_into_folders, merge_into_memory, plan_folders
from soupkit.lora import is_adapter
from soupkit.memory import MemoryOptions, merge_modules, merge_state_dicts, merge_tensors
from soupkit.options import (
    DEFAULTS,
    Options,
    check_options,
    effective,
    parse_device,
    parse_dtype,
    parse_size,
    refuse_without_effect,
)
from soupkit.publish import check_target
from soupkit.recipe import Recipe, load_recipe
from soupkit.settings import Settings
from soupkit.sources import in_order

Model = Tensor | Mapping[str, Tensor] | Module | str | Path


def merge(
    recipe: Recipe | str | Path | Mapping[str, Any], *, out: str | Path | None = None, **options: Unpack[Options]
) -> Any:
    """Merge models by a recipe: any method of ``soupkit.METHODS``.

    The four kinds of models give the same values bit for bit, and the result is of their kind:

    - tensors give a tensor, on the first one's device;
    - state dicts give a state dict; names that share one tensor share one in the soup;
    - modules give a module: a copy of the first with merged parameters and persistent buffers, ties kept;
    - folders (or hub ids), as ``save_pretrained`` writes them, give a state dict, streamed so that only the result is
      held; with ``out`` they give a folder there, streamed too, and its path.

    Floating-point tensors are merged in a wider precision (float32 for 16 and 8 bits, float64 for float32) and rounded
    once. Integer tensors must be equal in all models; BatchNorm's ``num_batches_tracked`` is the first's.

    Args:
        recipe: a :class:`Recipe`, a recipe file (YAML or JSON, in our form or mergekit's), or such a file's content.
        out: the folder to write (folders only). It appears complete or not at all, with the first model's config and
            tokenizer, with ``soup.json`` (recipe, and hashes of all files) and a model card.
        dtype: of the soup's floating-point tensors. None: the recipe's, else the models' own, promoted where they
            differ (bfloat16 for float8).
        overwrite: replace the checkpoint at ``out``, once the new one is complete.
        max_shard_size: bytes, or text such as "5GB". None: files cut as in the first model.
        allow_nonfinite: go on where a model holds NaN or infinite values, which then stay in their places; they are
            counted in ``soup.json`` and in a warning. By default they are an error.
        allow_pickle: read weights, and nothing but weights, from ``pytorch_model.bin`` where there is no safetensors.
        hash: "xxh3_tree" (fast) or "sha256" (as hubs show it), for ``soup.json``.
        sync: wait until the disk has all of ``out`` before it appears, against a power cut. By default it appears once
            all is written, as copied files do, and the system brings it to the disk within seconds.
        device: where folders are merged, such as "cuda".
        num_threads: None is one for each core. The result does not depend on it.
        progress: show a progress bar on stderr. Merges of tensors, state dicts and modules show none.

    An option that would change nothing is an error: ``overwrite``, ``max_shard_size``, ``hash`` and ``sync`` without
    ``out``; these, ``allow_pickle`` and ``device`` for models other than folders, which are merged where they are.

    Raises:
        MergeError (a ValueError): a recipe or models that do not fit, with the offender and the fix in one line.
        FileExistsError: ``out`` exists and ``overwrite`` is False.

    Example:
        >>> base, a, b = (torch.tensor(x) for x in ([0.0, 0.0], [1.0, 2.0], [3.0, -1.0]))
        >>> soupkit.merge(soupkit.Recipe("ties", [a, b], base=base, parameters={"weight": 1}))
        tensor([2., 2.])
        >>> soupkit.merge("recipe.yaml", out="runs/soup")
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return _merge([recipe], None if out is None else [Path(out)], options)[0]


def average(
    models: Sequence[Model],
    weights: Sequence[float] | None = None,
    *,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Any:
    """Weighted average of models, a model soup: Σᵢ wᵢ mᵢ / Σᵢ wᵢ, tensor by tensor.

    Args:
        models: one or more of the same kind, with the same tensor names and shapes.
        weights: one per model, finite and not negative; they are divided by their sum. None: uniform.

    Kinds of models, the other arguments, precision and errors are those of :func:`merge`. The uniform average of two
    models, in their own dtype, is exact: the true mean rounded once. Folders of LoRA adapters of one base give an
    adapter that adds exactly the average of what they add (:func:`soupkit.adapters.merge_adapters`). A folder that is
    given twice counts twice, with a warning where the soup is written.

    Example:
        >>> soupkit.average([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])])
        tensor([2., 4.])
        >>> soupkit.average(["runs/sft1", "runs/sft2"], [0.7, 0.3], out="runs/soup")

    Paper: Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
    """
    recipe = average_recipe(models, weights)
    if recipe.models and all(isinstance(model, (str, Path)) and is_adapter(expanded(model)) for model in recipe.models):
        return _average_adapters(recipe.models, weights, out, options)
    return merge(recipe, out=out, **options)


def average_recipe(models: Sequence[Model], weights: Sequence[float] | None = None) -> Recipe:
    """The recipe of :func:`average`. Raises MergeError for what is not a weighting."""
    if isinstance(models, (str, Path, Tensor, Mapping, Module)):
        raise MergeError(f"found one {type(models).__name__} where a list of models belongs: write [a, b]")
    models = list(models)
    if weights is None:
        return Recipe("linear", models)
    return Recipe("linear", models, model_parameters=[{"weight": w} for w in _checked_weights(weights, len(models))])


def interpolate(
    a: Model,
    b: Model,
    t: float,
    *,
    method: str = "linear",
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Any:
    """The model at ``t`` on the way from ``a`` (t = 0) to ``b`` (t = 1); t outside [0, 1] extrapolates.

    ``method="linear"``: (1 − t) a + t b. ``method="slerp"``: (sin((1−t)θ) a + sin(tθ) b) / sin θ for each tensor, with
    θ the angle between the two flattened tensors; the straight line where |cos θ| > 0.9995, as between most
    fine-tunings of one model, or a tensor is zero.

    Kinds of models, the other arguments, precision and errors are those of :func:`merge`; ``t`` must be finite.

    Example:
        >>> soupkit.interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5, method="slerp")
        tensor([0.7071, 0.7071])

    Papers: Wortsman et al. 2021 (WiSE-FT), https://arxiv.org/abs/2109.01903;
    Shoemake 1985, https://doi.org/10.1145/325334.325242
    """
    return merge(_between(a, b, t, method), out=out, **options)


def sweep(
    a: Model,
    b: Model,
    ts: Sequence[float],
    *,
    method: str = "linear",
    outs: Sequence[str | Path] | None = None,
    **options: Unpack[Options],
) -> list[Any]:
    """The models at every ``t`` of ``ts`` on the way from ``a`` to ``b``, all made in one pass over the two.

    Reading is what a merge of folders mostly does, so many points cost little more than one. With ``outs``, one folder
    for each t; they appear one after another once all are complete, streamed, so that none is ever held. Without
    ``outs`` the models are returned, and so all are in memory at once: for many points of large models, write folders.
    The same t twice is an error.

    Paper: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models" (WiSE-FT), https://arxiv.org/abs/2109.01903
    """
    if not len(ts):
        raise MergeError("ts is empty: give at least one t")
    recipes = [_between(a, b, t, method) for t in ts]
    for position, t in enumerate(ts):
        if t in ts[:position]:
            raise MergeError(f"t = {t} is given twice: give each point once")
    if outs is not None and (len(outs) != len(ts) or len({os.path.abspath(out) for out in outs}) != len(ts)):
        raise MergeError(f"found {len(outs)} output folders for {len(ts)} values of t: give each one of its own")
    return _merge(recipes, None if outs is None else [Path(out) for out in outs], options)


def _average_adapters(
    adapters: Sequence[str | Path], weights: Sequence[float] | None, out: str | Path | None, options: Options
) -> Path:
    check_options(options)
    refused = sorted(effective(options).keys() - {"overwrite", "allow_pickle", "progress"})
    if refused:
        raise MergeError(
            f"{', '.join(refused)} is no option for LoRA adapters: leave it out, or fold each into its base"
        )
    if out is None:
        raise MergeError("the average of LoRA adapters is an adapter folder: give out, where to write it")
    _warn_of_repeats(adapters)
    overwrite, allow_pickle = options.get("overwrite", False), options.get("allow_pickle", False)
    return merge_adapters(adapters, weights, out, overwrite=overwrite, allow_pickle=allow_pickle)


def _between(a: Model, b: Model, t: float, method: str) -> Recipe:
    if method not in ("linear", "slerp"):
        raise MergeError(f"unknown method {method!r}: interpolate takes 'linear' or 'slerp'")
    try:
        t = float(t)
    except (TypeError, ValueError):
        raise MergeError(f"t must be a number (0 gives a, 1 gives b); found {t!r}") from None
    if not abs(t) < float("inf"):
        raise MergeError(f"t is {t}: it must be finite (0 gives a, 1 gives b)")
    if method == "slerp":
        return Recipe("slerp", [a, b], parameters={"t": t})
    own: list[Settings] = [{"weight": 1 - t}, {"weight": t}]
    return Recipe("linear", [a, b], parameters={"normalize": False}, model_parameters=own)


def _checked_weights(weights: Sequence[float], num_models: int) -> list[float]:
    values = parse_weights(weights, num_models)
    for position, value in enumerate(values, start=1):
        if value < 0:
            raise MergeError(
                f"weight {position} is {value:g}: weights must not be negative "
                "(to go beyond an ingredient, use interpolate with t outside [0, 1])"
            )
    return values


def _merge(recipes: Sequence[Recipe], outs: Sequence[Path] | None, options: Options) -> list[Any]:
    """Check the call, then hand it to the level of its models. Recipes differ in their parameters alone."""
    recipe = recipes[0]
    check_options(options)
    settled: Options = {**DEFAULTS, **options}
    for each in recipes:
        each.validate()
    dtype = parse_dtype(recipe.dtype if settled["dtype"] is None else settled["dtype"])
    num_threads = parse_num_threads(settled["num_threads"])
    kind = _kind(in_order(recipe.models, recipe.base))
    if any((_kind([fisher]) == "folder") != (kind == "folder") for fisher in recipe.fishers):
        raise MergeError(f"each model is a {kind}: give Fisher information of that kind too")
    if outs is not None and kind != "folder":
        raise MergeError(f"out={str(outs[0])!r} is for folders, and each model is a {kind}: save the result yourself")
    refuse_without_effect(options, kind, writes=outs is not None)
    if kind == "folder":
        folder_options = FolderOptions(
            dtype=dtype,
            allow_nonfinite=settled["allow_nonfinite"],
            allow_pickle=settled["allow_pickle"],
            num_threads=num_threads,
            device=parse_device(settled["device"]),
            progress=settled["progress"],
            overwrite=settled["overwrite"],
            max_shard_size=parse_size(settled["max_shard_size"]),
            hash=settled["hash"],
            sync=settled["sync"],
        )
        return _merge_folders(recipes, outs, folder_options)
    if recipe.tokenizer is not None:
        raise MergeError(f"tokenizer is for folders, and each model is a {kind}: leave it out")
    memory_options = MemoryOptions(dtype, settled["allow_nonfinite"], num_threads)
    levels: dict[str, Any] = {"tensor": merge_tensors, "state dict": merge_state_dicts, "module": merge_modules}
    merged: list[Any] = levels[kind](recipes, memory_options)
    return merged


def _merge_folders(recipes: Sequence[Recipe], outs: Sequence[Path] | None, options: FolderOptions) -> list[Any]:
    recipe = recipes[0]
    read = in_order(recipe.models, recipe.base, recipe.fishers)
    if recipe.tokenizer not in (None, "base", "union"):
        read.append(recipe.tokenizer)
    for out in outs or []:
        check_target(out, read, options.overwrite)
    plan = plan_folders(recipes, options)
    if outs is None:
        return merge_into_memory(plan, options)
    _warn_of_repeats(recipe.models)
    return merge_into_folders(plan, outs, options)


def _warn_of_repeats(models: Sequence[str | Path]) -> None:
    """Warn of a folder that is merged with itself: on a command line it is rarely meant."""
    places = [[folder.resolve() for folder in folders_of(str(model))] for model in models]
    for position, place in enumerate(places):
        if place in places[:position]:
            warnings.warn(f"{models[position]} is given twice: each counts as a model of its own", stacklevel=2)


def _kind(models: Sequence[Any]) -> str:
    """The one kind that all models are of."""
    kinds = []
    for position, model in enumerate(models, start=1):
        for types, kind in ((Tensor, "tensor"), (Mapping, "state dict"), (Module, "module"), ((str, Path), "folder")):
            if isinstance(model, types):
                kinds.append(kind)
                break
        else:
            raise MergeError(
                f"model {position} is a {type(model).__name__}: give folders, state dicts, modules or tensors"
            )
    for position, kind in enumerate(kinds, start=1):
        if kind != kinds[0]:
            raise MergeError(f"model 1 is a {kinds[0]} and model {position} is a {kind}: give models of one kind")
    return kinds[0]

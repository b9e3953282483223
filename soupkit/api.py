"""The front door: one call for tensors, state dicts, modules and folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from soupkit.errors import MergeError
from soupkit.folder import merge_into_folder, merge_into_memory, parse_size, plan_folders
from soupkit.memory import merge_modules, merge_state_dicts, merge_tensors
from soupkit.methods import find_method
from soupkit.planning import parse_dtype

Model = Tensor | Mapping[str, Tensor] | Module | str | Path


def average(
    models: Sequence[Model],
    weights: Sequence[float] | None = None,
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    progress: bool = True,
) -> Any:
    """Weighted average of models, a model soup: Σᵢ wᵢ mᵢ / Σᵢ wᵢ, tensor by tensor.

    The four kinds of models give the same values bit for bit:

    - tensors give a tensor, on the first one's device;
    - state dicts give a state dict; names that share one tensor share one in the soup;
    - modules give a module: a copy of the first with merged parameters and persistent buffers, ties kept;
    - folders (or hub ids), as ``save_pretrained`` writes them, give a state dict, streamed so that only the result is
      held; with ``out`` they give a folder there, streamed too, and its path.

    Floating-point tensors are merged in a wider precision (float32 for float16 and bfloat16, float64 for float32) and
    rounded once, so the uniform average of two, in their own dtype, is exact. Integer tensors must be equal in all
    models; BatchNorm's ``num_batches_tracked`` is the first's. NaN and infinite values stay where they are, and a
    warning counts them.

    Args:
        models: one or more of the same kind, with the same tensor names and shapes.
        weights: one per model, finite and not negative; they are divided by their sum. None: uniform.
        out: the folder to write (folders only). It appears complete or not at all, with the first model's config and
            tokenizer, and with ``soup.json``: method, weights, and the ingredients' hashes.
        dtype: of the soup's floating-point tensors. None: the models' own, promoted where they differ.
        overwrite: replace the checkpoint at ``out``, once the new one is complete.
        max_shard_size: bytes, or text such as "5GB". None: files cut as in the first model.
        progress: show a progress bar on stderr (folders only).

    Raises:
        MergeError (a ValueError): models or weights that do not fit, with the offender and the fix in one line.
        FileExistsError: ``out`` exists and ``overwrite`` is False.

    Example:
        >>> soupkit.average([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])])
        tensor([2., 4.])
        >>> soupkit.average(["runs/sft1", "runs/sft2"], [0.7, 0.3], out="runs/soup")

    Paper: Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
    """
    return _merge(models, "average", {"weights": weights}, out, dtype, overwrite, max_shard_size, progress)


def interpolate(
    a: Model,
    b: Model,
    t: float,
    *,
    method: str = "linear",
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    progress: bool = True,
) -> Any:
    """The model at ``t`` on the way from ``a`` (t = 0) to ``b`` (t = 1); t outside [0, 1] extrapolates.

    ``method="linear"``: (1 − t) a + t b. ``method="slerp"``: (sin((1−t)θ) a + sin(tθ) b) / sin θ for each tensor, with
    θ the angle between the two flattened tensors; the straight line where |cos θ| > 0.9995 or a tensor is zero.

    Kinds of models, the other arguments, precision and errors are those of :func:`average`; ``t`` must be finite.

    Example:
        >>> soupkit.interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5, method="slerp")
        tensor([0.7071, 0.7071])

    Papers: Wortsman et al. 2021 (WiSE-FT), https://arxiv.org/abs/2109.01903;
    Shoemake 1985, https://doi.org/10.1145/325334.325242
    """
    if method not in ("linear", "slerp"):
        raise MergeError(f"unknown method {method!r}: interpolate takes 'linear' or 'slerp'")
    return _merge([a, b], method, {"t": t}, out, dtype, overwrite, max_shard_size, progress)


def _merge(
    models: Sequence[Model],
    method: str,
    parameters: Mapping[str, Any],
    out: str | Path | None,
    dtype: torch.dtype | str | None,
    overwrite: bool,
    max_shard_size: int | str | None,
    progress: bool,
) -> Any:
    """Check the call, then hand it to the level of its models."""
    if isinstance(models, (str, Path, Tensor, Mapping, Module)):
        raise MergeError(f"found one {type(models).__name__} where a list of models belongs: write [a, b]")
    ingredients: list[Any] = list(models)
    row = find_method(method)
    resolved = row.resolve(parameters, len(ingredients))
    soup_dtype = parse_dtype(dtype)
    shard_size = parse_size(max_shard_size)
    kind = _kind(ingredients)
    if kind == "folder":
        plan = plan_folders(ingredients, method, resolved, soup_dtype)
        if out is None:
            return merge_into_memory(plan, progress)
        return merge_into_folder(plan, Path(out), overwrite=overwrite, max_shard_size=shard_size, progress=progress)
    if out is not None:
        raise MergeError(f"out={str(out)!r} is for folders, and each model is a {kind}: save the result yourself")
    if kind == "tensor":
        return merge_tensors(ingredients, row, resolved, soup_dtype)
    if kind == "state dict":
        return merge_state_dicts(ingredients, row, resolved, soup_dtype)
    return merge_modules(ingredients, row, resolved, soup_dtype)


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

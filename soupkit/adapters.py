"""Soups of LoRA adapters: the weighted average of what they add to one base, as one adapter, exactly.

Averaging the matrices A and B apart would add terms B_i A_j that no adapter has. Side by side they give the average of
the products: Σ w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], at the price of the summed rank.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from soupkit.checkpoint import companion_files, copy_companions, locate
from soupkit.errors import MergeError
from soupkit.files import write_json
from soupkit.hashing import DEFAULT, hash_file
from soupkit.lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter, read_adapter
from soupkit.provenance import VERSION, file_entry, files_of
from soupkit.publish import check_target, published_folder
from soupkit.sources import load_tensor


def merge_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None,
    out: str | Path,
    *,
    normalize: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Write the adapter folder ``out`` whose update of each weight is Σ w_i s_i B_i A_i, with s_i = alpha_i / r_i.

    Its matrices are A = [A_1; A_2; ...] [Σ r_i, in] and B = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [out, Σ r_i], in float32,
    and its lora_alpha is its rank, so that its own scale is 1. An adapter without a module adds nothing to it. Modules
    that are saved whole (modules_to_save) are averaged, which asks for them in every adapter.

    Args:
        adapters: folders (or hub ids) of LoRA adapters of one base.
        weights: one finite number per adapter; None is uniform. Divided by their sum, unless ``normalize=False``.
        out: the folder to write, complete or absent; with ``overwrite`` it may exist.
        allow_pickle: read adapter_model.bin, its weights and nothing else.

    Returns ``out``. Raises MergeError for adapters that differ in their base or cannot be read, and FileExistsError.

    Example:
        >>> merge_adapters(["runs/lora1", "runs/lora2"], [0.3, 0.7], "runs/lora-soup")
    """
    if isinstance(adapters, (str, Path)):
        raise MergeError(f"found one {type(adapters).__name__} where a list of adapters belongs: write [a, b]")
    out = Path(os.path.abspath(out))
    opened = [read_adapter(locate(adapter, allow_pickle), str(adapter), allow_pickle) for adapter in adapters]
    shares = _shares(weights, len(opened), normalize)
    _require_one_base(opened)
    saved = _saved_whole(opened, shares)
    check_target(out, adapters, overwrite)
    companion_files(opened[0].folder)  # before the work, for what it refuses
    tensors, ranks = _matrices(opened, shares)
    with published_folder(out, overwrite) as partial:
        copy_companions(opened[0].folder, partial)
        (partial / WEIGHTS_FILE).write_bytes(save(tensors | saved, metadata={"format": "pt"}))
        write_json(partial / CONFIG_FILE, _config(opened[0], ranks, saved))
        write_json(partial / "soup.json", _record(opened, shares, partial))
    return out


def parse_weights(weights: Sequence[float], num_ingredients: int) -> list[float]:
    """One finite number per ingredient. Raises MergeError for anything else."""
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise MergeError(f"weights must be numbers, one per ingredient; found {weights!r}") from None
    if len(values) != num_ingredients:
        raise MergeError(f"found {len(values)} weights for {num_ingredients} ingredients: give one each")
    for position, value in enumerate(values, start=1):
        if not math.isfinite(value):
            raise MergeError(f"weight {position} is {value}: weights must be finite")
    return values


def _shares(weights: Sequence[float] | None, num: int, normalize: bool) -> list[float]:
    if num == 0:
        raise MergeError("no adapters to merge: give at least one folder")
    shares = [1.0] * num if weights is None else parse_weights(weights, num)
    total = math.fsum(shares)
    if normalize and total == 0:
        raise MergeError(f"weights {shares} have the sum 0: give weights with another sum, or normalize=False")
    return [share / total for share in shares] if normalize else shares


def _require_one_base(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        for key in ("base_model_name_or_path", "task_type"):
            a, b = first.config.get(key), other.config.get(key)
            if a != b and a is not None and b is not None:
                raise MergeError(
                    f"{CONFIG_FILE} disagrees: {key} is {a!r} in {first.label} and {b!r} in {other.label}: merge "
                    "adapters of one base, and where it merely moved, make the two alike"
                )
        if first.is_transposed != other.is_transposed:
            raise MergeError(
                f"fan_in_fan_out differs between {first.label} and {other.label}: merge adapters of one base"
            )


def _matrices(adapters: Sequence[Adapter], shares: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The stacked matrices by their names in the file, and each module's rank."""
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.updates):
        rows, columns = [], []
        for adapter, share in zip(adapters, shares, strict=True):
            update = adapter.updates.get(module)
            if update is not None:
                rows.append(load_tensor(update.a).float())
                # Scaled in float64, for one rounding.
                columns.append((load_tensor(update.b).double() * (share * update.scale)).float())
        if len({a.shape[1] for a in rows}) > 1 or len({b.shape[0] for b in columns}) > 1:
            raise MergeError(f"the adapters' matrices of {module!r} differ in size: merge adapters of one base")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.cat(rows)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.cat(columns, dim=1)
        ranks[module] = sum(len(a) for a in rows)
    return tensors, ranks


def _saved_whole(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, Tensor]:
    """The average of tensors that adapters hold whole, by their names in the file."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.replacements)
    averaged = {}
    for name in names:
        lacking = next((adapter.label for adapter in adapters if name not in adapter.replacements), None)
        if lacking is not None or not math.isclose(math.fsum(shares), 1):
            reason = f"{lacking} lacks it" if lacking is not None else f"the weights' sum is {math.fsum(shares)}, not 1"
            raise MergeError(
                f"{name!r} is saved whole, and {reason}: its average needs the base, so fold each adapter into it "
                "(BASE+ADAPTER) and merge those"
            )
        sources = [adapter.replacements[name] for adapter in adapters]
        if len({source.shape for source in sources}) > 1:
            raise MergeError(f"the adapters' {name!r} differ in size: merge adapters of one base")
        parts = [load_tensor(source).double() * share for source, share in zip(sources, shares, strict=True)]
        module = name.removesuffix(".weight")
        if any(module in adapter.updates for adapter in adapters):  # peft's name for what lies below an update
            name = f"{module}.base_layer.weight"
        averaged[PREFIX + name] = torch.stack(parts).sum(dim=0).float()
    return averaged


def _config(first: Adapter, ranks: dict[str, int], saved: dict[str, Tensor]) -> dict[str, Any]:
    """The first adapter's config with the summed ranks, each module by its full name, and a scale of 1 everywhere."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else first.config["r"]
    others = {module: number for module, number in ranks.items() if number != rank}
    replaced = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks) or first.config.get("target_modules"),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    return first.config | replaced


def _record(adapters: Sequence[Adapter], shares: Sequence[float], folder: Path) -> dict[str, Any]:
    models = [{"model": adapter.label, "weight": share} for adapter, share in zip(adapters, shares, strict=True)]
    recipe = {"method": "linear", "models": models, "parameters": {"normalize": False}}
    ingredients = [
        {"folder": adapter.label, "role": "ingredient", "files": {adapter.file.name: file_entry(adapter.file, _hashes)}}
        for adapter in adapters
    ]
    files = files_of(folder, _hashes)
    return {"soupkit": VERSION, "recipe": recipe, "ingredients": ingredients, "files": files, "dtype": "float32"}


def _hashes(path: Path) -> dict[str, str]:
    return {DEFAULT: hash_file(path)}

"""PEFT's LoRA adapters: what a folder holds, and the base's weights with the adapter folded in, W + s B A.

s = lora_alpha / r, or lora_alpha / √r with use_rslora; A [r, in], B [out, r], W [out, in] (transposed, [in, out], where
fan_in_fan_out is set, as for GPT-2). Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685;
rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732

What an adapter_config.json sets and this module does not know is refused by name: folded without it, the weights would
be others than those that were trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.files import INDEX_FILE, SINGLE_FILE, read_json, require_own_file
from soupkit.heads import tied_names
from soupkit.pickled import read_pickle
from soupkit.safetensors_format import read_header
from soupkit.sources import Reader, TensorSource, load_tensor, merge_dtype, wider_dtype

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "modules_to_save",
}  # fmt: skip
# Settings of the training, or of where the matrices went, which their names in the file tell already.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Other initialisations take part of the base's weights away, so that the adapter alone does not tell the model.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")


@dataclass(frozen=True)
class LoraUpdate:
    """One module's update, ``scale`` B A: sources of A [r, in] and B [out, r]."""

    a: TensorSource
    b: TensorSource
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. ``updates`` and ``replacements`` go by the module's and the tensor's name in the base."""

    label: str
    folder: Path
    file: Path
    config: dict[str, Any]
    updates: dict[str, LoraUpdate]
    replacements: dict[str, TensorSource]

    @property
    def is_transposed(self) -> bool:
        return bool(self.config.get("fan_in_fan_out"))


@dataclass(frozen=True)
class FoldedTensor:
    """A base's tensor plus a LoRA update, computed one dtype wider than the base's and never rounded to it."""

    base: TensorSource
    update: LoraUpdate
    is_transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        return merge_dtype(self.base.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def path(self) -> Path:
        return self.base.path

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of the flattened sum; the two small matrices are held while it is open."""
        dtype, width = wider_dtype(self.dtype), max(self.shape[1], 1)
        a, b = (load_tensor(matrix).to(dtype) for matrix in (self.update.a, self.update.b))
        left, right = (a.T, b.T) if self.is_transposed else (b, a)
        left = left * self.update.scale
        with self.base.open() as read_base:

            def read(start: int, stop: int) -> Tensor:
                first = start // width
                delta = left[first : -(-stop // width)] @ right
                return read_base(start, stop).to(dtype) + delta.view(-1)[start - first * width : stop - first * width]

            yield read


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a checkpoint."""
    whole = any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    return not whole and any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE))


def read_adapter(folder: Path, label: str, allow_pickle: bool) -> Adapter:
    """Read an adapter's config and where its matrices lie. Raises MergeError for all but plain LoRA."""
    if not (folder / CONFIG_FILE).exists():
        raise MergeError(f"{label} has no {CONFIG_FILE}: give the folder of a PEFT adapter")
    require_own_file(folder, folder / CONFIG_FILE)
    config = read_json(folder / CONFIG_FILE)
    _check_config(config, label)
    file, tensors = _read_weights(folder, label, allow_pickle)
    matrices: dict[str, dict[str, TensorSource]] = {}
    replacements = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = MATRIX.fullmatch(name)
        if match:
            matrices.setdefault(match["module"], {})[match["letter"]] = tensor
        elif "lora_" in name or not key.startswith(PREFIX):
            raise MergeError(
                f"{label}: {key!r} is not understood, only LoRA of linear layers is: fold it with peft first"
            )
        else:
            replacements[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor
    updates = {module: _update(module, pair, config, label) for module, pair in matrices.items()}
    if not updates and not replacements:
        raise MergeError(f"{label} holds no tensors: is this the right folder?")
    return Adapter(label, folder, file, config, updates, replacements)


def fold(adapter: Adapter, tensors: Mapping[str, TensorSource], config: Mapping[str, Any]) -> dict[str, TensorSource]:
    """The base's tensors with the adapter folded in. Raises MergeError where it does not fit them."""
    folded = dict(tensors)
    for key, replacement in adapter.replacements.items():
        name = _name_in_base(key, tensors, adapter.label)
        _require_shape(name, tensors[name], replacement.shape, adapter.label)
        folded[name] = replacement
    for module, update in adapter.updates.items():
        name = _name_in_base(f"{module}.weight", tensors, adapter.label)
        shape = (update.b.shape[0], update.a.shape[1])
        _require_shape(name, tensors[name], shape[::-1] if adapter.is_transposed else shape, adapter.label)
        folded[name] = FoldedTensor(folded[name], update, adapter.is_transposed)
    tied = tied_names(tensors, config)
    for name in tensors:
        if name in tied and folded[name] is not tensors[name]:
            raise MergeError(
                f"{adapter.label} changes {name!r}, which its base ties to another tensor: save the base with "
                "tie_word_embeddings false, or fold the adapter with peft first"
            )
    return folded


def _check_config(config: Mapping[str, Any], label: str) -> None:
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{label} is a {config.get('peft_type')} adapter: only LORA adapters are merged")
    if config.get("bias", "none") != "none":
        raise MergeError(f"{label} trained biases (bias={config['bias']!r}): fold it into its base with peft first")
    if config.get("init_lora_weights") not in INITIALISATIONS:
        raise MergeError(
            f"{label} starts from init_lora_weights={config['init_lora_weights']!r}, which changes the base's weights: "
            "convert it with peft (path_initial_model_for_weight_conversion) first"
        )
    for key, value in config.items():
        if value and key not in UNDERSTOOD | WITHOUT_EFFECT:
            raise MergeError(f"{label} uses {key}, which is not supported: fold it into its base with peft first")


def _read_weights(folder: Path, label: str, allow_pickle: bool) -> tuple[Path, dict[str, TensorSource]]:
    if (folder / WEIGHTS_FILE).exists():
        require_own_file(folder, folder / WEIGHTS_FILE)
        return folder / WEIGHTS_FILE, dict(read_header(folder / WEIGHTS_FILE))
    if not (folder / PICKLED_FILE).exists():
        raise MergeError(f"{label} has no {WEIGHTS_FILE}: give the folder of a PEFT adapter")
    if not allow_pickle:
        raise MergeError(
            f"{label} holds pickled weights ({PICKLED_FILE}), which can run code when loaded: save it with peft as "
            "safetensors, or read weights alone with --allow-pickle"
        )
    require_own_file(folder, folder / PICKLED_FILE)
    return folder / PICKLED_FILE, dict(read_pickle(folder / PICKLED_FILE))


def _update(module: str, pair: Mapping[str, TensorSource], config: Mapping[str, Any], label: str) -> LoraUpdate:
    if len(pair) < 2:
        raise MergeError(f"{label}: {module!r} has lora_{min(pair)} alone: save the adapter again")
    a, b = pair["A"], pair["B"]
    rank = _for_module(module, config, "rank_pattern", config.get("r"), label)
    alpha = _for_module(module, config, "alpha_pattern", config.get("lora_alpha"), label)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise MergeError(f"{label}: {module!r} is no linear layer: fold the adapter into its base with peft first")
    if not a.shape[0] == b.shape[1] == rank or rank < 1:
        raise MergeError(
            f"{label}: {module!r} has rank {rank} in {CONFIG_FILE}, and its matrices are {list(a.shape)} and "
            f"{list(b.shape)}: save the adapter again"
        )
    return LoraUpdate(a, b, alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def _for_module(module: str, config: Mapping[str, Any], pattern_key: str, default: Any, label: str) -> Any:
    """The value of the first pattern that matches the end of the module's name, as peft chooses it."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise MergeError(f"{label}: {pattern_key} of {CONFIG_FILE} is no object: save the adapter again")
    value = next((value for key, value in patterns.items() if _matches(key, module, pattern_key, label)), default)
    if type(value) not in (int, float):
        raise MergeError(
            f"{label}: {CONFIG_FILE} gives {module!r} no rank or alpha ({value!r}): save the adapter again"
        )
    return value


def _matches(key: str, module: str, pattern_key: str, label: str) -> bool:
    # A stranger's regular expression can be made to run for years, by repeating what is repeated already.
    plain = re.sub(r"\\d\+|\[0-9\]\+|\\[.\w]", "", key)
    if re.search(r"[*+{]", plain.replace(".*", "", 2)):
        raise MergeError(f"{label}: {key!r} in {pattern_key} is too intricate: write it with module names")
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error as error:
        raise MergeError(f"{label}: {key!r} in {pattern_key} is no regular expression ({error})") from None


def _name_in_base(name: str, tensors: Mapping[str, TensorSource], label: str) -> str:
    """The base's name: checkpoints of bare models lack the first component (GPT-2's ``transformer.``)."""
    shorter = name.partition(".")[2]
    found = next((candidate for candidate in (name, shorter) if candidate in tensors), None)
    if found is None:
        raise MergeError(f"{label} changes {name!r}, which its base lacks: give the base that it was trained on")
    return found


def _require_shape(name: str, base: TensorSource, shape: tuple[int, ...], label: str) -> None:
    if base.shape != shape or not merge_dtype(base.dtype).is_floating_point:
        raise MergeError(
            f"{label} has {list(shape)} for {name!r}, and its base {list(base.shape)} of {base.dtype}: "
            "give the base that the adapter was trained on, not quantised"
        )

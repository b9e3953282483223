"""LoRA: low-rank adapters that are trained in place of a model's weights, by the peft library.

Hu et al. 2022 (arXiv 2106.09685): a linear layer computes x Wᵀ + (α/r) x Aᵀ Bᵀ with W frozen, A [r, in] drawn at random
and B [out, r] zero at the start, so that the first forward is the frozen model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.models import disable_dropout, load_causal_lm
from rlhf.randomness import generator
from soupkit.checkpoint import base_and_adapter, locate
from soupkit.lora import PREFIX, read_adapter

if TYPE_CHECKING:
    from peft import LoraConfig


DEFAULT_ALPHA = 32.0


@dataclass(frozen=True)
class LoraSettings:
    """What adapters to add.

    rank     r
    alpha    α; an adapter's product is scaled by α/r; 32 where None is given
    targets  names of linear layers, as they end: ("q_proj", "v_proj"); empty for all but the head
    seed     of A
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] = ()
    seed: int = 0


def load_with_adapter(
    folder: str, settings: LoraSettings, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A language model with an adapter to train: that of BASE+ADAPTER, and else a new one.

    Raises ValueError where peft is not installed, or the adapter that is there is of other settings.
    """
    require_peft()
    parts = base_and_adapter(folder)
    if parts is None:
        model = load_causal_lm(folder, device=device, dtype=dtype)
        add_adapter(model, settings)
        return model
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    base, adapter = parts[0], str(locate(parts[1], allow_pickle=False))
    read_adapter(Path(adapter), adapter, allow_pickle=False)  # what cannot be folded at the end is refused now
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = False  # as peft saves every adapter, which would freeze it
    if config.r != settings.rank:
        raise ValueError(
            f"lora_rank={settings.rank}: the adapter of {folder} has rank {config.r} and is trained on; give that"
        )
    if settings.alpha not in (None, config.lora_alpha) or settings.targets:
        raise ValueError(
            f"lora_alpha and lora_targets are those of the adapter of {folder}, which is trained on; leave them out"
        )
    weights = {name.removeprefix(PREFIX): weight for name, weight in load_peft_weights(adapter, device="cpu").items()}
    others = [name for name in weights if ".lora_" not in name]
    if others:
        raise ValueError(
            f"{adapter}: holds more than LoRA matrices for {base} (first: {others[0]}), and cannot be trained on; "
            "fold it into its base with python -m soupkit average, and give that folder"
        )
    model = load_causal_lm(base, device=device, dtype=dtype)
    _inject(model, config)
    set_peft_model_state_dict(model, weights)
    return model


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Freeze a model's weights, and add to its body an adapter to train. Raises ValueError for unknown targets."""
    require_peft()
    from peft import LoraConfig

    layers = linear_layers(model)
    unknown = sorted(set(settings.targets) - layers.keys())
    if unknown:
        raise ValueError(f"lora_targets={unknown}: no such linear layers in {model.name_or_path}; it has {[*layers]}")
    targets = list(settings.targets or layers)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=DEFAULT_ALPHA if settings.alpha is None else settings.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=any(layers[target] is Conv1D for target in targets),
    )
    with torch.random.fork_rng(devices=[]):  # the matrices are drawn on the CPU
        torch.default_generator.manual_seed(generator(settings.seed, "lora").initial_seed())
        _inject(model, config)


def _inject(model: PreTrainedModel, config: LoraConfig) -> None:
    """Add adapters to a model in place, and freeze all else."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    disable_dropout(model)
    model.eval()


def linear_layers(model: PreTrainedModel) -> dict[str, type[nn.Module]]:
    """The last names of the linear layers in a model's body, with their types; the head is none of them."""
    return {
        name.rpartition(".")[2]: type(module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def save_adapter(model: PreTrainedModel, base: str, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a model's adapter, with these weights by their names in the model, as peft and soupkit read it."""
    from peft import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(model, state_dict=dict(weights))
    tensors = {PREFIX + name: weight.contiguous() for name, weight in adapter.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = cast(Any, model.peft_config)["default"]
    config.base_model_name_or_path, config.task_type = base, "CAUSAL_LM"
    if not isinstance(config.target_modules, str):  # a set, whose order changes from process to process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)


def base_of(folder: str) -> str:
    """What an adapter is added to: BASE of BASE+ADAPTER, and else the folder itself."""
    parts = base_and_adapter(folder)
    return parts[0] if parts else folder


def require_peft() -> None:
    """Raise ValueError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError("lora_rank: peft is not installed; pip install peft, or set lora_rank=0") from None

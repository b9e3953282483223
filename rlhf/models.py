"""Loading models and tokenizers, and the model that gives one scalar for each position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import soupkit
from rlhf.logprobs import position_ids, unpack
from soupkit.api import average_recipe
from soupkit.checkpoint import HUB_ID, base_and_adapter, locate


def require_checkpoint(model: str | Path) -> Path:
    """The folder that a model's config and tokenizer are in: its own, a hub id's, or that of BASE in "BASE+ADAPTER".

    Raises FileNotFoundError when there is none, or it is no checkpoint folder.
    """
    parts = base_and_adapter(model)
    if parts:
        return require_checkpoint(parts[0])
    folder = Path(model)
    if not folder.is_dir() and HUB_ID.fullmatch(str(model)) and not folder.parent.is_dir():
        folder = locate(str(model), allow_pickle=False)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a checkpoint folder with config.json and *.safetensors"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; expected a checkpoint folder as save_pretrained writes it")
    return folder


def require_language_model(model: str | Path) -> None:
    """Raise ValueError where the config says that this is a reward model, or another that classifies texts."""
    for name in AutoConfig.from_pretrained(require_checkpoint(model)).architectures or []:
        if "SequenceClassification" in name:
            raise ValueError(f"{model}: a reward model ({name}), but a language model is expected; give one")


def context_length(folder: str | Path) -> int | None:
    """The most tokens that the folder's model can read at once, where its config says so."""
    config = AutoConfig.from_pretrained(require_checkpoint(folder))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _load(
    auto_class: Any, folder: Path, new: tuple[str, ...] = (), unused: tuple[str, ...] = (), **settings: Any
) -> Any:
    """``from_pretrained``, refusing tensors it would draw at random (but for ``new``) or drop (but for ``unused``)."""
    try:
        with _quiet():  # the report comes back, and what is wrong in it is told below in one line
            model, report = auto_class.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder}: cannot read its weights ({reason}); copy or save the folder again") from None
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    wrong = sorted(mismatched | set(report["missing_keys"]).difference(new))
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} tensors are missing or not of the shape that config.json implies (first: "
            f"{', '.join(wrong[:3])}); save the folder again with save_pretrained"
        )
    dropped = sorted(set(report["unexpected_keys"]).difference(unused))
    if dropped:
        raise ValueError(
            f"{folder}: {type(model).__name__} has no place for {len(dropped)} of its tensors (first: "
            f"{', '.join(dropped[:3])}); give a folder of the kind that is asked for"
        )
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that a training-mode forward equals the one that sampled (ratio 1)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def load_causal_lm(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A language model from a checkpoint folder, in eval mode and without dropout.

    Also from a hub id, and from "BASE+ADAPTER", whose LoRA adapter is folded into the weights.
    """
    require_language_model(folder)
    model = _load(AutoModelForCausalLM, require_checkpoint(folder), dtype=dtype)
    if base_and_adapter(folder):
        model = with_weights(model, folded(folder)).to(dtype)  # type: ignore[arg-type]
    disable_dropout(model)
    return model.eval().to(torch.device(device))


def folded(model: str | Path) -> dict[str, Tensor]:
    """The float32 weights of BASE+ADAPTER."""
    return soupkit.merge(average_recipe([str(model)]), dtype=torch.float32, progress=False)


def with_weights(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> PreTrainedModel:
    """A new model of the same class and config with other weights, named as in a checkpoint; float32, on the CPU.

    They go through ``from_pretrained``, which ties weights and renames tensors as it does for a folder.
    """
    other = type(model).from_pretrained(None, config=model.config, state_dict=state_dict, dtype=torch.float32)
    disable_dropout(other)
    return other.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, padding on the left; the end-of-sequence token pads where no pad token is set.

    Masks never come from comparing ids with the pad id, so pad = eos is safe.
    """
    tokenizer = AutoTokenizer.from_pretrained(require_checkpoint(folder))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def require_same_tokenizer(first: str | Path, second: str | Path) -> None:
    """Raise ValueError unless both folders give every token the same id, and the same end-of-sequence token.

    A KL between models that number their tokens differently is meaningless. A folder without tokenizer files is
    compared by vocabulary size alone.
    """
    sizes = [AutoConfig.from_pretrained(require_checkpoint(f)).vocab_size for f in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{second}: vocabulary of {sizes[1]} tokens, but {first} has {sizes[0]}; use models of one family"
        )
    if not all((require_checkpoint(f) / "tokenizer_config.json").is_file() for f in (first, second)):
        return
    one, two = load_tokenizer(first), load_tokenizer(second)
    vocabularies = one.get_vocab(), two.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        differing = sorted(
            t for t in {**vocabularies[0], **vocabularies[1]} if vocabularies[0].get(t) != vocabularies[1].get(t)
        )
        raise ValueError(
            f"{second}: its tokenizer differs from that of {first} in {len(differing)} tokens (first: "
            f"{differing[:3]}); "
            "use models with one tokenizer"
        )
    if one.eos_token_id != two.eos_token_id:
        raise ValueError(
            f"{second}: end-of-sequence token {two.eos_token!r}, but {first} has {one.eos_token!r}; use models "
            "with one tokenizer"
        )


class ScalarHeadModel(nn.Module):
    """A transformer with one scalar per position: reward model (read at the last token) and value model (read
    everywhere).

    It wraps an ``AutoModelForSequenceClassification`` with one label and runs body and head itself, because that
    class's own forward finds the last token by comparing ids with the pad id, which fails when pad = eos.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def body(self) -> nn.Module:
        """The transformer without its head."""
        return self.model.base_model

    @property
    def head(self) -> nn.Linear:
        """The linear map from the hidden state to the scalar."""
        return cast(nn.Linear, self.model.score)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """One scalar per position. [B, S], [B, S] → [B, S] float32"""
        hidden = self.body(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden).squeeze(-1).float()


def head_values(head: nn.Linear, hidden: Tensor, mask: Tensor) -> Tensor:
    """A scalar head's values at packed hidden states, in the places of the mask. [N, d], [B, T] → [B, T] float32"""
    return unpack(head(hidden.to(head.weight.dtype)).squeeze(-1).float(), mask)


def load_scalar_head_model(
    folder: str | Path, *, device: str | torch.device = "cpu", zero_head: bool = False, require_head: bool = False
) -> ScalarHeadModel:
    """A scalar-head model from a reward-model folder, or from a language model's body with a new head.

    Also from the body of "BASE+ADAPTER", with the LoRA adapter folded in.

    ``zero_head`` starts the head at 0, so that every value is 0 before training (Ziegler et al. 2019); otherwise a head
    that the folder lacks is drawn from N(0, 1/(d+1)) (Stiennon et al. 2020), d the hidden size. ``require_head``
    refuses a folder without a head.
    """
    source, folder = folder, require_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    has_head = any("SequenceClassification" in name for name in config.architectures or [])
    if has_head and config.num_labels != 1:
        raise ValueError(
            f"{folder}: {config.num_labels} labels, but a reward model has 1; train it with rlhf.reward_model"
        )
    if require_head and not has_head:
        raise ValueError(
            f"{folder}: a language model, without a reward head; train one from it with python -m rlhf.reward_model"
        )
    config.num_labels = 1
    # A language model lacks the head that is wanted here, and has one that is not.
    new, unused = ((), ()) if has_head else (("score.weight",), ("lm_head.weight",))
    model = _load(AutoModelForSequenceClassification, folder, new, unused, config=config, dtype=torch.float32)
    if base_and_adapter(source):
        with nullcontext() if has_head else _quiet():
            model = with_weights(model, folded(source))
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{folder}: {type(model).__name__} has no linear head named score; use a decoder-only language model"
        )
    if zero_head:
        nn.init.zeros_(model.score.weight)
    elif not has_head:
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    disable_dropout(model)
    return ScalarHeadModel(model.to(device)).eval()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside the block; every module's mode as it was afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' table of tensors that a folder lacks or has too many of."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)

"""Output heads that some ingredients store and others tie to their embeddings.

What a checkpoint means is what transformers 5 makes of it when it loads it:

* no head stored, config does not say ``tie_word_embeddings: false``: the head is the embeddings;
* a head stored that equals the embeddings: the same model, and tied again where the config ties;
* a head stored that differs: it is used, whatever the config says (transformers 4 dropped it where the config ties).

So every checkpoint has one head, and the soup of heads is well defined. The soup is untied as soon as one ingredient's
head differs from its embeddings; the others then lend it theirs. Else it is tied as soon as one ingredient is, and no
head is stored. The order of the ingredients plays no part, and the configs say what the soup is.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soupkit.errors import MergeError
from soupkit.sources import Reader, TensorSource, wider_dtype

if TYPE_CHECKING:
    from soupkit.checkpoint import Checkpoint

HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight", "lm_head.decoder.weight")
# Input embeddings as architectures call them: embed_tokens, wte, word_embeddings, shared; not those of positions.
EMBEDDING = re.compile(r"(.*\.)?(?!\w*(pos|type|wpe))\w*(emb|wte|shared)\w*\.weight")
TIES = "tie_word_embeddings"
CHUNK = 2**20  # elements compared at once


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A config's value, or that of its text part where the whole has none; None where neither says."""
    parts = [config, *(part for part in (config.get("text_config"), config.get("decoder")) if isinstance(part, dict))]
    return next((part[key] for part in parts if part.get(key) is not None), None)


def with_setting(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with a value set, also in its text part where that has the key."""
    parts = {
        name: part | {key: value}
        for name, part in config.items()
        if name in ("text_config", "decoder") and isinstance(part, dict) and key in part
    }
    return {**config, **parts, key: value}


def is_head(name: str) -> bool:
    """Whether a tensor of this name gives logits over the vocabulary."""
    return ("." + name).endswith(tuple("." + head for head in HEADS))


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name holds an embedding for each token."""
    return not is_head(name) and EMBEDDING.fullmatch(name) is not None


def embedding_of(head: str, tensors: Mapping[str, TensorSource]) -> str | None:
    """The embeddings that a stored head has the shape of; None where there are none or several."""
    fitting = [name for name, tensor in tensors.items() if is_embedding(name) and tensor.shape == tensors[head].shape]
    return fitting[0] if len(fitting) == 1 else None


def tied_names(tensors: Mapping[str, TensorSource], config: Mapping[str, Any]) -> set[str]:
    """Embeddings and heads that are one parameter once loaded, so that none of them can change alone."""
    heads = [name for name in tensors if is_head(name)]
    ties = setting(config, TIES)
    if ties is False or (ties is None and heads):
        return set()
    return {name for name in tensors if is_head(name) or is_embedding(name)}


def harmonise_heads(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints with a head in all of them or in none, and ``tie_word_embeddings`` set to what they then are.

    Checkpoints whose heads need no care come back as they are. Reads heads and embeddings where a config does not
    settle the matter. Raises MergeError for a checkpoint that lacks the head that its config asks for.
    """
    harmonised = list(checkpoints)
    for head in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors if is_head(name)):
        harmonised = _harmonise(head, harmonised)
    return harmonised


def harmonise_fishers(fishers: Sequence[Checkpoint], ingredients: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The ingredients' Fisher estimates, one each, with the heads that the ingredients have once harmonised.

    A model that lends its embeddings as a head lends their Fisher information F too. A model whose head is tied again
    has the gradient of embeddings and head together on one parameter, which gives F_embeddings + F_head, but for the
    correlation of the two, which no diagonal estimate knows.
    """
    return [_with_heads_of(ingredient, fisher) for fisher, ingredient in zip(fishers, ingredients, strict=False)]


@dataclass(frozen=True)
class SummedTensor:
    """The sum of two tensors of one shape, one dtype wider than they are."""

    a: TensorSource
    b: TensorSource

    @property
    def dtype(self) -> torch.dtype:
        return wider_dtype(torch.promote_types(self.a.dtype, self.b.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape

    @property
    def path(self) -> Path:
        return self.a.path

    @contextmanager
    def open(self) -> Iterator[Reader]:
        with self.a.open() as read_a, self.b.open() as read_b:

            def read(start: int, stop: int) -> Tensor:
                return read_a(start, stop).to(self.dtype) + read_b(start, stop).to(self.dtype)

            yield read


def _with_heads_of(ingredient: Checkpoint, fisher: Checkpoint) -> Checkpoint:
    tensors = dict(fisher.tensors)
    for head in filter(is_head, {**ingredient.tensors, **fisher.tensors}):
        stored = ingredient.tensors if head in ingredient.tensors else fisher.tensors
        embedding = embedding_of(head, stored)
        if embedding is None or embedding not in tensors:
            continue
        if head not in ingredient.tensors:
            tensors[embedding] = SummedTensor(tensors[embedding], tensors.pop(head))
        else:
            tensors.setdefault(head, tensors[embedding])
    return replace(fisher, tensors=tensors)


def _harmonise(head: str, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    storing = [checkpoint for checkpoint in checkpoints if head in checkpoint.tensors]
    embeddings = {embedding_of(head, checkpoint.tensors) for checkpoint in storing}
    embedding = embeddings.pop()
    if embeddings or embedding is None:
        return checkpoints  # no pair to speak of: the names are compared as they are
    everywhere = len(storing) == len(checkpoints)
    if everywhere and all(setting(checkpoint.config, TIES) is False for checkpoint in checkpoints):
        return checkpoints
    untied = [checkpoint for checkpoint in storing if not _same_values(checkpoint, head, embedding)]
    for checkpoint in checkpoints:
        stores = checkpoint in storing
        if not stores and (setting(checkpoint.config, TIES) is False or embedding not in checkpoint.tensors):
            raise MergeError(
                f"{checkpoint.label} lacks {head!r}, and its config.json does not tie it to {embedding!r}: "
                "download or save the checkpoint again"
            )
        if checkpoint in untied and setting(checkpoint.config, TIES) is True:
            warnings.warn(
                f"{checkpoint.label} ties {head!r} in config.json and stores another one: the stored one is used, as "
                "transformers 5 does",
                stacklevel=2,
            )
    return [_with_head(checkpoint, head, embedding, stored=bool(untied)) for checkpoint in checkpoints]


def _with_head(checkpoint: Checkpoint, head: str, embedding: str, *, stored: bool) -> Checkpoint:
    tensors = dict(checkpoint.tensors)
    if stored:
        tensors.setdefault(head, tensors[embedding])
    else:
        tensors.pop(head, None)
    config = checkpoint.config and with_setting(checkpoint.config, TIES, not stored)
    return replace(checkpoint, tensors=tensors, config=config)


def _same_values(checkpoint: Checkpoint, a: str, b: str) -> bool:
    first, second = checkpoint.tensors[a], checkpoint.tensors[b]
    with first.open() as read_first, second.open() as read_second:
        for start in range(0, prod(first.shape), CHUNK):
            stop = min(start + CHUNK, prod(first.shape))
            # In float64, which holds what any two stored dtypes can, so that they may differ in dtype.
            if not torch.equal(read_first(start, stop).double(), read_second(start, stop).double()):
                return False
    return True

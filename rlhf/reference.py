"""What the policy is kept close to: models ρ_i with weights w_i, whose penalty is Σ_i w_i KL(π‖ρ_i).

==============  ====================================================================================================
soup            the weighted average of folders, made in memory by soupkit (SALSA), or any merge that a recipe file
                describes; one folder is plain PPO
weighted_kl     Σ_i w_i KL(π‖ρ_i), with a model for each folder or recipe
mixture         KL(π‖ρ), log ρ(v|s) = Σ_i w_i log ρ_i(v|s) − log Z(s): their geometric mixture, token by token
moving_average  a moving average of the policy itself, which starts at the soup (WARP, arXiv 2406.16768); with decay 0,
                the policy as it was at the last synchronisation
none            no penalty
==============  ====================================================================================================

Σ_i w_i KL(π‖ρ_i) = KL(π‖mixture) − E_π[Σ_t log Z(s_t)] for weights of sum 1: the two penalties differ in how they value
states, and log Z ≤ 0. A soup equals the mixture to first order in the distance between its ingredients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import soupkit
from rlhf.data import TokenBatch
from rlhf.logprobs import Distributions, log_distribution, model_distributions, require_split
from rlhf.models import load_causal_lm, require_same_tokenizer, with_weights
from soupkit.api import average_recipe
from soupkit.provenance import roles

RECIPES = (".yaml", ".yml", ".json")


class Source(Protocol):
    """Anything that gives a next-token distribution at every response position of a batch."""

    def distributions(self, batch: TokenBatch, temperature: float = 1.0) -> Distributions:
        """The distributions at the N packed response tokens, on the batch's device."""
        ...


class ModelReference:
    """A language model that is only read; a soup is one model too. It works on its own device, in its own dtype.

    Its distributions are normalised in ``dtype``, in float64 for what has to hold to more than float32's rounding.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        require_split(model)
        self.model = model
        self.dtype = dtype

    def distributions(self, batch: TokenBatch, temperature: float = 1.0) -> Distributions:
        there = model_distributions(self.model, batch.to(self.model.device), temperature, self.dtype)
        return there if self.model.device == batch.tokens.device else Moved(there, batch.tokens.device)


@dataclass(frozen=True)
class Moved:
    """Distributions that are made on one device and wanted on another."""

    source: Distributions
    device: torch.device

    def rows(self, rows: slice) -> Tensor:
        return self.source.rows(rows).to(self.device)


@dataclass(frozen=True)
class Mixture:
    """The normalised geometric mixture of distributions, log ρ = Σ_i w_i log ρ_i − log Z."""

    parts: Sequence[Distributions]
    weights: Sequence[float]

    def rows(self, rows: slice) -> Tensor:
        terms = [weight * part.rows(rows) for part, weight in zip(self.parts, self.weights, strict=True)]
        return log_distribution(torch.stack(terms).sum(0))


class MixtureReference:
    """Several models as one distribution, their geometric mixture with weights of sum 1."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.weights = list(weights)

    def distributions(self, batch: TokenBatch, temperature: float = 1.0) -> Distributions:
        return Mixture([part.distributions(batch, temperature) for part in self.parts], self.weights)


@dataclass
class Reference:
    """The penalty Σ_i w_i KL(π‖ρ_i): its models by name, with their weights. Without any there is no penalty.

    ``decay`` is given for a moving average of the policy: every ``every`` updates, ρ ← decay · ρ + (1 − decay) · π.
    """

    sources: dict[str, tuple[float, Source]]
    decay: float | None = None
    every: int = 1
    offload_to: torch.device | None = None

    def after_update(self, policy: nn.Module, update: int) -> None:
        """Follow the policy after update ``update`` (1-based), where this is a moving average of it."""
        if self.decay is None or update % self.every:
            return
        with torch.no_grad():
            for mine, theirs in zip(self._moving().parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.device, mine.dtype), 1.0 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """What training has changed of it: the weights of a moving average."""
        return {} if self.decay is None else self._moving().state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        if self.decay is not None:
            self._moving().load_state_dict(state)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Its models on the device they compute on, inside the block; where they are offloaded, back after it."""
        if self.offload_to is None:
            yield
            return
        models = [model for _, source in self.sources.values() for model in models_of(source)]
        homes = [model.device for model in models]
        for model in models:
            model.to(self.offload_to)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for model, home in zip(models, homes, strict=True):
                model.to(home)  # type: ignore[arg-type]

    def _moving(self) -> PreTrainedModel:
        ((_, source),) = self.sources.values()
        return models_of(source)[0]


def models_of(source: Source) -> list[PreTrainedModel]:
    """The language models behind a source of distributions."""
    if isinstance(source, MixtureReference):
        return [model for part in source.parts for model in models_of(part)]
    assert isinstance(source, ModelReference)
    return [source.model]


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Short names for models, {name: folder or recipe}: the last path component, more of the path where ambiguous.

    No name is "reference", which metrics use for the reference itself.
    """
    unique = {str(Path(model).resolve()): model for model in models}
    parts = [Path(resolved).parts for resolved in unique]
    depth = 1
    while len({p[-depth:] for p in parts} - {("reference",)}) < len(parts):
        depth += 1
    return {"/".join(p[-depth:]): model for p, model in zip(parts, unique.values(), strict=True)}


def is_recipe(model: str | Path) -> bool:
    """Whether this names a recipe file rather than a folder."""
    return Path(model).suffix in RECIPES


def recipe_of(models: Sequence[str | Path], weights: Sequence[float] | None = None) -> soupkit.Recipe:
    """The recipe of one model: of a recipe file, or the average of folders (uniform for ``weights=None``)."""
    recipes = [model for model in models if is_recipe(model)]
    if not recipes:
        return average_recipe([str(model) for model in models], weights)
    if len(models) > 1 or weights is not None:
        raise ValueError(
            f"{recipes[0]}: a recipe is a whole reference by itself; give it alone, or the folders that it names"
        )
    return soupkit.load_recipe(recipes[0])


def folders_in(model: str | Path) -> list[str]:
    """The folders a model is made of: its own, or the ingredients and the base of a recipe file."""
    return [str(folder) for role, folder in roles(recipe_of([model])) if role != "fisher"]


def load_model_reference(
    models: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> ModelReference:
    """One model to compare with: a folder's, the weighted average of several folders, or what a recipe file makes.

    A merge is computed in float32 or wider, whatever the folders' dtype, and then kept in ``dtype``. Raises ValueError
    when the tokenizers differ, and soupkit's MergeError when weights or checkpoints do not fit together.
    """
    recipe = recipe_of(models, weights)
    first, *others = recipe.models
    for folder in others:
        require_same_tokenizer(first, folder)
    model = load_causal_lm(first, dtype=torch.float32 if len(recipe.models) > 1 else dtype)
    if len(models) > 1 or weights is not None or is_recipe(models[0]):
        merged = soupkit.merge(recipe, dtype=torch.float32, progress=progress)
        model = with_weights(model, merged).to(dtype)  # type: ignore[arg-type]
    model.requires_grad_(False)
    return ModelReference(model.eval().to(torch.device(device)))


@dataclass(frozen=True)
class ReferenceSettings:
    """What a reference is made of; see the module's table of kinds.

    ``weights`` are normalised to sum 1 for a soup and a mixture, and taken as they are for weighted KLs (there, None
    is 1 / number of models each).
    """

    kind: str
    models: Sequence[str]
    weights: Sequence[float] | None = None
    decay: float = 0.99
    every: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.kind == "none" and self.weights is not None:
            raise ValueError("reference_kind=none takes no reference_weights; leave them out")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(
                f"reference_weights: {len(self.weights)} weights for {len(self.models)} references; give one for each"
            )
        if self.kind == "moving_average" and self.decay > 0 and self.dtype != torch.float32:
            raise ValueError(
                f"reference_dtype={str(self.dtype).removeprefix('torch.')}: the small steps of a moving average round "
                "to nothing there; use float32, or reference_decay=0"
            )
        separate = self.kind in ("weighted_kl", "mixture")
        if separate and len(names_of(self.models)) < len(self.models):
            raise ValueError(f"reference: {list(self.models)} names a model twice; give its weight once")
        if separate and self.weights is not None and not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(f"reference_weights={list(self.weights)}: must be finite and not negative")
        if separate and self.weights is not None and not sum(self.weights) > 0:
            raise ValueError("reference_weights: all are 0; give at least one model a weight, or reference_kind=none")
        if not separate and self.kind != "none":
            recipe_of(self.models, self.weights).validate()

    def share(self, index: int) -> float:
        """The weight w_i of one of several models kept apart."""
        if self.weights is None:
            return 1.0 / len(self.models)
        return self.weights[index] / (sum(self.weights) if self.kind == "mixture" else 1.0)

    def load(self, device: torch.device, progress: bool = False) -> Reference:
        """The reference, on its own device where it has one and else on ``device``."""
        if self.kind == "none":
            return Reference({})
        there = self.device or device
        home = torch.device("cpu") if self.offload else there
        offload_to = there if self.offload else None
        load = partial(load_model_reference, device=home, dtype=self.dtype, progress=progress)
        if self.kind in ("soup", "moving_average"):
            source = load(self.models, self.weights)
            decay = self.decay if self.kind == "moving_average" else None
            return Reference({"reference": (1.0, source)}, decay, self.every, offload_to)
        sources = [load([model]) for model in self.models]
        shares = [self.share(index) for index in range(len(sources))]
        if self.kind == "mixture":
            return Reference({"reference": (1.0, MixtureReference(sources, shares))}, offload_to=offload_to)
        return Reference(
            dict(zip(names_of(self.models), zip(shares, sources, strict=True), strict=True)), offload_to=offload_to
        )

    def describe(self) -> dict[str, Any]:
        """The provenance, as ``reference/soup.json`` holds it: kind, weights, every model's files with their hashes."""
        if self.kind == "none":
            return {"kind": "none"}
        if self.kind in ("soup", "moving_average"):
            record = soupkit.provenance(recipe_of(self.models, self.weights))
            moving = {"decay": self.decay, "every": self.every} if self.kind == "moving_average" else {}
            return {"kind": self.kind, **moving, **record}
        models = [soupkit.provenance(recipe_of([model])) for model in self.models]
        shares = [self.share(index) for index in range(len(models))]
        return {"kind": self.kind, "weights": shares, "models": models}

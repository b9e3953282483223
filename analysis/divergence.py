"""Who is how far from whom: KL divergence between language models, exactly, token by token."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.metrics import digest
from analysis.points import measure_each, require_unstarted
from analysis.results import Measurements, PointByPoint, Saved
from analysis.weights import fingerprint, moving_parameters, named_sources
from rlhf.data import Prompt
from rlhf.evaluation import compare
from rlhf.kl import Comparison
from rlhf.metrics import Estimate, mean_estimate
from rlhf.models import evaluating, load_causal_lm, require_same_tokenizer
from rlhf.randomness import generator
from rlhf.reference import ModelReference, Source
from rlhf.rollout import Rollout, sample

Models = Mapping[str, str | os.PathLike[str] | PreTrainedModel] | Sequence[str | os.PathLike[str]]
"""{name: folder or model}, or folders."""


@dataclass(frozen=True)
class KLMatrix(Saved):
    """KL(row ‖ column) between N models, in nats per response; 0 on the diagonal.

    names     N names, of rows and columns alike
    mean      [N, N]  mean over responses sampled from the row's model
    stderr    [N, N]  its standard error
    metadata  how it was sampled
    """

    names: list[str]
    mean: np.ndarray
    stderr: np.ndarray
    metadata: dict[str, Any]

    def __getitem__(self, pair: tuple[str, str]) -> Estimate:
        """KL(first ‖ second): ``matrix["policy", "soup"]``."""
        index = tuple(self.names.index(name) for name in pair)
        return Estimate(float(self.mean[index]), float(self.stderr[index]))


def kl_matrix(
    models: Models,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    num_responses: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    save: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> KLMatrix:
    """KL(π ‖ ρ) for every ordered pair of models, π the row and ρ the column.

    KL(π ‖ ρ) = E_{y∼π} Σ_t Σ_v π(v|s_t) log (π(v|s_t) / ρ(v|s_t))

    Prefixes s_t are sampled from π, ``num_responses`` responses of at most ``max_new_tokens`` tokens to every prompt;
    the inner sum is exact (Rao–Blackwellised: Amini, Vieira, Cotterell 2025, arXiv 2504.10637). Both distributions are
    taken at ``temperature``. All rows draw the same random numbers. The mean is over all responses; the standard error
    is over prompts (responses to one prompt are averaged first), over responses when there is one prompt only.

    ``models`` are {name: folder or model}, or a sequence of folders; all are held in memory at once, folders on
    ``device``. ``batch_size`` bounds how many responses are handled at once. ``save`` is a file that holds the rows
    that are done, written after each; with ``resume``, continued where it exists. Where a launcher has started several
    processes, all of them must call: they share the rows.

    Raises ValueError when vocabularies differ, when there are fewer than two models or no prompts, when ``temperature``
    is not positive, or when ``save`` holds another computation; FileExistsError when ``save`` exists and ``resume`` is
    not set.

        distances = kl_matrix(["sft1", "sft2", "soup"], prompts, tokenizer, max_new_tokens=48)
        distances["sft1", "soup"].mean
    """
    sources = named_sources(models)
    if len(sources) < 2:
        raise ValueError(f"models={list(sources)}: a matrix needs at least two; give more")
    require_unstarted(save, resume)
    samples = Samples(prompts, tokenizer, max_new_tokens, num_responses, temperature, seed, batch_size)
    loaded = load_models(sources, device)
    names = list(loaded)

    def row_of(row: int) -> dict[str, Estimate]:
        others = {name: ModelReference(model, torch.float64) for name, model in loaded.items() if name != names[row]}
        kl = samples.compare(loaded[names[row]], others).kl
        return {name: samples.estimate(kl[name]) if name in kl else Estimate(0.0, 0.0) for name in names}

    with evaluating(*loaded.values()):
        rows = measure_each(
            PointByPoint(Measurements.empty(len(names)), samples.identity(loaded)),
            row_of,
            save=save,
            progress="kl matrix" if progress else None,
        ).measurements
    return KLMatrix(names, rows.values.T.copy(), rows.stderr.T.copy(), samples.metadata())


@dataclass(frozen=True)
class Samples:
    """P prompts with R sampled responses each: how models are compared on samples of one of them.

    All models draw the same random numbers. Distributions are compared in float64: models may be so close that their
    KL is below the rounding of float32.
    """

    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    num_responses: int = 1
    temperature: float = 1.0
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: none given; give at least one prompt")
        if self.num_responses < 1:
            raise ValueError(f"num_responses={self.num_responses}: must be at least 1")
        if not 0 < self.temperature < math.inf:  # the likeliest response alone is no sample of the model
            raise ValueError(f"temperature={self.temperature}: must be finite and greater than 0")

    def draw(self, model: PreTrainedModel) -> Rollout:
        """The model's responses, those to one prompt side by side. → P·R rows"""
        return sample(
            model,
            self.tokenizer,
            [prompt for prompt in self.prompts for _ in range(self.num_responses)],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            generator=generator(self.seed, "kl_matrix"),
            batch_size=self.batch_size,
        )

    def compare(self, model: PreTrainedModel, others: Mapping[str, Source]) -> Comparison:
        """The model beside others, which must be in float64, at the tokens of its own responses. [P·R, T] float64"""
        return compare(
            model,
            self.draw(model),
            others,
            temperature=self.temperature,
            batch_size=self.batch_size,
            dtype=torch.float64,
        )

    def units(self, values: Tensor) -> Tensor:
        """What varies independently, in nats per response: means over each prompt's responses [P], or for P = 1 the
        responses themselves [R], of values per token [P·R, T].
        """
        responses = values.double().sum(dim=1).reshape(len(self.prompts), self.num_responses)
        return responses.mean(dim=1) if len(responses) > 1 else responses[0]

    def estimate(self, values: Tensor) -> Estimate:
        """The mean over responses of values per token [P·R, T], with its standard error over :meth:`units`."""
        return mean_estimate(self.units(values))

    def identity(self, models: Mapping[str, PreTrainedModel]) -> dict[str, Any]:
        """What two computations must have in common for one to go on with the other's rows."""
        hashes = {name: fingerprint(moving_parameters(model)) for name, model in models.items()}
        return {"models": hashes, "prompts": digest(self.prompts), **self.metadata()}

    def metadata(self) -> dict[str, Any]:
        """How the responses were sampled."""
        return {
            "num_prompts": len(self.prompts),
            "num_responses": self.num_responses,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }


def means_and_errors(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over units and their standard errors, NaN for one unit. [E, U] → [E], [E]"""
    num = units.shape[1]
    errors = units.std(axis=1, ddof=1) / math.sqrt(num) if num > 1 else np.full(len(units), np.nan)
    return units.mean(axis=1), errors


def jackknife(units: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A function of means over U independent units, with its standard error by leaving each unit out. [E, U] → Estimate

    √((U − 1)/U Σ_u (s_u − s̄)²), s_u the statistic of the means without unit u; NaN for U = 1 (Efron & Stein 1981).
    """
    num = units.shape[1]
    whole = statistic(units.mean(axis=1))
    if num == 1:
        return Estimate(whole, math.nan)
    without = (units.sum(axis=1, keepdims=True) - units) / (num - 1)
    statistics = np.array([statistic(column) for column in without.T])
    return Estimate(whole, math.sqrt((num - 1) * statistics.var()))


def load_models(sources: Mapping[str, Any], device: str | torch.device) -> dict[str, PreTrainedModel]:
    """Folders loaded, models as they are. Raises ValueError when their tokenizers or vocabularies differ."""
    folders = {name: os.fspath(s) for name, s in sources.items() if isinstance(s, str | os.PathLike)}
    first_folder = next(iter(folders.values()), None)
    for folder in folders.values():
        require_same_tokenizer(str(first_folder), folder)
    models = {
        name: load_causal_lm(folders[name], device=device) if name in folders else source
        for name, source in sources.items()
    }
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"models: vocabularies differ, {sizes} tokens; use models of one family")
    return models

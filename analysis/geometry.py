"""How base, SFT models, soup and policies lie to each other, measured by KL on samples: what a soup reference changes.

A soup of ingredients π_i with weights w_i is one reference; the penalty Σ w_i KL(π‖π_i) is another. They meet in the
geometric mixture π̃(v|s) = Π_i π_i(v|s)^{w_i} / Z(s):

    Σ_i w_i KL(π‖π_i) = KL(π‖π̃) + E_π Σ_t −log Z(s_t)            for every π; the last term is never negative
    KL(soup‖π̃)        = O(Δ⁴), while KL to an ingredient is O(Δ²), Δ the distance between ingredients

The first holds token by token; at sequence level −log Z would not depend on π (Aminian et al. 2025, arXiv 2502.01203).
The second is because a soup's logits are the mean of the ingredients' up to O(Δ²), and KL is quadratic in logits.

KL is in nats per response, exact at every sampled prefix (see :mod:`analysis.divergence`) and compared in float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import soupkit
from analysis import weights as space
from analysis.divergence import KLMatrix, Models, Samples, jackknife, load_models, means_and_errors
from analysis.points import measure_each, require_unstarted
from analysis.results import Measurements, PointByPoint, Saved
from analysis.weights import named_sources
from rlhf.data import Prompt
from rlhf.metrics import Estimate
from rlhf.models import evaluating
from rlhf.reference import MixtureReference, ModelReference

MIXTURE, BASE = "(mixture)", "(base)"  # beside the names that users give
QUANTITIES = ("kl_soup", "kl_ingredients", "kl_mixture", "triangle_gap", "log_normalizer")
KL_TO, K1_TO, IDENTITY_ERROR = "kl/", "k1/", "identity_error"  # what else a row of the matrix holds

# ── Who is how far from whom ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class KLGeometry(KLMatrix):
    """The KL matrix of N models, and where each of them, π, lies to a soup and to its n ingredients.

    names, mean, stderr, metadata    as in KLMatrix: KL(row ‖ column), nats per response
    k1, k1_stderr          [N, N]    the same by the estimator k1, log π(y) − log ρ(y), on the same responses
    soup, ingredients                names of the soup and of what it is made of
    weights                [n]       w_i, of sum 1
    quantities                       names of the Q quantities below
    values, values_stderr  [Q, N]    of each model π, on responses of its own, nats per response:

    ``kl_soup``         KL(π‖soup)
    ``kl_ingredients``  Σ_i w_i KL(π‖π_i)
    ``kl_mixture``      KL(π‖π̃); for π the soup, its distance from the geometric mixture
    ``triangle_gap``    KL(π‖soup) − Σ_i w_i KL(π‖π_i), either sign; the error is that of the difference (paired)
    ``log_normalizer``  E_π Σ_t −log Z(s_t) ≥ 0, how much the ingredients disagree where π goes

    identity_error         [N]       the largest |Σ_i w_i KL(π‖π_i) − KL(π‖π̃) + log Z(s_t)| at any prefix of π
    """

    k1: np.ndarray
    k1_stderr: np.ndarray
    soup: str
    ingredients: list[str]
    weights: np.ndarray
    quantities: list[str]
    values: np.ndarray
    values_stderr: np.ndarray
    identity_error: np.ndarray

    def of(self, name: str) -> dict[str, Estimate]:
        """All quantities of one model: ``geometry.of("policy")["triangle_gap"]``."""
        column = self.names.index(name)
        pairs = zip(self.values[:, column], self.values_stderr[:, column], strict=True)
        return {
            quantity: Estimate(float(mean), float(stderr))
            for quantity, (mean, stderr) in zip(self.quantities, pairs, strict=True)
        }

    @property
    def stderr_ratio(self) -> np.ndarray:
        """[N, N] standard error of the exact estimator over that of k1 on the same responses; NaN on the diagonal.

        It falls about as √KL: on the built-in task from a half at one nat to less than a tenth at a few thousandths.
        """
        with np.errstate(invalid="ignore"):
            return self.stderr / self.k1_stderr


def kl_geometry(
    models: Models,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ingredients: Sequence[str],
    weights: Sequence[float] | None = None,
    soup: str = "soup",
    max_new_tokens: int,
    num_responses: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    save: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> KLGeometry:
    """KL between all pairs of models, both ways, and how each of them lies to a soup and to its ingredients.

    models       {name: folder or model}, or a sequence of folders: base, SFT models, soup, policies, in any order
    ingredients  names of those that the soup is made of, with their ``weights`` (uniform for None; brought to sum 1)
    soup         name of the soup among the models; where no model has it, their weighted average is made and added

    Every model samples ``num_responses`` responses of at most ``max_new_tokens`` tokens to every prompt; all that is
    said of it is measured on these. Standard errors are over prompts, as in :func:`analysis.kl_matrix`, whose other
    arguments are the same. All models are in memory at once.

    Raises ValueError when vocabularies differ, names and weights do not fit together, or ``save`` holds another
    computation; FileExistsError when ``save`` exists and ``resume`` is not set.

        geometry = kl_geometry(["base", "sft1", "sft2", "policy"], prompts, tokenizer, ingredients=["sft1", "sft2"],
                               max_new_tokens=48)
        geometry["policy", "soup"].mean
        geometry.of("policy")["triangle_gap"]
        geometry.of("soup")["kl_mixture"]
        geometry.stderr_ratio  # what the exact estimator saves: k1 needs 1 / ratio² as many responses

    Papers: Amini, Vieira, Cotterell 2025, arXiv 2504.10637 (the estimator); Aminian et al. 2025, arXiv 2502.01203 and
    Le et al. 2024, arXiv 2405.16388 (several references).
    """
    sources = named_sources(models)
    shares = _shares(ingredients, weights)
    if unknown := [name for name in ingredients if name not in sources]:
        raise ValueError(f"ingredients={unknown}: not among the models {list(sources)}; give names of models")
    if len(set(ingredients)) < len(ingredients):
        raise ValueError(f"ingredients={list(ingredients)}: names one twice; give its weight once")
    if soup in ingredients:
        raise ValueError(f"soup={soup!r}: is one of the ingredients; give the soup's own name")
    require_unstarted(save, resume)
    samples = Samples(prompts, tokenizer, max_new_tokens, num_responses, temperature, seed, batch_size)
    loaded = load_models(sources, device)
    if soup not in loaded:
        loaded[soup] = soupkit.average([loaded[name] for name in ingredients], shares)
    names, weight_of = list(loaded), dict(zip(ingredients, shares, strict=True))
    references = {name: ModelReference(model, torch.float64) for name, model in loaded.items()}
    mixture = MixtureReference([references[name] for name in ingredients], shares)

    def row_of(row: int) -> dict[str, Estimate]:
        name = names[row]
        others = {other: reference for other, reference in references.items() if other != name}
        compared = samples.compare(loaded[name], {**others, MIXTURE: mixture})
        kl = {name: torch.zeros_like(compared.logprobs), **compared.kl}
        logprobs = {name: compared.logprobs, **compared.other_logprobs}
        quantities, error = _to_soup(kl, logprobs, soup, weight_of)
        return {
            **{f"{KL_TO}{other}": samples.estimate(kl[other]) for other in names},
            **{f"{K1_TO}{other}": samples.estimate(compared.logprobs - logprobs[other]) for other in names},
            **{quantity: samples.estimate(tokens) for quantity, tokens in quantities.items()},
            IDENTITY_ERROR: Estimate(error, math.nan),
        }

    with evaluating(*loaded.values()):
        rows = measure_each(
            PointByPoint(
                Measurements.empty(len(names)), {"soup": soup, "ingredients": weight_of, **samples.identity(loaded)}
            ),
            row_of,
            save=save,
            progress="kl geometry" if progress else None,
        ).measurements
    estimates = dict(zip(rows.names, np.stack([rows.values, rows.stderr], axis=1), strict=True))  # [2, N] each
    (mean, stderr), (k1, k1_stderr) = (
        np.stack([estimates[f"{to}{name}"] for name in names], axis=-1) for to in (KL_TO, K1_TO)
    )
    values, values_stderr = np.stack([estimates[quantity] for quantity in QUANTITIES], axis=1)
    return KLGeometry(
        names=names,
        mean=mean,
        stderr=stderr,
        metadata=samples.metadata(),
        k1=k1,
        k1_stderr=k1_stderr,
        soup=soup,
        ingredients=list(ingredients),
        weights=np.array(shares),
        quantities=list(QUANTITIES),
        values=values,
        values_stderr=values_stderr,
        identity_error=estimates[IDENTITY_ERROR][0],
    )


def _to_soup(
    kl: Mapping[str, Tensor], logprobs: Mapping[str, Tensor], soup: str, shares: Mapping[str, float]
) -> tuple[dict[str, Tensor], float]:
    """KLGeometry's quantities of one model per token, and the error of the identity. → {name: [P·R, T]}, ()"""
    to_ingredients = _weighted_sum(shares, kl)
    # log Z is read off the sampled tokens, the KL are sums over the vocabulary: two ways to the same number.
    minus_log_z = logprobs[MIXTURE] - _weighted_sum(shares, logprobs)
    values = (kl[soup], to_ingredients, kl[MIXTURE], kl[soup] - to_ingredients, minus_log_z)
    return dict(zip(QUANTITIES, values, strict=True)), float((to_ingredients - kl[MIXTURE] - minus_log_z).abs().max())


def _weighted_sum(shares: Mapping[str, float], values: Mapping[str, Tensor]) -> Tensor:
    """Σ_i w_i x_i over the names that have weights."""
    return torch.stack([share * values[name] for name, share in shares.items()]).sum(0)


def _shares(ingredients: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The weights of the ingredients, brought to sum 1."""
    if len(ingredients) < 2:
        raise ValueError(f"ingredients={list(ingredients)}: a soup needs at least two; give more")
    given = [1.0] * len(ingredients) if weights is None else list(weights)
    if len(given) != len(ingredients):
        raise ValueError(f"weights: {len(given)} for {len(ingredients)} ingredients; give one for each")
    if not all(0 < weight < math.inf for weight in given):
        raise ValueError(f"weights={given}: must be finite and positive; leave out ingredients without weight")
    return [weight / sum(given) for weight in given]


# ── Soup and geometric mixture ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SoupMixtureSlope(Saved):
    """How fast a soup and the geometric mixture of its ingredients part, at E steps ε. Nats per response.

    epsilons                                [E]
    to_mixture, to_mixture_stderr           [E]  KL(soup_ε‖π̃_ε)
    to_ingredients, to_ingredients_stderr   [E]  Σ_i w_i KL(soup_ε‖π_iε)
    slope, slope_stderr                          of log to_mixture over log ε, by least squares; 4 as ε → 0
    ingredient_slope, ingredient_slope_stderr    of log to_ingredients; 2 as ε → 0
    metadata
    """

    epsilons: np.ndarray
    to_mixture: np.ndarray
    to_mixture_stderr: np.ndarray
    to_ingredients: np.ndarray
    to_ingredients_stderr: np.ndarray
    slope: float
    slope_stderr: float
    ingredient_slope: float
    ingredient_slope_stderr: float
    metadata: dict[str, Any]


def soup_mixture_slope(
    ingredients: Models,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str | os.PathLike[str] | PreTrainedModel | None = None,
    weights: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    max_new_tokens: int,
    num_responses: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> SoupMixtureSlope:
    """KL(soup_ε ‖ geometric mixture_ε) and KL(soup_ε ‖ ingredients_ε) over step sizes ε, and their log–log slopes.

    π_iε = θ₀ + ε (θ_i − θ₀),  soup_ε = Σ_i w_i π_iε = θ₀ + ε Σ_i w_i (θ_i − θ₀)

    ``base`` is θ₀; None takes the soup itself, which all ε then share. ``epsilons`` are by default six from 0.1 to 1,
    evenly spaced in log ε; 1 are the ingredients themselves. Each soup_ε samples responses of its own, with the random
    numbers that all share; the slopes' errors are by the jackknife over prompts (over responses for one prompt). The
    other arguments are those of :func:`kl_geometry`. In memory are some 3n + 3 models for n ingredients.

    A slope far from 4 says that the larger epsilons are beyond the law's reach: give smaller ones.

    Raises ValueError when models, weights or epsilons do not fit, and when a KL is 0 because the ingredients are equal.

        law = soup_mixture_slope(["sft1", "sft2"], prompts, tokenizer, base="base", max_new_tokens=48)
        law.slope, law.ingredient_slope  # about 4 and 2

    Soup against ensemble of logits: Wortsman et al. 2022, arXiv 2203.05482, section 4.
    """
    sources = named_sources(ingredients)
    shares = _shares(list(sources), weights)
    steps = np.geomspace(0.1, 1, 6) if epsilons is None else np.array(epsilons, dtype=float)
    if len(set(steps.tolist())) < 2 or not all(0 < step < math.inf for step in steps):
        raise ValueError(f"epsilons={steps.tolist()}: a slope needs two or more different positive numbers")
    samples = Samples(prompts, tokenizer, max_new_tokens, num_responses, temperature, seed, batch_size)
    loaded = list(load_models({**sources, **({} if base is None else {BASE: base})}, device).values())
    points = [space.read(name, model, model) for name, model in zip([*sources, BASE], loaded, strict=False)]
    origin = soupkit.average(points, shares) if base is None else points.pop()
    directions = [space.subtract(point, origin) for point in points]
    soup, *moved = (space.movable(loaded[0]) for _ in range(len(points) + 1))
    del loaded, points
    to_mixture, to_ingredients = [], []
    bar = tqdm(steps.tolist(), "soup and mixture", disable=not progress)
    with evaluating(soup, *moved), bar:
        for step in bar:
            space.put(soup, origin, directions, [step * share for share in shares])
            for model, direction in zip(moved, directions, strict=True):
                space.put(model, origin, [direction], [step])
            references = {str(index): ModelReference(model, torch.float64) for index, model in enumerate(moved)}
            mixture = MixtureReference(list(references.values()), shares)
            kl = samples.compare(soup, {**references, MIXTURE: mixture}).kl
            to_mixture.append(samples.units(kl[MIXTURE]))
            to_ingredients.append(samples.units(_weighted_sum(dict(zip(references, shares, strict=True)), kl)))
    laws = {}
    for name, units in (("to_mixture", torch.stack(to_mixture)), ("to_ingredients", torch.stack(to_ingredients))):
        if not bool((units.mean(dim=1) > 0).all()):
            raise ValueError(f"ingredients: {name} is 0 at some ε; are they equal, or the epsilons too small?")
        laws[name] = units.cpu().numpy()
    slope, ingredient_slope = (jackknife(units, lambda means: _slope(steps, means)) for units in laws.values())
    (mixture_means, mixture_errors), (means, errors) = (means_and_errors(units) for units in laws.values())
    return SoupMixtureSlope(
        epsilons=steps,
        to_mixture=mixture_means,
        to_mixture_stderr=mixture_errors,
        to_ingredients=means,
        to_ingredients_stderr=errors,
        slope=slope.mean,
        slope_stderr=slope.stderr,
        ingredient_slope=ingredient_slope.mean,
        ingredient_slope_stderr=ingredient_slope.stderr,
        metadata={
            "ingredients": list(sources),
            "weights": shares,
            "around": "soup" if base is None else "base",
            **samples.metadata(),
        },
    )


def _slope(steps: np.ndarray, values: np.ndarray) -> float:
    """Of log values over log steps, by least squares."""
    return float(np.polyfit(np.log(steps), np.log(values), 1)[0])

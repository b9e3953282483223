"""How much of the space policies still explore: entropy, diversity of responses, support kept, distance in weights.

Every policy answers the same prompts N times, with the same random numbers. Measures are means over prompts (token
measures: over all response tokens) with standard errors over prompts. With responses as tokens, without the end of
sequence:

==================  ====================================================================================================
entropy             −Σ_v π_v log π_v per token, exact; nats per token
distinct_n          different n-grams / all n-grams in the N responses to a prompt, n = 1, 2, 3 (Li et al. 2016,
                    arXiv 1510.03055)
unique_responses    different responses / N
self_bleu           mean BLEU-4 of a response against the N − 1 others to its prompt: 1 where all are alike (Zhu et al.
                    2018, arXiv 1802.01886)
top_p_mass          Σ of π_v over the fewest likeliest tokens of ρ with mass ``top_p`` or more, per token; about
                    ``top_p`` and more for π = ρ. Low: the policy says what the reference would not
max_log_ratio       max_t log π(y_t|s_t) / ρ(y_t|s_t) of a response: how far a single token left the reference, in nats
kl                  KL(π‖ρ), exact, nats per response
response_length     tokens per response, end of sequence included
==================  ====================================================================================================

distinct_n, unique_responses and self_bleu depend on N, and distinct_n on the length of responses too: results of
different N are refused a comparison. Diversity within prompts is what RLHF is known to lose (Kirk et al. 2024,
arXiv 2310.06452).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import soupkit
from analysis.divergence import load_models
from analysis.results import Saved
from rlhf import kl
from rlhf.data import Prompt, by_length
from rlhf.decoding import Sampling
from rlhf.logprobs import Distributions, chunks, gather_logprobs, model_distributions, unpack
from rlhf.masking import masked_sum
from rlhf.metrics import Estimate, per_prompt_estimate
from rlhf.models import evaluating
from rlhf.randomness import generator
from rlhf.rollout import Rollout, sample

LARGEST_N = 3  # of distinct_n
MEASURES = (
    "entropy",
    *(f"distinct_{n}" for n in range(1, LARGEST_N + 1)),
    "unique_responses",
    "self_bleu",
    "top_p_mass",
    "max_log_ratio",
    "kl",
    "response_length",
)
SIZE_DEPENDENT = ("unique_responses", "self_bleu", *(name for name in MEASURES if name.startswith("distinct_")))
REFERENCE = "reference"


@dataclass(frozen=True)
class Exploration(Saved):
    """M models, measured in Q ways (see the module) and placed in weight space; the reference is the first.

    names          M names
    measures       Q names
    values         [Q, M]
    stderr         [Q, M]
    num_responses  N, the responses to each prompt
    distance       [M]     ‖θ − θ_ref‖₂ over all weights
    relative       [M]     the same / ‖θ_ref‖₂
    cosine         [M, M]  of the task vectors θ − θ_ref; NaN for the reference, which has none
    metadata       how responses were sampled
    """

    names: list[str]
    measures: list[str]
    values: np.ndarray
    stderr: np.ndarray
    num_responses: int
    distance: np.ndarray
    relative: np.ndarray
    cosine: np.ndarray
    metadata: dict[str, Any]

    def __getitem__(self, place: tuple[str, str]) -> Estimate:
        """A measure of a model: ``result["self_bleu", "policy"]``."""
        measure, name = place
        row, column = self._index(measure, self.measures), self._index(name, self.names)
        return Estimate(float(self.values[row, column]), float(self.stderr[row, column]))

    def difference(self, measure: str, name: str, other: str, *, of: Exploration | None = None) -> Estimate:
        """A model's measure minus another's, which may be ``of`` another result; √(se² + se²).

        Raises ValueError for a measure that depends on the number of responses, where the two results differ in it.
        """
        theirs = self if of is None else of
        if measure in SIZE_DEPENDENT and theirs.num_responses != self.num_responses:
            raise ValueError(
                f"{measure}: depends on the number of responses to a prompt, {self.num_responses} here and "
                f"{theirs.num_responses} there; compare at equal numbers"
            )
        a, b = self[measure, name], theirs[measure, other]
        return Estimate(a.mean - b.mean, math.hypot(a.stderr, b.stderr))

    @staticmethod
    def _index(name: str, names: Sequence[str]) -> int:
        if name not in names:
            raise ValueError(f"{name!r}: not in this result, which has {list(names)}; choose one of these")
        return list(names).index(name)


def explore(
    policies: Mapping[str, str | os.PathLike[str] | PreTrainedModel],
    reference: str | os.PathLike[str] | PreTrainedModel,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    num_responses: int = 8,
    top_p: float = 0.95,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = 256,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Exploration:
    """Measure policies beside their reference: {name: checkpoint folder, run folder or model}.

    Of a run folder, its ``policy/`` is meant. The reference ρ is measured as well, under the name ``reference``.
    Models stay in memory, ``batch_size`` bounds how many responses are handled at once.

    Raises ValueError when vocabularies differ, without prompts, and for fewer than two responses a prompt.

        explore({"policy": "runs/soup"}, "soup", prompts, tokenizer, max_new_tokens=32)["self_bleu", "policy"]
    """
    if not prompts:
        raise ValueError("prompts: none given; give at least one prompt")
    if num_responses < 2:
        raise ValueError(f"num_responses={num_responses}: diversity needs at least 2 responses to a prompt")
    if REFERENCE in policies:
        raise ValueError(f"policies: {REFERENCE!r} is the reference's own name; choose another")
    top = Sampling(top_p=top_p)
    sources = {REFERENCE: reference, **policies}
    models = load_models({name: policy_of(source) for name, source in sources.items()}, device)
    repeated = [prompt for prompt in prompts for _ in range(num_responses)]
    estimates: list[dict[str, Estimate]] = []
    bar = tqdm(models.items(), "exploration", disable=not progress)
    with evaluating(*models.values()), bar:
        for _, model in bar:
            rollout = sample(
                model,
                tokenizer,
                repeated,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator(seed, "exploration"),
                batch_size=batch_size,
            )
            tokens = _token_measures(model, models[REFERENCE], rollout, top, temperature, batch_size)
            responses = response_tokens(rollout, tokenizer.eos_token_id)
            estimates.append(_token_estimates(rollout, tokens) | _diversity_estimates(responses, num_responses))
    values, stderr = (
        np.array([[getattr(found[measure], field) for found in estimates] for measure in MEASURES])
        for field in ("mean", "stderr")
    )
    distance, relative, cosine = _weight_space(models)
    return Exploration(
        names=list(models),
        measures=list(MEASURES),
        values=values,
        stderr=stderr,
        num_responses=num_responses,
        distance=distance,
        relative=relative,
        cosine=cosine,
        metadata={
            "num_prompts": len(prompts),
            "max_new_tokens": max_new_tokens,
            "top_p": top_p,
            "temperature": temperature,
            "seed": seed,
        },
    )


def policy_of(source: Any) -> Any:
    """A run folder's policy; anything else as it is."""
    if isinstance(source, str | os.PathLike) and (Path(source) / "policy" / "config.json").is_file():
        return Path(source) / "policy"
    return source


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def _token_measures(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    rollout: Rollout,
    top: Sampling,
    temperature: float,
    batch_size: int | None,
) -> dict[str, Tensor]:
    """entropy, kl, top_p_mass and log_ratio at every response token. → [B, T] each, 0 outside the mask"""
    mask = rollout.response_mask
    results: dict[str, Tensor] = {}
    for indices in by_length(rollout, batch_size):
        part = rollout.rows(indices)
        inside = part.response_mask
        measured = token_measures(
            model_distributions(model, part, temperature),
            model_distributions(reference, part, temperature),
            part.response_tokens[inside],
            model.config.get_text_config().vocab_size,
            top,
        )
        for name, packed in measured.items():
            results.setdefault(name, torch.zeros(mask.shape, device=mask.device))
            results[name][indices, : inside.shape[1]] = unpack(packed, inside)
    return results


def token_measures(
    policy: Distributions, reference: Distributions, tokens: Tensor, vocab_size: int, top: Sampling
) -> dict[str, Tensor]:
    """A policy π beside a reference ρ at N response tokens, a few at a time. → [N] each

    entropy     −Σ_v π_v log π_v
    kl          Σ_v π_v log (π_v/ρ_v)
    top_p_mass  Σ of π_v over the tokens that ``top`` keeps of ρ
    log_ratio   log π(y) − log ρ(y)
    """
    parts: list[dict[str, Tensor]] = []
    for rows in chunks(len(tokens), vocab_size, tokens.device):
        log_p, log_q = policy.rows(rows), reference.rows(rows)
        kept = top.cut(log_q) > -torch.inf
        parts.append(
            {
                "entropy": kl.entropy(log_p),
                "kl": kl.exact(log_p, log_q),
                "top_p_mass": torch.where(kept, log_p.exp(), 0.0).sum(-1),
                "log_ratio": gather_logprobs(log_p, tokens[rows]) - gather_logprobs(log_q, tokens[rows]),
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _token_estimates(rollout: Rollout, tokens: Mapping[str, Tensor]) -> dict[str, Estimate]:
    mask, lengths, prompts = rollout.response_mask, rollout.response_lengths, rollout.prompts
    ones = torch.ones_like(lengths)
    largest = tokens["log_ratio"].masked_fill(~mask, -torch.inf).amax(dim=1)
    return {
        "entropy": per_prompt_estimate(masked_sum(tokens["entropy"], mask, dim=1), lengths, prompts),
        "top_p_mass": per_prompt_estimate(masked_sum(tokens["top_p_mass"], mask, dim=1), lengths, prompts),
        "max_log_ratio": per_prompt_estimate(largest, ones, prompts),
        "kl": per_prompt_estimate(kl.per_response(tokens["kl"], mask), ones, prompts),
        "response_length": per_prompt_estimate(lengths, ones, prompts),
    }


# ── Diversity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def response_tokens(rollout: Rollout, eos_token_id: int) -> list[list[int]]:
    """The tokens of every response, without the end of sequence."""
    kept = rollout.response_mask & (rollout.response_tokens != eos_token_id)
    return [row[keep].tolist() for row, keep in zip(rollout.response_tokens.cpu(), kept.cpu(), strict=True)]


def _diversity_estimates(responses: Sequence[Sequence[int]], num_responses: int) -> dict[str, Estimate]:
    """Means over prompts, whose N responses follow each other; standard errors over prompts (NaN for a single one)."""
    groups = [responses[start : start + num_responses] for start in range(0, len(responses), num_responses)]
    rows = {
        **{f"distinct_{n}": [distinct_n(group, n) for group in groups] for n in range(1, LARGEST_N + 1)},
        "unique_responses": [len({tuple(response) for response in group}) / num_responses for group in groups],
        "self_bleu": [self_bleu(group) for group in groups],
    }
    return {name: _mean_of_defined(values) for name, values in rows.items()}


def _mean_of_defined(values: Sequence[float]) -> Estimate:
    """Mean and standard error of those that are not NaN: a prompt answered by too few tokens has no n-grams."""
    defined = np.array(values)[~np.isnan(values)]
    if not len(defined):
        return Estimate(math.nan, math.nan)
    error = defined.std(ddof=1) / math.sqrt(len(defined)) if len(defined) > 1 else math.nan
    return Estimate(float(defined.mean()), float(error))


def ngrams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    """How often each n-gram occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams / all n-grams of the responses together; NaN without any (Li et al. 2016, arXiv 1510.03055)."""
    counts = sum((ngrams(response, n) for response in responses), Counter[tuple[int, ...]]())
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(responses: Sequence[Sequence[int]], order: int = 4) -> float:
    """Mean over N responses of BLEU against the N − 1 others, 0 to 1 (Zhu et al. 2018, arXiv 1802.01886).

    BLEU = min(1, e^(1 − r/c)) · (∏_n p_n)^(1/order), c the response's length, r that of the other nearest to it (the
    shorter of two). p_n = m_n/l_n, the share of the response's l_n n-grams that some other has as often; for n > 1
    smoothed to (m_n + 1)/(l_n + 1), so that one missing match does not make the whole 0 (Lin & Och 2004). An empty
    response has BLEU 0. The cost grows like N: an n-gram's largest count among the others is the largest of all, or the
    second largest.
    """
    logs = np.zeros(len(responses))
    for n in range(1, order + 1):
        counts = [ngrams(response, n) for response in responses]
        most: dict[tuple[int, ...], list[int]] = {}  # the two largest counts of any responses
        for count in counts:
            for gram, times in count.items():
                most[gram] = sorted([*most.get(gram, [0, 0]), times])[1:]
        for i, count in enumerate(counts):
            # Where this response has the largest count, the others have the second largest, which may be equal.
            matched = sum(min(times, most[gram][times < most[gram][1]]) for gram, times in count.items())
            total = count.total()
            if n > 1:
                matched, total = matched + 1, total + 1
            logs[i] += math.log(matched / total) / order if matched else -math.inf
    lengths = np.array([len(response) for response in responses])
    scores = np.exp(logs)
    for i, length in enumerate(lengths):
        others = np.delete(lengths, i)
        nearest = min(others, key=lambda other: (abs(other - length), other))
        scores[i] *= math.exp(min(0.0, 1 - nearest / length)) if length else 0.0
    return float(scores.mean())


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _weight_space(models: Mapping[str, PreTrainedModel]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances of the models from the first, absolute and relative, and cosines of their task vectors."""
    reference, *others = models.values()
    distance, relative = np.zeros((2, len(models)))
    cosine = np.full((len(models), len(models)), np.nan)
    for i, model in enumerate(others, start=1):
        total = soupkit.diff(reference, model, progress=False).total
        distance[i], relative[i] = total.l2, total.relative
        cosine[i, i] = 1.0 if total.l2 > 0 else math.nan
    for (i, a), (j, b) in combinations(enumerate(others, start=1), 2):
        cosine[i, j] = cosine[j, i] = soupkit.diff(a, b, base=reference, progress=False).total.task_cosine
    return distance, relative, cosine

"""One score from several rewards: standardised over the reference's responses, weighted, and less the penalties.

    score = Σ_i w_i · r̂_i − Σ penalties,   r̂_i = (r_i − mean_i) / std_i

B responses; all tensors are [B] float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from rlhf.rewards import Reward
from rlhf.rollout import Rollout

Scores = dict[str, Tensor]  # by reward, one per response: [B]

FLOAT32_ROUNDING = 1e-6  # relative; a reward model's scores of equal responses differ by less


def score(rewards: Mapping[str, Reward], rollout: Rollout) -> Scores:
    """What every reward says of a rollout, each in its own units."""
    return {name: reward(rollout) for name, reward in rewards.items()}


def weigh(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The weight of every reward, 1 each where none are given; used as they are, not normalised.

    A negative weight makes a reward a cost, 0 reports it without optimising it. ValueError unless there is one finite
    weight for each, and one that is not 0.
    """
    weights = list(weights) or [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"reward_weights: {len(weights)} for {len(names)} rewards; give one weight each, in order")
    if not all(map(isfinite, weights)) or not any(weights):
        raise ValueError(f"reward_weights: {weights}; give finite weights that are not all 0")
    return dict(zip(names, weights, strict=True))


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of each reward by name; ``dataclasses.asdict`` turns them into JSON and back exactly.

    Affine in each reward, so it changes what weights and the KL coefficient mean, never the order by one reward.
    """

    means: dict[str, float]
    stds: dict[str, float]

    def __call__(self, scores: Mapping[str, Tensor]) -> Scores:
        """r̂ = (r − mean) / std of every reward."""
        return {name: (values - self.means[name]) / self.stds[name] for name, values in scores.items()}


def fit_standardisation(scores: Mapping[str, Tensor]) -> Standardisation:
    """Statistics of every reward over n responses, for r̂ of mean 0 and standard deviation 1 there. {name: [n]}

    Sampled from the reference on training prompts, as Ziegler et al. 2019 (arXiv 1909.08593) normalise theirs, they
    make one KL coefficient mean the same whatever a reward's scale. std² has the denominator n − 1. ValueError names a
    reward that does not vary beyond the rounding of float32.
    """
    means, stds = {}, {}
    for name, values in scores.items():
        if len(values) < 2:
            raise ValueError(f"reward {name}: cannot be standardised over {len(values)} responses; give 2 or more")
        values = values.double()
        means[name], stds[name] = float(values.mean()), float(values.std())
        if stds[name] <= FLOAT32_ROUNDING * float(values.abs().max()):
            raise ValueError(
                f"reward {name}: gives every one of {len(values)} responses of the reference {means[name]:g}; sample "
                "more of them, or do not standardise it"
            )
    return Standardisation(means, stds)


def combine(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    standardisation: Standardisation | None = None,
    clip: float | None = None,
) -> Tensor:
    """Σ_i w_i · clip(r̂_i, −c, c), r̂_i the standardised reward, or the reward itself without ``standardisation``. → [B]

    The sum is not divided by Σ w. One reward of weight 1, neither standardised nor clipped, comes out as it went in.
    """
    parts = scores if standardisation is None else standardisation(scores)
    bounded = parts if clip is None else {name: values.clamp(-clip, clip) for name, values in parts.items()}
    return torch.stack([weights[name] * values for name, values in bounded.items()]).sum(dim=0)


def penalties(
    finished: Tensor,
    response_lengths: Tensor,
    *,
    missing_eos_penalty: float = 0.0,
    length_penalty: float = 0.0,
    length_penalty_after: int = 0,
) -> Scores:
    """What is to be subtracted from the score of each response, by reason; each is ≥ 0. [B] bool, [B] → {reason: [B]}

    missing_eos  ``missing_eos_penalty`` where the response did not end with the end-of-sequence token
    length       ``length_penalty`` · max(0, L − ``length_penalty_after``), L the response's tokens, end-of-sequence
                 included

    With ``length_penalty`` = 1 / (longest − after) the second is DAPO's soft overlong punishment (arXiv 2503.14476): it
    rises from 0 to 1 over the last tokens that a response may have.
    """
    excess = (response_lengths - length_penalty_after).clamp(min=0)
    return {"missing_eos": missing_eos_penalty * (~finished).float(), "length": length_penalty * excess.float()}

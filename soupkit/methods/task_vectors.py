"""Methods on task vectors dᵢ = xᵢ − base: sparsify, weigh, agree on signs, add to the base.

Masks are made of floating-point operations (hardshrink, clamp, relu, sign) rather than of boolean tensors, which torch
handles several times slower on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from soupkit.errors import MergeError
from soupkit.methods.averages import weighted_sum
from soupkit.methods.row import Blocks, Whole
from soupkit.methods.spherical import gram_matrix

RANDOM_VALUES = 2**16  # a random number is one of so many integers, so probabilities are multiples of 2⁻¹⁶
# Magnitudes within a row are told apart by their exponent and 5 bits more, over 16 octaves below the row's largest.
RANK_BITS, RANK_BINS = 5, 16 * 2**5


def task_arithmetic(blocks: Blocks, weight: Sequence[float], normalize: bool, lambda_: float) -> Tensor:
    """base + λ Σ wᵢ dᵢ; with ``normalize`` the sum is divided by Σ wᵢ."""
    return _add(blocks, blocks.take_deltas(), weight, normalize, lambda_, consensus=False)


def survey_magnitudes(whole: Whole, density: Sequence[float], rescale: bool, **_: Any) -> dict[str, Any]:
    """The bands of magnitudes that the densest ``density`` of each task vector lies in."""
    num = whole.num_elements
    ranks = [None if d >= 1 else (num - max(1, int(d * num)),) if d > 0 and num else () for d in density]
    return _survey_bands(whole, ranks, rescale)


def survey_breadcrumbs(
    whole: Whole, density: Sequence[float], gamma: Sequence[float], rescale: bool, **_: Any
) -> dict[str, Any]:
    """The bands of magnitudes that stay when the largest ``gamma`` and the smallest are dropped."""
    num = whole.num_elements
    ranks: list[tuple[int, ...] | None] = []
    for d, g in zip(density, gamma, strict=True):
        kept, top = int(d * num), int(g * num)
        bottom = max(0, num - kept - top)
        ranks.append(None if d >= 1 else (bottom, bottom + kept - 1) if kept else ())
    return _survey_bands(whole, ranks, rescale)


def banded(
    blocks: Blocks,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    bands: Sequence[tuple[float, float] | None],
    factors: Sequence[float],
    consensus: bool,
    **_: Any,
) -> Tensor:
    """Task vectors cut to their bands of magnitudes, then weighed and added, with sign ``consensus`` or without."""
    kept = [_cut(d, band) for d, band in zip(blocks.take_deltas(), bands, strict=True)]
    return _add(blocks, kept, weight, normalize, lambda_, consensus, factors)


def ties(blocks: Blocks, **parameters: Any) -> Tensor:
    """Trim, elect sign, disjoint merge: base + λ Σ_{agreeing} wᵢ dᵢ / Σ_{agreeing} wᵢ over the trimmed dᵢ."""
    return banded(blocks, consensus=True, **parameters)


def breadcrumbs(blocks: Blocks, **parameters: Any) -> Tensor:
    """base + λ Σ wᵢ dᵢ over task vectors without their largest and smallest values."""
    return banded(blocks, consensus=False, **parameters)


def dare(
    blocks: Blocks,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    consensus: bool,
) -> Tensor:
    """Each element of dᵢ is kept with probability p = ``density``, and what is kept divided by p."""
    kept, factors = blocks.take_deltas(), []
    for index, (delta, wanted) in enumerate(zip(kept, density, strict=True)):
        cut = round(wanted * RANDOM_VALUES)
        if cut < RANDOM_VALUES:
            delta *= _below(blocks.random(index).to(delta.device, delta.dtype), cut)
        factors.append(RANDOM_VALUES / cut if rescale and cut else 1.0)
    return _add(blocks, kept, weight, normalize, lambda_, consensus, factors)


def dare_linear(blocks: Blocks, seed: int, **parameters: Any) -> Tensor:
    """base + λ Σ wᵢ dᵢ over randomly thinned task vectors."""
    return dare(blocks, consensus=False, **parameters)


def dare_ties(blocks: Blocks, seed: int, **parameters: Any) -> Tensor:
    """The sum over those thinned task vectors that have the elected sign."""
    return dare(blocks, consensus=True, **parameters)


def della_magprune(
    blocks: Blocks,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    consensus: bool,
) -> Tensor:
    """Each element of dᵢ is kept with a probability p that grows with its magnitude's rank in its row, and
    what is kept is divided by p.

    p = density − ε + 2 ε rank / (C − 1), with ranks 0 … C − 1 in a row of C elements.
    """
    kept = blocks.take_deltas()
    for index, (delta, wanted, spread) in enumerate(zip(kept, density, epsilon, strict=True)):
        if wanted >= 1:
            continue
        cuts = _keep_cuts(delta, wanted, spread if wanted else 0.0)
        delta *= _below(blocks.random(index).view(delta.shape).to(delta.device, delta.dtype), cuts)
        if rescale:
            delta /= cuts.mul_(1 / RANDOM_VALUES).clamp_(min=1 / RANDOM_VALUES)
    return _add(blocks, kept, weight, normalize, lambda_, consensus)


def check_della(parameters: Mapping[str, Any]) -> None:
    """Raise MergeError where density ± epsilon are no probabilities."""
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not 0 <= density - epsilon <= density + epsilon <= 1:
            raise MergeError(
                f"density {density:g} with epsilon {epsilon:g} gives keep probabilities beyond [0, 1]: "
                f"choose epsilon at most {min(density, 1 - density):g}"
            )


def della(blocks: Blocks, seed: int, **parameters: Any) -> Tensor:
    """The mean over those thinned task vectors that have the elected sign."""
    return della_magprune(blocks, consensus=True, **parameters)


def della_linear(blocks: Blocks, seed: int, **parameters: Any) -> Tensor:
    """base + λ Σ wᵢ dᵢ over task vectors thinned by magnitude."""
    return della_magprune(blocks, consensus=False, **parameters)


def survey_sce(whole: Whole, select_topk: float) -> dict[str, Any]:
    """The least variance that is selected, and each ingredient's share of the energy of what is selected."""
    least = 0.0
    if select_topk < 1:

        def num_varied(blocks: Blocks) -> Tensor:
            variance = _variance(blocks.take_deltas())
            return torch.stack([torch.count_nonzero(variance).double(), variance.sum()])  # the sum to show NaN

        selected = int(whole.total(num_varied)[0] * select_topk)
        least = math.inf
        if selected:
            rank = whole.num_elements - selected
            least = whole.order_statistics(lambda blocks: [_variance(blocks.take_deltas())], [[rank]])[0][0]
    energy = whole.total(lambda blocks: torch.stack([d.double().square().sum() for d in _selected(blocks, least)]))
    share = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(energy))
    return {"least": least, "weight": share.tolist()}


def sce(blocks: Blocks, least: float, weight: Sequence[float], select_topk: float) -> Tensor:
    """Select the positions that vary most, weigh models by energy there, and average those of the elected sign."""
    selected = _selected(blocks, least)
    weighted = [d * w for d, w in zip(selected, weight, strict=True)]
    return blocks.origin + _agreeing(weighted, weight, _new_sum(selected), True)


def survey_model_stock(whole: Whole, filter_wise: bool) -> dict[str, Any]:
    """The Gram matrix of the task vectors, unless rows have ratios of their own."""
    return {"gram": None if filter_wise else whole.total(lambda blocks: gram_matrix(blocks.take_deltas()))}


def model_stock(blocks: Blocks, filter_wise: bool, gram: Tensor | None) -> Tensor:
    """t mean(x) + (1 − t) base with t = n c / (1 + (n − 1) c), c the mean cosine between task vectors, t in [0, 1]."""
    deltas = blocks.take_deltas()
    if gram is None:
        wide = [d.double() for d in deltas]
        gram = torch.stack([torch.stack([(a * b).sum(1, keepdim=True) for b in wide]) for a in wide])
    n = len(deltas)
    norms = [gram[i, i].sqrt() for i in range(n)]
    cosines = [(gram[i, j] / (norms[i] * norms[j])).nan_to_num(0, 0, 0) for i, j in combinations(range(n), 2)]
    cosine = torch.stack(cosines).mean(0).clamp(0, 1)
    t = (n * cosine / (1 + (n - 1) * cosine)).to(deltas[0])
    # The mean of the task vectors rather than of the models: its rounding error is relative to the small change.
    return _sum(deltas).mul_(t / n).add_(blocks.origin)


def nearswap(blocks: Blocks, t: float) -> Tensor:
    """(1 − w) a + w b with w = min(1, t / |b − a|): the base a moves towards b by at most t."""
    return blocks.take_deltas()[0].clamp_(-t, t).add_(blocks.origin)


def survey_arcee_fusion(whole: Whole) -> dict[str, Any]:
    """The threshold median + 1.5 (Q₃ − Q₁) of the importance scores."""
    ranks = [int(q * (whole.num_elements - 1)) for q in (0.25, 0.5, 0.75)]
    (quartiles,) = whole.order_statistics(lambda blocks: [_importance(blocks)], [ranks], rowwise=True)
    return {"threshold": quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])}


def arcee_fusion(blocks: Blocks, threshold: float) -> Tensor:
    """base + d where |d| KL(softmax(x row) ‖ softmax(base row)) reaches the threshold, and the base elsewhere."""
    kept = _importance(blocks) >= threshold
    return torch.where(kept, blocks.take_deltas()[0], 0).add_(blocks.origin)


def _survey_bands(whole: Whole, ranks: Sequence[tuple[int, ...] | None], rescale: bool) -> dict[str, Any]:
    """For each task vector the magnitudes [low, high] that stay: None for all, and (∞, ∞) for none."""
    bands: list[tuple[float, float] | None] = [None if r is None else (math.inf, math.inf) for r in ranks]
    asked = [index for index, r in enumerate(ranks) if r]
    if asked:
        magnitudes = whole.order_statistics(
            lambda blocks: [blocks.ingredients[i].sub_(blocks.origin).abs_() for i in asked],
            [ranks[index] or () for index in asked],
        )
        for index, values in zip(asked, magnitudes, strict=True):
            bands[index] = (values[0], values[1] if len(values) > 1 else math.inf)
    factors = [1.0] * len(bands)
    if rescale:

        def l1_norms(blocks: Blocks) -> Tensor:
            pairs = zip(blocks.take_deltas(), bands, strict=True)
            return torch.stack([torch.stack([d.abs().sum(), _cut(d, band).abs().sum()]) for d, band in pairs])

        factors = [float(before / after) if after > 0 else 1.0 for before, after in whole.total(l1_norms)]
    return {"bands": bands, "factors": factors}


def _cut(delta: Tensor, band: tuple[float, float] | None) -> Tensor:
    """The delta where its magnitude is in the band, 0 elsewhere."""
    if band is None:
        return delta
    low, high = band
    kept = hardshrink(delta, _just_below(low, delta))
    return kept if high == math.inf else kept.sub_(hardshrink(kept, high))


def _just_below(value: float, like: Tensor) -> float:
    """The next smaller number in the tensor's dtype, since hardshrink keeps what is strictly above its threshold."""
    scalar = np.float64 if like.dtype == torch.float64 else np.float32
    return value if value == math.inf else float(np.nextafter(scalar(value), scalar(-np.inf)))


def _below(random: Tensor, cut: float | Tensor) -> Tensor:
    """1 where the random integer, −2¹⁵ or more, is among the ``cut`` smallest of 2¹⁶, else 0. Reuses ``random``."""
    return random.neg_().add_(cut - RANDOM_VALUES / 2).clamp_(0, 1)


def _keep_cuts(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """2¹⁶ (density − ε + 2 ε rank / (C − 1)), rounded, for the magnitudes of each row. delta: [R, C]; result: [R, C].

    Ranks come from a histogram of each row's magnitudes instead of a sort, which would cost more than all else:
    magnitudes that agree to 5 bits, or lie 16 octaves below the row's largest, share the mean of their ranks.
    """
    num_rows, num_columns = delta.shape
    keys = delta.abs().float().view(torch.int32) >> (23 - RANK_BITS)
    first_bins = RANK_BINS * torch.arange(num_rows, dtype=torch.int32, device=delta.device)[:, None]
    lowest = keys.amax(dim=1, keepdim=True) - (RANK_BINS - 1)
    keys = torch.maximum(keys.sub_(lowest - first_bins), first_bins).view(-1)
    counts = torch.bincount(keys, minlength=num_rows * RANK_BINS).view(num_rows, RANK_BINS).double()
    mean_ranks = counts.cumsum(dim=1).sub_(counts.add_(1).div_(2))
    least, spread = (density - epsilon, 2 * epsilon / (num_columns - 1)) if num_columns > 1 else (density, 0.0)
    cuts = mean_ranks.mul_(spread).add_(least).mul_(RANDOM_VALUES).round_().clamp_(0, RANDOM_VALUES)
    return cuts.to(delta.dtype).view(-1).index_select(0, keys).view_as(delta)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """n² times the population variance over the n ingredients at each position, n Σ dᵢ² − (Σ dᵢ)², in float64.

    In this form it is exact for 16-bit ingredients, so that equal variances stay equal.
    """
    wide = [d.double() for d in deltas]
    total = sum(wide[1:], wide[0])
    return (len(wide) * weighted_sum([d * d for d in wide], [1.0] * len(wide)) - total * total).clamp_(min=0)


def _selected(blocks: Blocks, least: float) -> list[Tensor]:
    """The task vectors where their variance is at least ``least``, 0 elsewhere."""
    deltas = blocks.take_deltas()
    if least > 0:
        variance = _variance(deltas)
        mask = hardshrink(variance, _just_below(least, variance)).sign_()
        deltas = [d * mask.to(d.dtype) for d in deltas]
    return deltas


def _importance(blocks: Blocks) -> Tensor:
    """|x − base| KL(softmax(x) ‖ softmax(base)), the divergence taken over rows with 10⁻⁸ added to each probability.

    In float64: the rows of two fine-tunings are so alike that float32 leaves little but rounding errors of the sum.
    """
    (x,), base = blocks.ingredients, blocks.origin
    p, q = (torch.softmax(rows.double(), dim=1) + 1e-8 for rows in (x, base))
    return (x - base).abs_() * (p * (p / q).log_()).sum(dim=1, keepdim=True)


def _add(
    blocks: Blocks,
    deltas: Sequence[Tensor],
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    consensus: bool,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """base + λ times the weighted sum of the deltas, or of those with the elected sign. Reuses the deltas."""
    ones = [1.0] * len(weight)
    factors = ones if factors is None else factors
    scales = [w * f for w, f in zip(weight, factors, strict=True)]
    if consensus:
        common = 1.0
        if len(set(weight)) == len(set(factors)) == 1 and weight[0] > 0:
            # Equal weights, the usual case: they elect nobody else, and are one product instead of two for each model.
            common = factors[0] if normalize else scales[0]
            weight = scales = ones
        weighted = [d if scale == 1 else d.mul_(scale) for d, scale in zip(deltas, scales, strict=True)]
        total = _agreeing(weighted, weight, _new_sum(weighted), normalize)
        if common != 1:
            total *= common
    else:
        sum_of_weights = math.fsum(weight)
        # Equal weights, the usual case, are one product instead of one for each model.
        total = _sum(deltas).mul_(scales[0]) if len(set(scales)) == 1 else weighted_sum(deltas, scales)
        if normalize and abs(sum_of_weights) >= 1e-8:
            total /= sum_of_weights
    return (total if lambda_ == 1 else total.mul_(lambda_)).add_(blocks.origin)


def _agreeing(weighted: Sequence[Tensor], weight: Sequence[float], elected: Tensor, normalize: bool) -> Tensor:
    """Σ wᵢ dᵢ over those with the sign of ``elected`` (+ for 0), divided by their Σ wᵢ with ``normalize``.

    0 agrees with neither sign, and a sum of weights of 0 divides by 1. weighted: the wᵢ dᵢ, which are overwritten, as
    ``elected`` is.
    """
    one = torch.ones((), dtype=elected.dtype, device=elected.device)
    sign = torch.copysign(one, elected.add_(0.0))  # −0 counts as +
    agreeing = [x.mul_(sign).relu_() for x in weighted]
    divisor = None
    if normalize:
        votes = [x.sign() if w == 1 else x.sign().mul_(w) for x, w in zip(agreeing, weight, strict=True)]
        divisor = _sum(votes)
    total = _sum(agreeing)
    if divisor is not None:
        positive = [w for w in weight if w > 0]
        # With no negative weight a divisor is 0, where the total is 0 too, or at least the smallest weight.
        if len(positive) + list(weight).count(0) == len(weight):
            total /= divisor.clamp_(min=min(positive, default=1.0))
        else:
            total /= torch.where(divisor == 0, 1, divisor)
    return total.mul_(sign)


def _sum(blocks: Sequence[Tensor]) -> Tensor:
    """The sum, in the place of the first block."""
    total = blocks[0]
    for block in blocks[1:]:
        total += block
    return total


def _new_sum(blocks: Sequence[Tensor]) -> Tensor:
    """The sum, in memory of its own."""
    total = blocks[0] + blocks[1] if len(blocks) > 1 else blocks[0].clone()
    for block in blocks[2:]:
        total += block
    return total

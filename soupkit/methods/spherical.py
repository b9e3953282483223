"""Methods that move along great circles. Each result is a combination of the ingredients whose coefficients follow from
their dot products, so two passes are enough for all of them: one for the dot products, one for the sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soupkit.methods.averages import normalised, weighted_sum
from soupkit.methods.row import Blocks, Whole

# Beyond this |cos| arc and chord are at most 1/cos(θ/2) − 1, 1/8000 of a length, apart: less than bfloat16 shows.
COLLINEAR = 0.9995


def gram_matrix(blocks: Sequence[Tensor]) -> Tensor:
    """Dot products G[i, j] = Σ xᵢ xⱼ of the blocks, in float64. The matrix of a tensor is the sum over its blocks.

    Float64 throughout: the cosine of nearly orthogonal task vectors, on which model_stock depends in proportion, loses
    its digits to the rounding of float32 sums.
    """
    wide = [block.flatten().double() for block in blocks]
    gram = torch.empty(len(wide), len(wide), dtype=torch.float64, device=wide[0].device)
    for i, x in enumerate(wide):
        for j, y in enumerate(wide[: i + 1]):
            gram[i, j] = gram[j, i] = torch.dot(x, y)
    return gram


def survey_gram(whole: Whole, **_: Any) -> dict[str, Any]:
    """The Gram matrix of the ingredients, or of the task vectors where there is a base."""
    return {"gram": whole.total(lambda blocks: gram_matrix(blocks.take_directions()))}


def slerp(blocks: Blocks, t: float, gram: Tensor) -> Tensor:
    """Great-circle interpolation (sin((1−t)θ) a + sin(tθ) b) / sin θ, where cos θ = a·b / (‖a‖ ‖b‖).

    θ is the angle between the two whole tensors, flattened. The straight line is taken where there is no usable angle:
    |cos θ| > 0.9995 (antipodal tensors too: every great circle joins them, so none is chosen, and the line passes
    through 0 half-way) or a tensor of zeros. t outside [0, 1] goes on along the circle. Fine-tunings of one model are
    mostly closer than that limit, and slerp is the straight line between them; between their task vectors, which
    nuslerp takes when it has the base, the angle matters.
    """
    if is_straight(gram):
        return weighted_sum(blocks.ingredients, (1 - t, t))
    angle = math.acos(_cosine(gram))
    coefficients = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return weighted_sum(blocks.ingredients, coefficients)


def is_straight(gram: Tensor) -> bool:
    """Whether slerp takes the straight line: |cos θ| > 0.9995, or a tensor is zero."""
    return not abs(_cosine(gram)) <= COLLINEAR  # also true of NaN


def survey_nuslerp(whole: Whole, nuslerp_flatten: bool, nuslerp_row_wise: bool, **_: Any) -> dict[str, Any]:
    """The dot products aa, bb, ab: of whole tensors [3], of columns [3, 1, C], or none where a block has whole rows."""
    if nuslerp_flatten or len(whole.shape) <= 1:
        return {"products": whole.total(lambda blocks: _products(blocks.take_directions(), None))}
    if nuslerp_row_wise:
        return {"products": whole.total(lambda blocks: _products(blocks.take_directions(), 0))}
    return {"products": None}


def nuslerp(
    blocks: Blocks, weight: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool, products: Tensor | None
) -> Tensor:
    """Slerp with t = w₂ / (w₁ + w₂), of the models or, with a base, of the task vectors; by tensor, row or column.

    The straight line is taken where 1 − cos² θ ≤ 10⁻¹² or a vector is zero: slerp's limit does not hold here.
    """
    total = sum(weight)
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5
    directions = blocks.take_directions()
    shape = directions[0].shape
    if products is None:
        directions = [x.view(-1, blocks.shape[-1]) for x in directions]
        products = _products(directions, 1)
    combined = weighted_sum(directions, _arc_coefficients(products, t).to(directions[0])).view(shape)
    return combined if blocks.base is None else combined + blocks.base


def _cosine(gram: Tensor) -> float:
    return float(gram[0, 1] / (gram[0, 0].sqrt() * gram[1, 1].sqrt()))


def _products(pair: Sequence[Tensor], dim: int | None) -> Tensor:
    """aa, bb and ab in float64, summed over everything, or over one dimension that is then kept with size 1."""
    a, b = (x.double() for x in pair)
    terms = (a * a, b * b, a * b)
    return torch.stack([x.sum() if dim is None else x.sum(dim, keepdim=True) for x in terms])


def _arc_coefficients(products: Tensor, t: float) -> Tensor:
    """The coefficients of a and b, stacked; those of the straight line where a and b are parallel."""
    aa, bb, ab = products
    cosine = (ab / (aa.sqrt() * bb.sqrt())).clamp(-1, 1)
    straight = ~(1 - cosine.square() > 1e-12)  # also true of NaN, the cosine of a zero vector
    angle = cosine.where(~straight, 0).acos()
    arc = torch.stack([((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()])
    line = torch.stack([torch.full_like(angle, 1 - t), torch.full_like(angle, t)])
    return line.where(straight, arc)


def multislerp(blocks: Blocks, weight: Sequence[float], normalize_weights: bool, eps: float, gram: Tensor) -> Tensor:
    """The normalised weighted mean of the directions uᵢ = xᵢ / (‖xᵢ‖ + ε), times the weighted mean norm Σ wᵢ ‖xᵢ‖.

    The method is told as a step in the tangent space at that mean; the step Σ wᵢ (uᵢ − (uᵢ·m) m) is 0 for m ∝ Σ wᵢ uᵢ.
    With a base the xᵢ are task vectors and the base is added.
    """
    if len(blocks.ingredients) == 1:
        return blocks.ingredients[0]
    weights = torch.tensor(normalised(weight) if normalize_weights else list(weight), dtype=torch.float64)
    norms = gram.diagonal().sqrt()
    mean = weights / (norms + eps)
    length = _length(mean, gram)
    # Opposite vectors cancel: there is no direction to go, and the weighted sum is taken.
    coefficients = mean / length * (norms * weights).sum() if length > eps else weights
    combined = weighted_sum(blocks.take_directions(), coefficients.tolist())
    return combined if blocks.base is None else combined.add_(blocks.base)


def karcher(blocks: Blocks, max_iter: int, tol: float, gram: Tensor) -> Tensor:
    """Karcher mean: the point of the sphere with the least sum of squared angles to the xᵢ / ‖xᵢ‖, times the mean norm.

    Fixed-point iteration: μ ← exp_μ(mean of log_μ(uᵢ)), from the normalised mean, until a step is shorter than ``tol``.
    """
    if len(blocks.ingredients) == 1:
        return blocks.ingredients[0]
    return weighted_sum(blocks.ingredients, _karcher_coefficients(gram, max_iter, tol).tolist())


def _karcher_coefficients(gram: Tensor, max_iter: int, tol: float) -> Tensor:
    norms = gram.diagonal().sqrt()
    used = norms > 0
    if not used.any():
        return torch.zeros_like(norms)
    share = used.double() / used.sum()
    per_unit = torch.where(used, 1 / norms, 0)
    first = torch.zeros_like(norms)
    first[used.nonzero()[0]] = per_unit[used][0]
    mean = share * per_unit
    length = _length(mean, gram)
    mean = first if length < tol else mean / length
    for _ in range(max_iter):
        dots = (per_unit * (gram @ mean)).clamp(-1, 1)
        angles = dots.acos()
        pull = torch.where(angles < tol, 0, share * angles / angles.sin())  # of uᵢ − (uᵢ·μ) μ
        tangent = pull * per_unit - (pull * dots).sum() * mean
        length = _length(tangent, gram)
        if not length >= tol:
            break
        mean = length.cos() * mean + length.sin() / length * tangent
        mean = mean / _length(mean, gram)
    return mean * norms.mean()


def _length(coefficients: Tensor, gram: Tensor) -> Tensor:
    """The norm of a combination of the ingredients."""
    return (coefficients @ gram @ coefficients).clamp(min=0).sqrt()

"""Every merge method once more: float64 formulas on whole numpy arrays, and settings to try each method with.

``ORACLES[name](models, base, **parameters)`` takes mergekit's parameter names; what is set per model is a list. Methods
that drop at random have no single right answer: ``patterns`` lists all that are possible at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch

import soupkit

Array = np.ndarray
Models = Sequence[Array]
State = dict[str, torch.Tensor]
Group = dict[str, Any]


def rows(x: Array) -> Array:
    """Slices along the first dimension, flattened; a 0-D or 1-D array is one row."""
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(len(x), -1)


def length(x: Array) -> float:
    return float(np.sqrt(np.sum(x * x)))


# Averages


def linear(models: Models, base: Array | None, *, weight: list[float], normalize: bool = True) -> Array:
    total = sum(w * x for w, x in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def passthrough(models: Models, base: Array | None, *, scale: list[float]) -> Array:
    (model,) = models
    return scale[0] * model


def fisher(models: Models, base: Array | None, *, fishers: Models, weight: list[float]) -> Array:
    shares = [w * f for w, f in zip(weight, fishers, strict=True)]
    total, divisor = sum(s * x for s, x in zip(shares, models, strict=True)), sum(shares)
    return np.where(divisor == 0, linear(models, None, weight=weight), total / np.where(divisor == 0, 1, divisor))


def ema(models: Models, base: Array | None, *, decay: float) -> Array:
    average = models[0]
    for model in models[1:]:
        average = decay * average + (1 - decay) * model
    return average


def lawa(models: Models, base: Array | None, *, last: int | None = None) -> Array:
    return np.mean(models if last is None else models[-last:], axis=0)


# Spheres


def arc(a: Array, b: Array, t: float, is_straight: Callable[[float], bool]) -> Array:
    """Great-circle interpolation of two whole arrays; the line where it is straight, or where a length is zero."""
    lengths = length(a) * length(b)
    cosine = float(np.clip(np.sum(a * b) / lengths, -1, 1)) if lengths else 1.0
    if is_straight(cosine):
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def slerp(models: Models, base: Array | None, *, t: float) -> Array:
    return arc(*models, t, lambda cosine: abs(cosine) > 0.9995)


def nuslerp(
    models: Models,
    base: Array | None,
    *,
    weight: list[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    origin = 0.0 if base is None else base
    a, b = (model - origin for model in models)
    if nuslerp_flatten or a.ndim == 0:
        return origin + arc(a, b, t, lambda cosine: 1 - cosine**2 <= 1e-12)
    axis = 0 if nuslerp_row_wise else -1
    a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    out = np.empty_like(a)
    for index in np.ndindex(a.shape[:-1]):
        out[index] = arc(a[index], b[index], t, lambda cosine: 1 - cosine**2 <= 1e-12)
    return origin + np.moveaxis(out, -1, axis)


def multislerp(
    models: Models, base: Array | None, *, weight: list[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Array:
    if len(models) == 1:
        return models[0]
    origin = 0.0 if base is None else base
    weights = np.array(weight) / (sum(weight) if normalize_weights else 1)
    vectors = [model - origin for model in models]
    lengths = [length(x) for x in vectors]
    units = [x / (norm + eps) for x, norm in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if length(mean) < eps:
        return origin + sum(w * x for w, x in zip(weights, vectors, strict=True))
    mean = mean / length(mean)
    tangent = sum(w * (u - np.sum(u * mean) * mean) for w, u in zip(weights, units, strict=True))
    step = length(tangent)
    direction = np.cos(step) * mean + np.sinc(step / np.pi) * tangent
    return origin + np.dot(weights, lengths) * direction


def karcher(models: Models, base: Array | None, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    lengths = [length(x) for x in models]
    units = [x / norm for x, norm in zip(models, lengths, strict=True) if norm > 0]
    if not units:
        return np.zeros_like(models[0])
    mean = sum(units) / length(sum(units))
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip(np.sum(mean * unit), -1, 1)
            angle = np.arccos(cosine)
            if angle >= tol:
                tangent = tangent + angle / np.sin(angle) * (unit - cosine * mean) / len(units)
        step = length(tangent)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean = mean / length(mean)
    return np.mean(lengths) * mean


# Task vectors. ``others`` can only be lambda, a word that Python keeps to itself.


def weighted_sum(deltas: Models, weight: list[float], normalize: bool) -> Array:
    return sum(w * d for w, d in zip(weight, deltas, strict=True)) / (sum(weight) if normalize else 1)


def elected(deltas: Models, weight: list[float], normalize: bool) -> Array:
    """TIES: sum (or mean) of what has the sign of the weighted sum; a sum of 0 counts as positive."""
    weights = np.reshape(weight, (-1,) + (1,) * np.ndim(deltas[0]))
    weighted = weights * np.stack(deltas)
    sign = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    total = np.where(agree, weighted, 0).sum(axis=0)
    if not normalize:
        return total
    divisor = np.where(agree, weights, 0).sum(axis=0)
    return total / np.where(divisor == 0, 1, divisor)


def order_statistic_limits(name: str, delta: Array, density: float, gamma: float = 0.01) -> tuple[float, float]:
    """Magnitudes from the first to the second of these are kept."""
    ordered = np.sort(np.abs(delta), axis=None)
    if density >= 1:
        return 0.0, np.inf
    if name == "ties":
        num_kept = max(1, int(density * delta.size)) if density > 0 else 0
        return (ordered[delta.size - num_kept], np.inf) if num_kept else (np.inf, np.inf)
    target, top = int(density * delta.size), int(gamma * delta.size)
    bottom = max(0, delta.size - target - top)
    return (ordered[bottom], ordered[bottom + target - 1]) if target else (np.inf, np.inf)


def sparse(name: str, delta: Array, rescale: bool, *limits: float) -> Array:
    """A task vector's kept part; with ``rescale``, brought back to the length (L1) it had."""
    low, high = order_statistic_limits(name, delta, *limits)
    kept = np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0)
    left = np.abs(kept).sum()
    return kept * (np.abs(delta).sum() / left) if rescale and left else kept


def task_arithmetic(
    models: Models, base: Array, *, weight: list[float], normalize: bool = False, **others: Any
) -> Array:
    return base + others.get("lambda", 1.0) * weighted_sum([model - base for model in models], weight, normalize)


def ties(
    models: Models,
    base: Array,
    *,
    weight: list[float],
    density: list[float],
    normalize: bool = True,
    rescale: bool = False,
    **others: Any,
) -> Array:
    deltas = [sparse("ties", model - base, rescale, d) for model, d in zip(models, density, strict=True)]
    return base + others.get("lambda", 1.0) * elected(deltas, weight, normalize)


def _breadcrumbs(
    combine: Callable[[Models, list[float], bool], Array],
    models: Models,
    base: Array,
    *,
    weight: list[float],
    density: list[float],
    gamma: list[float],
    normalize: bool = False,
    rescale: bool = False,
    **others: Any,
) -> Array:
    limits = zip(density, gamma, strict=True)
    deltas = [sparse("breadcrumbs", x - base, rescale, *limit) for x, limit in zip(models, limits, strict=True)]
    return base + others.get("lambda", 1.0) * combine(deltas, weight, normalize)


def breadcrumbs(models: Models, base: Array, **parameters: Any) -> Array:
    return _breadcrumbs(weighted_sum, models, base, **parameters)


def breadcrumbs_ties(models: Models, base: Array, **parameters: Any) -> Array:
    return _breadcrumbs(elected, models, base, **parameters)


def sce_limit(deltas: Array, select_topk: float) -> float:
    """Positions whose variance over the models reaches this are kept."""
    variance = deltas.var(axis=0)
    num_kept = int(np.count_nonzero(variance) * select_topk)
    if select_topk >= 1:
        return 0.0
    return float(np.sort(variance, axis=None)[variance.size - num_kept]) if num_kept else np.inf


def sce(models: Models, base: Array, *, select_topk: float = 1.0) -> Array:
    deltas = np.stack([model - base for model in models])
    kept = np.where(deltas.var(axis=0) >= sce_limit(deltas, select_topk), deltas, 0)
    energies = [float(np.mean(delta * delta)) for delta in kept]
    weight = [e / sum(energies) if any(energies) else 1 / len(models) for e in energies]
    weights = np.reshape(weight, (-1,) + (1,) * base.ndim)
    agree = np.sign(kept) == np.where(kept.sum(axis=0) >= 0, 1, -1)
    total, divisor = np.where(agree, weights * kept, 0).sum(axis=0), np.where(agree, weights, 0).sum(axis=0)
    return base + np.where(divisor == 0, 0, total / np.where(divisor == 0, 1, divisor))


def model_stock(models: Models, base: Array, *, filter_wise: bool = False) -> Array:
    shape, count = base.shape, len(models)
    if filter_wise:
        base, models = rows(base), [rows(model) for model in models]
    else:
        base, models = base.reshape(1, -1), [model.reshape(1, -1) for model in models]
    out = np.empty_like(base)
    for row, origin in enumerate(base):
        deltas = [model[row] - origin for model in models]
        cosines = []
        for i in range(count):
            for j in range(i):
                lengths = length(deltas[i]) * length(deltas[j])
                cosines.append(float(np.sum(deltas[i] * deltas[j])) / lengths if lengths else 0.0)
        cosine = sum(cosines) / len(cosines)
        divisor = 1 + (count - 1) * cosine
        t = float(np.clip(count * cosine / divisor, 0, 1)) if divisor > 1e-12 else 0.0
        out[row] = t * sum(model[row] for model in models) / count + (1 - t) * origin
    return out.reshape(shape)


def nearswap(models: Models, base: Array, *, t: float) -> Array:
    (model,) = models
    distance = np.abs(base - model)
    weight = np.where(distance > t, t / np.where(distance > t, distance, 1), 1)
    return (1 - weight) * base + weight * model


def fusion_importance(models: Models, base: Array) -> tuple[Array, float]:
    """arcee_fusion's importance of every position, and the threshold from which a change is kept."""
    (model,) = models
    importance = np.abs(rows(model) - rows(base))
    for row, (x, y) in enumerate(zip(rows(model), rows(base), strict=True)):
        p, q = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() + 1e-8 for v in (x, y))
        importance[row] *= np.sum(p * np.log(p / q))
    ordered = np.sort(importance, axis=None)
    first, median, third = (float(ordered[int(q * (ordered.size - 1))]) for q in (0.25, 0.5, 0.75))
    return importance.reshape(base.shape), median + 1.5 * (third - first)


def arcee_fusion(models: Models, base: Array) -> Array:
    importance, threshold = fusion_importance(models, base)
    return np.where(importance >= threshold, models[0], base)


ORACLES: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        linear, slerp, nuslerp, multislerp, karcher, task_arithmetic, ties, breadcrumbs, breadcrumbs_ties, sce,
        model_stock, nearswap, arcee_fusion, passthrough, fisher, ema, lawa,
    )
}  # fmt: skip


# Random dropping

DROPPING = ("dare_linear", "dare_ties", "della", "della_linear")


def rank_shares(delta: Array) -> Array:
    """Ranks by magnitude, from 0 for the smallest to 1; magnitudes with the same first six bits share their mean."""
    significands, exponents = np.frexp(np.abs(delta).astype(np.float32))
    coarse = np.ldexp(np.floor(64 * significands), exponents)
    ordered = np.sort(coarse)
    ranks = (np.searchsorted(ordered, coarse, "left") + np.searchsorted(ordered, coarse, "right") - 1) / 2
    return ranks / (delta.size - 1) if delta.size > 1 else np.full(delta.shape, 0.5)


def keep_probabilities(name: str, models: Models, base: Array, **parameters: Any) -> Array:
    """Probability that a position of a task vector is kept: [models, *shape]."""
    probabilities = []
    for i, model in enumerate(models):
        density = parameters["density"][i]
        if density >= 1:
            p = np.ones(base.shape)
        elif name.startswith("dare"):
            p = np.full(base.shape, round(density * 65536) / 65536)
        else:
            shares = np.stack([rank_shares(row) for row in rows(model - base)]).reshape(base.shape)
            epsilon = parameters["epsilon"][i]
            p = np.round((density - epsilon + 2 * epsilon * shares) * 65536) / 65536
        probabilities.append(p)
    return np.stack(probabilities)


def patterns(name: str, models: Models, base: Array, **parameters: Any) -> Array:
    """What the result can be at each position: [2^models, *shape]. The bits of the index say which models are kept."""
    probabilities = keep_probabilities(name, models, base, **parameters)
    normalize, lambda_ = parameters.get("normalize", name == "della"), parameters.get("lambda", 1.0)
    scales = probabilities if parameters.get("rescale", True) else np.ones_like(probabilities)
    combine = elected if name in ("dare_ties", "della") else weighted_sum
    possible = []
    for bits in product((0, 1), repeat=len(models)):
        kept = [(x - base) / np.where(scale > 0, scale, 1) for x, scale in zip(models, scales, strict=True)]
        deltas = [bit * delta for bit, delta in zip(bits, kept, strict=True)]
        chance = np.prod([p if bit else 1 - p for bit, p in zip(bits, probabilities, strict=True)], axis=0)
        possible.append(np.where(chance > 0, base + lambda_ * combine(deltas, parameters["weight"], normalize), np.inf))
    return np.stack(possible)


def nearest(result: Array, possible: Array) -> tuple[Array, Array]:
    """The pattern nearest to the result at each position, as bits [models, *shape] and as its value."""
    index = np.abs(possible - result).argmin(axis=0)
    num_models = len(possible).bit_length() - 1
    bits = np.stack([(index >> (num_models - 1 - i)) & 1 for i in range(num_models)])
    return bits, np.take_along_axis(possible, index[None], axis=0)[0]


# Close calls


def close_calls(name: str, models: Models, base: Array | None, **parameters: Any) -> Array:
    """Positions where a threshold or a vote is decided by so little that a narrower precision may decide otherwise."""
    close = np.zeros(models[0].shape, dtype=bool)
    if name == "arcee_fusion":
        importance, threshold = fusion_importance(models, base)
        return np.abs(importance - threshold) <= 1e-6 * threshold
    if name not in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce"):
        return close
    deltas = np.stack([model - base for model in models])
    if name == "sce":
        limit, variance = sce_limit(deltas, parameters.get("select_topk", 1.0)), deltas.var(axis=0)
        return is_close(variance, limit) | is_close_vote(np.where(variance >= limit, deltas, 0))
    weighted = []
    for i, delta in enumerate(deltas):
        settings = [parameters[key][i] for key in ("density", "gamma") if key in parameters]
        for limit in order_statistic_limits(name.split("_")[0], delta, *settings):
            close |= is_close(np.abs(delta), limit)
        weighted.append(parameters["weight"][i] * sparse(name.split("_")[0], delta, False, *settings))
    return close if name == "breadcrumbs" else close | is_close_vote(np.stack(weighted))


def is_close(values: Array, limit: float) -> Array:
    return np.abs(values - limit) <= 1e-6 * limit if 0 < limit < np.inf else np.zeros(values.shape, dtype=bool)


def is_close_vote(weighted: Array) -> Array:
    return np.abs(weighted.sum(axis=0)) < 1e-6 * np.abs(weighted).sum(axis=0)


# Settings


@dataclass(frozen=True)
class Setting:
    """How to call a method: how many models, with what beside them, and its parameters (lists: one value per model)."""

    num_models: int = 3
    base: bool = False
    fishers: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _settings(num_models: int, base: bool, *variants: Mapping[str, Any]) -> list[Setting]:
    return [Setting(num_models, base, parameters=variant) for variant in variants]


_THREE = {"weight": [0.5, 0.3, 0.2], "density": [0.5, 0.3, 0.8]}
_TWO = {"weight": [1.0, -0.4], "density": [0.35, 0.6]}
_ALL_SET = {"lambda": 0.7, "normalize": True}
_SUMMED = {"lambda": 1.3, "normalize": False}
_GAMMA = {"gamma": [0.1, 0.01, 0.05]}
_EPSILON = {"epsilon": [0.15, 0.05, 0.1]}

# The first of each method is its typical use.
SETTINGS: dict[str, list[Setting]] = {
    "linear": [
        *_settings(3, False, {"weight": [0.5, 0.3, 0.2]}, {"weight": [2.0, -0.5, 1.0]}),
        *_settings(3, False, {"weight": [1.0, 2.0, 3.0], "normalize": False}, {"weight": [1.0, 1.0, 1.0]}),
    ],
    "slerp": _settings(2, False, {"t": 0.3}, {"t": 0.5}, {"t": 1.2}),
    "nuslerp": [
        *_settings(2, False, {"weight": [0.7, 0.3]}, {"weight": [1.0, 1.0], "nuslerp_flatten": False}),
        *_settings(2, False, {"weight": [1.0, -1.0]}),
        *_settings(2, True, {"weight": [1.0, 3.0]}, {"weight": [2.0, 1.0], "nuslerp_flatten": False}),
        *_settings(2, True, {"weight": [2.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
    "multislerp": [
        *_settings(3, False, {"weight": [0.5, 0.3, 0.1]}, {"weight": [1.0, 2.0, 4.0], "normalize_weights": False}),
        *_settings(3, True, {"weight": [1.0, 1.0, 1.5]}, {"weight": [0.5, 0.3, 0.1], "eps": 1e-3}),
        *_settings(2, True, {"weight": [0.6, 0.3]}),
    ],
    "karcher": [*_settings(3, False, {}, {"max_iter": 1}, {"tol": 0.05}), *_settings(2, False, {}), Setting(5)],
    "task_arithmetic": [
        *_settings(3, True, {"weight": [0.5, 0.3, 0.2]}, {"weight": [1.0, 0.5, -0.25]} | _ALL_SET),
        *_settings(1, True, {"weight": [0.6], "lambda": 1.5}),
    ],
    "ties": [
        *_settings(3, True, _THREE, _THREE | _SUMMED | {"rescale": True}, _THREE | {"density": [1.0, 0.0, 0.001]}),
        *_settings(2, True, _TWO | _ALL_SET),
    ],
    "dare_linear": [
        *_settings(3, True, _THREE, _THREE | _ALL_SET, _THREE | {"rescale": False}),
        *_settings(2, True, _TWO | {"seed": 7, "lambda": 0.5}),
    ],
    "dare_ties": [
        *_settings(3, True, _THREE, _THREE | _ALL_SET, _THREE | {"rescale": False}),
        *_settings(2, True, _TWO | {"seed": 7, "lambda": 0.5}),
    ],
    "della": [
        *_settings(3, True, _THREE | _EPSILON, _THREE | _EPSILON | _SUMMED, _THREE | _EPSILON | {"rescale": False}),
        *_settings(2, True, _TWO | {"epsilon": [0.2, 0.1], "seed": 7, "lambda": 0.5}),
    ],
    "della_linear": [
        *_settings(3, True, _THREE | _EPSILON, _THREE | _EPSILON | _ALL_SET, _THREE | _EPSILON | {"rescale": False}),
        *_settings(2, True, _TWO | {"epsilon": [0.2, 0.1], "seed": 7, "lambda": 0.5}),
    ],
    "breadcrumbs": [
        *_settings(3, True, _THREE | _GAMMA, _THREE | _GAMMA | _ALL_SET | {"rescale": True}),
        *_settings(3, True, _THREE | {"density": [0.9, 0.95, 1.0], "gamma": [0.2, 0.3, 0.1]}),
    ],
    "breadcrumbs_ties": [
        *_settings(3, True, _THREE | _GAMMA, _THREE | _GAMMA | _ALL_SET | {"rescale": True}),
        *_settings(3, True, _THREE | {"density": [0.9, 0.95, 1.0], "gamma": [0.2, 0.3, 0.1]}),
    ],
    "sce": _settings(3, True, {"select_topk": 0.4}, {}, {"select_topk": 0.0}, {"select_topk": 0.9}),
    "model_stock": [*_settings(3, True, {}, {"filter_wise": True}), *_settings(2, True, {}, {"filter_wise": True})],
    "nearswap": _settings(1, True, {"t": 0.05}, {"t": 0.0}, {"t": 0.3}),
    "arcee_fusion": _settings(1, True, {}),
    "passthrough": _settings(1, False, {"scale": [0.7]}, {"scale": [1.0]}, {"scale": [-2.0]}),
    "fisher": [
        Setting(3, fishers=True, parameters={"weight": [0.5, 0.3, 0.2]}),
        Setting(2, fishers=True, parameters={"weight": [1.0, 1.0]}),
    ],
    "ema": [*_settings(3, False, {"decay": 0.7}, {"decay": 0.1}), *_settings(1, False, {"decay": 0.5})],
    "lawa": _settings(4, False, {}, {"last": 3}, {"last": 1}),
}  # fmt: skip


def merge(
    name: str,
    models: Sequence[Any],
    base: Any = None,
    fishers: Sequence[Any] = (),
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """soupkit.merge with the parameters of a Setting."""
    parameters = parameters or {}
    per_model = {key: value for key, value in parameters.items() if isinstance(value, list)}
    recipe = soupkit.Recipe(
        name,
        list(models),
        base=base,
        parameters={key: value for key, value in parameters.items() if key not in per_model},
        model_parameters=[{key: value[i] for key, value in per_model.items()} for i in range(len(models))],
        fishers=list(fishers),
    )
    return soupkit.merge(recipe, **{"progress": False} | options)


def make_arrays(
    setting: Setting, shape: tuple[int, ...], seed: int = 0
) -> tuple[list[Array], Array | None, list[Array]]:
    """Models, base and Fisher information of a setting: relatives with a common drift, away from zero."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=shape)
    origin = np.asarray(np.where(noise < 0, noise - 1, noise + 1))
    drift = origin + 0.2 * generator.normal(size=shape)
    models = [np.asarray(drift + 0.25 * generator.normal(size=shape)) for _ in range(setting.num_models)]
    fishers = [np.asarray(generator.exponential(size=shape)) for _ in range(setting.num_models)]
    return models, origin if setting.base else None, fishers if setting.fishers else []


def to_tensors(*groups: Any, dtype: torch.dtype = torch.float64) -> list[Any]:
    """The same with tensors for arrays."""

    def convert(group: Any) -> Any:
        return None if group is None else torch.from_numpy(group).to(dtype)

    return [[convert(x) for x in group] if isinstance(group, list) else convert(group) for group in groups]


def make_tensors(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Group:
    """The arguments of merge for one tensor."""
    models, base, fishers = to_tensors(*make_arrays(setting, shape, seed), dtype=dtype)
    return {"models": models, "base": base, "fishers": fishers, "parameters": setting.parameters}


def make_states(setting: Setting, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Group:
    """The arguments of merge for state dicts."""
    groups = {name: make_tensors(setting, shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}

    def states(key: str) -> list[State]:
        count = len(next(iter(groups.values()))[key])
        return [{name: group[key][i] for name, group in groups.items()} for i in range(count)]

    base = {name: group["base"] for name, group in groups.items()} if setting.base else None
    return {"models": states("models"), "base": base, "fishers": states("fishers"), "parameters": setting.parameters}


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of its elements."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

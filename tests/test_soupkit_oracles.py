"""Every merge method against hand-worked numbers and independent float64 formulas; random dropping against chance."""

from __future__ import annotations

from math import cos, log, pi, sin, sqrt

import numpy as np
import pytest
import torch
from oracles import (
    DROPPING,
    ORACLES,
    SETTINGS,
    Setting,
    close_calls,
    keep_probabilities,
    make_arrays,
    merge,
    nearest,
    patterns,
    rank_shares,
    to_tensors,
)

from soupkit import METHODS

SHAPES = [(), (1,), (7,), (5, 3), (2, 3, 4)]
ALL_SETTINGS = [pytest.param(name, s, id=f"{name}-{i}") for name, row in SETTINGS.items() for i, s in enumerate(row)]


def test_every_method_has_an_oracle():
    assert {*ORACLES, *DROPPING} == set(SETTINGS) == set(METHODS)


# Numbers small enough to check on paper

R2 = sqrt(0.5)
TRIO = [[1.0, -2.0], [3.0, 4.0], [8.0, 1.0]]
# With density 0.5 the largest two of each survive: [4, ., ., -3], [., 5, ., -6], [., -7, 8, .].
TASKS = [[4.0, -1.0, 2.0, -3.0], [-2.0, 5.0, 1.0, -6.0], [-1.0, -7.0, 8.0, 2.0]]
ZEROS = [0.0] * 4
EVEN = {"weight": [1.0, 1.0, 1.0]}
HALF = EVEN | {"density": [0.5] * 3}
FIVE = {"weight": [1.0], "density": [0.4], "gamma": [0.2]}

BY_HAND = {
    "linear": ("linear", TRIO, None, {"weight": [2.0, 1.0, 1.0]}, [3.25, 0.25]),
    "linear, unnormalised": ("linear", TRIO, None, {"weight": [2.0, 1.0, 1.0], "normalize": False}, [13.0, 1.0]),
    "linear, negative weight": ("linear", TRIO, None, {"weight": [2.0, -1.0, 0.0]}, [-1.0, -8.0]),
    # 60 degrees apart: half-way takes sin 30° / sin 60° = 1/√3 of each.
    "slerp": ("slerp", [[2.0, 0.0], [2.0, 2 * sqrt(3)]], None, {"t": 0.5}, [4 / sqrt(3), 2.0]),
    "slerp, antipodal": ("slerp", [[1.0, 2.0], [-1.0, -2.0]], None, {"t": 0.25}, [0.5, 1.0]),
    "slerp, zero": ("slerp", [[0.0, 0.0], [4.0, 8.0]], None, {"t": 0.25}, [1.0, 2.0]),
    # cos 0.9997: the chord, whose middle is 1.00007 times nearer to 0 than the arc's.
    "slerp, close": (
        "slerp", [[1.0, 0.0], [0.9997, sqrt(1 - 0.9997**2)]], None, {"t": 0.5}, [0.99985, sqrt(1 - 0.9997**2) / 2],
    ),
    "nuslerp": ("nuslerp", [[1.0, 0.0], [0.0, 1.0]], None, {"weight": [3.0, 3.0]}, [R2, R2]),
    # Task vectors [1, 0] and [0, 2], t = 2/3: sin 30° of the one and sin 60° of the other.
    "nuslerp, base": ("nuslerp", [[2.0, 1.0], [1.0, 3.0]], [1.0, 1.0], {"weight": [1.0, 2.0]}, [1.5, 1 + sqrt(3)]),
    "nuslerp, weights that cancel": ("nuslerp", [[1.0, 0.0], [0.0, 1.0]], None, {"weight": [1.0, -1.0]}, [R2, R2]),
    # The first pair is orthogonal, the second parallel; row-wise means along the other dimension.
    "nuslerp, each vector": (
        "nuslerp", [[[1.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [6.0, 0.0]]], None,
        {"weight": [1.0, 1.0], "nuslerp_flatten": False}, [[R2, R2], [4.5, 0.0]],
    ),
    "nuslerp, row-wise": (
        "nuslerp", [[[1.0, 3.0], [0.0, 0.0]], [[0.0, 6.0], [1.0, 0.0]]], None,
        {"weight": [1.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}, [[R2, 4.5], [R2, 0.0]],
    ),
    # The tangents at the normalised mean of the directions cancel, whatever the weights: that mean times the mean norm.
    "multislerp": ("multislerp", [[2.0, 0.0], [0.0, 4.0]], None, {"weight": [1.0, 1.0]}, [3 * R2, 3 * R2]),
    "multislerp, weights": (
        "multislerp", [[2.0, 0.0], [0.0, 4.0]], None, {"weight": [3.0, 1.0]}, [7.5 / sqrt(10), 2.5 / sqrt(10)],
    ),
    "multislerp, unnormalised": (
        "multislerp", [[2.0, 0.0], [0.0, 4.0]], None, {"weight": [3.0, 1.0], "normalize_weights": False},
        [30 / sqrt(10), 10 / sqrt(10)],
    ),
    "multislerp, base": (
        "multislerp", [[3.0, 1.0], [1.0, 5.0]], [1.0, 1.0], {"weight": [1.0, 1.0]}, [1 + 3 * R2, 1 + 3 * R2],
    ),
    # Where the weighted directions cancel, the weighted sum itself.
    "multislerp, opposites": ("multislerp", [[2.0, 0.0], [-4.0, 0.0]], None, {"weight": [1.0, 1.0]}, [-1.0, 0.0]),
    "multislerp, none left": (
        "multislerp", [[2.0, 0.0], [-1.0, sqrt(3)], [-3.0, -3 * sqrt(3)]], None, {"weight": [1.0, 1.0, 1.0]},
        [-2 / 3, -2 / sqrt(3)],
    ),
    "multislerp, one": ("multislerp", [[2.0, -3.0]], None, {"weight": [0.5]}, [2.0, -3.0]),
    # On a circle the mean direction is the mean angle: 0°, 30° and 90° give 40°; lengths 1, 2 and 3 give 2.
    "karcher": (
        "karcher", [[1.0, 0.0], [sqrt(3), 1.0], [0.0, 3.0]], None, {"max_iter": 100, "tol": 1e-12},
        [2 * cos(2 * pi / 9), 2 * sin(2 * pi / 9)],
    ),
    "karcher, two": ("karcher", [[2.0, 0.0], [0.0, 4.0]], None, {}, [3 * R2, 3 * R2]),
    "karcher, a zero": ("karcher", [[2.0, 0.0], [0.0, 0.0]], None, {}, [1.0, 0.0]),
    "task_arithmetic": (
        "task_arithmetic", [[2.0, 1.0, -1.0], [4.0, 3.0, 3.0]], [1.0, 1.0, 1.0], {"weight": [0.5, 1.0], "lambda": 2.0},
        [8.0, 5.0, 3.0],
    ),
    "task_arithmetic, normalised": (
        "task_arithmetic", [[2.0, 1.0, -1.0], [4.0, 3.0, 3.0]], [1.0, 1.0, 1.0],
        {"weight": [0.5, 1.0], "normalize": True}, [1 + 7 / 3, 1 + 4 / 3, 1 + 2 / 3],
    ),
    # Sums 4, -2, 8, -9. Against them: 5 in the second column.
    "ties": ("ties", TASKS, ZEROS, HALF, [4.0, -7.0, 8.0, -4.5]),
    "ties, lambda": ("ties", TASKS, ZEROS, HALF | {"lambda": 0.5}, [2.0, -3.5, 4.0, -2.25]),
    "ties, summed": ("ties", TASKS, ZEROS, HALF | {"normalize": False}, [4.0, -7.0, 8.0, -9.0]),
    # Weighted sums 8, 3, 8, -18: the second column's sign turns.
    "ties, weights": ("ties", TASKS, ZEROS, HALF | {"weight": [2.0, 2.0, 1.0]}, [4.0, 5.0, 8.0, -4.5]),
    # L1 norms 10, 14, 18 of which 7, 11, 15 are kept.
    "ties, rescaled": (
        "ties", TASKS, ZEROS, HALF | {"rescale": True}, [40 / 7, -8.4, 9.6, (-30 / 7 - 84 / 11) / 2],
    ),
    # Weighted 1, -2: the second alone, -2 / -0.5; 2, 1.5: both, 3.5 / 0.5; 3, -0.5: the first alone.
    "ties, a negative weight": (
        "ties", [[1.0, 2.0, 3.0], [4.0, -3.0, 1.0]], [0.0] * 3, {"weight": [1.0, -0.5], "density": [1.0] * 2},
        [4.0, 7.0, 3.0],
    ),
    "ties, weights that cancel": (
        "ties", [[2.0, 2.0], [3.0, -3.0]], [0.0] * 2, {"weight": [1.0, -1.0], "density": [1.0] * 2}, [3.0, 5.0],
    ),
    "ties, all kept": ("ties", TASKS, ZEROS, EVEN | {"density": [1.0] * 3}, [4.0, -4.0, 11 / 3, -4.5]),
    "ties, none kept": ("ties", TASKS, [1.0, 2.0, 3.0, 4.0], EVEN | {"density": [0.0] * 3}, [1.0, 2.0, 3.0, 4.0]),
    "ties, at least one": ("ties", TASKS, ZEROS, EVEN | {"density": [0.01] * 3}, [4.0, 0.0, 8.0, -6.0]),
    # |-2| ties with 2 at the threshold: both stay. The sum of 0 counts as positive.
    "ties, ties": (
        "ties", [[3.0, 2.0, -2.0, 1.0], [-3.0, 0.0, 0.0, 0.0]], ZEROS, {"weight": [1.0, 1.0], "density": [0.5, 0.5]},
        [3.0, 2.0, -2.0, 0.0],
    ),
    "dare_linear, all kept": ("dare_linear", TASKS, ZEROS, EVEN | {"density": [1.0] * 3}, [1.0, -3.0, 11.0, -7.0]),
    "dare_ties, all kept": ("dare_ties", TASKS, ZEROS, EVEN | {"density": [1.0] * 3}, [4.0, -8.0, 11.0, -9.0]),
    "della, all kept": ("della", TASKS, ZEROS, EVEN | {"density": [1.0] * 3}, [4.0, -4.0, 11 / 3, -4.5]),
    "della_linear, all kept": ("della_linear", TASKS, ZEROS, EVEN | {"density": [1.0] * 3}, [1.0, -3.0, 11.0, -7.0]),
    "dare_linear, none kept": ("dare_linear", TASKS, [5.0] * 4, EVEN | {"density": [0.0] * 3}, [5.0] * 4),
    "dare_ties, none kept": ("dare_ties", TASKS, [5.0] * 4, EVEN | {"density": [0.0] * 3}, [5.0] * 4),
    # Of magnitudes 1 to 5, one is cut as too large and two as too small.
    "breadcrumbs": ("breadcrumbs", [[5.0, -1.0, 3.0, -4.0, 2.0]], [0.0] * 5, FIVE, [0.0, 0.0, 3.0, -4.0, 0.0]),
    "breadcrumbs, rescaled": (
        "breadcrumbs", [[5.0, -1.0, 3.0, -4.0, 2.0]], [0.0] * 5, FIVE | {"rescale": True},
        [0.0, 0.0, 45 / 7, -60 / 7, 0.0],
    ),
    # Density comes first: of the two that gamma would cut, one stays.
    "breadcrumbs, much gamma": (
        "breadcrumbs", [[5.0, -1.0, 3.0, -4.0, 2.0]], [0.0] * 5, FIVE | {"density": [0.8], "gamma": [0.4]},
        [0.0, -1.0, 3.0, -4.0, 2.0],
    ),
    # Equal magnitudes at either end stay together.
    "breadcrumbs, ties": (
        "breadcrumbs", [[4.0, -4.0, 3.0, 1.0, -1.0]], [0.0] * 5, FIVE, [4.0, -4.0, 3.0, 0.0, 0.0],
    ),
    "breadcrumbs, two": (
        "breadcrumbs", [[5.0, -1.0, 3.0, -4.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]], [0.0] * 5,
        {"weight": [1.0, 2.0], "density": [0.4, 0.4], "gamma": [0.2, 0.2], "lambda": 0.5}, [0.0, 4.0, 4.5, -2.0, 0.0],
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", [[5.0, -1.0, 3.0, -4.0, 2.0], [5.0, 4.0, -3.5, 2.0, 1.0]], [0.0] * 5,
        {"weight": [1.0, 2.0], "density": [0.4, 0.4], "gamma": [0.2, 0.2], "normalize": True},
        [0.0, 4.0, -3.5, -4.0, 0.0],
    ),
    # Variances 1, 0, 4; all kept, energies equal: means of those with the sign of the sums 4, 4, -2.
    "sce": ("sce", [[1.0, 2.0, -3.0], [3.0, 2.0, 1.0]], [0.0] * 3, {}, [2.0, 2.0, -3.0]),
    # Half of the two that vary is one: the third. Weights 0.9 and 0.1.
    "sce, selected": (
        "sce", [[1.0, 2.0, -3.0, 5.0], [3.0, 2.0, 1.0, 5.0]], ZEROS, {"select_topk": 0.5}, [0.0, 0.0, -3.0, 0.0],
    ),
    # Energies 4 and 36: weights 0.1 and 0.9 for 2 and 6.
    "sce, weights": ("sce", [[3.0, -1.0], [7.0, -5.0]], [1.0, 1.0], {}, [6.6, -4.6]),
    # cos 45°: t = 2 cos / (1 + cos) = 2√2 - 2.
    "model_stock": (
        "model_stock", [[2.0, 1.0], [2.0, 2.0]], [1.0, 1.0], {}, [2 * sqrt(2) - 1, sqrt(2)],
    ),
    # 30°, 60° and 90° apart: mean cos (√3/2 + 1/2) / 3.
    "model_stock, three": (
        "model_stock", [[3.0, 0.0], [sqrt(3), 1.0], [0.0, 1.0]], [0.0, 0.0], {},
        [t * x for t in [(sqrt(3) + 1) / 2 / (1 + (sqrt(3) + 1) / 3)] for x in (1 + sqrt(3) / 3, 2 / 3)],
    ),
    "model_stock, obtuse": ("model_stock", [[2.0, 1.0], [0.0, 2.0]], [1.0, 1.0], {}, [1.0, 1.0]),
    "model_stock, opposite": ("model_stock", [[2.0, 1.0], [0.0, 1.0]], [1.0, 1.0], {}, [1.0, 1.0]),
    "model_stock, rows": (
        "model_stock", [[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]], [[0.0, 0.0], [0.0, 0.0]],
        {"filter_wise": True}, [[0.0, 0.0], [2.0, 0.0]],
    ),
    "nearswap": ("nearswap", [[0.5, 1.0, 4.0, -6.0]], [0.0, 1.0, 2.0, 2.0], {"t": 1.0}, [0.5, 1.0, 3.0, 1.0]),
    "nearswap, t = 0": ("nearswap", [[0.5, 1.0, 4.0]], [0.0, 1.0, 2.0], {"t": 0.0}, [0.0, 1.0, 2.0]),
    # One row: importance is proportional to 1, 2, 3, 4, 5, 20. The order statistics floor(5 q) are 2, 3, 4, so what
    # reaches 3 + 1.5 · 2 = 6 is kept (interpolated ones would be 2.25, 3.5, 4.75).
    "arcee_fusion": (
        "arcee_fusion", [[4.0, -1.0, 20.0, 2.0, 3.0, -5.0]], [0.0] * 6, {}, [0.0, 0.0, 20.0, 0.0, 0.0, 0.0],
    ),
    "arcee_fusion, at the threshold": (
        "arcee_fusion", [[4.0, -1.0, 6.0, 2.0, 3.0, -5.0]], [0.0] * 6, {}, [0.0, 0.0, 6.0, 0.0, 0.0, 0.0],
    ),
    "arcee_fusion, below the threshold": (
        "arcee_fusion", [[4.0, -1.0, 5.9, 2.0, 3.0, -5.0]], [0.0] * 6, {}, [0.0] * 6,
    ),
    "passthrough": ("passthrough", [[2.0, -4.0]], None, {"scale": [0.5]}, [1.0, -2.0]),
    "fisher": (
        "fisher", [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], None,
        {"weight": [2.0, 1.0], "fishers": [[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]]}, [2.2, 3.0, 5 / 3],
    ),
    "ema": ("ema", [[8.0], [4.0], [2.0]], None, {"decay": 0.5}, [4.0]),
    "ema, slow": ("ema", [[8.0], [4.0]], None, {"decay": 0.75}, [7.0]),
    "lawa": ("lawa", [[8.0], [4.0], [2.0]], None, {"last": 2}, [3.0]),
    "lawa, all": ("lawa", [[8.0], [4.0], [3.0]], None, {}, [5.0]),
}  # fmt: skip


def arrays_by_hand(case: str) -> tuple[str, list, np.ndarray | None, list, dict, np.ndarray]:
    name, models, base, parameters, expected = BY_HAND[case]
    origin = None if base is None else np.array(base)
    fishers = [np.array(f) for f in parameters.get("fishers", [])]
    settings = {key: value for key, value in parameters.items() if key != "fishers"}
    return name, [np.array(x) for x in models], origin, fishers, settings, np.array(expected)


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    name, models, base, fishers, parameters, expected = arrays_by_hand(case)
    result = merge(name, *to_tensors(models, base, fishers), parameters)
    # Six digits: some hand-worked numbers leave out the eps of mergekit's formula.
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [case for case, row in BY_HAND.items() if row[0] in ORACLES])
def test_oracles_by_hand(case):
    name, models, base, fishers, parameters, expected = arrays_by_hand(case)
    extra = {"fishers": fishers} if fishers else {}
    np.testing.assert_allclose(ORACLES[name](models, base, **parameters, **extra), expected, rtol=1e-6, atol=1e-7)


def test_every_method_is_worked_by_hand():
    assert {row[0] for row in BY_HAND.values()} == set(METHODS)


def test_arcee_fusion_weighs_rows_by_their_divergence():
    # The first row's softmax goes from (1/2, 1/2) to (3/4, 1/4); the others do not move, as a shift changes no softmax.
    base = torch.zeros(2, 2, dtype=torch.float64)
    model = torch.tensor([[log(3), 0.0], [9.0, 9.0]], dtype=torch.float64)
    # Importances 0.144, 0, 0, 0 sort to thresholds 0: everything is kept. In eight rows of distinct changes it is not.
    assert torch.equal(merge("arcee_fusion", [model], base), model)
    base = torch.zeros(8, 2, dtype=torch.float64)
    model = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64)
    model[3] += 50.0  # far, but its softmax is what it was without
    expected = ORACLES["arcee_fusion"]([model.numpy()], base.numpy())
    result = merge("arcee_fusion", [model], base).numpy()
    np.testing.assert_array_equal(result, expected)
    assert 0 < np.count_nonzero(result) < result.size


def test_nuslerp_follows_even_a_short_arc():
    # 3e-4 apart: the middle of the chord is 1.1e-8 shorter than that of the arc.
    a, b = ([cos(angle), sin(angle)] for angle in (0.0, 3e-4))
    result = merge("nuslerp", *to_tensors([np.array(a), np.array(b)]), parameters={"weight": [1.0, 1.0]})
    np.testing.assert_allclose(result.numpy(), [cos(1.5e-4), sin(1.5e-4)], rtol=1e-12)


# Float64 in, float64 out


def expected_result(name: str, setting: Setting, models: list, base: np.ndarray | None, fishers: list) -> np.ndarray:
    extra = {"fishers": fishers} if fishers else {}
    return np.asarray(ORACLES[name](models, base, **setting.parameters, **extra))


def assert_agrees(name: str, setting: Setting, shape: tuple[int, ...]) -> None:
    models, base, fishers = make_arrays(setting, shape, seed=len(shape))
    result = merge(name, *to_tensors(models, base, fishers), setting.parameters)
    assert result.dtype == torch.float64
    assert result.shape == shape
    if name in DROPPING:
        _, expected = nearest(result.numpy(), patterns(name, models, base, **setting.parameters))
    else:
        expected = expected_result(name, setting, models, base, fishers)
    # Which multiple of 2⁻¹⁶ is nearest to a keep probability of della can be a close call, and shows in 1/p.
    tolerance = 1e-4 if name.startswith("della") else 1e-12
    scale = tolerance * max(np.abs(x).max() for x in models)
    np.testing.assert_allclose(result.numpy(), expected, rtol=tolerance, atol=scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "setting"), ALL_SETTINGS)
def test_float64_agrees_with_the_formula(name, setting, shape):
    assert_agrees(name, setting, shape)


@pytest.mark.parametrize("name", SETTINGS)
def test_float64_agrees_with_the_formula_over_several_blocks(name):
    assert_agrees(name, SETTINGS[name][0], (1000, 700))


# bfloat16 in and out: one rounding of the exact result


def ulp_of_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, -126) - 7)


def make_bfloat16(setting: Setting, shape: tuple[int, ...]) -> tuple[list, torch.Tensor | None, list]:
    """A base N(0, 0.02), models 0.002 away from it, and Fisher information."""
    generator = torch.Generator().manual_seed(1)
    origin = 0.02 * torch.randn(shape, generator=generator)
    models = [(origin + 0.002 * torch.randn(shape, generator=generator)).bfloat16() for _ in range(setting.num_models)]
    fishers = [torch.rand(shape, generator=generator).bfloat16() for _ in models if setting.fishers]
    return models, origin.bfloat16() if setting.base else None, fishers


# Dyadic weights: weighted sums of such numbers are exact in float32 too, so even votes that tie are settled alike.
EXACT_VOTES = {"weight": [1.0, 0.5, 0.25], "density": [0.5, 0.3, 0.8], "gamma": [0.1, 0.01, 0.05]}
# Close calls that show elsewhere: which of the positions at SCE's threshold count moves its weights for all positions,
# and which multiple of 2⁻¹⁶ is nearest to a keep probability of della moves 1/p.
SPREADING = {"sce": 2.0**-14, "della": 2.0**-14, "della_linear": 2.0**-14}
ROUNDED = [pytest.param(name, rows[0], False, id=name) for name, rows in SETTINGS.items()] + [
    pytest.param("slerp", Setting(2, parameters={"t": 0.5}), True, id="slerp-half"),
    pytest.param("sce", Setting(3, base=True), True, id="sce-all"),
    pytest.param("model_stock", SETTINGS["model_stock"][1], True, id="model_stock-filter_wise"),
    pytest.param(
        "ties",
        Setting(3, base=True, parameters={key: EXACT_VOTES[key] for key in ("weight", "density")}),
        True,
        id="ties-exact",
    ),
    pytest.param("breadcrumbs_ties", Setting(3, base=True, parameters=EXACT_VOTES), True, id="breadcrumbs_ties-exact"),
]


@pytest.mark.parametrize(("name", "setting", "close_calls_count"), ROUNDED)
def test_bfloat16_is_the_float64_result_rounded_once(name, setting, close_calls_count):
    tensors = make_bfloat16(setting, (1000, 1000))
    result = merge(name, *tensors, setting.parameters)
    assert result.dtype == torch.bfloat16
    models, fishers = ([x.double().numpy() for x in group] for group in (tensors[0], tensors[2]))
    base = None if tensors[1] is None else tensors[1].double().numpy()
    got = result.double().numpy()
    if name in DROPPING:
        _, expected = nearest(got, patterns(name, models, base, **setting.parameters))
    else:
        expected = expected_result(name, setting, models, base, fishers)
    close = close_calls(name, models, base, **setting.parameters)
    error, ulp = np.abs(got - expected), ulp_of_bfloat16(expected)
    counted = np.ones_like(close) if close_calls_count else ~close
    assert ((error > 0.501 * ulp) & counted).mean() <= 0.0005
    # Where the terms cancel, float32 is precise beside them rather than beside the result.
    terms = np.abs(np.stack([*models, models[0] if base is None else base])).max(axis=0)
    assert (error <= ulp + SPREADING.get(name, 2.0**-22) * terms)[~close].all()


# Random dropping


def kept_by(name: str, tensors: list, parameters: dict) -> tuple[np.ndarray, np.ndarray]:
    """Which positions of each model were kept, told from the result, and the probabilities they should have had."""
    models, base = tensors
    result = merge(name, *to_tensors(models, base), [], parameters)
    bits, value = nearest(result.numpy(), patterns(name, models, base, **parameters))
    tolerance = 1e-4 if name.startswith("della") else 1e-12
    np.testing.assert_allclose(result.numpy(), value, rtol=tolerance, atol=tolerance)
    return bits, keep_probabilities(name, models, base, **parameters)


def changes_of_one_sign(num_models: int, shape: tuple[int, ...]) -> list:
    """Task vectors that all agree, so that no vote hides what was kept."""
    generator = np.random.default_rng(3)
    base = generator.normal(size=shape)
    return [[base + 0.5 + generator.exponential(size=shape) for _ in range(num_models)], base]


def deviation(bits: np.ndarray, probabilities: np.ndarray) -> float:
    """Kept positions beyond expectation, in standard deviations."""
    return float((bits - probabilities).sum() / np.sqrt((probabilities * (1 - probabilities)).sum()))


def correlation(a: np.ndarray, p: np.ndarray, b: np.ndarray, q: np.ndarray) -> float:
    """Covariance of two independent masks' positions, in its standard deviations."""
    return float(((a - p) * (b - q)).sum() / np.sqrt((p * (1 - p) * q * (1 - q)).sum()))


CHANCE = {"weight": [1.0, 0.7], "density": [0.3, 0.6], "epsilon": [0.2, 0.3]}
LARGE = (300, 1000)


def chance_of(name: str, **others: object) -> dict:
    return {key: value for key, value in CHANCE.items() if key != "epsilon" or name.startswith("della")} | others


@pytest.mark.parametrize("name", DROPPING)
def test_dropping_keeps_as_many_as_it_says(name):
    tensors = changes_of_one_sign(2, LARGE)
    bits, probabilities = kept_by(name, tensors, chance_of(name))
    for kept, p, model in zip(bits, probabilities, tensors[0], strict=True):
        assert abs(deviation(kept, p)) < 5
        order = np.abs(model - tensors[1]).argsort(axis=1)
        kept, p = (np.take_along_axis(x, order, axis=1) for x in (kept, p))
        assert name.startswith("dare") or np.all(np.diff(p, axis=1) >= 0)
        for kept_decile, p_decile in zip(np.split(kept, 10, axis=1), np.split(p, 10, axis=1), strict=True):
            assert abs(deviation(kept_decile, p_decile)) < 5


@pytest.mark.parametrize("name", DROPPING)
def test_dropping_is_independent_between_models_positions_seeds_and_tensors(name):
    tensors = changes_of_one_sign(2, LARGE)
    bits, p = kept_by(name, tensors, chance_of(name))
    assert abs(correlation(bits[0], p[0], bits[1], p[1])) < 5
    flat, chances = bits[0].ravel(), p[0].ravel()
    for lag in (1, 2, 3, 4, 8, 64, 1000, 2**16, 2**18):
        assert abs(correlation(flat[lag:], chances[lag:], flat[:-lag], chances[:-lag])) < 5, lag
        assert abs(correlation(flat[lag:], chances[lag:], bits[1].ravel()[:-lag], p[1].ravel()[:-lag])) < 5, lag
    other, _ = kept_by(name, tensors, chance_of(name, seed=1))
    for i in range(2):
        for j in range(2):
            assert abs(correlation(bits[i], p[i], other[j], p[j])) < 5
    models, base = to_tensors(*tensors)
    states = [{key: x.clone() for key in ("layers.0.w", "layers.1.w")} for x in (*models, base)]
    soup = merge(name, states[:2], states[2], [], chance_of(name))
    possible = patterns(name, *tensors, **chance_of(name))
    (first, _), (second, _) = (nearest(soup[key].numpy(), possible) for key in ("layers.0.w", "layers.1.w"))
    for i in range(2):
        for j in range(2):
            assert abs(correlation(first[i], p[i], second[j], p[j])) < 5


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_leaves_the_mean_where_it_was(name):
    models, base = changes_of_one_sign(2, LARGE)
    parameters = chance_of(name, **{"lambda": 0.8})
    result = merge(name, *to_tensors(models, base), [], parameters).numpy()
    whole = ORACLES["task_arithmetic"](models, base, weight=parameters["weight"], **{"lambda": 0.8})
    p = keep_probabilities(name, models, base, **parameters)
    weights = 0.8 * np.reshape(parameters["weight"], (2, 1, 1))
    variance = (weights * np.stack([model - base for model in models])) ** 2 * (1 - p) / p
    assert abs((result - whole).sum()) < 5 * np.sqrt(variance.sum())


@pytest.mark.parametrize("name", DROPPING)
def test_a_row_of_one_is_kept_with_the_density_itself(name):
    tensors = changes_of_one_sign(2, (8_000, 1))
    bits, p = kept_by(name, tensors, chance_of(name))
    assert np.allclose(p[0], 0.3, atol=1e-5)
    assert abs(deviation(bits, p)) < 5


def test_della_s_probabilities_are_multiples_of_two_to_the_minus_16_by_rank():
    generator = np.random.default_rng(4)
    delta = generator.normal(size=(40, 700))
    parameters = {"weight": [1.0], "density": [0.5], "epsilon": [0.2]}
    result = merge("della_linear", *to_tensors([delta], np.zeros_like(delta)), (), parameters).numpy()
    kept = result != 0
    probabilities = delta[kept] / result[kept]
    np.testing.assert_allclose(probabilities * 65536, np.round(probabilities * 65536), rtol=1e-11)
    shares = np.stack([rank_shares(row) for row in delta])
    np.testing.assert_allclose(probabilities, (0.3 + 0.4 * shares)[kept], rtol=0, atol=0.51 / 65536)
    # Magnitudes that share their first six bits share a rank; that is not far from each having its own.
    ranks = np.abs(delta).argsort(axis=1).argsort(axis=1) / 699
    np.testing.assert_allclose(shares, ranks, rtol=0, atol=0.02)

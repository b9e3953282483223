"""soupkit in memory: hand-worked values, exact rounding, and what is refused."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import soupkit
from soupkit import METHODS, MergeError, Recipe
from soupkit.blocks import BLOCK
from soupkit.methods.averages import normalised
from soupkit.methods.spherical import gram_matrix
from soupkit.options import parse_size

PATHS = ("linear", "slerp")  # between two models
# Significant bits and exponent of the smallest normal number.
FORMATS = {torch.float32: (24, -126), torch.float16: (11, -14), torch.bfloat16: (8, -126)}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def round_once(value: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of the dtype to an exact value, ties to even: integer arithmetic, no floating point."""
    precision, smallest_exponent = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(value)
    ulp = Fraction(2) ** (max(exponent, smallest_exponent) - precision + 1)
    nearest = round(value / ulp) * ulp
    return math.copysign(math.inf, value) if abs(nearest) > torch.finfo(dtype).max else float(nearest)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, subnormals, neighbours of powers of two, the largest numbers, and random significands everywhere."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    values = [0.0, smallest, 2 * smallest, 3 * smallest, 5 * smallest]
    values += [info.smallest_normal - smallest, info.smallest_normal, info.smallest_normal + smallest]
    values += [info.max, info.max / 2, info.max * (1 - info.eps), 1 + info.eps, 1 - info.eps / 2, 1 + 3 * info.eps]
    lowest, highest = math.floor(math.log2(smallest)), math.floor(math.log2(info.max))
    exponents = range(lowest, highest + 1, (highest - lowest) // 36)
    generator = torch.Generator().manual_seed(0)
    significands = 1 + torch.rand(len(exponents), generator=generator, dtype=torch.float64)
    values += [2.0**exponent for exponent in exponents]
    values += [float(s) * 2.0**e for s, e in zip(significands, exponents, strict=True) if float(s) * 2.0**e < info.max]
    positive = torch.tensor(values, dtype=torch.float64).to(dtype)
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("dtype", FORMATS)
def test_uniform_average_of_two_is_exact_rounded_once(dtype):
    values = adversarial(dtype)
    a, b = (grid.reshape(-1) for grid in torch.meshgrid(values, values, indexing="ij"))
    soup = soupkit.average([a, b])
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [math.copysign(round_once((Fraction(x) + Fraction(y)) / 2, dtype), x + y) for x, y in pairs]
    assert same_bits(soup, torch.tensor(expected, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.0005), (torch.float16, 0.005), (torch.float32, 0)])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [1, 2, 3, 4, 5], None])
def test_weighted_average_is_within_half_an_ulp(dtype, allowed, weights):
    generator = torch.Generator().manual_seed(1)
    count = len(weights) if weights else 7
    base = torch.randn(200_000, generator=generator) * 0.02
    models = [(base + torch.randn(200_000, generator=generator) * 0.002).to(dtype) for _ in range(count)]
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / count] * count
    exact = sum(model.double() * share for model, share in zip(models, shares, strict=True))
    precision, smallest_exponent = FORMATS[dtype]
    exponent = torch.frexp(exact).exponent - 1
    ulp = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=smallest_exponent) - precision + 1)
    error = (soupkit.average(models, weights).double() - exact).abs()
    assert (error > 0.501 * ulp).double().mean() <= allowed
    # Where the terms cancel, the error is small beside them rather than beside the result.
    assert (error <= 0.501 * ulp + 2**-22 * torch.stack(models).abs().amax(0).double()).all()


def test_float64_stays_float64():
    a, b = torch.tensor([1.0, 1 + 2**-52], dtype=torch.float64), torch.tensor([1 + 2**-51, 1.0], dtype=torch.float64)
    soup = soupkit.average([a, b])
    assert soup.dtype == torch.float64
    assert soup.tolist() == [1 + 2**-52, 1.0]


def test_average_by_hand():
    models = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]), torch.tensor([8.0, 1.0])]
    assert soupkit.average(models).tolist() == [4.0, 1.0]
    # (2·1 + 1·3 + 1·8) / 4 and (2·(-2) + 1·4 + 1·1) / 4: weights are divided by their sum.
    assert soupkit.average(models, [2, 1, 1]).tolist() == [3.25, 0.25]
    assert soupkit.average(models, [0, 0, 5]).tolist() == [8.0, 1.0]
    assert soupkit.average(models[:1]).tolist() == [1.0, -2.0]


def test_the_one_rounding_comes_last():
    # The sum is 1 + 1.5 · 2⁻⁷, a tie between bfloat16 numbers that goes to the even 1 + 2 · 2⁻⁷. A running sum kept in
    # bfloat16 loses each small term and stays at 1.
    models = [torch.tensor([x], dtype=torch.bfloat16) for x in (1.0, 2**-8, 2**-8, 2**-8)]
    assert soupkit.average(models).item() == (1 + 2**-6) / 4
    # The exact average 1 + 2⁻¹¹ + 2⁻²³ lies just above a tie of float16: casting the ingredients first gives 1 + 0.
    models = [torch.tensor([1 + 2**-11 + 2**-22]), torch.tensor([1 + 2**-11])]
    assert soupkit.average(models, dtype="float16").item() == 1 + 2**-10
    # 1 + 2⁻⁸ + 2⁻²⁴ lies just above a tie of bfloat16, and is itself a tie of float32 that goes down to the other one:
    # rounding to float32 on the way gives 1.
    models = [torch.tensor([1 + 2**-8]), torch.tensor([1 + 2**-8 + 2**-23])]
    assert soupkit.average(models, dtype="bfloat16").item() == 1 + 2**-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float64_is_rounded_to_16_bits_once(dtype):
    numbers = adversarial(dtype).double()
    info = torch.finfo(dtype)
    spacing = 2.0 ** torch.frexp(numbers.abs().clamp(min=info.smallest_normal)).exponent.double() * info.eps / 2
    ties = torch.cat([numbers, numbers + spacing / 2, numbers - spacing / 2])
    # Distances from the ties that float32 cannot see, is tied on, and can see.
    offsets = torch.tensor([sign * 2.0**-power for power in (16, 20, 24, 25, 26, 40) for sign in (1, -1)])
    near_ties = (ties[:, None] * (1 + offsets.double())).flatten()
    extremes = torch.tensor([1e39, 1e308, 1e-39, 2.0**-150, 1e-300], dtype=torch.float64)
    values = torch.cat([ties, near_ties, extremes, -extremes])
    with pytest.warns(UserWarning, match="NaN or infinite values, in 'tensor'"):
        soup = soupkit.average([values], dtype=dtype, allow_nonfinite=True)
    expected = [math.copysign(round_once(Fraction(x), dtype), x) for x in values.tolist()]
    assert same_bits(soup, torch.tensor(expected, dtype=torch.float64).to(dtype))


def test_not_a_number_and_infinity_survive_the_rounding():
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    with pytest.warns(UserWarning, match="3 NaN or infinite values, in 'tensor'"):
        soup = soupkit.average([values, values], dtype="bfloat16", allow_nonfinite=True)
    assert soup[0].isnan()
    assert same_bits(soup[1:], values[1:].bfloat16())


def test_products_and_sums_are_rounded_separately():
    # A fused multiply-add would round once, but only on machines and builds that have it; numpy never fuses.
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(1003, generator=generator).half() for _ in range(2))
    x, y = (tensor.numpy().astype(np.float32) for tensor in (a, b))
    expected = x * np.float32(0.3) + y * np.float32(0.7)
    assert same_bits(soupkit.average([a, b], [0.3, 0.7], dtype="float32"), torch.from_numpy(expected))


def test_linear_by_hand():
    a, b = torch.tensor([0.0, 10.0]), torch.tensor([4.0, 20.0])
    assert soupkit.interpolate(a, b, 0.25).tolist() == [1.0, 12.5]
    assert soupkit.interpolate(a, b, 0).tolist() == [0.0, 10.0]
    assert soupkit.interpolate(a, b, 1).tolist() == [4.0, 20.0]
    assert soupkit.interpolate(a, b, 1.5).tolist() == [6.0, 25.0]
    assert soupkit.interpolate(a, b, -0.5).tolist() == [-2.0, 5.0]


def test_slerp_by_hand():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for t, degrees in ((0.0, 0), (1 / 3, 30), (0.5, 45), (1.0, 90), (2.0, 180)):
        soup = soupkit.interpolate(a, b, t, method="slerp")
        expected = torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])
        torch.testing.assert_close(soup, expected, atol=1e-7, rtol=0)
    # 60 degrees apart with lengths 2 and 4; half-way: sin 30° / sin 60° = 1/√3 of each.
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([2.0, 2 * math.sqrt(3)])
    expected = torch.tensor([4 / math.sqrt(3), 2.0])
    torch.testing.assert_close(soupkit.interpolate(a, b, 0.5, method="slerp"), expected, atol=1e-6, rtol=0)


def test_slerp_goes_straight_where_there_is_no_angle():
    a = torch.tensor([1.0, 2.0, 2.0])
    for b in (3 * a, -a, torch.zeros(3), a + torch.tensor([0.01, 0.0, 0.0])):
        assert same_bits(soupkit.interpolate(a, b, 0.3, method="slerp"), soupkit.interpolate(a, b, 0.3))
    # Just inside the limit (cos 0.999) it does not.
    b = torch.tensor([1.0, 2.0, 2.0 + 0.15])
    assert not same_bits(soupkit.interpolate(a, b, 0.3, method="slerp"), soupkit.interpolate(a, b, 0.3))


def test_slerp_sees_the_whole_tensor_across_blocks():
    # All of a's length lies in the first block and all of b's in the last: orthogonal, so cos 45° each at t = 0.5.
    a, b = torch.zeros(2 * BLOCK + 5), torch.zeros(2 * BLOCK + 5)
    a[0], b[-1] = 1.0, 1.0
    soup = soupkit.interpolate(a, b, 0.5, method="slerp")
    torch.testing.assert_close(soup[[0, 1, -1]], torch.tensor([0.5**0.5, 0.0, 0.5**0.5]))


def test_dot_products_do_not_depend_on_threads_and_are_exact_enough(monkeypatch):
    grams = []

    def record(blocks, t, gram):
        grams.append(gram)
        return blocks.ingredients[0]

    monkeypatch.setitem(METHODS, "slerp", replace(METHODS["slerp"], function=record))
    before = torch.get_num_threads()
    for seed in range(4):  # not every seed gives sums that show the number of threads
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(BLOCK, generator=generator, dtype=torch.float64) for _ in range(2))
        grams.clear()
        try:
            for num_threads in (1, 2, 4):
                torch.set_num_threads(num_threads)
                soupkit.interpolate(a, b, 0.4, method="slerp")
                assert torch.get_num_threads() == num_threads
        finally:
            torch.set_num_threads(before)
        assert same_bits(grams[0], grams[1])
        assert same_bits(grams[0], grams[2])
    gram = gram_matrix([a, b])
    assert gram[0, 1].item() == gram[1, 0].item() == pytest.approx(math.fsum((a * b).tolist()), abs=1e-9)
    assert gram[1, 1].item() == pytest.approx(math.fsum((b * b).tolist()), rel=1e-14)
    # Blocks of 16-bit models are in float32; sums in float32 would be right to five digits only.
    x, y = a.float(), b.float()
    exact = math.fsum((x.double() * y.double()).tolist())
    assert gram_matrix([x, y])[0, 1].item() == pytest.approx(exact, abs=1e-9)


def call(method: str, models: list, **options):
    return soupkit.interpolate(*models, 0.7, method=method, **options)


@pytest.mark.parametrize("method", PATHS)
@pytest.mark.parametrize("dtype", BITS)
def test_every_method_leaves_its_ingredients_alone_and_keeps_shape_and_dtype(method, dtype):
    for shape in ((), (0,), (1,), (3, 5), (2, 3, 4)):
        models = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
        copies = [model.clone() for model in models]
        soup = call(method, models)
        assert soup.shape == shape
        assert soup.dtype == dtype
        assert all(same_bits(model, copy) for model, copy in zip(models, copies, strict=True))


def test_no_elementwise_method_depends_on_where_blocks_are_cut(monkeypatch):
    models = [torch.randn(1003).half() for _ in range(2)]
    whole = call("linear", models)
    for block in (1, 7, 64, 1002):
        monkeypatch.setattr("soupkit.blocks.BLOCK", block)
        monkeypatch.setattr("soupkit.hashing.PIECE", 4 * block)
        assert same_bits(call("linear", models), whole)


@pytest.mark.parametrize("method", PATHS)
def test_a_model_with_itself_is_itself(method):
    for dtype in FORMATS:
        model = torch.randn(1000).to(dtype)
        assert same_bits(call(method, [model, model.clone()]), model)
    assert same_bits(soupkit.average([model] * 3), model)


@pytest.mark.parametrize("method", PATHS)
def test_non_contiguous_tensors(method):
    models = [torch.randn(6, 4).t(), torch.randn(8, 6)[::2]]
    assert same_bits(call(method, models), call(method, [model.contiguous() for model in models]))


def test_sce_refuses_a_model_that_is_partly_nan():
    base, a, b = (torch.randn(100_000) for _ in range(3))
    a[:30_000] = math.nan
    with pytest.raises(MergeError, match="of ingredient 1 holds NaN or infinite values"):
        soupkit.merge(Recipe("sce", [a, b], base=base, parameters={"select_topk": 0.5}))


@pytest.mark.parametrize("method", PATHS)
def test_non_finite_values_are_refused_or_stay_in_place_and_are_told(method):
    a, b = torch.randn(8), torch.randn(8)
    a[2], b[5] = math.nan, math.inf
    for models, culprit in (([a, torch.ones(8)], 1), ([torch.ones(8), b], 2)):
        with pytest.raises(MergeError, match=rf"'tensor' of ingredient {culprit} holds NaN .* allow_nonfinite=True"):
            call(method, models)
    with pytest.warns(UserWarning, match=r"2 NaN or infinite values, in 'tensor'"):
        soup = call(method, [a, b], allow_nonfinite=True)
    assert soup.isfinite().logical_not().nonzero().flatten().tolist() == [2, 5]


def test_values_too_large_for_the_dtype_are_told():
    big = torch.tensor([1.0, 1e5])
    with pytest.raises(MergeError, match="'tensor' of the soup is too large for float16: choose a wider dtype"):
        soupkit.average([big, big], dtype=torch.float16)
    with pytest.warns(UserWarning, match=r"1 NaN or infinite values, in 'tensor'"):
        soup = soupkit.average([big, big], dtype=torch.float16, allow_nonfinite=True)
    assert soup.tolist() == [1.0, math.inf]


def test_large_but_finite_sums_are_not_reported():
    largest = torch.full((1000,), torch.finfo(torch.float32).max)  # their sum overflows, they do not
    assert same_bits(soupkit.average([largest, largest]), largest)


def test_dtypes_are_promoted_or_chosen():
    half, brain, single = (torch.ones(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32))
    assert soupkit.average([half, brain]).dtype == torch.float32
    assert soupkit.average([half, single]).dtype == torch.float32
    assert soupkit.average([single, single], dtype="bfloat16").dtype == torch.bfloat16
    assert soupkit.average([brain, brain], dtype=torch.float64).dtype == torch.float64


class Tied(nn.Module):
    """Tied weights, a float buffer, an integer buffer, and one that is not saved."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.full((2,), value), persistent=False)
        nn.init.constant_(self.embed.weight, value)
        self.norm.running_mean.fill_(value)
        self.norm.num_batches_tracked.fill_(int(value))


def test_a_sweep_is_many_interpolations(tmp_path):
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    for method in PATHS:
        swept = soupkit.sweep(a, b, [0, 0.3, 1.2], method=method)
        assert all(
            same_bits(soup, soupkit.interpolate(a, b, t, method=method))
            for soup, t in zip(swept, [0, 0.3, 1.2], strict=True)
        )


def test_modules():
    a, b = Tied(1.0), Tied(3.0)
    a.embed.weight.requires_grad_(False)
    soup = soupkit.average([a, b])
    assert isinstance(soup, Tied)
    assert soup is not a
    assert soup.head.weight is soup.embed.weight
    assert not soup.embed.weight.requires_grad
    assert soup.norm.weight.requires_grad
    assert soup.embed.weight.unique().tolist() == [2.0]
    assert soup.norm.running_mean.tolist() == [2.0] * 3
    assert soup.norm.num_batches_tracked.item() == 1  # a counter: the first's
    assert soup.cache.tolist() == [1.0, 1.0]  # not persistent: the first's
    assert a.embed.weight.unique().tolist() == [1.0]
    assert soupkit.average([a, b], dtype="bfloat16").head.weight.dtype == torch.bfloat16


def test_modules_are_copied_first_and_without_their_values(monkeypatch):
    a, b = Tied(1.0), Tied(3.0)
    num_copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **how: num_copied.append(x.numel()) or clone(x, **how))
    soup = soupkit.average([a, b])
    assert num_copied == []
    assert soup.cache is not a.cache
    monkeypatch.setattr("soupkit.memory.merge_state_dicts", lambda *given: pytest.fail("merged in vain"))
    a.lock = threading.Lock()  # cannot be copied
    with pytest.raises(TypeError, match="lock"):
        soupkit.average([a, b])


def test_state_dicts_keep_ties_and_order():
    soup = soupkit.average([Tied(1.0).state_dict(), Tied(3.0).state_dict()])
    assert list(soup) == list(Tied(0.0).state_dict())
    assert soup["head.weight"] is soup["embed.weight"]
    # Tied in one and equal in the other is tied; different values are refused, whichever comes first.
    state = Tied(1.0).state_dict()
    state["head.weight"] = state["head.weight"].clone()
    soup = soupkit.average([state, Tied(3.0).state_dict()])
    assert soup["head.weight"] is soup["embed.weight"]
    state["head.weight"][0] = 7.0
    for pair in ([state, Tied(3.0).state_dict()], [Tied(3.0).state_dict(), state]):
        with pytest.raises(MergeError, match=r"'head.weight' and 'embed.weight' are one tied tensor .* differ in"):
            soupkit.average(pair)


@pytest.mark.parametrize("method", PATHS)
@pytest.mark.parametrize("dtype", BITS)
def test_tensors_state_dicts_and_modules_agree(method, dtype):
    models = [nn.Linear(700, 401).to(dtype) for _ in range(2)]  # more than one block
    states = [model.state_dict() for model in models]
    soup = call(method, states)
    module = call(method, models)
    for name in ("weight", "bias"):
        assert same_bits(soup[name], call(method, [state[name] for state in states]))
        assert same_bits(soup[name], module.state_dict()[name])


def test_integers_are_copied_when_equal():
    a = {"ids": torch.tensor([1, 2]), "flag": torch.tensor([True])}
    soup = soupkit.average([a, {name: tensor.clone() for name, tensor in a.items()}], dtype="float16")
    assert soup["ids"].tolist() == [1, 2]
    assert soup["ids"].dtype == torch.int64
    assert soup["ids"] is not a["ids"]
    assert soup["flag"].tolist() == [True]


def test_weights_are_normalised():
    assert normalised([1, 3]) == [0.25, 0.75]
    assert normalised([1e308, 1e308]) == [0.5, 0.5]
    assert normalised([5e-324, 0]) == [1.0, 0.0]
    assert normalised([3, -1]) == [1.5, -0.5]
    assert soupkit.average([torch.zeros(1), torch.ones(1)], torch.tensor([2.0, 2.0])).item() == 0.5


ONE = torch.ones(2)
BAD_CALLS = {
    "no model": (lambda: soupkit.average([]), "found 0 models to merge: linear takes 1 or more"),
    "one model": (lambda: soupkit.average(ONE), "found one Tensor where a list of models belongs"),
    "one folder": (lambda: soupkit.average("runs/sft1"), "found one str where a list of models belongs"),
    "mixed": (lambda: soupkit.average([ONE, {"a": ONE}]), "model 1 is a tensor and model 2 is a state dict"),
    "odd kind": (lambda: soupkit.average([ONE, 3]), "model 2 is a int: give folders, state dicts"),
    "few weights": (lambda: soupkit.average([ONE, ONE], [1]), "found 1 weights for 2 ingredients"),
    "negative": (lambda: soupkit.average([ONE, ONE], [1, -2]), "weight 2 is -2: weights must not be neg"),
    "nan": (lambda: soupkit.average([ONE, ONE], [math.nan, 1]), "weight 1 is nan: weights must be finite"),
    "inf": (lambda: soupkit.average([ONE, ONE], [1, math.inf]), "weight 2 is inf: weights must be finite"),
    "zero": (lambda: soupkit.average([ONE, ONE], [0, 0]), "the weights sum to 0, so they cannot be normalised"),
    "words": (lambda: soupkit.average([ONE, ONE], ["x", 1]), "weights must be numbers, one per ingredient"),
    "t": (lambda: soupkit.interpolate(ONE, ONE, math.nan), "t is nan: it must be finite"),
    "t word": (lambda: soupkit.interpolate(ONE, ONE, "x"), "t must be a number"),
    "method": (lambda: soupkit.interpolate(ONE, ONE, 0.5, method="x"), "unknown method 'x': interpolate takes 'li"),
    "dtype": (lambda: soupkit.average([ONE], dtype="int8"), "dtype int8 cannot hold a soup: choose float16"),
    "out": (lambda: soupkit.average([ONE], out="x"), "out='x' is for folders, and each model is a tensor"),
    "shape": (
        lambda: soupkit.average([{"w": ONE}, {"w": torch.ones(2, 1)}]),
        r"tensor 'w' has shape \[2\] in ingredient 1 and \[2, 1\] in ingredient 2",
    ),
    "names": (
        lambda: soupkit.average([{"w": ONE, "v": ONE}, {"w": ONE, "u": ONE}]),
        "ingredient 1 and ingredient 2 hold different tensors: ingredient 2 lacks 'v'; ingredient 1 lacks 'u'",
    ),
    "many names": (
        lambda: soupkit.average([{f"w{i}": ONE for i in range(9)}, {"w0": ONE}]),
        "ingredient 2 lacks 'w1', 'w2', 'w3' and 5 more",
    ),
    "integers": (
        lambda: soupkit.average([{"ids": torch.tensor([1])}, {"ids": torch.tensor([2])}]),
        "integer tensor 'ids' differs between ingredient 1 and ingredient 2",
    ),
    "int and float": (
        lambda: soupkit.average([{"w": ONE.long()}, {"w": ONE}]),
        "tensor 'w' is int64 in ingredient 1 and float32 in ingredient 2: convert one of them first",
    ),
    "complex": (
        lambda: soupkit.average([ONE, ONE.to(torch.complex64)]),
        "tensor 'tensor' in ingredient 2 is complex64, which cannot be merged",
    ),
    "not a tensor": (lambda: soupkit.average([{"step": 3}]), "'step' in ingredient 1 is a int, not a tensor"),
    "provenance": (lambda: soupkit.provenance(Recipe("x", [])), "unknown method 'x': choose one of linear, slerp"),
    "parameter": (lambda: soupkit.merge(Recipe("slerp", [ONE, ONE])), "slerp needs the parameter 't'"),
    "three": (
        lambda: soupkit.merge(Recipe("slerp", [ONE] * 3, parameters={"t": 1})),
        "found 3 models to merge: slerp takes exactly 2",
    ),
    "no base": (lambda: soupkit.merge(Recipe("ties", [ONE])), "ties needs a base model"),
    "needless base": (lambda: soupkit.merge(Recipe("linear", [ONE], base=ONE)), "linear takes no base model"),
    "no Fisher": (
        lambda: soupkit.merge(Recipe("fisher", [ONE, ONE])),
        "found 0 Fisher estimates for 2 models: fisher takes one Fisher estimate per model",
    ),
    "Fisher of another shape": (
        lambda: soupkit.merge(Recipe("fisher", [{"w": ONE}], fishers=[{"w": torch.ones(3)}])),
        r"tensor 'w' has shape \[2\] in ingredient 1 and \[3\] in Fisher estimate 1",
    ),
    "Fisher without a tensor": (
        lambda: soupkit.merge(Recipe("fisher", [{"w": ONE}], fishers=[{"v": ONE}])),
        "Fisher estimate 1 has no Fisher information for 'w'",
    ),
    "epsilon": (
        lambda: soupkit.merge(Recipe("della", [ONE], base=ONE, parameters={"weight": 1, "density": 0.1})),
        r"density 0.1 with epsilon 0.15 gives keep probabilities beyond \[0, 1\]: choose epsilon at most 0.1",
    ),
    "dtype list": (lambda: soupkit.average([ONE], dtype=[16]), r"dtype \[16\] cannot hold a soup: choose float16"),
    "dtype of a recipe": (lambda: soupkit.merge(Recipe("linear", [ONE], dtype=3)), "dtype 3 cannot hold a soup"),
    "dtype is a module": (lambda: soupkit.average([ONE], dtype="nn"), "dtype nn cannot hold a soup: choose float16"),
    "no dtype": (lambda: soupkit.average([ONE], dtype=""), "dtype  cannot hold a soup: choose float16"),
    "threads": (lambda: soupkit.average([ONE], num_threads=0), "num_threads is 0: it must be at least 1"),
    "threads half": (lambda: soupkit.average([ONE], num_threads=1.5), "num_threads is 1.5: it must be a whole number"),
    "threads true": (lambda: soupkit.average([ONE], num_threads=True), "num_threads is True: it must be a whole"),
    "switch": (lambda: soupkit.average([ONE], allow_nonfinite="no"), "allow_nonfinite is 'no': it must be True or F"),
    "size float": (lambda: soupkit.average(["a"], max_shard_size=5e9), "max_shard_size 5000000000.0 is not a size"),
    "size true": (lambda: soupkit.average(["a"], max_shard_size=True), "max_shard_size True is not a size: write a"),
    "device": (lambda: soupkit.average(["a"], device=1.5), "device 1.5 is unknown: choose cpu, cuda or cuda:N"),
    "hash": (lambda: soupkit.average(["a"], hash="md5"), "unknown hash 'md5': choose one of"),
    "no points": (lambda: soupkit.sweep(ONE, ONE, []), "ts is empty: give at least one t"),
    "a point twice": (lambda: soupkit.sweep(ONE, ONE, [0, 1, 0.0]), "t = 0.0 is given twice: give each point once"),
    "an output twice": (
        lambda: soupkit.sweep("a", "b", [0, 1], outs=["x", "./x"]),
        "found 2 output folders for 2 values of t: give each one of its own",
    ),
    "tokenizer": (
        lambda: soupkit.merge(Recipe("linear", [ONE], tokenizer="union")),
        "tokenizer is for folders, and each model is a tensor",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_told_in_one_line(name):
    call_it, message = BAD_CALLS[name]
    with pytest.raises(MergeError, match=message) as caught:
        call_it()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(MergeError, match="unknown option 'weight': the options are dtype, overwrite"):
        soupkit.average([ONE, ONE], weight=[1, 0])


TO_WRITE = {"overwrite": True, "max_shard_size": "5GB", "hash": "sha256", "sync": True}


@pytest.mark.parametrize(("option", "value"), [*TO_WRITE.items(), ("allow_pickle", True), ("device", "cpu:0")])
def test_options_without_effect_are_refused_everywhere(option, value, tmp_path):
    module = nn.Linear(1, 1)
    for kind, model in (("tensor", ONE), ("state dict", {"w": ONE}), ("module", module)):
        for call_it in (
            lambda model, **options: soupkit.average([model], **options),
            lambda model, **options: soupkit.interpolate(model, model, 0.5, **options),
            lambda model, **options: soupkit.sweep(model, model, [0.5], **options),
            lambda model, **options: soupkit.merge(Recipe("linear", [model]), **options),
        ):
            with pytest.raises(MergeError) as caught:
                call_it(model, **{option: value})
            expected = f"{option}='{value}' is for folders, and each model is a {kind}: leave it out"
            assert str(caught.value) == expected
    if option in TO_WRITE:
        with pytest.raises(MergeError, match=f"^{option}='{value}' is for a folder that is written: give out, or le"):
            soupkit.average([str(tmp_path)], **{option: value})


def test_options_that_are_as_without_them_are_welcome():
    plain = {"overwrite": False, "max_shard_size": None, "hash": "xxh3_tree", "sync": False, "allow_pickle": False}
    for device in ("cpu", torch.device("cpu")):
        soup = soupkit.average([ONE], **plain, device=device, dtype="torch.float64", num_threads=1, progress=True)
        assert soup.dtype == torch.float64


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "200 mb": 200 * 10**6, 17: 17, "5000000000": 5 * 10**9, "12 B": 12, None: None}
    assert {size: parse_size(size) for size in sizes} == sizes
    for size in ("GB", "1.5GB", "fiveGB", "5e9", "", "5TB", "1 2", 5e9, True, [5]):
        with pytest.raises(MergeError, match=f"^max_shard_size {re.escape(repr(size))} is not a size: write a whole"):
            parse_size(size)
    for size in (0, -5, "0GB", "-5"):
        with pytest.raises(MergeError, match=f"^max_shard_size is {size}: it must be positive$"):
            parse_size(size)


def test_fisher_weights_beside_integer_buffers():
    state = {"w": torch.tensor([1.0, 3.0]), "ids": torch.arange(3)}
    other = {"w": torch.tensor([5.0, 7.0]), "ids": torch.arange(3)}
    fishers = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 0.0])}]
    soup = soupkit.merge(Recipe("fisher", [state, other], fishers=fishers))
    assert soup["w"].tolist() == [2.0, 3.0]
    assert soup["ids"].tolist() == [0, 1, 2]


def test_a_sweep_counts_what_is_not_finite_once(tmp_path):
    a, b = torch.tensor([torch.nan, 1.0]), torch.ones(2)
    with pytest.warns(UserWarning, match="the soup holds 1 NaN"):
        soupkit.sweep(a, b, [0, 0.5, 1], allow_nonfinite=True)

"""KL estimators against hand-worked categoricals and full enumeration; the coefficient's controllers by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf import kl

LN2 = math.log(2)
# π = (1/2, 1/4, 1/4), ρ = (1/4, 1/4, 1/2), as one position each: [1, 1, 3]
PI = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64)
RHO = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64)


def random_log_distributions(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_estimators_by_hand() -> None:
    # r = log(π/ρ) of the three tokens: ln 2, 0, −ln 2
    logprobs, ref_logprobs = PI[0].log(), RHO[0].log()
    assert kl.k1(logprobs, ref_logprobs)[0].tolist() == pytest.approx([LN2, 0, -LN2])
    assert kl.k2(logprobs, ref_logprobs)[0].tolist() == pytest.approx([LN2**2 / 2, 0, LN2**2 / 2])
    # e^{−r} − 1 + r: 1/2 − 1 + ln 2, 0, 2 − 1 − ln 2
    assert kl.k3(logprobs, ref_logprobs)[0].tolist() == pytest.approx([LN2 - 0.5, 0, 1 - LN2])


def test_exact_kl_and_entropy_by_hand() -> None:
    # ½ ln 2 + 0 − ¼ ln 2, and the other way round ¼ (−ln 2) + 0 + ½ ln 2; then one that is not symmetric
    assert kl.exact(PI.log(), RHO.log()).item() == pytest.approx(LN2 / 4)
    uniform = torch.full((1, 1, 3), 1 / 3, dtype=torch.float64)
    assert kl.exact(PI.log(), uniform.log()).item() == pytest.approx(math.log(3) - 1.5 * LN2)
    assert kl.exact(uniform.log(), PI.log()).item() == pytest.approx((5 * LN2) / 3 - math.log(3))
    assert kl.entropy(PI.log()).item() == pytest.approx(1.5 * LN2)


def test_exact_kl_agrees_with_torch_and_vanishes_for_equals() -> None:
    p, q = (random_log_distributions(4, 5, 7, seed=seed) for seed in (0, 1))
    as_distribution = torch.distributions.Categorical
    torch.testing.assert_close(
        kl.exact(p, q), torch.distributions.kl_divergence(as_distribution(logits=p), as_distribution(logits=q))
    )
    torch.testing.assert_close(kl.entropy(p), as_distribution(logits=p).entropy())
    assert kl.exact(p, p).abs().max() == 0


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased(seed: int) -> None:
    p, q = (random_log_distributions(7, seed=10 * seed + i) for i in range(2))
    true = float((p.exp() * (p - q)).sum())
    expected = {name: float((p.exp() * getattr(kl, name)(p, q)).sum()) for name in ("k1", "k3")}
    assert expected["k1"] == pytest.approx(true, rel=1e-12)
    assert expected["k3"] == pytest.approx(true, rel=1e-12)


def test_bias_of_k2_by_hand() -> None:
    # E k2 = (½ + ¼) · ½ ln² 2 = 0.18017, where the KL is ¼ ln 2 = 0.17329
    expected = (PI[0] * kl.k2(PI[0].log(), RHO[0].log())).sum().item()
    assert expected == pytest.approx(0.375 * LN2**2)
    assert expected - LN2 / 4 == pytest.approx(0.00688, abs=1e-5)


def test_sums_over_tokens_are_unbiased_for_whole_responses() -> None:
    """All responses of two tokens, enumerated: the KL of the joint distributions is the oracle."""
    size = 4
    p1, q1 = (random_log_distributions(size, seed=seed) for seed in (0, 1))
    p2, q2 = (random_log_distributions(size, size, seed=seed) for seed in (2, 3))  # given the first token
    responses = torch.tensor(list(product(range(size), repeat=2)))
    first, second = responses.T
    log_p = torch.stack([p1[first], p2[first, second]], dim=1)
    log_q = torch.stack([q1[first], q2[first, second]], dim=1)
    probability = log_p.sum(1).exp()
    true = float((probability * (log_p.sum(1) - log_q.sum(1))).sum())

    mask = torch.ones_like(responses, dtype=torch.bool)
    exact = kl.exact(torch.stack([p1.expand(16, -1), p2[first]], 1), torch.stack([q1.expand(16, -1), q2[first]], 1))
    for values in (kl.k1(log_p, log_q), kl.k3(log_p, log_q), exact):
        assert float((probability * kl.per_response(values, mask)).sum()) == pytest.approx(true, rel=1e-12)


def test_k2_k3_and_exact_are_never_negative_also_for_tiny_differences() -> None:
    p = random_log_distributions(100, 7, seed=0).float()
    q = (p + 1e-4 * torch.randn(100, 7, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    assert kl.k2(p, q).min() >= 0
    assert kl.k3(p, q).min() >= 0
    # r²/2 to leading order; e^{−r} − 1 taken naively would be off by 6e-8, ten times as much as the value
    torch.testing.assert_close(kl.k3(torch.tensor(-1.0), torch.tensor(-1.0001)), torch.tensor(5e-9), rtol=0.02, atol=0)


def test_impossible_tokens() -> None:
    p = torch.tensor([0.0, 0.5, 0.5]).log()
    assert kl.entropy(p).item() == pytest.approx(LN2)
    assert kl.exact(p, p).item() == 0  # 0 · log(0/0)
    assert kl.exact(p, torch.full((3,), 1 / 3).log()).item() == pytest.approx(math.log(1.5))  # 0 · log(0/⅓)
    assert kl.exact(torch.full((3,), 1 / 3).log(), p).item() == math.inf  # ⅓ · log(⅓/0)


def test_per_response_sums_over_the_mask_alone() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, -1.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert kl.per_response(values, mask).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1.01),  # error 0.1, a tenth of the horizon
        (5.4, 0.99),
        (7.2, 1.02),  # the upper clip, reached exactly
        (60.0, 1.02),
        (4.8, 0.98),  # the lower clip, reached exactly
        (0.0, 0.98),
        (-3.0, 0.98),  # k1 can be negative
    ],
)
def test_adaptive_coefficient_by_hand(measured: float, factor: float) -> None:
    controller = kl.AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(measured, num_episodes=100)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_coefficient_accumulates_and_fixed_one_stays() -> None:
    adaptive, fixed = kl.AdaptiveKL(coef=0.1, target=6.0, horizon=1000), kl.FixedKL(0.1)
    for measured, episodes in ((60.0, 100), (0.0, 50), (6.6, 200)):
        adaptive.update(measured, episodes)
        fixed.update(measured, episodes)
    assert adaptive.coef == pytest.approx(0.1 * 1.02 * 0.99 * 1.02)
    assert fixed.coef == 0.1

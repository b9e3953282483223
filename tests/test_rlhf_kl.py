"""KL estimators against hand-worked categoricals and full enumeration, as values and as penalties."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf import kl, logprobs

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


# ── As penalties ──────────────────────────────────────────────────────────────────────────────────────────────────────
# A policy of free logits, responses of two tokens out of four, everything enumerated: no sampling, no network.

SIZE = 4
SAMPLED = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}


class Chain(NamedTuple):
    """log-softmax of the first token [V], and of the second given the first [V, V]."""

    first: Tensor
    second: Tensor

    def responses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all V² responses: log-probabilities and log-distributions of both tokens. [V²] and [V², V] each"""
        y, z = torch.tensor(list(product(range(SIZE), repeat=2))).T
        return self.first[y], self.second[y, z], self.first.expand(SIZE**2, -1), self.second[y]


@pytest.fixture
def theta() -> Tensor:
    """All logits of the policy, in one vector. [V + V²]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE + SIZE**2, generator=generator, dtype=torch.float64).requires_grad_()


def chain(logits: Tensor) -> Chain:
    return Chain(logits[:SIZE].log_softmax(-1), logits[SIZE:].view(SIZE, SIZE).log_softmax(-1))


REFERENCE = chain(torch.randn(SIZE + SIZE**2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def gradient(value: Tensor, theta: Tensor) -> Tensor:
    return torch.autograd.grad(value, theta, retain_graph=True, allow_unused=True)[0]


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def token_values(name: str, policy: Chain) -> tuple[Tensor, Tensor]:
    """What an estimator says of both tokens of all responses. [V²] each"""
    y, z, first, second = policy.responses()
    ref_y, ref_z, ref_first, ref_second = REFERENCE.responses()
    if name == "exact":
        return kl.exact(first, ref_first), kl.exact(second, ref_second)
    return SAMPLED[name](y, ref_y), SAMPLED[name](z, ref_z)


def as_reward(name: str, theta: Tensor) -> Tensor:
    """E_π[Σ_t ∇log π(y_t|s_t) Σ_{u ≥ t} value_u]: the policy gradient of the values as costs, held fixed."""
    policy = chain(theta)
    y, z, _, _ = policy.responses()
    probability = (y + z).exp().detach()
    at_y, at_z = (values.detach() for values in token_values(name, policy))
    return gradient((probability * (y * (at_y + at_z) + z * at_z)).sum(), theta)


def as_loss(name: str, theta: Tensor) -> Tensor:
    """E_π[Σ_t ∇value_t], the tokens held fixed."""
    policy = chain(theta)
    y, z, _, _ = policy.responses()
    return gradient(((y + z).exp().detach() * sum(token_values(name, policy))).sum(), theta)


def here_and_later(theta: Tensor, divergence: Callable[[Tensor, Tensor], Tensor] = kl_of) -> tuple[Tensor, Tensor]:
    """∇E_π[Σ_t KL_t] by its parts: through π(·|s_t) itself, and through how likely the later states are."""
    policy = chain(theta)
    weight = policy.first.exp()
    at_first, at_second = divergence(policy.first, REFERENCE.first), divergence(policy.second, REFERENCE.second)
    here = gradient(at_first + (weight.detach() * at_second).sum(), theta)
    later = gradient((weight * at_second.detach()).sum(), theta)
    return here, later


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_parts_make_up_the_gradient_of_the_kl_of_whole_responses(theta: Tensor) -> None:
    y, z, _, _ = chain(theta).responses()
    ref_y, ref_z, _, _ = REFERENCE.responses()
    whole = gradient(((y + z).exp() * (y + z - ref_y - ref_z)).sum(), theta)
    here, later = here_and_later(theta)
    assert same(here + later, whole)
    assert min(here.abs().max(), later.abs().max()) > 0.1  # neither is nothing


def test_k1_in_the_reward_is_both_parts_and_in_the_loss_nothing(theta: Tensor) -> None:
    here, later = here_and_later(theta)
    assert same(as_reward("k1", theta), here + later)
    assert same(as_loss("k1", theta), torch.zeros_like(theta))


def test_k2_in_the_loss_is_the_part_through_the_policy(theta: Tensor) -> None:
    here, _ = here_and_later(theta)
    assert same(as_loss("k2", theta), here)


def test_k2_in_the_reward_is_biased_and_lacks_the_part_through_the_policy(theta: Tensor) -> None:
    """It is the gradient of E_π[Σ ½r²] less that of the KL at each state, which k2 in the loss would be."""
    y, z, _, _ = chain(theta).responses()
    ref_y, ref_z, _, _ = REFERENCE.responses()
    of_its_value = gradient(((y + z).exp() * 0.5 * ((y - ref_y) ** 2 + (z - ref_z) ** 2)).sum(), theta)
    here, later = here_and_later(theta)
    assert same(as_reward("k2", theta), of_its_value - here)
    assert (of_its_value - here - later).abs().max() > 0.1  # E k2 is not the KL


def test_k3_in_the_loss_is_the_gradient_of_the_reverse_kl_at_every_state(theta: Tensor) -> None:
    reverse, _ = here_and_later(theta, lambda p, q: kl_of(q, p))
    here, _ = here_and_later(theta)
    assert same(as_loss("k3", theta), reverse)
    assert (reverse - here).abs().max() > 0.1


def test_k3_in_the_reward_has_the_later_states_right_and_the_policys_own_part_wrong(theta: Tensor) -> None:
    here, later = here_and_later(theta)
    reverse, _ = here_and_later(theta, lambda p, q: kl_of(q, p))
    assert same(as_reward("k3", theta), later + here - reverse)


def test_exact_in_the_reward_is_the_later_states_and_in_the_loss_the_rest(theta: Tensor) -> None:
    here, later = here_and_later(theta)
    assert same(as_reward("exact", theta), later)
    assert same(as_loss("exact", theta), here)
    assert same(as_reward("exact", theta) + as_loss("exact", theta), as_reward("k1", theta))


def test_exact_in_reward_and_loss_has_less_variance_than_k1_in_the_reward(theta: Tensor) -> None:
    """Response by response, summed over the parameters: E‖g‖², where both have the same mean."""
    policy = chain(theta)
    y, z, _, _ = policy.responses()
    probability = (y + z).exp().detach()
    second_moment = {}
    for name in ("k1", "exact"):
        at_y, at_z = token_values(name, policy)
        costs = y * (at_y + at_z).detach() + z * at_z.detach()
        if name == "exact":
            costs = costs + at_y + at_z
        norms = torch.stack([gradient(cost, theta).square().sum() for cost in costs])
        second_moment[name] = float((probability * norms).sum())
    assert second_moment["exact"] < second_moment["k1"]


# ── Comparisons ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Given(NamedTuple):
    """Distributions that are simply there, and handed out as copies."""

    log_distributions: Tensor

    def rows(self, rows: slice) -> Tensor:
        return self.log_distributions[rows].clone()


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_comparisons_against_a_loop(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    num, size = 7, 5
    monkeypatch.setattr(logprobs, "MIN_ROWS", 1)
    monkeypatch.setitem(logprobs.CHUNK, "cpu", rows_at_once * size)
    p, *others = (random_log_distributions(num, size, seed=seed) for seed in range(3))
    tokens = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    given = dict(zip(("near", "far"), map(Given, others), strict=True))
    compared = kl.compare(Given(p), given, tokens, size)
    for n, token in enumerate(tokens.tolist()):
        mine = p[n].exp().tolist()
        assert compared.logprobs[n].item() == pytest.approx(math.log(mine[token]))
        assert compared.entropy[n].item() == pytest.approx(-sum(x * math.log(x) for x in mine))
        for name, log_q in zip(given, others, strict=True):
            theirs = log_q[n].exp().tolist()
            assert compared.other_logprobs[name][n].item() == pytest.approx(math.log(theirs[token]))
            expected = sum(x * math.log(x / q) for x, q in zip(mine, theirs, strict=True))
            assert compared.kl[name][n].item() == pytest.approx(expected)
    assert compared.logprobs.shape == compared.kl["far"].shape == (num,)


def test_comparisons_go_through_flat_names_and_back() -> None:
    p, q = (random_log_distributions(2, 5, seed=seed) for seed in range(2))
    compared = kl.compare(Given(p), {"a/b": Given(q)}, torch.tensor([1, 2]), 5)
    tensors = compared.tensors()
    assert sorted(tensors) == ["entropy", "kl/a/b", "logprobs", "logprobs/a/b"]
    assert tensors["kl/a/b"] is compared.kl["a/b"]
    assert kl.Comparison.of(tensors, ["a/b"]) == compared
    alone = kl.compare(Given(p), {}, torch.tensor([1, 2]), 5)
    assert (alone.kl, alone.other_logprobs) == ({}, {})

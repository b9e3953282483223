"""PPO's token rewards, advantages and losses: hand-worked tables, brute force, both sides of every kink."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.ppo import gae, learning_rate_factor, policy_loss, token_rewards, value_loss

NAN = torch.nan


def random_case(seed: int, rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Random rewards and values in float64 with garbage after each row's end. → rewards, values, mask, lengths"""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    lengths = [1, width, *torch.randint(1, width, (rows - 2,), generator=generator).tolist()]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return rewards.where(mask, NAN), values.where(mask, 1e9), mask, lengths


def test_score_lands_on_the_last_response_token_and_the_kl_penalty_on_every_one() -> None:
    scores = torch.tensor([5.0, 7.0, -3.0])
    token_kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, NAN, NAN], [-0.1, 0.2, torch.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    expected = torch.tensor([[-0.2, -0.4, -0.6 + 5], [-0.8 + 7, 0, 0], [0.2, -0.4 - 3, 0]])
    torch.testing.assert_close(token_rewards(scores, token_kl, mask, kl_coef=2.0), expected)


def test_gae_by_hand() -> None:
    # γ = ½, λ = ½, so γλ = ¼. First row, from the end:
    #   δ₂ = 4 + 0 − 2 = 2         A₂ = 2
    #   δ₁ = 2 + ½ · 2 − 2 = 1     A₁ = 1 + ¼ · 2 = 1.5
    #   δ₀ = 1 + ½ · 2 − 1 = 1     A₀ = 1 + ¼ · 1.5 = 1.375
    # Second row, two tokens: δ₁ = 2 − 2 = 0, δ₀ = 1 + ½ · 2 − 1 = 1.
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 8.0]])
    values = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.375, 1.5, 2], [1, 0, 0]]
    assert returns.tolist() == [[2.375, 3.5, 4], [2, 2, 0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.8), (1.0, 0.95), (0.7, 1.0), (0.7, 0.0), (1.0, 1.0)])
def test_gae_is_the_double_sum(gamma: float, gae_lambda: float) -> None:
    rewards, values, mask, lengths = random_case(seed=0)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for i, length in enumerate(lengths):
        v = [*values[i, :length].tolist(), 0.0]
        delta = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            total = sum((gamma * gae_lambda) ** step * delta[t + step] for step in range(length - t))
            assert float(advantages[i, t]) == pytest.approx(total, abs=1e-12)
            assert float(returns[i, t]) == pytest.approx(total + v[t], abs=1e-12)
    assert advantages[~mask].abs().sum() == 0
    assert returns[~mask].abs().sum() == 0


def test_lambda_one_gives_discounted_returns_minus_values() -> None:
    rewards, values, mask, lengths = random_case(seed=1)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    for i, length in enumerate(lengths):
        for t in range(length):
            discounted = sum(0.9 ** (s - t) * float(rewards[i, s]) for s in range(t, length))
            assert float(returns[i, t]) == pytest.approx(discounted, abs=1e-12)
            assert float(advantages[i, t]) == pytest.approx(discounted - float(values[i, t]), abs=1e-12)


def test_lambda_zero_gives_one_step_errors() -> None:
    rewards, values, mask, lengths = random_case(seed=2)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    for i, length in enumerate(lengths):
        following = [*values[i, 1:length].tolist(), 0.0]
        for t in range(length):
            assert float(advantages[i, t]) == pytest.approx(
                float(rewards[i, t]) + 0.9 * following[t] - float(values[i, t]), abs=1e-12
            )


def test_gae_leaves_its_inputs_alone() -> None:
    rewards, values, mask, _ = random_case(seed=3)
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, 0.9, 0.9)
    torch.testing.assert_close((rewards, values), before, equal_nan=True, rtol=0, atol=0)


# ratio, advantage, loss = −min(ratio · A, clip(ratio, 0.8, 1.2) · A), its derivative by log π, gradient cut
POLICY_CASES = [
    (0.5, 2.0, -1.0, -1.0, False),  # worse than before although good: pull it back up
    (0.9, 2.0, -1.8, -1.8, False),
    (1.1, 2.0, -2.2, -2.2, False),
    (1.5, 2.0, -2.4, 0.0, True),  # good, and likelier already
    (0.5, -2.0, 1.6, 0.0, True),  # bad, and rarer already
    (0.9, -2.0, 1.8, 1.8, False),
    (1.1, -2.0, 2.2, 2.2, False),
    (1.5, -2.0, 3.0, 3.0, False),  # likelier although bad: push it down
    (1.5, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "cut"), POLICY_CASES)
def test_policy_loss_on_both_sides_of_both_kinks(
    ratio: float, advantage: float, loss: float, gradient: float, cut: bool
) -> None:
    old_logprobs = torch.tensor([[-1.5]], dtype=torch.float64)
    logprobs = (old_logprobs + math.log(ratio)).requires_grad_()
    losses, clipped = policy_loss(logprobs, old_logprobs, torch.tensor([[advantage]]), clip_range=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert clipped.item() is cut


# value, return, loss = ½ max((V − R)², (clip(V, 0.8, 1.2) − R)²), its derivative by V, gradient cut; V_old = 1
VALUE_CASES = [
    (1.1, 2.0, 0.405, -0.9, False),
    (1.1, 0.0, 0.605, 1.1, False),
    (1.5, 2.0, 0.32, 0.0, True),  # on the way to the return, and far enough
    (1.5, 0.0, 1.125, 1.5, False),  # moved away from it
    (0.5, 0.0, 0.32, 0.0, True),
    (0.5, 2.0, 1.125, -1.5, False),
]


@pytest.mark.parametrize(("value", "target", "loss", "gradient", "cut"), VALUE_CASES)
def test_value_loss_on_both_sides_of_both_kinks(
    value: float, target: float, loss: float, gradient: float, cut: bool
) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    losses, clipped = value_loss(values, torch.tensor([[1.0]]), torch.tensor([[target]]), clip_range=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient)
    assert clipped.item() is cut


def test_rounding_is_no_clipping() -> None:
    """V_old + (V − V_old) is not always V in float32, though nothing is clipped."""
    generator = torch.Generator().manual_seed(0)
    values, old_values = torch.randn(2, 50, 20, generator=generator) * 0.05
    returns = torch.randn(50, 20, generator=generator)
    assert (old_values + (values - old_values) != values).any()
    assert not value_loss(values, old_values, returns, clip_range=1.0)[1].any()


def config(**settings: float) -> PPOConfig:
    return PPOConfig(final_lr_fraction=0.1, **settings)


def test_learning_rate_rises_then_falls_by_hand() -> None:
    # Two updates of warm-up, the peak at the third, then a fall by 0.9 in seven steps.
    factors = [learning_rate_factor(update, config(updates=10, warmup_updates=2)) for update in range(1, 11)]
    expected = [1 / 3, 2 / 3, *(1 - 0.9 * step / 7 for step in range(8))]
    assert factors == pytest.approx(expected)


def test_learning_rate_of_short_runs() -> None:
    assert learning_rate_factor(1, config(updates=1, warmup_updates=5)) == 1
    factors = [learning_rate_factor(update, config(updates=3, warmup_updates=5)) for update in (1, 2, 3)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1])
    assert learning_rate_factor(1, config(updates=4, warmup_updates=0)) == 1
    assert learning_rate_factor(4, config(updates=4, warmup_updates=0)) == pytest.approx(0.1)

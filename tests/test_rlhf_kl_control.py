"""The KL coefficient's controllers: steps by hand, and a plant that they steer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from rlhf.kl_control import AdaptiveKL, FixedKL, TargetKL


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
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(measured, num_episodes=100)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_coefficient_accumulates_and_fixed_one_stays() -> None:
    adaptive, fixed = AdaptiveKL(coef=0.1, target=6.0, horizon=1000), FixedKL(0.1)
    for measured, episodes in ((60.0, 100), (0.0, 50), (6.6, 200)):
        adaptive.update(measured, episodes)
        fixed.update(measured, episodes)
    assert adaptive.coef == pytest.approx(0.1 * 1.02 * 0.99 * 1.02)
    assert fixed.coef == 0.1


E = math.e


@pytest.mark.parametrize(
    ("measured", "exponents"),
    [
        # gain · (Σe + e), after every measurement, in units of the gain
        ([6.0, 6.0], [0, 0]),  # on target
        ([6 * E], [2]),  # the integral and the proportional part, one each
        ([6 * E, 6.0], [2, 1]),  # what the integral has gathered stays
        ([6 * E, 6 / E], [2, -1]),
        ([6 * math.sqrt(E), 6 * math.sqrt(E)], [1, 1.5]),
        ([6 * E**3, 6.0], [2, 1]),  # the upper clip
        ([6 / E**3], [-2]),  # the lower clip
        ([0.0], [-2]),
        ([-3.0], [-2]),  # a noisy KL can be negative
        ([math.inf], [2]),
    ],
)
def test_target_coefficient_by_hand(measured: list[float], exponents: list[float]) -> None:
    controller = TargetKL(coef=0.2, target=6.0, gain=0.3)
    for kl, exponent in zip(measured, exponents, strict=True):
        controller.update(kl, num_episodes=64)
        assert controller.coef == pytest.approx(0.2 * math.exp(0.3 * exponent), rel=1e-12)


def test_target_steps_do_not_depend_on_the_number_of_episodes() -> None:
    few, many = TargetKL(0.1, 6.0, 0.1), TargetKL(0.1, 6.0, 0.1)
    few.update(9.0, 8)
    many.update(9.0, 8000)
    assert few.coef == many.coef


MAKERS: list[Callable[[], FixedKL]] = [
    lambda: FixedKL(0.1),
    lambda: AdaptiveKL(0.1, target=6.0, horizon=1000),
    lambda: TargetKL(0.1, target=6.0, gain=0.2),
]


@pytest.mark.parametrize("make", MAKERS, ids=["fixed", "adaptive", "target"])
def test_a_restored_controller_goes_on_as_the_one_it_was_taken_from(make: Callable[[], FixedKL]) -> None:
    original = make()
    for measured in (9.0, 3.0, 20.0):
        original.update(measured, 64)
    state = json.loads(json.dumps(original.state()))  # plain numbers
    original.update(8.0, 64)
    restored = make()
    restored.restore(state)
    restored.update(8.0, 64)
    assert restored.coef == original.coef
    assert restored.state() == original.state()


@pytest.mark.parametrize("strength", [0.02, 0.6, 20.0])
def test_target_control_ends_at_its_target(strength: float) -> None:
    """A run whose KL settles at c/β: β has to be c/6, which may be far from where it starts."""
    controller = TargetKL(coef=0.1, target=6.0, gain=0.1)
    measured = [0.0]
    for _ in range(150):
        measured.append(strength / controller.coef)
        controller.update(measured[-1], 64)
    assert measured[-1] == pytest.approx(6.0, rel=0.05)
    assert controller.coef == pytest.approx(strength / 6.0, rel=0.05)


def test_target_control_ends_at_its_target_where_the_kl_follows_slowly() -> None:
    """Each update goes a fifth of the way to where β would have the KL."""
    controller, kl = TargetKL(coef=0.1, target=6.0, gain=0.1), 0.01
    for _ in range(300):
        kl += 0.2 * (0.06 / controller.coef - kl)
        controller.update(kl, 64)
    assert kl == pytest.approx(6.0, rel=0.05)


def test_adaptive_control_moves_towards_its_target() -> None:
    controller, kl = AdaptiveKL(coef=0.1, target=6.0, horizon=1000), 60.0
    for _ in range(50):
        before = abs(math.log(kl / 6.0))
        controller.update(kl, 64)
        kl = 6.0 / controller.coef
        assert abs(math.log(kl / 6.0)) < before

"""Steps that are skipped, and when the run gives up."""

from __future__ import annotations

import math

import pytest

from rlhf.guards import DivergedError, StepGuard

FINE = (0.5, 1.0, {"policy": 1.0, "value": 2.0})
BAD = {
    "the loss is nan": (math.nan, 1.0, {"policy": 1.0}),
    "the loss is -inf": (-math.inf, 1.0, {"policy": 1.0}),
    "the gradient of the value model is inf": (0.5, 1.0, {"policy": 1.0, "value": math.inf}),
    "the gradient of the policy model is nan": (0.5, 1.0, {"policy": math.nan, "value": 1.0}),
    "the mean ratio is 10.1, above max_ratio=10": (0.5, 10.1, {"policy": 1.0}),
    "the mean ratio is inf, above max_ratio=10": (0.5, math.inf, {"policy": 1.0}),
    "the mean ratio is nan, above max_ratio=10": (0.5, math.nan, {"policy": 1.0}),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_step_that_is_off_is_skipped_and_one_too_many_ends_the_run(reason: str) -> None:
    guard = StepGuard(max_ratio=10.0, max_skipped=3)
    assert guard.allows(*FINE)
    assert not guard.allows(*BAD[reason])
    assert not guard.allows(*BAD[reason])
    assert guard.in_a_row == 2
    with pytest.raises(DivergedError) as error:
        guard.allows(*BAD[reason])
    message = str(error.value)
    assert message.startswith(f"3 optimizer steps in a row had to be skipped, the last because {reason}; start again")
    assert "\n" not in message


def test_a_good_step_starts_the_count_anew() -> None:
    guard = StepGuard(max_ratio=10.0, max_skipped=2)
    for bad in BAD.values():
        assert not guard.allows(*bad)
        assert guard.allows(*FINE)
        assert guard.in_a_row == 0


def test_the_largest_ratio_allowed_is_allowed_and_large_losses_are() -> None:
    guard = StepGuard(max_ratio=10.0, max_skipped=1)
    assert guard.allows(1e30, 10.0, {"policy": 1e30})
    assert guard.allows(0.0, 0.0, {})
    with pytest.raises(DivergedError):
        guard.allows(0.0, 10.001, {})

"""Masked statistics by hand: denominators, and values outside the mask that must not count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.masking import mask_through_first, masked_mean, masked_sum, masked_var, masked_whiten

MASK = torch.tensor([[True, True, False], [True, False, False]])
X = torch.tensor([[1.0, 2.0, 50.0], [4.0, 60.0, 70.0]])
BAD = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, -torch.inf]])

STATISTICS: list[Callable[[Tensor, Tensor], Tensor]] = [
    masked_sum,
    lambda x, mask: masked_sum(x, mask, dim=1),
    masked_mean,
    lambda x, mask: masked_mean(x, mask, dim=1),
    masked_var,
    masked_whiten,
    lambda x, mask: masked_whiten(x, mask, shift_mean=False),
]


def test_sum_mean_and_variance_by_hand() -> None:
    # 1, 2 and 4 count: n = 3, mean 7/3, variance ((4/3)² + (1/3)² + (5/3)²) / 3 = 14/9
    assert masked_sum(X, MASK).item() == 7
    assert masked_mean(X, MASK).item() == pytest.approx(7 / 3)
    assert masked_var(X, MASK).item() == pytest.approx(14 / 9)


def test_along_one_dimension_each_row_has_its_own_denominator() -> None:
    assert masked_sum(X, MASK, dim=1).tolist() == [3, 4]
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 4]
    assert masked_sum(X, MASK, dim=0).tolist() == [5, 2, 0]


def test_mean_of_nothing_is_nan_and_its_sum_zero() -> None:
    nothing = torch.zeros(2, dtype=torch.bool)
    assert masked_sum(torch.ones(2), nothing).item() == 0
    assert masked_mean(torch.ones(2), nothing).isnan()


def test_whitening_by_hand() -> None:
    scale = (9 / 14) ** 0.5
    shifted = torch.tensor([[-4 / 3, -1 / 3, 0], [5 / 3, 0, 0]]) * scale
    torch.testing.assert_close(masked_whiten(X, MASK), shifted)
    kept = torch.where(MASK, shifted + 7 / 3, 0.0)
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), kept)


@pytest.mark.parametrize(("shift_mean", "mean"), [(True, lambda x: 0.0), (False, lambda x: float(x.mean()))])
def test_whitened_values_have_variance_one_and_the_mean_named(
    shift_mean: bool, mean: Callable[[Tensor], float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(50, 40, generator=generator)
    mask = torch.rand(50, 40, generator=generator) < 0.5
    values = masked_whiten(x, mask, shift_mean=shift_mean)[mask].double()
    assert float(values.mean()) == pytest.approx(mean(x[mask].double()), abs=1e-5)
    assert float(values.var(correction=0)) == pytest.approx(1, abs=1e-5)


def test_equal_values_whiten_to_zero() -> None:
    assert masked_whiten(torch.full((2, 3), 5.0), MASK).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_outside_the_mask_leaks(statistic: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.testing.assert_close(statistic(BAD, MASK), statistic(X, MASK))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_outside_the_mask_leaks_into_gradients(statistic: Callable[[Tensor, Tensor], Tensor]) -> None:
    gradients = []
    for values in (X, BAD):
        x = values.clone().requires_grad_()
        (statistic(x, MASK) ** 3).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[1][~MASK].tolist() == [0, 0, 0]
    assert gradients[1][MASK].abs().sum() > 0.1


def test_mask_through_the_first_stop_by_hand() -> None:
    tokens = torch.tensor([[7, 9, 5, 9], [9, 9, 9, 9], [5, 6, 7, 8], [5, 6, 7, 9]])
    expected = [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, True],
        [True, True, True, True],
    ]
    assert mask_through_first(tokens, 9).tolist() == expected

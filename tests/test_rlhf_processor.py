"""Products by oneDNN are torch's products. Every check runs in a process of its own, which it sets up for good."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import forked
from torch import Tensor

from rlhf import processor

pytestmark = pytest.mark.skipif(not processor.onednn_available(), reason="this torch has no oneDNN")


def prepared(check: Callable[[], None], monkeypatch: pytest.MonkeyPatch, large: int = processor.LARGE) -> None:
    """Run a check in a prepared process, where products from ``large`` multiplications on go to oneDNN."""

    def run() -> None:
        processor.prepare()
        processor.prepare()
        check()

    monkeypatch.setattr(processor, "LARGE", large)
    assert forked(run) == [0]


def matrices(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_close(result: Tensor, exact: Tensor) -> None:
    assert result.dtype == torch.float32
    assert result.shape == exact.shape
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("large", [1, 2**40], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (64, 33, 129), (0, 3, 4), (4, 0, 3)])
def test_products_are_torchs(shape: tuple[int, int, int], large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, inner, columns = shape
    a, b, bias, total = matrices((rows, inner), (columns, inner), (columns,), (rows, columns))

    def check() -> None:
        product = a.double() @ b.double().T
        assert_close(a @ b.T, product)
        assert_close(a.T.contiguous().T @ b.T.contiguous(), product)
        assert_close(torch.nn.functional.linear(a, b, bias), product + bias.double())
        assert_close(torch.addmm(total, a, b.T, beta=0.5, alpha=2), 0.5 * total.double() + 2 * product)
        assert_close(total.clone().addmm_(a, b.T), total.double() + product)
        assert_close(total.clone().addmm_(a, b.T, beta=0.5, alpha=2), 0.5 * total.double() + 2 * product)

    prepared(check, monkeypatch, large)


def test_only_large_products_of_float32_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    onednn = processor._onednn
    monkeypatch.setattr(processor, "_onednn", lambda a, *rest: calls.append(tuple(a.shape)) or onednn(a, *rest))
    a, b = matrices((8, 4), (4, 2))

    def check() -> None:
        for dtype in (torch.float64, torch.bfloat16):
            a.to(dtype) @ b.to(dtype)
        a[:7] @ b
        assert calls == []
        a @ b
        assert calls == [(8, 4)]

    prepared(check, monkeypatch, large=64)


def test_a_sum_in_place_goes_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "AT_A_TIME", 10)
    total, a, b = matrices((7, 4), (7, 5), (5, 4))

    def check() -> None:
        expected = total.double() + a.double() @ b.double()
        assert total.addmm_(a, b) is total
        assert_close(total, expected)

    prepared(check, monkeypatch, large=1)


def test_gradients_of_any_order_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, along = matrices((6, 5), (5, 4), (6, 5))

    def derivatives(a: Tensor, b: Tensor, along: Tensor) -> list[Tensor]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        first = torch.autograd.grad((a @ b).pow(3).sum(), (a, b), create_graph=True)
        second = torch.autograd.grad((first[0] * along).sum(), (a, b))
        _, forward = torch.func.jvp(lambda a: (a @ b).sin(), (a,), (along,))
        return [*first, *second, forward]

    expected = derivatives(a.double(), b.double(), along.double())

    def check() -> None:
        for result, exact in zip(derivatives(a, b, along), expected, strict=True):
            torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)

    prepared(check, monkeypatch, large=1)


def test_what_does_not_fit_together_is_refused_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3)):
            with pytest.raises(RuntimeError, match=r"cannot be multiplied|dtype|matri"):
                torch.mm(torch.zeros(2, 2), wrong)
        with pytest.raises(RuntimeError, match="must match the existing size"):
            torch.addmm(torch.zeros(7), torch.zeros(2, 3), torch.zeros(3, 5))

    prepared(check, monkeypatch, large=1)


def test_a_product_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrices((96, 80), (80, 112))

    def check() -> None:
        once = a @ b
        assert all(torch.equal(a @ b, once) for _ in range(20))

    prepared(check, monkeypatch, large=1)

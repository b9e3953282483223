"""What makes a process fast and small on a CPU. The commands do it at their start, for the process is theirs.

Products of float32 matrices come from oneDNN: torch takes them from MKL, which on processors that are not Intel's
leaves half of the vector unit idle (measured: half the speed at every size that matters). Both round alike, by float32
sums in some order.

All threads share one heap: of several, each keeps what it frees to itself (measured: a tenth of a run's memory).
"""

from __future__ import annotations

import ctypes
import warnings

import torch
from torch import Tensor
from torch.library import Library

# Multiplications from which on oneDNN's longer way to the first of them has paid off.
LARGE = 2**22
M_ARENA_MAX = -8  # of glibc's malloc.h
AT_A_TIME = 2**21  # elements of a product that is added to something; what a processor's cache holds

_overrides: list[Library] = []  # a kernel is in place for as long as its library is held


def prepare() -> None:
    """Set this process up for training and sampling on a CPU; done twice, it changes nothing more."""
    # The tails of peaked distributions hold numbers below 1e-38, worth nothing, which slow a processor's products down.
    torch.set_flush_denormal(True)
    share_one_heap()
    if not _overrides and onednn_available():
        library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
            library.impl("mm", product, "CPU")
            library.impl("addmm", product_and_sum, "CPU")
            library.impl("addmm_", add_product, "CPU")
        _overrides.append(library)


def share_one_heap() -> bool:
    """Keep the C library's allocator from making heaps for threads. False where it is not glibc's."""
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (AttributeError, OSError, TypeError):
        return False


def onednn_available() -> bool:
    """Whether this torch has oneDNN, and lets it be called for one product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """A·B, as ``torch.mm``. [M, K], [K, N] → [M, N]"""
    if _suits(a, b):
        return _onednn(a, b, None)
    return torch.mm(a, b, out=a.new_empty(_shape(a, b)))


def product_and_sum(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """β·bias + α·A·B, as ``torch.addmm``. [N] or [M, N], [M, K], [K, N] → [M, N]"""
    if beta == alpha == 1 and _suits(a, b) and bias.shape == b.shape[1:] and bias.dtype == a.dtype:
        return _onednn(a, b, bias)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(_shape(a, b)))


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """total ← β·total + α·A·B, as ``torch.Tensor.addmm_``, some rows at a time. [M, N], [M, K], [K, N] → [M, N]"""
    if not (beta == alpha == 1 and _suits(a, b) and total.shape == (a.shape[0], b.shape[1]) and total.dtype == a.dtype):
        return torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)
    rows = max(1, AT_A_TIME // b.shape[1])
    for part, part_of_a in zip(total.split(rows), a.split(rows), strict=True):
        part.add_(_onednn(part_of_a, b, None))
    return total


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether this is a product of float32 matrices that is large enough; what does not fit is torch's to refuse."""
    if not a.dtype == b.dtype == torch.float32 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= LARGE


def _shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of the product; nothing where there is none, so that torch says what is wrong."""
    return (a.shape[0], b.shape[1]) if a.dim() == b.dim() == 2 else (0,)

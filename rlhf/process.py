"""Settings of the process that training runs in, which only a command makes, never an import."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
LARGEST = 2**31 - 1


def prepare_process() -> None:
    """Make training on a CPU cheaper: freed memory is kept for the next tensor, and denormal numbers count as 0.

    glibc maps every large block anew and gives it back, so that each tensor of a forward pass is paid for again in page
    faults, a few per cent of an update. Denormals appear in the tails of peaked distributions, where they are worth
    nothing and make products several times slower.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent where the C library is not glibc
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGEST)
            mallopt(M_TRIM_THRESHOLD, LARGEST)

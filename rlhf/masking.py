"""Statistics over the tokens that count.

One legend for the package: B responses, T response tokens, V vocabulary. A mask is a bool tensor and True means
"counts". The denominator is always the number of True entries, never the padded size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ x over the entries where ``mask`` is True. Entries outside the mask may hold anything, NaN and Inf included."""
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ x / n over the entries where ``mask`` is True, n their number (along ``dim`` when given); NaN where n = 0."""
    return masked_sum(x, mask, dim) / (mask.sum() if dim is None else mask.sum(dim))


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance Σ (x − mean)² / n over the n entries where ``mask`` is True."""
    return masked_mean((x - masked_mean(x, mask)).where(mask, 0.0) ** 2, mask)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 over the mask and, with ``shift_mean``, to mean 0; zero outside the mask.

    y = (x − mean) / √(var + 1e-8), plus the mean again when ``shift_mean`` is False (so the mean is kept and only the
    spread changes, as for rewards in Ziegler et al. 2019). The variance is the biased one, over the n masked entries.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean).where(mask, 0.0) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return whitened if shift_mean else (whitened + mean).where(mask, 0.0)


def mask_through_first(tokens: Tensor, stop_token_id: int) -> Tensor:
    """True through the first ``stop_token_id`` of each row; all True in a row without one. [B, T] → [B, T]"""
    stops = (tokens == stop_token_id).long()
    stops_before = stops.cumsum(dim=1) - stops
    return stops_before == 0

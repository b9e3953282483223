"""What keeps a run from training on nonsense: steps that are skipped, and when it gives up."""

from __future__ import annotations

import math


class DivergedError(ValueError):
    """Training has run away; the message says how, and what to try."""


class StepGuard:
    """Skips optimizer steps whose loss, gradient or ratio is off, and stops the run after too many in a row.

    A step is skipped when its loss or gradient is not finite, or when the mean of π/π_old over its tokens is above
    ``max_ratio``: the policy then has moved so far from the one that sampled that the surrogate says nothing.
    """

    def __init__(self, max_ratio: float, max_skipped: int) -> None:
        self.max_ratio = max_ratio
        self.max_skipped = max_skipped
        self.in_a_row = 0

    def allows(self, loss: float, ratio: float, grad_norms: dict[str, float]) -> bool:
        """Whether to take the step. Raises DivergedError when it is one skipped step too many."""
        reason = self._reason(loss, ratio, grad_norms)
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if self.in_a_row >= self.max_skipped:
            raise DivergedError(
                f"{self.in_a_row} optimizer steps in a row had to be skipped, the last because {reason}; start again "
                "with lower learning rates, a lower clip_range or a higher kl_coef"
            )
        return reason is None

    def _reason(self, loss: float, ratio: float, grad_norms: dict[str, float]) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        for name, norm in grad_norms.items():
            if not math.isfinite(norm):
                return f"the gradient of the {name} model is {norm}"
        if not ratio <= self.max_ratio:
            return f"the mean ratio is {ratio:.3g}, above max_ratio={self.max_ratio:g}"
        return None

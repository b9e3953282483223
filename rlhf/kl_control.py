"""The coefficient β of the KL penalty: fixed, or steered towards a target KL in nats per response.

Every controller has a coefficient ``coef`` and is told, after every update, the KL measured on its batch. Both that
steer work on log β, so that β stays positive and a step means the same at any size of β.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


class FixedKL:
    """A KL coefficient that stays what it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_episodes: int) -> None:
        """Take note of a batch's KL, in nats per response, and of its number of episodes."""

    def state(self) -> dict[str, float]:
        """What a resumed run needs to go on."""
        return dict(vars(self))

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what :meth:`state` gave."""
        vars(self).update(state)


class AdaptiveKL(FixedKL):
    """Proportional control in log space (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

    error = clip(KL / target − 1, −0.2, 0.2);  coef ← coef · (1 + error · n / horizon)

    ``target`` is in nats per response, ``horizon`` in episodes, n is the number of episodes since the last call. It is
    slow on purpose: ``horizon`` episodes at the largest error change β by a fifth.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_episodes / self.horizon


class TargetKL(FixedKL):
    """Proportional–integral control of log β, for a KL that ends at the target and not merely moves towards it.

    e = clip(log(KL / target), −1, 1);  Σ ← Σ + e;  coef = coef₀ · exp(gain · (Σ + e))

    The integral is what removes the lasting error of a proportional rule (as in Stooke et al. 2020, arXiv 2007.03964,
    for constraints); ``gain`` is the change of log β by an update whose KL is e times the target.
    """

    def __init__(self, coef: float, target: float, gain: float) -> None:
        super().__init__(coef)
        self.start = coef
        self.target = target
        self.gain = gain
        self.integral = 0.0

    def update(self, kl: float, num_episodes: int) -> None:
        error = math.log(max(kl, 1e-6) / self.target)
        error = min(max(error, -1.0), 1.0)
        self.integral += error
        self.coef = self.start * math.exp(self.gain * (self.integral + error))

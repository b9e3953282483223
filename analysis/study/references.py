"""Which models the references of a study's arms are made of, as its configuration writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.study.config import Study


def reference_weights(study: Study, arm: str) -> dict[str, float] | None:
    """{model: its weight} of the average that an arm's KL is to, as the configuration writes models.

    None for an arm whose reference is no average of models: none at all, several KLs, a mixture, a moving average.
    """
    settings = {**study.ppo, **study.arms[arm]}
    if settings.get("reference_kind", "soup") != "soup" or not settings.get("reference"):
        return None
    return _average(settings["reference"], settings.get("reference_weights"))


def arm_of_model(study: Study, model: str) -> str | None:
    """The arm whose reference is a measured model: the same models, equally weighted."""
    wanted = _average(study.measure.models[model])
    return next((arm for arm in study.arms if _equal(reference_weights(study, arm), wanted)), None)


def mixing_weights(study: Study) -> dict[str, float]:
    """{arm: α}, in order of α, of the arms whose reference is (1 − α) of the baseline's and α of the other model.

    That is the second model of the treatment's reference; without one, there are no such arms.
    """
    base, treatment = (reference_weights(study, arm) for arm in (study.compare.baseline, study.compare.treatment))
    if base is None or treatment is None or len(base) != 1 or len(treatment) != 2 or not set(base) < set(treatment):
        return {}
    (other,) = set(treatment) - set(base)
    found = {}
    for arm in study.arms:
        weights = reference_weights(study, arm)
        if weights is not None and set(weights) <= set(treatment):
            found[arm] = weights.get(other, 0.0)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _average(models: Any, weights: Sequence[float] | None = None) -> dict[str, float]:
    """{model: weight}, of sum 1, without models of weight 0."""
    names = [models] if isinstance(models, str) else list(models)
    weights = weights or [1.0] * len(names)
    total: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        total[name] = total.get(name, 0.0) + weight / sum(weights)
    return {name: weight for name, weight in total.items() if weight}


def _equal(one: Mapping[str, float] | None, other: Mapping[str, float]) -> bool:
    return one is not None and set(one) == set(other) and all(math.isclose(one[name], other[name]) for name in other)


def measured_model(study: Study, weights: Mapping[str, float] | None, names: Sequence[str]) -> str | None:
    """Which of some measured models has these weights."""
    return next((name for name in names if _equal(weights, _average(study.measure.models[name]))), None)

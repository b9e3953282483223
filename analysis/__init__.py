"""Measuring what a soup reference changes: weight-space landscapes, distances between models, reward against KL.

Compute, then draw: every function returns a dataclass of arrays with ``save`` and ``load``; :mod:`analysis.plots` turns
each into a figure. ``python -m analysis`` does both.

    from analysis import kl_matrix, line, metrics, plane, plots

    path = line(["sft1", "sft2"], {"loss": metrics.loss(examples, tokenizer)})
    plots.plot_line(path, "loss")
"""

from __future__ import annotations

from analysis import directions, metrics
from analysis.barrier import Barrier, barriers
from analysis.curvature import Hessian, hessian
from analysis.divergence import KLMatrix, kl_matrix
from analysis.exploration import Exploration, explore
from analysis.fisher import FisherPath, fisher_path
from analysis.frontier import (
    BestOfN,
    IdealFrontier,
    ScoredSamples,
    best_of_n,
    frontier_of_samples,
    ideal_frontier,
    score_samples,
)
from analysis.geometry import KLGeometry, SoupMixtureSlope, kl_geometry, soup_mixture_slope
from analysis.landscape import Line, Plane
from analysis.paths import line
from analysis.planes import plane
from analysis.run_frontier import (
    OveroptimisationFit,
    RewardKLFrontier,
    fit_overoptimisation,
    reward_kl_frontier,
)

__all__ = [
    "Barrier",
    "BestOfN",
    "Exploration",
    "FisherPath",
    "Hessian",
    "IdealFrontier",
    "KLGeometry",
    "KLMatrix",
    "Line",
    "OveroptimisationFit",
    "Plane",
    "RewardKLFrontier",
    "ScoredSamples",
    "SoupMixtureSlope",
    "barriers",
    "best_of_n",
    "directions",
    "explore",
    "fisher_path",
    "fit_overoptimisation",
    "frontier_of_samples",
    "hessian",
    "ideal_frontier",
    "kl_geometry",
    "kl_matrix",
    "line",
    "metrics",
    "plane",
    "reward_kl_frontier",
    "score_samples",
    "soup_mixture_slope",
]

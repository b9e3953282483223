"""Measuring what a soup reference changes: weight-space landscapes and distances between models.

Compute, then draw: every function returns a dataclass of arrays with ``save`` and ``load``; :mod:`analysis.plots` turns
each into a figure.

    from analysis import kl_matrix, line, metrics, plane, plots

    path = line(["sft1", "sft2"], {"loss": metrics.loss(examples, tokenizer)})
    plots.plot_line(path, "loss")
"""

from __future__ import annotations

from analysis import metrics
from analysis.curvature import Hessian, hessian
from analysis.divergence import KLMatrix, kl_matrix
from analysis.fisher import FisherPath, fisher_path
from analysis.geometry import KLGeometry, SoupMixtureSlope, kl_geometry, soup_mixture_slope
from analysis.landscape import Line, Plane, line, plane

__all__ = [
    "FisherPath",
    "Hessian",
    "KLGeometry",
    "KLMatrix",
    "Line",
    "Plane",
    "SoupMixtureSlope",
    "fisher_path",
    "hessian",
    "kl_geometry",
    "kl_matrix",
    "line",
    "metrics",
    "plane",
    "soup_mixture_slope",
]

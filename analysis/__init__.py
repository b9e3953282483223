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
from analysis.landscape import Line, Plane, line, plane

__all__ = ["Hessian", "KLMatrix", "Line", "Plane", "hessian", "kl_matrix", "line", "metrics", "plane"]

"""Measuring what a soup reference changes: weight-space landscapes and distances between models.

Compute, then draw: every function returns a dataclass of arrays with ``save`` and ``load``; :mod:`analysis.plots` turns
each into a figure.

    from analysis import kl_matrix, line, metrics, plane, plots

    path = line(["sft1", "sft2"], {"loss": metrics.loss(examples, tokenizer)})
    plots.plot_line(path, "loss")
"""

from __future__ import annotations

from analysis import directions, metrics
from analysis.barrier import Barrier, barriers
from analysis.divergence import KLMatrix, kl_matrix
from analysis.landscape import Line, Plane
from analysis.paths import line
from analysis.planes import plane

__all__ = ["Barrier", "KLMatrix", "Line", "Plane", "barriers", "directions", "kl_matrix", "line", "metrics", "plane"]

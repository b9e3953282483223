"""The figure of a Hessian's spectrum."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.curvature import Hessian
from analysis.plots.style import COLORS, new_axes


def plot_spectrum(
    result: Hessian, ax: Axes | None = None, *, width: float | None = None, floor: float = 1e-6, **style: Any
) -> Axes:
    """Spectral density on a logarithmic scale, with the eigenvalues that are known as marks below it.

    ``width`` is the standard deviation of the Gaussians that the density is made of, by default a hundredth of the
    range. Densities below ``floor`` are not shown. ``style`` goes to ``Axes.plot``.
    """
    known = result.eigenvalues[result.converged]
    ends = np.concatenate([known, result.nodes[result.weights > 0]])
    if not len(ends):
        raise ValueError("result: has neither converged eigenvalues nor a density; compute one of them")
    ax = new_axes(ax, 6, 4)
    extent = float(np.ptp(ends)) or 1.0
    x = np.linspace(ends.min() - 0.05 * extent, ends.max() + 0.05 * extent, 2000)
    if len(result.nodes):
        options: dict[str, Any] = {"color": COLORS[0], "linewidth": 1.8}
        density = result.density(x, width or 0.01 * extent)
        ax.plot(x, density, **options | style)
        ax.set_yscale("log")
        ax.set_ylim(floor, 3 * density.max())
        ax.set_ylabel("spectral density")
    else:
        ax.set_yticks([])
    ax.plot(known, np.full(len(known), 0.03), "|", color=COLORS[1], markersize=12, transform=ax.get_xaxis_transform())
    ax.axvline(0, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
    trace = f", trace {result.trace.mean:.3g} ± {result.trace.stderr:.2g}" if len(result.trace_samples) else ""
    ax.set_title(f"{result.metadata['num_parameters']:,} parameters{trace}", fontsize=10)
    ax.set_xlabel("eigenvalue of the Hessian")
    return ax

"""Results as tables for people (Markdown, aligned text) and as JSON for programs."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from analysis.barrier import Barrier
from analysis.bootstrap import Interval
from analysis.curvature import Hessian
from analysis.divergence import KLMatrix
from analysis.frontier import KL, BestOfN, IdealFrontier, SampledFrontier
from analysis.geometry import KLGeometry
from analysis.landscape import Landscape
from analysis.run_frontier import RewardKLFrontier
from soupkit.tables import finite_or_none, number, text_table

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the KL that all frontiers span: where they are compared
NO_POINTS = "every β was refused, as its effective samples a prompt are too few; sample more (num_samples)"


@dataclass(frozen=True)
class Table:
    """A title, the header, and rows of cells; the first ``num_left`` columns are texts, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int = 1

    def text(self) -> str:
        """Aligned columns under the title, for a terminal."""
        return f"{self.title}\n\n{text_table(self.header, self.rows, self.num_left)}"

    def markdown(self) -> str:
        """A Markdown table under a heading, its texts escaped."""
        rule = ["---:" if column >= self.num_left else "---" for column in range(len(self.header))]
        cells = [
            "| " + " | ".join(html.escape(cell, quote=False).replace("|", "\\|") for cell in line) + " |"
            for line in (self.header, rule, *self.rows)
        ]
        return f"### {self.title}\n\n" + "\n".join(cells)


def or_reason(make: Callable[[], Table]) -> Table | str:
    """The table, or in a sentence why there is none."""
    try:
        return make()
    except ValueError as error:
        return f"No comparison at equal KL: {error}."


def with_error(mean: float, error: float, between: str = " ") -> str:
    """``1.23 ± 0.21``: mean and standard error with the decimals that show two digits of the error."""
    if not math.isfinite(error) or mean == error == 0:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
    style = f".{decimals}f" if decimals <= 6 else ".1e"  # rounding errors are not worth a row of zeros
    return f"{mean:{style}}{between}± {error:{style}}"


def with_limits(interval: Interval) -> str:
    """``1.23 [0.98, 1.45]``: an estimate and its confidence limits, where it has them."""
    estimate, low, high = map(float, interval)
    limits = f" [{number(low, 3)}, {number(high, 3)}]" if math.isfinite(low) and math.isfinite(high) else ""
    return number(estimate, 3) + limits


def to_json(value: Any) -> Any:
    """What ``json`` can write: dataclasses and named tuples as objects, arrays as lists, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return finite_or_none(value) if isinstance(value, float) else value


# ── Landscapes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_checkpoints(result: Landscape) -> Table:
    """What was measured at the named checkpoints of a line or plane, ± one standard error."""
    rows = [
        [name, *(with_error(*estimates[metric]) for metric in result.values)] for name, estimates in result.at.items()
    ]
    return Table("At the checkpoints", ["checkpoint", *result.values], rows)


def of_extremes(result: Landscape) -> Table:
    """The range of every metric over all points of a line or plane."""
    rows = []
    for name, values in result.values.items():
        known = values[np.isfinite(values)]
        ends = [number(float(end)) for end in (known.min(), known.max())] if len(known) else ["-", "-"]
        rows.append([name, *ends, str(result.num_nan[name])])
    return Table("Over all points", ["metric", "smallest", "largest", "points that are NaN"], rows)


def of_barriers(barriers: Mapping[str, Mapping[str, Barrier]]) -> Table:
    """Barriers {metric: {definition: barrier}} with intervals; see :mod:`analysis.barrier` for the definitions."""
    rows = [
        [metric, definition, with_limits(Interval(b.height, b.low, b.high)), number(b.at, 3), number(b.bias, 2)]
        for metric, found in barriers.items()
        for definition, b in found.items()
    ]
    return Table("Barriers between the ends", ["metric", "definition", "height", "at", "bias of noise"], rows)


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_kl_matrix(result: KLMatrix) -> Table:
    """KL(row ‖ column), ± one standard error."""
    rows = [
        [name, *("0" if other == name else with_error(*result[name, other]) for other in result.names)]
        for name in result.names
    ]
    return Table("KL(row ‖ column), nats per response", ["from \\ to", *result.names], rows)


def of_geometry(result: KLGeometry) -> Table:
    """Where every model lies to the soup and its ingredients; :class:`analysis.KLGeometry` has the formulas."""
    rows = [[name, *(with_error(*estimate) for estimate in result.of(name).values())] for name in result.names]
    return Table(f"To {result.soup} and its ingredients, nats per response", ["model", *result.quantities], rows)


def of_hessian(result: Hessian) -> Table:
    """The eigenvalues that were asked for, with their residuals."""
    rows = [
        [number(float(value)) if found else "not converged", number(float(residual), 2)]
        for value, residual, found in zip(result.eigenvalues, result.residuals, result.converged, strict=True)
    ]
    rows += [[with_error(*result.trace), "(trace)"]] if len(result.trace_samples) else []
    return Table("Eigenvalues of the Hessian, largest first", ["eigenvalue", "residual"], rows)


# ── Frontiers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_frontier(label: str, result: SampledFrontier) -> Table:
    """The policies on an ideal frontier or best-of-n, with confidence limits; refused ones are left out."""
    if isinstance(result, IdealFrontier):
        first, settings = "β", [number(float(beta), 3) for beta in result.kl_coefs]
    else:
        assert isinstance(result, BestOfN)
        first, settings = "n", [str(n) for n in result.n]
    columns = [result[name] for name in result.names]
    rows = [
        [setting, *(with_limits(Interval(*(part[c] for part in column))) for column in columns)]
        for c, setting in enumerate(settings)
        if np.isfinite(result.mean[:, c]).all()
    ]
    kind = "Ideal frontier" if first == "β" else "Best of n"
    return Table(f"{kind} of {label}" if rows else f"{kind} of {label}: {NO_POINTS}", [first, *result.names], rows)


def of_differences(frontiers: Mapping[str, SampledFrontier], y: str, x: str = KL) -> Table:
    """Frontiers at equal KL: the reward of each, and how much more it is than the first's, with paired intervals.

    Raises ValueError for a frontier without points, and for those that share no KL.
    """
    (first, base), *others = frontiers.items()
    kls = {name: frontier[x].estimate for name, frontier in frontiers.items()}
    for name, found in kls.items():
        if not np.isfinite(found).any():
            raise ValueError(f"frontier {name!r}: {NO_POINTS}")
    low, high = _span([found[np.isfinite(found)] for found in kls.values()])
    rows = []
    for kl in (low + share * (high - low) for share in SHARES):
        cells = [with_limits(frontier.at_kl(kl, y, x)) for frontier in frontiers.values()]
        cells += [with_limits(frontier.at_kl(kl, y, x, minus=base)) for _, frontier in others]
        rows.append([number(kl, 3), *cells])
    return Table(f"{y} at equal {x}", [x, *frontiers, *(f"{name} − {first}" for name, _ in others)], rows)


def of_reached(result: RewardKLFrontier) -> Table:
    """What groups of runs reached: means over seeds, ± s/√S."""
    rows = []
    for group in result.names:
        points = result.points(group)
        num = len(points.kl)
        errors = [v.std(axis=0, ddof=1) / num**0.5 if num > 1 else np.full(v.shape[1], np.nan) for v in points[2:]]
        for k, (kl_coef, update) in enumerate(zip(points.kl_coef, points.update, strict=True)):
            cells = [with_error(v[:, k].mean(), e[k]) for v, e in zip(points[2:], errors, strict=True)]
            rows.append([group, number(float(kl_coef)), str(update), str(num), *cells])
    return Table("Reached, mean over seeds", ["group", "kl_coef", "updates", "seeds", result.x, result.y], rows)


def of_reached_differences(result: RewardKLFrontier) -> Table:
    """Groups of runs at equal KL, and how much more each earns there than the first, paired by seed.

    Raises ValueError for groups of other seeds, of one seed, or that share no KL.
    """
    first, *others = result.names
    low, high = _span([kl for group in result.names for kl in result.points(group).kl])
    rows = []
    for kl in (low + share * (high - low) for share in SHARES):
        cells = [with_limits(result.reward_at_kl(group, kl)) for group in result.names]
        cells += [with_limits(result.reward_at_kl(group, kl, minus=first)) for group in others]
        rows.append([number(kl, 3), *cells])
    header = [result.x, *result.names, *(f"{group} − {first}" for group in others)]
    return Table(f"{result.y} at equal {result.x}", header, rows)


def _span(kls: Sequence[np.ndarray]) -> tuple[float, float]:
    """The KL that all curves reach."""
    low, high = max(float(kl.min()) for kl in kls), min(float(kl.max()) for kl in kls)
    if not low < high:
        raise ValueError(f"frontiers: have no KL in common, {low:.3g} to {high:.3g} nats; nothing is extrapolated")
    return low, high

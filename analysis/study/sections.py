"""The parts of a study's page: texts, tables, and figures that are yet to be drawn.

Nothing is computed here: numbers come from :mod:`analysis.study.effects` and :mod:`analysis.study.questions`, figures
from :mod:`analysis.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from analysis import plots
from analysis.report import Figure, Section
from analysis.study.config import START, Study
from analysis.study.effects import (
    GOLD,
    OWN_AXIS,
    Outcomes,
    Tables,
    difference,
    hypervolumes,
    less_at_equal_kl,
    overoptimisation,
)
from analysis.study.inference import FEWEST_RESAMPLED, Effect, effect
from analysis.study.questions import NOT_SUPPORTED, Claim, Foretold, claims, foretold, mixing
from analysis.study.references import mixing_weights
from analysis.study.store import HELD_OUT
from analysis.tables import Table

NONE = "–"
EXPLORATORY = "Exploratory: 95 % intervals over draws, not corrected for how many they are."


def sections_of(study: Study, tables: Tables) -> list[Section]:
    """The parts of the page, in order; those that the study has no runs for are left out."""
    outcomes = Outcomes(study, tables, study.compare.regime)
    of_runs = [
        _equal_kl(outcomes),
        _equal_kl_elsewhere(outcomes),
        _reached(outcomes),
        _equal_coefficient(outcomes),
        _behaviour(outcomes),
        _area_and_stability(outcomes),
        _mixing(outcomes),
        _regimes(study, tables),
        _predictions(study, tables),
    ]
    found = [_claims(study, tables), *(of_runs if tables.runs else []), _models(study, tables), _compute(tables)]
    return [section for section in found if section is not None]


# ── Sections ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _claims(study: Study, tables: Tables) -> Section:
    compare, found = study.compare, claims(study, tables)
    cases = [case for case in study.cases() if case.regime == compare.regime]
    done = {(row["regime"], row["draw"], row["arm"], _beta(row["kl_coef"])) for row in tables.runs}
    num_done = sum((case.regime, case.draw, case.arm, _beta(case.kl_coef)) in done for case in cases)
    state = (
        "" if num_done == len(cases) else f" **{num_done} of its {len(cases)} runs are there; this is no result yet.**"
    )
    draws = f"{len(study.draws)} draw{'s' if len(study.draws) > 1 else ''}"
    intro = (
        f"{compare.treatment} − {compare.baseline} in regime {compare.regime}, one number a draw, paired within it; "
        f"{draws}.{state} The interval is the 95 % one of each statement alone. The verdict is by p after Holm's "
        "correction for all, two-sided at 5 %: *supported* or *reversed* where the interval of that "
        f"confidence lies wholly on one side of the bound, *{NOT_SUPPORTED}* where it holds it. p is what inverts the "
        "interval, and never below what resamples can tell."
    )
    if any(1 < claim.effect.used < FEWEST_RESAMPLED for claim in found):
        intro += f" With fewer than {FEWEST_RESAMPLED} draws, interval and p are those of Student's t test."
    rows = [
        [
            claim.statement,
            claim.number,
            _limits(claim.effect, show_used=False),
            f"{'above' if claim.side > 0 else 'below'} {_bound(claim.threshold)}",
            _p(claim.p),
            _p(claim.p_holm),
            f"{claim.effect.used} of {len(claim.effect.values)}",
            claim.verdict,
        ]
        for claim in found
    ]
    header = ["statement", "number", "mean [95 %]", "supported if", "p", "p, Holm", "draws", "verdict"]
    numbers: list[str | Table | Figure] = ["The numbers themselves, one a draw:", _draws_table(study, found)]
    return Section("The four statements", [intro, Table("", header, rows, num_left=2), *numbers])


def _draws_table(study: Study, found: Sequence[Claim]) -> Table:
    rows = [[claim.number, *(_signed(value, 3) for value in claim.effect.values)] for claim in found]
    return Table("", ["number", *(f"draw {draw}" for draw in study.draws)], rows)


def _equal_kl(outcomes: Outcomes) -> Section:
    study, compare = outcomes.study, outcomes.study.compare
    axes = _axes(study)
    inside, outside = outcomes, _held_out(outcomes)
    arms = [arm for arm in outcomes.arms() if outcomes.coefficients(arm)]
    others = [arm for arm in arms if arm != compare.baseline]
    blocks: list[str | Table | Figure] = [
        f"Gold of every arm less {compare.baseline}'s at equal KL: above 0, an arm earns more for as much KL. It is "
        f"read twice, at the KL that {compare.baseline} reached at β = {compare.kl_coef:g} in the same draw and at the "
        "KL that the arm reached, and the mean is taken. Each column holds another KL equal; "
        f"**{_kl_name(compare.axis)}** is primary. *Own* is as much KL to the reference that each run used. A draw "
        "in which either does not reach the KL has no number (n draws in brackets where they are not all). "
        f"*At {compare.baseline}'s* is the first of the two readings alone. {EXPLORATORY} (But for {compare.treatment} "
        "on the primary axis, which the table above tests.)"
    ]
    primary = _kl_name(compare.axis)
    header = ["arm", *(_kl_name(axis) for axis in axes), f"{primary}, at {compare.baseline}'s"]
    header.append(f"less {compare.treatment}'s, {primary}")
    for view, name in ((inside, "On training prompts:"), (outside, "On held-out prompts, KL there too:")):
        rows = []
        for arm in others:
            cells = [_limits(effect(_less(view, arm, axis))) for axis in axes]
            one_way = view.at_equal_kl(arm, compare.axis) - view.at_equal_kl(compare.baseline, compare.axis)
            against = _limits(effect(_less(view, arm, compare.axis, minus=compare.treatment)))
            rows.append([arm, *cells, _limits(effect(one_way)), NONE if arm == compare.treatment else against])
        level = effect(view.at_equal_kl(compare.baseline, compare.axis))
        level_kl = effect(view.equal_kl(compare.axis))
        blocks.append(
            f"{name} {compare.baseline}'s own gold at β = {compare.kl_coef:g} is {_mean(level)}, at {_mean(level_kl)} "
            f"nats {primary.removeprefix('KL ')}."
        )
        blocks.append(Table("", header, rows))
    if not inside.coefficients(compare.treatment) or not _any_curve(inside):
        return Section("Gold at equal KL", blocks)
    of_arms = {arm: effect(_less(inside, arm, compare.axis)) for arm in others}
    of_axes = {axis: effect(_less(inside, compare.treatment, axis)) for axis in axes}
    equal_beta = f"equal β = {compare.kl_coef:g}"
    of_axes[equal_beta] = difference(inside, compare.treatment, compare.baseline, GOLD, compare.kl_coef)
    label = f"gold − gold of {compare.baseline}"
    blocks += [
        Figure(
            "effects",
            f"*Gold of every arm less that of {compare.baseline} at equal {_kl_name(compare.axis)}, training prompts. "
            "Bars are 95 % intervals over draws (not corrected), faint dots the draws.*",
            partial(plots.plot_effects, of_arms, x_label=f"{label} at equal {_kl_name(compare.axis)}"),
        ),
        Figure(
            "axes",
            f"*Gold of {compare.treatment} less that of {compare.baseline}, by what is held equal. The same runs in "
            f"every row; {_kl_name(compare.axis)} is the axis that was chosen before. Bars are 95 % intervals over "
            "draws, faint dots the draws.*",
            partial(plots.plot_axes, of_axes, primary=compare.axis, x_label=label),
        ),
    ]
    return Section("Gold at equal KL", blocks)


def _equal_kl_elsewhere(outcomes: Outcomes) -> Section | None:
    """Gold at the KLs that were reached at other coefficients than the comparison's; None where no draw has any."""
    study, compare = outcomes.study, outcomes.study.compare
    views = [
        (kl_coef, replace(outcomes, study=replace(study, compare=replace(compare, kl_coef=kl_coef))))
        for kl_coef in study.kl_coefs
        if kl_coef != compare.kl_coef
    ]
    axes = list(dict.fromkeys([compare.axis, compare.moved]))
    arms = [arm for arm in outcomes.arms() if outcomes.coefficients(arm) and arm != compare.baseline]
    columns: dict[str, list[Effect]] = {}
    for kl_coef, view in views:
        for axis in axes:
            found = [effect(_less(view, arm, axis)) for arm in arms]
            if any(each.used > 1 for each in found):
                columns[f"{_kl_name(axis)}, β = {kl_coef:g}"] = found
    if not columns:
        return None
    intro = (
        f"The same at the KLs that {compare.baseline} and the arm reached at other β than {compare.kl_coef:g}; a β "
        "whose KL no draw has on both curves is left out. Between the start and the first point of a curve gold rises "
        "more steeply than the line that is read there, which flatters the arm with less KL: the other is read there. "
        f"{EXPLORATORY}"
    )
    rows = [[arm, *(_limits(found[i]) for found in columns.values())] for i, arm in enumerate(arms)]
    return Section("Gold at the KL of other coefficients", [intro, Table("", ["arm", *columns], rows)])


def _reached(outcomes: Outcomes) -> Section:
    study, compare = outcomes.study, outcomes.study.compare
    outside = _held_out(outcomes)
    axes = _axes(study)
    columns: list[tuple[str, Outcomes, str]] = [
        ("gold", outcomes, GOLD),
        ("gold, held-out", outside, GOLD),
        ("proxy", outcomes, "proxy_reward"),
        (f"wins against {START}", outcomes, f"win_rate/{START}"),
        (f"wins against {compare.baseline}", outcomes, "win_rate/baseline"),
        *((f"{_kl_name(axis)} (nats)", outcomes, axis) for axis in axes),
    ]
    intro = (
        "What every arm came to after training: mean ± standard error over draws. Wins are the share of prompts on "
        f"which the response has more gold than {START}'s, or than {compare.baseline}'s at the same β, ties ½. Arms "
        "at equal β differ in how far they go, so that their gold is not to be compared here."
    )
    blocks: list[str | Table | Figure] = [intro, _means_table(outcomes, columns)]
    shown = _main_arms(outcomes)
    curves = {arm: outcomes.curve(arm, compare.axis) for arm in shown}
    if _any_curve(outcomes):
        caption = (
            f"*Gold against {_kl_name(compare.axis)} on training prompts: each line an arm through its β, from "
            f"{START} (the policy before training). Means over draws, bars are standard errors. A line above another "
            f"earns more gold for as much KL. The β of {compare.baseline} are written beside its points.*"
        )
        blocks.append(Figure("arms", caption, partial(plots.plot_arms, curves, compare.axis)))
    return Section("Reward and KL of every arm", blocks)


def _behaviour(outcomes: Outcomes) -> Section:
    columns = [
        ("entropy (nats a token)", outcomes, "entropy"),
        ("length (tokens)", outcomes, "response_length"),
        ("distinct-2", outcomes, "distinct_2"),
        ("unique responses", outcomes, "unique_responses"),
        (f"distance to {START}", outcomes, "distance"),
    ]
    intro = (
        "How the policies write, and how far their weights went (‖π − start‖₂): mean ± standard error over draws, of "
        "equally many samples everywhere."
    )
    return Section("Behaviour", [intro, _means_table(outcomes, columns)])


def _equal_coefficient(outcomes: Outcomes) -> Section:
    study, compare = outcomes.study, outcomes.study.compare
    outside = _held_out(outcomes)
    moved = list(dict.fromkeys([compare.axis, compare.moved]))
    header = ["arm", "β", "gold", "gold, held-out", "proxy", *(f"{_kl_name(axis)} (nats)" for axis in moved)]
    rows = []
    for arm in outcomes.arms():
        if arm == compare.baseline:
            continue
        for kl_coef in study.kl_coefs:
            of = partial(difference, arm=arm, minus=compare.baseline, kl_coef=kl_coef)
            found = [of(outcomes, measure=GOLD), of(outside, measure=GOLD), of(outcomes, measure="proxy_reward")]
            found += [of(outcomes, measure=axis) for axis in moved]
            rows.append([arm, f"{kl_coef:g}", *map(_limits, found)])
    intro = (
        f"Every arm less {compare.baseline} at the same β (an arm without one: the same runs against each β). A laxer "
        f"leash gives more gold too, so that this is no evidence of a better reference. {EXPLORATORY}"
    )
    return Section("Differences at equal β", [intro, Table("", header, rows, num_left=2)])


def _area_and_stability(outcomes: Outcomes) -> Section:
    compare, beta = outcomes.study.compare, outcomes.study.compare.kl_coef
    base_area = hypervolumes(outcomes, compare.baseline, compare.axis)
    rows = []
    for arm in outcomes.arms():
        is_baseline = arm == compare.baseline
        area = effect(hypervolumes(outcomes, arm, compare.axis) - base_area)
        drops = difference(outcomes, arm, compare.baseline, "largest_drop", beta)
        rows.append(
            [
                arm,
                _mean(effect(base_area)) if is_baseline else _limits(area),
                _mean(effect(overoptimisation(outcomes, arm))),
                _mean(effect(outcomes.measured(arm, "largest_drop", beta))),
                NONE if is_baseline else _limits(drops),
                _mean(effect(outcomes.measured(arm, "skipped_steps", beta))),
                _plain(effect(outcomes.measured(arm, GOLD, beta)).std),
            ]
        )
    intro = (
        f"*Area*: what an arm reached above {START}'s gold, up to the largest {_kl_name(compare.axis)} that "
        f"{compare.baseline} reached in that draw, in nats · gold; {compare.baseline} has the area itself, the others "
        "how much more it is. *Over-optimisation*: gold at the smallest β less the best gold of the arm's β; 0 is "
        f"none. The rest is at β = {beta:g}: the largest drop of the batch's proxy reward from one update to the "
        "next, skipped steps, and the standard deviation of final gold over draws. ± is the standard error over "
        f"draws. {EXPLORATORY}"
    )
    header = ["arm", "area", "over-optimisation", "largest drop"]
    header += [f"less {compare.baseline}'s", "skipped steps", "SD of gold"]
    return Section("Area, over-optimisation and stability", [intro, Table("", header, rows)])


def _mixing(outcomes: Outcomes) -> Section | None:
    compare = outcomes.study.compare
    found = mixing(outcomes, compare.axis)
    if found is None:
        return None
    others = [i for i, arm in enumerate(found.arms) if arm != compare.baseline]
    kl = f"equal {_kl_name(compare.axis)}"
    header = ["α", "arm", kl, *(f"equal β = {kl_coef:g}" for kl_coef in found.at_coef)]
    rows = [
        [f"{found.alphas[i]:g}", found.arms[i], _limits(found.at_kl[i])]
        + [_limits(effects[i]) for effects in found.at_coef.values()]
        for i in others
    ]
    intro = (
        "The reference is (1 − α) of one model and α of the other, in weight space. Gold less that of α = 0 "
        f"({compare.baseline}). An effect of averaging itself has its peak inside; a slope to α = 1 is one of the "
        f"other model. {EXPLORATORY}"
    )
    blocks: list[str | Table | Figure] = [intro, Table("", header, rows, num_left=2)]
    if any(value.used for value in found.at_kl):
        caption = (
            f"*Gold over the mixing weight of the reference, less that of α = 0. Above: at {kl}; "
            "faint dots are draws. Below: at equal β, where a laxer leash acts too. Bars are 95 % intervals.*"
        )
        blocks.append(Figure("mixing", caption, partial(plots.plot_mixing, found)))
    return Section("How much of the second model", blocks)


def _regimes(study: Study, tables: Tables) -> Section | None:
    compare = study.compare
    views = {name: Outcomes(study, tables, name) for name in study.regimes}
    common = [arm for arm in study.arms if all(arm in view.arms() for view in views.values())]
    others = [arm for arm in common if arm != compare.baseline]
    rows = []
    for name, view in views.items():
        for arm in others:
            if not np.isfinite(view.measured(arm, GOLD, compare.kl_coef)).any():
                continue
            inside, outside = (_less(seen, arm, compare.axis) for seen in (view, _held_out(view)))
            against = _less(view, arm, compare.axis, minus=compare.treatment)
            rows.append(
                [
                    name,
                    arm,
                    _limits(effect(inside)),
                    _limits(effect(outside)),
                    NONE if arm == compare.treatment else _limits(effect(against)),
                    *(_limits(difference(view, arm, compare.baseline, GOLD, kl_coef)) for kl_coef in study.kl_coefs),
                    _mean(effect(view.measured(compare.baseline, GOLD, compare.kl_coef))),
                ]
            )
    if len({row[0] for row in rows}) < 2:
        return None
    described = "; ".join(f"({name}) {regime.description}" for name, regime in study.regimes.items())
    intro = (
        f"Regimes: {described}. Gold less {compare.baseline}'s, and {compare.treatment}'s, at equal "
        f"{_kl_name(compare.axis)}, and at equal β; then {compare.baseline}'s own at β = {compare.kl_coef:g}. "
        f"{EXPLORATORY}"
    )
    header = ["regime", "arm", "equal KL", "equal KL, held-out", f"equal KL, less {compare.treatment}'s"]
    header += [*(f"equal β = {kl_coef:g}" for kl_coef in study.kl_coefs), f"gold of {compare.baseline}"]
    return Section("Regimes", [intro, Table("", header, rows, num_left=2)])


def _predictions(study: Study, tables: Tables) -> Section | None:
    compare = study.compare
    found = {name: foretold(Outcomes(study, tables, name), compare.axis) for name in study.regimes}
    rows = [
        [
            name,
            one.reference,
            _mean(effect(one.kl)),
            _limits(one.predicted),
            _limits(one.reached),
            _agreement(one, one.reached),
            _limits(one.at_compare),
            _agreement(one, one.at_compare),
        ]
        for name, those in found.items()
        for one in those
        if one.predicted.used
    ]
    if not rows or study.predict is None:
        return None
    first = study.predict.references[0]
    intro = (
        "What the ideal frontier of each reference, from its samples alone, said before PPO: gold less that of "
        f"{first} at equal {_kl_name(compare.axis)}, read at the largest KL that all frontiers and their arms reach "
        "in a draw. Beside it what PPO reached there and at the KL of the statements, with the draws in which the "
        f"sign is the predicted one. {EXPLORATORY}"
    )
    header = ["regime", "reference", "KL (nats)", "predicted", "reached there", "sign", "reached", "sign"]
    blocks: list[str | Table | Figure] = [intro, Table("", header, rows, num_left=2)]
    if shown := [one for one in found[compare.regime] if one.predicted.used]:
        caption = (
            f"*Predicted against reached: gold of each reference less that of {first}, at equal "
            f"{_kl_name(compare.axis)}. Small marks are draws, large ones means with 95 % intervals; on the dashed "
            "line the prediction was exact, and in the quadrants that it runs through the sign was right.*"
        )
        blocks.append(Figure("predictions", caption, partial(plots.plot_predictions, shown)))
    return Section("What was predicted", blocks)


def _models(study: Study, tables: Tables) -> Section | None:
    axis_model = study.compare.axis.removeprefix("kl/")
    axes = list(dict.fromkeys([study.compare.axis, study.compare.moved]))
    with_loss = study.measure.loss is not None
    rows = []
    for number, (name, regime) in enumerate(study.regimes.items()):
        view, changed = Outcomes(study, tables, name), set(regime.models)
        for model, made_of in study.measure.models.items():
            if number and not any(f"{{{part}}}" in str(made_of) for part in changed):
                continue  # as in the first regime
            loss, of_axis_model = view.model(model, "loss"), view.model(axis_model, "loss")
            less = effect(loss - of_axis_model)
            below = f"{int((less.values < 0).sum())} of {less.used}" if less.used and model != axis_model else NONE
            gold = effect(view.model(model, GOLD))
            if not (gold.used or less.used):
                continue
            cells = [_mean(effect(loss)), NONE if model == axis_model else _mean(less), below] if with_loss else []
            cells += [_mean(gold), _mean(effect(_held_out(view).model(model, GOLD)))]
            rows.append([name, model, *cells, *(_mean(effect(view.model(model, axis))) for axis in axes)])
    if not rows:
        return None
    about_loss = (
        f"Loss is that of held-out demonstrations; a model whose loss is not below {axis_model}'s is overfitted, and a "
        "soup of such models repairs that. "
    )
    intro = (
        f"The models before any PPO: mean ± standard error over draws. {about_loss if with_loss else ''}A regime lists "
        "the models that differ from the first's."
    )
    header = ["regime", "model"]
    header += ["loss (nats a token)", f"less {axis_model}'s", "draws below"] if with_loss else []
    header += ["gold", "gold, held-out"] + [f"{_kl_name(axis)} (nats)" for axis in axes]
    return Section("The models", [intro, Table("", header, rows, num_left=2)])


def _compute(tables: Tables) -> Section | None:
    if not tables.timings:
        return None
    rows = []
    for table in dict.fromkeys(str(row["table"]) for row in tables.timings):
        own = [row for row in tables.timings if row["table"] == table]
        seconds = np.array([row["seconds"] for row in own], dtype=float)
        seconds = seconds[np.isfinite(seconds)]
        machines = ", ".join(dict.fromkeys(str(row["machine"]) for row in own))
        workers = ", ".join(dict.fromkeys(f"{row['workers']:g}" for row in own))
        if len(seconds):
            cells = [
                f"{seconds.sum() / 3600:.1f}",
                f"{np.median(seconds):.0f} ({seconds.min():.0f}–{seconds.max():.0f})",
            ]
            rows.append([table, machines, str(len(own)), *cells, workers])
    intro = (
        "What it took: hours are the sum over rows, as many of which ran at once as there were workers; seconds a "
        "row are the median, with the least and the most."
    )
    header = ["table", "machine", "rows", "hours", "seconds a row", "workers"]
    return Section("Compute", [intro, Table("", header, rows, num_left=2)])


# ── Rows and cells ────────────────────────────────────────────────────────────────────────────────────────────────────


def _means_table(outcomes: Outcomes, columns: Sequence[tuple[str, Outcomes, str]]) -> Table:
    """Mean ± standard error of measures: the start, then every arm and β."""
    rows = [[f"({START})", NONE, *(_mean(effect(view.model(START, measure))) for _, view, measure in columns)]]
    for arm in outcomes.arms():
        for kl_coef in outcomes.study.coefficients(arm):
            cells = [_mean(effect(view.measured(arm, measure, kl_coef))) for _, view, measure in columns]
            rows.append([arm, NONE if kl_coef is None else f"{kl_coef:g}", *cells])
    return Table("", ["arm", "β", *(name for name, _, _ in columns)], rows, num_left=2)


def _main_arms(outcomes: Outcomes) -> list[str]:
    """The arms of the figure: those of most regimes first, without mixtures of the treatment's models by the way."""
    study, compare = outcomes.study, outcomes.study.compare
    by_the_way = set(mixing_weights(study)) - {compare.baseline, compare.treatment}
    arms = [arm for arm in outcomes.arms() if outcomes.coefficients(arm) and arm not in by_the_way]
    in_regimes = {arm: sum(arm in (regime.arms or study.arms) for regime in study.regimes.values()) for arm in arms}
    return sorted(arms, key=lambda arm: (arm != compare.baseline, arm != compare.treatment, -in_regimes[arm]))[:5]


def _axes(study: Study) -> list[str]:
    """The primary axis, the others, and that of the own reference."""
    return list(dict.fromkeys([study.compare.axis, *(f"kl/{name}" for name in study.measure.kl), OWN_AXIS]))


def _held_out(outcomes: Outcomes) -> Outcomes:
    return Outcomes(outcomes.study, outcomes.tables, outcomes.regime, HELD_OUT)


def _less(outcomes: Outcomes, arm: str, axis: str, minus: str | None = None) -> np.ndarray:
    """Gold at equal KL less the baseline's, or another arm's. [D]"""
    return less_at_equal_kl(outcomes, arm, minus or outcomes.study.compare.baseline, axis)


def _any_curve(outcomes: Outcomes) -> bool:
    compare = outcomes.study.compare
    return bool(np.isfinite(outcomes.at_equal_kl(compare.baseline, compare.axis)).any())


def _kl_name(axis: str) -> str:
    return "KL to own" if axis == OWN_AXIS else f"KL to {axis.removeprefix('kl/')}"


def _mean(found: Effect) -> str:
    """``1.23 ± 0.04``, with the decimals that show two digits of the error, but no more than three."""
    if not found.used:
        return NONE
    mean, error = float(found.interval.estimate), found.stderr
    if not math.isfinite(error):
        return _plain(mean)
    decimals = _decimals(error)
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _limits(found: Effect, show_used: bool = True) -> str:
    """``+0.12 [+0.03, +0.21]``, decimals by half its width; ``(7)`` draws if not all."""
    estimate, low, high = map(float, found.interval)
    if not found.used:
        return NONE
    used = f" ({found.used})" if show_used and found.left_out else ""
    if not math.isfinite(low):
        return _signed(estimate, 3) + used
    decimals = _decimals((high - low) / 2)
    return f"{_signed(estimate, decimals)} [{_signed(low, decimals)}, {_signed(high, decimals)}]{used}"


def _decimals(error: float, most: int = 3) -> int:
    """How many decimals show two digits of an error."""
    return min(most, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else most


def _signed(value: float, decimals: int) -> str:
    return f"{value + 0:+.{decimals}f}" if math.isfinite(value) else NONE


def _bound(threshold: float) -> str:
    return "0" if threshold == 0 else _signed(threshold, 3)


def _plain(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else NONE


def _p(p: float) -> str:
    return f"{p:.3f}" if math.isfinite(p) else NONE


def _agreement(one: Foretold, reached: Effect) -> str:
    same, both = one.agreement(reached)
    return f"{same} of {both}" if both else NONE


def _beta(value: Any) -> float | None:
    """A coefficient; None for an empty cell."""
    return None if value is None or math.isnan(value) else float(value)

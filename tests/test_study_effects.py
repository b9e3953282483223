"""The statistics of a study agree with numbers worked out by hand: pairing, signs, bounds and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp
from study_tables import reviews_study

from analysis.bootstrap import bootstrap_mean
from analysis.study.config import Study
from analysis.study.effects import Outcomes, Tables, difference, hypervolumes, less_at_equal_kl, overoptimisation
from analysis.study.inference import TEST_RESAMPLES, Effect, effect, holm, p_value
from analysis.study.questions import Claim, claims, foretold, mixing
from analysis.study.references import arm_of_model, mixing_weights, reference_weights
from analysis.study.store import HELD_OUT, Row

BETAS = (0.02, 0.1, 0.4)
NAN = math.nan
VALUES = np.array([0.3, -0.1, 0.2, 0.5, 0.1, 0.4, -0.2, 0.6])

Points = tuple[tuple[float, float], ...]  # (KL, gold) at each of BETAS
# In √KL: the start (0, 1); single (1, 2), (2, 4), (3, 5); soup 2 (1.5, 3), (2.5, 6), (4, 0).
SINGLE: Points = ((9.0, 5.0), (4.0, 4.0), (1.0, 2.0))
SOUP: Points = ((16.0, 0.0), (6.25, 6.0), (2.25, 3.0))


def runs(arm: str, draw: int, points: Points, *, prefix: str = "", **more: float) -> list[Row]:
    """An arm's runs in a draw, as far from every model."""
    axes = [f"{prefix}kl/{name}" for name in ("base", "sft1", "soup 2", "reference")]
    return [
        {"regime": "A", "draw": float(draw), "arm": arm, "kl_coef": beta, f"{prefix}gold_reward": gold}
        | dict.fromkeys(axes, kl)
        | more
        for beta, (kl, gold) in zip(BETAS, points, strict=False)
    ]


def start(draw: int, **more: float) -> Row:
    names = ("base", "sft1", "soup 2")
    both = {f"{prefix}kl/{name}": 0.0 for prefix in ("", HELD_OUT) for name in names}
    gold = {"gold_reward": 1.0, f"{HELD_OUT}gold_reward": 1.0}
    return {"regime": "A", "draw": float(draw), "model": "start"} | both | gold | more


def tables(runs: list[Row], models: list[Row] | None = None, predictions: list[Row] | None = None) -> Tables:
    """Tables with their rows in another order than that of draws and arms."""
    order = np.random.default_rng(0).permutation(len(runs))
    return Tables([runs[i] for i in order], models or [], predictions or [], [])


def shifted(points: Points, gold: float) -> Points:
    return tuple((kl, reward + gold) for kl, reward in points)


def outcomes_of(rows: list[Row], num: int = 2, **more: Any) -> Outcomes:
    study = reviews_study(num)
    return Outcomes(study, tables(rows, [start(draw) for draw in study.draws], **more), "A")


def test_an_effect_is_the_mean_of_the_draws_that_have_it() -> None:
    found = effect(np.array([1, NAN, 3.0]))
    assert (found.interval.estimate, found.used, found.left_out) == (2, 2, 1)
    assert found.std == pytest.approx(math.sqrt(2))
    assert found.stderr == pytest.approx(1)  # √2 / √2
    assert effect(VALUES).interval == bootstrap_mean(VALUES, num_resamples=20_000, method="expanded")
    assert effect(VALUES, 0.5).interval == bootstrap_mean(VALUES, num_resamples=20_000, confidence=0.5)


def test_one_draw_has_a_value_and_no_limits() -> None:
    alone, none = effect(np.array([NAN, 2.0])), effect(np.array([NAN, NAN]))
    assert alone.interval.estimate == 2
    assert np.isnan([alone.interval.low, alone.interval.high, alone.stderr, none.interval.estimate]).all()
    assert math.isnan(p_value(np.array([NAN, 2.0])))
    assert math.isnan(p_value(VALUES, NAN))


@pytest.mark.parametrize("threshold", [0.0, 0.031, 0.157, 0.3, 0.437])
def test_a_limit_of_confidence_one_less_p_touches_the_threshold(threshold: float) -> None:
    p = p_value(VALUES, threshold)
    assert 0.009 < p < 1
    limits = bootstrap_mean(VALUES, num_resamples=TEST_RESAMPLES, confidence=1 - p)
    assert (limits.low if threshold < VALUES.mean() else limits.high) == pytest.approx(threshold, abs=1e-9)
    assert p == pytest.approx(p_value(-VALUES, -threshold))
    assert (p <= 0.05) == (not effect(VALUES).interval.low <= threshold <= effect(VALUES).interval.high)


def test_p_is_near_that_of_a_t_test_and_never_below_what_resamples_tell() -> None:
    normal = norm.ppf((np.arange(30) + 0.5) / 30)
    for mean in (0.1, 0.3, 0.5):
        expected = 2 * t.sf(mean / (normal.std(ddof=1) / math.sqrt(30)), 29)
        assert p_value(normal + mean) == pytest.approx(expected, rel=0.2, abs=5e-4)
    assert p_value(np.array([1.0, 2, 3]), 2.0) == 1
    # No resample reaches the threshold: one of all for eight draws, 5⁻⁵ of all for five.
    for n, share in ((8, 1 / TEST_RESAMPLES), (5, 5**-5)):
        expected = 2 * t.sf(-norm.ppf(share) / math.sqrt(n / (n - 1)), n - 1)
        assert p_value(np.arange(n) + 100.0) == pytest.approx(expected)
    assert p_value(np.arange(8) + 100.0) == pytest.approx(0.0036, abs=1e-4)


@pytest.mark.parametrize("n", [2, 4])
def test_of_few_draws_interval_and_p_are_student_s(n: int) -> None:
    """Resamples of two draws go from the least to the most, which hold the mean one time in two."""
    few = VALUES[:n]
    by_scipy = ttest_1samp(few, 0.1)
    found = effect(np.append(few, NAN), 0.9).interval
    assert found.estimate == pytest.approx(few.mean())
    assert found[1:] == pytest.approx(tuple(by_scipy.confidence_interval(0.9)))
    assert p_value(few, 0.1) == pytest.approx(by_scipy.pvalue)
    assert p_value(-few, -0.1) == pytest.approx(by_scipy.pvalue)
    assert p_value(np.full(n, 2.0), 1.0) == 0
    assert effect(VALUES[:5]).interval == bootstrap_mean(VALUES[:5], num_resamples=20_000, method="expanded")


def test_holm_by_hand() -> None:
    # In order 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([0.01, NAN, 0.02]) == pytest.approx([0.03, NAN, 0.04], nan_ok=True)


def test_reward_at_equal_kl_by_hand() -> None:
    # Single reached KL 4 at β = 0.1; there soup 2 is half way from (1.5, 3) to (2.5, 6). In draw 2 single moved less,
    # to KL 1.5625, and soup 2 is between the start and (1.5, 3): 1 + 2 · 1.25/1.5 + 7.
    near: Points = ((9.0, 5.0), (1.5625, 4.0), (1.0, 2.0))
    rows = runs("single", 1, SINGLE) + runs("soup 2", 1, SOUP) + runs("single", 2, near)
    found = outcomes_of(rows + runs("soup 2", 2, ((16.0, 0.0), (6.25, 6.0), (2.25, 3.0))))
    assert found.equal_kl("kl/base").tolist() == [4, 1.5625]
    assert found.at_equal_kl("single", "kl/base") == pytest.approx([4, 4])
    assert found.at_equal_kl("soup 2", "kl/base") == pytest.approx([4.5, 1 + 2 * 1.25 / 1.5])
    less = less_at_equal_kl(found, "soup 2", "single", "kl/base")
    # ... and at soup 2's KL of 6.25: single half way from (2, 4) to (3, 5), then from (1.25, 4) to (3, 5).
    assert less == pytest.approx([(0.5 + 1.5) / 2, ((-3 + 2 * 1.25 / 1.5) + (6 - 4 - 1.25 / 1.75)) / 2])
    assert less_at_equal_kl(found, "single", "soup 2", "kl/base") == pytest.approx(-less)


def test_each_arm_is_read_once_at_its_own_point() -> None:
    # A parabola in √KL, which both follow: read at single's point alone, soup 2 seems to be worse.
    bent = [tuple((d**2, 4 * d - d**2) for d in at) for at in ((3.0, 2.0, 1.0), (3.5, 2.25, 1.25))]
    same = outcomes_of([row for arm, at in zip(("single", "soup 2"), bent, strict=True) for row in runs(arm, 1, at)], 1)
    one_way = same.at_equal_kl("soup 2", "kl/base") - same.at_equal_kl("single", "kl/base")
    assert one_way == pytest.approx([-0.75 * 0.25])  # − (2 − 1.25)(2.25 − 2)
    assert less_at_equal_kl(same, "soup 2", "single", "kl/base") == pytest.approx(
        [0]
    )  # and single − (2.25 − 2)(3 − 2.25)


def test_nothing_is_extrapolated_and_no_point_may_lack() -> None:
    short: Points = ((3.0, 3.0), (2.0, 2.5), (1.0, 2.0))
    rows = [row for draw in (1, 2, 3, 4) for row in runs("single", draw, SINGLE)]
    rows += runs("soup 2", 1, SOUP) + runs("soup 2", 2, short) + runs("soup 2", 3, SOUP)[:2] + runs("soup 2", 4, SOUP)
    found = outcomes_of(rows, 4)
    less = effect(less_at_equal_kl(found, "soup 2", "single", "kl/base"))
    assert less.values == pytest.approx([1, NAN, NAN, 1], nan_ok=True)
    assert (less.used, less.left_out) == (2, 2)
    without_start = Outcomes(found.study, found.tables._replace(models=[]), "A")
    assert np.isnan(without_start.at_equal_kl("soup 2", "kl/base")).all()
    assert np.isnan(found.at_equal_kl("none", "kl/base")).all()


def test_what_arms_reached_is_a_frontier_of_draws() -> None:
    rows = runs("single", 1, SINGLE) + runs("soup 2", 1, SOUP) + runs("single", 2, shifted(SINGLE, 10))
    found = outcomes_of(rows + runs("soup 2", 2, shifted(SOUP, 20)))
    frontier = found.reached(["soup 2", "single"], "kl/base")
    assert (frontier.names, frontier.x, frontier.y) == (["soup 2", "single"], "kl/base", "gold_reward")
    soup, single = frontier.points("soup 2"), frontier.points("single")
    assert single.kl_coef.tolist() == [0.02, 0.1, 0.4, math.inf]
    assert single.update.tolist() == [50, 50, 50, 0]
    assert single.kl.tolist() == [[9, 4, 1, 0]] * 2
    assert single.reward.tolist() == [[5, 4, 2, 1], [15, 14, 12, 1]]
    assert soup.kl.tolist() == [[16, 6.25, 2.25, 0]] * 2
    assert soup.reward.tolist() == [[0, 6, 3, 1], [20, 26, 23, 1]]
    assert frontier.seeds("single") == [1, 2]
    for arms, axis, message in (
        (["single", "none"], "kl/base", r"arm 'none': none of regime 'A' with coefficients; choose from \['single', "),
        (["other"], "kl/base", "arm 'other': none of regime 'A'"),
        (["soup 3"], "kl/base", r"draw 1, soup 3, β = 0.02 .*: kl/base and gold_reward are"),
        (["single"], "kl/other", r"draw 1, single, β = inf .*: kl/other and gold_reward are"),
    ):
        with pytest.raises(ValueError, match=message):
            found.reached(arms, axis)
    (own,) = {tuple(row) for row in found.reached(["single"], "kl/reference").points("single").kl.tolist()}
    assert own == (9, 4, 1, 0)


def test_held_out_reads_reward_and_kl_there() -> None:
    both = [
        {**inside, **outside}
        for arm, inside_points, outside_points in (("single", SOUP, SINGLE), ("soup 2", SINGLE, SOUP))
        for inside, outside in zip(
            runs(arm, 1, inside_points, largest_drop=0.5), runs(arm, 1, outside_points, prefix=HELD_OUT), strict=True
        )
    ]
    study = reviews_study(1)
    outside = Outcomes(study, tables(both, [start(1)]), "A", HELD_OUT)
    assert less_at_equal_kl(outside, "soup 2", "single", "kl/base") == pytest.approx([1])
    assert outside.measured("single", "largest_drop", 0.1) == pytest.approx([0.5])  # no prompts belong to it


def test_on_the_own_axis_a_curve_starts_where_that_is_known() -> None:
    # The start is 0 from single's reference, 1.21 from the soup; how far from that of soup 3 was not measured.
    rows = runs("single", 1, ((9.0, 5.0), (1.44, 4.0), (1.0, 2.0)))
    rows += runs("soup 2", 1, SOUP) + runs("soup 3", 1, SOUP) + runs("weighted KLs", 1, SOUP)
    study = reviews_study(1)
    found = Outcomes(study, tables(rows, [start(1, **{"kl/soup 2": 1.21})]), "A")
    for arm, expected in (("single", [0]), ("soup 2", [1.21]), ("soup 3", None), ("weighted KLs", None)):
        at = found.curve(arm, "kl/reference").start_kl
        assert at is None if expected is None else at == pytest.approx(expected)
    assert found.at_equal_kl("soup 2", "kl/reference") == pytest.approx(
        [1 + 2 * 0.1 / 0.4]
    )  # from (1.1, 1) to (1.5, 3)
    assert np.isnan(found.at_equal_kl("soup 3", "kl/reference")).all()  # 1.44 lies below its first point
    assert found.at_equal_kl("soup 3", "kl/sft1") == pytest.approx([1 + 2 * 1.2 / 1.5])


def test_differences_at_equal_coefficient_pair_by_draw() -> None:
    rows = [row for draw in (1, 2, 3) for row in runs("single", draw, shifted(SINGLE, 10.0 * draw))]
    rows += [row for draw in (3, 1) for row in runs("soup 2", draw, shifted(SOUP, 10.0 * draw))]
    rows += [{"regime": "A", "draw": 1.0, "arm": "none", "kl_coef": NAN, "gold_reward": 3.0}]
    found = outcomes_of(rows, 3)
    assert difference(found, "soup 2", "single", "gold_reward", 0.1).values == pytest.approx([2, NAN, 2], nan_ok=True)
    assert difference(found, "soup 2", "single", "gold_reward", 0.02).values[0] == -5
    # An arm without a coefficient has one run, which is compared with each.
    assert difference(found, "none", "single", "gold_reward", 0.02).values[0] == 3 - 15


def test_hypervolume_by_hand() -> None:
    # Up to KL 9 above gold 1: single 3 · 1 + 5 · 3; soup 2 (6.25 − 2.25) · 2 + (9 − 6.25) · 5.
    found = outcomes_of(runs("single", 1, SINGLE) + runs("soup 2", 1, SOUP) + runs("soup 3", 1, SOUP)[1:], 1)
    assert hypervolumes(found, "single", "kl/base") == pytest.approx([18])
    assert hypervolumes(found, "soup 2", "kl/base") == pytest.approx([8 + 13.75])
    assert np.isnan(hypervolumes(found, "soup 3", "kl/base")).all()  # a run is missing
    assert np.isnan(hypervolumes(found, "none", "kl/base")).all()


def test_overoptimisation_by_hand() -> None:
    found = outcomes_of(runs("single", 1, SINGLE) + runs("soup 2", 1, SOUP) + runs("soup 3", 1, SOUP)[:2], 1)
    assert overoptimisation(found, "single") == pytest.approx([0])  # most gold at the smallest coefficient
    assert overoptimisation(found, "soup 2") == pytest.approx([-6])
    assert np.isnan(overoptimisation(found, "soup 3")).all()
    assert np.isnan(overoptimisation(found, "none")).all()


def claim_rows(drops: float) -> list[Row]:
    """Eight draws: soup 2 is further away, by 2 ± 0.1 or so, and has less gold, by 1; held out, it is luck."""
    rows: list[Row] = []
    noise = 0.1 * np.array([1, -1, 0.5, -0.5, 0.8, -0.8, 0.2, -0.2])
    for draw, e in enumerate(noise, start=1):
        further: Points = tuple((kl + 2 + e, gold - 1 + e) for kl, gold in SINGLE)
        inside = runs("single", draw, SINGLE, largest_drop=0.4 + e) + runs("soup 2", draw, further, largest_drop=drops)
        outside = runs("single", draw, SINGLE, prefix=HELD_OUT)
        outside += runs("soup 2", draw, shifted(SINGLE, e), prefix=HELD_OUT)
        rows += [{**one, **other} for one, other in zip(inside, outside, strict=True)]
    return rows


def test_the_four_claims() -> None:
    study = reviews_study(8)
    models = [start(draw) for draw in study.draws]
    moved, gold, stable, outside = claims(study, tables(claim_rows(0.45), models))
    assert moved.effect.interval.estimate == pytest.approx(2)
    assert stable.threshold == pytest.approx(0.4 / 4)
    assert stable.effect.interval.estimate == pytest.approx(0.05)
    assert [claim.side for claim in (moved, gold, stable, outside)] == [1, 1, -1, 1]
    assert [claim.verdict for claim in (moved, gold, stable, outside)] == [
        "supported", "reversed", "not supported", "not supported",
    ]  # fmt: skip
    assert holm([claim.p for claim in (moved, gold, stable, outside)]) == pytest.approx(
        [claim.p_holm for claim in (moved, gold, stable, outside)]
    )
    assert moved.p == p_value(moved.effect.values)
    assert stable.p == p_value(stable.effect.values, 0.1)  # 0.05 ± 0.07 is not surely below 0.1
    assert "KL to sft1 at β = 0.1" in moved.number
    assert claims(study, tables(claim_rows(0.2), models))[2].verdict == "supported"
    assert claims(study, tables(claim_rows(0.8), models))[2].verdict == "reversed"


def test_claims_say_which_draws_are_left_out() -> None:
    study = reviews_study(9)  # of the ninth there is nothing but a baseline, which is not part of the margin
    rows = claim_rows(0.2) + runs("single", 9, SINGLE, largest_drop=100.0)
    found = claims(study, tables(rows, [start(draw) for draw in study.draws]))
    assert [claim.effect.left_out for claim in found] == [1] * 4
    assert found[2].threshold == pytest.approx(0.1)
    nothing = claims(study, tables([]))
    assert {claim.verdict for claim in nothing} == {"too few draws"}
    assert all(math.isnan(claim.p_holm) for claim in nothing)


@pytest.mark.parametrize(
    ("estimate", "p_holm", "side", "verdict"),
    [
        (0.2, 0.05, 1, "supported"),
        (0.2, 0.051, 1, "not supported"),
        (-0.2, 0.01, 1, "reversed"),
        (-0.2, 0.01, -1, "supported"),
        (0.05, 0.01, -1, "supported"),  # above 0, below the margin
        (0.2, 0.01, -1, "reversed"),
        (0.2, NAN, 1, "too few draws"),
    ],
)
def test_verdicts(estimate: float, p_holm: float, side: int, verdict: str) -> None:
    threshold = 0.1 if side < 0 else 0.0
    values = np.full(8, estimate)
    claim = Claim("statement", "number", Effect(values, effect(values).interval), threshold, side, 0.001, p_holm)
    assert claim.verdict == verdict


def test_references_are_known_by_their_models() -> None:
    study = reviews_study(1)
    assert reference_weights(study, "α = 0.25") == {"{sft1}": 0.75, "{sft2}": 0.25}
    assert reference_weights(study, "none") is None
    assert reference_weights(study, "moving average") is None
    matched = {name: arm_of_model(study, name) for name in study.measure.models}
    assert matched == {
        "base": None, "sft1": "single", "sft2": "α = 1", "soup 2": "soup 2", "soup 3": "soup 3", "both": "both",
    }  # fmt: skip
    weights = {"single": 0, "α = 0.25": 0.25, "soup 2": 0.5, "α = 0.75": 0.75, "α = 1": 1}
    assert mixing_weights(study) == pytest.approx(weights)
    assert list(mixing_weights(study)) == list(weights)
    assert mixing_weights(replace(study, compare=replace(study.compare, treatment="both"))) == {}


def test_mixing_by_hand() -> None:
    arms: Mapping[str, Points] = {"single": SINGLE, "soup 2": SOUP, "α = 1": shifted(SINGLE, 0.25)}
    found = mixing(outcomes_of([row for arm, at in arms.items() for row in runs(arm, 1, at)], 1), "kl/base")
    assert found is not None
    assert found.alphas.tolist() == [0, 0.25, 0.5, 0.75, 1]
    gold = [[one.interval.estimate for one in effects] for effects in (found.at_kl, found.at_coef[0.02])]
    np.testing.assert_allclose(gold, [[0, NAN, 1, NAN, 0.25], [0, NAN, -5, NAN, 0.25]])
    study = reviews_study(1)
    assert mixing(Outcomes(study, tables([]), "B"), "kl/base") is None  # has no arms between


def frontier(reference: str, draw: int, *points: tuple[float, float]) -> list[Row]:
    names: Row = {"regime": "A", "reference": reference}
    return [
        {**names, "draw": float(draw), "kl_coef": i, "kl/base": kl, "gold_reward": r}
        for i, (kl, r) in enumerate(points)
    ]


def test_predictions_by_hand() -> None:
    # Frontiers reach KL 4, 6.25 and 9, PPO more: all is read at KL 4. In draw 2 one frontier begins beyond the others'
    # end. The prediction of "both" is wrong in sign.
    predicted = [
        *frontier("sft1", 1, (1.0, 1.0), (4.0, 2.0)),
        *frontier("soup 2", 1, (1.0, 1.0), (6.25, 4.0)),
        *frontier("both", 1, (1.0, 1.5), (9.0, 1.5), (16.0, NAN)),
        *frontier("sft1", 2, (1.0, 1.0), (4.0, 2.0)),
        *frontier("soup 2", 2, (5.0, 1.0), (6.25, 4.0)),
        *frontier("both", 2, (1.0, 1.5), (9.0, 1.5)),
    ]
    rows = [row for draw in (1, 2) for arm in ("single", "soup 2", "both") for row in
            runs(arm, draw, SINGLE if arm == "single" else SOUP)]  # fmt: skip
    soup, both = foretold(outcomes_of(rows, 2, predictions=predicted), "kl/base")
    assert (soup.reference, soup.arm, both.reference) == ("soup 2", "soup 2", "both")
    assert soup.kl.tolist() == [4, 4]
    assert soup.predicted.values == pytest.approx([1 + 3 * 1 / 1.5 - 2, NAN], nan_ok=True)
    assert both.predicted.values == pytest.approx([-0.5, -0.5])
    assert soup.reached.values == pytest.approx([0.5, 0.5])
    assert soup.at_compare.values == pytest.approx([1, 1])
    assert soup.agreement(soup.reached) == (1, 1)
    assert both.agreement(both.reached) == (0, 2)


def test_predictions_are_read_no_further_than_every_arm_went() -> None:
    predicted = [row for name in ("sft1", "soup 2", "both") for row in frontier(name, 1, (1.0, 1.0), (25.0, 5.0))]
    rows = runs("single", 1, SINGLE) + runs("soup 2", 1, SOUP) + runs("both", 1, SOUP)
    soup, _ = foretold(outcomes_of(rows, 1, predictions=predicted), "kl/base")
    assert soup.kl.tolist() == [9]
    assert soup.reached.values == pytest.approx([6 - 6 * 0.5 / 1.5 - 5])
    unfinished, _ = foretold(outcomes_of(rows[:-1], 1, predictions=predicted), "kl/base")
    assert np.isnan(unfinished.kl).all()
    without: Study = replace(reviews_study(1), predict=None)
    assert foretold(Outcomes(without, tables(rows), "A"), "kl/base") == []

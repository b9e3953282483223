"""The page of a study says what is there, in every state of its tables; its figures draw the numbers they are given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from study_tables import plausible_tables, reviews_study
from test_analysis_plots import close_figures, texts

from analysis import plots
from analysis.study.config import Study
from analysis.study.effects import Outcomes, Tables, less_at_equal_kl
from analysis.study.inference import effect
from analysis.study.page import BEGIN, END, replace_between, sections, write_page
from analysis.study.questions import foretold, mixing
from analysis.study.sections import _equal_kl_elsewhere

__all__ = ["close_figures"]  # which pytest finds here

NOTHING = Tables([], [], [], [])


@pytest.fixture(scope="module")
def study() -> Study:
    return reviews_study(3)


@pytest.fixture(scope="module")
def tables(study: Study) -> Tables:
    return plausible_tables(study)


@pytest.fixture(scope="module")
def outcomes(study: Study, tables: Tables) -> Outcomes:
    return Outcomes(study, tables, "A")


def test_page_holds_tables_and_figures_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: Tables
) -> None:
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(f"# The protocol\n\n{BEGIN}\nas it was\n{END}\n\nThe end.\n", encoding="utf-8")
    drawn: list[Path] = []
    monkeypatch.setattr(plots, "save", lambda figure, path, close: drawn.append(path))  # other tests write files
    assert write_page(reviews_study(3, tmp_path / "results", page), tables) == page
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# The protocol\n\n{BEGIN}\n\n### The four statements\n\nsoup 2 − single in regime A")
    assert text.endswith(f"{END}\n\nThe end.\n")
    assert "as it was" not in text
    assert not re.search(r"\bnan\b", text)
    assert re.findall(r"\]\(\.\./results/figures/(\w+)\.png\)", text) == [path.name for path in drawn]
    assert [path.name for path in drawn] == ["effects", "axes", "arms", "mixing", "predictions"]
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.M):
            assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
        assert not section.split("\n\n")[1].startswith("|"), "a sentence comes before a table"
    assert "this is no result yet" not in text


def test_page_of_its_own(tmp_path: Path) -> None:
    path = write_page(reviews_study(2, tmp_path), NOTHING)
    assert path == tmp_path / "README.md"
    text = path.read_text(encoding="utf-8")
    assert "0 of its 62 runs are there; this is no result yet" in text
    assert re.findall(r"^### (.*)", text, flags=re.M) == ["The four statements"]


def test_page_of_one_draw_and_of_missing_runs(study: Study, tables: Tables) -> None:
    some = tables._replace(runs=tables.runs[::3])
    for text in ("\n".join(sections(study, some)), "\n".join(sections(reviews_study(1), tables))):
        assert "not supported" in text
        assert not re.search(r"\bnan\b", text)


def test_gold_is_read_at_the_kl_of_every_coefficient(study: Study, tables: Tables) -> None:
    (found,) = [text for text in sections(study, tables) if text.startswith("### Gold at the KL of other coefficients")]
    strong = replace(study, compare=replace(study.compare, kl_coef=0.4))
    expected = effect(less_at_equal_kl(Outcomes(strong, tables, "A"), "soup 3", "single", "kl/sft1"))
    header, row = (
        line.strip("| ").split(" | ") for line in found.splitlines() if line.startswith(("| arm", "| soup 3"))
    )
    cell = row[header.index("KL to sft1, β = 0.4")]
    assert float(cell.split(" ")[0]) == pytest.approx(expected.interval.estimate, abs=0.006)
    none = Outcomes(study, tables, "B")
    assert _equal_kl_elsewhere(replace(none, tables=tables._replace(runs=[]))) is None


def test_text_is_put_between_marks() -> None:
    assert replace_between("a<b>old<e>c", "<b>", "<e>", "new") == "a<b>\n\nnew\n\n<e>c"
    with pytest.raises(ValueError, match=r"study\.md: has no place for the results; add the lines <b> and <e>"):
        replace_between("a<b>", "<b>", "<e>", "new", name="study.md")


def test_arms_are_lines_from_the_start(outcomes: Outcomes) -> None:
    curves = {arm: outcomes.curve(arm, "kl/base") for arm in ("single", "soup 2")}
    ax = plots.plot_arms(curves, "kl/base")
    assert {"single", "soup 2", "start", "β = 0.1", "KL to base (nats per response)", "gold reward"} <= texts(ax)
    kl, gold = (values.mean(axis=0) for values in curves["single"].points())
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), np.column_stack([kl, gold])[kl.argsort()])
    with pytest.raises(ValueError, match="curves: 2 arms, more than most=1"):
        plots.plot_arms(curves, "kl/base", most=1)


def test_forests_show_intervals_and_draws() -> None:
    found = {"soup 2": effect(np.array([0.1, 0.3, 0.2])), "both": effect(np.array([0.1, np.nan, 0.4]))}
    ax = plots.plot_effects(found, x_label="gold − gold of single")
    assert {"soup 2", "both (n = 2)", "gold − gold of single"} <= texts(ax)
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), [0.1, 0.3, 0.2])
    ends = ax.collections[0].get_segments()[0][:, 0]
    np.testing.assert_allclose(ends, found["soup 2"].interval[1:])
    axes = plots.plot_axes(
        {"kl/base": found["soup 2"], "kl/reference": found["both"], "equal β = 0.1": found["both"]},
        primary="kl/base",
        x_label="gold",
    )
    assert {"equal KL to base", "equal KL to own reference (n = 2)", "equal β = 0.1 (n = 2)"} <= texts(axes)


def test_mixing_and_predictions(outcomes: Outcomes) -> None:
    found = mixing(outcomes, "kl/base")
    assert found is not None
    above, below = plots.plot_mixing(found)
    assert {"equal KL to base", "equal β = 0.02", "0.5\nsoup 2", "0.25"} <= texts(below)
    means = [one.interval.estimate for one in found.at_kl]
    assert any(np.array_equal(line.get_ydata(), means) for line in above.get_lines())
    predictions = foretold(outcomes, "kl/base")
    ax = plots.plot_predictions(predictions)
    assert {"soup 2", "both", "predicted: gold − baseline's", "reached by PPO: gold − baseline's"} <= texts(ax)
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), predictions[0].predicted.values)
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), predictions[0].reached.values)


def test_figures_of_single_draws_have_no_bars() -> None:
    plots.plot_effects({"soup 2": effect(np.array([0.1]))}, x_label="gold")
    plt.gcf().canvas.draw()

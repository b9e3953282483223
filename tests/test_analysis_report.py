"""Report pages say what run folders say, escape what models wrote, and need nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure as MatplotlibFigure

from analysis import plots
from analysis.bootstrap import Interval
from analysis.report import Figure, Section, as_html, group_runs, kl_axes, page, read_runs, write_report
from analysis.tables import Table, or_reason, to_json, with_error, with_limits
from rlhf.metrics import Estimate

SETTINGS = {"policy": "models/sft1", "reference": ["models/sft1"], "kl_coef": 0.1, "seed": 0, "updates": 8}
HOSTILE = "<script>alert(1)</script> | a\nnew line"


def measured(before: float, after: float) -> dict[str, float]:
    return {"before": before, "before_stderr": 0.03, "after": after, "after_stderr": 0.04}


def make_run(
    folder: Path,
    *,
    finished: bool = True,
    gold: bool = True,
    kl: float = 4.0,
    updates: int = 8,
    tracked: bool = True,
    **settings: Any,
) -> Path:
    """A run folder whose gold reward after training is 1 + √kl, and whose last responses are all the same."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"output": str(folder)} | settings), encoding="utf-8")
    rows, samples = [], []
    scored = {"proxy_reward": 0.25} | ({"gold_reward": 0.75} if gold else {})
    for update in range(1, updates + 1):
        row = {"update": update, "episodes": 16 * update, "proxy_reward": 0.1 * update, "proxy_reward_stderr": 0.05}
        row |= {"gold_reward": 0.2 * update, "gold_reward_stderr": 0.05} if gold else {}
        for name in ("reference", "sft1") if tracked else ("reference",):
            row |= {f"kl/{name}": kl * update / 8, f"kl/{name}_stderr": 0.1}
        row |= {"entropy": 1.0, "entropy_stderr": 0.1, "response_length": 20.0, "response_length_stderr": 0.5}
        rows.append({**row, "objective": 0.0})
        words = ["a b c", "d e f"] if update < 7 else ["a a a", "a a a"]
        samples += [
            {"update": update, **scored, "prompts": "training", "prompt": f"p{i}", "response": text}
            for i, text in enumerate(words)
        ]
    held_out = {**scored, "prompts": "held-out", "prompt": "about soup"}
    samples.insert(0, {"update": 0, **held_out, "response": "before training"})
    samples += [{"update": updates, **held_out, "response": HOSTILE}] if finished else []
    for name, lines in (("metrics", rows), ("samples", samples)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if finished:
        summary = {
            "proxy_reward": measured(0.0, 1.5),
            "gold_reward": measured(1.0, 1 + kl**0.5) if gold else None,
            "entropy": measured(1.4, 1.0),
            "response_length": measured(20, 21),
            "kl": {"reference": measured(0, kl), "sft1": measured(0, kl)},
            "updates": updates,
            "episodes": 16 * updates,
            "seconds": 61.4,
            "peak_memory_bytes": 700_000_000,
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered, which takes longest."""
    monkeypatch.setattr(MatplotlibFigure, "savefig", lambda self, path, **options: Path(path).touch())


def tables(sections: Any) -> dict[str, Table]:
    return {block.title: block for section in sections for block in section.blocks if isinstance(block, Table)}


def texts(sections: Any) -> str:
    return "\n".join(block for section in sections for block in section.blocks if isinstance(block, str))


class Reader(HTMLParser):
    """Tags, where they lead, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.seen = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.seen += data


def test_a_page_of_one_run_is_one_file_with_all_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "soup")
    assert write_report(read_runs([str(run)]), tmp_path / "report.html") == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert reader.tags.count("img") == 2
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in reader.links)
    anchors = re.findall(r'<h2 id="([^"]+)"', text)
    assert {link[1:] for link in reader.links if link.startswith("#")} == set(anchors)
    assert "script" not in reader.tags
    assert HOSTILE.replace("\n", "\\n") in reader.seen
    assert "finished" in reader.seen
    assert "Reached frontier" not in reader.seen
    assert {path.name for path in tmp_path.iterdir()} == {"soup", "report.html"}


def test_numbers_are_those_of_the_summary(tmp_path: Path) -> None:
    found = tables(page(read_runs([f"mine={make_run(tmp_path / 'soup')}"])))
    rows = {
        tuple(row[:2]): row[2:] for row in found["On held-out prompts, mean ± one standard error over prompts"].rows
    }
    # The error of a change: √(0.03² + 0.04²) = 0.05.
    assert rows["gold reward", "mine"] == ["1.000 ± 0.030", "3.000 ± 0.040", "2.000 ± 0.050"]
    assert rows["KL to sft1 (nats per response)", "mine"][1] == "4.000 ± 0.040"
    assert found["Folders"].rows[0][2:] == ["finished", "8", "128", "61", "700.00 MB"]


def test_diversity_is_of_equally_many_responses(tmp_path: Path) -> None:
    long, short = make_run(tmp_path / "long"), make_run(tmp_path / "short", updates=7)
    table = tables(page(read_runs([str(long), str(short)])))["Diversity of logged responses"]
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    # Of 8 updates a quarter are 2 with 4 responses, of 7 it is 1 with 2: "a b c" and "d e f", or twice "a a a".
    assert rows["long", "first quarter"] == ["2", "1", "1", "1", "1"]
    assert rows["long", "last quarter"] == ["2", "0.167", "0.25", "0.5", "0.5"]


def test_settings_that_differ_are_marked_and_group_runs(tmp_path: Path) -> None:
    both = ["models/sft1", "models/sft2"]
    runs = read_runs(
        [
            str(make_run(tmp_path / f"{name}-{seed}-{coef}", reference=reference, seed=seed, kl_coef=coef, kl=1 / coef))
            for name, reference in (("plain", both[:1]), ("soup", both))
            for seed in (0, 1)
            for coef in (0.1, 0.25)
        ]
    )
    assert kl_axes(runs) == ("sft1", "sft1")  # the references differ
    assert kl_axes({name: runs[name] for name in ("plain-0-0.1", "plain-1-0.1")}) == ("reference", "reference")
    assert kl_axes(runs, "reference") == ("reference", "reference")
    groups = group_runs(runs)
    assert {label: len(members) for label, members in groups.items()} == {"reference=sft1": 4, "reference=sft1+sft2": 4}
    found = tables(page(runs))
    settings = next(table for title, table in found.items() if title.startswith("Settings"))
    assert [row[0] for row in settings.rows if row[0].endswith("*")] == ["kl_coef *", "reference *", "seed *"]
    reached = found["Reached, mean over seeds"].rows
    assert ["reference=sft1", "0.1", "8", "2", "10.000 ± 0.000", "4.162 ± 0.000"] in reached
    equal = found["gold_reward at equal kl/sft1"]
    assert equal.header[-1] == "reference=sft1+sft2 − reference=sft1"
    # Both groups reach the same at each KL, 1 + √KL; the last row is at the largest KL of all, 10.
    assert equal.rows[-1] == ["10", "4.16 [4.16, 4.16]", "4.16 [4.16, 4.16]", "0 [0, 0]"]


def test_a_model_measured_on_held_out_prompts_alone_is_the_axis_of_the_frontier(tmp_path: Path) -> None:
    """As two runs are whose references are sft1 and a soup of it, without ``track_kl``."""
    both = ["models/sft1", "models/sft2"]
    run = read_runs([str(make_run(tmp_path / "run", reference=both, tracked=False))])
    runs = run | read_runs([str(make_run(tmp_path / "plain", tracked=False))])
    cut = run | read_runs([str(make_run(tmp_path / "cut", tracked=False, finished=False))])
    assert kl_axes(runs, "sft1") == ("reference", "sft1")
    assert kl_axes(runs) == ("reference", "sft1")  # the references differ
    sections = page(runs, kl_to="sft1")
    assert tables(sections)["Reached, mean over seeds"].header[-2:] == ["kl/sft1", "gold_reward"]
    (curves,) = next(section for section in sections if section.title == "Learning curves").blocks
    assert isinstance(curves, Figure)
    assert "The KL is that to reference, since not all runs measured the KL to sft1 at every update" in curves.caption
    assert curves.draw()[-1, -1].get_xlabel() == plots.label_of("kl/reference")
    for few in (run, cut):  # without a frontier nothing could be drawn against it
        with pytest.raises(ValueError, match=r"kl_to=sft1: not measured .* at every update, which curves need; train"):
            kl_axes(few, "sft1")
    with pytest.raises(
        ValueError, match=r"choose one of \['reference'\] or, for the frontier alone, \['reference', 's"
    ):
        kl_axes(runs, "absent")


@pytest.mark.usefixtures("undrawn")
def test_unfinished_runs_and_runs_without_gold_have_a_page_too(tmp_path: Path) -> None:
    finished, cut = (
        make_run(tmp_path / "done", gold=False),
        make_run(tmp_path / "cut", gold=False, finished=False, updates=5),
    )
    sections = page(read_runs([str(finished), str(cut)]))
    assert "not measured on held-out prompts: cut." in texts(sections)
    assert "Fewer than two runs are finished." in texts(sections)
    assert [row[2] for row in tables(sections)["Folders"].rows] == ["finished", "unfinished, 5 of 8 updates"]
    write_report(read_runs([str(finished), str(cut)]), tmp_path / "pages" / "report.md")
    text = (tmp_path / "pages" / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures == ["report_figures/learning_curves.png", "report_figures/kl.png"]
    assert all((tmp_path / "pages" / picture).is_file() for picture in pictures)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| a\\nnew line" in text


def test_runs_that_make_no_frontier_say_why(tmp_path: Path) -> None:
    twins = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    assert "The runs make no frontier: group 'all runs'" in texts(page(read_runs(twins)))


def test_bad_runs_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="absent: no PPO run; expected a folder with"):
        read_runs([str(tmp_path / "absent")])
    with pytest.raises(ValueError, match="a second run called 'run'; give it another name, NAME="):
        read_runs([str(run), str(run)])
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="run: has no updates in its metrics"):
        read_runs([str(run)])


def test_existing_pages_are_not_replaced(tmp_path: Path) -> None:
    runs = read_runs([str(make_run(tmp_path / "run"))])
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    (tmp_path / "other_figures").mkdir()
    for name in ("report.html", "other.md"):
        with pytest.raises(FileExistsError, match="exists already"):
            write_report(runs, tmp_path / name)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "other.md").exists()


def test_numbers_for_people() -> None:
    assert with_error(1.2345, 0.0312) == "1.234 ± 0.031"
    assert with_error(123.4, 12) == "123 ± 12"
    assert with_error(1.5e-8, 2e-8) == "1.5e-08 ± 2.0e-08"
    assert with_error(0.0, 0.0) == "0"
    assert with_error(2.5, math.nan) == "2.5"
    assert with_limits(Interval(1.234, 1.0, 1.5)) == "1.23 [1, 1.5]"
    assert with_limits(Interval(1.234, math.nan, math.nan)) == "1.23"


def test_json_has_no_nan_and_no_arrays() -> None:
    value = {"a": np.array([[1.0, np.nan]]), "b": Estimate(2.0, math.inf), ("c",): (np.int64(3), None, "x")}
    assert json.dumps(to_json(value), allow_nan=False) == json.dumps(
        {"a": [[1.0, None]], "b": {"mean": 2.0, "stderr": None}, "('c',)": [3, None, "x"]}
    )
    assert to_json(Table("t", ["h"], [["x"]])) == {"title": "t", "header": ["h"], "rows": [["x"]], "num_left": 1}


def test_markdown_tables_align_and_escape() -> None:
    table = Table("Title", ["name", "value"], [["a|b<c>", "1"]])
    assert table.markdown() == "### Title\n\n| name | value |\n| --- | ---: |\n| a\\|b&lt;c&gt; | 1 |"
    assert table.text().splitlines() == ["Title", "", "name    value", "a|b<c>      1"]


def test_every_cell_of_a_page_is_escaped() -> None:
    text = as_html("<title>", [Section("<section>", ["<text>", Table("<table>", ["<a>", "<b>"], [["<c>", "<d>"]])])])
    for cell in ("title", "section", "text", "table", "a", "b", "c", "d"):
        assert f"&lt;{cell}&gt;" in text, cell
    assert not {"section", "text", "b", "c", "d"} & set(Reader(text).tags)


def test_columns_of_text_keep_their_words_whole_on_a_narrow_screen() -> None:
    table = Table("Title", ["setting", "run", "value"], [["max_new_tokens", "x" * 99, "1"]], num_left=2)
    text = as_html("Page", [Section("Section", [table])])
    assert '<th class="left" style="min-width: 14ch">setting</th>' in text
    assert '<th class="left" style="min-width: 20ch">run</th><th>value</th>' in text
    assert f'<tr><td class="left">max_new_tokens</td><td class="left">{"x" * 99}</td><td>1</td></tr>' in text


def test_a_table_that_cannot_be_made_says_why() -> None:
    def fail() -> Table:
        raise ValueError("of one seed")

    assert or_reason(fail) == "No comparison at equal KL: of one seed."

"""The page of PPO's settings and metrics says what the code does: every setting, and every name that a run writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, ppo_arguments, run_python

from rlhf import ppo
from rlhf.config import CHOICES, PPOConfig
from rlhf.metric_table import METRICS, SAMPLES, SUMMARY, TIMINGS, Metric
from rlhf.metrics import read_json_lines
from rlhf.ppo_page import markdown, metric_rows, ppo_page, table

PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
LOGS = {"metrics.jsonl": METRICS, "timings.jsonl": TIMINGS, "samples.jsonl": SAMPLES, "summary.json": SUMMARY}
TITLES = {f"### {file}": metrics for file, metrics in LOGS.items()}
TOTALS = {"updates", "episodes", "seconds", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of one update that between them log all there is."""
    root = tmp_path_factory.mktemp("runs")
    options: list[dict[str, Any]] = [
        {
            "reward": ["helpers:share_of_a", "helpers:count_words"],
            "gold_reward": "helpers:count_words",
            "reference": [checkpoints["first"], checkpoints["second"]],
            "reference_kind": "weighted_kl",
            "kl_estimator": "k3",
            "length_penalty": 0.1,
        },
        {"kl_estimator": "k2", "value_model": "shared", "entropy_coef": 0.1, "track_kl": [checkpoints["third"]]},
        {"reference_kind": "none"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.figures.draw_run", lambda run: [])
        for number, settings in enumerate(options):
            ppo.main(ppo_arguments(checkpoints, prompt_file, root / str(number), **({"updates": 1} | settings)))
    return [root / str(number) for number in range(len(options))]


def logged_names(runs: list[Path], file: str) -> set[str]:
    """Every name in a file of the runs; a summary's KLs as ``kl.NAME``."""
    if file != "summary.json":
        return {name for run in runs for row in read_json_lines(run / file) for name in row}
    summaries = [json.loads((run / file).read_text(encoding="utf-8")) for run in runs]
    names = {name for summary in summaries for name in summary if name != "kl"}
    return names | {f"kl.{name}" for summary in summaries for name in summary["kl"]}


def row_of(name: str, rows: Iterable[str]) -> str | None:
    """The row for a logged name: that of the very name, or of a pattern."""
    rows = list(rows)
    patterns = [row for row in rows if re.fullmatch(re.escape(row).replace("NAME", ".+"), name)]
    return name if name in rows else next(iter(patterns), None)


def names_in(metrics: Mapping[str, Metric]) -> set[str]:
    """The names that a table promises, standard errors among them."""
    return {*metrics, *(f"{name}_stderr" for name, metric in metrics.items() if metric.stderr)}


@pytest.mark.parametrize("file", LOGS)
def test_the_table_has_every_logged_name_and_no_other(runs: list[Path], file: str) -> None:
    promised = sorted(names_in(LOGS[file]), key=lambda name: not name.endswith("_stderr"))
    found = {name: row_of(name, promised) for name in logged_names(runs, file)}
    assert not [name for name, row in found.items() if row is None]
    assert set(found.values()) == set(promised)


def test_a_summary_has_measures_and_totals(runs: list[Path]) -> None:
    summary = json.loads((runs[0] / "summary.json").read_text(encoding="utf-8"))
    assert {name for name, value in summary.items() if isinstance(value, (int, float))} == TOTALS
    measures = [*summary["kl"].values(), *(value for name, value in summary.items() if name not in {*TOTALS, "kl"})]
    assert all(measure.keys() == {"before", "before_stderr", "after", "after_stderr"} for measure in measures)


def section(title: str) -> str:
    """The page from the line that starts with ``title`` to the next heading."""
    return re.split(r"\n#+ ", PAGE.split(f"\n{title}", 1)[1])[0]


@pytest.mark.parametrize("title", TITLES)
def test_every_name_is_a_row_under_its_file(title: str) -> None:
    for name, metric in TITLES[title].items():
        (line,) = [line for line in section(title).split("\n") if line.startswith(f"| `{name}`")]
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) == 6
        assert cells[1].endswith(" ± ") == metric.stderr
        assert [cell.strip().replace(r"\|", "|") for cell in cells[2:5]] == [
            metric.unit,
            metric.meaning,
            metric.look_for,
        ]


def test_every_setting_is_in_its_section() -> None:
    settings = PAGE.split("## Settings")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", settings, flags=re.MULTILINE))
    assert list(rows) == [field.name for field in fields(PPOConfig)]
    for field in fields(PPOConfig):
        assert rows[field.name].endswith(field.metadata["help"])
    for name, choices in CHOICES.items():
        assert rows[name].startswith(", ".join(f"`{choice}`" for choice in choices))
    assert rows["kl_coef"].startswith("number | `0.05` | β")
    assert rows["reward"].startswith("text, one or more | none |")
    assert rows["micro_batch_size"].startswith("whole number | none |")
    assert rows["resume"].startswith("flag | `false` |")
    assert "`kl_estimator`" in section("### KL penalty")
    assert "`seed`" in section("### Run")


@pytest.mark.parametrize(
    ("title", "names"),
    [("## Kinds of reference", CHOICES["reference_kind"]), ("## KL estimators", CHOICES["kl_estimator"])],
)
def test_docstrings_explain_every_choice(title: str, names: tuple[str, ...]) -> None:
    for name in names:
        assert f"\n| {name} |" in section(title)
    assert f"**{CHOICES['kl_control'][-1]}.**" in section("## Control of β")


def test_simple_tables_become_those_of_markdown() -> None:
    docstring = (
        "Of ``x``:\n\n==  =====\na   one\n    |more|\nb   two\n==  =====\n\n==  ==\n    h\n==  ==\nc   d\n==  =="
    )
    assert markdown(docstring, ("k", "v")).split("\n\n") == [
        "Of `x`:",
        "| k | v |\n| --- | --- |\n| a | one \\|more\\| |\n| b | two |",
        "|  | h |\n| --- | --- |\n| c | d |",
    ]


def test_a_standard_error_is_marked() -> None:
    assert metric_rows({"a": Metric("m", "x", stderr=True)}).endswith("| `a` ± | m | x |  |")
    assert table(("h",), [["|"]]) == "| h |\n| --- |\n| \\| |"


def test_the_page_is_up_to_date_and_printed_by_its_module() -> None:
    assert ppo_page() == PAGE, "run: python -m rlhf.ppo_page > docs/ppo.md"
    done = run_python(["-m", "rlhf.ppo_page"])
    assert (done.returncode, done.stdout) == (0, PAGE), done.stderr

"""The comparison of references: its statistics on hand-worked numbers, its runs with a stand-in for rlhf."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import measuring
import references

import rlhf.ppo
from rlhf.reviews import tiny_task

TASK_STAND_IN = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
for name in ("sft1", "sft2", "reward"):
    (folder / name).mkdir(parents=True)
(folder / "task.json").write_text(json.dumps({"version": "v", "seed": 0, "quality": {}}))
"""

# Gold is 10 · seed + the coefficient, plus 1 for several references; it notes that it ran, and on how many threads.
PPO_STAND_IN = """
import argparse, json, os, sys
from pathlib import Path
parser = argparse.ArgumentParser()
for name in "output seed updates kl_coef reference_kind track_kl".split():
    parser.add_argument(f"--{name}")
parser.add_argument("--reference", nargs="+", default=[])
known, _ = parser.parse_known_args()
output = Path(known.output)
if os.environ.get("FAIL") == output.name:
    sys.exit("error: no such luck")
output.mkdir(parents=True)
with open(os.environ["TOLD"], "a") as file:
    print(output.name, os.environ["OMP_NUM_THREADS"], file=file)
def change(after):
    return {"before": 1.0, "before_stderr": 0.1, "after": after, "after_stderr": 0.1}
gold = 10 * int(known.seed) + float(known.kl_coef) + (len(known.reference) > 1)
kl = {"sft1": change(2.0), Path(known.track_kl).name: change(3.0)}
if known.reference_kind != "none":
    kl["reference"] = change(4.0)
summary = {name: change(5.0) for name in ("proxy_reward", "entropy", "response_length")}
summary |= {"gold_reward": change(gold), "kl": kl, "updates": int(known.updates), "episodes": 64 * int(known.updates)}
(output / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that the children import as rlhf. → the file in which it notes its runs"""
    (tmp_path / "stand-in" / "rlhf" / "reviews").mkdir(parents=True)
    for name, text in (
        ("__init__", ""),
        ("ppo", PPO_STAND_IN),
        ("reviews/__init__", ""),
        ("reviews/__main__", TASK_STAND_IN),
    ):
        (tmp_path / "stand-in" / "rlhf" / f"{name}.py").write_text(text)
    monkeypatch.setattr(measuring, "ROOT", tmp_path / "stand-in")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.chdir(tmp_path)  # `python -m` looks in the current folder first
    return tmp_path / "told"


def runs_of(told: Path) -> list[str]:
    return sorted(told.read_text().splitlines()) if told.exists() else []


def test_there_are_thirteen_runs_a_seed_and_each_has_a_folder_of_its_own() -> None:
    cases = references.cases(3)
    assert len(cases) == len({case.name for case in cases}) == 4 * 3 + 1
    assert {case.seed for case in cases} == {3}
    assert references.Case("soup", 0.02, 3) in cases
    assert references.Case("none", 0.0, 3).name == "none-0-seed3"


def test_the_mean_over_seeds_has_the_standard_error_of_a_mean() -> None:
    mean = references.Mean.over([1.0, 2.0, 6.0])  # deviations −2, −1, 3: variance 14/2, of the mean 7/3
    assert mean.mean == 3.0
    assert mean.stderr == pytest.approx(math.sqrt(7 / 3))
    assert mean.cell(2) == "3.00 ± 1.53"
    assert references.Mean.over([1.5]).cell(1, "+") == "+1.5"


def test_differences_are_paired_by_seed() -> None:
    paired = references.difference({0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 0.5, 1: 4.0, 7: 100.0})
    assert paired.mean == pytest.approx(2.5 / 3)  # 0.5, 1, 1
    assert paired.stderr == pytest.approx(1 / 6)


def test_runs_are_done_once_on_one_thread_and_gathered(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    command = ["run", str(tmp_path / "all"), "--results", str(results), "--updates", "7", "--seeds"]
    assert references.main([*command, "1"]) == 0
    first = runs_of(stand_in)
    assert first == sorted(f"{case.name} 1" for case in references.cases(0))
    assert "± " not in capsys.readouterr().out.split("seed 0")[-1].split("###")[-1]

    (tmp_path / "all" / "runs" / "soup-0.1-seed0" / "process.json").unlink()  # as if interrupted
    assert references.main([*command, "2"]) == 0
    again = sorted([*first, "soup-0.1-seed0 1", *(f"{case.name} 1" for case in references.cases(1))])
    assert runs_of(stand_in) == again
    rows = json.loads(results.read_text())["runs"]
    assert len(rows) == 26
    (row,) = (row for row in rows if (row["reference"], row["kl_coef"], row["seed"]) == ("weighted", 0.4, 1))
    assert row["after"]["gold"] == pytest.approx(11.4)
    assert row["before"]["gold"] == 1.0
    assert (row["after"]["kl_sft1"], row["after"]["kl_soup"], row["after"]["kl_reference"]) == (2.0, 3.0, 4.0)
    assert (row["updates"], row["episodes"], row["workers"]) == (7, 448, 2)
    soup = json.loads((tmp_path / "all" / "soup.json").read_text())
    assert [Path(model).name for model in soup["models"]] == ["sft1", "sft2"]

    # gold of two references is 1 above that of one; without any, at 0, it is below by the coefficient
    printed = capsys.readouterr().out
    means, differences = printed.split("### After training")[1].split("### Difference")
    assert "| soup | 0.1 | 6.100 ± 5.000 | 5.000 ± 0.000 | 2.00 ± 0.00 | 3.00 ± 0.00 | 4.00 ± 0.00 |" in means
    assert "| none | – | 5.000 ± 5.000 | 5.000 ± 0.000 | 2.00 ± 0.00 | 3.00 ± 0.00 | – |" in means
    assert "| before training (sft1) | – | 1.000 ± 0.000 |" in means
    assert "| soup | 0.1 | +1.000 ± 0.000 |" in differences
    assert "| none | 0.4 | -0.400 ± 0.000 |" in differences
    assert "single SFT |" not in differences


def test_a_failing_run_is_named_with_its_error(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "single-0.1-seed0")
    command = ["run", str(tmp_path / "all"), "--results", str(tmp_path / "r.json"), "--workers", "1", "--seeds", "1"]
    assert references.main(command) == 2
    assert "no such luck" in capsys.readouterr().err
    assert len(runs_of(stand_in)) < 12  # those not begun are not begun any more
    assert references.main(["table", str(tmp_path / "all"), "--results", str(tmp_path / "r.json")]) == 2
    assert "not all runs of seed 0 are done" in capsys.readouterr().err
    monkeypatch.delenv("FAIL")
    assert references.main(command) == 0
    assert references.main([*command, "--updates", "3"]) == 2
    assert "say --updates 50" in capsys.readouterr().err


def test_the_page_gets_tables_and_a_figure_from_the_results_alone(tmp_path: Path) -> None:
    def row(case: references.Case) -> dict[str, Any]:
        after = {measure.key: case.seed + case.kl_coef for measure in references.MEASURES}
        took = {"seconds": 30.0, "user_seconds": 29.0, "workers": 2, "updates": 50, "episodes": 3200}
        return {**vars(case), **took, "before": dict.fromkeys(after, 0.5), "after": after}

    results = {
        "machine": {"processor": "P", "cores": 2, "memory_gb": 8, "kernel": "K"},
        "versions": {"torch": "2"},
        "task_seconds": 80.0,
        "eval_episodes": 1024,
        "runs": [row(case) for seed in range(2) for case in references.cases(seed)],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = tmp_path / "references.md"
    page.write_text(f"above\n{references.BEGIN}\nold\n{references.END}\nbelow\n")
    assert references.main(["table", "--results", str(tmp_path / "results.json"), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "\nold\n" not in text
    assert "26 runs (2 seeds) of 50 updates, 3,200 episodes each" in text
    assert "30 s (30–30) on one thread, 2 at once: 6 minutes for all, and 80 s for the task" in text  # 26 · 30 s / 2
    assert "](references.png)" in text
    assert (tmp_path / "references.png").read_bytes().startswith(b"\x89PNG")

    lines = {bar.get_label(): bar for bar in references.figure(results).axes[0].containers}
    assert lines.keys() == {kind.label for kind in references.KINDS.values()}
    assert lines["soup"].lines[0].get_xdata() == pytest.approx([0.52, 0.6, 0.9])
    assert lines["none"].lines[0].get_xdata() == pytest.approx([0.5])


def test_the_page_in_docs_has_a_place_for_them() -> None:
    text = (ROOT / "docs" / "references.md").read_text()
    assert text.index(references.BEGIN) < text.index(references.END)


def test_ppo_takes_the_flags_of_every_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_task(tmp_path / "task")
    references.make_task(tmp_path)
    monkeypatch.setattr(references, "EVAL_EPISODES", 4)
    quick = ["--batch_size=4", "--minibatch_size=2", "--max_new_tokens=6"]
    measures = {}
    for case in references.cases(0)[::3]:
        rlhf.ppo.main([*references.flags(case, tmp_path, updates=1), *quick])
        summary = json.loads((tmp_path / "runs" / case.name / "summary.json").read_text())
        measures[case.reference] = references.measures_of(summary)["after"]
    assert measures.keys() == references.KINDS.keys()
    assert measures["single"]["kl_reference"] == pytest.approx(measures["single"]["kl_sft1"])
    assert measures["soup"]["kl_reference"] == pytest.approx(measures["soup"]["kl_soup"])
    assert measures["weighted"]["kl_reference"] > measures["weighted"]["kl_sft1"] / 2
    assert measures["moving"]["kl_reference"] > 0
    assert measures["none"]["kl_reference"] is None
    assert measures["none"]["kl_sft1"] > 0

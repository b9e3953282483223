"""Studies: their configuration, what is done and what is skipped, and the tables that come of it."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, count_words, share_of_a

from analysis.study import grid
from analysis.study.__main__ import main
from analysis.study.config import Case, Study
from analysis.study.measures import Measures, largest_drop, win_rate
from analysis.study.store import MODELS, PREDICTIONS, RUNS, TIMINGS, by_draw, read_table, write_table
from rlhf import ppo
from rlhf.command_line import run_command
from rlhf.data import load_prompts
from rlhf.evaluation import evaluate
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.randomness import generator
from rlhf.reference import load_model_reference
from rlhf.rollout import sample

Settings = Callable[..., Path]


@pytest.fixture
def config(checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path) -> Settings:
    """A study file: two draws of three arms on tiny models, with the given changes."""
    settings: dict[str, Any] = {
        "work": str(tmp_path / "work"),
        "results": str(tmp_path / "results"),
        "draws": [1, 2],
        "models": {name: str(checkpoints[name]) for name in ("first", "second", "third")},
        "regimes": {"A": {"description": "as it is"}, "B": {"description": "another", "models": {}, "arms": ["plain"]}},
        "arms": {
            "soup": {"reference": ["{first}", "{second}"]},
            "plain": {"reference": ["{first}"]},
            "weighted": {"reference": ["{first}", "{third}"], "reference_kind": "weighted_kl"},
            "free": {"reference_kind": "none", "kl_coef": 0},
        },
        "kl_coefs": [0.1],
        "ppo": {
            "policy": "{first}",
            "reward": ["helpers:share_of_a"],
            "prompts": str(prompt_file),
            "test_prompts": str(prompt_file),
            "max_new_tokens": 5,
            "updates": 2,
            "batch_size": 4,
            "minibatch_size": 2,
            "eval_episodes": 4,
            "learning_rate": 0.01,
            "save_every": 0,
            "seed": "{draw}",
        },
        "measure": {
            "episodes": 30,
            "prompts": str(prompt_file),
            "held_out": str(prompt_file),
            "rewards": {"proxy_reward": "helpers:share_of_a", "gold_reward": "helpers:count_words"},
            "models": {"third": "{third}", "first": "{first}", "soup": ["{first}", "{second}"]},
            "kl": ["third", "first", "soup"],
        },
        "compare": {
            "baseline": "plain",
            "treatment": "soup",
            "regime": "A",
            "kl_coef": 0.1,
            "axis": "kl/third",
            "moved": "kl/first",
        },
    }

    def write(**changes: Any) -> Path:
        merged = {**settings}
        for name, value in changes.items():
            section, _, key = name.partition("__")
            merged[section] = {**merged[section], key: value} if key else value
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(merged, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return path

    return write


class Inline(Executor):
    """Does what it is given at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a study ran, each in this process, where starting it takes no time."""
    given: list[list[str]] = []

    @contextmanager
    def pool(workers: grid.Workers) -> Iterator[Executor]:
        yield Inline()

    def run(what: str, command: list[str], log: Path) -> float:
        given.append(command)
        module, *arguments = command
        if module != "rlhf.ppo":
            Path(arguments[arguments.index("--output") + 1]).mkdir()
        elif run_command(ppo.main, arguments):
            raise grid.StudyError(f"{what}: failed")
        return 1.5

    monkeypatch.setattr(grid, "_pool", pool)
    monkeypatch.setattr(grid, "_run", run)
    monkeypatch.setattr("rlhf.figures.draw_run", lambda run: [])
    monkeypatch.setattr("analysis.study.__main__.write_page", lambda study, tables: study.results)
    grid._kept.clear()
    return given


def run_whole(path: Path, *flags: str) -> dict[str, bytes]:
    """Run the study. → the tables that do not depend on the clock"""
    assert run_command(main, ["--config", str(path), *flags]) == 0
    results = Study.read(path).results
    tables = [results / name for name in (RUNS, MODELS, PREDICTIONS)]
    return {table.name: table.read_bytes() for table in tables if table.is_file()}


# ── Doing it ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_run_is_done_once_and_stored(config: Settings, commands: list[list[str]]) -> None:
    path = config(predict={"references": ["first", "soup"], "samples": 40})
    study = Study.read(path)
    tables = run_whole(path)
    rows = read_table(study.results / RUNS)
    assert [(r["regime"], r["draw"], r["arm"]) for r in rows] == [
        *(("A", draw, arm) for draw in (1, 2) for arm in ("soup", "plain", "weighted", "free")),
        *(("B", draw, "plain") for draw in (1, 2)),
    ]
    assert [math.isnan(float(row["kl_coef"])) for row in rows] == [row["arm"] == "free" for row in rows]
    assert len(commands) == 8  # B's plain run is A's
    assert rows[1]["proxy_reward"] == rows[8]["proxy_reward"]
    assert rows[1]["proxy_reward"] != rows[5]["proxy_reward"]  # draws have seeds of their own
    assert [r["model"] for r in read_table(study.results / MODELS)] == ["start", "third", "first", "soup"] * 4
    assert {(r["draw"], r["reference"]) for r in read_table(study.results / PREDICTIONS)} == {
        (draw, name) for draw in (1, 2) for name in ("first", "soup")
    }
    timings = [row for row in read_table(study.results / TIMINGS) if row["table"] == RUNS]
    assert [row["seconds"] for row in timings] == [1.5] * 8

    assert run_whole(path) == tables  # all is done
    assert len(commands) == 8


def test_a_row_says_what_evaluating_the_run_says(
    config: Settings, commands: list[list[str]], prompt_file: Path
) -> None:
    path = config(draws=[1])
    study = Study.read(path)
    run_whole(path)
    case = Case("A", 1, "weighted", 0.1)
    folder = study.run_folder(case)
    tokenizer = load_tokenizer(folder / "policy")
    policy, start = load_causal_lm(folder / "policy"), load_causal_lm(study.models["first"])
    prompts = load_prompts(prompt_file, tokenizer)
    rollout = sample(
        policy, tokenizer, [*prompts, *prompts[:10]], max_new_tokens=5, generator=generator(1, "study held_out/")
    )
    scores = {
        "gold_reward": torch.tensor(count_words(rollout.prompts, rollout.responses)),
        "proxy_reward": torch.tensor(share_of_a(rollout.prompts, rollout.responses)),
    }
    others = {name: load_model_reference([study.models[name]]) for name in ("first", "third")}
    expected = evaluate(policy, rollout, scores, others)
    row = next(row for row in read_table(study.results / RUNS) if row["arm"] == "weighted")
    for name in scores:
        assert row[f"held_out/{name}"] == pytest.approx(expected.rewards[name].mean, rel=1e-6)
        assert row[name] != row[f"held_out/{name}"]  # other random numbers
    for name in others:
        assert row[f"held_out/kl/{name}"] == pytest.approx(expected.kl[name].mean, rel=1e-5)
    own = 0.5 * (expected.kl["first"].mean + expected.kl["third"].mean)
    assert row["held_out/kl/reference"] == pytest.approx(own, rel=1e-5)
    rows = zip(rollout.response_tokens, rollout.response_mask, strict=True)
    responses = [tuple(tokens[mask & (tokens != tokenizer.eos_token_id)].tolist()) for tokens, mask in rows]
    pairs = [pair for response in responses for pair in pairwise(response)]
    assert row["held_out/distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert row["held_out/unique_responses"] == pytest.approx(len(set(responses)) / 30)
    squares = [((a - b) ** 2).sum().item() for a, b in zip(policy.parameters(), start.parameters(), strict=True)]
    assert row["distance"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_what_has_no_reference_has_no_kl_to_it(config: Settings, commands: list[list[str]]) -> None:
    path = config(draws=[1])
    run_whole(path)
    rows = {str(r["arm"]): r for r in read_table(Study.read(path).results / RUNS) if r["regime"] == "A"}
    assert math.isnan(float(rows["free"]["kl/reference"]))
    assert rows["plain"]["kl/reference"] == pytest.approx(rows["plain"]["kl/first"], abs=1e-6)
    assert rows["soup"]["kl/reference"] == pytest.approx(rows["soup"]["kl/soup"], abs=1e-6)
    assert rows["soup"]["kl/reference"] != pytest.approx(rows["soup"]["kl/first"], abs=1e-3)


def test_win_rates_pair_responses_with_the_baseline_and_the_start(
    config: Settings, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(draws=[1])
    study = Study.read(path)
    golds: dict[str, np.ndarray] = {}
    measure = Measures.of_run

    def of_run(self: Measures, folder: Path, settings: Any) -> Any:
        row, found = measure(self, folder, settings)
        golds[folder.name] = found["held_out/"]
        return row, found

    monkeypatch.setattr(Measures, "of_run", of_run)
    run_whole(path)
    soup, plain = (golds[study.run_folder(Case("A", 1, arm, 0.1)).name] for arm in ("soup", "plain"))
    rows = {str(r["arm"]): r for r in read_table(study.results / RUNS) if r["regime"] == "A"}
    assert rows["soup"]["held_out/win_rate/baseline"] == pytest.approx(win_rate(soup, plain))
    assert math.isnan(float(rows["plain"]["held_out/win_rate/baseline"]))
    assert math.isnan(float(rows["free"]["win_rate/baseline"]))
    assert 0 < float(rows["plain"]["win_rate/start"]) < 1


def test_a_win_counts_one_and_a_tie_half() -> None:
    assert win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])) == (1 + 0.5 + 0 + 1) / 4


def test_the_largest_drop_is_the_most_lost_in_one_update() -> None:
    assert largest_drop([0.0, 1.0, 0.4, 0.5, 0.2]) == pytest.approx(0.6)
    assert largest_drop([0.0, 1.0]) == 0.0
    assert largest_drop([0.0]) == 0.0


def test_one_arm_is_done_again_to_the_same_bytes(config: Settings, commands: list[list[str]]) -> None:
    path = config(draws=[1])
    tables = run_whole(path)
    commands.clear()
    assert run_whole(path, "--arm", "soup", "--draw", "1", "--again") == tables
    assert [line[line.index("--output") + 1].rpartition("/")[2][:4] for line in commands] == ["soup"]


def test_only_what_is_chosen_is_done(config: Settings, commands: list[list[str]]) -> None:
    path = config()
    run_whole(path, "--arm", "soup", "free", "--draw", "1")
    assert len(commands) == 2
    run_whole(path, "--regime", "B", "--draw", "2")
    assert len(commands) == 3


def test_a_row_made_anew_without_the_baseline_s_responses_says_what_it_lacks(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(draws=[1], regimes={"A": {"description": "as it is"}})
    whole = run_whole(path)
    assert "win rate" not in capsys.readouterr().err
    shutil.rmtree(Study.read(path).work / "draw-1" / "runs")
    run_whole(path, "--arm", "soup", "free", "--again")
    assert "no win rate against plain in 1 of the rows made now" in capsys.readouterr().err
    assert run_whole(path, "--arm", "plain", "--again") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo__gold_reward": "helpers:none_such"}, "none_such"),
        ({"measure__rewards": {"proxy_reward": "helpers:share_of_a", "gold_reward": "helpers:none"}}, "helpers:none"),
        ({"results": "/proc/results"}, "results: /proc/results: cannot be made"),
        ({"page": "none.md"}, "page: none.md: no such file"),
        ({"page": __file__}, "has no place for the results"),
    ],
)
def test_what_could_not_end_well_is_not_begun(
    config: Settings,
    commands: list[list[str]],
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(stages={"task": "rlhf.reviews"}, **changes)
    assert run_command(main, ["--config", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not commands
    assert not Study.read(path).work.exists()


def test_rows_of_models_stay_when_a_setting_of_training_changes(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"draws": [1], "regimes": {"A": {"description": "as it is"}}, "arms": {"plain": {}, "soup": {}}}
    before = run_whole(config(**small))
    path = config(**small, ppo__updates=1)
    assert run_command(main, ["--config", str(path), "--report"]) == 0
    assert "runs.csv: 2 rows are of other settings" in capsys.readouterr().err
    after = run_whole(path)
    assert "models.csv" not in capsys.readouterr().err
    assert before[MODELS] == after[MODELS]
    assert before[RUNS] != after[RUNS]


def test_rows_stay_when_the_work_is_deleted_and_go_when_settings_change(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(draws=[1])
    tables = run_whole(path)
    shutil.rmtree(Study.read(path).work)
    assert run_whole(path) == tables
    assert len(commands) == 4
    run_whole(config(draws=[1], ppo__learning_rate=0.02))
    assert len(commands) == 8
    assert "5 rows are of other settings" in capsys.readouterr().err


def test_a_run_whose_policy_runs_away_is_named_and_the_others_are_done(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(draws=[1], arms__soup={"reference": ["{first}", "{second}"], "max_ratio": 1e-9, "max_skipped": 1})
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(path)])
    assert ended.value.code == 1
    assert "1 runs ended by themselves:\nregime A, draw 1, soup, β = 0.1: failed" in capsys.readouterr().err
    assert "soup" not in {row["arm"] for row in read_table(Study.read(path).results / RUNS)}
    assert len(read_table(Study.read(path).results / RUNS)) == 4


def test_a_run_that_never_began_stops_the_study(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(draws=[1], arms__soup={"reference": ["{first}", "/none"]})
    assert run_command(main, ["--config", str(path)]) == 2
    assert "error: regime A, draw 1, soup, β = 0.1: failed" in capsys.readouterr().err


def test_stages_are_made_once_in_order(config: Settings, commands: list[list[str]], tmp_path: Path) -> None:
    path = config(draws=[3], stages={"task": "rlhf.reviews --seed {draw}", "more": "rlhf.sft --model {task}/base"})
    run_whole(path, "--arm", "plain")
    folder = tmp_path / "work" / "draw-3"
    assert commands[:2] == [
        ["rlhf.reviews", "--seed", "3", "--output", f"{folder}/task"],
        ["rlhf.sft", "--model", f"{folder}/task/base", "--output", f"{folder}/more"],
    ]
    (folder / "more").rmdir()
    (folder / "more.unfinished").mkdir()
    run_whole(path, "--arm", "plain", "--again")
    assert commands[3] == [*commands[1], "--resume"]
    assert len(commands) == 5


def test_a_stage_made_by_another_command_is_not_taken_for_this_one(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_whole(config(draws=[3], stages={"task": "rlhf.reviews --seed {draw}"}), "--arm", "plain")
    path = config(draws=[3], stages={"task": "rlhf.reviews --seed 5"})
    assert run_command(main, ["--config", str(path), "--arm", "plain"]) == 2
    assert "task: was made by another command" in capsys.readouterr().err


def test_two_studies_do_not_work_in_one_folder(
    config: Settings, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    with grid._alone(Study.read(path).work):
        assert run_command(main, ["--config", str(path)]) == 2
    assert "another process is at this study" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_study_gives_the_same_tables(config: Settings, tmp_path: Path) -> None:
    path = config(ppo__updates=6)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "analysis.study", "--config", str(path), "--workers", "2"]
    study = Study.read(path)
    kills = 0
    for seconds in (8, 12, 16, 20, 24):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
            time.sleep(1)
    assert kills >= 2
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    tables = {name: (study.results / name).read_bytes() for name in (RUNS, MODELS)}
    assert tables[RUNS].count(b"\n") == 1 + 10
    shutil.rmtree(study.work)
    shutil.rmtree(study.results)
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert tables == {name: (study.results / name).read_bytes() for name in (RUNS, MODELS)}


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [{"regime": "1", "draw": 1.0, "x": 0.1}, {"regime": "a, b", "draw": 2.0, "x": math.nan, "kl/y z": 1e-12}]
    write_table(tmp_path / "new" / "t.csv", rows)
    read = read_table(tmp_path / "new" / "t.csv")
    assert read[0] == rows[0] | {"kl/y z": pytest.approx(math.nan, nan_ok=True)}
    assert read[1]["regime"] == "a, b"
    assert math.isnan(float(read[1]["x"]))
    assert read[1]["kl/y z"] == 1e-12
    assert read_table(tmp_path / "none.csv") == []


def test_values_are_found_draw_by_draw() -> None:
    rows = [
        {"arm": "a", "kl_coef": 0.1, "draw": 2.0, "x": 5.0},
        {"arm": "a", "kl_coef": math.nan, "draw": 1.0, "x": 7.0},
        {"arm": "b", "kl_coef": 0.1, "draw": 1.0, "x": 6.0},
        {"arm": "a", "kl_coef": 0.1, "draw": 9.0, "x": 8.0},
    ]
    np.testing.assert_equal(by_draw(rows, [1, 2], "x", arm="a", kl_coef=0.1), [math.nan, 5.0])
    np.testing.assert_equal(by_draw(rows, [1, 2], "x", arm="a", kl_coef=None), [7.0, math.nan])


# ── Configuration ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_project_s_own_studies_are_valid() -> None:
    reviews = Study.read(ROOT / "study" / "reviews.yaml")
    cases = list(reviews.cases())
    assert len(cases) == 8 * (31 + 3 * 9)
    assert len({reviews.run_folder(case) for case in cases}) == len(cases) - 24  # single in A and B
    settings = reviews.settings(Case("C", 2, "soup 2", 0.4))
    folder = "study/work/reviews/draw-2"
    assert settings["reference"] == [f"{folder}/far1", f"{folder}/far2"]
    assert settings["policy"] == f"{folder}/far1"
    assert (settings["seed"], settings["kl_coef"]) == ("2", 0.4)
    for name in ("smollm2.yaml", "smollm2-gpu.yaml"):
        assert len(list(Study.read(ROOT / "study" / name).cases())) == 2 * 2 * 3


def test_versions_depend_on_settings_and_not_on_places(config: Settings, tmp_path: Path) -> None:
    case = Case("A", 1, "soup", 0.1)
    study = Study.read(config(stages={"task": "rlhf.reviews"}, models__first="{task}/sft1"))
    moved = Study.read(
        config(stages={"task": "rlhf.reviews"}, models__first="{task}/sft1", work=str(tmp_path / "elsewhere"))
    )
    other = Study.read(config(stages={"task": "rlhf.reviews --seed 1"}, models__first="{task}/sft1"))
    more = Study.read(config(stages={"task": "rlhf.reviews"}, models__first="{task}/sft1", measure__episodes=31))
    assert study.version(case) == moved.version(case)
    assert study.draw_version(1, "A") == moved.draw_version(1, "A")
    assert len({s.version(case) for s in (study, other, more)}) == 3
    assert len({s.draw_version(1, "A") for s in (study, other, more)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": []}, "draws: empty; give at least one"),
        ({"draws": [1, 1]}, "draws: [1, 1] names one twice"),
        ({"draws": 8}, "draws: expected a list, found 8"),
        ({"arm": {}}, "unknown setting 'arm'; did you mean 'arms'?"),
        ({"measure__episode": 3}, "measure: unknown setting 'episode'; did you mean 'episodes'?"),
        ({"measure": {"episodes": 3}}, "measure: lacks 'prompts'"),
        ({"arms__start": {}}, "arms: 'start' is the policy before training"),
        ({"compare__baseline": "plane"}, "compare.baseline: 'plane' is none of"),
        ({"compare__kl_coef": 0.2}, "compare.kl_coef: 0.2 is none of [0.1]"),
        ({"compare__axis": "kl/base"}, "compare.axis: 'kl/base' is none of ['kl/third', 'kl/first', 'kl/soup']"),
        ({"measure__kl": ["fourth"]}, "measure.kl: 'fourth' is none of"),
        ({"measure__rewards": {"proxy_reward": "x:y"}}, "measure.rewards: lacks 'gold_reward'"),
        ({"predict": {"references": ["x"], "samples": 20}}, "predict.references: 'x' is none of"),
        (
            {"predict": {"references": ["first"], "samples": 19}},
            "predict.samples: 19: expected a whole number, at least 20",
        ),
        ({"predict": {"references": ["first"], "samples": "x"}}, "predict.samples: 'x': expected a whole number"),
        ({"draws": [1, "2"]}, "draws: '2': expected a whole number, at least 0"),
        ({"draws": [True]}, "draws: True: expected a whole number"),
        ({"kl_coefs": [0.1, 0.1]}, "kl_coefs: [0.1, 0.1] names one twice"),
        ({"kl_coefs": ["0.1"]}, "kl_coefs: '0.1': expected a number, at least 0"),
        ({"kl_coefs": [-0.1]}, "kl_coefs: -0.1: expected a number, at least 0"),
        ({"measure__episodes": 16.5}, "measure.episodes: 16.5: expected a whole number, at least 1"),
        ({"measure__episodes": -1}, "measure.episodes: -1: expected a whole number, at least 1"),
        ({"arms__soup": ["{first}"]}, "arms.soup: expected settings of a run, 'name: value', found ['{first}']"),
        ({"arms__soup": {"refrence": []}}, "arms.soup: unknown setting 'refrence'; did you mean 'reference'?"),
        ({"arms__soup": {"kl_coef": 0.3}}, "arms.soup: 'kl_coef' is set by the study, from kl_coefs"),
        ({"ppo__kl_coef": 0.3}, "ppo: 'kl_coef' is set by the study, from kl_coefs"),
        ({"ppo__lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"ppo__updates": "two"}, "ppo, with arms.plain: argument --updates: invalid int value: 'two'"),
        ({"ppo__updates": -2}, "ppo, with arms.plain: updates=-2"),
        ({"ppo__minibatch_size": 3}, "ppo, with arms.plain: minibatch_size=3 does not divide batch_size=4"),
        ({"regimes__B": {"description": "b", "arms": ["soup"]}}, "regimes.B.arms: lacks 'plain', the baseline"),
        ({"regimes__B": {"description": "b", "models": {"x": "y"}}}, "regimes.B.models: 'x' is none of"),
        ({"ppo__output": "x"}, "'output' is set by the study"),
        ({"ppo": {"policy": "{first}"}}, "ppo: lacks 'reward'"),
        (
            {"ppo__policy": "{fist}"},
            "ppo, with arms.plain: {fist} is neither draw, nor an earlier stage, nor a model; did you mean 'first'?",
        ),
        (
            {"stages": {"a": "rlhf.sft --model {b}", "b": "rlhf.reviews"}},
            "stages.a: {b} is neither draw, nor an earlier stage",
        ),
        ({"stages": {"first": "rlhf.reviews"}}, "'first' names two things"),
    ],
)
def test_a_wrong_configuration_is_named(config: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Study.read(config(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "sup"], "--arm sup: not in"),
        (["--draw", "3"], "--draw 3: not in"),
        (["--workers", "0"], "0: must be a whole number, at least 1"),
        (["--report", "--again"], "--report with --again"),
        (["--report"], "results: nothing of this study is stored there; run it without --report"),
        (["--reprot"], "unrecognized arguments: --reprot"),
    ],
)
def test_a_wrong_flag_is_named(
    config: Settings, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["--config", str(config()), *flags]) == 2
    assert message in capsys.readouterr().err

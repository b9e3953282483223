"""Whole runs of ``rlhf.ppo`` on tiny models: what they write, that they repeat, resume, and learn."""

from __future__ import annotations

import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LETTERS, make_llama, ppo_arguments, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import ppo
from rlhf.command_line import parse_config, run_command
from rlhf.config import PPOConfig

MEASURE = {"before", "before_stderr", "after", "after_stderr"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON Lines in the strict sense: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def read_summary(run: Path) -> dict[str, Any]:
    (summary,) = [json.loads((run / "summary.json").read_text(encoding="utf-8"))]
    return summary


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest of a tiny run."""
    monkeypatch.setattr("rlhf.figures.draw_run", lambda run: [])


def settings_of_full_run(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """The reference is a soup of the policy's start with itself; β adapts; checkpoints every second update."""
    return {
        "reference": [checkpoints["first"], checkpoints["first"]],
        "gold_reward": "helpers:count_words",
        "track_kl": [checkpoints["third"]],
        "kl_control": "adaptive",
        "kl_target": 0.5,
        "kl_horizon": 40,
        "save_every": 2,
        "seed": 3,
    }


@pytest.fixture(scope="module")
def full_run(checkpoints: dict[str, Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "full"
    arguments = ppo_arguments(checkpoints, prompt_file, output, **settings_of_full_run(checkpoints))
    assert run_command(ppo.main, arguments) == 0
    return output


def test_layout_of_a_run_folder(full_run: Path, checkpoints: dict[str, Path], prompt_file: Path) -> None:
    assert {path.name for path in full_run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "timings.jsonl", "samples.jsonl", "policy", "reference", "checkpoints",
        "figures", "summary.json",
    }  # fmt: skip
    assert [path.name for path in (full_run / "reference").iterdir()] == ["soup.json"]
    assert [path.name for path in (full_run / "checkpoints").iterdir()] == ["update-000002"]
    figures = list((full_run / "figures").glob("*.png"))
    assert len(figures) >= 2
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)

    arguments = ppo_arguments(checkpoints, prompt_file, full_run, **settings_of_full_run(checkpoints))
    given = parse_config(PPOConfig, arguments, description=None)
    assert parse_config(PPOConfig, ["--config", str(full_run / "config.yaml")], description=None) == given

    soup = json.loads((full_run / "reference" / "soup.json").read_text(encoding="utf-8"))
    assert [ingredient["folder"] for ingredient in soup["ingredients"]] == [str(checkpoints["first"])] * 2
    assert soup["kind"] == "soup"
    assert soup["recipe"] == {"method": "linear", "models": [str(checkpoints["first"])] * 2}


def test_metrics_have_one_object_an_update_with_the_same_keys(full_run: Path) -> None:
    rows = read_lines(full_run / "metrics.jsonl")
    assert [(row["update"], row["episodes"]) for row in rows] == [(1, 8), (2, 16), (3, 24), (4, 32)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    expected = {
        "proxy_reward", "gold_reward", "kl/reference", "kl/third", "kl_k1/reference", "entropy", "response_length",
        "kl_coef", "objective", "eos_rate", "explained_variance", "policy_loss", "value_loss", "clip_fraction",
        "approx_kl", "ratio_deviation_first", "learning_rate", "sampling_gap",
    }  # fmt: skip
    assert expected <= rows[0].keys()
    assert not [name for name in rows[0] if "second" in name or "time" in name]
    timings = read_lines(full_run / "timings.jsonl")
    assert [row["update"] for row in timings] == [1, 2, 3, 4]
    assert all(value > 0 for row in timings for value in row.values())


def test_training_computes_the_probabilities_that_sampling_and_scoring_did(full_run: Path) -> None:
    for row in read_lines(full_run / "metrics.jsonl"):
        assert row["ratio_deviation_first"] < 1e-4
        assert row["sampling_gap"] < 1e-4


def test_kl_to_a_soup_of_the_start_with_itself_begins_at_zero(full_run: Path) -> None:
    rows = read_lines(full_run / "metrics.jsonl")
    assert abs(rows[0]["kl/reference"]) <= 1e-6
    assert abs(rows[0]["kl_k1/reference"]) <= 1e-5
    assert rows[-1]["kl/reference"] > 1e-3
    assert rows[0]["kl/third"] > 0.1
    divergence = read_summary(full_run)["kl"]
    assert abs(divergence["reference"]["before"]) <= 1e-6
    assert divergence["reference"] == pytest.approx(divergence["first"], abs=1e-6)


def test_the_coefficient_follows_the_controller(full_run: Path) -> None:
    rows = read_lines(full_run / "metrics.jsonl")
    assert rows[0]["kl_coef"] == 0.05
    for row, following in pairwise(rows):
        error = min(max(row["kl/reference"] / 0.5 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * 8 / 40), rel=1e-9)
    assert rows[1]["kl_coef"] == pytest.approx(0.05 * 0.96)


def test_summary_has_the_documented_keys(full_run: Path) -> None:
    summary = read_summary(full_run)
    assert list(summary) == [
        "proxy_reward", "gold_reward", "entropy", "response_length", "kl", "updates", "episodes", "seconds",
        "peak_memory_bytes",
    ]  # fmt: skip
    for name in ("proxy_reward", "gold_reward", "entropy", "response_length"):
        assert summary[name].keys() == MEASURE
    assert summary["kl"].keys() == {"reference", "first", "third"}
    assert all(measure.keys() == MEASURE for measure in summary["kl"].values())
    assert (summary["updates"], summary["episodes"]) == (4, 32)
    assert summary["seconds"] > 0


def test_the_policy_folder_loads_and_has_moved(full_run: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(full_run / "policy")
    start = make_llama(1)
    assert policy.state_dict().keys() == start.state_dict().keys()
    moves = [(policy.state_dict()[n] - t).abs().max().item() for n, t in start.state_dict().items()]
    assert 1e-3 < max(moves) < 1
    assert AutoTokenizer.from_pretrained(full_run / "policy").eos_token == "<eos>"
    assert not list(full_run.rglob(".*partial*"))


def test_samples_show_texts_and_rewards(full_run: Path) -> None:
    rows = read_lines(full_run / "samples.jsonl")
    places = [(row["update"], row["prompts"]) for row in rows]
    expected = [(0, "held-out"), *((update, "training") for update in (1, 2, 3, 4)), (4, "held-out")]
    assert places == [place for place in expected for _ in range(2)]
    for row in rows:
        assert set(row["prompt"].split()) <= set(LETTERS)
        assert "<" not in row["response"]
        words = row["response"].split()
        assert row["proxy_reward"] == pytest.approx(words.count("a") / max(len(words), 1))
        assert row["gold_reward"] == len(words)
    # held-out prompts and their random numbers are the same before and after
    assert [row["prompt"] for row in rows[:2]] == [row["prompt"] for row in rows[-2:]]


def logs(run: Path) -> tuple[bytes, bytes]:
    return (run / "metrics.jsonl").read_bytes(), (run / "samples.jsonl").read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    full_run: Path, checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of_full_run(checkpoints)
    for name, seed in (("again", 3), ("other", 4)):
        torch.manual_seed(seed + 100)  # global state must not matter
        ppo.main(ppo_arguments(checkpoints, prompt_file, tmp_path / name, **(settings | {"seed": seed})))
    assert logs(tmp_path / "again") == logs(full_run)
    assert logs(tmp_path / "other") != logs(full_run)
    table = capsys.readouterr().out
    for label in ("proxy reward", "gold reward", "KL to reference (nats)", "KL to third (nats)", "response length"):
        assert label in table


@pytest.mark.usefixtures("no_figures")
def test_a_killed_run_resumes_to_the_same_bytes(
    full_run: Path, checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    settings = settings_of_full_run(checkpoints) | {"reward": "helpers:share_of_a_until_killed"}
    arguments = ppo_arguments(checkpoints, prompt_file, output, **settings)
    # A probe and an evaluation before training, then one call an update: the sixth scores the fourth rollout.
    killed = run_python(["-m", "rlhf.ppo", *arguments], KILL_AT_CALL="6")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["update"] for row in read_lines(output / "metrics.jsonl")] == [1, 2, 3]
    assert not (output / "summary.json").exists()
    assert not (output / "policy").exists()

    ppo.main(["--output", str(output), "--resume"])
    assert logs(output) == logs(full_run)
    resumed, unbroken = read_summary(output), read_summary(full_run)
    for measured in ("seconds", "peak_memory_bytes"):
        resumed.pop(measured)
        unbroken.pop(measured)
    assert resumed == unbroken
    first, second = (AutoModelForCausalLM.from_pretrained(run / "policy").state_dict() for run in (output, full_run))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_a_run_cut_short_resumes_to_the_same_bytes(full_run: Path, tmp_path: Path, with_checkpoints: bool) -> None:
    """With a torn last line, as a kill leaves it, and with no checkpoint yet, where it starts over."""
    output = tmp_path / "cut"
    shutil.copytree(full_run, output)
    for name in ("policy", "figures", *(() if with_checkpoints else ("checkpoints",))):
        shutil.rmtree(output / name)
    (output / "summary.json").unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (output / name).read_text(encoding="utf-8")
        (output / name).write_text(whole[:-30], encoding="utf-8")
    ppo.main(["--output", str(output), "--resume"])
    assert logs(output) == logs(full_run)
    assert [row["update"] for row in read_lines(output / "timings.jsonl")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("no_figures")
def test_plain_and_soup_runs_differ_in_the_reference_alone(
    checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("n n n\n", encoding="utf-8")
    references = {"plain": ["second"], "soup": ["second", "third"]}
    rows: dict[str, dict[str, Any]] = {}
    for name, folders in references.items():
        folders_named = [checkpoints[folder] for folder in folders]
        settings = {"reference": folders_named, "updates": 1, "test_prompts": held_out}
        ppo.main(ppo_arguments(checkpoints, prompt_file, tmp_path / name, **settings))
        rows[name] = read_lines(tmp_path / name / "metrics.jsonl")[0]
    samples = [read_lines(tmp_path / name / "samples.jsonl")[:4] for name in references]
    assert samples[0] == samples[1]  # before the first step: the same prompts, random numbers and policy
    assert {(row["prompts"], row["prompt"] == "n n n") for row in samples[0]} == {
        ("held-out", True),
        ("training", False),
    }
    for name in ("proxy_reward", "entropy", "response_length", "eos_rate", "learning_rate", "kl_coef"):
        assert rows["plain"][name] == rows["soup"][name]
    assert rows["plain"]["kl/reference"] != pytest.approx(rows["soup"]["kl/reference"], rel=0.01)
    assert rows["plain"].keys() == rows["soup"].keys()
    assert read_summary(tmp_path / "plain")["kl"].keys() == {"reference", "first", "second"}
    assert read_summary(tmp_path / "soup")["kl"].keys() == {"reference", "first", "second", "third"}


@pytest.mark.usefixtures("no_figures")
def test_without_a_gold_reward_its_summary_is_null(
    checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    """With a reward model, no samples and no reference named besides."""
    settings = {
        "reward": [checkpoints["reward"]],
        "num_samples": 0,
        "updates": 1,
        "save_every": 1,
    }
    output = tmp_path / "run"
    ppo.main(ppo_arguments(checkpoints, prompt_file, output, **settings))
    summary = read_summary(output)
    assert summary["gold_reward"] is None
    assert summary["kl"].keys() == {"reference", "first"}
    assert 0 <= summary["kl"]["reference"]["before"] <= 1e-6
    (row,) = read_lines(output / "metrics.jsonl")
    assert not [name for name in row if name.startswith("gold")]
    assert (output / "samples.jsonl").read_text(encoding="utf-8") == ""
    assert not (output / "checkpoints").exists()  # nothing is left to resume for after the last update


@pytest.mark.usefixtures("no_figures")
def test_only_the_newest_checkpoints_are_kept(checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path) -> None:
    settings = {"updates": 5, "save_every": 1, "keep": 2}
    ppo.main(ppo_arguments(checkpoints, prompt_file, tmp_path / "run", **settings))
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["update-000003", "update-000004"]
    AutoModelForCausalLM.from_pretrained(kept[0])


@pytest.mark.usefixtures("no_figures")
def test_an_easy_reward_rises(checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path) -> None:
    settings = {
        "updates": 20,
        "batch_size": 32,
        "minibatch_size": 16,
        "eval_episodes": 200,
        "kl_coef": 0.01,
        "learning_rate": 5e-3,
        "missing_eos_penalty": 0.0,
    }
    ppo.main(ppo_arguments(checkpoints, prompt_file, tmp_path / "run", **settings))
    reward = read_summary(tmp_path / "run")["proxy_reward"]
    error = (reward["before_stderr"] ** 2 + reward["after_stderr"] ** 2) ** 0.5
    assert reward["after"] - reward["before"] > 4 * error
    assert reward["after"] > 0.5


@pytest.mark.usefixtures("no_figures")
def test_resuming_with_other_settings_is_refused(full_run: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(full_run, tmp_path / "cut"))
    (cut / "summary.json").unlink()
    with pytest.raises(
        ValueError, match=r"keeps the settings of .*cut/config\.yaml; leave out kl_coef \(0\.05 there, 9\.0 asked for\)"
    ):
        ppo.main(["--output", str(cut), "--resume", "--kl_coef", "9"])

"""Runs of ``rlhf.ppo`` that are killed, stopped, or fail on the way: what is left of them, and that they go on."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import (
    EOS,
    ROOT,
    as_ranks,
    assert_same_run,
    count_words,
    forked,
    make_llama,
    make_tokenizer,
    ppo_arguments,
    run_python,
    share_of_a,
)
from transformers import PreTrainedModel

from rlhf import ppo
from rlhf.checkpointing import save_model
from rlhf.command_line import run_command
from rlhf.rewards import RewardError

Arguments = Callable[..., list[str]]

# Everything that has a state of its own.
STATEFUL = {
    "reward": ["helpers:count_words", "helpers:mean_place"],
    "reward_weights": [1.0, 0.5],
    "normalize_rewards": 8,
    "value_model": "shared",
    "reference_kind": "moving_average",
    "reference_decay": 0.5,
    "kl_control": "target",
    "kl_target": 0.2,
    "save_every": 2,
}
MICRO_BATCHES = {
    "value_model": "shared",
    "micro_batch_size": 1,
    "kl_in": "loss",
    "kl_estimator": "exact",
    "kl_coef": 0.3,
    "save_every": 2,
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest of a tiny run."""
    monkeypatch.setattr("rlhf.figures.draw_run", lambda run: [])


@pytest.fixture
def arguments(checkpoints: dict[str, Path], prompt_file: Path) -> Arguments:
    """The command line that starts a run in a folder, or resumes the one there."""

    def of(run: Path, **settings: Any) -> list[str]:
        if run.exists():
            return ["--output", str(run), "--resume"]
        return ppo_arguments(checkpoints, prompt_file, run, **({"save_every": 2} | settings))

    return of


def updates_logged(run: Path) -> list[int]:
    return [json.loads(line)["update"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def checkpoints_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def error_lines(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", text) if line.startswith("error: ")]


def until_operation(number: int, arguments: list[str], within: Path) -> Callable[[], int]:
    """A run that SIGKILL ends before operation ``number`` on files in a folder; it writes down how many there were."""

    def run() -> int:
        num_seen = 0

        def count(event: str, values: tuple[Any, ...]) -> None:
            nonlocal num_seen
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(within) in str(values[0]):
                num_seen += 1
                if num_seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        status = run_command(ppo.main, arguments)
        within.with_suffix(".operations").write_text(str(num_seen), encoding="utf-8")
        return status

    return run


def test_ten_kills_between_operations_on_files_change_nothing(arguments: Arguments, tmp_path: Path) -> None:
    """Logs, checkpoints, their publication and removal: SIGKILL comes before any of the operations they are made of."""
    settings: dict[str, Any] = STATEFUL | {"updates": 12}
    unbroken = tmp_path / "unbroken"
    assert forked(until_operation(0, arguments(unbroken, **settings), unbroken)) == [0]
    num_operations = int((tmp_path / "unbroken.operations").read_text(encoding="utf-8"))
    assert num_operations > 100
    moments = random.Random(0)
    num_kills = num_runs = 0
    while num_kills < 10 or (tmp_path / f"run-{num_runs}").exists():
        run = tmp_path / f"run-{num_runs}"
        number = moments.randint(1, num_operations // 2) if num_kills < 10 else 0
        (status,) = forked(until_operation(number, arguments(run, **settings), run))
        if status == -signal.SIGKILL:
            num_kills += 1
        else:
            assert status == 0
            assert_same_run(run, unbroken)
            num_runs += 1


@pytest.mark.slow
def test_ten_kills_at_random_times_change_nothing(arguments: Arguments, tmp_path: Path) -> None:
    """Processes of their own, from their start to their end: while sampling, training, evaluating and writing."""
    settings: dict[str, Any] = STATEFUL | {"updates": 12, "batch_size": 32, "max_new_tokens": 24, "eval_episodes": 200}
    unbroken = tmp_path / "unbroken"

    def start(run: Path) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "rlhf.ppo", *arguments(run, **settings)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    process = start(unbroken)
    while not unbroken.exists() and process.poll() is None:
        time.sleep(0.01)
    created = time.monotonic() - began
    assert process.wait() == 0
    whole = time.monotonic() - began

    moments = random.Random(0)
    num_kills = num_runs = 0
    while num_kills < 10 or (tmp_path / f"run-{num_runs}").exists():
        run = tmp_path / f"run-{num_runs}"
        process = start(run)
        try:
            status = process.wait(moments.uniform(0.9 * created, whole) if num_kills < 10 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            num_kills += 1
            if not (run / "summary.json").exists():  # else it was killed on its way out, with all done
                continue
            status = 0
        assert status == 0
        assert_same_run(run, unbroken)
        num_runs += 1


def test_sigterm_finishes_the_update_and_saves(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    settings = {"save_every": 0}
    assert forked(lambda: run_command(ppo.main, arguments(unbroken, **settings))) == [0]
    capfd.readouterr()

    num_calls = 0

    def terminated(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:  # after the probe and the evaluation, in the middle of update 2
            os.kill(os.getpid(), signal.SIGTERM)
        return share_of_a(prompts, responses)

    with monkeypatch.context() as patched:
        patched.setattr(helpers, "share_of_a", terminated)
        assert forked(lambda: run_command(ppo.main, arguments(run, **settings))) == [128 + signal.SIGTERM]
    lines = [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if "|" not in line and line.strip()]
    assert lines == [f"stopped after update 2; go on with --output {run} --resume"]
    assert updates_logged(run) == [1, 2]
    assert checkpoints_of(run) == ["update-000002"]
    assert forked(lambda: run_command(ppo.main, arguments(run))) == [0]
    assert_same_run(run, unbroken)


def broken_at(call: int) -> Callable[[list[str], list[str]], list[float]]:
    """:func:`share_of_a`, which raises from a call on, for one of the responses."""
    num_calls = 0
    offender = ""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal num_calls, offender
        num_calls += 1
        if num_calls == call:
            offender = responses[-1]
        if num_calls >= call and offender in responses:
            raise KeyError("no such word")
        return share_of_a(prompts, responses)

    return reward


def test_a_reward_that_raises_leaves_the_last_update_saved(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    ppo.main(arguments(unbroken))
    with monkeypatch.context() as patched:
        patched.setattr(helpers, "share_of_a", broken_at(4))
        with pytest.raises(
            RewardError, match=r"share_of_a raised KeyError: 'no such word', for prompt '.+' and response '.*'"
        ):
            ppo.main(arguments(run))
    assert updates_logged(run) == [1]
    assert checkpoints_of(run) == ["update-000001"]
    ppo.main(arguments(run))
    assert_same_run(run, unbroken)


def test_a_reward_that_raises_in_the_last_evaluation_loses_no_update(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    ppo.main(arguments(unbroken))
    with monkeypatch.context() as patched:
        patched.setattr(helpers, "share_of_a", broken_at(7))  # after the probe, an evaluation and four updates
        with pytest.raises(RewardError):
            ppo.main(arguments(run))
    assert f"saved after update 4; go on with --output {run} --resume" in capsys.readouterr().err
    assert checkpoints_of(run) == ["update-000004"]
    ppo.main(arguments(run))
    assert_same_run(run, unbroken)


def test_ctrl_c_is_no_traceback(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: object) -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_of_torch(state: Any, path: Path) -> None:
    """As torch.save fails on a file system that is full: half a file, and an error that is no OSError."""
    path.write_bytes(b"PK")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("owner", "name", "failure"), [(torch, "save", full_disk_of_torch), (PreTrainedModel, "save_pretrained", full_disk)]
)
def test_a_full_disk_leaves_the_older_checkpoint(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    failure: Callable[..., None],
) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    ppo.main(arguments(unbroken, updates=5))
    works, num_calls = getattr(owner, name), 0

    def save(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return works(*args, **kwargs) if num_calls == 1 else failure(*args, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, save)
        assert run_command(ppo.main, arguments(run, updates=5)) == 2
    (line,) = error_lines(capsys.readouterr().err)
    older = run / "checkpoints" / "update-000002"
    assert re.match(
        rf"error: {run}/checkpoints/update-000004: the checkpoint could not be written \(.+\); {older} is whole: make "
        rf"room \(\d+ MB are free\), then go on with --output {run} --resume$",
        line,
    )
    assert checkpoints_of(run) == ["update-000002"]
    assert updates_logged(run) == [1, 2, 3, 4]
    ppo.main(arguments(run))
    assert_same_run(run, unbroken)


def test_what_differs_from_the_checkpoint_is_said(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ppo.main(arguments(run))
    (run / "summary.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("kl_coef: 0.05", "kl_coef: 0.5").replace("gamma: 1.0", "gamma: 0.9"), "utf-8")
    capsys.readouterr()
    assert run_command(ppo.main, arguments(run)) == 2
    assert error_lines(capsys.readouterr().err) == [
        f"error: {run}/checkpoints/update-000002: a checkpoint of another configuration: kl_coef (0.05 there, 0.5 "
        "here), gamma (1.0 there, 0.9 here)"
    ]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = {"learning_rate": 1e30, "warmup_updates": 0, "max_skipped": 2, "save_every": 1, "updates": 6}
    for _ in range(2):  # a resumed run meets the same end
        assert run_command(ppo.main, arguments(run, **settings)) == 2
        (line,) = error_lines(capsys.readouterr().err)
        assert line.startswith("error: 2 optimizer steps in a row had to be skipped, the last because the ")
        assert not (run / "summary.json").exists()
        assert (run / "config.yaml").exists()
        assert not list(run.rglob(".*"))


def test_responses_that_are_all_empty(prompt_file: Path, tmp_path: Path) -> None:
    """The policy always ends at once: one token each, and rewards that never vary."""
    model = make_llama(1, tie_word_embeddings=False)
    with torch.no_grad():  # a constant in the hidden states, which speaks for the end of sequence
        model.get_input_embeddings().weight[:, 0] = 1e3
        model.lm_head.weight[EOS, 0] = 1e2
    always = save_model(model, make_tokenizer(), tmp_path / "always")
    run = tmp_path / "run"
    ppo.main(ppo_arguments({"first": always}, prompt_file, run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["response_length"] for row in rows] == [1.0] * 4
    for row in rows:
        assert all(torch.isfinite(torch.tensor(float(value))) for value in row.values())


# ── Several processes ─────────────────────────────────────────────────────────────────────────────────────────────────


def run_of_two(arguments: list[str]) -> list[int]:
    return forked(*as_ranks(lambda: run_command(ppo.main, arguments)))


def assert_same_metrics(run: Path, other: Path) -> None:
    """To 1e-5, relative to 1 or to the value, whichever is larger: KLs of equal models are rounding."""
    rows, expected = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for path in (run, other)
    )
    assert len(rows) == len(expected) > 1
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_two_processes_learn_as_one_and_resume_to_the_same_bytes(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    settings = STATEFUL | {"num_samples": 4}
    ppo.main(arguments(one, **settings))
    assert run_of_two(arguments(two, **settings)) == [0, 0]
    assert_same_metrics(two, one)
    assert (two / "samples.jsonl").read_text().count("\n") == (one / "samples.jsonl").read_text().count("\n")

    num_calls = 0

    def kill(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 6:  # the statistics, the probe, the evaluation, and two updates came before
            os.kill(os.getpid(), signal.SIGKILL)
        return count_words(prompts, responses)

    with monkeypatch.context() as patched:
        patched.setattr(helpers, "count_words", kill)
        assert run_of_two(arguments(killed, **settings)) == [-signal.SIGKILL] * 2
    assert checkpoints_of(killed) == ["update-000002"]
    assert run_of_two(arguments(killed)) == [0, 0]
    assert_same_run(killed, two)

    capfd.readouterr()
    for uneven, message in (
        ({"eval_episodes": 15}, "eval_episodes=15 does not split evenly over 2 processes; choose a multiple"),
        ({"micro_batch_size": 4}, "micro_batch_size=4 does not divide the 2 episodes that each of 2 processes has"),
    ):
        monkeypatch.setattr(ppo, "sample", lambda *args, **kwargs: pytest.fail("sampled before all was checked"))
        assert run_of_two(arguments(tmp_path / "uneven", **uneven)) == [2, 2]
        (line,) = error_lines(capfd.readouterr().err)
        assert message in line
        assert not (tmp_path / "uneven").exists()


@pytest.mark.slow
def test_the_losses_of_two_processes_add_up(arguments: Arguments, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ppo.main(arguments(one, **MICRO_BATCHES))
    assert run_of_two(arguments(two, **MICRO_BATCHES)) == [0, 0]
    assert_same_metrics(two, one)


@pytest.mark.slow
def test_what_a_reward_raises_in_one_process_ends_both_with_the_update_saved(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_of_two(arguments(whole)) == [0, 0]

    def broken_in_second() -> int:
        if os.environ["RANK"] == "1":
            patched.setattr(helpers, "share_of_a", broken_at(4))
        return run_command(ppo.main, arguments(run))

    with monkeypatch.context() as patched:
        assert forked(*as_ranks(broken_in_second)) == [1, 1]
    assert checkpoints_of(run) == ["update-000001"]
    assert run_of_two(arguments(run)) == [0, 0]
    assert_same_run(run, whole)


@pytest.mark.slow
def test_processes_that_a_launcher_starts(arguments: Arguments, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rlhf.ppo"]
    ppo.main(arguments(one))
    launched = run_python([*launcher, *arguments(two)], ACCELERATE_USE_CPU="true")
    assert launched.returncode == 0, launched.stderr
    assert_same_metrics(two, one)

    refused = run_python([*launcher, *arguments(tmp_path / "uneven", eval_episodes=15)], ACCELERATE_USE_CPU="true")
    assert refused.returncode != 0
    assert len(error_lines(refused.stderr)) == 1

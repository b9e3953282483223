"""The PPO benchmark's own arithmetic and bookkeeping, on models of a few thousand weights."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))
import measuring
import ppo
import ppo_work
from ppo_work import FULL, QUICK

# --- the task ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks of a few kB, as ``make`` writes them."""
    path = tmp_path_factory.mktemp("tasks")
    assert ppo.main(["make", str(path), "--quick"]) == 0
    return path


def test_tasks_differ_in_their_vocabulary_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ppo._tasks(folder)
    assert [task["vocab_size"] for task in tasks.values()] == [40, 80]
    small, large = tasks.values()
    assert small | {"vocab_size": 80} == large
    assert [ppo_work.Task.read(path) for path in tasks] == list(QUICK)
    assert ppo.main(["make", str(folder), "--quick"]) == 0
    assert "there already" in capsys.readouterr().err
    assert ppo.main(["run", str(folder / "none"), "--output", "unused.json"]) == 2
    assert "`python benchmarks/ppo.py make" in capsys.readouterr().err


def test_prompts_are_read_back_token_for_token(folder: Path) -> None:
    from rlhf.data import load_prompts
    from rlhf.models import load_tokenizer

    path = folder / "vocabulary-40"
    prompts = load_prompts(path / "prompts.jsonl", load_tokenizer(path / "sft1"))
    assert [prompt.token_ids for prompt in prompts] == ppo_work.prompt_ids(QUICK[0])
    assert {len(prompt.token_ids) for prompt in prompts} == {4}
    assert len(prompts) == 64


def test_no_response_ends(folder: Path) -> None:
    """Neither of the two tokens has any probability, in either model, their soup, and the full size."""
    from rlhf.models import load_causal_lm

    models = [load_causal_lm(folder / "vocabulary-80" / name) for name in ("sft1", "sft2", "soup")]
    tokens = torch.tensor(ppo_work.prompt_ids(QUICK[1]))
    for model, task in [*((model, QUICK[1]) for model in models), (ppo_work.language_model(FULL[0], 1), FULL[0])]:
        with torch.no_grad():
            probabilities = torch.softmax(model(input_ids=tokens).logits / task.temperature, dim=-1)
        ending, others = probabilities.split([2, task.vocab_size - 2], dim=-1)
        assert ending.max() == 0.0
        assert others.min() > 0.01 / task.vocab_size


# --- the floor ---


def test_operations_of_the_full_task_by_hand() -> None:
    """The counts of the task, worked out once from its sizes."""
    gflop = {
        part: sum(ppo_work.flops(FULL[0], operation) * num for operation, num in operations.items()) / 1e9
        for part, operations in ppo_work.update_operations(FULL[0]).items()
    }
    # A token is 2 · 4 · (4 · 256² + 3 · 256 · 704) = 6.42 million in the body, 2 · 256 · 8192 = 4.19 in the head.
    expected = {
        "prefill": 13.6,  # 2,048 tokens and 64 heads, 0.13 for attention
        "decoding": 32.6,  # 47 · 64 of both, 0.7
        "reference": 46.6,  # 5,120 tokens and 3,072 heads, 0.84
        "reward": 33.7,
        "value": 33.7,
        "policy_training": 561,  # 4 · 3 reference forwards, attention 4 · 3.5
        "value_training": 406,
    }
    assert gflop == pytest.approx(expected, rel=0.005)
    assert sum(gflop.values()) == pytest.approx(1128, rel=0.001)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_products_are_those_that_torch_counts_in_the_model(num_kv_heads: int) -> None:
    task = dataclasses.replace(QUICK[0], num_kv_heads=num_kv_heads)
    operations = ppo_work.update_operations(task)
    model = ppo_work.language_model(task, 1)
    size, steps = task.episodes // task.minibatches, task.epochs * task.minibatches
    tokens = torch.tensor(ppo_work.prompt_ids(task))[:, : task.prompt_tokens].repeat(1, 2)[:size]
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=tokens).last_hidden_state
        logits = model.lm_head(hidden[:, -task.new_tokens - 1 : -1])
        logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(number for name, number in counts.items() if "mm" in str(name))
    products = {op: num for op, num in operations["policy_training"].items() if op[0] in ("product", "gradients")}
    assert tokens.shape[1] == task.length
    assert sum(ppo_work.flops(task, op) * num for op, num in products.items()) == steps * counted


def test_a_shared_value_head_needs_no_second_body() -> None:
    operations = ppo_work.update_operations(QUICK[0])
    shared = sum((ops for part, ops in operations.items() if part not in ppo.VALUE_PARTS), Counter[Any]())
    assert shared + operations["value"] + operations["value_training"] == sum(operations.values(), Counter[Any]())
    assert {part for parts in ppo.FLOOR_PHASES.values() for part in parts} == operations.keys()


@pytest.mark.parametrize("flags", [[], ["--onednn"]])
def test_every_operation_can_be_replayed(flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo_work.main(["floor", str(folder / "vocabulary-40"), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parts"].keys() == record["gflop"].keys()
    assert min(record["parts"].values()) > 0
    figures = ppo.figures(record)
    assert figures["seconds"] == pytest.approx(sum(figures["phases"].values()))
    assert 0 < figures["shared_seconds"] < figures["seconds"]


@pytest.mark.parametrize("multiply", [ppo_work.torch_product, ppo_work.onednn_product])
def test_replayed_gradients_are_those_of_the_product(
    multiply: ppo_work.Multiply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.processor.LARGE", 1)
    inputs, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    torch.manual_seed(0)
    run = ppo_work._prepare(QUICK[0], ("gradients", 5, 3, 4), multiply)
    torch.manual_seed(0)
    inputs, weight, upstream = (torch.randn(shape, requires_grad=True) for shape in ((5, 3), (4, 3), (5, 4)))
    expected = torch.autograd.grad(torch.nn.functional.linear(inputs, weight), (inputs, weight), upstream)
    for gradient, other in zip(run(), expected, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(gradient, other)


# --- one run ---


def options(folder: Path, **others: Any) -> argparse.Namespace:
    defaults = {"folder": folder / "vocabulary-40", "updates": 2, "value_model": "separate", "only_load": False}
    return argparse.Namespace(**defaults | others)


def test_a_run_of_ours(folder: Path) -> None:
    record = ppo_work.run_ours(options(folder))
    assert [row.keys() for row in record["updates"]] == [
        {"rollout", "scoring", "training", "seconds", "cpu_seconds"}
    ] * 2
    for row in record["updates"]:
        assert row["seconds"] == row["rollout"] + row["scoring"] + row["training"] > 0
    assert sum(row["cpu_seconds"] for row in record["updates"]) > 0
    assert 0 < record["update_peak_bytes"] <= record["peak_bytes"]
    loaded = ppo_work.load_ours(options(folder))
    assert loaded["models"] == 4
    assert ppo_work.load_ours(options(folder, value_model="shared"))["models"] == 3
    with pytest.raises(ValueError, match="nothing to compare"):
        ppo_work._require_work(QUICK[0], "ours", 3.5, 2)


METERED = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ppo_work

timings = Path(sys.argv[2])

def hold(megabytes):
    held = bytearray(megabytes * 10**6)
    held[::4096] = b"x" * len(held[::4096])

def until_noted(number):
    while len(meter.cpu_times) < number:
        time.sleep(ppo_work.POLLING_INTERVAL)

hold(1)
started = time.process_time()
start = ppo_work.resident_bytes()
with ppo_work.metered_run(timings, 2) as meter:
    hold(100)
    timings.touch()
    until_noted(1)
    hold(50)
    timings.write_text("{}\\n")
    until_noted(2)
    while time.process_time() < started + 0.5:
        pass
    timings.write_text("{}\\n{}\\n")
    until_noted(3)
    hold(80)
print(json.dumps({"start": start} | meter.record([{"rollout": 1.0, "training": 2.0}] * 2)))
"""


def test_the_updates_are_metered_apart_from_what_comes_before_and_after(tmp_path: Path) -> None:
    """100 MB held before the first update count for the process alone, 50 MB held in it for both.

    In a process of its own: what other tests left in memory, or leave running, would be metered too.
    """
    command = [sys.executable, "-c", METERED, str(ROOT / "benchmarks"), str(tmp_path / "timings.jsonl")]
    record = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout)
    first, second = record["updates"]
    assert first["seconds"] == 3.0
    assert 0.3 < second["cpu_seconds"] < 0.6
    assert first["cpu_seconds"] + second["cpu_seconds"] < 0.8
    assert record["peak_bytes"] - record["start"] > 99e6
    assert 45e6 < record["update_peak_bytes"] - record["start"] < 70e6


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


clock = Clock()


class FakeTrainer:
    """Runs the calls of TRL's PPOTrainer that are timed, and sleeps in between."""

    def __init__(self, *, args: Any, callbacks: list[Any], train_dataset: Any, **_: Any) -> None:
        assert len(train_dataset) == 64
        self.args, self.callback = args, callbacks[0]
        self.optimizer = SimpleNamespace(state={0: {"step": torch.tensor(float(2 * self.num_updates))}})
        self.state = SimpleNamespace(log_history=[{"val/num_eos_tokens": 0}])

    @property
    def num_updates(self) -> int:
        return self.args.total_episodes // self.args.per_device_train_batch_size

    def train(self) -> None:
        self.callback.on_train_begin()
        for _ in range(self.num_updates):
            clock.sleep(0.01)
            fake_trl.batch_generation(0.02)
            with torch.no_grad():
                fake_trl.forward(0.03)
            for _ in range(2):
                fake_trl.forward(0.03)
            self.callback.on_step_end()


fake_trl = SimpleNamespace()


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A stand-in for TRL's module, on a clock of its own."""
    monkeypatch.setattr(ppo_work, "time", clock)
    fake_trl.batch_generation = fake_trl.forward = clock.sleep
    fake_trl.PPOConfig, fake_trl.PPOTrainer = SimpleNamespace, FakeTrainer
    yield fake_trl
    vars(fake_trl).clear()


def test_the_phases_of_trl(trl: SimpleNamespace) -> None:
    record = ppo_work._run_trl(trl, QUICK[0], {}, None, 2)
    for row in record["updates"]:
        phases = {"rollout": 0.02, "scoring": 0.03, "training": 0.06, "other": 0.01}
        assert row == pytest.approx(phases | {"seconds": 0.12, "cpu_seconds": 0.12})


def test_a_trl_that_steps_less_often_has_not_done_the_work(trl: SimpleNamespace) -> None:
    task = dataclasses.replace(QUICK[0], epochs=2)
    with pytest.raises(ValueError, match=r"TRL: .* 2 optimizer steps, not 4 and 4: nothing to compare"):
        ppo_work._run_trl(trl, task, {}, None, 1)


def test_an_environment_without_trl_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(ImportError):
        import trl  # noqa: F401

        pytest.skip("TRL is installed here")
    assert ppo_work.main(["trl", str(folder / "vocabulary-40")]) == 2
    assert "pip install trl==1.12.0" in capsys.readouterr().err


# --- rounds and results ---


def updates(*seconds: float) -> dict[str, Any]:
    """A run whose updates took so long, a fifth for the rollout and the rest for training."""
    rows = [
        {"rollout": s / 5, "scoring": 0.0, "training": s * 4 / 5, "seconds": s, "cpu_seconds": 2 * s} for s in seconds
    ]
    return {"updates": rows, "threads": 1, "peak_bytes": 500_000_000, "update_peak_bytes": 400_000_000}


def floor(seconds: float) -> dict[str, Any]:
    """A floor of which the value model is a quarter."""
    parts = dict.fromkeys(ppo_work.update_operations(QUICK[0]), 0.0)
    parts |= {"policy_training": seconds * 3 / 4, "value": seconds / 4}
    return {"parts": parts, "cpu_parts": {part: 4 * value for part, value in parts.items()}, "gflop": {}, "threads": 1}


def rounds_by_hand() -> list[dict[str, Any]]:
    """Ours takes 6, 8 and 12 seconds, TRL 10, 16 and 12, the floor 4, 4 and 6."""
    rounds = [
        {"floor": floor(4.0), "separate": updates(99, 5, 6, 7), "shared": updates(99, 3), "trl": updates(99, 10)},
        {"floor": floor(4.0), "separate": updates(99, 8), "shared": updates(99, 4), "trl": updates(99, 16)},
        {"floor": floor(6.0), "separate": updates(99, 12), "shared": updates(99, 6), "trl": updates(99, 12)},
    ]
    for records in rounds:
        records["trl"]["peak_bytes"] = 1_000_000_000
    return [{case: ppo.figures(record) for case, record in records.items()} for records in rounds]


def test_the_first_update_does_not_count() -> None:
    record = ppo.figures(updates(99, 5, 6, 70))
    assert record["seconds"] == 6
    assert record["phases"] == pytest.approx({"rollout": 1.2, "scoring": 0.0, "training": 4.8})
    assert ppo.figures(updates(99))["seconds"] == 99  # but for an only one


def test_summary_by_hand() -> None:
    summary = ppo.summary(rounds_by_hand())
    assert summary["seconds"]["separate"] == {"median": 8, "min": 6, "max": 12, "num": 3}
    assert summary["seconds"]["floor_shared"]["median"] == 3
    # 6/10, 8/16 and 12/12; the medians are 8 and 12.
    assert summary["ratios"]["separate ÷ TRL"] == pytest.approx(
        {"median": 0.6, "min": 0.5, "max": 1.0, "num": 3, "of_medians": 2 / 3}
    )
    assert summary["ratios"]["separate ÷ floor"]["median"] == 2.0
    assert summary["cpu_seconds"]["separate"]["median"] == 16
    assert summary["cpu_ratios"]["separate ÷ floor"]["median"] == 1.0
    assert summary["cpu_ratios"]["shared ÷ its floor"]["median"] == pytest.approx(2 / 3)
    assert summary["ratios"]["shared ÷ TRL"]["median"] == 0.3
    assert summary["ratios"]["shared ÷ its floor"]["median"] == pytest.approx(4 / 3)
    assert summary["ratios"]["TRL ÷ floor"]["median"] == 2.5
    assert summary["memory_ratios"]["separate"]["median"] == 0.5
    assert summary["phases"]["separate"] == pytest.approx({"rollout": 1.6, "scoring": 0.0, "training": 6.4})
    assert summary["phases"]["floor"] == {"rollout": 0.0, "scoring": 1.0, "training": 3.0}
    without = [{case: records[case] for case in ("floor", "separate")} for records in rounds_by_hand()]
    assert ppo.summary(without)["ratios"].keys() == {"separate ÷ floor"}
    assert ppo.summary(without)["memory_ratios"] == {}


def test_a_run_measures_everything_in_turns_and_can_be_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []

    def child(case: str, folder: Path, threads: int, trl_python: Path | None, *arguments: str) -> dict[str, Any]:
        assert folder.name == "vocabulary-40"
        assert arguments == (() if case in ppo.FLOORS else ("--updates", "3"))
        calls.append((case, threads))
        return floor(1.0) if case in ppo.FLOORS else updates(9, 2, 2)

    monkeypatch.setattr(ppo, "_child", child)
    monkeypatch.setattr(ppo, "_known_settings", lambda: ["policy"])
    output = tmp_path / "results.json"
    command = ["run", str(folder), "--output", str(output), "--threads", "2", "1", "--updates", "3"]
    assert ppo.main([*command, "--repeats", "1"]) == 0
    told = capsys.readouterr().err
    assert "shared: skipped, this rlhf has no setting value_model" in told
    assert "trl: skipped, no --trl-python was given" in told
    first = [(case, threads) for threads in (2, 1) for case in ("floor", "onednn_floor", "separate")]
    assert calls == first
    assert ppo.main([*command, "--repeats", "2"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert ppo.main([*command, "--repeats", "2", "--resume"]) == 0
    second = [(case, threads) for threads in (2, 1) for case in ("onednn_floor", "separate", "floor")]
    assert calls[6:] == second
    entry = json.loads(output.read_text())["run"]
    assert [len(series["rounds"]) for series in entry["threads"].values()] == [2, 2]
    assert entry["task"]["vocab_size"] == 40
    assert ppo.main([*command, "--resume", "--updates", "4"]) == 2
    assert "updates 3, and here is 4" in capsys.readouterr().err


def test_a_child_is_given_its_threads_and_its_python(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def measured(command: list[str], *, environment: dict[str, str], sampled: bool) -> tuple[dict[str, Any], str]:
        seen.append((command, environment))
        assert not sampled
        return {"seconds": 3.0}, 'words\n{"threads": 2}'

    monkeypatch.setattr(ppo, "measured", measured)
    assert ppo._child("shared", Path("f"), 2, Path("p")) == {"threads": 2, "process_seconds": 3.0}
    ppo._child("trl", Path("f"), 1, Path("p"), "--updates", "1")
    assert seen[0][0] == [sys.executable, str(ppo.WORK), "ours", "f", "--value-model", "shared"]
    assert seen[1][0] == ["p", str(ppo.WORK), "trl", "f", "--updates", "1"]
    assert [environment["OMP_NUM_THREADS"] for _, environment in seen] == ["2", "1"]


def test_memory_of_each_vocabulary(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(case: str, folder: Path, threads: int, trl_python: Path | None, *arguments: str) -> dict[str, Any]:
        factor = (10**9 if case == "trl" else 10**8) * int(folder.name.split("-")[1]) // 40
        if arguments == ("--only-load",):
            return {"loaded_bytes": 2 * factor, "models": 4}
        return {"updates": [], "peak_bytes": 7 * factor, "update_peak_bytes": 5 * factor}

    monkeypatch.setattr(ppo, "_child", child)
    monkeypatch.setattr(ppo, "_known_settings", lambda: ["value_model"])
    monkeypatch.setattr(ppo, "versions_of", lambda python, names: ["1.12.0", "2", "5"])
    output = tmp_path / "results.json"
    command = ["memory", str(folder), "--output", str(output), "--trl-python", "python", "--threads", "1"]
    assert ppo.main(command) == 0
    entry = json.loads(output.read_text())["memory"]
    assert entry["vocabularies"]["80"].keys() == {"separate", "shared", "trl"}
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 6
    assert rows[2] == "| 40, rlhf, separate value model | 200 | 700 | 500 | 300 | 0.10 | 0.10 | ≤ 0.6 met |"
    assert rows[7] == "| 80, TRL PPOTrainer | 4000 | 14000 | 10000 | 6000 |  |  |  |"


def test_decoding_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    assert ppo.main(["decode", "--quick", "--repeats", "2", "--output", str(output)]) == 0
    entry = json.loads(output.read_text())["decode_cpu"]
    assert [row.keys() for row in entry["rounds"]] == [{"ours", "generate", "scores"}] * 2
    assert entry["ratios"]["generate"]["num"] == 2
    assert "16 × 4 tokens, float32" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_decoding_without_a_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo.main(["decode", "--device", "cuda"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --device cuda: torch ")
    assert told.count("\n") == 1


def test_tables_say_which_goals_are_met(tmp_path: Path) -> None:
    machine = {"processor": "P", "cores": 2, "memory_gb": 8, "kernel": "Linux 6"}
    rows = [{"ours": 2.0, "generate": 4.0, "scores": 5.0}]
    decoded = {
        "task": vars(FULL[0]),
        "dtype": "float32",
        "engine": "decode",
        "threads": 1,
        "seconds": {name: measuring.spread([rows[0][name]]) for name in rows[0]},
        "ratios": {name: measuring.ratio(rows, "ours", name) for name in ("generate", "scores")},
    }
    results = {
        "run": {
            "machine": machine,
            "versions": {"python": "3"},
            "updates": 4,
            "threads": {"1": {"rounds": rounds_by_hand(), "summary": ppo.summary(rounds_by_hand())}},
        },
        "decode_cpu": decoded,
        "decode_cuda": decoded | {"cuda": "H100"},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{ppo.BEGIN}\nold\n{ppo.END}\nafter\n")
    assert ppo.main(["table", str(tmp_path / "results.json"), "--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{ppo.BEGIN}\n\nP, 2 cores, 8 GB, Linux 6; python 3. Medians of 3 updates a run.")
    assert text.endswith(f"\n\n{ppo.END}\nafter\n")
    assert "old" not in text
    assert "### One update, 1 thread, 3 rounds" in text
    assert (
        "| rlhf, separate value model | 8.00 (6.00–12.00) | 1.60 | 0.00 | 6.40 |  | 16.00 (12.00–24.00) | 500 |" in text
    )
    assert "| separate ÷ TRL | 0.60 (0.50–1.00; medians 0.67) | ≤ 0.65 met | 0.60 (0.50–1.00; medians 0.67) |" in text
    assert "| separate ÷ floor | 2.00 (1.50–2.00; medians 2.00) | ≤ 1.25 **missed** |" in text
    assert "| shared ÷ TRL | 0.30 (0.25–0.50; medians 0.33) | ≤ 0.42 met |" in text
    assert "| peak memory, separate ÷ TRL | 0.50 (0.50–0.50; medians 0.50) | ≤ 0.6 met |" in text
    assert "| cpu, 1 thread, decode, 64 × 48 tokens, float32 | 2.00 (1 run) | 4.00 (1 run) | 5.00 (1 run) |" in text
    assert "| 0.50 (0.50–0.50; medians 0.50) | ≤ 0.6 met |" in text
    assert "| H100, decode, 64 × 48 tokens, float32 |" in text
    assert "≤ 0.125 **missed**" in text


@pytest.mark.slow
def test_processes_from_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    command = ["run", str(folder), "--output", str(output), "--cases", "floor", "separate", "--threads", "1"]
    assert ppo.main([*command, "--repeats", "1", "--updates", "2"]) == 0
    records = json.loads(output.read_text())["run"]["threads"]["1"]["rounds"][0]
    assert [len(records[case].get("updates", [])) for case in ("floor", "separate")] == [0, 2]
    assert ppo.main(["memory", str(folder), "--output", str(output), "--cases", "separate", "--threads", "1"]) == 0
    results = json.loads(output.read_text())
    for record in results["memory"]["vocabularies"].values():
        assert 0 < record["separate"]["loaded_bytes"] < record["separate"]["peak_bytes"]
    assert "run" in results
    assert "rlhf, separate value model" in "\n".join(ppo.tables(results))

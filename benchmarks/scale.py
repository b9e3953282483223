"""Whether the model on paper, rlhf/scale.py, says what a run takes: runs of rlhf.ppo at small sizes beside it.

    python benchmarks/scale.py run --output benchmarks/scale.json       # a few minutes on one core
    python benchmarks/scale.py table benchmarks/scale.json --into docs/scale.md

Every run is a process of its own with one thread, on random models that ppo_work.py makes, of two updates of which the
second counts. Memory is resident memory: what the first update leaves behind, and the peak of each phase of the second
above that; the allocator gives freed blocks of 64 kB and more back at once. Time is that of the processor. The results
hold what was measured; predictions are made anew for every table, with the rates of this machine that were measured
beside: of a matrix product, of reading weights, and of layers too narrow to compute anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from measuring import (
    MB,
    Record,
    add_command,
    machine,
    machine_text,
    markdown,
    measured,
    read_results,
    replace_between,
    run_command,
    save,
    say,
)

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MOST_MAPPED = 2**16  # bytes from which the allocator maps a block by itself, and unmaps it when it is freed
REPEATS = 10  # of what a rate is measured by; the fastest counts
UPDATES = 2
STEPS = {"roll_out": "rollout", "score": "scoring", "collect": "scoring", "optimise": "training"}  # of rlhf.ppo

# Sizes of ppo_work.Task, and settings of PPOConfig; every case is the first but for what it names.
TASK = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_layers": 6, "num_heads": 6}
TASK |= {"num_kv_heads": 6, "episodes": 16, "prompt_tokens": 64, "new_tokens": 64, "epochs": 1, "minibatches": 1}
QUICK = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2}
QUICK |= {"num_kv_heads": 2, "episodes": 4, "prompt_tokens": 4, "new_tokens": 4}
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "16 episodes at once": ({}, {}),
    "4 at once": ({}, {"micro_batch_size": 4}),
    "activation checkpointing": ({}, {"activation_checkpointing": True}),
    "shared value head": ({}, {"value_model": "shared"}),
    "vocabulary 65,536": ({"vocab_size": 65536}, {}),
    "vocabulary 65,536, 4 at once": ({"vocab_size": 65536}, {"micro_batch_size": 4}),
}


def settings_of(task: Record, changes: Record) -> Record:
    """The settings of a case that PPOConfig has: those of its task, and its own."""
    return {
        "batch_size": task["episodes"],
        "minibatch_size": task["episodes"] // task["minibatches"],
        "ppo_epochs": task["epochs"],
        "max_new_tokens": task["new_tokens"],
        "updates": UPDATES,
        "eval_episodes": 2,
        "num_samples": 0,
        "save_every": 0,
        "learning_rate": 1e-6,
        "value_learning_rate": 1e-6,
    } | changes


# --- children ---


def case(options: argparse.Namespace) -> None:
    """Run one case of rlhf.ppo: print memory and processor time of the last update's phases."""
    from ppo_work import Task, make_task, resident_bytes

    import rlhf.ppo
    from rlhf import processor

    processor.prepare()  # as the command does
    task, changes = json.loads(options.case)
    phases: dict[str, Record] = {}
    updates: list[int] = []  # what is resident as each begins

    def metered(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **given: Any) -> Any:
            if not updates:  # held-out evaluation
                return function(*arguments, **given)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
            started = time.process_time()
            result = function(*arguments, **given)
            before = phases.get(phase, {"cpu_seconds": 0.0, "bytes": 0})
            phases[phase] = {
                "cpu_seconds": before["cpu_seconds"] + time.process_time() - started,
                "bytes": max(before["bytes"], resident_bytes("VmHWM") - updates[-1]),
            }
            return result

        return run

    one_update = rlhf.ppo.one_update

    def noted(*arguments: Any) -> Any:
        updates.append(resident_bytes())
        phases.clear()
        result = one_update(*arguments)
        if len(updates) == UPDATES:
            found = {"loaded_bytes": updates[0], "kept_bytes": updates[-1] - updates[0], "phases": phases}
            print("\n" + json.dumps(found), flush=True)  # after the line of a progress bar
            raise SystemExit(0)  # what comes after the updates is not measured
        return result

    rlhf.ppo.one_update = noted
    for name, phase in STEPS.items():
        setattr(rlhf.ppo, name, metered(phase, getattr(rlhf.ppo, name)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_task(Task(**task), folder)
        settings = settings_of(task, changes) | {
            "policy": str(folder / "sft1"),
            "reference": [str(folder / "sft1"), str(folder / "sft2")],
            "reward": [str(folder / "reward")],
            "prompts": str(folder / "prompts.jsonl"),
            "test_prompts": str(folder / "prompts.jsonl"),
            "output": str(folder / "run"),
        }
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        rlhf.ppo.main(["--config", str(folder / "settings.yaml")])


def rates(options: argparse.Namespace) -> None:
    """Print this machine's rates: operations of products, bytes of weights, seconds of a layer without arithmetic."""
    import torch
    from ppo_work import Task, language_model

    from rlhf import processor

    processor.prepare()
    task = Task(**json.loads(options.task))
    rows, wide, inner = task.episodes * task.length, task.hidden_size, task.intermediate_size
    found: Record = {}
    for name, dtype in (("flops", torch.float32), ("bf16_flops", torch.bfloat16)):
        inputs, weight = torch.randn(rows, wide, dtype=dtype), torch.randn(inner, wide, dtype=dtype)
        found[name] = 2.0 * rows * wide * inner / _fastest(partial(torch.mm, inputs, weight.T))
    matrix, vector = torch.ones(2**13, 2**13), torch.ones(2**13)
    found["bandwidth"] = 4.0 * matrix.numel() / _fastest(lambda: torch.mv(matrix, vector))
    narrow = language_model(Task(40, 16, 32, task.num_layers, 2, 2), 1).model
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        found["launch"] = _fastest(lambda: narrow(input_ids=token, use_cache=False)) / task.num_layers
    print(json.dumps(found))


def _fastest(function: Callable[[], object]) -> float:
    """Processor seconds, the least of a few."""
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds[1:])


# --- runs ---


def run(options: argparse.Namespace) -> None:
    """Measure the machine's rates and every case."""
    task = TASK | (QUICK if options.quick else {})
    results: Record = {
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "rates": _child("rates", json.dumps(task)),
        "cases": {},
    }
    for name in options.cases:
        sizes, changes = CASES[name]
        own = task | ({} if options.quick else sizes)
        changes = changes if not options.quick else {k: v for k, v in changes.items() if k != "micro_batch_size"}
        record = _child("case", json.dumps([own, changes]))
        results["cases"][name] = {"task": own, "settings": changes} | record
        told = ", ".join(f"{p} {r['bytes'] / MB:.0f} MB {r['cpu_seconds']:.1f} s" for p, r in record["phases"].items())
        say(f"{name}: {told}")
        save(options.output, results)
    say(f"all in {options.output}; next: python benchmarks/scale.py table {options.output} --into docs/scale.md")


def _child(command: str, argument: str) -> Record:
    environment = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "MALLOC_MMAP_THRESHOLD_": str(MOST_MAPPED),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    _, text = measured([sys.executable, Path(__file__), command, argument], environment=environment, sampled=False)
    record: Record = json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))
    return record


# --- tables ---


def predicted(entry: Record, rates: Record) -> Record:
    """What the model on paper says of a case, by phase: bytes above those between updates, operations and seconds.

    Between updates there is what is there at all moments. ``kept`` are the bytes of it that the first update adds:
    AdamW's moments, and the weights of a value model, which are mapped from their file and read there at last.
    """
    from rlhf.scale import ALWAYS, DEVICES, LOADED, PHASES, Plan, ScaleConfig, memory, peak, update_work

    task = entry["task"]
    sizes = {name: task[name] for name in TASK if name in ScaleConfig.__dataclass_fields__}
    config = ScaleConfig(**settings_of(task, entry["settings"]), **sizes, tied=True)
    device = replace(DEVICES["h100"], **rates, efficiency=1.0, kind="cpu")
    plan = replace(Plan.of(config), device=device)
    parts = [part for part in memory(plan) if part.moments != ALWAYS]
    read_before = set(LOADED) - {"value model weights"}
    kept = [part.num_bytes for part in memory(plan) if part.moments == ALWAYS and part.name not in read_before]
    works = update_work(plan)
    return {"kept": {"bytes": sum(kept)}} | {
        phase: {
            "bytes": peak(parts, PHASES[phase])[1],
            "flops": sum(work.flops for work in works if work.phase == phase),
            "seconds": sum(work.seconds for work in works if work.phase == phase),
        }
        for phase in dict.fromkeys(STEPS.values())
    }


def tables(results: Record) -> list[str]:
    """Both tables of a results file, as lines of Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    found = results["rates"]
    memory_rows, time_rows = [], []
    for name, entry in results["cases"].items():
        on_paper = predicted(entry, found)
        between = _compared(on_paper["kept"]["bytes"] / MB, entry["kept_bytes"] / MB, 0)
        memory_rows.append([f"{name}: between updates", *between])
        for phase, record in entry["phases"].items():
            paper = on_paper[phase]
            memory_rows.append([f"{name}: {phase}", *_compared(paper["bytes"] / MB, record["bytes"] / MB, 0)])
            row = _compared(paper["seconds"], record["cpu_seconds"], 2)
            time_rows.append([f"{name}: {phase}", f"{paper['flops'] / 1e9:.0f}", *row])
    return [
        f"{machine_text(results['machine'])}, one thread; {versions}. Measured rates: "
        f"{found['flops'] / 1e9:.0f} GFLOP/s of float32 products, {found['bf16_flops'] / 1e9:.0f} of bfloat16, "
        f"{found['bandwidth'] / 1e9:.1f} GB/s of weights, {found['launch'] * 1e6:.0f} µs a layer.",
        "",
        *markdown(["MB", "on paper", "measured", "paper ÷ measured"], memory_rows),
        "",
        *markdown(["processor seconds", "GFLOP", "on paper", "measured", "paper ÷ measured"], time_rows),
    ]


def _compared(paper: float, found: float, digits: int) -> list[str]:
    return [f"{paper:.{digits}f}", f"{found:.{digits}f}", f"{paper / found:.2f}" if found > 0 else ""]


def table(options: argparse.Namespace) -> None:
    """Print the results as Markdown, or put them where a file has its tables."""
    text = "\n".join(tables(read_results(options.results)))
    if options.into:
        replace_between(options.into, BEGIN, END, text)
    else:
        print(text)


# --- the command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what cannot be measured, told in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = add_command(commands, "run", run, "measure every case")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="results file, made new")
    command.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], metavar="CASE", help="default: all")
    command.add_argument("--quick", action="store_true", help="models of a few kB, to try the benchmark itself")
    command = add_command(commands, "table", table, "show results as Markdown")
    command.add_argument("results", type=Path, metavar="FILE")
    command.add_argument("--into", type=Path, metavar="PAGE", help=f"put them between {BEGIN} and {END} instead")
    command = add_command(commands, "case", case, "one case, in this process")
    command.add_argument("case", help="JSON: sizes of the task, settings")
    command = add_command(commands, "rates", rates, "the rates of this machine, in this process")
    command.add_argument("task", help="JSON: sizes of the task")
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""How long an update of PPO takes, and how much memory: rlhf.ppo, TRL's PPOTrainer, and the matrix products alone.

    python benchmarks/ppo.py make models                       # once: the models and prompts of the task
    python benchmarks/ppo.py run models --output ppo_results.json --trl-python trl-venv/bin/python
    python benchmarks/ppo.py decode --output ppo_results.json
    python benchmarks/ppo.py memory models --output ppo_results.json --trl-python trl-venv/bin/python
    python benchmarks/ppo.py table ppo_results.json --into benchmarks/README.md

Every run is a process of its own, started from this one, which loads no torch. benchmarks/README.md says what is
measured and why; ppo_work.py is what runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from measuring import (
    MB,
    Record,
    add_command,
    add_result,
    column,
    goal_cell,
    machine,
    machine_text,
    markdown,
    measured,
    megabytes_cell,
    ratio,
    ratio_cell,
    read_results,
    replace_between,
    run_command,
    say,
    seconds_cell,
    spread,
    versions_of,
)

WORK = Path(__file__).resolve().with_name("ppo_work.py")

CASES = ("floor", "onednn_floor", "separate", "shared", "trl")
FLOORS = ("floor", "onednn_floor")
NAMES = {
    "floor": "matrix products alone",
    "onednn_floor": "matrix products alone, by oneDNN",
    "separate": "rlhf, separate value model",
    "shared": "rlhf, value head on the policy",
    "trl": "TRL PPOTrainer",
}
PHASES = ("rollout", "scoring", "training", "other")
# The parts of the floor by phase; those of a separate value model are not in the floor of a shared one.
FLOOR_PHASES = {
    "rollout": ("prefill", "decoding"),
    "scoring": ("reference", "reward", "value"),
    "training": ("policy_training", "value_training"),
}
VALUE_PARTS = ("value", "value_training")

# Ratios of the time of an update, with the most that is wanted.
RATIOS = {
    "separate ÷ TRL": ("separate", "trl", 0.65),
    "separate ÷ floor": ("separate", "floor", 1.25),
    "separate ÷ oneDNN floor": ("separate", "onednn_floor", None),
    "shared ÷ TRL": ("shared", "trl", 0.42),
    "shared ÷ its floor": ("shared", "floor_shared", None),
    "TRL ÷ floor": ("trl", "floor", None),
}
MEMORY_GOAL = 0.6  # peak resident memory over TRL's
DECODE_GOALS = {"cpu": 0.6, "cuda": 1 / 8}  # time over that of generate without scores
BEGIN, END = "<!-- ppo tables: begin -->", "<!-- ppo tables: end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what cannot be measured, told in one line on stderr."""
    return run_command(_parser(), arguments)


# --- the task's folders ---


def make(options: argparse.Namespace) -> None:
    """Write the tasks that are not there yet, one for each size of vocabulary."""
    from ppo_work import FULL, QUICK, make_task

    for task in QUICK if options.quick else FULL:
        folder = options.folder / f"vocabulary-{task.vocab_size}"
        if folder.exists():
            say(f"{folder} is there already")
            continue
        partial = options.folder / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make_task(task, partial)
        partial.rename(folder)
        say(f"made {folder}")


def _tasks(folder: Path) -> dict[Path, Record]:
    """The task folders in a folder and what they hold, smallest vocabulary first."""
    tasks = {path.parent.resolve(): read_results(path) for path in folder.glob("vocabulary-*/task.json")}
    if not tasks:
        raise ValueError(f"{folder} holds no task: run `python benchmarks/ppo.py make {folder}` first")
    return dict(sorted(tasks.items(), key=lambda item: item[1]["vocab_size"]))


# --- children ---


def _child(case: str, folder: Path, threads: int, trl_python: Path | None, *arguments: str) -> Record:
    """Run one case in a process of its own, with so many threads: what it printed, and what the kernel says."""
    work = {"separate": "ours", "shared": "ours", "trl": "trl"}.get(case, "floor")
    python = trl_python if case == "trl" else Path(sys.executable)
    flags = {"ours": ["--value-model", case], "floor": ["--onednn"] if case == "onednn_floor" else []}.get(work, [])
    command = [str(python), str(WORK), work, str(folder), *flags, *arguments]
    record, text = measured(command, environment=_environment(threads), sampled=False)
    return json.loads(text.splitlines()[-1]) | {"process_seconds": record["seconds"]}


def _environment(threads: int) -> dict[str, str]:
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",  # the task is one of the CPU, on both sides
    }


def _cases(options: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """The cases asked for that can be run here; the others are told."""
    skipped = {}
    if "value_model" not in known:
        skipped["shared"] = "this rlhf has no setting value_model"
    if options.trl_python is None:
        skipped["trl"] = "no --trl-python was given"
    for case in options.cases:
        if case in skipped:
            say(f"{case}: skipped, {skipped[case]}")
    return [case for case in options.cases if case not in skipped]


def _known_settings() -> list[str]:
    settings: list[str] = json.loads(measured([sys.executable, WORK, "settings"])[1].splitlines()[-1])
    return settings


def _setting(trl_python: Path | None = None) -> Record:
    """What the results depend on beside the task: machine and versions."""
    packages = {"soupkit": "soupkit-rlhf", "torch": "torch", "transformers": "transformers"}
    versions = {"python": platform.python_version()} | {name: version(package) for name, package in packages.items()}
    if trl_python:
        found = versions_of(trl_python, ("trl", "torch", "transformers"))
        versions |= dict(zip(("trl", "its torch", "its transformers"), found, strict=True))
    return {"machine": machine(), "versions": versions}


# --- time ---


def run(options: argparse.Namespace) -> None:
    """Time updates in interleaved rounds, and save what is there after each round."""
    folder, task = next(iter(_tasks(options.folder).items()))
    cases = _cases(options, _known_settings())
    setting = _setting(options.trl_python) | {"task": task, "updates": options.updates, "cases": cases}
    entry = _entry(options.output, "run", options.resume, setting) or setting | {"threads": {}}
    for threads in options.threads:
        series = entry["threads"].setdefault(str(threads), {"rounds": []})
        for index in range(len(series["rounds"]), options.repeats):
            turn = index % len(cases)
            order = cases[turn:] + cases[:turn]
            records = {}
            for case in order:
                arguments = [] if case in FLOORS else ["--updates", str(options.updates)]
                records[case] = figures(_child(case, folder, threads, options.trl_python, *arguments))
                say(f"{threads} threads, round {index + 1}: {case:<9}{_told(records[case])}")
            series["rounds"].append({case: records[case] for case in cases})
            series["summary"] = summary(series["rounds"])
            add_result(options.output, "run", entry)
    say(f"all in {options.output}; next: python benchmarks/ppo.py table {options.output}")


def _entry(path: Path, key: str, resume: bool, setting: Record) -> Record | None:
    """What a results file has under a key, to go on with; None for nothing."""
    found = read_results(path).get(key) if path.exists() else None
    if found is None:
        return None
    if not resume:
        raise ValueError(f"{path} has results of {key}: choose another --output, or go on with them (--resume)")
    for name, value in setting.items():
        if found[name] != value:
            raise ValueError(f"{path} was measured with {name} {found[name]}, and here is {value}: start a new file")
    return found


def figures(record: Record) -> Record:
    """Seconds of an update, of each phase and in all: medians over a run's updates without the first, which warms up.

    ``cpu_seconds`` are those of all processors. Of the floor, sums of its parts; ``shared_seconds`` and
    ``shared_cpu_seconds`` leave out those of a separate value model.
    """
    if "parts" in record:
        phases = {phase: sum(record["parts"][part] for part in of_phase) for phase, of_phase in FLOOR_PHASES.items()}
        sums = {"phases": phases}
        for key, parts in (("seconds", record["parts"]), ("cpu_seconds", record["cpu_parts"])):
            sums[key] = sum(parts.values())
            sums[f"shared_{key}"] = sum(seconds for part, seconds in parts.items() if part not in VALUE_PARTS)
        return record | sums
    updates = record["updates"][1:] or record["updates"]
    medians = {name: statistics.median(update[name] for update in updates) for name in updates[0]}
    return record | {key: medians.pop(key) for key in ("seconds", "cpu_seconds")} | {"phases": medians}


def _told(record: Record) -> str:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in record["phases"].items())
    memory = f", peak {record['peak_bytes'] / MB:.0f} MB" if "peak_bytes" in record else ""
    return f"{record['seconds']:7.2f} s an update ({phases}), {record['cpu_seconds']:.2f} s of processors{memory}"


def summary(rounds: Sequence[Mapping[str, Record]]) -> Record:
    """What rounds come to: the spread of each case's seconds, median phases, peak memory, and ratios.

    Each ratio comes twice: as the spread of the rounds' own ratios, whose median the tables show, and as the ratio of
    the two medians.
    """
    times, cpu_times = (_by_case(rounds, key) for key in ("seconds", "cpu_seconds"))
    present = [case for case in (*CASES, "floor_shared") if any(case in row for row in times)]
    both = {name: pair for name, (*pair, _) in RATIOS.items() if any(set(pair) <= row.keys() for row in times)}
    peaks = [{c: r["peak_bytes"] for c, r in records.items() if "peak_bytes" in r} for records in rounds]
    return {
        "seconds": {case: spread(column(times, case)) for case in present},
        "cpu_seconds": {case: spread(column(cpu_times, case)) for case in present},
        "phases": {case: _median_phases([r[case] for r in rounds if case in r]) for case in present if case in CASES},
        "peak_bytes": {case: max(column(peaks, case)) for case in CASES if column(peaks, case)},
        "ratios": {name: ratio(times, *pair) for name, pair in both.items()},
        "cpu_ratios": {name: ratio(cpu_times, *pair) for name, pair in both.items()},
        "memory_ratios": {
            case: ratio(peaks, case, "trl") for case in ("separate", "shared") if {case, "trl"} <= set().union(*peaks)
        },
    }


def _by_case(rounds: Sequence[Mapping[str, Record]], key: str) -> list[dict[str, float]]:
    """A figure of each round by case, the floor without a separate value model among them."""
    rows = [{case: record[key] for case, record in records.items()} for records in rounds]
    for row, records in zip(rows, rounds, strict=True):
        if "floor" in records:
            row["floor_shared"] = records["floor"][f"shared_{key}"]
    return rows


def _median_phases(records: Sequence[Record]) -> dict[str, float]:
    return {name: statistics.median(r["phases"][name] for r in records) for name in records[0]["phases"]}


# --- decoding ---


def decode(options: argparse.Namespace) -> None:
    """Time sampling against transformers' generate, in turns in this process."""
    import torch
    from ppo_work import FULL, QUICK, SMOLLM2, time_decoding

    if options.threads:
        torch.set_num_threads(options.threads)
    task = QUICK[0] if options.quick else FULL[0] if options.device == "cpu" else SMOLLM2
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    engine = options.engine or ("decode" if options.device == "cpu" else "graph")
    entry = _setting() | {"task": vars(task), "dtype": dtype, "engine": engine, "threads": torch.get_num_threads()}
    entry["rounds"] = rounds = time_decoding(task, options.device, getattr(torch, dtype), options.repeats, engine)
    if options.device == "cuda":
        entry["cuda"] = torch.cuda.get_device_name()
    entry["seconds"] = {name: spread([row[name] for row in rounds]) for name in rounds[0]}
    entry["ratios"] = {name: ratio(rounds, "ours", name) for name in ("generate", "scores")}
    add_result(options.output, f"decode_{options.device}", entry)
    print("\n".join(_decode_table({options.device: entry})))


# --- memory ---


def memory(options: argparse.Namespace) -> None:
    """Measure the peak memory of one update for each vocabulary, above that of the loaded models."""
    cases = [case for case in _cases(options, _known_settings()) if case not in FLOORS]
    entry = _setting(options.trl_python) | {"threads": options.threads, "vocabularies": {}}
    for folder, task in _tasks(options.folder).items():
        records = entry["vocabularies"][str(task["vocab_size"])] = {}
        for case in cases:
            loaded = _child(case, folder, options.threads, options.trl_python, "--only-load")
            update = _child(case, folder, options.threads, options.trl_python, "--updates", "1")
            records[case] = {"loaded_bytes": loaded["loaded_bytes"]}
            records[case] |= {key: update[key] for key in ("peak_bytes", "update_peak_bytes")}
            told = ", ".join(f"{key} {value / MB:.0f} MB" for key, value in records[case].items())
            say(f"vocabulary {task['vocab_size']}: {case:<9}{told}")
            add_result(options.output, "memory", entry)
    print("\n".join(_memory_table(entry)))


# --- tables ---


def table(options: argparse.Namespace) -> None:
    """Print the results as Markdown, or put them where a file has its tables."""
    text = "\n".join(tables(read_results(options.results)))
    if options.into:
        replace_between(options.into, BEGIN, END, text)
    else:
        print(text)


def tables(results: Record) -> list[str]:
    """All tables of a results file, as lines of Markdown."""
    lines: list[str] = []
    if "run" in results:
        lines += [_setting_line(results["run"]), ""]
        for threads, series in results["run"]["threads"].items():
            num = len(series["rounds"])
            lines += [f"### One update, {_counted(threads, 'thread')}, {_counted(num, 'round')}", ""]
            lines += [*_time_table(series["summary"]), "", *_ratio_table(series["summary"]), ""]
    decoded = {device: results[f"decode_{device}"] for device in DECODE_GOALS if f"decode_{device}" in results}
    if decoded:
        lines += ["### Decoding", "", *_decode_table(decoded), ""]
    if "memory" in results:
        lines += ["### Memory of one update", "", *_memory_table(results["memory"]), ""]
    return lines[:-1]


def _counted(num: object, noun: str) -> str:
    return f"{num} {noun}" + ("" if str(num) == "1" else "s")


def _setting_line(entry: Record) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in entry["versions"].items())
    return f"{machine_text(entry['machine'])}; {versions}. Medians of {entry['updates'] - 1} updates a run."


def _time_table(entry: Record) -> list[str]:
    rows = []
    for case, phases in entry["phases"].items():
        peak = megabytes_cell(entry["peak_bytes"][case]) if case in entry["peak_bytes"] else ""
        cells = [f"{phases[phase]:.2f}" if phase in phases else "" for phase in PHASES]
        cpu = seconds_cell(entry["cpu_seconds"][case])
        rows.append([NAMES[case], seconds_cell(entry["seconds"][case]), *cells, cpu, peak])
    return markdown(["an update (s)", "in all", *PHASES, "of processors", "peak (MB)"], rows)


def _ratio_table(entry: Record) -> list[str]:
    rows = []
    for name, values in entry["ratios"].items():
        goal = RATIOS[name][2]
        met = "" if goal is None else goal_cell(values["median"], goal, at_most=True)
        rows.append([name, ratio_cell(values), met, ratio_cell(entry["cpu_ratios"][name])])
    for case, values in entry["memory_ratios"].items():
        met = goal_cell(values["median"], MEMORY_GOAL, at_most=True)
        rows.append([f"peak memory, {case} ÷ TRL", ratio_cell(values), met, ""])
    return markdown(["ratio", "time", "goal", "time of processors"], rows)


def _decode_table(entries: Mapping[str, Record]) -> list[str]:
    rows = []
    for device, entry in entries.items():
        task, ratios = entry["task"], entry["ratios"]
        where = entry.get("cuda", f"{device}, {_counted(entry['threads'], 'thread')}")
        row = [f"{where}, {entry['engine']}, {task['episodes']} × {task['new_tokens']} tokens, {entry['dtype']}"]
        row += [seconds_cell(entry["seconds"][name]) for name in ("ours", "generate", "scores")]
        row += [ratio_cell(ratios[name]) for name in ("scores", "generate")]
        rows.append([*row, goal_cell(ratios["generate"]["median"], DECODE_GOALS[device], at_most=True)])
    head = [
        "sampling (s)",
        "rlhf.rollout",
        "generate",
        "generate, scores kept",
        "ours ÷ with scores",
        "ours ÷ generate",
    ]
    return markdown([*head, "goal"], rows)


def _memory_table(entry: Record) -> list[str]:
    rows = []
    for vocabulary, records in entry["vocabularies"].items():
        for case, record in records.items():
            loaded, peak, of_update = (record[key] for key in ("loaded_bytes", "peak_bytes", "update_peak_bytes"))
            row = [f"{vocabulary}, {NAMES[case]}", *map(megabytes_cell, (loaded, peak, of_update, of_update - loaded))]
            if "trl" in records and case != "trl":
                theirs = records["trl"]
                row.append(f"{(of_update - loaded) / (theirs['update_peak_bytes'] - theirs['loaded_bytes']):.2f}")
                share = peak / theirs["peak_bytes"]
                row += [f"{share:.2f}", goal_cell(share, MEMORY_GOAL, at_most=True)]
            else:
                row += ["", "", ""]
            rows.append(row)
    head = ["vocabulary (MB)", "models loaded", "peak of the process", "peak of the update", "update above loaded"]
    return markdown([*head, "of it ÷ TRL", "peak ÷ TRL", "goal"], rows)


# --- the command line ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/ppo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, "make", make, "write random models and prompts, for two sizes of vocabulary")
    command.add_argument("folder", type=Path, metavar="DIR", help="they become DIR/vocabulary-8192 and -131072")
    command.add_argument("--quick", action="store_true", help="models of a few kB, to try the benchmark itself")

    command = add_command(commands, "run", run, "time updates against TRL's and against their matrix products")
    _add_common(command)
    command.add_argument("--resume", action="store_true", help="keep the rounds that are in FILE, run those missing")
    command.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="series to run (default: 2 1)")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    command.add_argument("--updates", type=int, default=4, metavar="N", help="updates a run (default: %(default)s)")

    command = add_command(commands, "decode", decode, "time sampling against transformers' generate")
    command.add_argument("--device", choices=DECODE_GOALS, default="cpu")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    command.add_argument("--engine", choices=("decode", "graph"), help="default: decode on cpu, graph on cuda")
    command.add_argument("--threads", type=int, help="default: as torch has it")
    command.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: %(default)s)")
    command.add_argument("--output", type=Path, metavar="FILE", help="results file to add to")
    command.add_argument("--quick", action="store_true", help="a model of a few kB, to try the benchmark itself")

    command = add_command(commands, "memory", memory, "peak memory of one update, for each size of vocabulary")
    _add_common(command)
    command.add_argument("--threads", type=int, default=2, help="default: %(default)s")

    command = add_command(commands, "table", table, "show results as Markdown, the goals beside them")
    command.add_argument("results", type=Path, metavar="FILE")
    command.add_argument("--into", type=Path, metavar="README", help=f"put them between {BEGIN} and {END} instead")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="DIR", help="the tasks as `make` writes them")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="results file, new or to add to")
    command.add_argument(
        "--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE",
        help=f"of {', '.join(CASES)} (default: all)",
    )  # fmt: skip
    command.add_argument("--trl-python", type=Path, metavar="PATH", help="a Python that has TRL 1.12.0 installed")


if __name__ == "__main__":
    sys.exit(main())

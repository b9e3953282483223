"""What the benchmarks share: processes measured from outside, results as JSON, and tables. Loads no torch.

A child's peak memory as the kernel reports it is never less than its parent's, so a parent must stay small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

MB = 10**6
# Memory of a process in which what it shares with its children counts once, and of it what is no file's.
SHARES = re.compile(r"^(Pss|Pss_Anon):\s*(\d+) kB$", re.MULTILINE)
SAMPLING_INTERVAL = 0.03  # seconds between two looks at a process's memory

Record = dict[str, Any]

# --- one process ---


def measured(
    command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, sampled: bool = True
) -> tuple[Record, str]:
    """Run a command to its end: what it took, and what it printed. Raises ValueError when it fails.

    Times are in seconds. ``resident_bytes`` is the most that was mapped and present, page cache included;
    ``anonymous_bytes`` the most of the process's own; both with its children, sampled, and shared pages counted once.
    ``disk_bytes`` is what storage had to deliver. Looking at a process's memory holds it up, by milliseconds for each
    gigabyte: without ``sampled``, ``resident_bytes`` is the kernel's own peak of the process alone, and there are no
    ``anonymous_bytes``.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": path} | dict(environment or {})
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        parts = [str(part) for part in command]
        process = subprocess.Popen(parts, stdout=output, stderr=subprocess.STDOUT, env=variables)
        with _sampled_memory(process.pid, sampled) as samples:
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if sampled and not samples:
        raise ValueError(f"the memory of {command[0]} could not be sampled: /proc/PID/smaps_rollup has no Pss_Anon")
    if process.returncode:
        last = text.splitlines()[-1] if text else "nothing"
        raise ValueError(f"{' '.join(map(str, command))} ended with code {process.returncode} and printed: {last}")
    record = {
        "seconds": seconds,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "resident_bytes": max(usage.ru_maxrss * 1024, *(sample["Pss"] for sample in samples), 0),
        "disk_bytes": usage.ru_inblock * 512,
    }
    if sampled:
        record["anonymous_bytes"] = max(sample["Pss_Anon"] for sample in samples)
    return record, text


@contextmanager
def _sampled_memory(pid: int, sampled: bool) -> Iterator[list[dict[str, int]]]:
    """Bytes of memory of a process and its children while the block runs, as the kernel has them."""
    samples: list[dict[str, int]] = []
    ended = threading.Event()

    def watch() -> None:
        while sampled and not ended.is_set():
            sample = dict.fromkeys(("Pss", "Pss_Anon"), 0)
            with suppress(OSError):  # it has just ended
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                for process in (str(pid), *children):
                    for key, number in SHARES.findall(Path(f"/proc/{process}/smaps_rollup").read_text()):
                        sample[key] += 1024 * int(number)
            if sample["Pss_Anon"]:
                samples.append(sample)
            ended.wait(SAMPLING_INTERVAL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        watcher.join()


# --- results ---


def machine() -> Record:
    """What the machine is. Names no machine and no folder."""
    return {
        "processor": _line_of("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('-')[0].split('.')[:3])}",
    }


def _line_of(path: str, key: str) -> str:
    """The value in the first line ``key : value`` of a file of the kernel's."""
    lines = [line.split(":", 1)[1].strip() for line in Path(path).read_text().splitlines() if line.startswith(key)]
    return lines[0] if lines else platform.machine()


def machine_text(facts: Record) -> str:
    """The facts of :func:`machine` as the start of a sentence."""
    return f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB, {facts['kernel']}"


def versions_of(python: Path, names: Sequence[str]) -> list[str]:
    """Versions of packages that are installed beside another Python."""
    script = f"import importlib.metadata as m; print(*map(m.version, {tuple(names)}))"
    return measured([python, "-c", script])[1].split()


def spread(values: Sequence[float]) -> Record:
    """Median, extremes and number of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "num": len(values)}


def column(rows: Sequence[Mapping[str, float]], key: str) -> list[float]:
    """The values under a key, of the rows that have it."""
    return [row[key] for row in rows if key in row]


def ratio(rows: Sequence[Mapping[str, float]], above: str, below: str) -> Record:
    """The spread of the rows' own ratios, of those that have both, and the ratio of the two medians."""
    both = [row for row in rows if above in row and below in row]
    medians = [statistics.median(column(both, key)) for key in (above, below)]
    return spread([row[above] / row[below] for row in both]) | {"of_medians": medians[0] / medians[1]}


def read_results(path: Path) -> Record:
    """What a results file holds."""
    results: Record = json.loads(path.read_text(encoding="utf-8"))
    return results


def add_result(path: Path | None, key: str, entry: Record) -> None:
    """Put an entry into a results file, which need not be there yet."""
    if path:
        save(path, (read_results(path) if path.exists() else {}) | {key: entry})


def save(path: Path, results: Record) -> None:
    """Replace a results file in one step."""
    partial = path.with_name(f".{path.name}.partial")
    write_json(partial, results)
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Tell how it goes, on stderr."""
    print(line, file=sys.stderr, flush=True)


# --- tables ---


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Put the text between two marks in a file. Raises ValueError where they are missing."""
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no place for the tables: add the lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def ratio_cell(values: Record) -> str:
    """A ratio of :func:`ratio`."""
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f}; medians {values['of_medians']:.2f})"


def seconds_cell(values: Record) -> str:
    """Seconds, from :func:`spread`."""
    if values["num"] == 1:
        return f"{values['median']:.2f} (1 run)"
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})"


def megabytes_cell(num_bytes: float) -> str:
    """Bytes, in MB."""
    return f"{num_bytes / MB:.0f}"


def goal_cell(value: float, goal: float, *, at_most: bool = False, unit: float = 1) -> str:
    """The goal, and whether the value meets it."""
    met = value <= goal if at_most else value >= goal
    return f"{'≤' if at_most else '≥'} {goal / unit:g} {'met' if met else '**missed**'}"


# --- command lines ---


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what cannot be measured, told in one line on stderr."""
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """A subcommand that calls a function."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
    command.set_defaults(command=function)
    return command

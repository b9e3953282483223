"""Doing what of a study is not done: the draws' stages, what is measured of their models, and the runs.

Stages and runs are commands of :mod:`rlhf` in processes of their own, several at once; what they write is whole or is
gone on with. A row is stored when it is measured, so that whatever is killed, a study begun again does the rest and has
the same tables. Work whose row is stored is done, also where its folder is gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers.utils import logging

from analysis.results import load_npz, save_npz
from analysis.study.config import START, Case, Study, filled
from analysis.study.effects import Tables
from analysis.study.measures import Measures, win_rate
from analysis.study.store import (
    HELD_OUT,
    MODELS,
    PREDICTIONS,
    RUNS,
    TIMINGS,
    Row,
    cell,
    read_table,
    write_table,
)
from rlhf import processor
from rlhf.metrics import replace_text
from rlhf.rewards import load_function

PR_SET_PDEATHSIG = 1  # of Linux' prctl


class StudyError(ValueError):
    """A command failed; the text says which, and where its output is."""


@dataclass(frozen=True)
class Workers:
    """How many processes work at once, and with how many threads each."""

    count: int
    threads: int


@dataclass
class Results:
    """The stored rows, by what they are of; every change is on disk at once."""

    study: Study
    rows: dict[str, dict[tuple[str, ...], Row]]

    KEYS: ClassVar[dict[str, tuple[str, ...]]] = {
        RUNS: ("regime", "draw", "arm", "kl_coef"),
        MODELS: ("regime", "draw", "model"),
        PREDICTIONS: ("regime", "draw", "reference", "kl_coef"),
        TIMINGS: ("table", "regime", "draw", "name", "kl_coef"),
    }

    @classmethod
    def read(cls, study: Study) -> Results:
        """What is stored of this study; rows made with other settings are left out, and with the next change gone."""
        found = cls(study, {})
        versions = {study.version(case) for case in study.cases()}
        versions |= {study.draw_version(draw, regime) for regime in study.regimes for draw in study.draws}
        for name, keys in cls.KEYS.items():
            rows = read_table(study.results / name)
            kept = [row for row in rows if (_times(study, row) if name == TIMINGS else row["version"] in versions)]
            if len(kept) < len(rows):
                print(f"{study.results / name}: {len(rows) - len(kept)} rows are of other settings", file=sys.stderr)
            found.rows[name] = {_key(row, keys): row for row in kept}
        return found

    def tables(self) -> Tables:
        """What is stored, as the page wants it."""
        return Tables(*(list(self.rows[name].values()) for name in (RUNS, MODELS, PREDICTIONS, TIMINGS)))

    def store(self, name: str, rows: Sequence[Row]) -> None:
        """Add rows to a table, or replace those with the same key, and write it in the order of the study."""
        self.rows[name] |= {_key(row, self.KEYS[name]): row for row in rows}
        write_table(self.study.results / name, sorted(self.rows[name].values(), key=self._place))

    def has(self, name: str, version: str, *key: str | float) -> bool:
        """Whether a row is stored whose key starts so, made with these very settings."""
        start = tuple(map(cell, key))
        return any(k[: len(start)] == start and row["version"] == version for k, row in self.rows[name].items())

    def _place(self, row: Row) -> tuple[Any, ...]:
        """Where a row stands, whenever it was made: in the order of the configuration, then by β, none first."""
        study = self.study
        orders: dict[str, list[Any]] = {
            "table": ["stages", MODELS, RUNS],
            "regime": ["", *study.regimes],
            "draw": list(study.draws),
            "arm": list(study.arms),
            "model": [START, *study.measure.models],
            "reference": list(study.measure.models),
            "name": ["", *study.stages, *study.arms],
        }
        places = [order.index(row[name]) for name, order in orders.items() if name in row]
        kl_coef = float(row.get("kl_coef", math.nan))
        return (*places, -1.0 if math.isnan(kl_coef) else kl_coef)


def run_study(study: Study, cases: Sequence[Case], workers: Workers, *, again: bool = False) -> list[str]:
    """Do the given runs and what they need, as far as it is not done; ``again`` does them anew. → what failed

    Raises StudyError for a stage that fails, and for a command that finds its input bad; ValueError where another
    process works in the same folder.
    """
    results = Results.read(study)
    require_ready(study)
    missing = [case for case in cases if again or not results.has(RUNS, study.version(case), *_key_of(case))]
    settings = dict.fromkeys((case.draw, case.regime) for case in cases)
    unmeasured = [pair for pair in settings if not results.has(MODELS, study.draw_version(*pair), pair[1], pair[0])]
    failed: list[str] = []
    with _alone(study.work), _pool(workers) as pool:
        draws = dict.fromkeys(case.draw for case in missing) | dict.fromkeys(draw for draw, _ in unmeasured)
        jobs: dict[Future[Any], Any] = {pool.submit(make_draw, study, draw): draw for draw in draws}
        for _, _, seconds in _done(jobs, "draws"):
            results.store(TIMINGS, [_timing(row, workers) for row in seconds])
        jobs = {pool.submit(measure_models, study, *pair): pair for pair in unmeasured}
        for _, (models, points), seconds in _done(jobs, "models"):
            results.store(MODELS, models)
            if points:
                results.store(PREDICTIONS, points)
            results.store(TIMINGS, [_timing(seconds, workers)])
        if again:
            for folder in {study.run_folder(case) for case in missing}:
                shutil.rmtree(folder, ignore_errors=True)
        jobs = {pool.submit(do_run, study, case): case for case in missing}
        for _, row, seconds in _done(jobs, "runs"):
            if isinstance(row, str):
                failed.append(row)
                continue
            results.store(RUNS, [row])
            if seconds is not None:
                results.store(TIMINGS, [_timing(seconds, workers)])
    results.store(RUNS, [_with_win_rates(study, row) for row in results.rows[RUNS].values()])
    _report_unpaired(study, [results.rows[RUNS][key] for key in map(_row_key, missing) if key in results.rows[RUNS]])
    return failed


def require_ready(study: Study) -> None:
    """Make the folders. Raises OSError where they cannot be made, and ValueError for rewards that are no functions."""
    rewards = [study.ppo["reward"], study.ppo.get("gold_reward") or [], list(study.measure.rewards.values())]
    for spec in {spec for given in rewards for spec in ([given] if isinstance(given, str) else given)}:
        if ":" in spec and "{" not in spec and not Path(spec).is_dir():
            load_function(spec)
    for name, folder in (("results", study.results), ("work", study.work)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{name}: {folder}: cannot be made ({error.strerror}); choose another folder") from None


# ── What a worker does ────────────────────────────────────────────────────────────────────────────────────────────────


def make_draw(study: Study, draw: int) -> tuple[None, list[Row]]:
    """Make what of a draw's stages is not there. → how long each took"""
    folder, paths = study.draw_folder(draw), study.paths(draw)
    took: list[Row] = []
    for name, command in study.stages.items():
        line = [filled(part, paths) for part in shlex.split(command)]
        made_by = folder / f"{name}.command"
        if (folder / name).is_dir():
            if made_by.is_file() and made_by.read_text(encoding="utf-8") != " ".join(line):
                raise StudyError(f"{folder / name}: was made by another command, {made_by} says; remove the folder")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(made_by, " ".join(line))
        resume = ["--resume"] if (folder / f"{name}.unfinished").is_dir() else []
        seconds = _run(f"draw {draw}, {name}", [*line, "--output", str(folder / name), *resume], folder / f"{name}.log")
        took.append({"table": "stages", "regime": "", "draw": draw, "name": name, "seconds": seconds})
    return None, took


def measure_models(study: Study, draw: int, regime: str) -> tuple[tuple[list[Row], list[Row]], Row]:
    """The rows of a draw's models in a regime; where claims are tested, predictions from samples of the models, too."""
    started = time.perf_counter()
    measures = _measures(study, draw, regime)
    key: Row = {"regime": regime, "draw": draw, "version": study.draw_version(draw, regime)}
    measured = measures.of_models()
    start = measured[START][1]
    save_npz(study.draw_folder(draw) / f"golds-{regime}.npz", "Golds", _named(start))
    models: list[Row] = [{**key, "model": name, **row} for name, (row, _) in measured.items()]
    predictions = measures.predictions() if regime == study.compare.regime else {}
    points: list[Row] = [{**key, "reference": name, **row} for name, rows in predictions.items() for row in rows]
    seconds = time.perf_counter() - started
    return (models, points), {"table": MODELS, "regime": regime, "draw": draw, "name": "", "seconds": seconds}


def do_run(study: Study, case: Case) -> tuple[Row | str, Row | None]:
    """Train, where that is not done, and measure. → the row, or why there is none; how long training took

    A run whose policy runs away ends by itself and has no row.
    """
    folder = study.run_folder(case)
    settings, log, lock = (folder.with_name(f"{folder.name}.{kind}") for kind in ("yaml", "log", "lock"))
    seconds = None
    with _locked(lock):
        if not (folder / "summary.json").is_file():
            replace_text(settings, yaml.safe_dump(study.settings(case), sort_keys=False, allow_unicode=True))
            resume = ["--resume"] if (folder / "config.yaml").is_file() else []
            command = ["rlhf.ppo", "--config", str(settings), "--output", str(folder), *resume]
            try:
                seconds = _run(str(case), command, log)
            except StudyError as error:
                if not (folder / "config.yaml").is_file():
                    raise  # it found its input bad and never began
                return str(error), None
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run has no use for them
        row, golds = _measures(study, case.draw, case.regime).of_run(folder, study.settings(case))
        save_npz(folder / f"golds-{case.regime}.npz", "Golds", _named(golds))
    regime, draw, arm, kl_coef = _key_of(case)
    key: Row = {"regime": regime, "draw": draw, "arm": arm, "kl_coef": kl_coef, "version": study.version(case)}
    if seconds is None:
        return {**key, **row}, None
    took: Row = {"table": RUNS, "regime": regime, "draw": draw, "name": arm, "kl_coef": kl_coef, "seconds": seconds}
    return {**key, **row}, took


# ── Processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(what: str, command: Sequence[str], log: Path) -> float:
    """Run ``python -m …`` with its output in a file. → seconds"""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.run(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
    if process.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else f"exit status {process.returncode}"
        raise StudyError(f"{what}: {reason} (all of it: {log})")
    return time.perf_counter() - started


def _die_with_parent() -> None:
    """Where the system can, have this process killed when its parent dies, so that none goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start_worker(threads: int) -> None:
    _die_with_parent()
    processor.prepare()
    logging.disable_progress_bar()  # transformers' bars for single files would bury the study's
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(threads)


@contextmanager
def _pool(workers: Workers) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; those under way are not waited for when the block ends by an error."""
    pool = ProcessPoolExecutor(workers.count, get_context("spawn"), _start_worker, (workers.threads,))
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(jobs: Mapping[Future[Any], Any], what: str) -> Iterator[tuple[Any, ...]]:
    """(what the job is of, its results) as jobs end, with a bar that says how long the rest will take."""
    with tqdm(total=len(jobs), desc=what, smoothing=0, disable=not jobs) as bar:
        for future in as_completed(jobs):
            yield jobs[future], *future.result()
            bar.update()


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file's lock, which the system gives back whatever happens. Raises BlockingIOError instead of waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    try:
        with _locked(work / ".lock", wait=False):
            yield
    except BlockingIOError:
        raise ValueError(f"{work}: another process is at this study; let it end, or take another folder") from None


# ── Keys, versions, rates ─────────────────────────────────────────────────────────────────────────────────────────────

_kept: dict[tuple[int, str], Measures] = {}  # of this worker: most jobs are of the draw of the one before


def _measures(study: Study, draw: int, regime: str) -> Measures:
    if (draw, regime) not in _kept:
        _kept.clear()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _kept[draw, regime] = Measures(study, study.paths(draw, regime), device)
    return _kept[draw, regime]


def _key_of(case: Case) -> tuple[str, int, str, float]:
    return case.regime, case.draw, case.arm, math.nan if case.kl_coef is None else case.kl_coef


def _key(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(cell(row.get(column, math.nan)) for column in columns)


def _times(study: Study, row: Row) -> bool:
    """Whether a row of times is of something that the study still has."""
    return row["draw"] in study.draws and row["name"] in ("", *study.stages, *study.arms)


def _timing(row: Row, workers: Workers) -> Row:
    return {**row, "workers": workers.count, "threads": workers.threads, "machine": machine()}


def machine() -> str:
    """The processor, as the tables say what times were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cpu = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return ", ".join(filter(None, [device, cpu or platform.processor(), f"{os.cpu_count()} cores"]))


def _named(golds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names that a file can hold."""
    return {where or "training": values for where, values in golds.items()}


def _row_key(case: Case) -> tuple[str, ...]:
    return tuple(cell(value) for value in _key_of(case))


def _report_unpaired(study: Study, rows: Sequence[Row]) -> None:
    """Say of rows made now which lack a win rate, as the baseline's responses are gone with ``work``."""
    baseline = study.compare.baseline
    lacking = [
        row
        for row in rows
        if row["arm"] != baseline
        and not math.isnan(float(row["kl_coef"]))
        and math.isnan(float(row.get("win_rate/baseline", math.nan)))
    ]
    if lacking:
        print(
            f"no win rate against {baseline} in {len(lacking)} of the rows made now: its responses are not in "
            f"{study.work}; --arm {shlex.quote(baseline)} --again makes them anew",
            file=sys.stderr,
        )


def _with_win_rates(study: Study, row: Row) -> Row:
    """The row with its win rates, as far as both sides' responses are there; what is not stays as it is."""
    case = Case(
        str(row["regime"]),
        int(row["draw"]),
        str(row["arm"]),
        None if math.isnan(float(row["kl_coef"])) else float(row["kl_coef"]),
    )
    name = f"golds-{case.regime}.npz"
    mine = study.run_folder(case) / name
    others = {"start": study.draw_folder(case.draw) / name}
    baseline = study.compare.baseline
    if case.arm != baseline and case.kl_coef is not None:
        others["baseline"] = study.run_folder(replace(case, arm=baseline)) / name
    found = {}
    for other, path in others.items():
        if mine.is_file() and path.is_file():
            golds, theirs = load_npz(mine, "Golds"), load_npz(path, "Golds")
            for where in ("", HELD_OUT):
                found[f"{where}win_rate/{other}"] = win_rate(golds[where or "training"], theirs[where or "training"])
    return {**row, **found}

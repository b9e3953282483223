"""Many tensors at once: a merge cut into tasks that read, compute and write side by side.

Tasks run in threads: torch and NumPy let other threads run while they compute, and so do reads and writes. Merges of
folders run them in forked processes where that is safe, which is faster still (see ``processes``). What a task computes
does not depend on where it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from soupkit import hashing
from soupkit.blocks import Findings, Readers, merged_blocks, steady_torch
from soupkit.errors import MergeError
from soupkit.methods import Method
from soupkit.planning import TensorPlan
from soupkit.processes import SharedCounts, run_in_processes

Task = Callable[[], Any]
# sink(variant, position, block) takes the soup's elements from a position on.
Sink = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Streams:
    """What one task reads and writes. When its elements are complete, ``finish`` gives the task's result."""

    readers: Readers
    sink: Sink
    finish: Callable[[], Any] = lambda: None


def sink_into(flat: Sequence[Tensor]) -> Sink:
    """A sink that fills flat tensors, one for each variant."""

    def sink(variant: int, position: int, block: Tensor) -> None:
        flat[variant][position : position + block.numel()] = block

    return sink


class Stopped(Exception):
    """Raised in a task when another one has failed or the user has interrupted the merge."""


class Progress:
    """A bar on stderr that counts bytes of the soup, from any thread."""

    def __init__(self, num_bytes: int, description: str, shown: bool) -> None:
        self._bar = tqdm(
            total=num_bytes, desc=description, unit="B", unit_scale=True, disable=not shown, dynamic_ncols=True
        )
        self._lock = Lock()
        self.stop = Event()

        self.children: SharedCounts | None = None  # while tasks run in processes

    def advance(self, num_bytes: int) -> None:
        """Count bytes, or raise Stopped."""
        if self.stop.is_set() or (self.children is not None and self.children.stopped):
            raise Stopped
        if self.children is not None:
            self.children.add(num_bytes)
        else:
            self.show(num_bytes)

    def show(self, num_bytes: int) -> None:
        """Move the bar."""
        with self._lock:
            self._bar.update(num_bytes)

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Close the bar at the end of the block."""
        with self._bar:
            yield self


def parse_num_threads(num_threads: int | None) -> int:
    """The number of threads; None is one for each core that this process may use. Raises MergeError for no number."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if type(num_threads) is not int:
        raise MergeError(f"num_threads is {num_threads!r}: it must be a whole number, or None for one for each core")
    if num_threads < 1:
        raise MergeError(f"num_threads is {num_threads}: it must be at least 1")
    return num_threads


def tensor_tasks(
    plan: TensorPlan,
    method: Method,
    open_streams: Callable[[int, int], AbstractContextManager[Streams]],
    findings: Findings,
    progress: Progress,
    device: torch.device | str = "cpu",
) -> list[Task]:
    """The tasks that make one tensor of the soup; ``open_streams`` hears which elements a task will make."""
    whole = method.survey is not None or method.whole_rows(plan.variants[0])
    step = max(plan.num_elements, 1) if whole else hashing.PIECE  # whose hash is then one task's alone

    def task(start: int) -> Any:
        stop = min(start + step, plan.num_elements)
        with open_streams(start, stop) as streams:
            for position, blocks in merged_blocks(
                plan, method, streams.readers, findings, start=start, stop=stop, device=device
            ):
                for variant, block in enumerate(blocks):
                    streams.sink(variant, position, block)
                    progress.advance(block.nbytes)
            return streams.finish()

    return [partial(task, start) for start in range(0, max(plan.num_elements, 1), step)]


def run(tasks: Sequence[Task], num_threads: int, progress: Progress) -> list[Any]:
    """Run the tasks, begun in their order, and return their results. The first exception stops all and is raised."""
    with steady_torch():
        if num_threads == 1 or len(tasks) == 1:
            return [task() for task in tasks]
        with ThreadPoolExecutor(num_threads, "soupkit") as pool:
            futures = [pool.submit(steady_torch()(task)) for task in tasks]
            try:
                failed = [f for f in wait(futures, return_when=FIRST_EXCEPTION).done if f.exception()]
                for future in sorted(failed, key=lambda future: isinstance(future.exception(), Stopped)):
                    future.result()
                return [future.result() for future in futures]
            finally:
                progress.stop.set()
                pool.shutdown(cancel_futures=True)


def run_forked(tasks: Sequence[Task], num_processes: int, progress: Progress, findings: Findings) -> list[Any]:
    """As :func:`run`, in forked processes; what they find is added up."""
    progress.children = SharedCounts(num_processes)
    try:
        with steady_torch():
            results, found = run_in_processes(tasks, num_processes, progress.children, progress.show, findings.found)
    finally:
        progress.children = None
    for part in found:
        findings.add(part)
    return results

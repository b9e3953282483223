"""Many tensors at once: a merge cut into tasks, run by threads that read, compute and write side by side.

Torch and NumPy let other threads run while they compute, and so do reads and writes, so threads are all it takes to use
the cores and to overlap disk and arithmetic. What a task computes does not depend on the thread it runs in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import Event, Lock

import torch
from torch import Tensor
from tqdm import tqdm

from soupkit.blocks import BLOCK, NonFinite, Readers, merged_blocks, steady_torch
from soupkit.errors import MergeError
from soupkit.methods import Method
from soupkit.planning import TensorPlan

# Blocks in a task, for methods that need not see a whole tensor first.
TASK_BLOCKS = 64

Task = Callable[[], None]
# sink(variant, position, block) takes the soup's elements from a position on.
Sink = Callable[[int, int, Tensor], None]


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

    def advance(self, num_bytes: int) -> None:
        """Count bytes, or raise Stopped."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._bar.update(num_bytes)

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Close the bar at the end of the block."""
        with self._bar:
            yield self


def parse_num_threads(num_threads: int | None) -> int:
    """The number of threads; None is one for each core that this process may use."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads < 1:
        raise MergeError(f"num_threads is {num_threads}: it must be at least 1")
    return num_threads


def tensor_tasks(
    plan: TensorPlan,
    method: Method,
    open_readers: Callable[[], AbstractContextManager[Readers]],
    sink: Sink,
    non_finite: NonFinite,
    progress: Progress,
    device: torch.device | str = "cpu",
    done: Callable[[], None] = lambda: None,
) -> list[Task]:
    """The tasks that make one tensor of the soup; ``done`` is called when the last of them has ended."""
    whole = method.survey is not None or method.whole_rows(plan.variants[0])
    step = max(plan.num_elements, 1) if whole else TASK_BLOCKS * BLOCK
    starts = range(0, max(plan.num_elements, 1), step)
    left, lock = len(starts), Lock()

    def task(start: int) -> None:
        nonlocal left
        stop = min(start + step, plan.num_elements)
        with open_readers() as readers:
            for position, blocks in merged_blocks(
                plan, method, readers, non_finite, start=start, stop=stop, device=device
            ):
                for variant, block in enumerate(blocks):
                    sink(variant, position, block)
                    progress.advance(block.nbytes)
        with lock:
            left -= 1
            last = left == 0
        if last:
            done()

    return [partial(task, start) for start in starts]


def run(tasks: Sequence[Task], num_threads: int, progress: Progress) -> None:
    """Run the tasks, begun in their order. The first exception stops all and is raised."""
    with steady_torch():
        if num_threads == 1 or len(tasks) == 1:
            for task in tasks:
                task()
            return
        with ThreadPoolExecutor(num_threads, "soupkit") as pool:
            futures = [pool.submit(_steadily, task) for task in tasks]
            try:
                failed = [f for f in wait(futures, return_when=FIRST_EXCEPTION).done if f.exception()]
                for future in sorted(failed, key=lambda future: isinstance(future.exception(), Stopped)):
                    future.result()
            finally:
                progress.stop.set()
                pool.shutdown(cancel_futures=True)


def _steadily(task: Task) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        task()

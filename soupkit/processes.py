"""Tasks in forked processes, for merges of folders: Python's lock makes threads wait for each other between blocks.

A child starts as a copy of this process, so that tasks need not be sent to it, with the memory, the open files and
torch's settings that the process has at that moment. What comes back through a pipe is small: the tasks' results,
counts of values that are not finite, warnings. Children end with the merge, with the first failure, and with this
process, however it ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from soupkit.errors import MergeError

POLL = 0.1  # seconds between two looks at the children's progress
PR_SET_PDEATHSIG = 1


def can_fork() -> bool:
    """Whether children may be forked: on Linux, with no other thread whose locks they would inherit, and no CUDA."""
    threads = [thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"]  # of the progress bar
    alone = threads == [threading.main_thread()] and not multiprocessing.current_process().daemon
    return sys.platform == "linux" and alone and not torch.cuda.is_initialized()


def run_in_processes(
    tasks: Sequence[Callable[[], Any]],
    num_processes: int,
    shared: SharedCounts,
    advance: Callable[[int], None],
    report: Callable[[], Any],
) -> tuple[list[Any], list[Any]]:
    """Run the tasks, begun in their order. Returns their results, and each child's ``report()`` at its end.

    ``advance`` hears of what children have counted in ``shared``. The first exception stops all and is raised; what
    children warn of, this process warns of in the end, once.
    """
    context = multiprocessing.get_context("fork")
    connections, children = [], []
    results: list[Any] = [None] * len(tasks)
    reports: list[Any] = []
    warned: dict[tuple[str, type[Warning]], None] = {}  # in the order heard, each once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking: see can_fork
            for number in range(num_processes):
                receiver, sender = context.Pipe(duplex=False)
                child = context.Process(
                    target=_child, args=(tasks, number, shared, sender, report, os.getpid()), daemon=True
                )
                child.start()
                sender.close()
                connections.append(receiver)
                children.append(child)
        shown, waiting = 0, list(connections)
        while waiting:
            for connection in wait(waiting, timeout=POLL):
                assert isinstance(connection, Connection)
                waiting.remove(connection)
                done, reported, told = _received(connection)
                for index, result in done:
                    results[index] = result
                reports.append(reported)
                warned |= dict.fromkeys(told)
            counted = shared.total()
            advance(counted - shown)
            shown = counted
    finally:
        shared.stop()
        for connection in connections:  # first, so that no child waits for its words to be read
            connection.close()
        for child in children:
            child.join()
    for text, category in warned:
        warnings.warn(text, category, stacklevel=2)
    return results, reports


class SharedCounts:
    """Numbers that a process and its children see: the next task, what each child has done, and whether to stop."""

    def __init__(self, num_processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self._next = context.Value("q", 0)
        self._counts = context.Array("q", num_processes, lock=False)
        self._stopped = context.Value("b", 0, lock=False)
        self.number = 0  # of this child

    def take(self) -> int:
        """The number of the next task."""
        with self._next.get_lock():
            self._next.value += 1
            return int(self._next.value) - 1

    def add(self, amount: int) -> None:
        """Count something that this child has done."""
        self._counts[self.number] += amount

    def total(self) -> int:
        """What all children have counted."""
        return sum(self._counts)

    def stop(self) -> None:
        """Ask the children to end."""
        self._stopped.value = 1

    @property
    def stopped(self) -> bool:
        """Whether the children are asked to end."""
        return bool(self._stopped.value)


def _child(
    tasks: Sequence[Callable[[], Any]],
    number: int,
    shared: SharedCounts,
    sender: Connection,
    report: Callable[[], Any],
    parent: int,
) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the children
    shared.number = number
    done = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            while not shared.stopped and (index := shared.take()) < len(tasks):
                done.append((index, tasks[index]()))
        told = [(str(warning.message), warning.category) for warning in caught]
        words = pickle.dumps((None, done, report(), told))
    except BaseException as error:
        # Once stopped, another child's failure, or Ctrl-C, is what the parent will raise.
        words = pickle.dumps((None, [], None, [])) if shared.stopped else _pickled(error)
        shared.stop()
    with suppress(OSError):  # the parent has given up
        sender.send_bytes(words)


def _pickled(error: BaseException) -> bytes:
    try:
        pickled = pickle.dumps((error, [], None, []))
        pickle.loads(pickled)
    except Exception:
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), [], None, []))
    return pickled


def _received(connection: Connection) -> tuple[list[tuple[int, Any]], Any, list[tuple[str, type[Warning]]]]:
    try:
        error, done, reported, told = pickle.loads(connection.recv_bytes())
    except EOFError:
        raise MergeError("a process of the merge was killed: is there enough memory? Nothing was written") from None
    if error is not None:
        raise error
    return done, reported, told

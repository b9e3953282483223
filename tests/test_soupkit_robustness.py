"""A merge that is killed, or that meets a full disk: nothing that looks finished, and nothing lost."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import soupkit.folder
from soupkit import Recipe
from soupkit.blocks import Findings
from soupkit.engine import Progress, run, run_forked
from soupkit.hashing import hash_file
from soupkit.processes import can_fork

MERGE = """
import sys
import soupkit
import soupkit.folder
soupkit.folder.WORTH_FORKING = 0
base, a, b, out = sys.argv[1:]
recipe = soupkit.Recipe("ties", [a, b], base=base, parameters={"weight": 1, "density": 0.3})
print("ready", flush=True)
soupkit.merge(recipe, out=out, overwrite=True, num_threads=2, max_shard_size="2MB", progress=False)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of 20 tensors, 8 MB each."""
    folders = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.weight": torch.randn(400, 500, generator=generator).bfloat16() for i in range(20)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "tiny"}')
        folders.append(folder)
    return folders


def hashes(folders: list[Path]) -> list[str]:
    return [hash_file(path) for folder in folders for path in sorted(folder.iterdir())]


@contextmanager
def started(script: str, models: list[Path], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is about to merge; its imports are behind it."""
    command = [sys.executable, "-c", script, *map(str, models), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child


def kill_at_random_moments(models: list[Path], tmp_path: Path, num_kills: int, seed: int) -> dict[str, int]:
    """Kill so many merges at random moments of their time, and count how they were found."""
    before = hashes(models)
    durations = []
    for whole in (tmp_path / "first", tmp_path / "second"):  # the first may be slow
        with started(MERGE, models, whole) as child:
            start = time.monotonic()
            wait_until(whole.exists)
            durations.append(time.monotonic() - start)
            assert child.wait() == 0
    expected = {path.name: hash_file(path) for path in whole.iterdir()}
    moments = random.Random(seed)
    found = {"absent": 0, "old and whole": 0, "new and whole": 0}
    for number in range(num_kills):
        out = tmp_path / f"soup{number}"
        if number % 2:  # half of them replace a soup
            soupkit.average(models[:2], out=out, progress=False)
        old = {path.name: hash_file(path) for path in out.iterdir()} if out.exists() else None
        with started(MERGE, models, out) as child:
            time.sleep(moments.uniform(0, 1.2 * min(durations)))
            child.send_signal(signal.SIGKILL)
        now = {path.name: hash_file(path) for path in out.iterdir()} if out.exists() else None
        assert now in (old, expected)
        found["new and whole" if now == expected else "absent" if now is None else "old and whole"] += 1
        assert now is None or soupkit.verify(out, progress=False).ok
        # The next merge for the same folder clears what the killed one left behind.
        soupkit.average(models[:2], out=out, overwrite=True, progress=False)
        assert not list(tmp_path.glob(f".{out.name}.*"))
    assert hashes(models) == before
    return found


def test_a_merge_killed_at_random_moments(models, tmp_path):
    assert sum(kill_at_random_moments(models, tmp_path, num_kills=2, seed=0).values()) == 2


@pytest.mark.slow
def test_a_merge_killed_at_twenty_random_moments(models, tmp_path):
    found = kill_at_random_moments(models, tmp_path, num_kills=20, seed=1)
    print(found)
    assert sum(found.values()) == 20


@pytest.mark.parametrize("room", [0, 100_000, 2_000_000])
@pytest.mark.parametrize("worth_forking", [0, 10**9])
def test_a_disk_that_fills_up(models, tmp_path, monkeypatch, room, worth_forking):
    monkeypatch.setattr("soupkit.folder.WORTH_FORKING", worth_forking)
    written = 0
    write = os.pwrite

    def write_while_there_is_room(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    before = hashes(models)
    old = soupkit.average(models[:2], out=tmp_path / "old", progress=False)
    content = hashes([old])
    monkeypatch.setattr("os.pwrite", write_while_there_is_room)
    recipe = Recipe("ties", models[1:], base=models[0], parameters={"weight": 1, "density": 0.3})
    for out in (tmp_path / "new", old):
        written = 0
        with pytest.raises(OSError, match="No space left on device"):
            soupkit.merge(recipe, out=out, overwrite=True, num_threads=2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert hashes([old]) == content
    assert hashes(models) == before


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded"), (errno.EOPNOTSUPP, None)],
)
def test_a_disk_without_room_is_noticed_before_the_first_tensor(models, tmp_path, monkeypatch, number, expected):
    def refuse(descriptor: int, *_: object) -> int:
        ctypes.set_errno(number)
        return -1

    read: list[int] = []
    tensor_tasks = soupkit.folder.tensor_tasks
    monkeypatch.setattr("soupkit.folder.tensor_tasks", lambda *rest: read.append(1) or tensor_tasks(*rest))
    monkeypatch.setattr("soupkit.publish._FALLOCATE", refuse)
    if expected is None:  # a file system that cannot reserve
        soupkit.average(models, out=tmp_path / "soup", progress=False)
        assert soupkit.verify(tmp_path / "soup", progress=False).ok
        return
    with pytest.raises(OSError, match=expected):
        soupkit.average(models, out=tmp_path / "soup", progress=False)
    assert not read
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_during_the_merge(models, tmp_path, monkeypatch):
    read = os.preadv

    def read_until_truncated(descriptor: int, buffers: list, offset: int) -> int:
        return 0 if offset > 4_000_000 else read(descriptor, buffers, offset)

    monkeypatch.setattr("os.preadv", read_until_truncated)
    with pytest.raises(soupkit.MergeError, match=r"ended early: was it changed during the merge"):
        soupkit.average(models, out=tmp_path / "soup", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_stops_all_threads_and_leaves_nothing(models, tmp_path):
    with started(SLOW_MERGE, models, tmp_path / "soup") as child:
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []


COMMAND = """
import sys
import soupkit.blocks, soupkit.folder
soupkit.blocks.BLOCK, soupkit.folder.WORTH_FORKING = 2**9, int(sys.argv[1])
from soupkit.__main__ import main
print("ready", flush=True)
sys.exit(main(["average", *sys.argv[2:-1], "--out", sys.argv[-1], "--quiet"]))
"""


@pytest.mark.parametrize("worth_forking", ["0", "1000000000"])
@pytest.mark.parametrize(("number", "code", "told"), [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, 143, b"")])
def test_a_command_that_is_stopped_leaves_nothing_and_no_traceback(models, tmp_path, number, code, told, worth_forking):
    with started(COMMAND, [Path(worth_forking), *models], tmp_path / "soup") as child:
        wait_until(lambda: any(tmp_path.iterdir()))
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert told in errors
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
SLOW_MERGE = MERGE.replace(
    "print(",
    "import time\n"
    "from dataclasses import replace\n"
    "row = soupkit.METHODS['ties']\n"
    "def slowly(blocks, **keywords):\n"
    "    time.sleep(0.2)\n"
    "    return row.function(blocks, **keywords)\n"
    "soupkit.METHODS['ties'] = replace(row, function=slowly)\nprint(",
    1,
)


@needs_proc
def test_children_end_with_a_merge_that_is_killed(models, tmp_path):
    with started(SLOW_MERGE, models, tmp_path / "soup") as child:
        wait_until(lambda: len(children_of(child.pid)) == 2)
        children = children_of(child.pid)
        child.send_signal(signal.SIGKILL)
        child.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


@needs_proc
def test_a_merge_ends_with_a_child_that_is_killed(models, tmp_path):
    with started(SLOW_MERGE, models, tmp_path / "soup") as child:
        wait_until(lambda: len(children_of(child.pid)) == 2)
        os.kill(children_of(child.pid)[0], signal.SIGKILL)
        _, errors = child.communicate(timeout=60)
    assert b"a process of the merge was killed: is there enough memory?" in errors
    assert list(tmp_path.iterdir()) == []


def test_tasks_run_under_the_same_settings_wherever_they_run():
    def bar() -> Progress:
        return Progress(0, "", shown=False)

    tasks = [lambda: (torch.get_num_threads(), torch.is_grad_enabled())] * 3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [run(tasks, 1, bar()), run(tasks, 2, bar()), run_forked(tasks, 2, bar(), Findings())]
        assert found == [[(1, False)] * 3] * 3
        assert (torch.get_num_threads(), torch.is_grad_enabled()) == (2, True)
    finally:
        torch.set_num_threads(before)


def test_what_children_warn_of_is_told_once(models, tmp_path, monkeypatch):
    row = soupkit.METHODS["linear"]

    def warning(blocks, weight, normalize):
        warnings.warn(f"a block of {len(blocks.ingredients)} models", UserWarning, stacklevel=1)
        return row.function(blocks, weight, normalize)

    monkeypatch.setitem(soupkit.METHODS, "linear", replace(row, function=warning))
    monkeypatch.setattr("soupkit.folder.WORTH_FORKING", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        soupkit.average(models[:2], out=tmp_path / "soup", num_threads=2, progress=False)
    assert [(str(warning.message), warning.category) for warning in caught] == [("a block of 2 models", UserWarning)]


def test_processes_give_the_same_soup_and_the_same_counts(models, tmp_path, monkeypatch):
    tensors = {"w": torch.randn(300, 2000), "v": torch.ones(5)}
    tensors["w"][7, 7], tensors["v"][0] = torch.nan, torch.inf
    (tmp_path / "odd").mkdir()
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    shutil.copytree(tmp_path / "odd", tmp_path / "odder")
    odd = [tmp_path / "odd", tmp_path / "odder"]
    assert can_fork()
    ties = Recipe("ties", models[1:], base=models[0], parameters={"weight": 1, "density": 0.3})
    records: list[dict] = []
    fallbacks: list[dict] = []
    for name, worth_forking in (("forked", 0), ("threads", 10**9)):
        monkeypatch.setattr("soupkit.folder.WORTH_FORKING", worth_forking)
        soupkit.merge(ties, out=tmp_path / name, num_threads=2, progress=False)
        with pytest.raises(soupkit.MergeError, match=r"tensor '[wv]' of .*/odd(der)? holds NaN or infinite values"):
            soupkit.average(odd, out=tmp_path / "refused", num_threads=2, progress=False)
        with pytest.warns(UserWarning, match="2 NaN or infinite values, in 'v', 'w'"):
            soupkit.average(odd, out=tmp_path / f"{name}2", num_threads=2, progress=False, allow_nonfinite=True)
        records.append(json.loads((tmp_path / f"{name}2" / "soup.json").read_text())["non_finite"])
        soupkit.interpolate(*models[:2], 0.5, method="slerp", out=tmp_path / f"{name}3", num_threads=2, progress=False)
        fallbacks.append(json.loads((tmp_path / f"{name}3" / "soup.json").read_text())["fallback"])
    assert hashes([tmp_path / "forked"]) == hashes([tmp_path / "threads"])
    assert records[0] == records[1]
    assert fallbacks[0] == fallbacks[1]
    assert (fallbacks[0]["tensors"], fallbacks[0]["of"]) == (0, 20)
    assert not (tmp_path / "refused").exists()

"""A merge that is killed, or that meets a full disk: nothing that looks finished, and nothing lost."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import soupkit
from soupkit import Recipe
from soupkit.hashing import hash_file

MERGE = """
import sys
import soupkit
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
    whole = tmp_path / "whole"
    with started(MERGE, models, whole) as child:
        start = time.monotonic()
        assert child.wait() == 0
        duration = time.monotonic() - start
    expected = {path.name: hash_file(path) for path in whole.iterdir()}
    moments = random.Random(seed)
    found = {"absent": 0, "old and whole": 0, "new and whole": 0}
    for number in range(num_kills):
        out = tmp_path / f"soup{number}"
        if number % 2:  # half of them replace a soup
            soupkit.average(models[:2], out=out, progress=False)
        old = {path.name: hash_file(path) for path in out.iterdir()} if out.exists() else None
        with started(MERGE, models, out) as child:
            time.sleep(moments.uniform(0, duration))
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


@pytest.mark.parametrize("room", [0, 100_000, 5_000_000, 8_000_000])
def test_a_disk_that_fills_up(models, tmp_path, monkeypatch, room):
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


def test_a_file_that_shrinks_during_the_merge(models, tmp_path, monkeypatch):
    read = os.preadv

    def read_until_truncated(descriptor: int, buffers: list, offset: int) -> int:
        return 0 if offset > 4_000_000 else read(descriptor, buffers, offset)

    monkeypatch.setattr("os.preadv", read_until_truncated)
    with pytest.raises(soupkit.MergeError, match=r"ended early: was it changed during the merge"):
        soupkit.average(models, out=tmp_path / "soup", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_stops_all_threads_and_leaves_nothing(models, tmp_path):
    script = MERGE.replace("import soupkit\n", "import soupkit, time\n", 1).replace(
        "print(",
        "from dataclasses import replace\n"
        "row = soupkit.METHODS['ties']\n"
        "def slowly(blocks, **keywords):\n"
        "    time.sleep(0.05)\n"
        "    return row.function(blocks, **keywords)\n"
        "soupkit.METHODS['ties'] = replace(row, function=slowly)\nprint(",
        1,
    )
    with started(script, models, tmp_path / "soup") as child:
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []

"""Hashes of files: the definition, and that a merge comes to the same without reading files twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import xxh3_tree
from safetensors.torch import save_file

import soupkit.folder
from soupkit import MergeError, Recipe, hashing
from soupkit.hashing import Piece, TensorHasher, check_algorithm, hash_file
from soupkit.processes import can_fork

PIECE = 1000


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE", PIECE)


def save(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, *, rows: int = 70) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide": (rows, 50), "norm": (50,), "empty": (0, 3), "exact": (2 * PIECE,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["ids"] = torch.arange(7)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def recorded(folder: Path) -> tuple[list[str], str]:
    """The hashes of the models' weights and of the soup's in soup.json."""
    record = json.loads((folder / "soup.json").read_text())
    of_models = [entry["files"]["model.safetensors"]["xxh3_tree"] for entry in record["ingredients"]]
    return of_models, record["files"]["model.safetensors"]["xxh3_tree"]


def test_the_hash_of_a_file_is_that_of_its_pieces(tmp_path, small_pieces):
    weights = save(tmp_path / "m", 0) / "model.safetensors"
    assert hash_file(weights) == xxh3_tree(weights, PIECE)
    assert hash_file(weights) != xxh3_tree(weights, PIECE - 1)
    done: list[int] = []
    hash_file(weights, advance=done.append)
    assert sum(done) == weights.stat().st_size


@pytest.mark.parametrize("content", [b"", b"abc", (2**63).to_bytes(8, "little") + b"{}"])
def test_what_is_no_checkpoint_is_one_piece(tmp_path, content):
    for name in ("tokenizer.json", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        assert hash_file(path) == xxh3_tree(path.rename(tmp_path / "x.json"))


def test_unknown_algorithms_are_refused():
    with pytest.raises(MergeError, match="unknown hash 'md5': choose one of xxh3_tree, sha256"):
        check_algorithm("md5")


@pytest.mark.parametrize("sizes", [[2500], [1, 999, 1500], [700] * 3 + [400], [2000, 0, 500]])
def test_elements_in_order_give_the_digests_of_pieces(tmp_path, small_pieces, sizes):
    values = torch.randn(2500)
    hasher = TensorHasher(tmp_path, 64, 0, 2500)
    position = 0
    for size in sizes:
        hasher.feed(position, values[position : position + size])
        hasher.feed(0, values[:10])  # read again, as after a survey
        position += size
    digest = {Piece(tmp_path, 64 + 4 * begin): values[begin : begin + PIECE] for begin in (0, 1000, 2000)}
    expected = {piece: hashing.new_digest() for piece in digest}
    for piece, part in digest.items():
        expected[piece].update(part.numpy().tobytes())
    assert hasher.digests == {piece: found.digest() for piece, found in expected.items()}


def test_a_piece_with_a_gap_has_no_digest(tmp_path, small_pieces):
    values = torch.randn(2500)
    hasher = TensorHasher(tmp_path, 0, 1000, 2500)  # a task that begins at the second piece
    hasher.feed(1000, values[1000:2000])
    hasher.feed(2100, values[2100:])
    assert list(hasher.digests) == [Piece(tmp_path, 4000)]


RECIPES = {
    "linear": {},
    "ties": {"weight": 1, "density": 0.3},
    "della": {"weight": 1, "density": 0.5},
    "model_stock": {},
}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("forked", [True, False])
def test_a_merge_records_the_hashes_of_what_it_read_and_wrote(tmp_path, monkeypatch, small_pieces, method, forked):
    monkeypatch.setattr("soupkit.blocks.BLOCK", PIECE // 4)
    monkeypatch.setattr("soupkit.folder.WORTH_FORKING", 0 if forked else 10**9)
    monkeypatch.setattr("soupkit.order_statistics.SAMPLE", 64)
    run_forked, taken = soupkit.folder.run_forked, []
    monkeypatch.setattr("soupkit.folder.run_forked", lambda *rest: taken.append(1) or run_forked(*rest))
    folders = [save(tmp_path / f"m{seed}", seed) for seed in range(3)]
    base = None if method == "linear" else folders[0]
    read: Counter[Path] = Counter()
    again = hashing._digest_of_range

    def counted(path, start, stop, *rest):
        read[path] += stop - start
        return again(path, start, stop, *rest)

    monkeypatch.setattr(hashing, "_digest_of_range", counted)
    models = folders if base is None else folders[1:]
    out = soupkit.merge(
        Recipe(method, models, base=base, parameters=RECIPES[method]),
        out=tmp_path / "soup",
        num_threads=2,
        progress=False,
    )
    assert bool(taken) == (forked and can_fork())
    of_models, of_soup = recorded(out)
    ordered = [*models, *([] if base is None else [base])]
    assert of_models == [xxh3_tree(folder / "model.safetensors", PIECE) for folder in ordered]
    assert of_soup == xxh3_tree(out / "model.safetensors", PIECE)
    # Only headers and the 7 integers, which are read from the first model alone.
    weights = folders[1] / "model.safetensors"
    assert 0 < read[weights] < weights.stat().st_size - 2 * (70 * 50 + 2 * PIECE)
    assert soupkit.verify(out, ingredients=True, progress=False).ok


def test_a_tensor_of_more_than_one_real_piece(tmp_path):
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / f"m{seed}")
        folders[-1].mkdir()
        values = torch.full((2**24 + 1000,), float(seed), dtype=torch.bfloat16)
        save_file({"w": values}, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text("{}")
    out = soupkit.average(folders, out=tmp_path / "soup", progress=False)
    assert recorded(out) == (
        [xxh3_tree(folder / "model.safetensors") for folder in folders],
        xxh3_tree(out / "model.safetensors"),
    )


def test_models_of_other_dtypes_and_the_same_model_twice(tmp_path, small_pieces):
    folders = [save(tmp_path / "a", 0, torch.float32), save(tmp_path / "b", 1)]
    folders.append(folders[0])
    with pytest.warns(UserWarning, match="a is given twice: each counts as a model of its own"):
        out = soupkit.average(folders, out=tmp_path / "soup", dtype="float16", progress=False)
    of_models, of_soup = recorded(out)
    assert of_models == [xxh3_tree(folder / "model.safetensors", PIECE) for folder in folders]
    assert of_soup == xxh3_tree(out / "model.safetensors", PIECE)

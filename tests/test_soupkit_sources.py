"""Checkpoints as users have them: every kind of source gives the right values, and hostile files one line each."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from math import prod, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WORDS, llama_config, make_llama, make_tokenizer, run_python
from safetensors.torch import load, load_file, save, save_file
from tokenizers import Tokenizer

import soupkit
from soupkit import Recipe
from soupkit.adapters import merge_adapters
from soupkit.checkpoint import (
    Checkpoint,
    companion_files,
    copy_companions,
    folders_of,
    open_checkpoint,
    require_plain_weights,
    require_same_config,
    require_same_tokenizer,
)
from soupkit.errors import MergeError
from soupkit.heads import harmonise_fishers, harmonise_heads
from soupkit.safetensors_format import DTYPES, read_header
from soupkit.sources import TensorSource, load_tensor, merge_dtype
from soupkit.vocabulary import unify_vocabularies

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A file that keeps its reader waiting fails its test."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def values(source: TensorSource, block: int = 7) -> torch.Tensor:
    """All of a tensor, through its reader, in blocks that cut rows in two."""
    num = prod(source.shape)
    with source.open() as read:
        blocks = [read(start, min(start + block, num)).clone() for start in range(0, num, block)]
    return (torch.cat(blocks) if blocks else torch.empty(0)).view(source.shape)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refuses(folder: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(MergeError, match=message) as caught:
        open_checkpoint(folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# ---- readers


def test_a_reader_gives_any_range_of_any_dtype(tmp_path):
    state = {name: random_tensor(1, 6, 5).mul(9).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    state |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}
    tensors = open_checkpoint(write(tmp_path / "m", state)).tensors
    assert tensors.keys() == state.keys()
    for name, expected in state.items():
        assert tensors[name].dtype == expected.dtype
        assert tensors[name].shape == expected.shape
        assert_same_bits(values(tensors[name]), expected)
    with tensors["F32"].open() as read:
        flat = state["F32"].view(-1)
        for start, stop in ((3, 11), (0, 30), (29, 30), (5, 5), (0, 2)):
            assert torch.equal(read(start, stop), flat[start:stop])
        assert read(0, 20).data_ptr() == read(4, 9).data_ptr()  # one buffer, reused


def test_threads_read_one_source_at_the_same_time(tmp_path):
    expected = random_tensor(2, 500_000)
    source = open_checkpoint(write(tmp_path / "m", {"w": expected})).tensors["w"]

    def check(seed: int) -> bool:
        generator = random.Random(seed)
        with source.open() as read:
            for _ in range(100):
                start, stop = sorted(generator.sample(range(len(expected)), 2))
                if not torch.equal(read(start, stop), expected[start:stop]):
                    return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(16)))


def test_few_files_are_open_at_a_time(tmp_path):
    """Eight models in 40 shards each, under a limit that the soup's own 40 and one of each model hardly stay below."""
    names = [f"model-{number:05}-of-00040.safetensors" for number in range(1, 41)]
    placed = {f"w{number:02}": name for number, name in enumerate(names)}
    for model in range(8):
        folder = tmp_path / f"m{model}"
        folder.mkdir()
        for tensor, name in placed.items():
            save_file({tensor: torch.full((2,), float(model))}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    script = """
import resource, sys, soupkit
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
soupkit.average([f"{sys.argv[1]}/m{i}" for i in range(8)], out=f"{sys.argv[1]}/soup", num_threads=1, progress=False)
"""
    result = run_python(["-c", script, str(tmp_path)])
    assert result.returncode == 0, result.stderr
    soup = open_checkpoint(tmp_path / "soup")
    assert len(soup.files) == 40
    assert all(values(tensor).tolist() == [3.5, 3.5] for tensor in soup.tensors.values())


def test_a_file_that_shrinks_during_the_merge(tmp_path):
    folder = write(tmp_path / "m", {"w": torch.ones(100)})
    source = open_checkpoint(folder).tensors["w"]
    with source.open() as read:
        os.truncate(folder / "model.safetensors", 300)
        with pytest.raises(MergeError, match=r"model.safetensors ended early: was it changed during the merge\?"):
            read(0, 100)


# ---- hostile safetensors


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "too large": (file_of({"w": entry((3,))}), r"bytes 0 to 8 do not hold a tensor \[3\] of F32"),
    "beyond the end": (file_of({"w": entry((4,), (0, 16))}), "its tensors end at byte"),
    "bytes left over": (file_of({"w": entry((1,), (0, 4))}), "its tensors end at byte"),
    "overlap": (file_of({"a": entry((1,), (0, 4)), "b": entry((2,), (0, 8))}), "'b' at bytes 0 to 8 overlaps"),
    "overlap inside": (file_of({"a": entry(), "b": entry((1,), (2, 6))}), "'b' at bytes 2 to 6 overlaps"),
    "hole": (file_of({"a": entry((1,), (4, 8))}), "'a' at bytes 4 to 8 leaves a hole before it"),
    "negative offset": (file_of({"w": entry((2,), (-8, 0))}), r"'w' has the data_offsets \[-8, 0\]"),
    "backwards": (file_of({"w": entry((2,), (8, 0))}), "bytes 8 to 0 do not hold"),
    "huge offset": (file_of({"w": entry((2,), (2**70, 2**70 + 8))}), "'w' has the data_offsets"),
    "negative shape": (file_of({"w": entry((-1, -2))}), r"'w' has the shape \[-1, -2\]"),
    "huge shape": (file_of({"w": entry((2**62, 2**62, 0), (0, 0))}, b""), "'w' has the shape"),
    "many dimensions": (file_of({"w": entry([1] * 65, (0, 4))}, bytes(4)), "'w' has the shape"),
    "bool shape": (file_of({"w": entry((True, 2))}), r"'w' has the shape \[True, 2\]"),
    "float shape": (file_of({"w": entry((2.0,))}), r"'w' has the shape \[2.0\]"),
    "text shape": (file_of({"w": entry("2")}), "'w' has the shape '2'"),
    "one offset": (file_of({"w": entry((2,), (8,))}), r"'w' has the data_offsets \[8\]"),
    "no dtype": (file_of({"w": {"shape": [2], "data_offsets": [0, 8]}}), "'w' lacks a dtype"),
    "no object": (file_of({"w": 3}), "'w' lacks a dtype"),
    "a list": (file_of([1, 2]), "its header is no JSON object"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "can't decode"),
    "half a surrogate": (file_of(b'{"\\ud800": {"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'), "surrogates"),
    "twice": (file_of(b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2)), "'w' is in the header twice"),
    "nested deeply": (file_of(b"[" * 100_000 + b"]" * 100_000), "recursion"),
    "a number of a million digits": (file_of(b'{"w": %s}' % (b"9" * 10**6)), "digits"),
    "header beyond the file": ((2**40).to_bytes(8, "little") + b"{}", "header of 1099511627776 bytes in a file of 10"),
    "header of length 0": (bytes(8), "header of 0 bytes"),
}


def library_reads(content: bytes) -> bool:
    """Whether the safetensors library takes the file."""
    try:
        load(content)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", DAMAGED)
def test_a_header_that_breaks_the_format(tmp_path, name):
    content, message = DAMAGED[name]
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    refuses(folder, rf"model.safetensors is damaged \(.*{message}.*\): download or save the checkpoint again")
    assert not library_reads(content) or name in ("twice", "many dimensions")  # where it is more lenient


def test_a_header_of_a_hundred_megabytes_is_not_read(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a sparse file
    start = time.perf_counter()
    refuses(folder, "header of 100000001 bytes in a file of 200000000")
    assert time.perf_counter() - start < 1


def test_what_the_library_refuses_is_refused_and_what_is_read_is_the_same(tmp_path):
    state = {"a": random_tensor(0, 2, 3), "b": torch.empty(0), "c": random_tensor(1, 4).half(), "d": torch.tensor(True)}
    content = save(state)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    generator = random.Random(0)
    num_accepted = num_refused = 0
    for _ in range(400):
        mutated = json.loads(json.dumps(header))
        for _ in range(generator.choice((1, 1, 2))):
            name = generator.choice(sorted(state))
            field = generator.choice(("dtype", "shape", "data_offsets", "data_offsets"))
            if field == "dtype":
                mutated[name][field] = generator.choice(("F32", "I32", "F16", "BF16", "U8", "BOOL"))
            elif field == "shape":
                mutated[name][field] = [
                    generator.choice((0, 1, 2, 3, 4, 6)) for _ in range(generator.choice((0, 1, 2)))
                ]
            else:
                mutated[name][field][generator.choice((0, 1))] += generator.choice((-8, -4, -1, 0, 4, 8))
        path = tmp_path / "m.safetensors"
        path.write_bytes(file_of(mutated, data))
        if library_reads(path.read_bytes()):
            num_accepted += 1
            expected = load_file(path)
            for name, tensor in read_header(path).items():
                assert tensor.shape == expected[name].shape
                assert_same_bits(values(tensor), expected[name])
        else:
            num_refused += 1
            with pytest.raises(MergeError, match="is damaged"):
                read_header(path)
    assert num_accepted > 20
    assert num_refused > 100


def test_a_dtype_that_is_not_read(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(file_of({"w": entry((4, 4), (0, 8), "F4")}))
    refuses(folder, "tensor 'w' has dtype 'F4', which is not read here: convert the checkpoint to bfloat16 first")


def sharded(folder: Path, weight_map: object, *, files: tuple[str, ...] = ("s1.safetensors",)) -> Path:
    folder.mkdir(parents=True)
    for index, file in enumerate(files):
        save_file({f"w{index}": torch.ones(2)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_that_lies(tmp_path):
    save_file({"w0": torch.ones(2)}, tmp_path / "outside.safetensors")
    files = (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "sub/x",
        "..",
        "",
        "a\\b",
        3,
        None,
        "a\0b",
    )
    for number, file in enumerate(files):
        refuses(sharded(tmp_path / f"m{number}", {"w0": file}), r"places 'w0' in .*, which is no file name: put all")
    refuses(sharded(tmp_path / "absent", {"w0": "s2.safetensors"}), "s2.safetensors is missing, though its index names")
    refuses(sharded(tmp_path / "more", {"w0": "s1.safetensors", "x": "s1.safetensors"}), "'x' is not in both the index")
    two = ("s1.safetensors", "s2.safetensors")
    swapped = sharded(tmp_path / "swapped", {"w0": two[1], "w1": two[0]}, files=two)
    refuses(swapped, "'w0' is not in both the index and the shards")
    double = sharded(tmp_path / "double", {"w0": two[0], "w1": two[1]}, files=two)
    save_file({"w0": torch.zeros(2), "w1": torch.ones(2)}, double / two[1])
    refuses(double, "'w0' is in two shards")


def test_links_out_of_the_folder(tmp_path):
    outside = write(tmp_path / "outside", {"w": torch.ones(2)})
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(outside / "model.safetensors")
    refuses(linked, r"linked/model.safetensors is a link out of its folder, to .*outside.*: put the file itself there")
    inside = write(tmp_path / "inside", {"w": torch.ones(2)})
    (inside / "model.safetensors").rename(inside / "real")
    (inside / "model.safetensors").symlink_to("real")
    assert open_checkpoint(inside).tensors.keys() == {"w"}
    (tmp_path / "folder_link").symlink_to(inside)
    assert open_checkpoint(tmp_path / "folder_link").tensors.keys() == {"w"}


def test_companions_are_what_from_pretrained_needs(tmp_path):
    folder = write(tmp_path / "m", {"w": torch.ones(2)}, {})
    for name in (
        "tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "modeling_x.py", "generation_config.json",
        "model.safetensors.index.json", "trainer_state.json", "soup.json", "optimizer.bin", "README.md", ".hidden.json",
    ):  # fmt: skip
        (folder / name).write_text("{}")
    for name in ("additional_chat_templates/tool.jinja", "additional_chat_templates/notes.txt", "logs/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "folder.json").mkdir()
    expected = ["additional_chat_templates/tool.jinja", "chat_template.jinja", "generation_config.json"]
    expected += ["modeling_x.py", "spiece.model", "tokenizer.json", "vocab.txt"]
    assert sorted(map(str, companion_files(folder))) == expected
    (tmp_path / "soup").mkdir()
    copy_companions(folder, tmp_path / "soup", leave_out=["vocab.txt"])
    copied = {str(path.relative_to(tmp_path / "soup")) for path in (tmp_path / "soup").rglob("*") if path.is_file()}
    assert copied == {*expected} - {"vocab.txt"}
    assert (tmp_path / "soup" / expected[0]).read_text() == expected[0]


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "modeling_x.py", "additional_chat_templates", "additional_chat_templates/a.jinja"],
)
def test_companions_that_are_links_out_of_the_folder(tmp_path, name):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.jinja").write_text("a secret")
    folder = write(tmp_path / "m", {"w": torch.ones(2)})
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "private" / ("" if name == "additional_chat_templates" else "a.jinja"))
    with pytest.raises(
        MergeError, match=r"m/.* is a link out of its folder, to .*private.*: put the file itself there"
    ):
        companion_files(folder)
    (folder / name).unlink()
    (folder / "own").write_text("text")
    (folder / "chat_template.jinja").symlink_to("own")
    assert companion_files(folder) == [Path("chat_template.jinja")]


def test_configs_and_tokenizers_that_are_links_out_of_the_folder(tmp_path):
    names = ("config.json", "tokenizer.json", "generation_config.json")
    folders = [vocabulary_checkpoint(tmp_path / name, ["a", "b"], 2, 1) for name in ("one", "two", "three")]
    (tmp_path / "private.json").write_text((folders[0] / "tokenizer.json").read_text())
    for folder, name in zip(folders, names, strict=True):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "private.json")
    refuses(folders[0], "one/config.json is a link out of its folder")
    for folder, name in zip(folders[1:], ("two/tokenizer.json", "three/generation_config.json"), strict=True):
        with pytest.raises(MergeError, match=f"{name} is a link out of its folder"):
            unify_vocabularies([open_checkpoint(folder)])


def test_the_hub_cache_links_into_its_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file({"w": torch.ones(2)}, repository / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert torch.equal(values(open_checkpoint(snapshot).tensors["w"]), torch.ones(2))
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool.jinja").symlink_to("../../../blobs/abc")
    assert companion_files(snapshot) == [Path("additional_chat_templates/tool.jinja")]
    (tmp_path / "other" / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").rename(tmp_path / "other" / "blobs" / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "other" / "blobs" / "abc")
    refuses(snapshot, "is a link out of its folder")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_pipes_and_folders_in_place_of_files(tmp_path, file):
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        folder = write(tmp_path / f"m{number}", {"w": torch.ones(2)}, {})
        if "index" in file:
            (folder / "model.safetensors").unlink()
        (folder / file).unlink(missing_ok=True)
        make(folder / file)
        refuses(folder, f"{file} is no regular file")


def test_a_config_of_a_gigabyte_is_not_read(tmp_path):
    folder = write(tmp_path / "m", {"w": torch.ones(2)}, {})
    os.truncate(folder / "config.json", 10**9)  # sparse
    start = time.perf_counter()
    refuses(folder, "config.json has 1000000000 bytes, too many for a text file of a checkpoint")
    assert time.perf_counter() - start < 1


# ---- pickles


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self.marker}",)


def pickled(folder: Path, content: object, config: dict[str, Any] | None = None, *, zipped: bool = True) -> Path:
    folder.mkdir(parents=True)
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read_when_allowed(tmp_path, zipped):
    state = {"a": random_tensor(1, 9, 4), "t": random_tensor(2, 4, 3).T, "h": random_tensor(3, 5).bfloat16()}
    state |= {"ids": torch.arange(4), "view": random_tensor(4, 10)[3:7]}
    state["p"] = torch.nn.Parameter(random_tensor(5, 2))
    folder = pickled(tmp_path / "m", state, {"model_type": "x"}, zipped=zipped)
    refuses(folder, r"holds pickled weights \(pytorch_model.bin\), which can run code when loaded: .*--allow-pickle")
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    assert checkpoint.files == (folder / "pytorch_model.bin",)
    assert checkpoint.tensors.keys() == state.keys()
    before = (folder / "pytorch_model.bin").read_bytes()
    for name, expected in state.items():
        assert torch.equal(values(checkpoint.tensors[name]), expected)
        with checkpoint.tensors[name].open() as read:
            read(0, 1).zero_()
        assert torch.equal(values(checkpoint.tensors[name]), expected)
    assert (folder / "pytorch_model.bin").read_bytes() == before


def test_shards_of_pickles_and_safetensors_first(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(2)}, folder / "pytorch_model-2.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuses(folder, "holds pickled weights")
    tensors = open_checkpoint(folder, allow_pickle=True).tensors
    assert torch.equal(values(tensors["b"]), torch.zeros(2))
    save_file({"a": torch.full((2,), 5.0)}, folder / "model.safetensors")
    assert torch.equal(values(open_checkpoint(folder, allow_pickle=True).tensors["a"]), torch.full((2,), 5.0))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_runs_nothing(tmp_path, zipped):
    marker = tmp_path / "ran"
    folder = pickled(tmp_path / "m", {"w": torch.ones(2), "x": Bomb(marker)}, zipped=zipped)
    refuses(folder, "holds pickled weights")
    refuses(folder, r"m/pytorch_model.bin holds more than weights.*it calls \w+.system.*nothing", allow_pickle=True)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    refuses(plain, "holds more than weights, or is damaged", allow_pickle=True)
    assert not marker.exists()
    with (plain / "pytorch_model.bin").open("rb") as file:
        pickle.load(file)  # the bomb does go off where it is let to
    assert marker.exists()


def test_pickles_that_are_no_plain_state_dict(tmp_path):
    contents = {
        "holds a list, no state dict": [torch.ones(2)],
        "entry 'step' is a int, no tensor": {"w": torch.ones(2), "step": 3},
        "entry 3 is a Tensor, no tensor": {3: torch.ones(2)},
        "'w' is a sparse": {"w": torch.eye(3).to_sparse()},
        "'w' has 4000000000000 elements, more than are stored": {"w": torch.ones(1).expand(2_000_000, 2_000_000)},
        "holds more than weights, or is damaged": torch.nn.Linear(2, 2),
    }
    for number, (message, content) in enumerate(contents.items()):
        refuses(pickled(tmp_path / f"m{number}", content), message, allow_pickle=True)
    folder = pickled(tmp_path / "cut", {"w": torch.ones(1000)})
    os.truncate(folder / "pytorch_model.bin", 2000)
    refuses(folder, "is damaged", allow_pickle=True)
    (folder / "pytorch_model.bin").unlink()
    os.mkfifo(folder / "pytorch_model.bin")
    refuses(folder, "is no regular file", allow_pickle=True)


def test_a_head_that_shares_its_memory_with_the_embeddings(tmp_path):
    weight, other = random_tensor(1, 6, 3), random_tensor(2, 4)
    tied = {EMBED: weight, HEAD: weight, "a": other, "b": other}
    for ties, expected in ((True, {EMBED, "a", "b"}), (None, {EMBED, "a", "b"}), (False, {EMBED, HEAD, "a", "b"})):
        config = {"model_type": "x"} | ({} if ties is None else {"tie_word_embeddings": ties})
        checkpoint = open_checkpoint(pickled(tmp_path / str(ties), tied, config), allow_pickle=True)
        assert checkpoint.tensors.keys() == expected
        assert checkpoint.config["tie_word_embeddings"] is (ties is not False)
    apart = tied | {HEAD: weight.clone()}
    folder = pickled(tmp_path / "apart", apart, {"tie_word_embeddings": True})
    assert HEAD in open_checkpoint(folder, allow_pickle=True).tensors


# ---- heads


def head_checkpoint(folder: Path, seed: int, ties: bool | None, head: str) -> Path:
    """``head``: "none", "same" as the embeddings, or "own"."""
    state = {EMBED: random_tensor(seed, 6, 3), "w": random_tensor(seed + 50, 2)}
    if head != "none":
        state[HEAD] = state[EMBED].clone() if head == "same" else random_tensor(seed + 100, 6, 3)
    return write(folder, state, {"model_type": "x"} | ({} if ties is None else {"tie_word_embeddings": ties}))


# Kinds of ingredients, and whether their soup stores a head; None: left as they are.
MIXTURES = [
    ([(True, "none"), (True, "none")], None),
    ([(None, "none"), (True, "none")], None),
    ([(False, "own"), (False, "own")], None),
    ([(False, "own"), (False, "same")], None),
    ([(False, "same"), (False, "same")], None),
    ([(True, "same"), (True, "none")], False),
    ([(True, "same"), (True, "same")], False),
    ([(None, "same"), (None, "same")], False),
    ([(None, "same"), (None, "none")], False),
    ([(False, "same"), (True, "none")], False),
    ([(False, "same"), (True, "same")], False),
    ([(False, "own"), (True, "none")], True),
    ([(False, "own"), (None, "none"), (True, "same")], True),
    ([(None, "own"), (None, "own")], True),
    ([(None, "own"), (True, "none"), (False, "same")], True),
]


@pytest.mark.parametrize(("kinds", "stored"), MIXTURES)
def test_heads_of_any_mixture_in_any_order(tmp_path, kinds, stored):
    folders = [head_checkpoint(tmp_path / str(i), i, *kind) for i, kind in enumerate(kinds)]
    for order in permutations(range(len(kinds))):
        opened = [open_checkpoint(folders[i]) for i in order]
        harmonised = harmonise_heads(opened)
        if stored is None:
            assert harmonised == opened
            continue
        for i, checkpoint, before in zip(order, harmonised, opened, strict=True):
            assert checkpoint.config == before.config | {"tie_word_embeddings": not stored}
            assert checkpoint.tensors.keys() == {EMBED, "w"} | ({HEAD} if stored else set())
            if stored:  # the head that this checkpoint alone has once loaded
                saved = load_file(folders[i] / "model.safetensors")
                assert torch.equal(values(checkpoint.tensors[HEAD]), saved.get(HEAD, saved[EMBED]))
        for other in harmonised[1:]:
            require_same_config(harmonised[0], other)


def test_heads_mean_what_transformers_makes_of_them(tmp_path):
    from transformers import AutoModelForCausalLM

    weight = random_tensor(1, len(WORDS), 16)
    for number, (ties, head) in enumerate([(True, "none"), (True, "same"), (True, "own"), (False, "own")]):
        state = make_llama(1).state_dict() | {EMBED: weight}
        state.pop(HEAD)
        if head != "none":
            state[HEAD] = weight.clone() if head == "same" else weight + 1
        folder = write(tmp_path / str(number), state)
        llama_config(tie_word_embeddings=ties).save_pretrained(folder)
        untied = write(tmp_path / f"untied{number}", state | {HEAD: weight - 1})
        llama_config(tie_word_embeddings=False).save_pretrained(untied)
        opened = [open_checkpoint(folder), open_checkpoint(untied)]
        if (ties, head) == (True, "own"):
            with pytest.warns(
                UserWarning, match=r"0?2 ties 'lm_head.weight' in config.json and stores another one: the"
            ):
                (ours, _) = harmonise_heads(opened)
        else:
            (ours, _) = harmonise_heads(opened)
        loaded = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
        assert torch.equal(values(ours.tensors[HEAD], 50), loaded)


def test_a_head_that_is_missing_is_not_taken_for_a_tied_one(tmp_path):
    opened = [open_checkpoint(head_checkpoint(tmp_path / name, 1, False, name)) for name in ("own", "none")]
    with pytest.raises(
        MergeError, match=r"none lacks 'lm_head.weight', and its config.json does not tie it to 'model.em"
    ):
        harmonise_heads(opened)


def test_one_element_makes_a_head_another(tmp_path, monkeypatch):
    monkeypatch.setattr("soupkit.heads.CHUNK", 7)
    for position in (0, 6, 7, 13, 17):
        state = {EMBED: random_tensor(1, 6, 3), HEAD: random_tensor(1, 6, 3)}
        state[HEAD].view(-1)[position] += 1
        opened = [open_checkpoint(write(tmp_path / str(position), state, {"model_type": "x"}))]
        assert harmonise_heads(opened)[0].tensors.keys() == {EMBED, HEAD}


def test_heads_with_nothing_to_be_tied_to_are_left_alone(tmp_path):
    state = {"transformer.wte.weight": torch.ones(6, 3), "wpe.weight": torch.ones(5, 2), HEAD: torch.ones(5, 2)}
    opened = [open_checkpoint(write(tmp_path / "a", state, {"tie_word_embeddings": True}))]
    assert harmonise_heads(opened) == opened


def test_ties_of_the_text_part_of_a_config(tmp_path):
    text = {"text_config": {"tie_word_embeddings": True, "vocab_size": 6}}
    first = head_checkpoint(tmp_path / "a", 1, None, "none")
    second = head_checkpoint(tmp_path / "b", 2, False, "own")
    (first / "config.json").write_text(json.dumps(text))
    harmonised = harmonise_heads([open_checkpoint(first), open_checkpoint(second)])
    assert harmonised[0].config == {
        "text_config": {"tie_word_embeddings": False, "vocab_size": 6},
        "tie_word_embeddings": False,
    }


def fisher_estimate(folder: Path, *, head: bool) -> Checkpoint:
    """F of the embeddings 0, 1, 2, ..., of w 7 and, where there is one, of the head 100, 101, ..."""
    information = {EMBED: torch.arange(18.0).view(6, 3), "w": torch.full((2,), 7.0)}
    return open_checkpoint(write(folder, information | ({HEAD: 100 + information[EMBED]} if head else {})))


PLAIN, OF_HEAD = [0.0, 1.0, 2.0], [100.0, 101.0, 102.0]


@pytest.mark.parametrize(
    ("kinds", "expected"),  # per model: F of the embeddings and of the head, the first three values
    [
        ([(True, "none"), (False, "own")], [(PLAIN, PLAIN), (PLAIN, OF_HEAD)]),  # lent
        ([(False, "same"), (True, "none")], [([100.0, 102.0, 104.0], None), (PLAIN, None)]),  # added up
        ([(True, "none"), (True, "none")], [(PLAIN, None), (PLAIN, None)]),
        ([(False, "own"), (False, "own")], [(PLAIN, OF_HEAD), (PLAIN, OF_HEAD)]),
    ],
)
def test_fisher_estimates_follow_the_heads(tmp_path, kinds, expected):
    models = [open_checkpoint(head_checkpoint(tmp_path / str(n), n, *kind)) for n, kind in enumerate(kinds)]
    fishers = [fisher_estimate(tmp_path / f"f{n}", head=HEAD in model.tensors) for n, model in enumerate(models)]
    harmonised = harmonise_heads(models)
    for model, fisher, (of_embeddings, of_head) in zip(
        harmonised, harmonise_fishers(fishers, harmonised), expected, strict=True
    ):
        assert (HEAD in model.tensors) == (HEAD in fisher.tensors) == (of_head is not None)
        assert values(fisher.tensors[EMBED]).view(-1)[:3].tolist() == of_embeddings
        if of_head:
            assert values(fisher.tensors[HEAD]).view(-1)[:3].tolist() == of_head
        assert values(fisher.tensors["w"]).tolist() == [7, 7]
    assert harmonise_fishers([], harmonised) == []


def test_fisher_estimates_of_tied_again_heads_are_added_in_a_wider_dtype(tmp_path):
    model = open_checkpoint(head_checkpoint(tmp_path / "m", 1, True, "none"))
    halves = {EMBED: torch.full((6, 3), 2048.0).half(), HEAD: torch.ones(6, 3).half()}
    (fisher,) = harmonise_fishers([open_checkpoint(write(tmp_path / "f", halves))], [model])
    assert fisher.tensors[EMBED].dtype == torch.float32
    assert values(fisher.tensors[EMBED]).unique().tolist() == [2049]


# ---- float8


def test_float8_is_read_as_its_values_and_refused_with_scales(tmp_path):
    numbers = torch.tensor([0.5, 1.0, -448.0, 0.015625])
    for name in ("F8_E4M3", "F8_E5M2"):
        state = {"a.weight": numbers.to(DTYPES[name])}
        checkpoint = open_checkpoint(write(tmp_path / name, state, {"model_type": "x"}))
        source = checkpoint.tensors["a.weight"]
        assert torch.equal(
            values(source).to(torch.float32), numbers if name == "F8_E4M3" else state["a.weight"].float()
        )
        assert merge_dtype(source.dtype) == torch.bfloat16
        require_plain_weights(checkpoint)
        for suffix in ("_scale_inv", "_scale"):
            scaled = write(tmp_path / f"{name}{suffix}", state | {f"a.weight{suffix}": torch.ones(1)})
            with pytest.raises(
                MergeError, match=rf"is quantised \(a.weight{suffix}\).*dequantise it to bfloat16 first"
            ):
                require_plain_weights(open_checkpoint(scaled))
        config = {"quantization_config": {"quant_method": "fp8"}}
        with pytest.raises(MergeError, match=r"is quantised \(quantization_config\)"):
            require_plain_weights(open_checkpoint(write(tmp_path / f"{name}config", state, config)))
    exponents = bytes([127, 128, 126, 0])  # 2^(byte - 127)
    (tmp_path / "e8").mkdir()
    (tmp_path / "e8" / "model.safetensors").write_bytes(file_of({"w": entry((4,), (0, 4), "F8_E8M0")}, exponents))
    expected = torch.tensor([1.0, 2.0, 0.5, 2.0**-127])
    assert torch.equal(values(open_checkpoint(tmp_path / "e8").tensors["w"]).float(), expected)
    plain = write(tmp_path / "plain", {"a.weight": numbers, "a.weight_scale": torch.ones(1)}, config)
    require_plain_weights(open_checkpoint(plain))  # 32-bit weights need no scales
    packed = write(tmp_path / "packed", {"a.qweight": torch.arange(4)})
    with pytest.raises(MergeError, match=r"is quantised \(a.qweight\)"):
        require_plain_weights(open_checkpoint(packed))
    assert merge_dtype(torch.float16) == torch.float16


# ---- LoRA


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    defaults = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    return folder


def lora(module: str, seed: int, rank: int = 2, inputs: int = 5, outputs: int = 3) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": random_tensor(seed, rank, inputs),
        f"{module}.lora_B.weight": random_tensor(seed + 1, outputs, rank),
    }


def folded(base: Path, adapter: Path, name: str = f"{Q}.weight") -> torch.Tensor:
    return values(open_checkpoint(f"{base}+{adapter}").tensors[name])


def exact(tensors: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    """scale B A in float64."""
    return scale * tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    state = {f"{Q}.weight": random_tensor(0, 3, 5), "other.weight": random_tensor(1, 4), EMBED: random_tensor(2, 6, 5)}
    return write(tmp_path / "base", state, {"model_type": "x", "tie_word_embeddings": True})


def test_a_fold_worked_by_hand(tmp_path):
    base = write(tmp_path / "base", {"q.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])})
    matrices = {"q.lora_A.weight": torch.tensor([[1.0, 0.0, -1.0]]), "q.lora_B.weight": torch.tensor([[2.0], [-3.0]])}
    adapter = write_adapter(tmp_path / "adapter", matrices, r=1, lora_alpha=10)
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    # 10 / 1 * [2, -3]^T [1, 0, -1] = [[20, 0, -20], [-30, 0, 30]]
    expected = torch.tensor([[21.0, 2.0, -17.0], [-26.0, 5.0, 36.0]], dtype=torch.float64)
    for block in (1, 2, 4, 6):
        assert torch.equal(values(checkpoint.tensors["q.weight"], block), expected)
    assert checkpoint.label == f"{base}+{adapter}"
    assert checkpoint.folder == base
    assert checkpoint.files == (base / "model.safetensors", adapter / "adapter_model.safetensors")
    assert torch.equal(folded(base, Path(f"{adapter}+{adapter}"), "q.weight"), 2 * expected - load_tensor_of(base))


def load_tensor_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["q.weight"].double()


def test_scales_and_patterns(tmp_path, base):
    weight = load_file(base / "model.safetensors")[f"{Q}.weight"].double()
    cases = [
        ({}, 2, 4 / 2),
        ({"lora_alpha": 3}, 2, 3 / 2),
        ({"use_rslora": True}, 2, 4 / sqrt(2)),
        ({"rank_pattern": {"q_proj": 3}}, 3, 4 / 3),
        ({"rank_pattern": {"k_proj": 7, Q: 3}, "alpha_pattern": {r"layers\.\d+\..*q_proj": 9}}, 3, 9 / 3),
        ({"rank_pattern": {"_proj": 7}, "alpha_pattern": {"proj": 7}}, 2, 4 / 2),  # no whole component: no match
        ({"alpha_pattern": {"self_attn.q_proj": 5, "q_proj": 6}}, 2, 5 / 2),  # the first one counts
        ({"rank_pattern": {"q_proj": 4}, "use_rslora": True}, 4, 4 / sqrt(4)),
    ]
    for number, (config, rank, scale) in enumerate(cases):
        matrices = lora(Q, 10, rank)
        adapter = write_adapter(tmp_path / str(number), matrices, **config)
        torch.testing.assert_close(folded(base, adapter), weight + exact(matrices, Q, scale), rtol=1e-14, atol=1e-14)


def test_conv1d_weights_are_transposed(tmp_path):
    base = write(tmp_path / "base", {"h.0.attn.c_attn.weight": random_tensor(1, 5, 3)}, {"model_type": "gpt2"})
    matrices = lora("transformer.h.0.attn.c_attn", 3)  # the bare model's checkpoint lacks the first component
    adapter = write_adapter(tmp_path / "adapter", matrices, fan_in_fan_out=True)
    weight = load_file(base / "model.safetensors")["h.0.attn.c_attn.weight"].double()
    expected = weight + exact(matrices, "transformer.h.0.attn.c_attn", 2).T
    torch.testing.assert_close(folded(base, adapter, "h.0.attn.c_attn.weight"), expected, rtol=1e-14, atol=1e-14)
    square = write(tmp_path / "square", {"q.weight": torch.zeros(2, 2)})
    lopsided = {"q.lora_A.weight": torch.tensor([[1.0, 0.0]]), "q.lora_B.weight": torch.tensor([[0.0], [1.0]])}
    plain = write_adapter(tmp_path / "plain", lopsided, r=1, lora_alpha=1)
    transposed = write_adapter(tmp_path / "transposed", lopsided, r=1, lora_alpha=1, fan_in_fan_out=True)
    assert folded(square, plain, "q.weight").tolist() == [[0, 0], [1, 0]]
    assert folded(square, transposed, "q.weight").tolist() == [[0, 1], [0, 0]]


def test_a_fold_is_not_rounded_to_the_base_s_dtype(tmp_path):
    base = write(tmp_path / "base", {"q.weight": random_tensor(1, 3, 5).bfloat16()})
    matrices = {name: tensor * 1e-2 for name, tensor in lora("q", 5).items()}
    source = open_checkpoint(f"{base}+{write_adapter(tmp_path / 'a', matrices)}").tensors["q.weight"]
    assert source.dtype == torch.bfloat16  # a soup's default
    got = values(source)
    assert got.dtype == torch.float32
    weight = load_file(base / "model.safetensors")["q.weight"].double()
    torch.testing.assert_close(got.double(), weight + exact(matrices, "q", 2), rtol=1e-6, atol=1e-7)
    assert not torch.equal(got, got.bfloat16().float())


def test_modules_that_are_saved_whole(tmp_path):
    state = {EMBED: random_tensor(1, 6, 5), HEAD: random_tensor(2, 6, 5), f"{Q}.weight": random_tensor(3, 3, 5)}
    base = write(tmp_path / "base", state, {"tie_word_embeddings": False})
    new_head = random_tensor(4, 6, 5)
    for number, key in enumerate((HEAD, "lm_head.modules_to_save.weight", "lm_head.base_layer.weight")):
        adapter = write_adapter(tmp_path / f"a{number}", lora(Q, 5) | {key: new_head}, modules_to_save=["lm_head"])
        tensors = open_checkpoint(f"{base}+{adapter}").tensors
        assert torch.equal(values(tensors[HEAD]), new_head)
        assert torch.equal(values(tensors[EMBED]), state[EMBED])
    both = lora("lm_head", 7, outputs=6) | {"lm_head.base_layer.weight": new_head}
    adapter = write_adapter(tmp_path / "both", both)
    expected = new_head.double() + exact(both, "lm_head", 2)
    torch.testing.assert_close(folded(base, adapter, HEAD), expected, rtol=1e-14, atol=1e-14)


REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "dora": ({"use_dora": True}, {}, "uses use_dora, which is not supported: fold it"),
    "dora vector": ({}, {f"{Q}.lora_magnitude_vector": torch.ones(3)}, "lora_magnitude_vector' is not understood"),
    "other kind": ({"peft_type": "IA3"}, {}, "is a IA3 adapter: only LORA adapters are merged"),
    "bias": ({"bias": "all"}, {}, r"trained biases \(bias='all'\)"),
    "lora_bias": ({"lora_bias": True}, {}, "uses lora_bias, which is not supported"),
    "embedding": ({}, {"model.embed_tokens.lora_embedding_A": torch.ones(2, 6)}, "lora_embedding_A' is not understood"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "starts from init_lora_weights='pissa', which changes the base"),
    "layers": ({"layer_replication": [[0, 1]]}, {}, "uses layer_replication, which is not supported"),
    "parameters": ({"target_parameters": ["experts.w"]}, {}, "uses target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, {}, "uses trainable_token_indices"),
    "quantised": ({"loftq_config": {"bits": 4}}, {}, "uses loftq_config"),
    "from the future": ({"use_quantum": "yes"}, {}, "uses use_quantum, which is not supported"),
    "tied": ({}, {EMBED: torch.ones(6, 5)}, f"changes '{EMBED}', which its base ties to another tensor"),
    "tied update": ({}, lora("model.embed_tokens", 1, outputs=6), f"changes '{EMBED}', which its base ties"),
    "another base": ({}, lora("layers.7.q_proj", 1), "changes 'layers.7.q_proj.weight', which its base lacks"),
    "a new head": ({}, {"score.weight": torch.ones(1, 5)}, "changes 'score.weight', which its base lacks"),
    "shape": ({}, lora(Q, 1, outputs=4), rf"has \[4, 5\] for '{Q}.weight', and its base \[3, 5\]"),
    "shape saved whole": ({}, {"other.weight": torch.ones(5)}, r"has \[5\] for 'other.weight', and its base \[4\]"),
    "rank": ({"r": 3}, {}, rf"'{Q}' has rank 3 in adapter_config.json, and its matrices are \[2, 5\] and \[3, 2\]"),
    "no rank": ({"r": None}, {}, "gives .* no rank or alpha"),
    "bool rank": ({"lora_alpha": True}, {}, "gives .* no rank or alpha"),
    "patterns": ({"rank_pattern": [2]}, {}, "rank_pattern of adapter_config.json is no object"),
    "bad pattern": ({"rank_pattern": {"(q": 2}}, {}, r"'\(q' in rank_pattern is no regular expression"),
    "hanging pattern": ({"alpha_pattern": {"(([a-z._0-9]+)+)+X": 2}}, {}, "in alpha_pattern is too intricate"),
    "slow pattern": ({"alpha_pattern": {".*" * 30 + "X": 2}}, {}, "in alpha_pattern is too intricate"),
    "half": ({}, {"other.lora_A.weight": torch.ones(2, 4)}, "'other' has lora_A alone"),
    "convolution": ({}, {"other.lora_A.weight": torch.ones(2, 4, 1, 1), "other.lora_B.weight": torch.ones(3, 2, 1, 1)},
                    "'other' is no linear layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_ADAPTERS)
def test_adapters_that_are_refused_by_name(tmp_path, base, name):
    config, tensors, message = REFUSED_ADAPTERS[name]
    adapter = write_adapter(tmp_path / "adapter", lora(Q, 3) | tensors, **config)
    refuses(f"{base}+{adapter}", message)


def test_settings_of_the_training_alone_are_no_obstacle(tmp_path, base):
    settings = {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "megatron_core": "m",
                "qalora_group_size": 16, "peft_version": "0.19", "layers_to_transform": [0], "use_dora": False,
                "loftq_config": {}, "init_lora_weights": True, "layer_replication": None}  # fmt: skip
    assert folded(base, write_adapter(tmp_path / "adapter", lora(Q, 3), **settings)).shape == (3, 5)


def test_how_a_base_and_its_adapter_are_named(tmp_path, base, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", lora(Q, 3))
    refuses(
        adapter, r"is a LoRA adapter: merge it into its base model by naming both, BASE\+.*, or merge several of one ba"
    )
    refuses(f"{base}+", "lacks a base or an adapter: write BASE")
    refuses(f"{base}+{base}", "has no adapter_config.json: give the folder of a PEFT adapter")
    refuses(f"{base}+{tmp_path / 'nowhere'}", "nowhere does not exist")
    plus = tmp_path / "c++"
    plus.mkdir()
    base.rename(plus / "base+1")
    adapter.rename(plus / "a+b")
    assert f"{Q}.weight" in open_checkpoint(plus / "base+1").tensors
    assert folded(plus / "base+1", plus / "a+b").dtype == torch.float64
    monkeypatch.chdir(plus)
    assert open_checkpoint("base+1+a+b").folder == Path("base+1")


def test_pickled_adapters(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", lora(Q, 3))
    expected = folded(base, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refuses(f"{base}+{adapter}", r"holds pickled weights \(adapter_model.bin\).*--allow-pickle")
    source = open_checkpoint(f"{base}+{adapter}", allow_pickle=True).tensors[f"{Q}.weight"]
    assert torch.equal(values(source), expected)


# ---- soups of adapters


def test_a_soup_of_adapters_adds_the_average_of_what_they_add(tmp_path, base):
    q, k, v = "layers.0.q", "layers.0.k", "layers.1.v"
    parts = [
        (lora(q, 1, 2) | lora(k, 3, 2), {"lora_alpha": 3}, {q: 3 / 2, k: 3 / 2}),
        (lora(q, 5, 4) | lora(v, 7, 4), {"r": 4, "use_rslora": True}, {q: 4 / sqrt(4), v: 4 / sqrt(4)}),
        (lora(k, 9, 1), {"r": 1, "lora_alpha": 5}, {k: 5.0}),
    ]
    folders = [write_adapter(tmp_path / str(i), tensors, **config) for i, (tensors, config, _) in enumerate(parts)]
    expected = {module: torch.zeros(3, 5, dtype=torch.float64) for module in (q, k, v)}
    for share, (tensors, _, scales) in zip((0.2, 0.3, 0.5), parts, strict=True):
        for module, scale in scales.items():
            expected[module] += share * exact(tensors, module, scale)
    out = merge_adapters(folders, [2, 3, 5], tmp_path / "soup")
    assert out == tmp_path / "soup"
    saved = {k.removeprefix("base_model.model."): v for k, v in load_file(out / "adapter_model.safetensors").items()}
    ranks = {q: 6, k: 3, v: 4}
    for module, total in expected.items():
        assert saved[f"{module}.lora_A.weight"].shape == (ranks[module], 5)
        assert saved[f"{module}.lora_B.weight"].dtype == torch.float32
        torch.testing.assert_close(exact(saved, module, 1), total, rtol=1e-6, atol=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert {config["r"]: 0, **dict.fromkeys(config["rank_pattern"].values(), 0)}.keys() == set(ranks.values())
    assert {module: config["rank_pattern"].get(module, config["r"]) for module in ranks} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is False
    assert config["target_modules"] == sorted(ranks)
    assert config["base_model_name_or_path"] == "base"
    zeros = write(tmp_path / "zeros", {f"{module}.weight": torch.zeros(3, 5) for module in ranks})
    for module, total in expected.items():  # read again as any adapter is
        torch.testing.assert_close(folded(zeros, out, f"{module}.weight"), total, rtol=1e-6, atol=1e-6)
    record = json.loads((out / "soup.json").read_text())
    entries = [{"model": str(f), "weight": share} for f, share in zip(folders, (0.2, 0.3, 0.5), strict=True)]
    assert record["recipe"] == {"method": "linear", "models": entries, "parameters": {"normalize": False}}
    Recipe.from_dict(record["recipe"]).validate()
    assert record["ingredients"][1]["files"].keys() == {"adapter_model.safetensors"}
    assert record["files"].keys() == {"adapter_model.safetensors", "adapter_config.json"}
    summed = merge_adapters(folders[:2], [1, -1], tmp_path / "difference", normalize=False)
    difference = exact(parts[0][0], q, 3 / 2) - exact(parts[1][0], q, 2)
    torch.testing.assert_close(folded(zeros, summed, f"{q}.weight"), difference, rtol=1e-6, atol=1e-6)


def test_soups_of_adapters_that_save_modules_whole(tmp_path):
    heads = [random_tensor(seed, 6, 5) for seed in (1, 2)]
    folders = [
        write_adapter(tmp_path / str(i), lora(Q, i) | {HEAD: head}, modules_to_save=["lm_head"])
        for i, head in enumerate(heads)
    ]
    out = merge_adapters(folders, None, tmp_path / "soup")
    saved = load_file(out / "adapter_model.safetensors")
    expected = (heads[0].double() + heads[1].double()) / 2
    assert torch.equal(saved[f"base_model.model.{HEAD}"], expected.float())
    folders.append(write_adapter(tmp_path / "without", lora(Q, 3)))
    with pytest.raises(MergeError, match=r"'lm_head.weight' is saved whole, and .*without lacks it: its average needs"):
        merge_adapters(folders, None, tmp_path / "soup2")
    with pytest.raises(MergeError, match=r"'lm_head.weight' is saved whole, and the weights' sum is 2.0, not 1"):
        merge_adapters(folders[:2], [1, 1], tmp_path / "soup2", normalize=False)
    assert not (tmp_path / "soup2").exists()


def test_bad_calls_of_merge_adapters(tmp_path):
    first = write_adapter(tmp_path / "a", lora(Q, 1))
    (first / "tokenizer.json").write_text("{}")
    linked = write_adapter(tmp_path / "linked", lora(Q, 1))
    (linked / "vocab.txt").symlink_to(first / "tokenizer.json")
    forged = write_adapter(tmp_path / "forged", lora(Q, 1))
    (forged / "adapter_config.json").unlink()
    (forged / "adapter_config.json").symlink_to(first / "adapter_config.json")
    cases = [
        ([], None, "no adapters to merge"),
        ([first, first], [1], "found 1 weights for 2 ingredients: give one each"),
        ([first, first], [1, -1], "have the sum 0: give"),
        ([first], [float("nan")], "weight 1 is nan: weights must be finite"),
        ([first], ["much"], "weights must be numbers, one per ingredient; found"),
        (
            [first, write_adapter(tmp_path / "b", lora(Q, 1), base_model_name_or_path="x")],
            None,
            "base_model_name_or_path",
        ),
        ([first, write_adapter(tmp_path / "c", lora(Q, 1), fan_in_fan_out=True)], None, "fan_in_fan_out differs"),
        ([first, write_adapter(tmp_path / "d", lora(Q, 1, inputs=7))], None, f"matrices of '{Q}' differ in size"),
        ([linked], None, "linked/vocab.txt is a link out of its folder"),
        ([forged], None, "forged/adapter_config.json is a link out of its folder"),
        (str(first), None, "found one str where a list of adapters belongs"),
    ]
    for adapters, weights, message in cases:
        with pytest.raises(MergeError, match=message):
            merge_adapters(adapters, weights, tmp_path / "soup")
    with pytest.raises(FileExistsError, match="is one of the models that are merged: choose another output folder"):
        merge_adapters([first], None, first, overwrite=True)
    with pytest.raises(MergeError, match=f"^{first}/soup lies inside {first}, which is merged: choose an output"):
        merge_adapters([first], None, first / "soup")
    assert not (tmp_path / "soup").exists()
    out = merge_adapters([first], None, tmp_path / "soup")
    assert (out / "tokenizer.json").exists()
    with pytest.raises(FileExistsError, match="soup exists"):
        merge_adapters([first], None, out)
    merge_adapters([first, first], None, out, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_average_of_adapter_folders_is_an_adapter(tmp_path, base):
    folders = [write_adapter(tmp_path / name, lora("layers.0.q", seed)) for seed, name in ((1, "a"), (3, "b"))]
    out = soupkit.average(folders, [1, 3], out=tmp_path / "soup", progress=False)
    twin = merge_adapters(folders, [1, 3], tmp_path / "twin")
    assert (out / "adapter_model.safetensors").read_bytes() == (twin / "adapter_model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="a is given twice: each counts as a model of its own"):
        soupkit.average([*folders, folders[0]], out=tmp_path / "thrice", progress=False)
    with pytest.raises(MergeError, match="dtype is no option for LoRA adapters"):
        soupkit.average(folders, out=tmp_path / "other", dtype="bfloat16")
    with pytest.raises(MergeError, match="the average of LoRA adapters is an adapter folder: give out"):
        soupkit.average(folders)
    first, second = (write_adapter(tmp_path / name, lora(Q, seed)) for seed, name in ((1, "c"), (3, "d")))
    with pytest.raises(MergeError, match=r"\+.*/d names two adapters: average them into one first"):
        soupkit.average([f"{base}+{first}+{second}"], progress=False)


# ---- vocabularies


def vocabulary_checkpoint(
    folder: Path, tokens: dict[str, int] | list[str], rows: int, seed: int, *, head: bool = False, **other: Any
) -> Path:
    """Embeddings [rows, 17] whose row r is 100 seed + r, plus 0.5 in the second column."""
    ids = {token: index for index, token in enumerate(tokens)} if isinstance(tokens, list) else tokens
    weight = (100.0 * seed + torch.arange(rows)).unsqueeze(1) + torch.eye(17)[1] / 2
    state = {EMBED: weight, "norm.weight": torch.ones(17)} | ({HEAD: -weight} if head else {})
    config = {"vocab_size": rows, "tie_word_embeddings": not head} | other.pop("config", {})
    write(folder, state, config)
    model = {"type": "WordLevel", "vocab": ids, "unk_token": "a"} | other.pop("model", {})
    content = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
               "post_processor": None, "decoder": None, "model": model} | other  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def first_column(checkpoint: Checkpoint, name: str = EMBED) -> list[float]:
    for block in (1, 5, 40, 1000):
        got = values(checkpoint.tensors[name], block)
        sign = -1 if name == HEAD else 1
        assert torch.equal(got[:, 1], got[:, 0] + sign * 0.5 * (got[:, 0] != 0))
    return got[:, 0].tolist()


def added(content: str, number: int, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": number, "content": content, **flags}


def test_a_union_of_vocabularies_worked_by_hand(tmp_path):
    folders = [
        vocabulary_checkpoint(tmp_path / "1", ["a", "b", "c"], 3, 1),
        vocabulary_checkpoint(tmp_path / "2", ["b", "a", "d"], 3, 2),
        vocabulary_checkpoint(tmp_path / "3", ["a", "b", "d", "e"], 4, 3),
    ]
    unified = unify_vocabularies([open_checkpoint(folder) for folder in folders])
    assert unified.tokenizer_json["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert unified.checkpoints[0].config["vocab_size"] == 5
    assert unified.companions == folders[0]
    # a, b, c, d, e; d is in 2 (row 202) and 3 (row 302): the first takes their mean; e is in the third alone.
    assert first_column(unified.checkpoints[0]) == [100, 101, 102, 252, 303]
    assert first_column(unified.checkpoints[1]) == [201, 200, 102, 202, 303]
    assert first_column(unified.checkpoints[2]) == [300, 301, 102, 302, 303]
    for checkpoint in unified.checkpoints:
        assert checkpoint.config["vocab_size"] == 5
        assert checkpoint.tensors[EMBED].shape == (5, 17)
        assert checkpoint.tensors[EMBED].dtype == torch.float32
    tokenizer = Tokenizer.from_str(json.dumps(unified.tokenizer_json))
    assert tokenizer.encode("e b d a").ids == [4, 1, 3, 0]


def test_merges_with_the_tokenizer_of_one_model_and_with_the_union(tmp_path):
    base = vocabulary_checkpoint(tmp_path / "base", ["b", "a"], 2, 4)
    model = vocabulary_checkpoint(tmp_path / "model", ["a", "b", "c"], 3, 1)
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    recipe = Recipe("task_arithmetic", [str(model)], base=str(base), parameters={"weight": 1}, tokenizer="base")
    with pytest.raises(MergeError, match=r"tokenizers of .* differ"):
        soupkit.merge(replace(recipe, tokenizer=None), progress=False)
    rows = {"base": [101, 100], "union": [101, 100, 102]}
    for tokenizer, expected in rows.items():
        out = soupkit.merge(replace(recipe, tokenizer=tokenizer), out=tmp_path / f"of-{tokenizer}", progress=False)
        assert load_file(out / "model.safetensors")[EMBED][:, 0].tolist() == expected
        assert json.loads((out / "config.json").read_text())["vocab_size"] == len(expected)
        ids = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
        assert ids == dict(zip("bac", range(len(expected)), strict=False))
        assert soupkit.verify(out, progress=False).ok


def write_fisher(folder: Path, rows: list[float]) -> Path:
    """The same information for all of a row of the embeddings, and of the head."""
    embedding = torch.tensor(rows)[:, None].expand(-1, 17).contiguous()
    return write(folder, {EMBED: embedding, "norm.weight": torch.ones(17), HEAD: embedding.clone()})


def test_fisher_estimates_follow_the_vocabulary(tmp_path):
    models = [
        vocabulary_checkpoint(tmp_path / "1", ["a", "b", "c"], 5, 1, head=True),  # two rows of padding
        vocabulary_checkpoint(tmp_path / "2", ["b", "a", "d"], 3, 2, head=True),
        vocabulary_checkpoint(tmp_path / "3", ["a", "d"], 2, 3, head=True),
    ]
    information = ([1.0, 2.0, 3.0, 7.0, 5.0], [4.0, 1.0, 8.0], [2.0, 24.0])
    fishers = [write_fisher(tmp_path / f"f{n}", rows) for n, rows in enumerate(information, start=1)]
    recipe = Recipe("fisher", [*map(str, models)], fishers=[*map(str, fishers)], tokenizer="union")
    soup = soupkit.merge(recipe, progress=False)
    # a: (100 + 201 + 2 · 300) / 4; b: (2 · 101 + 4 · 200) / 6; c in the first alone; d: (8 · 202 + 24 · 301) / 32,
    # where the first's row 3 has no say, though it was padding with an information of 7; the padding that remains.
    expected = [225.25, 167, 102, 276.25, 104]
    assert soup[EMBED][:, 0].tolist() == expected
    assert soup[HEAD][:, 0].tolist() == [-x for x in expected]
    # Of equal sizes, in another order: shapes alone would not have shown it.
    first, second = (
        vocabulary_checkpoint(tmp_path / name, [*name], 2, seed, head=True) for name, seed in (("ab", 1), ("ba", 2))
    )
    fishers = [write_fisher(tmp_path / f"f-{name}", rows) for name, rows in (("ab", [1.0, 2.0]), ("ba", [4.0, 1.0]))]
    recipe = Recipe("fisher", [str(first), str(second)], fishers=[*map(str, fishers)], tokenizer="base")
    assert soupkit.merge(recipe, progress=False)[EMBED][:, 0].tolist() == [150.5, 167]


def test_new_tokens_keep_their_order(tmp_path):
    first = vocabulary_checkpoint(tmp_path / "1", ["a"], 1, 1)
    second = vocabulary_checkpoint(tmp_path / "2", {"y": 0, "a": 3, "z": 1, "x": 2}, 4, 2)
    unified = unify_vocabularies([open_checkpoint(folder) for folder in (first, second)])
    assert unified.tokenizer_json["model"]["vocab"] == {"a": 0, "y": 1, "z": 2, "x": 3}
    assert first_column(unified.checkpoints[1]) == [203, 200, 201, 202]


def test_the_base_s_ids_and_rows_come_first(tmp_path):
    folders = [
        vocabulary_checkpoint(
            tmp_path / "1", ["a", "b"], 2, 1, head=True, config={"bos_token_id": 1, "eos_token_id": [0]}
        ),
        vocabulary_checkpoint(tmp_path / "2", ["a", "b", "c"], 3, 2, head=True),
        vocabulary_checkpoint(tmp_path / "3", ["a", "b", "d", "c"], 4, 3, head=True),
        vocabulary_checkpoint(tmp_path / "base", ["b", "a", "c"], 3, 4, head=True),
    ]
    (folders[0] / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 0], "top_k": 1, "pad_token_id": 9})
    )
    unified = unify_vocabularies([open_checkpoint(folder) for folder in folders], 3)
    assert unified.tokenizer_json["model"]["vocab"] == {"b": 0, "a": 1, "c": 2, "d": 3}
    assert unified.companions == folders[3]
    # c is in the base (402), which the first lacks; d is in the third alone (302), and not in the base.
    assert first_column(unified.checkpoints[0]) == [101, 100, 402, 302]
    assert first_column(unified.checkpoints[1]) == [201, 200, 202, 302]
    assert first_column(unified.checkpoints[2]) == [301, 300, 303, 302]
    assert first_column(unified.checkpoints[3]) == [400, 401, 402, 302]
    assert first_column(unified.checkpoints[0], HEAD) == [-101, -100, -402, -302]
    assert unified.checkpoints[0].config["bos_token_id"] == 0
    assert unified.checkpoints[0].config["eos_token_id"] == [1]
    assert unified.generation_config == {"eos_token_id": [0, 1], "top_k": 1, "pad_token_id": 9}


def test_padding_rows_are_used_first_and_else_shared(tmp_path):
    folders = [
        vocabulary_checkpoint(tmp_path / "1", ["a", "b"], 5, 1),
        vocabulary_checkpoint(tmp_path / "2", ["a", "c", "b"], 4, 2),
    ]
    unified = unify_vocabularies([open_checkpoint(folder) for folder in folders])
    assert unified.checkpoints[0].config["vocab_size"] == 5
    assert first_column(unified.checkpoints[0]) == [100, 101, 201, 103, 104]
    assert first_column(unified.checkpoints[1]) == [200, 202, 201, 103, 104]
    swapped = unify_vocabularies([open_checkpoint(folder) for folder in folders[::-1]])
    assert swapped.checkpoints[0].config["vocab_size"] == 4  # a, c, b and one row of padding
    assert first_column(swapped.checkpoints[1]) == [100, 201, 101, 203]


def test_one_tokenizer_for_all(tmp_path):
    folders = [
        vocabulary_checkpoint(tmp_path / "1", ["a", "b", "c", "d"], 6, 1, config={"pad_token_id": 3}),
        vocabulary_checkpoint(tmp_path / "2", ["b", "a"], 3, 2),
    ]
    opened = [open_checkpoint(folder) for folder in folders]
    unified = unify_vocabularies(opened, tokenizer=folders[1])
    assert unified.tokenizer_json["model"]["vocab"] == {"b": 0, "a": 1}
    assert first_column(unified.checkpoints[0]) == [101, 100, 202]  # c and d are cut; padding is the second's
    assert unified.checkpoints[1].tensors == opened[1].tensors
    assert unified.checkpoints[0].config["pad_token_id"] is None  # d is no more
    other = vocabulary_checkpoint(tmp_path / "other", {"c": 0, "b": 3}, 9, 9)
    unified = unify_vocabularies(opened, tokenizer=other)
    assert unified.companions == other
    assert first_column(unified.checkpoints[0]) == [102, 0, 0, 101]  # ids 1 and 2 are no token's
    assert first_column(unified.checkpoints[1]) == [102, 0, 0, 200]
    foreign = vocabulary_checkpoint(tmp_path / "foreign", ["z"], 1, 9)
    with pytest.raises(MergeError, match="token 'z' has a row in none of the ingredients"):
        unify_vocabularies(opened, tokenizer=foreign)


def test_added_tokens_and_equal_vocabularies(tmp_path):
    special = [added("<x>", 2)]
    folders = [
        vocabulary_checkpoint(tmp_path / "1", ["a", "b"], 2, 1),
        vocabulary_checkpoint(tmp_path / "2", ["b", "a"], 3, 2, added_tokens=special),
    ]
    unified = unify_vocabularies([open_checkpoint(folder) for folder in folders])
    assert unified.tokenizer_json["added_tokens"] == special
    assert unified.tokenizer_json["model"]["vocab"] == {"a": 0, "b": 1}
    assert first_column(unified.checkpoints[0]) == [100, 101, 202]
    tokenizer = Tokenizer.from_str(json.dumps(unified.tokenizer_json))
    assert tokenizer.encode("b <x> a").ids == [1, 2, 0]
    opened = [open_checkpoint(folders[0])] * 2
    assert unify_vocabularies(opened).checkpoints == opened
    beyond = vocabulary_checkpoint(tmp_path / "3", ["a", "b", "d"], 2, 3)  # its third token has no row
    with pytest.raises(MergeError, match="token 'd' has a row in none of the ingredients"):
        unify_vocabularies([open_checkpoint(folders[0]), open_checkpoint(beyond)])


def bpe(folder: Path, merges: list[Any], seed: int = 1) -> Checkpoint:
    tokens = ["a", "b", "c", *("".join(merge.split() if isinstance(merge, str) else merge) for merge in merges)]
    model = {"type": "BPE", "merges": merges, "unk_token": None}
    return open_checkpoint(vocabulary_checkpoint(folder, tokens, len(tokens), seed, model=model))


def test_merges_are_joined_where_one_list_continues_the_other(tmp_path):
    short = bpe(tmp_path / "short", ["a b", "b c"])
    long = bpe(tmp_path / "long", [["a", "b"], ["b", "c"], ["ab", "c"]], 2)
    part = bpe(tmp_path / "part", ["a b", "ab c"], 3)
    fork = bpe(tmp_path / "fork", ["a b", "c a"], 4)
    unified = unify_vocabularies([short, long])
    assert unified.tokenizer_json["model"]["merges"] == [["a", "b"], ["b", "c"], ["ab", "c"]]
    assert unified.checkpoints[0].config["vocab_size"] == 6
    assert Tokenizer.from_str(json.dumps(unified.tokenizer_json)).encode("abc").ids == [5]
    unified = unify_vocabularies([long, short, part])
    assert unified.tokenizer_json["model"]["merges"] == [["a", "b"], ["b", "c"], ["ab", "c"]]
    assert first_column(unified.checkpoints[2]) == [300, 301, 302, 303, 154, 304]
    swapped = bpe(tmp_path / "swapped", ["b c", "a b"], 5)
    with pytest.raises(MergeError, match="cannot be joined"):
        unify_vocabularies([short, swapped])
    with pytest.raises(
        MergeError, match=r"merges of the tokenizers of .*short and .*fork cannot be joined.*tokenizer: base"
    ):
        unify_vocabularies([short, fork])
    assert first_column(unify_vocabularies([short, fork], tokenizer=short.folder).checkpoints[1]) == [
        400, 401, 402, 403, 104,
    ]  # fmt: skip


def test_vocabularies_that_are_refused(tmp_path):
    first = open_checkpoint(vocabulary_checkpoint(tmp_path / "first", ["a", "b"], 2, 1))
    none = open_checkpoint(write(tmp_path / "none", {EMBED: torch.ones(2, 2)}))
    cases: list[tuple[Checkpoint, str]] = [
        (none, "none has no tokenizer.json"),
        (other_vocabulary(tmp_path / "pre", pre_tokenizer=None), r"spell tokens differently \(pre_tokenizer\)"),
        (other_vocabulary(tmp_path / "kind", model={"type": "WordPiece"}), r"spell tokens differently \(model.type\)"),
        (
            other_vocabulary(tmp_path / "id", tokens={"a": 0, "b": 0}),
            "tokenizer.json has no tokens, or two with one id",
        ),
        (
            other_vocabulary(tmp_path / "bool", tokens={"a": 0, "b": True}),
            r"tokenizer.json is damaged \(ids are whole numbers\)",
        ),
        (other_vocabulary(tmp_path / "list", model={"vocab": 3}), "list/tokenizer.json is damaged"),
        (other_vocabulary(tmp_path / "size", config={"vocab_size": 7}), "has no embeddings of vocab_size 7 rows"),
    ]
    for other, message in cases:
        with pytest.raises(MergeError, match=message):
            unify_vocabularies([first, other])
    stray = other_vocabulary(tmp_path / "stray")
    save_file({EMBED: torch.ones(3, 17), "count.weight": torch.ones(4, 3)}, tmp_path / "stray" / "model.safetensors")
    with pytest.raises(
        MergeError, match=r"'count.weight' in .*stray has a dimension of the vocabulary's size, 3, and is no"
    ):
        unify_vocabularies([first, open_checkpoint(stray.folder)])
    wider = other_vocabulary(tmp_path / "wider")
    save_file({EMBED: torch.ones(3, 5)}, tmp_path / "wider" / "model.safetensors")
    with pytest.raises(
        MergeError, match=r"has no counterpart by the vocabulary in .*: merge checkpoints of the same arch"
    ):
        unify_vocabularies([first, open_checkpoint(wider.folder)])
    unigram = {"type": "Unigram", "unk_id": 0}
    pieces = [
        vocabulary_checkpoint(
            tmp_path / f"u{n}", ["x"] * n, n, 1, model=unigram | {"vocab": [["abc"[i], -1.0] for i in range(n)]}
        )
        for n in (2, 3)
    ]
    with pytest.raises(MergeError, match="adds the piece 'c' to a unigram tokenizer"):
        unify_vocabularies([open_checkpoint(folder) for folder in pieces])


def other_vocabulary(folder: Path, tokens: dict[str, int] | list[str] | None = None, **other: Any) -> Checkpoint:
    return open_checkpoint(vocabulary_checkpoint(folder, tokens or ["b", "a", "c"], 3, 2, **other))


def test_a_union_gives_each_model_the_logits_it_had(tmp_path):
    """Every ingredient, written out in the common vocabulary, is the same model: only its tokens have new numbers."""
    from transformers import LlamaForCausalLM

    vocabularies = [WORDS, (*reversed(WORDS[4:]), *WORDS[:4], "zebra")]
    for number, words in enumerate(vocabularies):
        ids = {name: words.index(f"<{name[:3]}>") for name in ("pad", "bos", "eos")}
        settings = {f"{name}_token_id": value for name, value in ids.items()}
        model = make_llama(number, vocab_size=len(words), tie_word_embeddings=bool(number), **settings)
        model.save_pretrained(tmp_path / str(number))
        make_tokenizer(words).save_pretrained(tmp_path / str(number))
    opened = harmonise_heads([open_checkpoint(tmp_path / str(number)) for number in (0, 1)])
    unified = unify_vocabularies(opened)
    common = unified.tokenizer_json["model"]["vocab"]
    assert [common[word] for word in WORDS] == list(range(len(WORDS)))
    text = ["user", "a", "n", "<eos>", "b"]
    for number, (words, checkpoint) in enumerate(zip(vocabularies, unified.checkpoints, strict=True)):
        config = llama_config(**{key: checkpoint.config[key] for key in ("vocab_size", "tie_word_embeddings")})
        assert [checkpoint.config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict({name: load_tensor(source).float() for name, source in checkpoint.tensors.items()})
        before = LlamaForCausalLM.from_pretrained(tmp_path / str(number))
        with torch.no_grad():
            old = before(torch.tensor([[words.index(word) for word in text]])).logits[0]
            new = model(torch.tensor([[common[word] for word in text]])).logits[0]
        order = [common[word] for word in words]
        torch.testing.assert_close(new[:, order], old, rtol=0, atol=1e-5)


def test_slow_tokenizers_that_differ_in_their_added_tokens(tmp_path):
    opened = [open_checkpoint(write(tmp_path / name, {"w": torch.ones(2)})) for name in "ab"]
    for checkpoint, number in zip(opened, (7, 8), strict=True):
        (checkpoint.folder / "vocab.txt").write_text("the same")
        require_same_tokenizer(*opened)
        (checkpoint.folder / "added_tokens.json").write_text(json.dumps({"<tool>": number}))
    with pytest.raises(MergeError, match=r"the tokenizers of .*a and .*b differ \(added_tokens.json\)"):
        require_same_tokenizer(*opened)


def test_tokenizer_files_that_are_none(tmp_path):
    opened = [other_vocabulary(tmp_path / name) for name in ("a", "b")]
    for content, message in (
        ({"model": {"vocab": [3]}}, "b/tokenizer.json is damaged"),
        ({"model": {"vocab": {"a": "x"}}}, r"b/tokenizer.json is damaged \(ids are whole numbers\)"),
        ({"model": None}, "b/tokenizer.json is damaged"),
        ({"model": {"vocab": {}}, "added_tokens": [1]}, "b/tokenizer.json is damaged"),
    ):
        (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(MergeError, match=message):
            require_same_tokenizer(*opened)
    for folder in ("a", "b"):
        os.mkfifo(tmp_path / folder / "vocab.json")
    with pytest.raises(MergeError, match=r"a/vocab.json is no regular file"):
        require_same_tokenizer(*opened)


# ---- hub ids


def test_what_is_fetched_from_the_hub(tmp_path, monkeypatch):
    asked: list[list[str]] = []
    revisions: list[str | None] = []
    folder = pickled(tmp_path / "snapshot", {"w": torch.ones(2)})

    def snapshot_download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert hub_id == "org/name"
        revisions.append(revision)
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    refuses("org/name", "org/name holds pickled weights")
    assert len(asked) == 1
    assert not any(pattern.endswith(".bin") for pattern in asked[0])
    assert open_checkpoint("org/name", allow_pickle=True).label == "org/name"
    assert len(asked) == 3
    assert {"pytorch_model*.bin", "*.json"} <= set(asked[2])
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    assert open_checkpoint("org/name@refs/pr/1", allow_pickle=True).label == "org/name@refs/pr/1"
    assert revisions == [None, None, None, "refs/pr/1"]
    Path("org").mkdir()
    refuses(
        "org/name", r"^org/name does not exist: .* \(not looked for on the hub, since there is a folder org here: to"
    )
    refuses("./org/name", "^./org/name does not exist: give a checkpoint folder, or a hub id such as org/name$")
    assert len(asked) == 4


def test_labels_stand_for_folders_without_the_network(tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--org--name" / "snapshots"
    for revision in ("0" * 40, "1" * 40):
        (cached / revision).mkdir(parents=True)
        (cached / revision / "config.json").write_text("{}")
    (cached.parent / "refs").mkdir()
    (cached.parent / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda self, *query, **_: asked.append(query))
    monkeypatch.chdir(tmp_path)
    assert folders_of("org/name") == [cached / ("1" * 40)]
    assert folders_of("org/name@" + "0" * 40) == [cached / ("0" * 40)]
    assert folders_of("org/name@2") == [Path("org/name@2")]
    (tmp_path / "a+b" / "lora").mkdir(parents=True)
    assert folders_of("a+b") == [Path("a+b")]
    assert folders_of("org/name+a+b/lora") == [cached / ("1" * 40), Path("a+b/lora")]
    assert folders_of("org/name+a+b+a+b/lora") == [cached / ("1" * 40), Path("a+b"), Path("a+b/lora")]
    (tmp_path / "org").mkdir()
    assert folders_of("org/name") == [Path("org/name")]
    assert not asked

"""soupkit on folders: the same values as in memory, complete or absent, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import xxh3_tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import soupkit
from soupkit import MergeError, Recipe
from soupkit.publish import published_folder

CONFIG = {"model_type": "tiny", "vocab_size": 11, "torch_dtype": "float32"}


def make_state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of several shapes; one is larger than a block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 7), "layer.0.weight": (601, 503), "layer.1.weight": (7, 7), "one": (), "no": (0, 3)}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"position_ids": torch.arange(5), "odd": torch.tensor([True, False, True])}


def save(folder: Path, state: dict[str, torch.Tensor], *, shards: int = 1, config: dict | None = None) -> Path:
    """Write a checkpoint with the safetensors library, over as many files as asked for."""
    folder.mkdir(parents=True)
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            save_file({name: state[name] for name in names[index::shards]}, folder / file)
            weight_map |= dict.fromkeys(names[index::shards], file)
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint with the safetensors library, by its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(weight_map.values())}
    assert sorted(name for shard in shards.values() for name in shard) == sorted(weight_map)
    return {name: shards[file][name] for name, file in weight_map.items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        x, y = (state[name].contiguous().view(-1).view(torch.uint8) for state in (a, b))
        assert torch.equal(x, y), name


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / name, make_state(seed)) for seed, name in enumerate("ab")]


def call(method: str, models: list, **options):
    options = {"progress": False} | options
    if method == "average":
        return soupkit.average(models, [0.3, 0.7], **options)
    if method == "ties":
        recipe = Recipe("ties", models[:1], base=models[1], parameters={"weight": 1, "density": 0.3})
        return soupkit.merge(recipe, **options)
    return soupkit.interpolate(*models, 0.7, method=method, **options)


@pytest.mark.parametrize("method", ["average", "linear", "slerp", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [(1, 1), (3, 2)])
def test_three_levels_agree_for_every_layout(tmp_path, method, dtype, layout):
    states = [make_state(seed, dtype) for seed in (0, 1)]
    folders = [save(tmp_path / f"m{i}", state, shards=layout[i]) for i, state in enumerate(states)]
    expected = call(method, states)
    assert_same_bits(call(method, folders), expected)
    out = call(method, folders, out=tmp_path / "soup")
    assert_same_bits(load(out), expected)
    assert len(list(out.glob("*.safetensors"))) == layout[0]
    small = call(method, [str(folder) for folder in folders], out=tmp_path / "small", max_shard_size=100_000)
    assert_same_bits(load(small), expected)
    assert len(list(small.glob("*.safetensors"))) > 1


def test_shards_are_aligned_and_no_larger_than_asked(tmp_path):
    state = {"flag": torch.tensor([True]), "ids": torch.arange(3), "half": torch.ones(3).half()}
    state |= {f"w{i}": torch.ones(10) for i in range(7)}  # 40 bytes each
    folders = [save(tmp_path / name, state) for name in ("m", "n")]
    out = soupkit.average(folders, out=tmp_path / "soup", max_shard_size=100, progress=False)
    files = sorted(out.glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert sorted(len(load_file(path)) for path in files) == [2, 2, 2, 4]  # 80 bytes each, and 40 + 24 + 6 + 1
    for path in files:
        content = path.read_bytes()
        data_start = 8 + int.from_bytes(content[:8], "little")
        assert data_start % 8 == 0
        header = json.loads(content[8:data_start])
        for name, tensor in load_file(path).items():
            assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0
        assert sum(tensor.nbytes for tensor in load_file(path).values()) == len(content) - data_start <= 100


def test_uniform_average_of_two_folders_is_float64_rounded_once(tmp_path):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        states = [make_state(seed, dtype) for seed in (0, 1)]
        folders = [save(tmp_path / f"{dtype}{i}", state) for i, state in enumerate(states)]
        soup = soupkit.average(folders, progress=False)
        for name, tensor in soup.items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, ((states[0][name].double() + states[1][name].double()) / 2).to(dtype)), name


def test_the_output_folder(tmp_path):
    tokenizer = {"model": {"vocab": {"a": 0}}}
    folders = []
    for name, seed in (("a", 0), ("b", 1)):
        folder = save(tmp_path / name, make_state(seed))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "generation_config.json").write_text(json.dumps({"from": name}))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "optimizer.pt").write_bytes(b"x")
        (folder / "trainer_state.json").write_text("{}")
        folders.append(folder)
    out = soupkit.average(folders, [1, 3], out=tmp_path / "deep" / "soup", dtype=torch.bfloat16, progress=False)
    assert out == tmp_path / "deep" / "soup"
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "soup.json",
        "README.md",
    }
    assert {path.name for path in out.iterdir()} == expected | {"model.safetensors"}
    assert json.loads((out / "generation_config.json").read_text()) == {"from": "a"}
    assert json.loads((out / "config.json").read_text()) == CONFIG | {"torch_dtype": "bfloat16"}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    umask = os.umask(0)
    os.umask(umask)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    record = json.loads((out / "soup.json").read_text())
    content = (folders[1] / "model.safetensors").read_bytes()
    assert record["ingredients"][1] == {
        "folder": str(folders[1]),
        "role": "ingredient",
        "files": {
            "model.safetensors": {"bytes": len(content), "xxh3_tree": xxh3_tree(folders[1] / "model.safetensors")}
        },
    }
    entries = [{"model": str(folder), "weight": weight} for folder, weight in zip(folders, (1.0, 3.0), strict=True)]
    assert record["recipe"] == {"method": "linear", "models": entries, "dtype": "bfloat16"}
    assert record["files"].keys() == expected - {"soup.json", "README.md"} | {"model.safetensors"}
    assert record["files"]["tokenizer.json"]["bytes"] == (out / "tokenizer.json").stat().st_size
    assert record["dtype"] == "bfloat16"
    assert record["non_finite"] == {}
    assert record["soupkit"] == soupkit.__version__
    recipe = Recipe.from_dict(record["recipe"])
    assert soupkit.provenance(recipe) == {key: record[key] for key in ("soupkit", "recipe", "ingredients")}
    secure = soupkit.provenance(recipe, hash="sha256")["ingredients"][1]["files"]["model.safetensors"]
    assert secure == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert_same_bits(load(soupkit.merge(recipe, out=tmp_path / "twin", progress=False)), load(out))
    # A soup is an ingredient like any other, and its soup.json is not inherited.
    again = soupkit.average([out, tmp_path / "twin"], out=tmp_path / "again", progress=False)
    assert_same_bits(load(again), load(out))
    assert json.loads((again / "soup.json").read_text())["ingredients"][0]["folder"] == str(out)


def test_the_version_is_the_project_s():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{soupkit.__version__}"' in text


def test_non_finite_values_are_counted_in_the_record(tmp_path):
    states = [make_state(0), make_state(1)]
    states[1]["layer.1.weight"][2, :3] = torch.nan
    folders = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    with pytest.raises(MergeError, match=r"tensor 'layer.1.weight' of .*/m1 holds NaN or infinite values"):
        soupkit.average(folders, out=tmp_path / "soup", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1"]
    with pytest.warns(UserWarning, match="3 NaN or infinite values, in 'layer.1.weight'"):
        out = soupkit.average(folders, out=tmp_path / "soup", allow_nonfinite=True, progress=False)
    record = json.loads((out / "soup.json").read_text())
    assert record["non_finite"] == {
        "layer.1.weight": {"soup": 3, "models": dict(zip(map(str, folders), (0, 3), strict=True))}
    }
    assert load(out)["layer.1.weight"].isnan().sum() == 3


def test_how_many_tensors_slerp_moves_along_the_line_is_in_the_record(tmp_path):
    def beside(cosine: float) -> torch.Tensor:
        return torch.tensor([cosine, math.sqrt(1 - cosine**2)])

    unit = torch.tensor([1.0, 0.0])
    on_arcs = {"wide": torch.tensor([0.0, 2.0]), "just": beside(0.9994), "obtuse": beside(-0.9)}
    on_lines = {"close": beside(0.9996), "same": unit, "zero": torch.zeros(2), "opposite": -unit}
    copied = {"steps": torch.tensor([3]), "empty": torch.ones(0)}
    b = on_arcs | on_lines | copied
    a = {name: unit.clone() for name in on_arcs | on_lines} | copied
    folders = [save(tmp_path / "a", a), save(tmp_path / "b", b)]
    outs = [tmp_path / "half", tmp_path / "all"]
    soupkit.sweep(*folders, [0.5, 1.0], method="slerp", outs=outs, progress=False)
    for out in outs:
        record = json.loads((out / "soup.json").read_text())
        assert record["fallback"] == {"rule": soupkit.METHODS["slerp"].fallback.rule, "tensors": 4, "of": 7}
        line = "4 of 7 tensors took the straight line, for |cos θ| > 0.9995 and zeros"
        assert f"\n- {line}\n" in (out / "README.md").read_text(encoding="utf-8")
        assert soupkit.inspect(out).making[-1] == line
    merged = load(outs[0])
    assert torch.linalg.vector_norm(merged["just"]).item() == pytest.approx(1, abs=1e-7)  # on the circle
    assert torch.linalg.vector_norm(merged["close"]).item() == pytest.approx(math.sqrt((1 + 0.9996) / 2), abs=1e-7)
    soupkit.average(folders, out=tmp_path / "soup", progress=False)
    assert "fallback" not in json.loads((tmp_path / "soup" / "soup.json").read_text())


def test_an_existing_output_is_kept_unless_overwritten(pair, tmp_path):
    out = soupkit.average(pair, out=tmp_path / "soup", progress=False)
    (out / "old.txt").write_text("old")
    before = load(out)
    with pytest.raises(FileExistsError, match=r"soup exists: choose another output folder, or overwrite it"):
        soupkit.average(pair, [1, 0], out=out, progress=False)
    other = save(tmp_path / "other", {"w": torch.ones(1)})
    with pytest.raises(MergeError, match="different tensors"):
        soupkit.average([pair[0], other], out=out, overwrite=True, progress=False)
    assert_same_bits(load(out), before)
    soupkit.average(pair, [1, 0], out=out, overwrite=True, progress=False)
    assert_same_bits(load(out), make_state(0))
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_overwriting_without_a_system_call_to_swap_folders(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("soupkit.publish._exchange", lambda a, b: False)
    out = soupkit.average(pair, out=tmp_path / "soup", progress=False)
    soupkit.average(pair, [0, 1], out=out, overwrite=True, progress=False)
    assert_same_bits(load(out), make_state(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "soup"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_moved(pair, tmp_path, monkeypatch):
    out = soupkit.average(pair, [1, 0], out=tmp_path / "soup", progress=False)
    rename = Path.rename

    def refuse_partial(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no more moves")
        return rename(self, target)

    monkeypatch.setattr("soupkit.publish._exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OSError, match="no more moves"):
        soupkit.average(pair, [0, 1], out=out, overwrite=True, progress=False)
    assert_same_bits(load(out), make_state(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "soup"]


def test_a_failed_merge_leaves_nothing_and_loses_nothing(pair, tmp_path, monkeypatch):
    out = soupkit.average(pair, out=tmp_path / "soup", progress=False)
    before = load(out)

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr("soupkit.folder._write_companions", fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="disk on fire"):
            soupkit.average(pair, [0, 1], out=target, overwrite=True, progress=False)
    assert_same_bits(load(out), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "soup"]


def test_an_interrupt_right_after_the_folder_was_made_leaves_nothing(pair, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def interrupted(self: Path, *arguments, **options):
        mkdir(self, *arguments, **options)
        if ".partial-" in self.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        soupkit.average(pair, out=tmp_path / "soup", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_only_checkpoints_are_overwritten(pair, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (pair[0] / "checkpoint-500").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="thesis is not only a checkpoint"):
        soupkit.average(pair, out=tmp_path / "thesis", overwrite=True, progress=False)
    for overwrite in (True, False):
        with pytest.raises(FileExistsError, match="file is a file, and the output is a folder: choose another output"):
            soupkit.average(pair, out=tmp_path / "file", overwrite=overwrite, progress=False)
        with pytest.raises(FileExistsError, match=r"file is a file, so .*/file/a/soup cannot be written in it"):
            soupkit.average(pair, out=tmp_path / "file" / "a" / "soup", overwrite=overwrite, progress=False)
    with pytest.raises(
        FileExistsError, match=r"a is not only a checkpoint \(weights, no sub-folders but chat templates\)"
    ):
        soupkit.average([pair[1]], out=pair[0], overwrite=True, progress=False)
    with pytest.raises(FileExistsError, match="b is one of the models that are merged"):
        soupkit.average(pair, out=pair[1], overwrite=True, progress=False)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_outputs_inside_and_around_models_are_refused(pair, tmp_path, monkeypatch):
    base = save(tmp_path / "base", make_state(2))
    save(tmp_path / "group" / "fisher", make_state(3))
    (tmp_path / "link").symlink_to(pair[0])
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.setattr("soupkit.api.plan_folders", lambda *_: pytest.fail("work began"))
    monkeypatch.chdir(tmp_path)
    ties = Recipe("ties", pair, base=base, parameters={"weight": 1})
    weighted = Recipe("fisher", pair[:1], fishers=["group/fisher"])
    borrowed = Recipe("linear", pair[:1], tokenizer=str(base))
    for recipe, out, message in (
        (
            ties,
            pair[1] / "soup",
            f"{pair[1]}/soup lies inside {pair[1]}, which is merged: choose an output fold",
        ),
        (ties, "b/deep/soup", f"{pair[1]}/deep/soup lies inside {pair[1]}, which is merged"),
        (ties, "link/soup", f"{tmp_path}/link/soup lies inside {pair[0]}, which is merged"),
        (ties, "base/soup", f"{base}/soup lies inside {base}, which is merged"),
        (borrowed, "base/soup", f"{base}/soup lies inside {base}, which is merged"),
        (weighted, "group", f"{tmp_path}/group holds group/fisher, which is merged: choose an output folder that does"),
        (weighted, tmp_path, f"{tmp_path} holds {pair[0]}, which is merged"),
    ):
        for overwrite in (False, True):
            with pytest.raises(MergeError, match=f"^{re.escape(message)}"):
                soupkit.merge(recipe, out=out, overwrite=overwrite, progress=False)
    with pytest.raises(MergeError, match=r"a/soup lies inside .*/a, which is merged"):
        soupkit.greedy_soup(pair, lambda _: pytest.fail("work began"), out=pair[0] / "soup", progress=False)
    assert sorted(path for path in tmp_path.rglob("*")) == before


KILLED_MERGE = """
import sys, time
from dataclasses import replace
import soupkit

row = soupkit.METHODS["linear"]
def slowly(blocks, weight, normalize):
    time.sleep(0.2)
    return row.function(blocks, weight, normalize)
soupkit.METHODS["linear"] = replace(row, function=slowly)
soupkit.average(sys.argv[1:3], out=sys.argv[3], overwrite=True, progress=False)
"""


@pytest.mark.parametrize("replaces", [False, True])
def test_a_killed_merge_leaves_nothing_that_looks_finished(pair, tmp_path, replaces):
    out = tmp_path / "soup"
    if replaces:
        soupkit.average(pair, [1, 0], out=out, progress=False)
    child = subprocess.Popen([sys.executable, "-c", KILLED_MERGE, *map(str, pair), str(out)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".soup.partial-*/*.safetensors")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (leftover,) = tmp_path.glob(".soup.partial-*")
    if replaces:
        assert_same_bits(load(out), make_state(0))
    else:
        assert not out.exists()
    soupkit.average(pair, out=out, overwrite=True, progress=False)
    assert not leftover.exists()
    assert_same_bits(load(out), soupkit.average([make_state(0), make_state(1)]))


def test_a_partial_folder_of_a_running_process_is_left_alone(pair, tmp_path):
    running = tmp_path / f".soup.partial-{os.uname().nodename}-{os.getppid()}"
    elsewhere = tmp_path / ".soup.partial-another-host-1"
    running.mkdir()
    elsewhere.mkdir()
    soupkit.average(pair, out=tmp_path / "soup", progress=False)
    assert running.exists()
    assert elsewhere.exists()


PEAK_MEMORY = r"""
import re, sys
from pathlib import Path
import soupkit

def peak():  # not ru_maxrss: a child starts with its parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before, options = peak(), {"num_threads": 1, "progress": False}  # several threads peak together or not, by chance
soupkit.average(sys.argv[1:3], out=sys.argv[3], **options)
soupkit.interpolate(*sys.argv[1:3], 0.3, method="slerp", out=sys.argv[3] + "-slerp", **options)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_bounded_by_blocks_not_by_models_or_tensors(tmp_path):
    folders = [save(tmp_path / name, {"one": torch.full((40_000_000,), 0.5, dtype=torch.bfloat16)}) for name in "ab"]
    arguments = [*map(str, folders), str(tmp_path / "soup")]
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 35e6  # a model is 80 MB, and so is its one tensor
    shutil.rmtree(tmp_path)


def test_a_llama_survives_and_stays_tied(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    for tie in (True, False):
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tie,
        )
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(LlamaForCausalLM(config))
            models[-1].save_pretrained(tmp_path / f"{tie}{seed}")
        folders = [tmp_path / f"{tie}{seed}" for seed in (0, 1)]
        out = soupkit.average(folders, [0.25, 0.75], out=tmp_path / f"soup{tie}", progress=False)
        soup = AutoModelForCausalLM.from_pretrained(out)
        assert ("lm_head.weight" in load(out)) is not tie
        assert (soup.lm_head.weight is soup.model.embed_tokens.weight) is tie
        in_memory = soupkit.average(models, [0.25, 0.75])
        assert (in_memory.lm_head.weight is in_memory.model.embed_tokens.weight) is tie
        pairs = zip(soup.parameters(), in_memory.parameters(), *(model.parameters() for model in models), strict=True)
        for loaded, merged, a, b in pairs:
            assert torch.equal(loaded, merged)
            torch.testing.assert_close(loaded, 0.25 * a + 0.75 * b)


def write_tokenizer(folder: Path, vocabulary: object, **other: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []} | other))


def test_tokenizers_must_give_the_same_ids(pair):
    write_tokenizer(pair[0], {"a": 0, "b": 1}, truncation=None)
    write_tokenizer(pair[1], {"b": 1, "a": 0}, truncation={"max_length": 5})  # the same ids: fine
    soupkit.average(pair, progress=False)
    write_tokenizer(pair[1], [["a", -1.0], ["b", -2.0]])  # ids by position: fine too
    soupkit.average(pair, progress=False)
    write_tokenizer(pair[1], {"a": 0, "b": 2})
    with pytest.raises(MergeError, match=r"tokenizers of .*/a and .*/b differ \(token 'b' has id 1 and 2\)"):
        soupkit.average(pair, progress=False)
    write_tokenizer(pair[1], {"a": 0, "b": 1}, added_tokens=[{"content": "<eos>", "id": 2}])
    with pytest.raises(MergeError, match=r"token '<eos>' has id none and 2"):
        soupkit.average(pair, progress=False)
    write_tokenizer(pair[1], {"a": 0, "b": 1}, model={"vocab": {"a": 0, "b": 1}, "merges": ["a b"]})
    with pytest.raises(MergeError, match=r"differ \(merges of tokenizer.json\)"):
        soupkit.average(pair, progress=False)
    (pair[1] / "tokenizer.json").unlink()
    for folder, content in zip(pair, (b"x", b"y"), strict=True):
        (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(MergeError, match=r"differ \(tokenizer.model\)"):
        soupkit.average(pair, progress=False)


def test_configs_must_mean_the_same(tmp_path, pair):
    for key, value in (("vocab_size", 12), ("model_type", "other")):
        other = save(tmp_path / key, make_state(2), config=CONFIG | {key: value})
        with pytest.raises(MergeError, match=f"config.json disagrees: {key} is {CONFIG[key]} in .*/a and {value} in"):
            soupkit.average([pair[0], other], progress=False)


def damage(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)


def test_bad_folders_are_told_in_one_line(tmp_path, pair, monkeypatch):
    good = pair[0]
    empty, pickled, adapter, sharded = (tmp_path / name for name in ("empty", "pickled", "adapter", "sharded"))
    for folder, file in ((empty, "README.md"), (pickled, "pytorch_model.bin"), (adapter, "adapter_model.safetensors")):
        folder.mkdir()
        (folder / file).write_bytes(b"")
    save(sharded, make_state(0), shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    unknown = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 4]}}).encode()
    for name, content in {
        "short": b"abc",
        "long": (10**9).to_bytes(8, "little") + b"{}",
        "lying": len(header).to_bytes(8, "little") + header + b"12345678",
        "text": b"\x05" + bytes(7) + b"hello",
        "unknown": len(unknown).to_bytes(8, "little") + unknown + b"1234",
        "hollow": b"\x02" + bytes(7) + b"{}",
    }.items():
        (tmp_path / name).mkdir()
        damage(tmp_path / name, content)
    cases = {
        empty: r"empty has no model.safetensors \(nor .*\); found README.md: give a checkpoint folder",
        pickled: r"pickled holds pickled weights \(pytorch_model.bin\), which can run code .*save_pretrained",
        adapter: r"adapter is a LoRA adapter: merge it into its base model",
        sharded: r"model-00002-of-00002.safetensors is missing, though its index names it",
        tmp_path / "nowhere": r"nowhere does not exist: give a checkpoint folder, or a hub id",
        good / "model.safetensors": r"model.safetensors is a file: give the checkpoint folder that holds it",
        "no-such-org/no-such-model": r"no-such-org/no-such-model is no folder here, and the hub could not provide it",
        tmp_path / "short": r"short/model.safetensors is damaged",
        tmp_path / "long": r"long/model.safetensors is damaged",
        tmp_path / "lying": r"lying/model.safetensors is damaged \(bytes 0 to 4 do not hold a tensor \[2\] of F32\)",
        tmp_path / "text": r"text/model.safetensors is damaged",
        tmp_path / "unknown": r"unknown/model.safetensors: tensor 'w' has dtype 'F4', which is not read here",
        tmp_path / "hollow": r"hollow holds no tensors",
    }
    for folder, message in cases.items():
        with pytest.raises(MergeError, match=message) as caught:
            soupkit.average([good, folder], out=tmp_path / "soup", progress=False)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "soup").exists()


def test_a_mistyped_path_is_not_looked_for_on_the_hub(pair, monkeypatch):
    asked = []
    monkeypatch.setattr("soupkit.checkpoint._download", lambda hub_id: asked.append(hub_id) or pair[1])
    monkeypatch.chdir(pair[0].parent)
    Path("runs").mkdir()
    for path in ("runs/sft9", "./sft9"):
        with pytest.raises(MergeError, match=f"^{path} does not exist: give a checkpoint folder, or a hub id"):
            soupkit.average([pair[0], path], progress=False)
    soupkit.average([pair[0], "org/name"], progress=False)
    assert asked == ["org/name"]


def test_chat_templates_of_a_sub_folder_come_along(pair, tmp_path):
    templates = pair[0] / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ tools }}")
    out = soupkit.average(pair, out=tmp_path / "soup", sync=True, progress=False)
    copy = out / "additional_chat_templates" / "tool.jinja"
    assert copy.read_text() == "{{ tools }}"
    assert "additional_chat_templates/tool.jinja" in json.loads((out / "soup.json").read_text())["files"]
    assert soupkit.verify(out, progress=False).ok
    copy.write_text("{{ fools }}")
    (templates / "more.jinja").write_text("")
    assert soupkit.verify(out, progress=False).soup.problems[f"{templates.name}/tool.jinja"].startswith("changed")
    soupkit.average(pair, out=out, overwrite=True, progress=False)
    assert copy.read_text() == "{{ tools }}"
    (copy.parent / "x.jinja").write_text("")
    assert soupkit.verify(out, progress=False).soup.extra == (f"{templates.name}/x.jinja",)


def test_an_index_must_match_its_shards(tmp_path):
    folder = save(tmp_path / "m", make_state(0), shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["one"]
    index.write_text(json.dumps(content))
    with pytest.raises(MergeError, match="'one' is not in both the index and the shards"):
        soupkit.average([folder], progress=False)
    index.write_text("{}")
    with pytest.raises(MergeError, match=r"index.json has no weight_map"):
        soupkit.average([folder], progress=False)
    index.write_text("{")
    with pytest.raises(MergeError, match=r"index.json is not valid JSON"):
        soupkit.average([folder], progress=False)


def test_a_full_disk_is_found_before_the_first_tensor(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(MergeError, match=r"has 0 B free, and the soup takes [\d.]+ MB: free some space"):
        soupkit.average(pair, out=tmp_path / "soup", progress=False)
    one = sum(path.stat().st_size for path in pair[0].glob("*.safetensors"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(one, 0, 2 * one))
    with pytest.raises(MergeError, match=r"and the soups up to z take"):
        soupkit.sweep(*pair, [0.2, 0.5, 0.8], outs=[tmp_path / name for name in "xyz"], progress=False)


def test_the_progress_bar_is_on_stderr_and_can_be_turned_off(pair, capsys):
    soupkit.average(pair, progress=False)
    assert capsys.readouterr() == ("", "")
    soupkit.average(pair)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "linear" in captured.err
    assert "100%" in captured.err


def test_the_record_of_mixed_dtypes_makes_the_same_again(tmp_path):
    states = [{"w": torch.randn(9).bfloat16(), "norm": torch.randn(3), "mask": torch.ones(99, dtype=torch.bool)}] * 2
    folders = [save(tmp_path / name, state) for name, state in zip("ab", states, strict=True)]
    out = soupkit.average(folders, out=tmp_path / "soup", progress=False)
    record = json.loads((out / "soup.json").read_text())
    assert record["dtype"] == json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = soupkit.merge(Recipe.from_dict(record["recipe"]), out=tmp_path / "again", progress=False)
    assert_same_bits(load(again), load(out))


def test_a_process_writes_a_folder_once_at_a_time(pair, tmp_path):
    with (
        published_folder(tmp_path / "soup", overwrite=False),
        pytest.raises(FileExistsError, match="is being written by this process already"),
    ):
        soupkit.average(pair, out=tmp_path / "soup", progress=False)

"""How long merges of checkpoint folders take, and how much memory: soupkit, copying the same bytes, and mergekit.

    python benchmarks/merge.py make models                  # once: four checkpoints of 2.2 GB
    python benchmarks/merge.py run models --output results.json --mergekit-python mergekit-venv/bin/python
    python benchmarks/merge.py import --output results.json
    python benchmarks/merge.py nonfinite models --output results.json
    python benchmarks/merge.py table results.json --into benchmarks/README.md

Every run is a process of its own, started from this one, which loads neither torch nor soupkit: a child's peak memory
as the kernel reports it is never less than its parent's. benchmarks/README.md says what is measured and why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from measuring import (
    MB,
    Record,
    add_command,
    add_result,
    column,
    goal_cell,
    machine,
    machine_text,
    markdown,
    measured,
    megabytes_cell,
    ratio,
    ratio_cell,
    read_results,
    replace_between,
    run_command,
    save,
    say,
    seconds_cell,
    spread,
    versions_of,
    write_json,
)

THIS = Path(__file__).resolve()

COPY_BLOCK = 4 * 2**20  # bytes per read and write of the copy floor
DRAW = 2**22  # random numbers drawn at a time: what a made checkpoint needs in memory
NUM_SHARDS = 5
BASE_SPREAD, TUNING_SPREAD = 0.02, 0.002  # standard deviations of the base, and of what a fine-tuning adds

MEMORY_GOAL, RESIDENT_GOAL = 300 * MB, 1000 * MB
IMPORT_GOAL = 0.3  # seconds beyond ``import torch``
CHECK_GOAL = 1.05  # time with the check for NaN over the time without

MEASURED = ("floor", "floor_fsync", "import", "soupkit", "soupkit_sync", "mergekit")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Case:
    """A merge to time. The first model made is the base where there is one."""

    method: str
    num_models: int  # with the base
    base: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the whole merge
    own: Mapping[str, Any] = field(default_factory=dict)  # of each model
    floor_goal: float = 4.0  # time after imports, at most so many times the copy floor
    mergekit_goal: float | None = None  # mergekit's time, at least so many times ours
    slow: bool = False  # in mergekit: minutes


THIRD = {"weight": 1 / 3}
SPARSE = THIRD | {"density": 0.5}

CASES = {
    "average2": Case("linear", 2, own={"weight": 0.5}, floor_goal=1.5, mergekit_goal=6),
    "average4": Case("linear", 4, own={"weight": 0.25}, floor_goal=1.5),
    "slerp2": Case("slerp", 2, parameters={"t": 0.5}, floor_goal=1.5, mergekit_goal=6),
    "task_arithmetic": Case("task_arithmetic", 4, base=True, own=THIRD, mergekit_goal=6),
    "model_stock": Case("model_stock", 4, base=True, mergekit_goal=6),
    "ties": Case("ties", 4, base=True, own=SPARSE, mergekit_goal=20, slow=True),
    "dare_ties": Case("dare_ties", 4, base=True, own=SPARSE, mergekit_goal=10, slow=True),
    "della": Case("della", 4, base=True, own=SPARSE, mergekit_goal=10, slow=True),
    "dare_linear": Case("dare_linear", 4, base=True, own=SPARSE, slow=True),
    "della_linear": Case("della_linear", 4, base=True, own=SPARSE, slow=True),
    "breadcrumbs": Case("breadcrumbs", 4, base=True, own=SPARSE, slow=True),
    "breadcrumbs_ties": Case("breadcrumbs_ties", 4, base=True, own=SPARSE, slow=True),
    "sce": Case("sce", 4, base=True, parameters={"select_topk": 0.5}, slow=True),
    "karcher": Case("karcher", 4, slow=True),
    "nuslerp": Case("nuslerp", 2, own={"weight": 0.5}, slow=True),
    "multislerp": Case("multislerp", 4, own={"weight": 0.25}, slow=True),
    "nearswap": Case("nearswap", 2, base=True, parameters={"t": 0.001}, slow=True),
    "arcee_fusion": Case("arcee_fusion", 2, base=True, slow=True),
}
WITH_GOALS = ("average2", "average4", "slerp2", "task_arithmetic", "model_stock", "ties", "dare_ties", "della")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what cannot be measured, told in one line on stderr."""
    return run_command(_parser(), arguments)


# --- the checkpoints ---


@dataclass(frozen=True)
class Shape:
    """A Llama: its sizes, under the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order of the model."""
        wide, inner = self.hidden_size, self.intermediate_size
        keys = wide // self.num_attention_heads * self.num_key_value_heads
        layer = {
            "input_layernorm": (wide,),
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (keys, wide),
            "self_attn.v_proj": (keys, wide),
            "self_attn.o_proj": (wide, wide),
            "post_attention_layernorm": (wide,),
            "mlp.gate_proj": (inner, wide),
            "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner),
        }
        layers = {
            f"model.layers.{index}.{name}.weight": shape
            for index in range(self.num_hidden_layers)
            for name, shape in layer.items()
        }
        vocabulary = (self.vocab_size, wide)
        ends = {"model.norm.weight": (wide,), "lm_head.weight": vocabulary}
        return {"model.embed_tokens.weight": vocabulary} | layers | ends

    def config(self) -> dict[str, Any]:
        names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
        return names | vars(self) | {"max_position_embeddings": 2048, "tie_word_embeddings": False}


LARGE = Shape(2048, 5632, 22, 32, 4, 32000)  # as TinyLlama: 1.1 billion parameters, 201 tensors
SMALL = Shape(128, 352, 4, 4, 2, 1000)  # 2 MB, to try the benchmark itself


def make(options: argparse.Namespace) -> None:
    """Write the checkpoints that are not there yet."""
    for index in range(options.num):
        folder = options.folder / f"m{index}"
        if folder.exists():
            say(f"{folder} is there already")
            continue
        partial = options.folder / f".m{index}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_checkpoint(partial, SMALL if options.small else LARGE, index)
        partial.rename(folder)
        say(f"made {folder}")


def _write_checkpoint(folder: Path, shape: Shape, index: int) -> None:
    """Model 0 is the base; the others are the base plus little. In bfloat16, cut into shards of about equal size."""
    tensors = shape.tensors()
    ends = list(accumulate(2 * math.prod(size) for size in tensors.values()))
    shard_of = {name: NUM_SHARDS * (end - 1) // ends[-1] for name, end in zip(tensors, ends, strict=True)}
    files = {name: f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors" for name, shard in shard_of.items()}
    for file in sorted(set(files.values())):
        _write_shard(folder / file, {name: size for name, size in tensors.items() if files[name] == file}, index)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": ends[-1]}, "weight_map": files})
    write_json(folder / "config.json", shape.config())


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], index: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        num_bytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in tensors.items():
            for block in _random_weights(name, math.prod(shape), index):
                file.write(block)


def _random_weights(name: str, num_elements: int, index: int) -> Iterator[memoryview]:
    """The bytes of a tensor, a few million elements at a time; what they are depends on name and model alone."""
    import torch

    def generator(model: int) -> torch.Generator:
        seed = int.from_bytes(sha256(f"{name} {model}".encode()).digest()[:7], "little")
        return torch.Generator().manual_seed(seed)

    of_base, of_tuning = generator(0), generator(index)
    for start in range(0, num_elements, DRAW):
        size = min(DRAW, num_elements - start)
        weights = (torch.randn(size, generator=of_base) * BASE_SPREAD).bfloat16()
        if index:
            weights = (weights + torch.randn(size, generator=of_tuning) * TUNING_SPREAD).bfloat16()
        yield weights.view(torch.uint8).numpy().data


# --- one process, measured ---


def copy(options: argparse.Namespace) -> None:
    """The floor, run as a child: read every input, write as many bytes as the first one has, and print the time."""
    started = time.perf_counter()
    options.output.mkdir()
    buffer = memoryview(bytearray(COPY_BLOCK))
    for folder in options.inputs:
        for path in _weight_files(folder):
            target = options.output / path.name if folder == options.inputs[0] else None
            _copy_file(path, target, buffer, options.fsync)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def _copy_file(path: Path, target: Path | None, buffer: memoryview, fsync: bool) -> None:
    with path.open("rb", buffering=0) as source, (target or Path(os.devnull)).open("wb", buffering=0) as sink:
        while num_read := source.readinto(buffer):
            if target:
                sink.write(buffer[:num_read])
        if target and fsync:
            os.fsync(sink.fileno())


def launch(options: argparse.Namespace) -> None:
    """A merge, run as a child: print its time without imports."""
    import soupkit.__main__

    if options.unchecked:
        switch_off_non_finite_check()
    started = time.perf_counter()
    code = soupkit.__main__.main([*_soupkit_arguments(options.recipe, options.output), *["--sync"][: options.sync]])
    print(json.dumps({"seconds": time.perf_counter() - started}))
    if code:
        raise ValueError(f"the merge ended with code {code}")


def switch_off_non_finite_check() -> None:
    """Make soupkit, in this process, take every block for finite without a look."""
    import soupkit.blocks

    if not hasattr(soupkit.blocks, "_sums_are_finite"):
        raise ValueError("soupkit.blocks has no _sums_are_finite: say here what checks for NaN instead")
    soupkit.blocks._sums_are_finite = lambda blocks: True


def _soupkit_arguments(recipe: Path, output: Path) -> list[str]:
    return ["merge", str(recipe), "--out", str(output), "--quiet"]


# --- rounds of runs ---


def run(options: argparse.Namespace) -> None:
    """Time the cases, in interleaved rounds, and save what is there after each round."""
    cases = {name: CASES[name] for name in options.cases}
    folders = _model_folders(options.folder, max(case.num_models for case in cases.values()))
    results = _results(options.output, options.resume, _setting(folders, options.mergekit_python))
    from_disk = _warm_up(folders)
    say(f"page cache warm: {from_disk / MB:.0f} MB had to be read from disk")
    for name, case in cases.items():
        entry = results["cases"].setdefault(name, {"recipe": _recipe(case, []), "rounds": []})
        if entry["recipe"] != _recipe(case, []):
            raise ValueError(f"{options.output} holds another recipe for {name}: choose another --output")
        for index in range(len(entry["rounds"]), options.repeats):
            usual = 1 if case.slow else options.repeats
            most = usual if options.mergekit_repeats is None else options.mergekit_repeats
            python = options.mergekit_python if index < most else None
            entry["rounds"].append(_round(name, case, folders, index, python))
            entry["summary"] = summary(entry["rounds"])
            save(options.output, results)
    say(f"all in {options.output}; next: python benchmarks/merge.py table {options.output}")


def _round(
    name: str, case: Case, folders: Sequence[Path], index: int, mergekit_python: Path | None
) -> dict[str, Record]:
    """One run of everything. The order turns by one from round to round."""
    inputs = folders[: case.num_models]
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=inputs[0].parent) as scratch:
        output = Path(scratch) / "output"
        recipe, theirs = Path(scratch) / "recipe.yaml", Path(scratch) / "mergekit.yaml"
        # JSON is YAML too.
        write_json(recipe, _recipe(case, inputs))
        write_json(theirs, _mergekit_recipe(case, inputs))
        python: list[str | Path] = [sys.executable, "-P"]  # whatever lies in the working directory
        floor: list[str | Path] = [sys.executable, "-S", THIS, "copy", *inputs, "--output", output]
        commands: dict[str, list[str | Path]] = {
            "floor": floor,
            "floor_fsync": [*floor, "--fsync"],
            "import": [*python, "-c", "import soupkit"],
            "soupkit": [*python, "-m", "soupkit", *_soupkit_arguments(recipe, output)],
            "soupkit_sync": [sys.executable, THIS, "launch", recipe, "--output", output, "--sync"],
        }
        if mergekit_python:
            options = ["--no-copy-tokenizer", "--random-seed", "0", "--quiet"]
            commands["mergekit"] = [mergekit_python, "-m", "mergekit.scripts.run_yaml", theirs, output, *options]
        turn = index % len(commands)
        records = {}
        for what in [*commands][turn:] + [*commands][:turn]:
            records[what] = _fresh_run(commands[what], output, inputs)
            if what != "import":
                _require_as_large(output, inputs[0], what)
            say(f"{name} round {index + 1}: {what:<17}{_told(records[what])}")
    return {what: records[what] for what in commands}


def _fresh_run(command: Sequence[str | Path], output: Path, inputs: Sequence[Path]) -> Record:
    """Measure a command when nothing is left over from the one before: no output, no pages waiting to be written.

    The inputs are read once more: what has not been used for a while is not in memory for sure.
    """
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    _warm_up(inputs)
    record, text = measured(command)
    with suppress(ValueError, IndexError, TypeError):
        # A child of ours that times its work proper, without the start of Python and its imports.
        record |= {"process_seconds": record["seconds"], "seconds": json.loads(text.splitlines()[-1])["seconds"]}
    return record


def _require_as_large(output: Path, model: Path, what: str) -> None:
    """A run that writes less than a model has not done the work; headers may differ a little."""
    written, expected = _num_bytes(output), _num_bytes(model)
    if abs(written - expected) > 0.01 * expected + 10**5:
        raise ValueError(f"{what} wrote {written} bytes of weights where a model has {expected}: nothing to compare")


def _recipe(case: Case, inputs: Sequence[Path]) -> dict[str, Any]:
    """The case as a recipe of ours; without inputs, what it says beside them."""
    base = {"base": str(inputs[0])} if case.base and inputs else {}
    models = [{"model": str(path), **case.own} for path in inputs[1 if case.base else 0 :]]
    rest = {"parameters": dict(case.parameters)} if case.parameters else {}
    return {"method": case.method} | base | ({"models": models} if inputs else {"model": dict(case.own)}) | rest


def _mergekit_recipe(case: Case, inputs: Sequence[Path]) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": dict(case.own)} for path in inputs[1 if case.base else 0 :]]
    # slerp has two models, one of which must be called the base: the one at t = 0.
    base = {"base_model": str(inputs[0])} if case.base or case.method == "slerp" else {}
    return {"merge_method": case.method, "models": models, "parameters": dict(case.parameters)} | base


def _model_folders(folder: Path, num: int) -> list[Path]:
    folders = [(folder / f"m{index}").resolve() for index in range(num)]
    for path in folders:
        if not path.is_dir():
            raise ValueError(f"{path} does not exist: run `python benchmarks/merge.py make {folder} --num {num}` first")
    return folders


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _weight_files(folder))


def _warm_up(folders: Sequence[Path]) -> int:
    """Bring the inputs into the page cache. Returns the number of bytes that were not in it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    buffer = memoryview(bytearray(COPY_BLOCK))
    for folder in folders:
        for path in _weight_files(folder):
            _copy_file(path, None, buffer, fsync=False)
    return 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before)


# --- other measurements ---


def compare_imports(options: argparse.Namespace) -> None:
    """Time ``import torch`` and ``import soupkit`` in turns."""
    seconds: dict[str, list[float]] = {"torch": [], "soupkit": []}
    commands = {name: [sys.executable, "-c", f"import {name}"] for name in seconds}
    for command in commands.values():
        measured(command)  # compiled and in the page cache from here on
    for _ in range(options.repeats):
        for name, command in commands.items():
            seconds[name].append(measured(command)[0]["seconds"])
    beyond = [ours - torchs for ours, torchs in zip(seconds["soupkit"], seconds["torch"], strict=True)]
    entry = {"beyond_torch": spread(beyond)} | {name: spread(values) for name, values in seconds.items()}
    add_result(options.output, "import", entry)
    print("\n".join(_import_table(entry)))


def compare_checks(options: argparse.Namespace) -> None:
    """Time merges with the check for NaN and infinite values and without it, in turns."""
    entry: dict[str, Record] = {}
    for name in options.cases:
        inputs = _model_folders(options.folder, CASES[name].num_models)
        _warm_up(inputs)
        pairs = [_pair(name, inputs, index) for index in range(options.repeats)]
        ratios = [pair["checked"] / pair["unchecked"] for pair in pairs]
        columns = {key: spread([pair[key] for pair in pairs]) for key in ("checked", "unchecked")}
        entry[name] = columns | {"ratio": spread(ratios)}
    add_result(options.output, "non_finite_check", entry)
    print("\n".join(_check_table(entry)))


def _pair(name: str, inputs: Sequence[Path], index: int) -> dict[str, float]:
    """Seconds after imports with the check and without; which one is first alternates."""
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=inputs[0].parent) as scratch:
        output, recipe = Path(scratch) / "output", Path(scratch) / "recipe.yaml"
        write_json(recipe, _recipe(CASES[name], inputs))
        command: list[str | Path] = [sys.executable, THIS, "launch", recipe, "--output", output]
        commands = {"checked": command, "unchecked": [*command, "--unchecked"]}
        seconds = {}
        for what in ("checked", "unchecked") if index % 2 else ("unchecked", "checked"):
            record = _fresh_run(commands[what], output, inputs)
            seconds[what] = record["seconds"]
            say(f"{name} pair {index + 1}: {what:<10}{_told(record)}")
    return seconds


# --- results ---


def summary(rounds: Sequence[Mapping[str, Record]]) -> Record:
    """What a case's rounds come to: the spread of each measurement, and ratios.

    Each ratio comes twice: as the spread of the rounds' own ratios, whose median the tables show, and as the ratio of
    the two medians. ``after_imports`` is the whole process less ``import soupkit`` in the same round. The goals are for
    ``floor`` (ours after imports over the copy) and ``mergekit`` (its process over ours).
    """
    derived = [
        {what: record["seconds"] for what, record in records.items()}
        | {"after_imports": records["soupkit"]["seconds"] - records["import"]["seconds"]}
        for records in rounds
    ]
    ratios = {
        "floor": ("after_imports", "floor"),
        "sync": ("soupkit_sync", "floor_fsync"),
        "process_floor": ("soupkit", "floor"),
        "mergekit": ("mergekit", "soupkit"),
    }
    present = {key for times in derived for key in times}
    return {
        "seconds": {key: spread(column(derived, key)) for key in (*MEASURED, "after_imports") if key in present},
        "ratios": {name: ratio(derived, *pair) for name, pair in ratios.items() if set(pair) <= present},
        "bytes": {
            key: {what: max(column([r.get(what, {}) for r in rounds], key)) for what in MEASURED if what in present}
            for key in ("resident_bytes", "anonymous_bytes", "disk_bytes")
        },
    }


def _setting(folders: Sequence[Path], mergekit_python: Path | None) -> Record:
    """What the results depend on beside the cases: machine, versions, models. Names no machine and no folder."""
    versions = {"python": platform.python_version(), "torch": version("torch"), "soupkit": version("soupkit-rlhf")}
    if mergekit_python:
        found = versions_of(mergekit_python, ("mergekit", "torch", "transformers"))
        versions |= dict(zip(("mergekit", "its torch", "its transformers"), found, strict=True))
    tensors = json.loads((folders[0] / "model.safetensors.index.json").read_text())["weight_map"]
    return {
        "machine": machine() | {"file_system": _file_system(folders[0])},
        "versions": versions,
        "models": {"bytes": _num_bytes(folders[0]), "tensors": len(tensors), "shards": len(_weight_files(folders[0]))},
    }


def _file_system(folder: Path) -> str:
    """The type of the file system that the folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def _results(path: Path, resume: bool, setting: Record) -> Record:
    """The results to add to: those in the file, or new ones."""
    if not path.exists():
        return setting | {"cases": {}}
    if not resume:
        raise ValueError(f"{path} exists: choose another --output, or go on with it (--resume)")
    results = read_results(path)
    if "cases" not in results:
        return results | setting | {"cases": {}}
    for key, value in setting.items():
        if results[key] != value:
            raise ValueError(f"{path} was measured with {key} {results[key]}, and here is {value}: start a new file")
    return results


def _told(record: Record) -> str:
    resident, own, disk = (record[f"{key}_bytes"] / MB for key in ("resident", "anonymous", "disk"))
    return f"{record['seconds']:8.2f} s, {resident:6.0f} MB resident, {own:6.0f} MB own, {disk:4.0f} MB from disk"


# --- tables ---


def table(options: argparse.Namespace) -> None:
    """Print the results as Markdown, or put them where a file has its tables."""
    text = "\n".join(tables(read_results(options.results)))
    if options.into:
        replace_between(options.into, BEGIN, END, text)
    else:
        print(text)


def tables(results: Record) -> list[str]:
    """All tables of a results file, as lines of Markdown."""
    lines: list[str] = []
    if results.get("cases"):
        cases = {name: entry["summary"] for name, entry in results["cases"].items() if "summary" in entry}
        lines += [_setting_line(results), ""]
        for title, rows in (("Ratios", _ratio_table), ("Times", _time_table), ("Memory", _memory_table)):
            lines += [f"### {title}", "", *rows(cases), ""]
    for title, key, format_entry in (
        ("Import", "import", _import_table),
        ("Check for NaN and infinite values", "non_finite_check", _check_table),
    ):
        if key in results:
            lines += [f"### {title}", "", *format_entry(results[key]), ""]
    return lines[:-1]


def _setting_line(results: Record) -> str:
    models = results["models"]
    versions = ", ".join(f"{name} {text}" for name, text in results["versions"].items())
    return (
        f"{machine_text(results['machine'])}, {results['machine']['file_system']}; {versions}. Models: "
        f"{models['bytes'] / MB:.0f} MB each in {models['tensors']} tensors and {models['shards']} files."
    )


def _ratio_table(cases: Mapping[str, Record]) -> list[str]:
    rows = []
    for name, entry in cases.items():
        case, ratios = CASES[name], entry["ratios"]
        floor = ratios["floor"]
        # A merge that is lost in the spread of the imports has not been measured.
        met = goal_cell(floor["median"], case.floor_goal, at_most=True) if floor["min"] > 0 else "too short to tell"
        row = [name, ratio_cell(floor), met]
        row += [ratio_cell(ratios["sync"]), ratio_cell(ratios["process_floor"])]
        if "mergekit" in ratios:
            theirs, goal = ratios["mergekit"], case.mergekit_goal
            row += [ratio_cell(theirs), "" if goal is None else goal_cell(theirs["median"], goal)]
        else:
            row += ["", ""]
        rows.append(row)
    head = ["merge", "× floor", "goal", "both with fsync", "whole process × floor"]
    return markdown([*head, "mergekit ÷ soupkit", "goal"], rows)


def _time_table(cases: Mapping[str, Record]) -> list[str]:
    columns = {
        "floor": "floor",
        "floor_fsync": "floor + fsync",
        "soupkit": "soupkit",
        "import": "of it import",
        "soupkit_sync": "merge with --sync",
        "mergekit": "mergekit",
    }
    rows = [
        [name, *(seconds_cell(entry["seconds"][key]) if key in entry["seconds"] else "" for key in columns)]
        for name, entry in cases.items()
    ]
    return markdown(["merge (s)", *columns.values()], rows)


def _memory_table(cases: Mapping[str, Record]) -> list[str]:
    rows = []
    for name, entry in cases.items():
        own, resident, disk = (entry["bytes"][f"{key}_bytes"] for key in ("anonymous", "resident", "disk"))
        row = [name, megabytes_cell(own["soupkit"]), goal_cell(own["soupkit"], MEMORY_GOAL, at_most=True, unit=MB)]
        row += [
            megabytes_cell(resident["soupkit"]),
            goal_cell(resident["soupkit"], RESIDENT_GOAL, at_most=True, unit=MB),
        ]
        row += [megabytes_cell(sizes["mergekit"]) if "mergekit" in sizes else "" for sizes in (own, resident)]
        row.append(megabytes_cell(max(disk.values())))
        rows.append(row)
    head = ["merge (MB)", "own", "goal", "resident", "goal", "mergekit own", "mergekit resident", "read from disk"]
    return markdown(head, rows)


def _import_table(entry: Record) -> list[str]:
    beyond = entry["beyond_torch"]
    row = [f"{entry['torch']['num']} pairs", *map(seconds_cell, (entry["torch"], entry["soupkit"], beyond))]
    head = ["import (s)", "torch", "soupkit", "soupkit beyond torch", "goal"]
    return markdown(head, [[*row, goal_cell(beyond["median"], IMPORT_GOAL, at_most=True)]])


def _check_table(entry: Record) -> list[str]:
    rows = [
        [
            name,
            seconds_cell(columns["checked"]),
            seconds_cell(columns["unchecked"]),
            f"{columns['ratio']['median']:.3f} ({columns['ratio']['min']:.3f}–{columns['ratio']['max']:.3f})",
            goal_cell(columns["ratio"]["median"], CHECK_GOAL, at_most=True),
        ]
        for name, columns in entry.items()
    ]
    return markdown(["merge (s)", "with the check", "without", "ratio of the pairs", "goal"], rows)


# --- the command line ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/merge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, "make", make, "write random Llama checkpoints in bfloat16, in five shards each")
    command.add_argument("folder", type=Path, metavar="DIR", help="they become DIR/m0 (the base), DIR/m1, ...")
    command.add_argument("--num", type=int, default=4, help="how many (default: %(default)s)")
    command.add_argument("--small", action="store_true", help="2 MB each instead of 2.2 GB, to try things out")

    command = add_command(commands, "run", run, "time merges against copying and against mergekit")
    command.add_argument("folder", type=Path, metavar="DIR", help="checkpoints as `make` writes them")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="results, as JSON")
    command.add_argument("--resume", action="store_true", help="keep the rounds that are in FILE, run those missing")
    command.add_argument(
        "--cases", nargs="+", choices=CASES, default=WITH_GOALS, metavar="CASE",
        help=f"of {', '.join(CASES)} (default: the first {len(WITH_GOALS)}, for which there are goals)",
    )  # fmt: skip
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    command.add_argument("--mergekit-python", type=Path, metavar="PATH", help="a Python that has mergekit installed")
    command.add_argument(
        "--mergekit-repeats", type=int, metavar="N",
        help="rounds with mergekit (default: 1 for the merges that take it minutes, all for the others)",
    )  # fmt: skip

    command = add_command(commands, "import", compare_imports, "time `import soupkit` beyond `import torch`")
    command.add_argument("--repeats", type=int, default=10, metavar="N", help="pairs (default: %(default)s)")
    command.add_argument("--output", type=Path, metavar="FILE", help="results file to add to")

    command = add_command(commands, "nonfinite", compare_checks, "what the check for NaN and infinite values costs")
    command.add_argument("folder", type=Path, metavar="DIR", help="checkpoints as `make` writes them")
    command.add_argument("--cases", nargs="+", choices=CASES, default=["average2", "ties"], metavar="CASE")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs (default: %(default)s)")
    command.add_argument("--output", type=Path, metavar="FILE", help="results file to add to")

    command = add_command(commands, "table", table, "show results as Markdown, the goals beside them")
    command.add_argument("results", type=Path, metavar="FILE")
    command.add_argument("--into", type=Path, metavar="README", help=f"put them between {BEGIN} and {END} instead")

    command = add_command(commands, "copy", copy, "(a child of run) the copy floor")
    command.add_argument("inputs", type=Path, nargs="+")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--fsync", action="store_true", help="wait until the copy is on disk")

    command = add_command(commands, "launch", launch, "(a child of run and nonfinite) one merge, timed inside")
    command.add_argument("recipe", type=Path)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--sync", action="store_true", help="wait until the soup is on disk")
    command.add_argument("--unchecked", action="store_true", help="do not look for NaN and infinite values")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""python -m soupkit: the same soups from the command line, one-line errors, and a light import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soupkit import METHODS
from soupkit.__main__ import main


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 8.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value, 0.0])}, tmp_path / name / "model.safetensors")
    return [str(tmp_path / name) for name in "abc"]


def weights_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["w"]


def test_average(folders, tmp_path, capsys):
    out = tmp_path / "soup"
    assert main(["average", *folders, "--out", str(out)]) == 0
    assert weights_of(out).tolist() == [4.0, 0.0]
    assert capsys.readouterr().out == f"{out}\n"
    options = [
        "--weights",
        "2",
        "1",
        "1",
        "--dtype",
        "bfloat16",
        "--overwrite",
        "--max-shard-size",
        "5000000000",
        "--quiet",
    ]
    assert main(["average", *folders, *options, "--out", str(out)]) == 0
    assert weights_of(out).tolist() == [3.25, 0.0]
    assert weights_of(out).dtype == torch.bfloat16
    assert capsys.readouterr().err == ""


def test_slerp_says_where_it_is_the_straight_line(folders, tmp_path, capsys):
    for name, w in (("d", [0.0, 1.0]), ("e", [5.0, 0.0])):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(w)}, tmp_path / name / "model.safetensors")
    a, d, e = (str(tmp_path / name) for name in "ade")
    note = "note: 1 of 1 tensors took the straight line, for |cos θ| > 0.9995 and zeros\n"
    commands = {
        "interpolate": ["--method", "slerp", "--t", "0.5"],
        "sweep": ["--method", "slerp", "--ts", "0.25", "0.5"],
        "merge": ["--method", "slerp", "--set", "t=0.5"],
    }
    for command, options in commands.items():
        for end, told in ((e, note), (d, "")):
            out = tmp_path / f"{command} {Path(end).name}"
            assert main([command, a, end, *options, "--quiet", "--out", str(out)]) == 0
            captured = capsys.readouterr()
            assert captured.err == told
            assert "note" not in captured.out
    assert weights_of(tmp_path / "merge e").tolist() == [3.0, 0.0]


def test_interpolate(folders, tmp_path):
    arguments = ["interpolate", *folders[:2], "--quiet", "--out"]
    assert main([*arguments, str(tmp_path / "line"), "--t", "0.25"]) == 0
    assert weights_of(tmp_path / "line").tolist() == [1.5, 0.0]
    assert main([*arguments, str(tmp_path / "beyond"), "--t", "-0.5"]) == 0
    assert weights_of(tmp_path / "beyond").tolist() == [0.0, 0.0]
    save_file({"w": torch.tensor([0.0, 1.0])}, Path(folders[1]) / "model.safetensors")
    assert main([*arguments, str(tmp_path / "arc"), "--t", "0.5", "--method", "slerp"]) == 0
    torch.testing.assert_close(weights_of(tmp_path / "arc"), torch.tensor([0.5**0.5, 0.5**0.5]))


@pytest.fixture
def layered(tmp_path: Path) -> dict[str, str]:
    """Models of three layers of one element each: 0 in the base, 1 in a, 10 in b."""
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 10.0)):
        (tmp_path / name).mkdir()
        state = {f"layers.{layer}.w": torch.tensor([value]) for layer in range(3)}
        save_file(state, tmp_path / name / "model.safetensors")
    return {name: str(tmp_path / name) for name in ("base", "a", "b")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["weight=2"], [22, 22, 22]),
        (["weight=2,0.5"], [7, 7, 7]),
        (["weight=2, 0.5", "lambda=10", "normalize=false"], [70, 70, 70]),
        (["weight=1", "normalize=true"], [5.5, 5.5, 5.5]),
        (["weight=[0, 1]"], [0, 5.5, 11]),  # for both models, over the layers
        (["weight=[0,1],2"], [20, 20.5, 21]),  # for the first; the second has one value
        (["weight=[{filter: layers.1, value: 3}, {value: 1}]"], [11, 33, 11]),
        (['weight=[{"filter": "layers.1", "value": 3}], 1', "lambda=1e-1"], None),  # the first has no other value
        (["weight=1", "lambda=[1, 2, 4]"], [11, 22, 44]),
    ],
)
def test_settings_on_the_command_line_are_those_of_a_recipe(layered, tmp_path, capsys, settings, expected):
    options = [word for text in settings for word in ("--set", text)]
    arguments = ["--method", "task_arithmetic", "--base", layered["base"], layered["a"], layered["b"], *options]
    code = main(["merge", *arguments, "--quiet", "--out", str(tmp_path / "soup")])
    if expected is None:
        assert code == 2
        assert "parameter 'weight' has no value for tensor 'layers.0.w'" in capsys.readouterr().err
        return
    assert code == 0
    soup = load_file(tmp_path / "soup" / "model.safetensors")
    assert [soup[f"layers.{layer}.w"].item() for layer in range(3)] == expected


BESIDE = "which says by itself what is merged and how: write it there, or spell all out with --method and no file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RECIPE", "--method", "linear"], f"found --method beside the recipe file RECIPE, {BESIDE}"),
        (["RECIPE", "--set", "weight=1"], f"found --set beside the recipe file RECIPE, {BESIDE}"),
        (["RECIPE", "--base", "A", "--tokenizer", "union"], "found --base, --tokenizer beside the recipe file RECIPE"),
        (["A", "RECIPE", "--method", "linear"], "found --method beside the recipe file RECIPE, which says"),
        (["RECIPE", "A"], "found A beside the recipe file RECIPE, which says by itself"),
        (["RECIPE", "RECIPE"], "found RECIPE beside the recipe file RECIPE, which says by itself"),
        (["A", "B"], "found 2 models without --method: name the method, or give one recipe file alone"),
        (["A", "--set", "weight=1"], "found --set without --method: name the method, or give one recipe file alone"),
        (["A"], "A is a folder, where a recipe file belongs: to merge folders without one, name the method beside"),
        (["none.yaml"], "none.yaml does not exist: give a recipe file"),
        (["--method", "slerp", "A", "B", "--set", "t=0,0.5,1"],
         "--set t=0,0.5,1 has 3 values: t takes one value; values over the layers stand in brackets, 't=[0,0.5,1]'"),
        (["--method", "linear", "A", "B", "--set", "weight=1,2,3"],
         "--set weight=1,2,3 has 3 values: weight takes one value, or 2 (one per model); values over the layers"),
        (["--method", "linear", "A", "B", "--set", "weight"], "--set weight lacks a value: write NAME=VALUE, or NAME="),
        (["--method", "linear", "A", "B", "--set", "weight="], "--set weight= lacks a value: write NAME=VALUE"),
        (["--method", "linear", "A", "B", "--set", "weight=1,"], "--set weight=1, lacks a value: write NAME=VALUE"),
        (["--method", "linear", "A", "B", "--set", "weight=1,,2"], "--set weight=1,,2: not valid YAML"),
        (["--method", "linear", "A", "B", "--set", "weight=[1"], "--set weight=[1: not valid YAML"),
        (["--method", "linear", "A", "B", "--set", "weight=1,2", "--set", "weight=3"],
         "--set weight=... is given twice: give it once, with commas for one value per model"),
        (["--method", "linear", "A", "B", "--set", "weight=many"], "parameter 'weight' is 'many': give a number, a"),
        (["--method", "linear", "A", "B", "--set", "t=1"], "unknown parameter 't': the parameters of linear are we"),
    ],
)  # fmt: skip
def test_what_merge_does_not_take_together(folders, tmp_path, capsys, arguments, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: linear\nmodels: [{folders[0]}, {folders[1]}]\n")
    names = {"RECIPE": str(recipe), "A": folders[0], "B": folders[1]}
    given = [names.get(word, word) for word in arguments]
    assert main(["merge", *given, "--out", str(tmp_path / "soup")]) == 2
    error = capsys.readouterr().err
    for name, path in names.items():
        message = re.sub(rf"\b{name}\b", path, message)
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert main(["merge", str(recipe), "--quiet", "--dtype", "float16", "--out", str(tmp_path / "soup")]) == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["average", "a", "b", "--weights", "0.5,0.5"], "--weights: '0.5,0.5' is no number: write 0.5 0.5\n"),
        (["average", "a", "b", "--weights", "1", "x"], "--weights: 'x' is no number\n"),
        (["sweep", "a", "b", "--ts", "0,1"], "--ts: '0,1' is no number: write 0 1\n"),
    ],
)
def test_numbers_are_separated_by_spaces(arguments, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--out", "soup"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(hint)


def test_sweep(folders, tmp_path, capsys):
    ts = ["0", "0.3", "0.30000001", "1.0", "-2"]
    arguments = ["sweep", *folders[:2], "--quiet", "--out", str(tmp_path / "points"), "--ts"]
    assert main([*arguments, *ts]) == 0
    names = ["t=0", "t=0.3", "t=0.30000001", "t=1", "t=-2"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "points" / name) for name in names]
    assert [weights_of(tmp_path / "points" / name)[0].item() for name in names[::2]] == pytest.approx([1, 1.6, -3])
    assert main([*arguments, "0.5", "1", "0.50"]) == 2
    assert capsys.readouterr().err == "error: t = 0.5 is given twice: give each point once\n"


def test_the_same_model_twice_is_warned_of(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["average", "a", "b", "./a", "--quiet", "--out", "soup"]) == 0
    assert capsys.readouterr().err == "warning: ./a is given twice: each counts as a model of its own\n"
    assert weights_of(tmp_path / "soup")[0].item() == pytest.approx(5 / 3)
    assert main(["merge", "--method", "linear", folders[0], "a", "--quiet", "--out", "soup2"]) == 0
    assert capsys.readouterr().err == "warning: a is given twice: each counts as a model of its own\n"


def test_methods_prints_the_table(capsys):
    assert main(["methods"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, method in METHODS.items():
        assert f"{name}: {method.summary}" in printed
        assert method.paper in printed
        assert method.departures in printed
        for parameter in method.parameters.values():
            assert parameter.meaning in printed


def test_warnings_are_one_line(folders, tmp_path, capsys):
    save_file({"w": torch.tensor([torch.nan, 0.0])}, Path(folders[1]) / "model.safetensors")
    assert main(["average", *folders, "--quiet", "--allow-nonfinite", "--out", str(tmp_path / "soup")]) == 0
    expected = "warning: the soup holds 1 NaN or infinite values, in 'w'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--weights", "1"], "found 1 weights for 2 ingredients"),
        (["--weights", "1", "-1"], "weight 2 is -1"),
        (["--weights", "0", "0"], "the weights sum to 0"),
        (["--weights", "nan", "1"], "weight 1 is nan"),
        (["--dtype", "int4"], "dtype int4 cannot hold a soup"),
        (["--max-shard-size", "1e9"], "max_shard_size '1e9' is not a size: write a whole number of bytes, or"),
        (["--max-shard-size", "big"], "max_shard_size 'big' is not a size"),
        (["--out", "EXISTING"], "exists: choose another output folder"),
    ],
)
def test_bad_input_ends_with_code_2(folders, tmp_path, capsys, extra, message):
    extra = [folders[2] if word == "EXISTING" else word for word in extra]
    assert main(["average", *folders[:2], "--out", str(tmp_path / "soup"), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("arguments", [[], ["average", "x"], ["interpolate", "a", "--t", "1", "--out", "x"], ["stew"]])
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m soupkit" in capsys.readouterr().err


def test_diff_by_layer_has_a_line_for_each_layer_in_order(tmp_path, capsys):
    folders = []
    for number in (1, 2):
        folders.append(tmp_path / f"m{number}")
        folders[-1].mkdir()
        names = ("embed.weight", "layers.2.weight", "layers.10.weight")
        tensors = {name: torch.full((4,), float(number + place)) for place, name in enumerate(names)}
        save_file(tensors, folders[-1] / "model.safetensors")
    assert main(["diff", *map(str, folders), "--by-layer", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("(outside layers)") < printed.index("layers.2 ") < printed.index("layers.10 ")
    assert "most different" not in printed


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for command in (
        "average runs/sft1 runs/sft2 --out runs/soup",
        "average base+runs/lora1 base+runs/lora2",
        "--method slerp",
        "python -m soupkit methods",
    ):
        assert command in printed


IMPORTS = """
import sys, time
import torch
start = time.perf_counter()
import soupkit
print(time.perf_counter() - start)
print({"transformers", "huggingface_hub", "yaml", "matplotlib", "rlhf", "analysis"} & set(sys.modules))
"""


def test_importing_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.splitlines()
    assert heavy == "set()"
    assert float(seconds) < 1  # measured 0.05; the rest is room for a busy machine


def test_the_module_runs(folders, tmp_path):
    missing = tmp_path / "none"
    command = [sys.executable, "-m", "soupkit", "average", folders[0], str(missing), "--out", str(tmp_path / "soup")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} does not exist: give a checkpoint folder, or a hub id such as org/name\n"

"""python -m soupkit: the same soups from the command line, one-line errors, and a light import."""

from __future__ import annotations

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


def test_interpolate(folders, tmp_path):
    arguments = ["interpolate", *folders[:2], "--quiet", "--out"]
    assert main([*arguments, str(tmp_path / "line"), "--t", "0.25"]) == 0
    assert weights_of(tmp_path / "line").tolist() == [1.5, 0.0]
    assert main([*arguments, str(tmp_path / "beyond"), "--t", "-0.5"]) == 0
    assert weights_of(tmp_path / "beyond").tolist() == [0.0, 0.0]
    save_file({"w": torch.tensor([0.0, 1.0])}, Path(folders[1]) / "model.safetensors")
    assert main([*arguments, str(tmp_path / "arc"), "--t", "0.5", "--method", "slerp"]) == 0
    torch.testing.assert_close(weights_of(tmp_path / "arc"), torch.tensor([0.5**0.5, 0.5**0.5]))


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
    for command in ("average runs/sft1 runs/sft2 --out runs/soup", "--method slerp", "python -m soupkit methods"):
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

"""The benchmarks' own arithmetic and bookkeeping, on models of a few thousand bytes and a stand-in for soupkit."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import measuring
import merge
import mergekit_agreement as agreement
from safetensors import safe_open

# Copies the first model instead of merging, and notes what it was told.
STAND_IN = """
import json, os, shutil, sys
def main(arguments):
    command, recipe, flag, out, quiet, *sync = arguments
    assert (command, flag, quiet) == ("merge", "--out", "--quiet")
    assert sync in ([], ["--sync"])
    recipe = json.load(open(recipe))
    shutil.copytree(recipe.get("base") or recipe["models"][0]["model"], out)
    with open(os.environ["TOLD"], "a") as file:
        json.dump(recipe, file)
        file.write("\\n")
    if "SHORT" in os.environ:
        shutil.rmtree(out)
        os.mkdir(out)
    return int("FAIL" in os.environ)
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three made checkpoints of 150 kB, and a stand-in that the children import as soupkit."""
    monkeypatch.setattr(merge, "SMALL", merge.Shape(64, 96, 2, 4, 2, 100))
    assert merge.main(["make", str(tmp_path / "models"), "--small", "--num", "3"]) == 0
    (tmp_path / "stand-in" / "soupkit").mkdir(parents=True)
    (tmp_path / "stand-in" / "soupkit" / "__init__.py").touch()
    (tmp_path / "stand-in" / "soupkit" / "__main__.py").write_text(STAND_IN)
    monkeypatch.setattr(measuring, "ROOT", tmp_path / "stand-in")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "models"


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_the_large_models_are_tiny_llamas_1_1_b() -> None:
    shapes = merge.LARGE.tensors()
    assert len(shapes) == 201
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_100_048_384
    assert shapes["model.layers.21.self_attn.v_proj.weight"] == (256, 2048)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (2048, 5632)


def test_made_checkpoints_are_a_base_and_fine_tunings_of_it(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, first, second = (read(models / f"m{index}") for index in range(3))
    shapes = merge.SMALL.tensors()
    assert {name: tuple(x.shape) for name, x in base.items()} == shapes
    assert {x.dtype for x in base.values()} == {torch.bfloat16}
    index = json.loads((models / "m1" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes.keys()
    assert len(set(index["weight_map"].values())) == 5
    deltas = [torch.cat([(x[n].float() - base[n].float()).flatten() for n in shapes]) for x in (first, second)]
    for delta in deltas:
        assert delta.std().item() == pytest.approx(0.002, rel=0.05)
    assert abs(torch.corrcoef(torch.stack(deltas))[0, 1].item()) < 0.05
    assert torch.cat([x.float().flatten() for x in base.values()]).std().item() == pytest.approx(0.02, rel=0.05)

    before = (models / "m0" / "config.json").stat().st_mtime_ns
    merge.main(["make", str(models), "--small", "--num", "1"])
    assert "there already" in capsys.readouterr().err
    assert (models / "m0" / "config.json").stat().st_mtime_ns == before


def test_made_checkpoints_are_the_same_every_time(models: Path, tmp_path: Path) -> None:
    merge.main(["make", str(tmp_path / "again"), "--small", "--num", "2"])
    for path in sorted((tmp_path / "again" / "m1").iterdir()):
        assert path.read_bytes() == (models / "m1" / path.name).read_bytes()


def test_the_floor_copies_the_first_input_and_reads_the_others(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, merge.THIS, "copy", models / "m1", models / "m2", "--output", tmp_path / "copy"]
    record, text = measuring.measured(command)
    assert 0 < json.loads(text)["seconds"] < record["seconds"]
    copied = sorted((tmp_path / "copy").iterdir())
    assert len(copied) == 5
    for path in copied:
        assert path.read_bytes() == (models / "m1" / path.name).read_bytes()


def test_memory_of_a_process_is_its_peak(tmp_path: Path) -> None:
    script = "import time; x = bytearray(60_000_000); time.sleep(0.1); del x; time.sleep(0.1)"
    record, _ = measuring.measured([sys.executable, "-c", script])
    assert 60e6 < record["anonymous_bytes"] < 90e6
    assert record["resident_bytes"] > record["anonymous_bytes"]
    assert record["seconds"] > 0.2


def test_a_run_measures_everything_in_every_round_and_can_be_resumed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    command = ["run", str(models), "--output", str(output), "--cases", "average2", "nearswap"]
    assert merge.main([*command, "--repeats", "1"]) == 0
    first = json.loads(output.read_text())["cases"]["average2"]["rounds"][0]
    assert list(first) == ["floor", "floor_fsync", "import", "soupkit", "soupkit_sync"]
    assert all(record["seconds"] > 0 and record["anonymous_bytes"] > 0 for record in first.values())

    assert merge.main([*command, "--repeats", "2"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert merge.main([*command, "--repeats", "2", "--resume"]) == 0
    cases = json.loads(output.read_text())["cases"]
    assert [len(case["rounds"]) for case in cases.values()] == [2, 2]
    assert cases["average2"]["rounds"][0] == first
    assert cases["average2"]["summary"]["seconds"]["soupkit"]["num"] == 2
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    m0, m1 = (str(models / f"m{index}") for index in range(2))
    linear = {"method": "linear", "models": [{"model": m0, "weight": 0.5}, {"model": m1, "weight": 0.5}]}
    nearswap = {"method": "nearswap", "base": m0, "models": [{"model": m1}], "parameters": {"t": 0.001}}
    assert [told.count(linear), told.count(nearswap)] == [4, 4]
    assert sorted(path.name for path in models.iterdir()) == ["m0", "m1", "m2"]  # nothing left behind

    results = json.loads(output.read_text()) | {"machine": {"processor": "another"}}
    output.write_text(json.dumps(results))
    assert merge.main([*command, "--resume"]) == 2
    assert "machine" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "message"), [("FAIL", "code 1"), ("SHORT", "nothing to compare")])
def test_a_merge_that_does_not_do_its_work_has_no_time(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variable: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, "1")
    assert merge.main(["run", str(models), "--output", str(tmp_path / "r.json"), "--cases", "average2"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_too_few_models_are_told_before_any_run(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main(["run", str(models), "--output", "unused.json", "--cases", "average4"]) == 2
    assert "m3 does not exist" in capsys.readouterr().err


def test_the_same_recipe_for_mergekit() -> None:
    paths = [Path("m0"), Path("m1"), Path("m2"), Path("m3")]
    own = {"weight": 1 / 3, "density": 0.5}
    assert merge._mergekit_recipe(merge.CASES["ties"], paths) == {
        "merge_method": "ties",
        "base_model": "m0",
        "models": [{"model": f"m{index}", "parameters": own} for index in (1, 2, 3)],
        "parameters": {},
    }
    assert merge._mergekit_recipe(merge.CASES["slerp2"], paths[:2]) == {
        "merge_method": "slerp",
        "base_model": "m0",
        "models": [{"model": "m0", "parameters": {}}, {"model": "m1", "parameters": {}}],
        "parameters": {"t": 0.5},
    }


def rounds_by_hand() -> list[dict[str, Any]]:
    """Three rounds, one of them with mergekit. After imports soupkit takes 3, 4 and 2 seconds."""
    times = [
        {"floor": 2.0, "floor_fsync": 4.0, "import": 1.0, "soupkit": 4.0, "soupkit_sync": 3.0, "mergekit": 40.0},
        {"floor": 1.0, "floor_fsync": 4.0, "import": 2.0, "soupkit": 6.0, "soupkit_sync": 3.0},
        {"floor": 4.0, "floor_fsync": 4.0, "import": 1.0, "soupkit": 3.0, "soupkit_sync": 2.0},
    ]
    sizes = {"resident_bytes": 500_000_000, "anonymous_bytes": 200_000_000, "disk_bytes": 0}
    records = [{what: {"seconds": seconds} | sizes for what, seconds in row.items()} for row in times]
    records[1]["soupkit"]["anonymous_bytes"] = 310_000_000
    return records


def test_summary_by_hand() -> None:
    summary = merge.summary(rounds_by_hand())
    assert summary["seconds"]["after_imports"] == {"median": 3.0, "min": 2.0, "max": 4.0, "num": 3}
    # 3/2, 4/1 and 2/4; the medians are 3 and 2.
    assert summary["ratios"]["floor"] == {"median": 1.5, "min": 0.5, "max": 4.0, "num": 3, "of_medians": 1.5}
    assert summary["ratios"]["sync"]["median"] == 0.75
    assert summary["ratios"]["process_floor"]["median"] == 2.0
    # Against soupkit in the one round that has both, whatever the others took.
    assert summary["ratios"]["mergekit"] == {"median": 10.0, "min": 10.0, "max": 10.0, "num": 1, "of_medians": 10.0}
    assert summary["bytes"]["anonymous_bytes"]["soupkit"] == 310_000_000


def test_tables_say_which_goals_are_met(tmp_path: Path) -> None:
    results = {
        "machine": {"processor": "P", "cores": 2, "memory_gb": 8, "kernel": "Linux 6", "file_system": "ext4"},
        "versions": {"python": "3"},
        "models": {"bytes": 2_200_000_000, "tensors": 201, "shards": 5},
        "cases": {"ties": {"summary": merge.summary(rounds_by_hand())}},
        "import": {name: measuring.spread([0.25, 0.29, 0.4]) for name in ("torch", "soupkit", "beyond_torch")},
        "non_finite_check": {"ties": {name: measuring.spread([1.06]) for name in ("checked", "unchecked", "ratio")}},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{merge.BEGIN}\nold\n{merge.END}\nafter\n")
    assert merge.main(["table", str(tmp_path / "results.json"), "--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{merge.BEGIN}\n\nP, 2 cores, 8 GB")
    assert text.endswith(f"\n\n{merge.END}\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ties")]
    assert "| 1.50 (0.50–4.00; medians 1.50) | ≤ 4 met |" in rows[0]
    assert "| 10.00 (10.00–10.00; medians 10.00) | ≥ 20 **missed** |" in rows[0]
    assert "| 40.00 (1 run) |" in rows[1]
    assert "| 310 | ≤ 300 **missed** | 500 | ≤ 1000 met |" in rows[2]
    assert "≤ 1.05 **missed**" in rows[3]
    assert "| 0.29 (0.25–0.40) | ≤ 0.3 met |" in text

    lost = [row | {"import": row["import"] | {"seconds": 9.0}} for row in rounds_by_hand()]
    assert "| too short to tell |" in merge.tables(results | {"cases": {"ties": {"summary": merge.summary(lost)}}})[6]

    readme.write_text("no marks")
    assert merge.main(["table", str(tmp_path / "results.json"), "--into", str(readme)]) == 2


def test_switches_of_a_child_reach_what_they_switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import soupkit.blocks

    monkeypatch.setattr(soupkit.blocks, "_sums_are_finite", soupkit.blocks._sums_are_finite)
    infinite = [torch.tensor([1.0, math.inf])]
    assert not soupkit.blocks._sums_are_finite(infinite)
    merge.switch_off_non_finite_check()
    assert soupkit.blocks._sums_are_finite(infinite)


def test_units_in_the_last_place_of_bfloat16() -> None:
    values = torch.tensor([1.0, 1.99, 2.0, -0.75, 3e38, 2**-126, 0.0], dtype=torch.float64)
    expected = [2**-7, 2**-7, 2**-6, 2**-8, 2**120, 2**-133, 2**-133]
    assert agreement.ulp(values).tolist() == expected
    # The next number after each, as bfloat16 itself has it.
    held = torch.tensor([1.0, 1.5, 0.02, 123.0]).bfloat16()
    following = (held.view(torch.int16) + 1).view(torch.bfloat16)
    assert agreement.distance(following, held).tolist() == [1.0] * 4
    assert agreement.distance(torch.tensor(1.5), torch.tensor(1.0), noise=0.25).item() == 0.25 * 2**7


def test_ties_are_where_a_threshold_or_a_vote_cannot_decide() -> None:
    base = torch.zeros(1, 4)
    models = {"base": base, "x0": torch.tensor([[4.0, 2.0, -2.0, 1.0]]), "x1": torch.tensor([[4.0, 1.0, 3.0, 8.0]])}
    own = {"weight": (1.0, 1.0), "density": (0.5, 1.0)}
    case = agreement.Case("ties", 2, True, own=own)
    # The second largest of x0 is 2, twice; the smallest of x1 is 1. No vote ties: 8, 3, 1 and 8.
    assert agreement.at_a_tie(case, models).tolist() == [[False, True, True, False]]
    opposed = models | {"x1": torch.tensor([[-4.0, 5.0, 6.0, 3.0]])}
    assert agreement.at_a_tie(case, opposed).tolist() == [[True, True, True, True]]  # 4 − 4; the smallest is 3
    assert not agreement.at_a_tie(agreement.Case("linear", 2, False, own=WEIGHTS), models).any()


WEIGHTS = {"weight": (0.5, 0.5)}


def test_recipes_are_read_by_soupkit() -> None:
    from soupkit.recipe import load_recipe

    recipes = {path.stem: load_recipe(path) for path in agreement.RECIPES.glob("*.yml")}
    assert {"linear", "gradient-slerp", "ties", "bio-merge"} <= recipes.keys()
    assert recipes["gradient-slerp"].num_layers == 4
    for recipe in recipes.values():
        named = {*recipe.models, *([recipe.base] if recipe.base else [])}
        assert named <= set(agreement.MODELS)

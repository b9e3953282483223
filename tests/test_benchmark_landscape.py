"""The landscape benchmark's own arithmetic and bookkeeping, on models of a few thousand weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import landscape

OURS = ["plane", "model", "random"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of 7 thousand weights, as ``make`` writes them."""
    path = tmp_path_factory.mktemp("landscape") / "models"
    assert landscape.main(["make", str(path), "--quick"]) == 0
    return path


def record_of(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert landscape.main(["work", case, str(folder)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_plane_of_ours_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {case: record_of(case, folder, capsys) for case in OURS}
    # 3 × 3 points, and the named checkpoints.
    assert [record["num_points"] for record in records.values()] == [12, 12, 10]
    for record in records.values():
        assert 0 < record["inside_seconds"] < record["seconds"]
        assert 2 < record["lowest"] < record["highest"] < 6
        assert record["parameter_bytes"] == 4 * sum(p.numel() for p in landscape.load(folder / "one").parameters())
    # The same plane, whoever's model is moved.
    assert records["plane"]["lowest"] == records["model"]["lowest"]
    assert records["random"]["highest"] != records["plane"]["highest"]


def test_peers_move_the_same_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with their signatures: what they are given is what they would measure."""

    def planar_interpolation(start: Any, one: Any, two: Any, metric: Any, steps: int) -> None:
        for model in (start, one, two):
            metric(SimpleNamespace(modules=[model]))

    class LossLandscapeCalculator:
        def __init__(self, model: Any, batches: Any, criterion: Any) -> None:
            self.model, self.batches, self.criterion = model, batches, criterion

        def calculate(self, xs: list[float], ys: list[float], u: Any, v: Any, center: Any) -> None:
            assert xs == ys == [0, 0.5, 1]
            for x, y in ((0, 0), (1, 0), (0, 1)):
                self.model.load_state_dict({key: center[key] + x * u[key] + y * v[key] for key in center})
                for inputs, targets in self.batches:
                    self.criterion(self.model(inputs), targets).item()

    modules = {
        "loss_landscapes": SimpleNamespace(planar_interpolation=planar_interpolation),
        "loss_landscape_3d": SimpleNamespace(LossLandscapeCalculator=LossLandscapeCalculator),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    folders = [folder / name for name in landscape.CHECKPOINTS]
    task = landscape.read_results(folder / "task.json")
    expected = landscape.Clock(task)
    for path in folders:
        expected.loss(landscape.load(path))
    for plane in (landscape.ll_plane, landscape.l3_plane):
        clock = landscape.Clock(task)
        plane(landscape.load(folders[0]), folders, clock, 3)
        assert clock.losses == pytest.approx(expected.losses, rel=1e-6)
    assert len(set(expected.losses)) == 3


RECORD = {
    "seconds": 10.5,
    "inside_seconds": 10.0,
    "num_points": 100,
    "forward_peak_bytes": 1000,
    "peak_bytes": 1320,
    "parameter_bytes": 100,
}


def test_figures_by_hand() -> None:
    figures = landscape.figures(RECORD | {"peak_bytes": 5000}, RECORD)
    assert figures["time_ratio"] == pytest.approx(1.05)
    assert figures["outside_ms"] == pytest.approx(5)
    assert figures["extra_copies"] == pytest.approx(3.2)


def test_rounds_and_tables(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def child(case: str, options: argparse.Namespace, for_memory: bool = False) -> dict[str, Any]:
        if for_memory:
            return RECORD
        order.append(case)
        return RECORD | {"seconds": RECORD["seconds"] + len(order)}

    monkeypatch.setattr(landscape, "_child", child)
    results, page = tmp_path / "results.json", tmp_path / "README.md"
    arguments = [
        "run",
        str(folder),
        "--output",
        str(results),
        "--repeats",
        "2",
        "--cases",
        "plane",
        "random",
        "ll_plane",
    ]
    assert landscape.main(arguments) == 0
    assert order == ["plane", "random", "random", "plane"], "turned by one; no peer without its Python"
    page.write_text(f"a\n{landscape.BEGIN}\n{landscape.END}\nb\n", encoding="utf-8")
    assert landscape.main(["table", str(results), "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    # Rounds of 11.5 and 14.5 seconds.
    assert (
        "analysis.plane, three folders | 13.00 (11.50–14.50) | 10.00 (10.00–10.00) | 1.300 (1.150–1.450) | ≤ 1.05"
        in text
    )
    assert "| 30.0 | 3.20 | ≤ 3.2 met |" in text
    assert f"{torch.__version__}" in text


def test_no_models_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert landscape.main(["run", str(tmp_path), "--output", str(tmp_path / "results.json")]) == 2
    assert "holds no task: run `python benchmarks/landscape.py make" in capsys.readouterr().err

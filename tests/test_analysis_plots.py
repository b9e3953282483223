"""Plots run on results, whole and unfinished, and say what they show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

from analysis import KLGeometry, KLMatrix, Line, Plane, plots
from analysis.results import Measurements


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def texts(ax: Axes) -> set[str]:
    """All that is written in the figure, once drawn."""
    ax.figure.canvas.draw()
    return {text.get_text() for text in ax.figure.findobj(Text)}


def measurements(*rows: np.ndarray, names: list[str]) -> Measurements:
    values = np.array(rows)
    return Measurements(names, values, np.full_like(values, 0.1), ~np.isnan(values[0]))


def make_line() -> Line:
    t = np.linspace(0, 1, 5)
    return Line(
        t=t,
        length=4.0,
        coordinates={"sft1": 0.0, "soup": 0.5, "sft2": 1.0},
        measurements=measurements(t**2, 1 - t, names=["loss", "kl/soup"]),
        metadata={},
    )


def make_plane(values: np.ndarray | None = None) -> Plane:
    x, y = np.linspace(-1, 5, 4), np.linspace(-1, 3, 4)
    values = x**2 + y[:, None] if values is None else values
    return Plane(
        x=x,
        y=y,
        coordinates={"sft1": (0.0, 0.0), "sft2": (4.0, 0.0), "policy": (1.0, 2.0), "soup": (2.0, 0.0)},
        distance={"sft1": 0.0, "sft2": 0.0, "policy": 0.0, "soup": 0.8},
        measurements=measurements(np.concatenate([np.zeros(4), values.ravel()]), names=["gold_reward"]),
        metadata={},
    )


MATRIX = KLMatrix(
    ["sft1", "policy"], np.array([[0.0, 12.345], [0.678, 0.0]]), np.array([[0.0, 0.21], [0.034, 0.0]]), metadata={}
)
ROWS = [{"update": i, "kl/reference": 0.5 * i, "kl/reference_stderr": 0.1, "gold_reward": i**0.5} for i in range(1, 4)]


def test_line_names_its_checkpoints_and_metric() -> None:
    ax = plots.plot_line(make_line(), "loss", color="red", label="between")
    assert {"sft1", "soup", "sft2", "loss (nats per token)"} <= texts(ax)
    curve = ax.get_lines()[0]
    np.testing.assert_allclose(curve.get_xdata(), [0, 1, 2, 3, 4])
    np.testing.assert_allclose(curve.get_ydata(), np.linspace(0, 1, 5) ** 2)
    assert (curve.get_color(), curve.get_label()) == ("red", "between")
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-0.1, 1.1))


def test_line_of_several_metrics_has_a_legend() -> None:
    _, ax = plt.subplots()
    assert plots.plot_line(make_line(), ["loss", "kl/soup"], ax=ax) is ax
    assert {"loss (nats per token)", "KL to soup (nats per response)"} <= texts(ax)


def test_plane_marks_its_checkpoints() -> None:
    ax = plots.plot_plane(make_plane(), "gold_reward")
    assert {"sft1", "sft2", "policy", "soup", "gold reward"} <= texts(ax)
    assert ax.get_aspect() == 1
    points = {tuple(np.ravel(marker.get_xydata())): marker.get_markerfacecolor() for marker in ax.get_lines()}
    assert points == {(0.0, 0.0): "white", (4.0, 0.0): "white", (1.0, 2.0): "white", (2.0, 0.0): "none"}


def test_unfinished_plane_is_drawn() -> None:
    values = np.arange(16.0).reshape(4, 4)
    values[3] = np.nan
    assert "gold reward" in texts(plots.plot_plane(make_plane(values), "gold_reward"))


def test_points_without_a_value_are_missing_and_crossed() -> None:
    values = np.arange(16.0).reshape(4, 4)
    values[1, 2], values[3, 0] = np.nan, np.inf
    plane = make_plane(values)
    plane.measurements.done[:] = True
    plane.measurements.done[4 + 12] = False  # of these two, one is not measured yet
    ax = plots.plot_plane(plane, "gold_reward")
    texts(ax)
    (crosses,) = [marker for marker in ax.get_lines() if marker.get_marker() == "x"]
    np.testing.assert_array_equal(crosses.get_xydata(), [[plane.x[2], plane.y[1]]])
    values[:] = np.nan
    texts(plots.plot_plane(make_plane(values), "gold_reward"))


def test_planes_in_multiples_of_directions_say_so() -> None:
    plane = make_plane()
    plane.gram[:] = [[4, 1], [1, 9]]
    ax = plots.plot_plane(plane, "gold_reward")
    assert {"multiple of the first direction (L2 norm 2)", "multiple of the second direction (L2 norm 3)"} <= texts(ax)
    assert ax.get_aspect() == "auto"


def test_kl_matrix_writes_its_numbers() -> None:
    ax = plots.plot_kl_matrix(MATRIX)
    assert {"12.35\n± 0.21", "0.678\n± 0.034", "0", "sft1", "policy"} <= texts(ax)
    assert {text.get_text(): text.get_position() for text in ax.texts}["12.35\n± 0.21"] == (1, 0)  # column, row


def test_reward_kl_reads_rows_and_run_folders(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    ax = plots.plot_reward_kl({"soup": tmp_path, "sft1": ROWS[:2]})
    assert {"soup", "sft1", "KL to reference (nats per response)", "gold reward"} <= texts(ax)
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), [[0.5, 1], [1, 2**0.5], [1.5, 3**0.5]])


def test_reward_kl_averages_consecutive_updates() -> None:
    ax = plots.plot_reward_kl({"soup": ROWS}, average=2)  # the first of three is left over
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), [[1.25, (2**0.5 + 3**0.5) / 2]])
    (horizontal, _) = ax.containers[0].lines[2]
    np.testing.assert_allclose(np.ptp(horizontal.get_segments()[0][:, 0]), 2 * (0.1**2 + 0.1**2) ** 0.5 / 2)
    assert len(plots.plot_reward_kl({"soup": ROWS}, average=5).get_lines()[0].get_xydata()) == 1


def test_unknown_metric_is_named() -> None:
    for draw in (lambda: plots.plot_line(make_line(), "gold"), lambda: plots.plot_plane(make_plane(), "gold")):
        with pytest.raises(ValueError, match="metric 'gold': not in this result"):
            draw()
    with pytest.raises(ValueError, match=r"run 'soup': has no 'kl/sft1' in its metrics; choose one of \['update'"):
        plots.plot_reward_kl({"soup": ROWS}, x="kl/sft1")


def test_surface_stands_on_the_plane() -> None:
    plane = make_plane()
    plane.measurements.values[0, :4] = [1, 2, 3, 4]
    ax = plots.plot_surface(plane, "gold_reward")
    assert {"sft1", "policy", "gold reward", "weight-space L2 distance"} <= {text.strip() for text in texts(ax)}
    points = [line.get_data_3d() for line in ax.get_lines() if line.get_marker() == "o"]
    assert [tuple(float(part[0]) for part in point) for point in points][:2] == [(0, 0, 1), (4, 0, 2)]
    values = np.arange(16.0).reshape(4, 4)
    values[3] = np.nan
    texts(plots.plot_surface(make_plane(values), "gold_reward"))
    with pytest.raises(ValueError, match="ax: has two dimensions"):
        plots.plot_surface(plane, "gold_reward", ax=plt.subplots()[1])


def test_a_wide_plane_has_a_wide_figure() -> None:
    plane = make_plane()
    plane.y[:] /= 4
    width, height = plots.plot_plane(plane, "gold_reward").figure.get_size_inches()
    assert height < 0.5 * width


def test_geometry_shows_every_quantity_of_every_model() -> None:
    names = ["sft1", "sft2", "soup"]
    quantities = ["kl_soup", "kl_ingredients", "kl_mixture", "triangle_gap", "log_normalizer"]
    values = np.arange(15.0).reshape(5, 3)
    matrix = np.zeros((3, 3))
    result = KLGeometry(
        names=names,
        mean=matrix,
        stderr=matrix,
        metadata={},
        k1=matrix,
        k1_stderr=matrix,
        soup="soup",
        ingredients=names[:2],
        weights=np.array([0.5, 0.5]),
        quantities=quantities,
        values=values,
        values_stderr=np.full_like(values, 0.1),
        identity_error=np.zeros(3),
    )
    ax = plots.plot_geometry(result)
    assert {*names, "KL to the soup", "triangle gap", "nats per response"} <= texts(ax)
    drawn = [container.lines[0].get_xdata().tolist() for container in ax.containers]
    assert drawn == values.tolist()


def test_curves_have_bands_and_leave_out_runs_that_did_not_measure(tmp_path: Path) -> None:
    other = [{key: value for key, value in row.items() if key != "gold_reward"} for row in ROWS]
    ax = plots.plot_curves({"soup": ROWS, "sft1": other}, "kl/reference")
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[0.5, 1.0, 1.5]] * 2
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.4, 1.6))
    assert len(plots.plot_curves({"soup": ROWS, "sft1": other}, "gold_reward").get_lines()) == 1
    with pytest.raises(ValueError, match=r"metric 'gold_reward': in none of the runs \['sft1'\]; choose one of"):
        plots.plot_curves({"sft1": other}, "gold_reward")
    with pytest.raises(ValueError, match="run 'empty': has no updates"):
        plots.plot_curves({"empty": []}, "gold_reward")


def test_dashboard_and_grid_have_one_legend() -> None:
    measured = {"proxy_reward": 1.0, "entropy": 1.2, "response_length": 20.0, "objective": 0.5}
    rows = [row | measured for row in ROWS]
    axes = plots.plot_dashboard({"soup": rows, "sft1": rows})
    labels = [ax.get_ylabel() for ax in axes.flat]
    assert labels[:2] == ["proxy reward", "gold reward"]
    assert labels[2:5] == [
        "KL to reference (nats per response)",
        "entropy (nats per token)",
        "response length (tokens)",
    ]
    assert (axes[1, 2].get_xlabel(), axes[1, 2].get_ylabel()) == (labels[2], "gold reward")
    (legend,) = axes[0, 0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["soup", "sft1"]
    assert all(ax.get_legend() is None for ax in axes.flat)
    without = [{key: value for key, value in row.items() if key != "gold_reward"} for row in rows]
    _, mine = plt.subplots(2, 3)
    assert plots.plot_dashboard({"plain": without}, mine) is mine
    assert (mine[0, 1].get_ylabel(), mine[1, 2].get_ylabel()) == ("objective", "proxy reward")
    assert [ax.get_legend() is not None for ax in mine.flat] == [True] + [False] * 5
    grid = plots.plot_grid({"soup": rows}, ["entropy", "objective", "kl/reference", "proxy_reward"])
    assert grid.shape == (2, 3)
    assert [ax.axison for ax in grid.flat] == [True] * 4 + [False] * 2


def test_more_runs_than_colours_are_told_apart_by_dashes() -> None:
    lines = plots.plot_curves({str(i): ROWS for i in range(9)}, "gold_reward").get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_saving_writes_all_formats_the_same_bytes_each_time(tmp_path: Path) -> None:
    ax = plots.plot_kl_matrix(MATRIX)
    files = plots.save(ax, tmp_path / "figures" / "kl.v2", dpi=50)
    assert [file.name for file in files] == ["kl.v2.png", "kl.v2.svg"]
    before = [file.read_bytes() for file in files]
    assert before[0][:4] == b"\x89PNG"
    again = plots.plot_kl_matrix(MATRIX).figure
    plots.save(again, tmp_path / "figures" / "kl.v2", dpi=50, close=True)
    assert [file.read_bytes() for file in files] == before
    assert plt.fignum_exists(ax.figure.number)
    assert not plt.fignum_exists(again.number)
    axes = plots.plot_grid({"soup": ROWS}, ["gold_reward"])
    assert plots.save(axes, tmp_path / "grid", formats=["svg"])[0].is_file()

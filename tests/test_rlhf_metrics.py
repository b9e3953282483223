"""Estimates with standard errors against hand-worked numbers and a bootstrap; logs and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.metrics import (
    append_json_line,
    explained_variance,
    mean_estimate,
    peak_memory_bytes,
    per_prompt_estimate,
    ratio_estimate,
    read_json_lines,
    table,
    write_json,
    write_json_lines,
)


def test_mean_and_standard_error_by_hand() -> None:
    # deviations −3, −1, 1, 3: s² = 20/3, s/√4
    estimate = mean_estimate(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert estimate.mean == 4
    assert estimate.stderr == pytest.approx((20 / 3 / 4) ** 0.5)


def test_one_value_has_no_standard_error() -> None:
    estimate = mean_estimate(torch.tensor([2.5]))
    assert estimate.mean == 2.5
    assert estimate.stderr != estimate.stderr


def test_integers_and_large_offsets_are_computed_in_double_precision() -> None:
    assert mean_estimate(torch.tensor([1, 2, 3])) == (2, pytest.approx(1 / 3**0.5))
    values = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64) + 1e9
    assert mean_estimate(values).stderr == pytest.approx((5 / 3 / 4) ** 0.5)


def test_ratio_by_hand() -> None:
    # Σa/Σb = 12/6 = 2; residuals a − 2b: 0, 1, −1; s² = 1; √(1/3) / 2
    estimate = ratio_estimate(torch.tensor([2.0, 5.0, 5.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert estimate.mean == 2
    assert estimate.stderr == pytest.approx((1 / 3) ** 0.5 / 2)


def test_ratio_with_equal_denominators_is_a_mean() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 7.0])
    mean, stderr = mean_estimate(values / 4)
    assert ratio_estimate(values, torch.full((4,), 4.0)) == (pytest.approx(mean), pytest.approx(stderr))


def test_standard_errors_agree_with_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (400,), generator=generator).double()
    sums = 2 * lengths + 3 * lengths.sqrt() * torch.randn(400, generator=generator, dtype=torch.float64)
    resampled = torch.randint(400, (2000, 400), generator=generator)
    of_ratios = (sums[resampled].sum(1) / lengths[resampled].sum(1)).std()
    of_means = sums[resampled].mean(1).std()
    assert ratio_estimate(sums, lengths).stderr == pytest.approx(float(of_ratios), rel=0.1)
    assert mean_estimate(sums).stderr == pytest.approx(float(of_means), rel=0.1)


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 7, returns) == 1  # a constant offset leaves no variance
    assert explained_variance(torch.full((4,), 2.0), returns) == 0
    # residuals 1, 0, 0, −1: variance 2/3 of 5/3
    assert explained_variance(torch.tensor([0.0, 2.0, 3.0, 5.0]), returns) == pytest.approx(0.6)
    assert explained_variance(-returns, returns) == pytest.approx(-3)


def test_json_lines_grow_and_lose_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for update in (1, 2):
        append_json_line(path, {"update": update, "value": 0.1})
    assert path.read_text(encoding="utf-8") == '{"update": 1, "value": 0.1}\n{"update": 2, "value": 0.1}\n'
    with path.open("a", encoding="utf-8") as file:
        file.write('{"update": 3, "val')
    assert [row["update"] for row in read_json_lines(path)] == [1, 2]
    write_json_lines(path, [{"update": 9}])
    assert read_json_lines(path) == [{"update": 9}]
    write_json_lines(path, [])
    assert read_json_lines(path) == []


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for value in (1, 2):
        write_json(path, {"value": value})
        assert json.loads(path.read_text(encoding="utf-8")) == {"value": value}
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_table_aligns_the_first_column_left_and_others_right() -> None:
    assert table([["name", "x"], ["a", "10.0"], ["longer", "2"]]) == (
        "name       x\n------------\na       10.0\nlonger     2"
    )


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 100e9


def test_prompts_are_the_independent_units() -> None:
    values, ones = torch.tensor([1.0, 3.0, 6.0, 2.0]), torch.ones(4)
    # a: 1 + 3 over 2, b: 6 over 1, c: 2 over 1; ratio 3, residuals -2, 3, -1
    mean, stderr = per_prompt_estimate(values, ones, ["a", "a", "b", "c"])
    assert mean == pytest.approx(3.0)
    assert stderr == pytest.approx((14 / 2 / 3) ** 0.5 / (4 / 3))
    assert per_prompt_estimate(values, ones, list("abcd")) == pytest.approx(mean_estimate(values))
    assert per_prompt_estimate(values, ones, ["a"] * 4) == pytest.approx(mean_estimate(values))


def test_returns_that_do_not_vary_are_not_explained() -> None:
    assert explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])) == 0.0

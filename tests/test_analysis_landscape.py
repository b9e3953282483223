"""Lines and planes: hand-worked values, exact checkpoints, untouched models, unfinished files, several processes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WORDS, as_ranks, forked, make_llama, make_tokenizer, random_examples
from torch import Tensor, nn

from analysis import Line, Plane, directions, line, metrics, plane, weights
from rlhf.data import Prompt
from rlhf.reference import ModelReference, load_model_reference
from rlhf.rewards import load_reward


class Vector(nn.Module):
    """A model whose weights are three numbers in two tensors."""

    def __init__(self, a: tuple[float, float] = (0.0, 0.0), b: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.b = nn.Parameter(torch.tensor([b]))


def vector(x: float, y: float, off_plane: float = 0.0) -> dict[str, Tensor]:
    """(1, 2, 3) + x · (0.6, 0.8, 0) + y · (0, 0, 1) + off_plane · (−0.8, 0.6, 0)."""
    a = torch.tensor([1 + 0.6 * x - 0.8 * off_plane, 2 + 0.8 * x + 0.6 * off_plane])
    return {"a": a, "b": torch.tensor([3.0 + y])}


def first(model: Vector) -> float:
    return float(model.a[0])


def last(model: Vector) -> tuple[float, float]:
    return float(model.b[0]), 0.5


def squared_distance(model: Vector) -> float:
    """From (1, 2, 3): x² + y² + off_plane²."""
    origin = torch.tensor([1.0, 2.0, 3.0])
    return float(((torch.cat([model.a, model.b]) - origin) ** 2).sum())


CORNERS = {"one": vector(0, 0), "two": vector(5, 0), "three": vector(2, 6)}


@torch.no_grad()
def logit_sum(model: nn.Module) -> float:
    return float(model(torch.tensor([[1, 2, 3, 4]])).logits.square().sum())


def interrupted_after(calls: int, metric: Callable[[nn.Module], float], error: type[BaseException]) -> metrics.Metric:
    """``metric``, which raises ``error`` at its call number ``calls`` + 1."""
    count = 0

    def measure(model: nn.Module) -> float:
        nonlocal count
        count += 1
        if count > calls:
            raise error("stopped")
        return metric(model)

    return metrics.Described(measure, "first coordinate")


UNINTERRUPTED = metrics.Described(first, "first coordinate")


# ── Planes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plane_by_hand() -> None:
    named = {"first": first, "last": last, "squared": squared_distance}
    result = plane(CORNERS, named, model=Vector(), steps=3, margin=0.5, progress=False)
    # Extents 5 and 6, half of each added on both sides.
    np.testing.assert_allclose(result.x, [-2.5, 2.5, 7.5])
    np.testing.assert_allclose(result.y, [-3, 3, 9])
    np.testing.assert_allclose(result.values["first"], [[-0.5, 2.5, 5.5]] * 3, atol=1e-6)
    np.testing.assert_allclose(result.values["last"], [[0] * 3, [6] * 3, [12] * 3], atol=1e-6)
    expected = [[15.25, 15.25, 65.25], [15.25, 15.25, 65.25], [87.25, 87.25, 137.25]]
    np.testing.assert_allclose(result.values["squared"], expected, rtol=1e-5)
    np.testing.assert_array_equal(result.stderr["last"], np.full((3, 3), 0.5))
    assert np.isnan(result.stderr["first"]).all()
    assert result.done.all()
    assert result.done.shape == (3, 3)
    for name, (x, y) in {"one": (0, 0), "two": (5, 0), "three": (2, 6)}.items():
        assert result.coordinates[name] == pytest.approx((x, y), abs=1e-5)
        assert result.at[name]["squared"].mean == pytest.approx(x**2 + y**2, abs=1e-4)


def test_marked_checkpoints_project_onto_the_plane() -> None:
    mark = {"soup": vector(1, 2, off_plane=7), "centre": vector(3, 1)}
    result = plane(CORNERS, {"squared": squared_distance}, model=Vector(), steps=2, mark=mark, progress=False)
    assert result.names == ["one", "two", "three", "soup", "centre"]
    assert result.coordinates["soup"] == pytest.approx((1, 2), abs=1e-5)
    assert result.distance == pytest.approx({"one": 0, "two": 0, "three": 0, "soup": 7, "centre": 0}, abs=1e-5)
    # The checkpoint itself, not its projection: 1² + 2² + 7².
    assert result.at["soup"]["squared"].mean == pytest.approx(54, rel=1e-5)


def test_axes_are_orthonormal_and_span_the_checkpoints() -> None:
    points = [weights.read("", make_llama(seed), make_llama(0)) for seed in (1, 2, 3)]
    (u, v), corners = weights_axes(points)
    flat = [np.concatenate([t.numpy().ravel().astype(np.float64) for t in tensors.values()]) for tensors in (u, v)]
    gram = np.array([[one @ other for other in flat] for one in flat])
    np.testing.assert_allclose(gram, np.eye(2), atol=1e-6)
    start, end = (np.concatenate([t.numpy().ravel() for t in points[i].values()]) for i in (0, 2))
    np.testing.assert_allclose(start + corners[2][0] * flat[0] + corners[2][1] * flat[1], end, atol=1e-6)


def weights_axes(points: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[tuple[float, float]]]:
    from analysis.planes import _make_axes

    offsets = [weights.subtract(point, points[0]) for point in points[1:]]
    _, ends = _make_axes(offsets, "orthonormal", ["one", "two", "three"])
    return offsets, [(0.0, 0.0), *ends]


def test_checkpoints_are_measured_bit_for_bit_and_twice_alike() -> None:
    sources = {f"seed{seed}": make_llama(seed) for seed in (1, 2, 3)}
    mark = {"mean": {k: (v + sources["seed2"].state_dict()[k]) / 2 for k, v in sources["seed1"].state_dict().items()}}
    one, two = (
        plane(sources, {"m": logit_sum}, model=make_llama(0), steps=3, margin=0, mark=mark, progress=False)
        for _ in "12"
    )
    for name, source in sources.items():
        assert one.at[name]["m"].mean == logit_sum(source)
    assert one.values["m"][0, 0] == logit_sum(sources["seed1"])
    np.testing.assert_array_equal(one.values["m"], two.values["m"])
    assert one.coordinates == two.coordinates
    assert one.distance["mean"] < 1e-5
    assert one.coordinates["mean"] == pytest.approx((one.coordinates["seed2"][0] / 2, 0), abs=1e-5)


@pytest.mark.parametrize("coordinates", ["orthonormal", "affine"])
def test_plane_refuses_checkpoints_on_a_line(coordinates: str) -> None:
    collinear = {"one": vector(0, 0), "two": vector(4, 0), "soup": vector(2, 0)}
    with pytest.raises(ValueError, match=r"'soup': lies on the line through 'one' and 'two' .* use analysis.line"):
        plane(collinear, {"first": first}, model=Vector(), coordinates=coordinates, progress=False)
    with pytest.raises(ValueError, match="'one' and 'two' are equal"):
        plane({**CORNERS, "two": vector(0, 0)}, {"m": first}, model=Vector(), coordinates=coordinates, progress=False)


def test_affine_plane_by_hand() -> None:
    named = {"first": first, "last": last, "squared": squared_distance}
    result = plane(CORNERS, named, model=Vector(), steps=3, margin=0.5, coordinates="affine", progress=False)
    # second − origin is (5, 0) and third − origin (2, 6), in the plane's L2 coordinates.
    np.testing.assert_allclose(result.gram, [[25, 10], [10, 40]], rtol=1e-6)
    assert result.coordinates == {"one": (0, 0), "two": (1, 0), "three": (0, 1)}
    np.testing.assert_array_equal(result.x, [-0.5, 0.5, 1.5])
    np.testing.assert_array_equal(result.y, [-0.5, 0.5, 1.5])
    # a = 1 + 0.6 (5 x + 2 y), b = 3 + 6 y.
    np.testing.assert_allclose(result.values["last"], [[0] * 3, [6] * 3, [12] * 3], atol=1e-5)
    np.testing.assert_allclose(result.values["first"], 1 + 3 * result.x + 1.2 * result.y[:, None], atol=1e-5)
    for i, y in enumerate(result.y):
        for j, x in enumerate(result.x):
            point = np.array([x, y])
            assert result.values["squared"][i, j] == pytest.approx(point @ result.gram @ point, rel=1e-5)


def test_marks_have_affine_coordinates() -> None:
    mark = {"soup": vector(*np.array([5, 0]) / 3 + np.array([2, 6]) / 3, off_plane=2)}
    result = plane(CORNERS, {"m": first}, model=Vector(), steps=2, coordinates="affine", mark=mark, progress=False)
    assert result.coordinates["soup"] == pytest.approx((1 / 3, 1 / 3), abs=1e-6)
    assert result.distance["soup"] == pytest.approx(2, rel=1e-6)


SLANTED = [{"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([0.6, 0.8]), "b": torch.tensor([2.0])}]


def test_plane_along_directions_by_hand() -> None:
    """Directions (5, 0) and (1, 2) in L2 coordinates; a name that a direction lacks stays put."""
    arguments = {"model": Vector(), "directions": SLANTED, "steps": 3, "progress": False}
    named = {"first": first, "last": last, "squared": squared_distance}
    result = plane({"one": vector(0, 0)}, named, radius=2, **arguments)
    np.testing.assert_array_equal(result.x, [-2, 0, 2])
    np.testing.assert_array_equal(result.y, [-2, 0, 2])
    np.testing.assert_allclose(result.gram, [[25, 5], [5, 5]], rtol=1e-6)
    np.testing.assert_allclose(result.values["first"], 1 + 3 * result.x + 0.6 * result.y[:, None], atol=1e-5)
    np.testing.assert_allclose(result.values["last"], [[-1] * 3, [3] * 3, [7] * 3], atol=1e-6)
    assert result.values["squared"][2, 0] == pytest.approx(4 * 25 - 2 * 4 * 5 + 4 * 5, rel=1e-5)
    assert result.names == ["one"]
    assert result.coordinates == {"one": (0, 0)}

    result = plane({"one": vector(0, 0)}, named, radius=2, coordinates="orthonormal", **arguments)
    np.testing.assert_array_equal(result.gram, np.eye(2))
    np.testing.assert_allclose(result.values["squared"], result.x**2 + result.y[:, None] ** 2, atol=1e-5)
    np.testing.assert_allclose(result.values["last"], [[1] * 3, [3] * 3, [5] * 3], atol=1e-5)
    assert torch.equal(SLANTED[0]["a"], torch.tensor([3.0, 4.0])), "the caller's directions are not to be touched"


def test_marks_extend_a_plane_along_directions() -> None:
    # In multiples of the two directions the mark is at (1, 2), 3 off the plane.
    mark = {"soup": vector(5 + 2, 4, off_plane=3)}
    result = plane(
        {"one": vector(0, 0)},
        {"m": squared_distance},
        model=Vector(),
        directions=SLANTED,
        mark=mark,
        margin=0.5,
        steps=2,
        progress=False,
    )
    assert result.coordinates["soup"] == pytest.approx((1, 2), abs=1e-6)
    assert result.distance["soup"] == pytest.approx(3, rel=1e-5)
    np.testing.assert_allclose([result.x, result.y], [[-0.5, 1.5], [-1, 3]], atol=1e-5)
    assert result.at["soup"]["m"].mean == pytest.approx(49 + 16 + 9, rel=1e-5)


@pytest.mark.parametrize("coordinates", ["orthonormal", "affine"])
def test_corners_of_the_grid_are_the_checkpoints_bit_for_bit(coordinates: str) -> None:
    sources = {f"seed{seed}": make_llama(seed) for seed in (1, 2, 3)}
    result = plane(
        sources, {"m": logit_sum}, model=make_llama(0), steps=2, margin=0, coordinates=coordinates, progress=False
    )
    for name, (x, y) in result.coordinates.items():
        assert result.at[name]["m"].mean == logit_sum(sources[name])
        column, row = np.flatnonzero(result.x == x), np.flatnonzero(result.y == y)
        if coordinates == "affine" or name == "seed1":
            assert result.values["m"][row, column] == logit_sum(sources[name])


def test_the_middle_of_a_grid_along_directions_is_the_checkpoint_bit_for_bit() -> None:
    model = make_llama(1)
    pair = [directions.random(model, seed=seed) for seed in (0, 1)]
    arguments = {"model": make_llama(0), "radius": 0.3, "progress": False}
    surface = plane({"one": model}, {"m": logit_sum}, directions=pair, steps=5, **arguments)
    assert surface.x[2] == surface.y[2] == 0
    assert surface.values["m"][2, 2] == surface.at["one"]["m"].mean == logit_sum(model)
    assert abs(surface.gram[0, 1]) < 0.1 * surface.gram[0, 0]
    path = line({"one": model}, {"m": logit_sum}, direction=pair[0], steps=5, **arguments)
    assert path.at["one"]["m"].mean == logit_sum(model)
    np.testing.assert_array_equal(path.values["m"], surface.values["m"][2])  # a line is a row of a plane
    again = plane({"one": model}, {"m": logit_sum}, directions=pair, steps=5, **arguments)
    np.testing.assert_array_equal(again.values["m"], surface.values["m"])


# ── Lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_line_by_hand() -> None:
    result = line(CORNERS, {"first": first, "last": last}, model=Vector(), steps=3, margin=0.5, progress=False)
    # Segments of length 5 and √(3² + 6²), one point beyond each end.
    second = math.sqrt(45)
    assert result.length == pytest.approx(5 + second)
    travelled = [-2.5, 0, 2.5, 5, 5 + second / 2, 5 + second, 5 + 1.5 * second]
    np.testing.assert_allclose(result.t * result.length, travelled, rtol=1e-6)
    np.testing.assert_allclose(result.values["first"], [-0.5, 1, 2.5, 4, 3.1, 2.2, 1.3], atol=1e-6)
    np.testing.assert_allclose(result.values["last"], [3, 3, 3, 3, 6, 9, 12], atol=1e-6)
    np.testing.assert_array_equal(result.stderr["last"], np.full(7, 0.5))
    assert result.names == ["one", "two", "three"]
    assert result.coordinates["one"] == 0
    assert result.coordinates["three"] == 1
    assert [list(result.t).index(result.coordinates[name]) for name in result.names] == [1, 3, 5]
    assert result.at["two"]["first"].mean == pytest.approx(4)


def test_line_between_two_is_the_interpolation_coefficient() -> None:
    result = line({"a": vector(0, 0), "b": vector(8, 0)}, {"first": first}, model=Vector(), steps=5, progress=False)
    np.testing.assert_allclose(result.t, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(result.values["first"], 1 + 4.8 * result.t, rtol=1e-6)


def test_line_checkpoints_are_measured_bit_for_bit() -> None:
    sources = {f"seed{seed}": make_llama(seed) for seed in (1, 2, 3)}
    result = line(sources, {"m": logit_sum}, model=make_llama(0), steps=4, progress=False)
    for name, source in sources.items():
        assert result.at[name]["m"].mean == logit_sum(source)
        assert result.values["m"][list(result.t).index(result.coordinates[name])] == logit_sum(source)
    interpolated = make_llama(0)
    interpolated.load_state_dict(
        {k: v.lerp(sources["seed3"].state_dict()[k], 2 / 3) for k, v in sources["seed2"].state_dict().items()}
    )
    assert result.values["m"][5] == pytest.approx(logit_sum(interpolated), rel=1e-5)


def test_margin_keeps_the_spacing_and_adds_what_fits() -> None:
    result = line(
        {"a": vector(0, 0), "b": vector(8, 0)}, {"m": first}, model=Vector(), steps=5, margin=0.6, progress=False
    )
    np.testing.assert_allclose(result.t, np.arange(-2, 7) / 4)


def test_line_along_a_direction_by_hand() -> None:
    arguments = {"model": Vector(), "direction": {"a": torch.tensor([6.0, 8.0])}, "progress": False}
    result = line({"one": vector(0, 0)}, {"first": first, "last": last}, radius=0.5, steps=3, **arguments)
    np.testing.assert_array_equal(result.t, [-0.5, 0, 0.5])
    assert result.length == pytest.approx(10)
    np.testing.assert_allclose(result.values["first"], [-2, 1, 4], atol=1e-6)
    np.testing.assert_array_equal(result.values["last"], [3, 3, 3])
    assert result.coordinates == {"one": 0}
    # The checkpoint is measured, also where an even number of points leaves it out.
    even = line({"one": vector(0, 0)}, {"first": first}, radius=0.3, steps=2, **arguments)
    np.testing.assert_array_equal(even.t, [-0.3, 0, 0.3])
    assert even.at["one"]["first"].mean == 1


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tied_weights_count_once() -> None:
    zero, one = make_llama(0).state_dict(), make_llama(0).state_dict()
    one = {name: tensor.clone() for name, tensor in one.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one[name][0, :4] += 1  # the tied matrix moves by √4
    result = line({"zero": zero, "one": one}, {"m": logit_sum}, model=make_llama(1), steps=2, progress=False)
    assert result.length == pytest.approx(2, rel=1e-6)
    one["lm_head.weight"][0, 0] += 1
    with pytest.raises(
        ValueError, match=r"'one': lm_head.weight differs from model.embed_tokens.weight, but the model"
    ):
        line({"zero": zero, "one": one}, {"m": logit_sum}, model=make_llama(1), progress=False)


class WithBuffers(Vector):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.tensor([7.0]))
        self.counts = nn.Parameter(torch.tensor([3]), requires_grad=False)


def test_buffers_and_integers_stay_the_models_own() -> None:
    extra = {"statistics": torch.tensor([100.0]), "counts": torch.tensor([200])}
    sources = {"one": vector(0, 0) | extra, "two": vector(5, 0) | extra}
    seen = {"statistics": lambda m: float(m.statistics), "counts": lambda m: float(m.counts), "first": first}
    result = line(sources, seen, model=WithBuffers(), steps=3, progress=False)
    assert result.length == pytest.approx(5)
    np.testing.assert_array_equal(result.values["statistics"], [7, 7, 7])
    np.testing.assert_array_equal(result.values["counts"], [3, 3, 3])
    np.testing.assert_allclose(result.values["first"], [1, 2.5, 4], rtol=1e-6)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("measure", [line, plane])
def test_model_is_put_back(measure: Callable[..., object], error: type[BaseException] | None) -> None:
    model = make_llama(0)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint = weights.fingerprint(before)
    sources = {"self": model, "two": make_llama(2).state_dict(), "three": make_llama(3).state_dict()}

    def metric(module: nn.Module) -> float:
        assert not any(part.training for part in module.modules())
        return logit_sum(module)

    interrupted = {"m": interrupted_after(4 if error else 100, metric, error or RuntimeError)}
    if error is None:
        measure(sources, interrupted, model=model, steps=3, progress=False)
    else:
        with pytest.raises(error, match="stopped"):
            measure(sources, interrupted, model=model, steps=3, progress=False)
    assert weights.fingerprint(model.state_dict()) == fingerprint
    assert [module.training for module in model.modules()] == modes


def test_the_model_itself_may_be_a_checkpoint() -> None:
    model = Vector((1.0, 2.0), 3.0)
    sources = {"one": model.state_dict(), "two": vector(5, 0), "three": vector(2, 6)}
    result = plane(sources, {"m": first}, model=model, steps=2, mark={"self": model}, progress=False)
    assert result.coordinates["three"] == pytest.approx((2, 6), abs=1e-5)
    assert result.coordinates["self"] == (0, 0)
    assert result.at["self"]["m"].mean == 1
    assert result.at["one"]["m"].mean == 1


def test_points_are_rounded_once_to_the_models_dtype() -> None:
    model = Vector().to(torch.bfloat16)
    # bfloat16 near 1 has steps of 2⁻⁷. The middle, 1 + 3 · 2⁻⁹, is rounded up; were the start rounded first (to 1), the
    # middle would be 1 + 2⁻⁸, halfway, and go to 1.
    start = 1 + 2**-9
    sources = {
        "one": {"a": torch.tensor([start, 0.0]), "b": torch.zeros(1)},
        "two": {"a": torch.tensor([start + 2**-7, 0.0]), "b": torch.zeros(1)},
    }
    result = line(sources, {"m": first}, model=model, steps=3, progress=False)
    np.testing.assert_array_equal(result.values["m"], [1, 1 + 2**-7, 1 + 2**-7])


def test_points_of_a_plane_are_rounded_once_too() -> None:
    """1 + 1.5 · 2⁻⁹ would be rounded to 1, and once more; 1 + 3 · 2⁻⁹ goes to 1 + 2⁻⁷."""
    model = Vector().to(torch.bfloat16)
    pair = [{"a": torch.tensor([1.5 * 2**-9, x])} for x in (0.0, 1.0)]
    result = plane({"one": vector(0, 0)}, {"m": first}, model=model, directions=pair, radius=1, steps=3, progress=False)
    assert result.values["m"][2, 2] == 1 + 2**-7
    assert result.values["m"][1, 2] == 1


def test_folders_are_loaded_exactly_and_named_by_their_folder(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_llama(seed).save_pretrained(tmp_path / f"sft{seed}")
    result = line([tmp_path / "sft1", tmp_path / "sft2"], {"m": logit_sum}, steps=2, progress=False)
    assert result.names == ["sft1", "sft2"]
    assert [result.at[name]["m"].mean for name in result.names] == [logit_sum(make_llama(s)) for s in (1, 2)]


# ── Several metrics ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_callable_may_give_several_metrics() -> None:
    calls = []

    def several(model: Vector) -> dict[str, tuple[float, float]]:
        calls.append(1)
        return {"kl/soup": (float(model.a[1]), 0.25), "gold": last(model)}

    sources = {"a": vector(0, 0), "b": vector(5, 0)}
    result = line(sources, {"first": first, "samples": several}, model=Vector(), steps=3, progress=False)
    assert list(result.values) == ["first", "kl/soup", "gold"]
    np.testing.assert_allclose(result.values["kl/soup"], [2, 4, 6], rtol=1e-6)
    np.testing.assert_array_equal(result.stderr["kl/soup"], [0.25] * 3)
    assert len(calls) == 3


def test_loss_of_a_uniform_model_is_log_v() -> None:
    model = make_llama(0)
    nn.init.zeros_(model.lm_head.weight)
    estimate = metrics.loss(random_examples(seed=0), make_tokenizer())(model)
    assert estimate.mean == pytest.approx(math.log(len(WORDS)), rel=1e-6)
    assert estimate.stderr == pytest.approx(0, abs=1e-6)


def test_sampled_measures_one_rollout_every_way() -> None:
    prompts = [Prompt("p", [1, 2]), Prompt("q", [3])] * 8
    metric, other_seed = (
        metrics.sampled(
            prompts,
            make_tokenizer(),
            rewards={"gold_reward": lambda rollout: rollout.response_lengths.float() * 2},
            references={"self": ModelReference(make_llama(1)), "other": ModelReference(make_llama(2))},
            max_new_tokens=5,
            seed=seed,
        )
        for seed in (3, 4)
    )
    once, again, other = metric(make_llama(1)), metric(make_llama(1)), metric(make_llama(2))
    assert list(once) == ["gold_reward", "kl/self", "kl/other", "entropy", "response_length"]
    assert once == again
    assert other_seed(make_llama(1)) != once
    assert once["kl/self"] == (0, 0)
    assert other["kl/other"] == (0, 0)
    assert once["kl/other"].mean > 0.1
    assert once["gold_reward"].mean == 2 * once["response_length"].mean
    assert once["gold_reward"].stderr == pytest.approx(2 * once["response_length"].stderr)
    # Entropy of a uniform model is log V at every token, whatever is sampled.
    uniform = make_llama(1)
    nn.init.zeros_(uniform.lm_head.weight)
    assert metric(uniform)["entropy"].mean == pytest.approx(math.log(len(WORDS)), rel=1e-5)


def test_nan_is_kept_and_is_not_a_point_to_come(tmp_path: Path) -> None:
    def undefined_beyond(model: Vector) -> float:
        return math.log(3.2 - float(model.a[0])) if model.a[0] < 3.2 else math.nan

    sources = {"a": vector(0, 0), "b": vector(5, 0)}
    described = {"m": metrics.Described(undefined_beyond, "log"), "first": metrics.Described(first, "first")}
    path = tmp_path / "line.npz"
    result = line(sources, described, model=Vector(), steps=4, save=path, progress=False)
    np.testing.assert_array_equal(np.isnan(result.values["m"]), [False, False, False, True])
    assert result.done.all()
    assert result.num_nan == {"m": 1, "first": 0}
    assert Line.load(path).num_nan == {"m": 1, "first": 0}
    # Nothing is left to do: a NaN is not measured again.
    never = {
        name: metrics.Described(interrupted_after(0, first, RuntimeError), metric.description)
        for name, metric in described.items()
    }
    resumed = line(sources, never, model=Vector(), steps=4, save=path, resume=True, progress=False)
    np.testing.assert_array_equal(resumed.values["m"], result.values["m"])


def test_examples_are_kept_where_asked_for(tmp_path: Path) -> None:
    examples, tokenizer = random_examples(seed=0), make_tokenizer()
    sources = {f"seed{seed}": make_llama(seed) for seed in (1, 2)}
    both = {
        "loss": metrics.loss(examples, tokenizer, batch_size=4),
        "each": metrics.loss_per_example(examples, tokenizer, batch_size=4),
    }
    result = line(sources, both, model=make_llama(0), steps=3, progress=False)
    np.testing.assert_array_equal(result.values["each"], result.values["loss"])
    np.testing.assert_array_equal(result.stderr["each"], result.stderr["loss"])
    assert list(result.examples) == ["each"]
    sums, counts = result.examples["each"].swapaxes(0, 1)
    assert sums.shape == (3, len(examples))
    np.testing.assert_array_equal(counts, [[len(example.response_ids) for example in examples]] * 3)
    alone = metrics.loss(examples[2:3], tokenizer)(sources["seed1"]).mean
    assert sums[0, 2] / counts[0, 2] == pytest.approx(alone, rel=1e-6)
    loaded = Line.load(result.save(tmp_path / "line.npz"))
    np.testing.assert_array_equal(loaded.examples["each"], result.examples["each"])
    assert both["each"].description != both["loss"].description


def test_planes_keep_examples_on_their_grid() -> None:
    def coordinates(model: Vector) -> metrics.PerExample:
        return metrics.PerExample(torch.cat([model.a, model.b]))

    result = plane(CORNERS, {"m": coordinates}, model=Vector(), steps=2, progress=False)
    assert result.examples["m"].shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(result.examples["m"][..., 1, :], np.ones((2, 2, 3)))
    np.testing.assert_allclose(result.examples["m"][..., 0, :].mean(axis=-1), result.values["m"], rtol=1e-12)


def test_examples_must_stay_the_same() -> None:
    numbers = iter((2, 3))
    with pytest.raises(ValueError, match="metric 'm': gave 3 examples at point 1, but 2 before"):
        line(CORNERS, {"m": lambda model: metrics.PerExample(np.ones(next(numbers)))}, model=Vector(), progress=False)


def test_a_reference_that_moves_is_refused() -> None:
    model = make_llama(1)
    references = {"start": ModelReference(model)}
    metric = metrics.sampled([Prompt("p", [1])], make_tokenizer(), rewards={}, references=references, max_new_tokens=2)
    with pytest.raises(ValueError, match="reference 'start': is the model that is moved; load it once more"):
        line({"one": model, "two": make_llama(2)}, {"m": metric}, model=model, progress=False)


def test_empty_data_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts: none given; give at least one prompt"):
        metrics.sampled([], make_tokenizer(), rewards={}, references={}, max_new_tokens=2)
    for make in (metrics.loss, metrics.loss_per_example):
        with pytest.raises(ValueError, match="examples: none given; give at least one demonstration"):
            make([], make_tokenizer())


def test_another_reward_or_reference_of_the_same_name_is_another_metric(checkpoints: dict[str, Path]) -> None:
    def described(reward: str, reference: str) -> str:
        metric = metrics.sampled(
            [Prompt("p", [1])],
            make_tokenizer(),
            rewards={"gold_reward": load_reward(reward, policy=checkpoints["first"])},
            references={"other": load_model_reference([str(checkpoints[reference])])},
            max_new_tokens=2,
        )
        return metrics.describe({"": metric})[""]

    first = described("helpers:share_of_a", "first")
    assert described("helpers:share_of_a", "first") == first
    others = [("helpers:count_words", "first"), (str(checkpoints["reward"]), "first"), ("helpers:share_of_a", "second")]
    assert len({first, *(described(*other) for other in others)}) == 4


# ── Several processes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_processes_share_the_points(tmp_path: Path) -> None:
    """Both get all of it, the same numbers as one alone, and neither measures a point of the other's."""

    def compute(folder: Path) -> None:
        folder.mkdir()
        for measure in (plane, line):
            calls = []

            def counted(model: Vector, calls: list[int] = calls) -> dict[str, metrics.Value]:
                calls.append(1)
                return {"first": first(model), "last": last(model), "each": metrics.PerExample(model.a)}

            described = {"m": metrics.Described(counted, "several")}
            save = tmp_path / f"{measure.__name__}.npz"
            result = measure(CORNERS, described, model=Vector(), steps=3, save=save, resume=True, progress=False)
            result.metadata["calls"] = len(calls)
            result.save(folder / save.name)

    def as_rank() -> int:
        compute(tmp_path / os.environ["RANK"])
        return 0

    assert forked(*as_ranks(as_rank)) == [0, 0]
    for measure, kind in ((plane, Plane), (line, Line)):
        saved = kind.load(tmp_path / f"{measure.__name__}.npz")  # by the main process
        (tmp_path / f"{measure.__name__}.npz").unlink()
        results = [kind.load(tmp_path / rank / f"{measure.__name__}.npz") for rank in "01"]
        num = len(saved.measurements.done)
        assert [result.metadata["calls"] for result in results] == [-(-num // 2), num // 2]
    compute(tmp_path / "alone")
    for measure, kind in ((plane, Plane), (line, Line)):
        alone = kind.load(tmp_path / "alone" / f"{measure.__name__}.npz")
        for rank in "01":
            result = kind.load(tmp_path / rank / f"{measure.__name__}.npz")
            assert result.measurements.names == alone.measurements.names
            for field in ("values", "stderr", "done"):
                np.testing.assert_array_equal(getattr(result.measurements, field), getattr(alone.measurements, field))
            np.testing.assert_array_equal(result.examples["each"], alone.examples["each"])


def test_what_fails_in_one_process_ends_all() -> None:
    """The last of three points, which is the second process's, is where b is 9."""

    def as_rank() -> int:
        model = Vector()
        try:
            line(CORNERS, {"m": lambda model: 1 / (float(model.b) - 9)}, model=model, steps=2, progress=False)
        except ZeroDivisionError:
            return 0 if torch.equal(model.a, torch.zeros(2)) else 1
        return 2

    assert forked(*as_ranks(as_rank)) == [0, 0]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("measure", [line, plane])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_resuming_equals_one_go(measure: Callable[..., Line], error: type[BaseException], tmp_path: Path) -> None:
    arguments = {"model": Vector(), "steps": 3, "progress": False}
    path = tmp_path / "new" / "result.npz"
    with pytest.raises(error):
        measure(CORNERS, {"m": interrupted_after(4, first, error)}, save=path, **arguments)
    unfinished = (Line if measure is line else Plane).load(path)
    assert unfinished.measurements.done.sum() == 4
    assert unfinished.num_nan == {"m": 0}, "what is not measured yet is not a NaN that was measured"
    np.testing.assert_array_equal(np.isnan(unfinished.measurements.values[0]), ~unfinished.measurements.done)

    whole = measure(CORNERS, {"m": UNINTERRUPTED}, **arguments)
    remaining = len(whole.measurements.done) - 4
    resumed = measure(CORNERS, {"m": interrupted_after(remaining, first, error)}, save=path, resume=True, **arguments)
    np.testing.assert_array_equal(resumed.values["m"], whole.values["m"])
    assert resumed.at.keys() == whole.at.keys()
    assert [e["m"].mean for e in resumed.at.values()] == [e["m"].mean for e in whole.at.values()]
    finished = measure(CORNERS, {"m": interrupted_after(0, first, error)}, save=path, resume=True, **arguments)
    np.testing.assert_array_equal(finished.values["m"], whole.values["m"])
    assert [file.name for file in path.parent.iterdir()] == ["result.npz"]


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plane.npz"
    arguments = {"model": Vector(), "steps": 2, "progress": False, "save": path}
    plane(CORNERS, {"m": UNINTERRUPTED}, **arguments)
    with pytest.raises(FileExistsError, match="exists already; continue it with resume=True"):
        plane(CORNERS, {"m": UNINTERRUPTED}, **arguments)
    arguments["resume"] = True
    for changed in (
        {"steps": 3},
        {"margin": 0.1},
        {"checkpoints": {**CORNERS, "three": vector(2, 6.001)}},
        {"checkpoints": {"one": CORNERS["one"], "two": CORNERS["two"], "drei": CORNERS["three"]}},
        {"metrics": {"m": metrics.Described(first, "another")}},
        {"metrics": {"n": UNINTERRUPTED}},
        {"mark": {"soup": vector(1, 1)}},
        {"coordinates": "affine"},
    ):
        call = {"checkpoints": CORNERS, "metrics": {"m": UNINTERRUPTED}} | arguments | changed
        with pytest.raises(
            ValueError, match=r"plane.npz: was computed with (steps|margin|checkpoints|coordinates|metrics)="
        ):
            plane(**call)
    with pytest.raises(ValueError, match="holds a Plane, expected a Line"):
        line(CORNERS, {"m": UNINTERRUPTED}, **arguments)
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"plane.npz: not a result that analysis saved"):
        plane(CORNERS, {"m": UNINTERRUPTED}, **arguments)


def test_resuming_along_another_direction_is_refused(tmp_path: Path) -> None:
    arguments = {"model": Vector(), "steps": 2, "progress": False, "radius": 1.0}
    for measure, name, given in ((plane, "directions", SLANTED), (line, "direction", SLANTED[0])):
        save = {"save": tmp_path / f"{name}.npz", "resume": True}
        once = measure({"one": vector(0, 0)}, {"m": UNINTERRUPTED}, **{name: given}, **save, **arguments)
        again = measure({"one": vector(0, 0)}, {"m": UNINTERRUPTED}, **{name: given}, **save, **arguments)
        np.testing.assert_array_equal(once.values["m"], again.values["m"])
        other = SLANTED[::-1] if measure is plane else SLANTED[1]
        with pytest.raises(ValueError, match=f"{name}.npz: was computed with directions="):
            measure({"one": vector(0, 0)}, {"m": UNINTERRUPTED}, **{name: other}, **save, **arguments)
        with pytest.raises(ValueError, match=f"{name}.npz: was computed with radius=1.0, now 2"):
            measure({"one": vector(0, 0)}, {"m": UNINTERRUPTED}, **{name: given}, **save, **arguments | {"radius": 2})


def test_saving_and_loading_loses_nothing(tmp_path: Path) -> None:
    surface = plane(
        CORNERS, {"m": first, "l": last}, model=Vector(), steps=2, mark={"soup": vector(1, 1)}, progress=False
    )
    path = line(CORNERS, {"m": first, "l": last}, model=Vector(), steps=2, progress=False)
    for result in (surface, path):
        loaded = type(result).load(result.save(tmp_path / "result.npz"))
        for field, value in vars(result).items():
            if field == "measurements":
                np.testing.assert_array_equal(loaded.measurements.values, value.values)
                np.testing.assert_array_equal(loaded.measurements.stderr, value.stderr)
                assert loaded.measurements.names == value.names
            elif isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(loaded, field), value)
            else:
                assert getattr(loaded, field) == value


def test_failed_save_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    result = line({"a": vector(0, 0), "b": vector(8, 0)}, {"m": first}, model=Vector(), steps=2, progress=False)
    before = result.save(tmp_path / "line.npz").read_bytes()
    result.metadata["unfit for JSON"] = object()
    with pytest.raises(TypeError):
        result.save(tmp_path / "line.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["line.npz"]
    assert (tmp_path / "line.npz").read_bytes() == before


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in vector(5, 0).items() if key != name}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"two": without("b")}, "checkpoint 'two': lacks tensors for Vector, 1 of them (first: ['b'])"),
        ({"two": vector(5, 0) | {"c": torch.zeros(1)}}, "'two': has unexpected tensors for Vector, 1 of them"),
        ({"two": without("b") | {"b": torch.zeros(2)}}, "shape [2], the model's is torch.float32 of shape [1]"),
        ({"two": without("b") | {"b": torch.zeros(1, dtype=torch.int8)}}, "b is torch.int8 of shape [1]"),
        ({"two": without("b") | {"b": torch.tensor([math.nan])}}, "checkpoint 'two': b has NaN or infinite values"),
        ({"two": without("a") | {"a": torch.tensor([1, -math.inf])}}, "'two': a has NaN or infinite values"),
        ({"two": without("a") | {"a": torch.tensor([math.nan, 1])}}, "'two': a has NaN or infinite values"),
        ({"two": "folder"}, "checkpoint 'two': is a folder, but Vector cannot be loaded from one; give a state dict"),
        ({"two": vector(0, 0)}, "checkpoints 'one' and 'two' are equal"),
    ],
)
def test_unfit_checkpoints_are_named(changed: dict[str, weights.Source], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        line({"one": vector(0, 0), **changed}, {"m": first}, model=Vector(), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": {"one": vector(0, 0)}}, "checkpoints=['one']: a line needs at least two"),
        ({"checkpoints": [vector(0, 0), vector(1, 0)]}, "checkpoint 0: a dict has no name; give a dict of name"),
        ({"checkpoints": ["a/policy", "b/policy"]}, "b/policy has the same name as a/policy"),
        ({"checkpoints": "sft1"}, "checkpoints='sft1': expected several checkpoints"),
        ({"model": None}, "model: none given, and none of the checkpoints ['one', 'two', 'three'] is a folder"),
        ({"steps": 1}, "steps=1: must be at least 2"),
        ({"direction": SLANTED[0]}, "radius=None: goes with direction; give both or neither"),
        ({"radius": 1.0}, "radius=1.0: goes with direction; give both or neither"),
        ({"direction": SLANTED[0], "radius": 1.0}, "a line along a direction starts from one checkpoint"),
        (
            {"direction": SLANTED[0], "radius": -1.0, "checkpoints": {"one": CORNERS["one"]}},
            "radius=-1.0: must be finite and above 0",
        ),
        ({"margin": -0.1}, "margin=-0.1: must be finite and at least 0"),
        ({"metrics": {}}, "metrics: none given"),
        ({"metrics": {"m": 3}}, "metric 'm': a int is not callable"),
        (
            {"metrics": {"m": lambda model: "high"}},
            "metric 'm': returned 'high'; return a float, (mean, stderr)",
        ),
        ({"metrics": {"m": lambda model: (1, 2, 3)}}, "metric 'm': returned (1, 2, 3)"),
        ({"metrics": {"m": first, "n": lambda model: {"m": 1.0}}}, "metric 'n': gives 'm', which another metric gives"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    call = {"checkpoints": CORNERS, "metrics": {"m": first}, "model": Vector(), "progress": False} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        line(**call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": {"one": vector(0, 0)}}, "checkpoints=['one']: a plane needs three, found 1; give three, or"),
        ({"radius": 1.0}, "radius=1.0: goes with directions; give margin for a plane through checkpoints"),
        ({"directions": SLANTED}, "checkpoints=['one', 'two', 'three']: 2 directions; a plane is spanned by two"),
        ({"coordinates": "polar"}, "coordinates='polar': must be one of orthonormal, affine"),
        ({"mark": {"two": vector(1, 1)}}, "mark=['two']: names of the plane's own checkpoints"),
    ],
)
def test_bad_arguments_of_planes_are_named(arguments: dict[str, object], message: str) -> None:
    call = {"checkpoints": CORNERS, "metrics": {"m": first}, "model": Vector(), "progress": False} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        plane(**call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": SLANTED[:1]}, "checkpoints=['one']: 1 directions; a plane is spanned by two directions"),
        ({"directions": SLANTED, "radius": None}, "radius: none given, and nothing marked that the grid could reach"),
        ({"directions": [SLANTED[0], {"a": torch.tensor([-6.0, -8.0])}]}, "directions: the second is parallel to the"),
        ({"directions": [{"c": torch.ones(1)}, SLANTED[0]]}, "direction 1: has unexpected tensors for Vector"),
        ({"directions": [SLANTED[0], {"a": torch.ones(3)}]}, "direction 2: a is torch.float32 of shape [3]"),
    ],
)
@pytest.mark.parametrize("coordinates", ["orthonormal", "affine"])
def test_unfit_directions_of_planes_are_named(arguments: dict[str, object], message: str, coordinates: str) -> None:
    call = {"radius": 1.0, "model": Vector(), "coordinates": coordinates, "progress": False} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        plane({"one": vector(0, 0)}, {"m": first}, **call)


def test_metrics_must_keep_their_names() -> None:
    names = iter("abc")
    with pytest.raises(ValueError, match=r"metrics: gave \['b'\] at point 1, but \['a'\] before"):
        line(CORNERS, {"m": lambda model: {next(names): 1.0}}, model=Vector(), progress=False)


def test_folder_with_missing_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for seed in (1, 2):
        make_llama(seed).save_pretrained(tmp_path / f"sft{seed}")
    file = tmp_path / "sft2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"sft2: 1 missing tensors for LlamaForCausalLM \(first: \['model.norm.weight'"
    ):
        line([tmp_path / "sft1", tmp_path / "sft2"], {"m": logit_sum}, progress=False)
    with pytest.raises(FileNotFoundError, match=r"sft3: no such folder"):
        line([tmp_path / "sft1", tmp_path / "sft3"], {"m": logit_sum}, progress=False)

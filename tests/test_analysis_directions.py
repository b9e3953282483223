"""Directions: norms by hand, seeds by name, principal components against an SVD, adapters against their matrices."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_gpt2, make_llama, make_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import directions, line, plane, weights
from rlhf.checkpointing import save_model


class Layers(nn.Module):
    """A matrix of two filters, a convolution of two, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.convolution = nn.Conv1d(1, 2, 2, bias=False)


THETA = {
    "linear.weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
    "linear.bias": torch.tensor([2.0, 0.0]),
    "convolution.weight": torch.tensor([[[0.0, 1.0]], [[6.0, 8.0]]]),
}
D = {
    "linear.weight": torch.tensor([[1.0, 0.0], [5.0, 0.0]]),
    "linear.bias": torch.tensor([0.0, 4.0]),
    "convolution.weight": torch.tensor([[[0.0, -4.0]], [[3.0, 4.0]]]),
}


def normalized(**settings: str) -> dict[str, list[float]]:
    result = directions.normalized(D, THETA, model=Layers(), **settings)
    return {name: tensor.flatten().tolist() for name, tensor in result.items()}


# ── Normalisation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_filters_by_hand() -> None:
    # Filter norms of θ: 5 and 0; 1 and 10. A filter of zeros has no scale: the direction leaves it.
    expected = {
        "linear.weight": [5, 0, 0, 0],
        "linear.bias": [0, 0],
        "convolution.weight": [0, -1, 6, 8],
    }
    assert normalized() == expected
    assert normalized(vectors="scaled") == expected | {"linear.bias": [0, 2]}


def test_layers_and_model_by_hand() -> None:
    layers = normalized(normalize="layer")
    assert layers["linear.weight"] == pytest.approx([5 / 26**0.5, 0, 25 / 26**0.5, 0])
    assert layers["convolution.weight"] == pytest.approx([x * (101 / 41) ** 0.5 for x in (0, -4, 3, 4)])
    assert layers["linear.bias"] == [0, 0]
    assert normalized(normalize="layer", vectors="scaled")["linear.bias"] == [0, 2]
    # ‖θ‖² is 25 + 101 without the bias, 4 more with it; ‖d‖² is 26 + 41, and 16 more.
    for vectors, factor, bias in (("fixed", (126 / 67) ** 0.5, 0.0), ("scaled", (130 / 83) ** 0.5, 4.0)):
        model = normalized(normalize="model", vectors=vectors)
        assert model["linear.weight"] == pytest.approx([factor, 0, 5 * factor, 0])
        assert model["linear.bias"] == pytest.approx([0, bias * factor])
    assert normalized(normalize="none")["linear.weight"] == D["linear.weight"].flatten().tolist()
    assert normalized(normalize="none", vectors="scaled")["linear.bias"] == [0, 4]


def test_every_filter_of_a_random_direction_has_its_weights_norm() -> None:
    model = make_llama(0)
    direction = directions.random(model, seed=3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert not direction[name].any()
        else:
            np.testing.assert_allclose(rows(direction[name]), rows(parameter), rtol=1e-6)
    # The tied head is the embedding, once.
    assert "lm_head.weight" not in direction
    assert weights.norm(direction) == pytest.approx(
        weights.norm({n: p for n, p in weights.moving_parameters(model).items() if p.dim() > 1}), rel=1e-6
    )


def rows(tensor: Tensor) -> np.ndarray:
    return np.linalg.norm(tensor.detach().double().flatten(1).numpy(), axis=1)


def test_filters_of_gpt2_are_columns() -> None:
    """Its Conv1D holds the weights of an output in a column; those of its embeddings are rows."""
    model = make_gpt2(0)
    direction = directions.random(model, seed=0)
    name = "transformer.h.0.attn.c_attn.weight"
    weight = model.get_parameter(name)
    assert weight.shape == (16, 48)
    np.testing.assert_allclose(rows(direction[name].T), rows(weight.T), rtol=1e-6)
    assert not np.allclose(rows(direction[name]), rows(weight), rtol=1e-2)
    wte = "transformer.wte.weight"
    np.testing.assert_allclose(rows(direction[wte]), rows(model.get_parameter(wte)), rtol=1e-6)


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_random_numbers_go_by_seed_and_name() -> None:
    one = directions.random(make_llama(0), normalize="none", vectors="scaled", seed=5)
    fewer = directions.random(make_llama(0, num_hidden_layers=1), normalize="none", vectors="scaled", seed=5)
    assert 1 < len(fewer) < len(one)
    assert all(torch.equal(tensor, one[name]) for name, tensor in fewer.items())
    wide = directions.random(make_llama(0).double(), normalize="none", vectors="scaled", seed=5)
    assert all(torch.equal(tensor, one[name].double()) for name, tensor in wide.items())
    same_shape = [name for name in one if name.endswith("up_proj.weight")]
    assert len(same_shape) == 2
    assert not torch.equal(*(one[name] for name in same_shape))
    other = directions.random(make_llama(0), normalize="none", vectors="scaled", seed=6)
    flat, flat_other = (torch.cat([t.flatten() for t in d.values()]).double() for d in (one, other))
    num = len(flat)
    # Mean 0, variance 1, cosine 0, each within five standard errors.
    assert abs(flat.mean()) < 5 / num**0.5
    assert abs(flat.var() - 1) < 5 * (2 / num) ** 0.5
    assert abs(flat @ flat_other) / num < 5 / num**0.5


# ── Trajectories ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_principal_components_are_those_of_an_svd() -> None:
    sources = {f"step{i}": make_llama(i).double() for i in range(5)}
    found = directions.trajectory(sources, num_components=3, model=make_llama(9).double(), progress=False)
    points = np.stack([flat(weights.read("", model, model)) for model in sources.values()])
    _, singular, axes = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(found.explained, singular[:3] ** 2 / (singular**2).sum(), rtol=1e-9)
    for axis, component in zip(axes, found.components, strict=False):
        sign = np.sign(axis @ flat(component))
        np.testing.assert_allclose(flat(component), sign * axis, atol=1e-9)
    projected = (points - points[-1]) @ np.stack([flat(component) for component in found.components]).T
    np.testing.assert_allclose(np.stack(list(found.coordinates.values())), projected, atol=1e-9)
    assert list(found.coordinates) == list(sources)
    np.testing.assert_array_equal(found.coordinates["step4"], np.zeros(3))


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors.values()])


def test_plane_of_a_run(tmp_path: Path) -> None:
    """A run folder's checkpoints, oldest first; on a plane of their components they lie where the components say."""
    tokenizer = make_tokenizer()
    for step in (2, 10, 4):
        save_model(make_llama(step), tokenizer, tmp_path / "run" / f"checkpoint-{step}")
    path = directions.trajectory(tmp_path / "run", progress=False)
    assert list(path.coordinates) == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert path.explained.sum() == pytest.approx(1)  # three points lie in a plane
    folders = [tmp_path / "run" / name for name in path.coordinates]
    metric = {"norm": lambda model: weights.norm(weights.moving_parameters(model))}
    result = plane(folders[-1:], metric, directions=path.components, mark=folders[:-1], steps=2, progress=False)
    assert result.names == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]
    for name in result.names:
        np.testing.assert_allclose(result.coordinates[name], path.coordinates[name], atol=1e-4)
        assert result.distance[name] == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(result.gram, np.eye(2), atol=1e-6)
    # The grid reaches a quarter beyond the checkpoints.
    places = np.array(list(path.coordinates.values()))
    low, high = places.min(axis=0), places.max(axis=0)
    np.testing.assert_allclose([result.x[0], result.y[0]], (5 * low - high) / 4, rtol=1e-4)
    np.testing.assert_allclose([result.x[-1], result.y[-1]], (5 * high - low) / 4, rtol=1e-4)


@pytest.mark.parametrize(
    ("num", "seeds", "message"),
    [
        (2, (1, 2), "num_components=2: must be at least 1 and less than the 2 checkpoints ['0', '1']"),
        (0, (1, 2), "num_components=0: must be at least 1"),
        (2, (1, 2, 2), "checkpoints: differ in fewer than 2 dimensions"),
        (1, (1, 1), "checkpoints: differ in fewer than 1 dimensions"),
    ],
)
def test_too_few_checkpoints_are_refused(num: int, seeds: tuple[int, ...], message: str) -> None:
    sources = {str(i): make_llama(seed) for i, seed in enumerate(seeds)}
    with pytest.raises(ValueError, match=re.escape(message)):
        directions.trajectory(sources, num_components=num, model=make_llama(0), progress=False)


# ── Differences and adapters ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[str, Tensor]:
    """ "BASE+ADAPTER" of bfloat16 weights, and the update s B A of the one module that it changes."""
    save_model(make_llama(1).bfloat16(), make_tokenizer(), tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, generator=generator), torch.randn(32, 2, generator=generator)
    module = "model.layers.1.mlp.up_proj"
    folder = tmp_path / "lora"
    folder.mkdir()
    prefix = f"base_model.model.{module}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"{tmp_path / 'base'}+{folder}", 1.5 * b.double() @ a.double()


def test_an_adapters_direction_is_its_update(adapter: tuple[str, Tensor]) -> None:
    source, update = adapter
    direction = directions.delta(source)
    changed = {name: tensor for name, tensor in direction.items() if tensor.any()}
    assert list(changed) == ["model.layers.1.mlp.up_proj.weight"]
    assert changed["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32
    torch.testing.assert_close(
        changed["model.layers.1.mlp.up_proj.weight"].double(), update, rtol=1e-5, atol=1e-6 * float(update.abs().max())
    )
    # From the base at 0 to base and adapter at 1, which is a checkpoint of its own right.
    base = source.split("+")[0]
    norm = {"norm": lambda model: weights.norm(weights.moving_parameters(model))}
    along = line([base], norm, direction=direction, radius=1, steps=3, progress=False)
    between = line({"base": base, "tuned": source}, norm, steps=2, progress=False)
    assert along.length == pytest.approx(float(update.norm()), rel=1e-5)
    assert between.length == pytest.approx(along.length, rel=1e-4)
    np.testing.assert_allclose(along.values["norm"][1:], between.values["norm"], rtol=1e-6)


def test_delta_leads_from_the_base_to_the_checkpoint() -> None:
    end, start = make_llama(1), make_llama(2)
    direction = directions.delta(end, start)
    for name, tensor in direction.items():
        assert torch.equal(tensor, end.get_parameter(name) - start.get_parameter(name))
    with pytest.raises(ValueError, match='base: none given, and the checkpoint is no "BASE\\+ADAPTER"'):
        directions.delta(end)


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("direction", "settings", "message"),
    [
        (D, {"normalize": "row"}, "normalize='row': must be one of filter, layer, model, none"),
        (D, {"vectors": "ignore"}, "vectors='ignore': must be one of fixed, scaled"),
        ({"linear.bias": D["linear.bias"]}, {}, "normalize='filter', vectors='fixed': is zero everywhere"),
        ({"head": torch.ones(2)}, {}, "direction: has unexpected tensors for Layers, 1 of them (first: ['head'])"),
        ({"linear.bias": torch.ones(3)}, {}, "direction: linear.bias is torch.float32 of shape [3], the model's is"),
        ({"linear.bias": torch.tensor([math.inf, 0])}, {}, "direction: linear.bias has NaN or infinite values"),
        ({"linear.bias": torch.zeros(2)}, {}, "direction: is zero everywhere; give a direction that leads somewhere"),
        ([torch.ones(2)], {}, "direction: a list is no direction; give a dict of name to tensor"),
    ],
)
def test_unfit_directions_are_named(direction: dict[str, Tensor], settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        directions.normalized(direction, THETA, model=Layers(), **settings)


def test_a_tied_weight_goes_by_any_of_its_names() -> None:
    model = make_llama(0)
    head = torch.ones_like(model.lm_head.weight)
    read = weights.read_direction("direction", {"lm_head.weight": head}, model)
    assert torch.equal(read["model.embed_tokens.weight"], head)
    assert weights.norm(read) == pytest.approx(head.numel() ** 0.5)
    with pytest.raises(ValueError, match=r"direction: lm_head.weight differs from model.embed_tokens.weight, but"):
        weights.read_direction("direction", {"lm_head.weight": head, "model.embed_tokens.weight": 2 * head}, model)

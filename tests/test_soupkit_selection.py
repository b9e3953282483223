"""Greedy soups, learned soups, Fisher information, averages along a run: hand-worked numbers and torch's autograd."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import soupkit
from soupkit import MergeError, learned
from soupkit.checkpoint import open_checkpoint
from soupkit.fisher import fisher_information, save_fisher
from soupkit.learned import learned_soup
from soupkit.selection import greedy_soup
from soupkit.trajectory import checkpoints_of, ema, lawa

State = dict[str, Tensor]


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor([float(value)]) for value in values]


def near(target: float) -> Callable[[Tensor], float]:
    return lambda x: -abs(x.item() - target)


def save(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


# Greedy soups ---------------------------------------------------------------------------------------------------------


def test_greedy_by_hand():
    # Distances to 3: 2, 1, 6. From 4: with 1 the mean is 2.5, at distance 0.5; with 9 it is 14/3, at distance 5/3.
    result = greedy_soup(scalars(1, 4, 9), near(3), progress=False)
    assert result.names == ("candidate 1", "candidate 2", "candidate 3")
    assert result.scores == (-2, -1, -6)
    assert result.order == ("candidate 2", "candidate 1", "candidate 3")
    assert result.accepted == ("candidate 2", "candidate 1")
    assert [row[::2] for row in result.history] == [
        ("candidate 2", True),
        ("candidate 1", True),
        ("candidate 3", False),
    ]
    assert [row[1] for row in result.history] == pytest.approx([-1, -0.5, -5 / 3])
    assert result.score == -0.5
    assert result.soup.tolist() == [2.5]


@pytest.mark.parametrize(("values", "names"), [((0, 2, 5), "abc"), ((2, 0, 5), "abc"), ((5, 0, 2), "bca")])
def test_equal_scores_keep_the_order_given(values, names):
    result = greedy_soup(scalars(*values), near(1), names=["a", "b", "c"], progress=False)  # 0 and 2 score -1
    assert "".join(result.order) == names
    assert "".join(result.accepted) == names[:2]
    assert result.soup.tolist() == [1]


def test_a_candidate_that_changes_nothing_stays():
    assert greedy_soup(scalars(1, 1, 1), near(5), progress=False).accepted == (
        "candidate 1", "candidate 2", "candidate 3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tolerance", "accepted"), [(0, "ab"), (1.16, "ab"), (1.17, "abc"), (-0.5, "ab"), (-0.51, "a")]
)  # b raises the score by 0.5, c lowers it by 7/6
def test_tolerance_by_hand(tolerance, accepted):
    result = greedy_soup(scalars(4, 1, 9), near(3), names=list("abc"), tolerance=tolerance, progress=False)
    assert "".join(result.accepted) == accepted


def test_tolerance_counts_at_each_step():
    # The means 0, 0.5, 1 score 0, -0.5, -1: each step within 0.6, the two together beyond it.
    result = greedy_soup(scalars(0, 1, 2), near(0), tolerance=0.6, progress=False)
    assert len(result.accepted) == 3
    assert result.score == -1


def test_each_candidate_and_each_trial_is_evaluated_once():
    seen: list[float] = []

    def evaluate(x: Tensor) -> float:
        seen.append(x.item())
        return near(3)(x)

    greedy_soup(scalars(1, 4, 10), evaluate, progress=False)
    assert seen == [1, 4, 10, 2.5, 5]
    seen.clear()
    assert greedy_soup(scalars(7), evaluate, progress=False).soup.tolist() == [7]
    assert seen == [7]


def test_every_soup_is_rounded_once_from_its_ingredients():
    generator = torch.Generator().manual_seed(0)
    candidates = [torch.randn(500, generator=generator).bfloat16() for _ in range(3)]
    soup = greedy_soup(candidates, lambda x: 0.0, progress=False).soup
    exact = torch.stack(candidates).double().mean(dim=0)
    half_unit = 2.0 ** (exact.abs().log2().floor() - 8)  # bfloat16 keeps 8 binary digits

    def off_by_more(x: Tensor) -> int:
        return int(((x.double() - exact).abs() > 1.001 * half_unit).sum())

    assert off_by_more(soup) == 0
    assert off_by_more((candidates[0] + candidates[1]) / 2 * (2 / 3) + candidates[2] / 3) > 100  # a running mean


def test_greedy_on_every_kind(tmp_path):
    modules = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    for module, value in zip(modules, (1.0, 4.0, 9.0), strict=True):
        nn.init.constant_(module.weight, value)
    folders = [save(tmp_path / name, module.state_dict()) for name, module in zip("abc", modules, strict=True)]

    def evaluate(model: Any) -> float:
        weight = model.weight if isinstance(model, nn.Module) else model["weight"]
        score = near(3)(weight)
        with torch.no_grad():
            weight.fill_(100.0)  # a rude evaluator reaches copies alone
        return score

    of_modules = greedy_soup(modules, evaluate, progress=False)
    assert [module.weight.item() for module in modules] == [1, 4, 9]
    assert isinstance(of_modules.soup, nn.Linear)
    assert of_modules.soup.weight.item() == 2.5
    states = [module.state_dict() for module in modules]
    of_states = greedy_soup(states, evaluate, progress=False)
    assert [state["weight"].item() for state in states] == [1, 4, 9]
    of_folders = greedy_soup(folders, evaluate, progress=False)
    assert of_folders.names == tuple(map(str, folders))
    assert of_states.soup["weight"].item() == of_folders.soup["weight"].item() == 2.5
    assert of_modules.scores == of_states.scores == of_folders.scores == (-2, -1, -6)
    written = greedy_soup(folders, evaluate, out=tmp_path / "soup", dtype="float64", progress=False)
    assert written.soup == tmp_path / "soup"
    assert load_file(written.soup / "model.safetensors")["weight"].dtype == torch.float64


def test_greedy_shows_its_progress(capsys):
    greedy_soup(scalars(1, 2), near(1))
    assert "greedy soup: 100%" in capsys.readouterr().err
    greedy_soup(scalars(1, 2), near(1), progress=False)
    assert capsys.readouterr().err == ""


def never(model: Any, step: int = 0) -> Any:
    raise AssertionError("evaluated before the check")


@pytest.mark.parametrize(
    ("candidates", "evaluate", "options", "message"),
    [
        (scalars(1, 2), lambda x: float("nan") if x.item() == 2 else 0, {"names": "ab"}, "evaluate gave NaN for b"),
        (scalars(1, 2), lambda x: float("nan") if x.item() == 1.5 else 0, {}, "evaluate gave NaN for candidate 2"),
        (scalars(1, 2), lambda x: None, {}, "evaluate gave a NoneType for candidate 1: return one number"),
        (scalars(1, 2), never, {"names": ["a"]}, "found 1 names for 2 candidates"),
        (scalars(1, 2), never, {"names": ["a", "a"]}, "two candidates are called 'a'"),
        (scalars(1, 2), never, {"tolerance": float("nan")}, "tolerance is nan"),
        (scalars(1, 2), never, {"out": "soup"}, "out='soup' is for folders"),
        ([torch.zeros(1), torch.zeros(2)], never, {}, "shape [1] in ingredient 1 and [2]"),
        ([], never, {}, "found 0 models to merge"),
    ],
)
def test_greedy_refuses(candidates, evaluate, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MergeError, match=re.escape(message)):
        greedy_soup(candidates, evaluate, progress=False, **options)


def test_greedy_refuses_an_existing_folder_before_it_evaluates(tmp_path):
    folders = [save(tmp_path / name, {"weight": torch.zeros(1)}) for name in "ab"]
    (tmp_path / "c").mkdir()
    with pytest.raises(FileExistsError, match=r"c exists: choose another output folder"):
        greedy_soup(folders, never, out=tmp_path / "c", progress=False)
    with pytest.raises(FileExistsError, match=r"b is one of the models that are merged: choose another output folder"):
        greedy_soup(folders, never, out=tmp_path / "b", progress=False)


def test_greedy_takes_options_of_the_folder_it_writes(tmp_path):
    folders = [save(tmp_path / name, {"w": torch.zeros(2), "v": torch.ones(2)}) for name in "ab"]
    out = greedy_soup(folders, lambda state: 1.0, out=tmp_path / "soup", max_shard_size="8", progress=False).soup
    assert len(list(out.glob("*.safetensors"))) == 2
    with pytest.raises(MergeError, match=r"^max_shard_size 'much' is not a size"):
        greedy_soup(folders, never, out=tmp_path / "other", max_shard_size="much", progress=False)
    with pytest.raises(MergeError, match=r"^max_shard_size='8' is for a folder that is written: give out"):
        greedy_soup(folders, never, max_shard_size="8", progress=False)


def test_exceptions_of_evaluate_pass_through():
    error = RuntimeError("out of data")

    def evaluate(model: Any) -> float:
        raise error

    with pytest.raises(RuntimeError) as caught:
        greedy_soup(scalars(1, 2), evaluate, progress=False)
    assert caught.value is error


# Learned soups --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two numbered layers between an embedding and a head that is the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def tied_models(num: int) -> list[Tied]:
    torch.manual_seed(0)
    return [Tied().double() for _ in range(num)]


TOKENS = torch.tensor([[0, 1], [2, 3], [4, 0]])


def token_loss(model: nn.Module, step: int) -> Tensor:
    tokens = TOKENS[step % len(TOKENS)]
    return nn.functional.cross_entropy(model(tokens), tokens.flip(0))


GROUPS = {
    "model": [""],
    "layer": ["embedding.weight", "layers.0", "layers.1"],
    "tensor": ["embedding.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"],
}


def autograd_fit(
    models: Sequence[nn.Module], groups: Sequence[str], steps: int, optimizer: type[torch.optim.Optimizer], rate: float
) -> tuple[Tensor, list[float]]:
    """The oracle: all candidates in memory, and torch's own derivative through the mixture and the softmax."""
    logits = torch.zeros(len(groups), len(models), dtype=torch.float64, requires_grad=True)
    chosen = optimizer([logits], lr=rate)  # type: ignore[call-arg]
    losses = []
    for step in range(steps):
        weights = logits.softmax(dim=1)
        mixture = {}
        for name, _ in models[0].named_parameters():
            (row,) = [row for row, group in enumerate(groups) if name.startswith(group)]
            stacked = torch.stack([model.get_parameter(name).detach() for model in models])
            mixture[name] = torch.einsum("i,i...->...", weights[row], stacked)
        tokens = TOKENS[step % len(TOKENS)]
        outputs = functional_call(models[0], mixture, (tokens,), tie_weights=True)
        loss = nn.functional.cross_entropy(outputs, tokens.flip(0))
        losses.append(loss.item())
        chosen.zero_grad()
        loss.backward()
        chosen.step()
    return logits.detach().softmax(dim=1), losses


@pytest.mark.parametrize("per", GROUPS)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])  # SGD shows the size of the gradient, to which Adam is blind
def test_learned_weights_follow_autograd(per, optimizer, monkeypatch):
    models = tied_models(3)
    chosen = getattr(torch.optim, optimizer)
    weights, losses = autograd_fit(models, GROUPS[per], 4, chosen, 0.3)
    monkeypatch.setattr(torch.optim, "Adam", chosen)
    result = learned_soup(
        models, token_loss, model=Tied().double(), steps=4, learning_rate=0.3, per=per, progress=False
    )
    assert result.groups == tuple(GROUPS[per])
    torch.testing.assert_close(result.weights, weights[0] if per == "model" else weights, rtol=1e-12, atol=1e-12)
    assert result.losses == pytest.approx(losses, rel=1e-12)
    assert (result.weights - 1 / 3).abs().max() > 1e-3


@pytest.mark.parametrize("per", ["layer", "tensor"])
def test_each_group_is_averaged_with_its_own_weights(per):
    class Many(nn.Module):
        """Names that are part of other names: b in ab, 1 in 11."""

        def __init__(self) -> None:
            super().__init__()
            self.b, self.ab = nn.Parameter(torch.randn(2).double()), nn.Parameter(torch.randn(2).double())
            self.h = nn.ModuleList([nn.Linear(1, 1).double() for _ in range(12)])
            self.register_buffer("count", torch.tensor(3))

        def forward(self) -> Tensor:
            return torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()

    torch.manual_seed(1)
    models = [Many() for _ in range(2)]
    result = learned_soup(models, lambda model, _: model(), model=Many(), steps=3, per=per, progress=False)
    assert len(result.groups) == {"layer": 2 + 12, "tensor": 2 + 24}[per]
    assert len({round(row[0], 6) for row in result.weights.tolist()}) == len(result.groups)
    soup = result.soup.state_dict()
    assert soup.pop("count") == 3
    for name, tensor in soup.items():
        group = ".".join(name.split(".")[:2]) if per == "layer" else name
        w = result.weights[result.groups.index(group)]
        expected = w[0] * models[0].state_dict()[name] + w[1] * models[1].state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


class Point(nn.Module):
    """Two vectors, and nothing to compute."""

    def __init__(self, a: Sequence[float], b: Sequence[float]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))


def corners() -> list[State]:
    return [{"a": row.clone(), "b": row.clone()} for row in torch.eye(3)]


def distance(model: Any, step: int = 0) -> Tensor:
    a, b = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.3, 0.1])
    return ((model.a - a) ** 2).sum() + ((model.b - b) ** 2).sum()


def test_the_optimum_of_a_convex_loss_is_found():
    # The mixture of the corners of a triangle is the weights themselves: per tensor, each reaches its target; with one
    # set for both, the half-way point, at the squared distance 2 · (0.2² + 0 + 0.2²).
    model = Point([7.0, 8.0, 9.0], [7.0, 8.0, 9.0])
    apart = learned_soup(corners(), distance, model=model, steps=300, learning_rate=0.05, per="tensor", progress=False)
    torch.testing.assert_close(
        apart.weights, torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).double(), atol=1e-4, rtol=0
    )
    assert apart.losses[-1] < 1e-7
    torch.testing.assert_close(apart.soup["b"], torch.tensor([0.6, 0.3, 0.1]), atol=1e-4, rtol=0)
    shared = learned_soup(corners(), distance, model=model, steps=300, learning_rate=0.05, progress=False)
    torch.testing.assert_close(shared.weights, torch.tensor([0.4, 0.3, 0.3]).double(), atol=1e-4, rtol=0)
    assert shared.losses[-1] == pytest.approx(0.16, abs=1e-6)
    assert shared.losses[0] == pytest.approx(2 / 3 * -2 + 0.38 + 0.46 + 2 / 3)  # Σ (1/3)² − 2/3 Σ t + Σ t², twice
    assert len(shared.losses) == 300


def test_learned_on_every_kind(tmp_path):
    states = corners()
    folders = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    modules = [Point(state["a"].tolist(), state["b"].tolist()) for state in states]
    settings: dict[str, Any] = {"model": Point([0.0] * 3, [0.0] * 3), "steps": 5, "progress": False}
    results = [learned_soup(candidates, distance, **settings) for candidates in (states, modules, folders)]
    assert torch.equal(results[0].weights, results[1].weights)
    assert torch.equal(results[0].weights, results[2].weights)
    assert isinstance(results[1].soup, Point)
    assert torch.equal(results[1].soup.a, results[0].soup["a"])
    assert torch.equal(results[2].soup["a"], results[0].soup["a"])
    written = learned_soup(folders, distance, out=tmp_path / "soup", **settings)
    assert written.soup == tmp_path / "soup"
    assert torch.equal(load_file(tmp_path / "soup" / "model.safetensors")["a"], results[0].soup["a"])
    grouped = learned_soup(folders, distance, out=tmp_path / "grouped", per="tensor", **settings)
    torch.testing.assert_close(
        load_file(tmp_path / "grouped" / "model.safetensors")["b"], grouped.weights[1].float(), rtol=1e-6, atol=0
    )


def test_a_folder_that_stores_tied_weights_once(tmp_path):
    models = tied_models(2)
    states = [{n: x for n, x in model.state_dict().items() if n != "head.weight"} for model in models]
    folders = [save(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    for per in GROUPS:
        settings: dict[str, Any] = {"model": Tied().double(), "steps": 2, "per": per, "progress": False}
        result = learned_soup(folders, token_loss, **settings)
        assert torch.equal(result.weights, learned_soup(models, token_loss, **settings).weights)
        assert "head.weight" not in result.soup


def test_one_candidate_tensor_is_held_at_a_time(tmp_path, monkeypatch):
    folders = [save(tmp_path / f"m{i}", state) for i, state in enumerate(corners())]
    alive: set[int] = set()
    most, read = 0, learned._read

    def watched(source: Any) -> Tensor:
        nonlocal most
        tensor = read(source)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(learned, "_read", watched)
    learned_soup(folders, distance, model=Point([0.0] * 3, [0.0] * 3), steps=2, progress=False)
    assert most == 1


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [(x.detach().clone(), x.requires_grad, None if x.grad is None else x.grad.clone()) for x in tensors]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    for (tensor, flag, gradient), (old, old_flag, old_gradient) in zip(snapshot(model), before, strict=True):
        assert torch.equal(tensor, old)
        assert flag == old_flag
        assert (gradient is None) == (old_gradient is None)
        assert gradient is None or torch.equal(gradient, old_gradient)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored(error):
    torch.manual_seed(0)
    models, model, x = [Normed() for _ in range(2)], Normed().train(), torch.randn(8, 2)
    model(x).sum().backward()
    before = snapshot(model)

    def loss(model: nn.Module, step: int) -> Tensor:
        if step == 2 and error is not None:
            raise error
        return model(x).square().mean()

    if error is None:
        result = learned_soup(models, loss, model=model, steps=3, progress=False)
        assert (result.weights - 0.5).abs().max() > 1e-4
    else:
        with pytest.raises(error):
            learned_soup(models, loss, model=model, steps=3, progress=False)
    assert_unchanged(model, before)
    assert model.training


def test_buffers_are_mixed_too():
    torch.manual_seed(0)
    models = [Normed().eval() for _ in range(2)]
    models[0].norm.running_mean.fill_(1.0)
    models[1].norm.running_mean.fill_(4.0)
    seen = []

    def loss(model: Any, step: int) -> Tensor:
        seen.append(model.norm.running_mean.tolist())
        return model(torch.ones(1, 2)).square().mean()

    learned_soup(models, loss, model=Normed().eval(), steps=1, progress=False)
    assert seen == [[2.5, 2.5]]


def test_a_temperature_is_fitted_along():
    temperature = torch.tensor(1.0, requires_grad=True)
    result = learned_soup(
        corners(),
        lambda model, _: distance(model) + (temperature - 2) ** 2,
        model=Point([0.0] * 3, [0.0] * 3),
        steps=200,
        temperature=temperature,
        progress=False,
    )
    assert temperature.item() == pytest.approx(2, abs=1e-3)
    assert result.losses[-1] == pytest.approx(0.16, abs=1e-4)


def swapped(model: Any) -> list[State]:
    return [model.state_dict(), {name: x.clone() for name, x in model.state_dict().items()}]


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        (lambda _: corners(), {"per": "block"}, "per is 'block': choose 'model', 'layer' or 'tensor'"),
        (lambda _: corners(), {"steps": 0}, "steps is 0"),
        (lambda _: corners(), {"learning_rate": 0.0}, "learning_rate 0.0: both must be positive"),
        (lambda _: corners(), {"out": "soup"}, "out='soup' is for folders"),
        (lambda _: [{"a": torch.zeros(3)}], {}, "candidate 1 lacks 'b', which the model has"),
        (lambda _: [corners()[0] | {"c": torch.zeros(3)}], {}, "candidate 1 has 'c', which the model lacks"),
        (lambda _: [{"a": torch.zeros(3), "b": torch.zeros(2)}], {}, "'b' has shape [2] in candidate 1 and [3]"),
        (lambda _: scalars(1, 2), {}, "found a Tensor as a candidate"),
        (lambda _: [], {}, "found 0 models to merge"),
        (lambda _: corners(), {"temperature": torch.ones(1)}, "temperature does not require a gradient"),
        (swapped, {}, "candidate 1 shares weights with the model"),
    ],
)
def test_learned_refuses(candidates, options, message):
    model = Point([0.0] * 3, [0.0] * 3)
    settings = {"model": model, "steps": 1, "progress": False} | options
    with pytest.raises(MergeError, match=re.escape(message)):
        learned_soup(candidates(model), never, **settings)


def test_learned_refuses_what_only_the_model_ties():
    states = [{name: x.clone() for name, x in model.state_dict().items()} for model in tied_models(2)]
    states[1]["head.weight"] += 1
    with pytest.raises(MergeError, match=r"ties 'head.weight' to 'embedding.weight', and in candidate 2 they differ"):
        learned_soup(states, never, model=Tied().double(), steps=1, progress=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda model: distance(model) * float("nan"), "the loss at step 2 is nan"),
        (lambda model: distance(model) / 0, "the loss at step 2 is inf"),
        (lambda model: 1.0, "no scalar with a gradient at step 2"),
        (lambda model: model.a, "no scalar with a gradient at step 2"),
        (lambda model: distance(model).detach(), "no scalar with a gradient at step 2"),
        (
            lambda model: distance(model) + (model.a - model.a).sum().abs().sqrt(),
            "the gradient at step 2 is not finite",
        ),
    ],
)
def test_a_loss_that_cannot_be_used_is_told_with_its_step(value, message):
    model = Point([0.0] * 3, [0.0] * 3)
    before = snapshot(model)
    with pytest.raises(MergeError, match=message):
        learned_soup(
            corners(), lambda m, step: value(m) if step == 2 else distance(m), model=model, steps=4, progress=False
        )
    assert_unchanged(model, before)


# Fisher information ---------------------------------------------------------------------------------------------------

INPUTS = torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.5, 3.0], [-1.0, 1.0]]).double()
LABELS = torch.tensor([0, 1, 1, 0])


def logistic() -> nn.Linear:
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.25]]))
        model.bias.fill_(0.1)
    return model


def both_labels(model: nn.Module, x: Tensor) -> Tensor:
    """log p(y = 0|x), log p(y = 1|x)."""
    logit = model(x)
    return nn.functional.logsigmoid(torch.cat([-logit, logit], dim=1))


def one_label(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return both_labels(model, batch[0]).gather(1, batch[1][:, None])[:, 0]


def analytic(factor: Callable[[Tensor], Tensor]) -> State:
    """The mean over examples of factor(p) x² for the weights, of factor(p) for the bias; p = σ(w·x + b)."""
    p = torch.sigmoid(INPUTS @ torch.tensor([0.5, -0.25]).double() + 0.1)
    weight = (factor(p)[:, None] * INPUTS**2).mean(dim=0, keepdim=True)
    return {"weight": weight, "bias": factor(p).mean()[None]}


def assert_close(a: State, b: State, **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 1e-12, "atol": 0}))


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [3, 1]])
def test_fisher_of_logistic_regression(sizes):
    model = logistic()
    true = fisher_information(model, both_labels, INPUTS.split(sizes), samples="all", progress=False)
    assert_close(true, analytic(lambda p: p * (1 - p)))
    batches = zip(INPUTS.split(sizes), LABELS.split(sizes), strict=True)
    empirical = fisher_information(model, one_label, batches, progress=False)
    assert_close(empirical, analytic(lambda p: (LABELS - p) ** 2))


def test_fisher_by_sampling():
    model = logistic()

    def estimate(samples: int, seed: int) -> State:
        return fisher_information(model, both_labels, [INPUTS], samples=samples, seed=seed, progress=False)

    # The mean of 40 000 draws of (y − p)² x², each below 9: standard errors below 9 / 200 / √4 examples.
    assert_close(estimate(40_000, 0), analytic(lambda p: p * (1 - p)), rtol=0.0, atol=0.03)
    assert_close(estimate(3, 5), estimate(3, 5), rtol=0.0, atol=0.0)
    assert not torch.equal(estimate(3, 5)["bias"], estimate(3, 6)["bias"])


def test_fisher_of_a_categorical_distribution():
    class Categorical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.1, 0.2, 0.7]).double().log())

    def log_probabilities(model: Any, num: int) -> Tensor:
        return model.logits.log_softmax(dim=0).expand(num, 3)

    fisher = fisher_information(Categorical(), log_probabilities, [2, 5], samples="all", progress=False)
    assert fisher["logits"].tolist() == pytest.approx([0.09, 0.16, 0.21])  # p (1 − p)


def test_fisher_of_tied_frozen_and_unused_parameters():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused = nn.Linear(1, 1, bias=False), nn.Parameter(torch.ones(2).double())
            self.second = nn.Linear(1, 1, bias=False)
            self.second.weight = self.first.weight
            self.shift = nn.Parameter(torch.ones(1).bfloat16(), requires_grad=False)
            self.register_buffer("mean", torch.ones(3))
            self.register_buffer("count", torch.ones(3, dtype=torch.long))

    model = Twice()

    def log_likelihood(model: Any, batch: Tensor) -> Tensor:  # the gradient of the weight is x₀ + x₁, of the shift 3
        return (model.first(batch[:, :1]) + model.second(batch[:, 1:]) + 3 * model.shift)[:, 0]

    fisher = fisher_information(model, log_likelihood, [torch.tensor([[1.0, 2.0], [4.0, 1.0]])], progress=False)
    assert fisher["first.weight"] is fisher["second.weight"]
    assert fisher["first.weight"].tolist() == [[17.0]]  # (3² + 5²) / 2
    assert fisher["shift"].tolist() == [9.0]
    assert fisher["shift"].dtype == torch.float32
    assert fisher["unused"].tolist() == [0.0, 0.0]
    assert fisher["unused"].dtype == torch.float64
    assert fisher["mean"].tolist() == [0.0, 0.0, 0.0]
    assert "count" not in fisher
    assert not model.shift.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_files(tmp_path):
    shared = torch.tensor([1.0, 2.0])
    fisher = {"a": shared, "norm": torch.zeros(2).double(), "b": shared}
    folder = save_fisher(fisher, tmp_path / "fisher")
    assert_close(load_file(folder / "model.safetensors"), {"a": shared, "norm": fisher["norm"]})
    assert list(open_checkpoint(folder).tensors) == ["norm", "a"]
    with pytest.raises(FileExistsError, match="exists"):
        save_fisher(fisher, folder)
    save_fisher({"a": shared * 2}, folder, overwrite=True)
    assert load_file(folder / "model.safetensors")["a"].tolist() == [2.0, 4.0]
    assert [path.name for path in tmp_path.iterdir()] == ["fisher"]


def test_fisher_files_hold_what_two_names_share_once(tmp_path):
    x = torch.tensor([1.0, 2.0])
    folder = save_fisher({"embed": x, "head": x.view(2), "norm": x.clone()}, tmp_path / "fisher")
    assert list(load_file(folder / "model.safetensors")) == ["embed", "norm"]


def test_fisher_files_serve_a_merge(tmp_path):
    torch.manual_seed(0)
    models = [Normed().eval() for _ in range(2)]
    folders, fishers = [], []
    for number, model in enumerate(models, start=1):
        model.norm.running_mean.fill_(2.0 * number)
        fishers.append(
            fisher_information(
                model, lambda model, x: model(x).sum(dim=1), [number * torch.randn(5, 2)], progress=False
            )
        )
        folders.append({"model": str(save(tmp_path / f"m{number}", model.state_dict()))})
        folders[-1]["fisher"] = str(save_fisher(fishers[-1], tmp_path / f"f{number}"))
    soup = soupkit.merge({"method": "fisher", "models": folders}, progress=False)
    weights, information = [m.linear.weight.detach().double() for m in models], [f["linear.weight"] for f in fishers]
    expected = (information[0] * weights[0] + information[1] * weights[1]) / (information[0] + information[1])
    torch.testing.assert_close(soup["linear.weight"], expected.float(), rtol=1e-6, atol=0)
    assert soup["norm.running_mean"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("log_likelihood", "options", "message"),
    [
        (both_labels, {"samples": 0}, "samples is 0: give None, a positive number or 'all'"),
        (both_labels, {"samples": "both"}, "samples is 'both'"),
        (both_labels, {}, "gave shape [4, 2] for batch 0: return [B], one log-likelihood per example"),
        (lambda m, x: m(x)[:, 0], {"samples": 1}, "gave shape [4] for batch 0: return [B, C]"),
        (lambda m, x: 3, {}, "gave a int for batch 0"),
        (lambda m, x: m(x)[:, 0].detach(), {}, "log_likelihood of batch 0 has no gradient"),
        (lambda m, x: m(x)[:, 0] / 0, {}, "log_likelihood is not finite in batch 0"),
        (lambda m, x: m(x).expand(4, 2), {"samples": "all"}, "the probabilities of batch 0 do not sum to 1"),
        (lambda m, x: (m.bias - m.bias).abs().sqrt().expand(4), {}, "the Fisher information of 'bias' is not finite"),
    ],
)
def test_fisher_refuses(log_likelihood, options, message):
    with pytest.raises(MergeError, match=re.escape(message)):
        fisher_information(logistic(), log_likelihood, [INPUTS], progress=False, **options)


def test_fisher_needs_examples():
    with pytest.raises(MergeError, match="batches holds no examples"):
        fisher_information(logistic(), one_label, [], progress=False)


# Along one run --------------------------------------------------------------------------------------------------------


def run_of(folder: Path, names: Sequence[str]) -> Path:
    for value, name in enumerate(names, start=1):
        save(folder / name, {"x": torch.tensor([float(value)])})
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["checkpoint-20", "checkpoint-100", "checkpoint-3"], ["checkpoint-3", "checkpoint-20", "checkpoint-100"]),
        (["checkpoints/update-000010", "checkpoints/update-000002"], ["update-000002", "update-000010"]),
        (["epoch2-step5", "epoch1-step30"], ["epoch2-step5", "epoch1-step30"]),
    ],
)
def test_checkpoints_are_ordered_by_number(names, expected, tmp_path):
    run = run_of(tmp_path, names)
    (run / "logs-7").mkdir()
    (save(run / "checkpoint-7", {"x": torch.zeros(1)}) / "soup.json").touch()
    (run / "notes1.txt").touch()
    save(run / ".checkpoint-5.partial-host-1", {"x": torch.zeros(1)})
    save(run / "best", {"x": torch.zeros(1)})
    assert [path.name for path in checkpoints_of(str(run))] == expected
    assert all(path.is_dir() for path in checkpoints_of(run))


def test_a_run_that_has_no_order_is_refused(tmp_path):
    with pytest.raises(MergeError, match="is no folder: give the folder of a training run"):
        checkpoints_of(tmp_path / "absent")
    with pytest.raises(MergeError, match="holds no checkpoints"):
        checkpoints_of(tmp_path)
    with pytest.raises(MergeError, match="holds 'a-07', 'a-7', whose names do not tell their order: give a list"):
        checkpoints_of(run_of(tmp_path / "twice", ["a-7", "a-07"]))
    with pytest.raises(MergeError, match="holds 'a-7', 'b-8', whose names do not tell their order: give a list"):
        checkpoints_of(run_of(tmp_path / "mixed", ["b-8", "a-7"]))


def test_ema_by_hand(tmp_path):
    # 1; (1 + 2) / 2 = 1.5; (1.5 + 3) / 2 = 2.25; (2.25 + 4) / 2 = 3.125
    run = run_of(tmp_path / "run", ["s-1", "s-20", "s-3", "s-100"])  # hold 1, 2, 3, 4; in order 1, 3, 2, 4
    assert ema(scalars(1, 2, 3, 4), 0.5).tolist() == [3.125]
    assert ema(run, 0.5, progress=False)["x"].tolist() == [3.0]  # 1; 2; 2; 3
    assert ema(scalars(1, 2, 4), 0.75).tolist() == pytest.approx([1.9375])  # 1; 1.25; 1.9375
    assert ema(scalars(1, 2, 3), 0.0).tolist() == [3.0]
    out = ema(run, 0.5, out=tmp_path / "ema", progress=False)
    assert load_file(out / "model.safetensors")["x"].tolist() == [3.0]


def test_lawa_by_hand(tmp_path):
    run = run_of(tmp_path / "run", [f"checkpoint-{n}" for n in range(8, 15)])  # hold 1 to 7, 10 sorts before 8 as text
    assert lawa(run, 3, every=2, progress=False)["x"].tolist() == [5.0]  # 3, 5, 7
    assert lawa(run, 2, every=4, progress=False)["x"].tolist() == [5.0]  # 3 and 7
    assert lawa(run, 2, progress=False)["x"].tolist() == [6.5]
    assert lawa(run, 7, progress=False)["x"].tolist() == [4.0]
    assert lawa(scalars(1, 2, 6), 2).tolist() == [4.0]
    out = lawa(run, 2, out=tmp_path / "lawa", progress=False)
    assert load_file(out / "model.safetensors")["x"].tolist() == [6.5]
    with pytest.raises(MergeError, match=r"found 7 checkpoints, and last=3 with every=4 takes 9"):
        lawa(run, 3, every=4)
    with pytest.raises(MergeError, match="last is 0 and every is 1"):
        lawa(run, 0)


# The page that teaches them -------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    programs = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(programs) >= 5
    for program in programs:
        exec(compile(copy.copy(program), "docs/selection.md", "exec"), names)

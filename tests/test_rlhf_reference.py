"""References of every kind: what they are made of, what they say, how they follow the policy, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import PAD, random_examples
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import soupkit
from rlhf import kl
from rlhf.data import batch_examples
from rlhf.logprobs import model_distributions
from rlhf.models import load_causal_lm
from rlhf.reference import (
    ModelReference,
    Reference,
    ReferenceSettings,
    Source,
    folders_in,
    is_recipe,
    load_model_reference,
    models_of,
    names_of,
)

BATCH: Any = batch_examples(random_examples(seed=0), PAD)
CPU = torch.device("cpu")
ALL_ROWS = slice(None)


def distributions(source: Source) -> Tensor:
    """log ρ at all response tokens at temperature 0.7. [N, V]"""
    return source.distributions(BATCH, temperature=0.7).rows(ALL_ROWS)


def policy_distributions(folder: Path) -> Tensor:
    return model_distributions(load_causal_lm(folder), BATCH, 0.7).rows(ALL_ROWS).double().detach()


def load(kind: str, models: list[Path], weights: list[float] | None = None, **settings: Any) -> Reference:
    return ReferenceSettings(kind, [str(model) for model in models], weights, **settings).load(CPU)


@pytest.fixture
def three(checkpoints: dict[str, Path]) -> list[Path]:
    return [checkpoints[name] for name in ("first", "second", "third")]


@pytest.fixture
def recipe_file(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """first + 0.5 · ((second − first) + (third − first)), as a file."""
    path = tmp_path / "tasks.yaml"
    recipe = {
        "method": "task_arithmetic",
        "base": str(checkpoints["first"]),
        "models": [{"model": str(checkpoints[name])} for name in ("second", "third")],
        "parameters": {"weight": 0.5},
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


# ── One model ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_folder_is_its_model(checkpoints: dict[str, Path]) -> None:
    expected = model_distributions(load_causal_lm(checkpoints["first"]), BATCH, 0.7).rows(ALL_ROWS)
    reference = load("soup", [checkpoints["first"]])
    ((name, (weight, source)),) = reference.sources.items()
    assert (name, weight) == ("reference", 1.0)
    assert torch.equal(distributions(source), expected)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [1.0, 2.0, 5.0], [0.0, 0.0, 1.0]])
def test_several_folders_are_their_weighted_average(three: list[Path], weights: list[float] | None) -> None:
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in three]
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    soup = model_of(load("soup", three, weights)).state_dict()
    assert soup.keys() == states[0].keys()
    for name, tensor in soup.items():
        average = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(tensor.double(), average, atol=1e-7, rtol=1e-6, msg=name)


def model_of(reference: Reference) -> PreTrainedModel:
    ((_, source),) = reference.sources.values()
    (model,) = models_of(source)
    return model


def test_a_soup_is_that_of_soupkit(three: list[Path]) -> None:
    soup = model_of(load("soup", three, [1.0, 2.0, 5.0])).state_dict()
    for name, tensor in soupkit.average(three, [1.0, 2.0, 5.0], dtype=torch.float32).items():
        assert torch.equal(soup[name], tensor), name


@pytest.mark.parametrize("num", [2, 3, 5, 7])
def test_a_soup_of_one_model_with_itself_is_that_model_bit_for_bit(checkpoints: dict[str, Path], num: int) -> None:
    single, soup = (load_model_reference([checkpoints["first"]] * n).model.state_dict() for n in (1, num))
    for name, tensor in single.items():
        assert torch.equal(soup[name], tensor), name


def test_a_recipe_file_is_a_reference(three: list[Path], recipe_file: Path) -> None:
    second, third = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in three[1:])
    merged = model_of(load("soup", [recipe_file])).state_dict()
    for name, tensor in merged.items():
        expected = 0.5 * second[name].double() + 0.5 * third[name].double()  # the base cancels
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6, msg=name)
    assert sorted(folders_in(recipe_file)) == sorted(map(str, three))
    assert folders_in(three[0]) == [str(three[0])]
    assert is_recipe(recipe_file)
    assert not is_recipe(three[0])


def test_recipes_and_folders_go_together_where_models_stay_apart(three: list[Path], recipe_file: Path) -> None:
    reference = load("weighted_kl", [three[0], recipe_file], [0.25, 0.5])
    assert [(name, weight) for name, (weight, _) in reference.sources.items()] == [("first", 0.25), ("tasks.yaml", 0.5)]
    expected = load("soup", [recipe_file]).sources["reference"][1]
    assert torch.equal(distributions(reference.sources["tasks.yaml"][1]), distributions(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["first"], ["first", "second"]])
def test_a_reference_is_kept_in_its_dtype_frozen_and_in_evaluation_mode(
    checkpoints: dict[str, Path], dtype: torch.dtype, names: list[str]
) -> None:
    """A merge is computed in float32 and rounded once."""
    folders = [checkpoints[name] for name in names]
    model = load_model_reference(folders, dtype=dtype).model
    exactly = load_model_reference(folders).model.state_dict()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exactly[name].to(dtype)), name
    rows = distributions(ModelReference(model))
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


def test_a_recipe_is_computed_in_float32_and_rounded_once(recipe_file: Path) -> None:
    exactly, rounded = (
        load_model_reference([recipe_file], dtype=dtype).model.state_dict() for dtype in (torch.float32, torch.bfloat16)
    )
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exactly[name].bfloat16()), name


def test_tied_weights_stay_tied_in_a_soup(checkpoints: dict[str, Path]) -> None:
    model = load_model_reference([checkpoints["first"], checkpoints["second"]]).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# ── Several, and none ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_none_is_no_model_at_all(checkpoints: dict[str, Path]) -> None:
    reference = load("none", [checkpoints["first"]])
    assert reference.sources == {}
    reference.after_update(load_causal_lm(checkpoints["first"]), 1)
    assert reference.state() == {}
    reference.restore({})
    with reference.loaded():
        pass


@pytest.mark.parametrize(
    ("kind", "weights", "expected"),
    [
        ("weighted_kl", None, [1 / 3] * 3),
        ("weighted_kl", [1.0, 2.0, 5.0], [1.0, 2.0, 5.0]),  # as they are
        ("weighted_kl", [0.0, 0.1, 0.0], [0.0, 0.1, 0.0]),
    ],
)
def test_weights_of_separate_penalties_are_taken_as_they_are(
    three: list[Path], kind: str, weights: list[float] | None, expected: list[float]
) -> None:
    reference = load(kind, three, weights)
    assert [weight for weight, _ in reference.sources.values()] == pytest.approx(expected)
    assert list(reference.sources) == ["first", "second", "third"]
    for folder, (_, source) in zip(three, reference.sources.values(), strict=True):
        assert torch.equal(distributions(source), distributions(load_model_reference([folder])))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 0.0, 3.0]])
def test_a_mixture_is_the_normalised_product_of_powers(three: list[Path], weights: list[float] | None) -> None:
    ((weight, mixture),) = load("mixture", three, weights).sources.values()
    assert weight == 1.0
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    product = math.prod(policy_distributions(f).exp() ** share for f, share in zip(three, shares, strict=True))
    expected = product / product.sum(-1, keepdim=True)  # type: ignore[union-attr]
    torch.testing.assert_close(distributions(mixture).double().exp(), expected, atol=1e-6, rtol=1e-5)
    # row by row as at once
    parts = mixture.distributions(BATCH, 0.7)
    torch.testing.assert_close(parts.rows(slice(3, 5)), distributions(mixture)[3:5], atol=1e-6, rtol=1e-5)
    assert len(models_of(mixture)) == 3


def test_weighted_kls_are_the_kl_to_the_mixture_less_its_log_normalisers(
    checkpoints: dict[str, Path], three: list[Path]
) -> None:
    """Σ_i w_i KL(π‖ρ_i) = KL(π‖mixture) − log Z, at every token and in sum, for weights of sum 1."""
    weights = [0.2, 0.3, 0.5]
    apart, mixture = (load(kind, three, weights) for kind in ("weighted_kl", "mixture"))
    policy = policy_distributions(checkpoints["chat"])
    generator = torch.Generator().manual_seed(0)
    policy = (policy + torch.randn(policy.shape, generator=generator)).log_softmax(-1)  # "chat" has first's weights

    weighted = sum(w * kl.exact(policy, distributions(source).double()) for w, source in apart.sources.values())
    to_mixture = kl.exact(policy, distributions(mixture.sources["reference"][1]).double())
    parts = [w * policy_distributions(folder) for w, folder in zip(weights, three, strict=True)]
    log_z = torch.stack(parts).sum(0).exp().sum(-1).log()
    assert (log_z < 0).all()
    torch.testing.assert_close(weighted, to_mixture - log_z, atol=1e-5, rtol=1e-5)
    assert float(weighted.sum()) == pytest.approx(float(to_mixture.sum() - log_z.sum()), rel=1e-6)  # type: ignore[union-attr]


# ── A moving average ──────────────────────────────────────────────────────────────────────────────────────────────────


def weights_of(reference: Reference) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model_of(reference).state_dict().items()}


def test_a_moving_average_starts_at_the_soup_and_follows_by_its_decay(three: list[Path]) -> None:
    reference = load("moving_average", three[:2], decay=0.75)
    start, policy = weights_of(load("soup", three[:2])), load_causal_lm(three[2])
    for name, tensor in weights_of(reference).items():
        assert torch.equal(tensor, start[name])
    reference.after_update(policy, 1)
    reference.after_update(policy, 2)
    for name, tensor in weights_of(reference).items():
        expected = 0.5625 * start[name] + 0.4375 * policy.state_dict()[name]  # 0.75² and the rest
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_0_copies_the_policy_and_decay_1_never_moves(three: list[Path], decay: float) -> None:
    reference, policy = load("moving_average", three[:1], decay=decay), load_causal_lm(three[1])
    reference.after_update(policy, 1)
    expected = load_causal_lm(three[decay == 0.0]).state_dict()
    for name, tensor in weights_of(reference).items():
        assert torch.equal(tensor, expected[name]), name
    # and stays apart from the policy that goes on
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(1.0)
    assert torch.equal(weights_of(reference)["lm_head.weight"], expected["lm_head.weight"])


def test_a_moving_average_moves_every_so_many_updates(three: list[Path]) -> None:
    reference, policy = load("moving_average", three[:1], decay=0.5, every=3), load_causal_lm(three[1])
    moved = []
    for update in range(1, 10):
        before = weights_of(reference)
        reference.after_update(policy, update)
        moved.append(not torch.equal(before["lm_head.weight"], weights_of(reference)["lm_head.weight"]))
    assert moved == [False, False, True] * 3


def test_other_kinds_do_not_follow_the_policy(three: list[Path]) -> None:
    for kind in ("soup", "mixture", "weighted_kl"):
        reference, policy = load(kind, three[:1], decay=0.5), load_causal_lm(three[1])
        ((_, source),) = reference.sources.values()
        before = distributions(source)
        reference.after_update(policy, 1)
        assert torch.equal(distributions(source), before)
        assert reference.state() == {}


def test_a_restored_moving_average_goes_on_as_the_one_it_was_taken_from(three: list[Path], tmp_path: Path) -> None:
    policy = load_causal_lm(three[1])
    original, restored = (load("moving_average", three[:1], decay=0.9) for _ in range(2))
    original.after_update(policy, 1)
    torch.save(original.state(), tmp_path / "state.pt")
    original.after_update(policy, 2)
    restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    restored.after_update(policy, 2)
    for name, tensor in weights_of(original).items():
        assert torch.equal(weights_of(restored)[name], tensor), name


# ── Where it is kept ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_offloaded_models_are_elsewhere_only_while_they_are_read(three: list[Path]) -> None:
    """The device "meta" stands for one that computes: what is moved there and back is told by the moves alone."""
    reference = load("mixture", three, offload=True)
    assert reference.offload_to == CPU
    ((_, source),) = reference.sources.values()
    moves: list[tuple[int, str]] = []
    for number, model in enumerate(models_of(source)):
        model.to = lambda device, number=number: moves.append((number, str(device)))  # type: ignore[method-assign]
    reference.offload_to = torch.device("meta")

    def interrupted() -> None:
        with reference.loaded():
            assert moves == [(0, "meta"), (1, "meta"), (2, "meta")]
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert moves[3:] == [(0, "cpu"), (1, "cpu"), (2, "cpu")]


def test_a_reference_that_stays_is_not_moved(three: list[Path]) -> None:
    reference = load("soup", three[:1])
    model_of(reference).to = None  # type: ignore[method-assign]
    with reference.loaded():
        assert reference.offload_to is None


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_by_hand(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert names_of([str(a / "sft"), str(b / "rm")]) == {"sft": str(a / "sft"), "rm": str(b / "rm")}
    assert list(names_of([str(a / "sft"), str(b / "sft")])) == ["a/sft", "b/sft"]
    assert list(names_of([str(a / "reference")])) == ["a/reference"]  # what metrics call the reference itself
    assert list(names_of([str(a), f"{b}/../a"])) == ["a"]  # one model, by two names


# ── Refused ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("misfit", ["larger_vocabulary", "reordered_vocabulary", "other_eos", "wider", "shallower"])
def test_misfits_are_refused_with_both_folders(checkpoints: dict[str, Path], misfit: str) -> None:
    folders = [checkpoints["first"], checkpoints["second"], checkpoints[misfit]]
    with pytest.raises(ValueError, match=misfit) as error:
        load("soup", folders)
    assert str(checkpoints["first"]) in str(error.value)
    assert "\n" not in str(error.value)


KINDS_WITH_WEIGHTS = ("soup", "moving_average", "mixture", "weighted_kl")


@pytest.mark.parametrize("kind", KINDS_WITH_WEIGHTS)
@pytest.mark.parametrize(("weights", "message"), [([1.0], "1 weights for 2 references"), ([1.0, math.nan], "nan")])
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    kind: str, weights: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ReferenceSettings(kind, ["here", "there"], weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("soup", [1.0, -1.0], "-1"),
        ("moving_average", [math.inf, 1.0], "inf"),
        ("mixture", [1.0, -1.0], "must be finite and not negative"),
        ("mixture", [1.0, math.inf], "must be finite and not negative"),
        ("mixture", [0.0, 0.0], "all are 0"),
        ("weighted_kl", [0.0, 0.0], "all are 0"),
        ("weighted_kl", [-0.5, 1.0], "must be finite and not negative"),
        ("none", [1.0, 1.0], "reference_kind=none takes no reference_weights"),
    ],
)
def test_weightings_that_mean_nothing_are_refused(kind: str, weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ReferenceSettings(kind, ["here", "there"], weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["soup", "moving_average"])
def test_a_soup_of_weights_that_add_up_to_0_is_refused(checkpoints: dict[str, Path], kind: str) -> None:
    with pytest.raises(ValueError, match="sum") as error:
        load(kind, [checkpoints["first"], checkpoints["second"]], [0.0, 0.0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["mixture", "weighted_kl"])
def test_a_model_named_twice_is_refused_where_models_stay_apart(checkpoints: dict[str, Path], kind: str) -> None:
    folder = str(checkpoints["first"])
    with pytest.raises(ValueError, match="names a model twice; give its weight once"):
        ReferenceSettings(kind, [folder, str(checkpoints["second"]), f"{folder}/../first"])
    ReferenceSettings("soup", [folder, str(checkpoints["second"]), folder])  # an average in which it counts twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_whose_steps_would_round_to_nothing_is_refused(three: list[Path], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"reference_dtype={str(dtype)[6:]}: the small steps of a moving average"):
        load("moving_average", three[:1], dtype=dtype)
    copy, policy = load("moving_average", three[:1], dtype=dtype, decay=0.0), load_causal_lm(three[1])
    copy.after_update(policy, 1)
    for name, tensor in weights_of(copy).items():
        assert torch.equal(tensor, policy.state_dict()[name].to(dtype)), name


@pytest.mark.parametrize("kind", ["soup", "moving_average"])
def test_a_recipe_beside_others_is_refused_where_one_model_is_made(
    checkpoints: dict[str, Path], recipe_file: Path, kind: str
) -> None:
    message = r"tasks\.yaml: a recipe is a whole reference by itself"
    with pytest.raises(ValueError, match=message):
        ReferenceSettings(kind, [str(checkpoints["first"]), str(recipe_file)])
    with pytest.raises(ValueError, match=message):
        ReferenceSettings(kind, [str(recipe_file)], [1.0])


# ── Provenance ────────────────────────────────────────────────────────────────────────────────────────────────────────


def hashes(record: dict[str, Any]) -> Iterator[str]:
    for ingredient in record["ingredients"]:
        yield next(iter(ingredient["files"].values()))["xxh3_tree"]


def test_description_names_folders_weights_and_hashes(checkpoints: dict[str, Path]) -> None:
    folders = [str(checkpoints["first"]), str(checkpoints["second"])]
    description = ReferenceSettings("soup", folders, [1.0, 3.0]).describe()
    assert description["kind"] == "soup"
    assert [ingredient["folder"] for ingredient in description["ingredients"]] == folders
    assert [entry["weight"] for entry in description["recipe"]["models"]] == [1.0, 3.0]
    assert len(set(hashes(description))) == 2

    moving = ReferenceSettings("moving_average", folders, [1.0, 3.0], decay=0.9, every=5).describe()
    assert moving == description | {"kind": "moving_average", "decay": 0.9, "every": 5}
    mixture = ReferenceSettings("mixture", folders, [1.0, 3.0]).describe()
    assert (mixture["kind"], mixture["weights"]) == ("mixture", [0.25, 0.75])
    assert [hash for model in mixture["models"] for hash in hashes(model)] == list(hashes(description))
    assert ReferenceSettings("weighted_kl", folders, [1.0, 3.0]).describe()["weights"] == [1.0, 3.0]
    assert ReferenceSettings("none", folders).describe() == {"kind": "none"}

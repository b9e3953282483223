"""References: one folder is its model, several are their average, misfits are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAD, random_examples
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import kl
from rlhf.data import batch_examples
from rlhf.models import load_causal_lm, response_log_distributions
from rlhf.reference import ModelReference, describe_reference, load_reference

BATCH: Any = batch_examples(random_examples(seed=0), PAD)


def distributions(reference: ModelReference) -> Tensor:
    return reference.log_distributions(BATCH, temperature=0.7)


def test_one_folder_is_its_model(checkpoints: dict[str, Path]) -> None:
    expected = response_log_distributions(load_causal_lm(checkpoints["first"]), BATCH, 0.7)
    assert torch.equal(distributions(load_reference([checkpoints["first"]])), expected)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [1.0, 2.0, 5.0], [0.0, 0.0, 1.0]])
def test_several_folders_are_their_weighted_average(checkpoints: dict[str, Path], weights: list[float] | None) -> None:
    folders = [checkpoints[name] for name in ("first", "second", "third")]
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    soup = load_reference(folders, weights).model.state_dict()
    assert soup.keys() == states[0].keys()
    for name, tensor in soup.items():
        average = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(tensor.double(), average, atol=1e-7, rtol=1e-6, msg=name)


def test_a_soup_of_one_model_with_itself_is_that_model(checkpoints: dict[str, Path]) -> None:
    single, soup = (load_reference([checkpoints["first"]] * n) for n in (1, 2))
    divergence = kl.per_response(kl.exact(distributions(single), distributions(soup)), BATCH.response_mask)
    assert divergence.abs().max() <= 1e-6
    assert kl.exact(distributions(single), distributions(load_reference([checkpoints["second"]]))).mean() > 0.1


def test_a_reference_is_frozen_and_in_evaluation_mode(checkpoints: dict[str, Path]) -> None:
    for names in (["gpt2"], ["first", "second"]):
        reference = load_reference([checkpoints[name] for name in names])
        assert not reference.model.training
        assert not any(parameter.requires_grad for parameter in reference.model.parameters())
        assert not distributions(reference).requires_grad


def test_tied_weights_stay_tied_in_a_soup(checkpoints: dict[str, Path]) -> None:
    model = load_reference([checkpoints["first"], checkpoints["second"]]).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("misfit", ["larger_vocabulary", "reordered_vocabulary", "other_eos", "wider", "shallower"])
def test_misfits_are_refused_with_both_folders(checkpoints: dict[str, Path], misfit: str) -> None:
    folders = [checkpoints["first"], checkpoints["second"], checkpoints[misfit]]
    with pytest.raises(ValueError, match=misfit) as error:
        load_reference(folders)
    assert str(checkpoints["first"]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "weights"), ([1.0, -1.0], "-1"), ([0.0, 0.0], "sum"), ([1.0, float("nan")], "nan")]
)
def test_weights_that_do_not_fit_are_refused(checkpoints: dict[str, Path], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_reference([checkpoints["first"], checkpoints["second"]], weights)
    assert "\n" not in str(error.value)


def test_description_names_folders_weights_and_hashes(checkpoints: dict[str, Path]) -> None:
    folders = [str(checkpoints["first"]), str(checkpoints["second"])]
    description = describe_reference(folders, [1.0, 3.0])
    assert [ingredient["folder"] for ingredient in description["ingredients"]] == folders
    assert [entry["weight"] for entry in description["recipe"]["models"]] == [1.0, 3.0]
    hashes = [next(iter(ingredient["files"].values()))["xxh3_tree"] for ingredient in description["ingredients"]]
    assert len(set(hashes)) == 2

"""Randomness as a function of seed, purpose and place."""

from __future__ import annotations

import pytest
import torch

from rlhf.randomness import generator, shuffled_batch


def draws(seed: int, purpose: str, index: int = 0) -> list[float]:
    return torch.rand(8, generator=generator(seed, purpose, index)).tolist()


def test_same_place_same_numbers_whatever_the_global_state() -> None:
    once = draws(3, "rollout", 5)
    torch.manual_seed(0)
    draws(3, "rollout", 6)
    assert draws(3, "rollout", 5) == once


def test_seed_purpose_and_index_each_matter() -> None:
    places = [(0, "rollout", 0), (1, "rollout", 0), (0, "rollout", 1), (0, "minibatches", 0), (1, "minibatches", 1)]
    assert len({tuple(draws(*place)) for place in places}) == len(places)


def test_generators_of_neighbouring_places_are_uncorrelated() -> None:
    numbers = torch.stack([torch.rand(4000, generator=generator(0, "rollout", i)) for i in range(6)]).double()
    correlations = torch.corrcoef(numbers) - torch.eye(6)
    assert correlations.abs().max() < 4 / 4000**0.5


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 5), (10, 3), (3, 10), (1, 4), (7, 7)])
def test_every_item_once_before_any_comes_again(num_items: int, batch_size: int) -> None:
    num_steps = 3 * num_items
    stream = torch.cat([shuffled_batch(num_items, batch_size, step, seed=0) for step in range(num_steps)])
    assert len(stream) == num_steps * batch_size
    for start in range(0, len(stream) - num_items + 1, num_items):
        assert sorted(stream[start : start + num_items].tolist()) == list(range(num_items))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    epochs = [tuple(shuffled_batch(20, 20, step, seed).tolist()) for step in range(3) for seed in range(2)]
    assert len(set(epochs)) == 6
    assert tuple(range(20)) not in epochs


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    assert shuffled_batch(10, 4, 7, seed=1).tolist() == shuffled_batch(10, 4, 7, seed=1).tolist()
    assert shuffled_batch(10, 2, 14, seed=1).tolist() == shuffled_batch(10, 4, 7, seed=1)[:2].tolist()

"""What several processes share, where there is one of them, and how their rollouts are put together."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.distributed import Processes, gather_rollouts
from rlhf.rollout import Rollout


def rank(index: int, number: int) -> Processes:
    """One of several processes, as far as shares go."""
    return Processes(
        SimpleNamespace(num_processes=number, process_index=index, distributed_type=None, mixed_precision="no")
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_items", "number", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 8)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_shares_by_hand(num_items: int, number: int, expected: list[tuple[int, int]]) -> None:
    shares = [rank(index, number).share(num_items) for index in range(number)]
    assert [(share.start, share.stop) for share in shares] == expected


def test_one_process_has_everything_and_wraps_nothing() -> None:
    processes = Processes()
    assert (processes.number, processes.is_main, processes.share(5)) == (1, True, slice(0, 5))
    assert processes.gather((1, 2)) == [1, 2]
    assert processes.sum({"a": 1.5}) == {"a": 1.5}
    assert processes.max(-2.0) == -2.0
    assert (processes.any(True), processes.any(False)) == (True, False)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    assert processes.wrap(module, optimizer) == (module, optimizer)
    with processes.accumulating([module], last=False):
        module(torch.ones(2)).backward()
    assert module.weight.grad is not None
    processes.wait()


def rollout(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    """Prompts padded on the left, responses on the right, with 0; the last token of a finished one is 9."""
    left, right = max(map(len, prompts)), max(map(len, responses))
    tokens = [[0] * (left - len(p)) + p + r + [0] * (right - len(r)) for p, r in zip(prompts, responses, strict=True)]
    response_mask = torch.tensor([[t < len(r) for t in range(right)] for r in responses])
    prompt_mask = torch.tensor([[t >= left - len(p) for t in range(left)] for p in prompts])
    return Rollout(
        tokens=torch.tensor(tokens),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        logprobs=torch.where(response_mask, -torch.tensor(tokens)[:, left:].float(), 0.0),
        finished=torch.tensor([r[-1] == 9 for r in responses]),
        prompts=[str(p) for p in prompts],
        responses=[str(r) for r in responses],
        hidden=torch.zeros(len(prompts), right, 3),
    )


def assert_same(found: Rollout, expected: Rollout) -> None:
    for name in ("tokens", "attention_mask", "response_mask", "logprobs", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.prompts, found.responses) == (expected.prompts, expected.responses)


def test_one_process_keeps_its_rollout_but_for_the_hidden_states() -> None:
    mine = rollout([[1], [2, 3]], [[4, 9], [5]])
    scores = torch.tensor([1.0, 2.0])
    together, tensors = gather_rollouts(Processes(), mine, {"score": scores})
    assert_same(together, mine)
    assert together.hidden is None
    assert mine.hidden is not None
    assert tensors["score"] is scores


PROMPTS = [[1], [2, 3], [4, 5, 6], [7]]
RESPONSES = [[4, 5, 6, 9], [5], [6, 9], [7]]


def values_of(whole: Rollout) -> dict[str, Tensor]:
    """One tensor a response, and one a token."""
    return {"score": whole.tokens.sum(dim=1).float(), "kl": 2.0 * whole.logprobs}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_rollouts_of_several_processes_become_that_of_one(cut: int) -> None:
    """Their prompts and responses are padded to widths of their own."""
    parts = [rollout(PROMPTS[rows], RESPONSES[rows]) for rows in (slice(0, cut), slice(cut, None))]
    calls: list[Any] = []

    class Two(Processes):
        def gather(self, items: Sequence[Any]) -> list[Any]:
            calls.append(items)
            return [item for call in calls for item in call]

    first, second = (
        Two(SimpleNamespace(num_processes=2, device=torch.device("cpu"), distributed_type=None, mixed_precision="no"))
        for _ in range(2)
    )  # type: ignore[arg-type]
    gather_rollouts(first, parts[0], values_of(parts[0]))
    together, tensors = gather_rollouts(second, parts[1], values_of(parts[1]))
    whole = rollout(PROMPTS, RESPONSES)
    assert_same(together, whole)
    assert together.hidden is None
    for name, values in values_of(whole).items():
        assert torch.equal(tensors[name], values), name

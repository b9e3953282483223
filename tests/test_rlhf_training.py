"""The loop that the two stages share: schedules, gradients, micro-batches, precision, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOS, EOS, PAD, random_examples
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf import training
from rlhf.data import Example, Pair
from rlhf.data_parallel import DataParallel
from rlhf.micro_batches import batch_rows, split_by_length
from rlhf.models import load_causal_lm, load_scalar_head_model
from rlhf.reward_model import pair_objective
from rlhf.sft import demonstration_objective, finetune
from rlhf.training import Objective, Optimization, OptimizationConfig, learning_rate_factor, make_optimizer, minimise

EXAMPLES = random_examples(seed=1, num=8, longest=12)
PAIRS = [Pair(a, Example(a.prompt_ids, b.response_ids)) for a, b in zip(EXAMPLES[:4], EXAMPLES[4:], strict=True)]


def factors(num_steps: int, **settings: Any) -> list[float]:
    config = OptimizationConfig(**settings)
    return [learning_rate_factor(step, num_steps, config) for step in range(num_steps)]


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    cosine = factors(13, warmup_fraction=0.15)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])  # round(13 · 0.15) = 2 steps of warm-up
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[7] == pytest.approx(0.55)  # half-way between step 2 and step 12
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert factors(1) == [1]
    assert factors(2, warmup_fraction=0.0) == pytest.approx([1, 0.1])


def test_other_schedules() -> None:
    linear = factors(6, warmup_fraction=0.17, lr_schedule="linear", final_lr_fraction=0.2)
    assert linear == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])
    assert factors(4, warmup_fraction=0.25, lr_schedule="constant") == [0.5, 1, 1, 1]
    assert factors(3, warmup_fraction=0.0, final_lr_fraction=0.0) == pytest.approx([1, 0.5, 0])


class Line(nn.Module):
    """y = w·x, for sums of squares that a person can differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5]))


def objective_of(losses: Callable[[Tensor], tuple[Tensor, Tensor]], num_items: int) -> Objective:
    """Items of one row of one token each."""
    return Objective(lambda items: losses(torch.tensor(list(items))), [1] * num_items, [1] * num_items)


def squares(model: Line, xs: Tensor, ys: Tensor, batches: list[list[int]] | None = None) -> Objective:
    def losses(items: Tensor) -> tuple[Tensor, Tensor]:
        if batches is not None:
            batches.append(items.tolist())
        return (model.w * xs[items] - ys[items]) ** 2, torch.ones(len(items))

    return objective_of(losses, len(xs))


def test_minimise_reports_mean_losses_of_every_step_and_finds_the_minimum() -> None:
    model, batches = Line(), []  # type: ignore[var-annotated]
    xs = torch.linspace(1, 2, 10)
    config = OptimizationConfig(epochs=30, batch_size=5, learning_rate=0.1)
    losses = minimise(model, squares(model, xs, 3 * xs, batches), config, description="fit")
    assert len(losses) == len(batches) == 60
    expected = sum((0.5 * float(xs[i]) - 3 * float(xs[i])) ** 2 for i in batches[0]) / 5
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert model.w.item() == pytest.approx(3, abs=0.05)
    assert not model.training
    for epoch in range(30):
        assert sorted(batches[2 * epoch] + batches[2 * epoch + 1]) == list(range(10))


@pytest.mark.parametrize(("epochs", "num_steps"), [(1.0, 4), (0.5, 2), (0.01, 1), (1.5, 5)])
def test_number_of_steps(epochs: float, num_steps: int) -> None:
    model = Line()
    config = OptimizationConfig(epochs=epochs, batch_size=3)
    losses = minimise(model, squares(model, torch.ones(10), torch.ones(10)), config, description="fit")
    assert len(losses) == num_steps


def test_first_adam_step_has_the_size_of_the_scheduled_learning_rate() -> None:
    model = Line()
    config = OptimizationConfig(epochs=20, batch_size=10, learning_rate=0.01, warmup_fraction=0.2)
    steps: list[float] = []

    def losses(items: Tensor) -> tuple[Tensor, Tensor]:
        steps.append(model.w.item())
        return (model.w - 100) ** 2 * torch.ones(len(items)), torch.ones(len(items))

    minimise(model, objective_of(losses, 10), config, description="fit")
    # 20 steps, 4 of warm-up; a gradient that keeps its sign and (clipped) size moves Adam by the learning rate
    sizes = [after - before for before, after in pairwise(steps)]
    expected = [0.01 * factor for factor in factors(20, warmup_fraction=0.2)[:19]]
    assert sizes == pytest.approx(expected, rel=1e-2)
    assert sizes[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008], rel=1e-2)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
def test_a_step_follows_the_mean_over_terms_not_items(
    monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    """Plain gradient descent in Adam's place shows the gradients. Item i counts as i + 1 terms of (w − i)² each."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
    model, terms, batches = Line(), torch.arange(1, 5), []  # type: ignore[var-annotated]

    def losses(items: Tensor) -> tuple[Tensor, Tensor]:
        batches.append(items.tolist())
        return terms[items] * (model.w - items) ** 2, terms[items]

    config = OptimizationConfig(
        epochs=2,
        batch_size=4,
        micro_batch_size=micro_batch_size,
        learning_rate=0.1,
        warmup_fraction=0,
        max_grad_norm=1e9,
    )
    means = minimise(model, objective_of(losses, 4), config, description="fit")
    # mean loss Σ (i + 1)(w − i)² / 10, gradient 2 Σ (i + 1)(w − i) / 10 = 2w − 4; two steps, of 0.1 and a tenth of it
    assert means[0] == pytest.approx((0.25 + 2 * 0.25 + 3 * 2.25 + 4 * 6.25) / 10)
    w = 0.5 - 0.1 * (2 * 0.5 - 4)
    assert model.w.item() == pytest.approx(w - 0.01 * (2 * w - 4))
    assert len(batches) == 2 * math.ceil(4 / (micro_batch_size or 4))


def test_decay_leaves_norms_and_biases_alone(checkpoints: dict[str, Path]) -> None:
    model = load_causal_lm(checkpoints["gpt2"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizationConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without gradients, decay is all that moves: w · (1 − 0.1 · 0.5)
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or ".ln_" in name
        assert torch.allclose(parameter, before[name] * (1.0 if spared else 0.95), atol=1e-7), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_items": 2}, [[3, 0], [1, 4], [2]]),
        ({"max_tokens": 10}, [[3], [0, 1], [4, 2]]),
        ({"max_tokens": 20, "rows": 2}, [[3], [0, 1], [4, 2]]),
        ({"max_tokens": 16, "max_items": 2}, [[3, 0], [1, 4], [2]]),
        ({"max_tokens": 7}, [[3], [0], [1], [4, 2]]),  # the widest has 8 by itself
        ({}, [[3, 0, 1, 4, 2]]),
    ],
)
def test_micro_batches_by_hand(limits: dict[str, int], expected: list[list[int]]) -> None:
    assert split_by_length([0, 1, 2, 3, 4], [5, 4, 1, 8, 3], **limits) == expected


def test_a_block_is_as_wide_as_its_longest_row_and_masks_what_does_not_count() -> None:
    long_prompt, long_response = (
        Example([1, 5, 6, 7], [8, 2]),
        Example([1, 9], [10, 11, 12, 2]),
    )
    batch = batch_rows([long_prompt, long_response], pad_token_id=0)
    assert batch.tokens.tolist() == [[1, 5, 6, 7, 8, 2], [1, 9, 10, 11, 12, 2]]
    assert batch.attention_mask.all()
    assert batch.num_prompt_tokens == 2
    assert batch.response_mask.tolist() == [[False, False, True, True], [True, True, True, True]]
    padded = batch_rows([long_prompt, Example([1, 5], [2])], pad_token_id=0)
    assert padded.attention_mask[1].tolist() == [True] * 3 + [False] * 3
    assert padded.response_mask[1].tolist() == [True, False, False, False]


LIMITS: list[dict[str, int]] = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 3},
    {"micro_batch_tokens": 30},
    {"micro_batch_tokens": 40, "micro_batch_size": 2},
]


def gradient(optimization: Optimization) -> dict[str, Tensor]:
    """The gradient of the first batch, not yet divided, with the weights left as they are."""
    optimization._accumulate(optimization._own_items(0), 0)
    return {name: p.grad.clone() for name, p in optimization.model.named_parameters() if p.grad is not None}


def objective_for(kind: str, checkpoints: dict[str, Path]) -> tuple[nn.Module, Objective]:
    if kind == "pairs":
        scalar = load_scalar_head_model(checkpoints["reward"])
        return scalar, pair_objective(scalar, PAIRS, PAD)
    model = load_causal_lm(checkpoints["first"])
    return model, demonstration_objective(model, EXAMPLES, PAD)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", ["demonstrations", "pairs"])
def test_micro_batches_sorted_by_length_give_the_gradient_of_the_whole_batch(
    checkpoints: dict[str, Path], kind: str, limits: dict[str, int]
) -> None:
    config = OptimizationConfig(batch_size=8 if kind == "demonstrations" else 4)
    results = {}
    for name, settings in {"whole": config, "split": replace(config, **limits)}.items():
        model, objective = objective_for(kind, checkpoints)
        optimization = Optimization(model.train(), objective, settings, description="fit")
        results[name] = torch.cat([tensor.flatten() for tensor in gradient(optimization).values()]).double()
    whole, split = results["whole"], results["split"]
    assert torch.linalg.vector_norm(split - whole) < 1e-6 * torch.linalg.vector_norm(whole)
    assert (split - whole).abs().max() < 1e-6 * whole.abs().max()


def test_sorting_leaves_less_padding_and_counts_it(checkpoints: dict[str, Path]) -> None:
    rows = [Example([BOS], [EOS] * length) for length in (1, 9, 1, 9)]
    model = load_causal_lm(checkpoints["first"])

    def first_step(**settings: int) -> training.Step:
        config = OptimizationConfig(batch_size=4, **settings)  # type: ignore[arg-type]
        return Optimization(model, demonstration_objective(model, rows, PAD), config, description="fit").step(0)

    whole, by_two, by_tokens = first_step(), first_step(micro_batch_size=2), first_step(micro_batch_tokens=20)
    assert [whole.num_tokens, whole.num_computed] == [24, 40]
    assert [by_two.num_tokens, by_two.num_computed] == [by_tokens.num_tokens, by_tokens.num_computed] == [24, 24]
    assert whole.num_terms == by_two.num_terms == 20


def test_pairs_count_both_sides_as_rows(checkpoints: dict[str, Path]) -> None:
    pair = Pair(Example([BOS], [5, EOS]), Example([BOS], [5, 6, 7, 8, EOS]))
    model = load_scalar_head_model(checkpoints["reward"])
    step = Optimization(model, pair_objective(model, [pair], PAD), OptimizationConfig(), description="fit").step(0)
    assert (step.num_terms, step.num_tokens, step.num_computed) == (32, 32 * 9, 32 * 12)  # one pair, 32 times


@pytest.mark.parametrize("kind", ["demonstrations", "pairs"])
def test_activation_checkpointing_computes_layers_twice_and_changes_nothing(
    checkpoints: dict[str, Path], kind: str
) -> None:
    gradients, calls = [], []
    for activated in (False, True):
        model, objective = objective_for(kind, checkpoints)
        forwards = 0

        def count(*_: object) -> None:
            nonlocal forwards
            forwards += 1

        for module in model.modules():
            if isinstance(module, LlamaMLP):
                module.register_forward_pre_hook(count)  # a hook after it would miss an early stop
        config = OptimizationConfig(batch_size=4, activation_checkpointing=activated)
        gradients.append(gradient(Optimization(model.train(), objective, config, description="fit")))
        calls.append(forwards)
    assert calls == [2, 4]  # two layers, run again in the backward pass
    for name, tensor in gradients[0].items():
        assert torch.equal(gradients[1][name], tensor), name


def test_activation_checkpointing_where_the_model_has_none(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    config = OptimizationConfig(activation_checkpointing=True)
    with pytest.raises(
        ValueError, match="activation_checkpointing: LlamaForCausalLM does not support it; leave it off"
    ):
        finetune(load_causal_lm(checkpoints["first"]), EXAMPLES, config, pad_token_id=PAD)


def test_bf16_trains_near_float32_with_float32_weights(checkpoints: dict[str, Path]) -> None:
    config = OptimizationConfig(epochs=2, batch_size=8, learning_rate=1e-3)
    losses = {}
    for precision in ("fp32", "bf16"):
        model = load_causal_lm(checkpoints["first"])
        settings = replace(config, precision=precision)
        losses[precision] = finetune(model, EXAMPLES, settings, pad_token_id=PAD)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != pytest.approx(losses["fp32"], rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_step_and_the_examples() -> None:
    model, values = Line(), torch.ones(4)
    values[2] = torch.nan

    def losses(items: Tensor) -> tuple[Tensor, Tensor]:
        return model.w * values[items], torch.ones(len(items))

    objective = replace(objective_of(losses, 4), where=lambda item: f"pairs.jsonl:{item + 1}")
    for settings in ({}, {"micro_batch_size": 1}):
        config = OptimizationConfig(batch_size=4, **settings)  # type: ignore[arg-type]
        message = (
            r"^fit: the loss is nan at step 1 from pairs\.jsonl:3; lower the learning rate, or look at these examples$"
        )
        with pytest.raises(ValueError, match=message):
            minimise(model, objective, config, description="fit")


def test_a_gradient_that_is_not_finite_names_the_step_and_the_examples() -> None:
    """√w at w = 0 has the value 0 and an infinite slope."""
    model = Line()
    with torch.no_grad():
        model.w.zero_()

    def losses(items: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([model.w[0].sqrt() if i == 1 else model.w[0] for i in items.tolist()]), torch.ones(
            len(items)
        )

    with pytest.raises(
        ValueError, match=r"^fit: the gradient norm is inf at step 1 from item 1; lower the learning rate"
    ):
        minimise(model, objective_of(losses, 3), OptimizationConfig(batch_size=3), description="fit")
    assert model.w.item() == 0  # nothing was stepped


def test_many_broken_examples_are_counted() -> None:
    model = Line()
    objective = objective_of(lambda items: (model.w * torch.full((len(items),), torch.inf), torch.ones(len(items))), 6)
    with pytest.raises(ValueError, match=r"inf at step 1 from item \d, item \d, item \d and 3 more;"):
        minimise(model, objective, OptimizationConfig(batch_size=6), description="fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "step"}, "lr_schedule='step': must be one of cosine, linear, constant"),
        ({"precision": "fp16"}, "precision='fp16': must be one of fp32, bf16"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens=0: must be at least 1"),
        ({"final_lr_fraction": 1.5}, "final_lr_fraction=1.5: must lie between 0 and 1"),
        ({"learning_rate": math.inf}, "learning_rate=inf: must be greater than 0 and finite"),
        ({"weight_decay": 1.0}, "weight_decay=1.0: must be at least 0 and below 1"),
        ({"seed": -1}, "seed=-1: must not be negative"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizationConfig(**settings)


class Deals(DataParallel):
    """Two processes of which only this one runs."""

    def summed(self, values: Sequence[float]) -> list[float]:
        return list(values)


def test_processes_deal_a_batch_out_by_length() -> None:
    model, widths = Line(), [3, 9, 1, 7, 5, 8]
    objective = Objective(lambda items: (model.w.expand(len(items)), torch.ones(len(items))), widths, widths)
    config = OptimizationConfig(batch_size=6)
    shares = [
        Optimization(model, objective, config, description="fit", processes=Deals(rank, 2))._own_items(0)
        for rank in (0, 1)
    ]
    assert [[widths[item] for item in share] for share in shares] == [[9, 7, 3], [8, 5, 1]]
    with pytest.raises(ValueError, match="batch_size=1: fewer examples than the 2 processes"):
        Optimization(model, objective, OptimizationConfig(batch_size=1), description="fit", processes=Deals(0, 2))

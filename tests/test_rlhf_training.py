"""Supervised fine-tuning and reward modelling: gradients, schedules, masks and statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOS, EOS, LETTERS, PAD, WORDS, make_llama, random_examples
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf import reward_model, sft
from rlhf.command_line import run_command
from rlhf.data import Example, Pair
from rlhf.evaluation import evaluate_loss
from rlhf.models import load_causal_lm, load_scalar_head_model
from rlhf.reward_model import bradley_terry_loss, score_examples, score_pairs, train_reward_model
from rlhf.rewards import ModelReward
from rlhf.sft import finetune, response_nll
from rlhf.training import OptimizationConfig, minimise, warmup_then_cosine

EXAMPLES = random_examples(seed=1, num=8)
PAIRS = [Pair(Example(a.prompt_ids, a.response_ids), b) for a, b in zip(EXAMPLES[:4], EXAMPLES[4:], strict=True)]


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    factors = [warmup_then_cosine(step, 13, warmup_fraction=0.15) for step in range(13)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])  # round(13 · 0.15) = 2 steps of warm-up
    assert factors[-1] == pytest.approx(0.1)
    assert factors[7] == pytest.approx(0.55)  # half-way between step 2 and step 12
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert warmup_then_cosine(0, 1, warmup_fraction=0.05) == 1
    assert [warmup_then_cosine(step, 2, 0.0) for step in (0, 1)] == pytest.approx([1, 0.1])


class Line(nn.Module):
    """y = w·x, for sums of squares that a person can differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5]))


def squares(model: Line, xs: Tensor, ys: Tensor, batches: list[list[int]]) -> Callable[[Tensor], tuple[Tensor, int]]:
    def loss_sum(indices: Tensor) -> tuple[Tensor, int]:
        batches.append(indices.tolist())
        return ((model.w * xs[indices] - ys[indices]) ** 2).sum(), len(indices)

    return loss_sum


def test_minimise_reports_mean_losses_of_every_step_and_finds_the_minimum() -> None:
    model, batches = Line(), []  # type: ignore[var-annotated]
    xs = torch.linspace(1, 2, 10)
    config = OptimizationConfig(epochs=30, batch_size=5, learning_rate=0.1)
    losses = minimise(model, squares(model, xs, 3 * xs, batches), 10, config, description="fit")
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
    losses = minimise(model, squares(model, torch.ones(10), torch.ones(10), []), 10, config, description="fit")
    assert len(losses) == num_steps


def test_first_adam_step_has_the_size_of_the_scheduled_learning_rate() -> None:
    model = Line()
    config = OptimizationConfig(epochs=20, batch_size=10, learning_rate=0.01, warmup_fraction=0.2)
    steps: list[float] = []
    inner = squares(model, torch.ones(10), 100 * torch.ones(10), [])

    def loss_sum(indices: Tensor) -> tuple[Tensor, int]:
        steps.append(model.w.item())
        return inner(indices)

    minimise(model, loss_sum, 10, config, description="fit")
    # 20 steps, 4 of warm-up; a gradient that keeps its sign and (clipped) size moves Adam by the learning rate
    sizes = [after - before for before, after in pairwise(steps)]
    expected = [0.01 * warmup_then_cosine(step, 20, 0.2) for step in range(19)]
    assert sizes == pytest.approx(expected, rel=1e-2)
    assert sizes[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008], rel=1e-2)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_a_step_follows_the_mean_over_terms_not_items(
    monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    """Plain gradient descent in Adam's place shows the gradients. Item i counts as i + 1 terms of (w − i)² each."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    model, terms, batches = Line(), torch.arange(1, 5), []  # type: ignore[var-annotated]

    def loss_sum(indices: Tensor) -> tuple[Tensor, int]:
        batches.append(indices.tolist())
        return (terms[indices] * (model.w - indices) ** 2).sum(), int(terms[indices].sum())

    config = OptimizationConfig(
        epochs=2,
        batch_size=4,
        micro_batch_size=micro_batch_size,
        learning_rate=0.1,
        warmup_fraction=0,
        max_grad_norm=1e9,
    )
    losses = minimise(model, loss_sum, 4, config, description="fit")
    # mean loss Σ (i + 1)(w − i)² / 10, gradient 2 Σ (i + 1)(w − i) / 10 = 2w − 4; two steps, of 0.1 and a tenth of it
    assert losses[0] == pytest.approx((0.25 + 2 * 0.25 + 3 * 2.25 + 4 * 6.25) / 10)
    w = 0.5 - 0.1 * (2 * 0.5 - 4)
    assert model.w.item() == pytest.approx(w - 0.01 * (2 * w - 4))
    assert len(batches) == 2 * 4 // (micro_batch_size or 4)


def test_a_loss_that_is_not_finite_stops_training() -> None:
    model = Line()
    with pytest.raises(ValueError, match="fit: the loss is nan at step 1; lower the learning rate"):
        minimise(
            model,
            squares(model, torch.ones(4), torch.full((4,), torch.nan), []),
            4,
            OptimizationConfig(),
            description="fit",
        )


def weights_after(micro_batch_size: int | None, checkpoint: Path) -> tuple[list[float], dict[str, Tensor]]:
    model = load_causal_lm(checkpoint)
    config = OptimizationConfig(epochs=2, batch_size=8, micro_batch_size=micro_batch_size, learning_rate=1e-3)
    losses = finetune(model, EXAMPLES, config, pad_token_id=PAD)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_of_unequal_length_train_like_the_whole_batch(
    checkpoints: dict[str, Path], micro_batch_size: int
) -> None:
    losses, weights = weights_after(None, checkpoints["first"])
    micro_losses, micro_weights = weights_after(micro_batch_size, checkpoints["first"])
    assert micro_losses == pytest.approx(losses, rel=1e-5)
    start = load_causal_lm(checkpoints["first"]).state_dict()
    for name, tensor in weights.items():
        # Adam's first steps amplify rounding where a gradient is near 0: compare moves, not signs of noise
        moved, micro_moved = tensor - start[name], micro_weights[name] - start[name]
        assert (moved - micro_moved).abs().mean() < 0.02 * moved.abs().mean(), name


def manual_nll(model: nn.Module, example: Example) -> float:
    """−Σ log p of the response, from a forward over the unpadded row."""
    logits = model(torch.tensor([example.token_ids])).logits[0].detach()
    first = len(example.prompt_ids)
    predicted = logits.log_softmax(-1)[first - 1 : -1]
    return -sum(float(predicted[t, token]) for t, token in enumerate(example.response_ids))


@pytest.mark.parametrize("name", ["first", "gpt2"])
def test_sft_loss_counts_response_tokens_alone(checkpoints: dict[str, Path], name: str) -> None:
    model = load_causal_lm(checkpoints[name])
    total, count = response_nll(model, EXAMPLES, PAD)
    expected = [manual_nll(model, example) for example in EXAMPLES]
    assert total.item() == pytest.approx(sum(expected), rel=1e-5)
    assert count == sum(len(example.response_ids) for example in EXAMPLES)
    for batch_size in (1, 3, 100):
        estimate = evaluate_loss(model, EXAMPLES, PAD, batch_size=batch_size)
        assert estimate.mean == pytest.approx(sum(expected) / count, rel=1e-5)
        assert 0 < estimate.stderr < estimate.mean


def test_fine_tuning_learns_and_is_the_same_twice(checkpoints: dict[str, Path]) -> None:
    config = OptimizationConfig(epochs=25, batch_size=4, learning_rate=1e-2, seed=1)
    losses = [finetune(load_causal_lm(checkpoints["first"]), EXAMPLES, config, pad_token_id=PAD) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.5 * losses[0][0]
    other_order = finetune(load_causal_lm(checkpoints["first"]), EXAMPLES, replace(config, seed=2), pad_token_id=PAD)
    assert other_order[0] != losses[0][0]


def test_bradley_terry_by_hand() -> None:
    # −log σ(0) = ln 2; −log σ(ln 3) = −log ¾; −log σ(−ln 3) = −log ¼; and linear, not infinite, far out
    chosen = torch.tensor([1.0, math.log(3), 0.0, 0.0])
    rejected = torch.tensor([1.0, 0.0, math.log(3), 1000.0])
    expected = [math.log(2), math.log(4 / 3), math.log(4), 1000]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)


def test_the_reward_models_loss_is_bradley_terry_over_pairs(checkpoints: dict[str, Path]) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    chosen, rejected = score_pairs(model, PAIRS, PAD, batch_size=3)
    differences = [float(c - r) for c, r in zip(chosen, rejected, strict=True)]
    expected = sum(math.log1p(math.exp(-d)) for d in differences) / len(PAIRS)
    config = OptimizationConfig(epochs=1, batch_size=len(PAIRS))
    assert train_reward_model(model, PAIRS, config, pad_token_id=PAD) == [pytest.approx(expected, rel=1e-4)]


def test_scores_of_pairs_do_not_depend_on_the_batch(checkpoints: dict[str, Path]) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    chosen, rejected = score_pairs(model, PAIRS, PAD, batch_size=2)
    for scores, sides in ((chosen, [p.chosen for p in PAIRS]), (rejected, [p.rejected for p in PAIRS])):
        alone = [score_examples(model, [side], EOS).item() for side in sides]
        assert scores.tolist() == pytest.approx(alone, abs=1e-5)


def test_a_trained_reward_model_prefers_and_is_standardised(checkpoints: dict[str, Path]) -> None:
    letters = [WORDS.index(letter) for letter in LETTERS]
    good, bad = letters[0], letters[1]
    pairs = [Pair(Example([BOS, x], [good, x, EOS]), Example([BOS, x], [bad, x, x, EOS])) for x in letters[2:]]
    model = load_scalar_head_model(checkpoints["reward"])
    config = OptimizationConfig(epochs=20, batch_size=6, learning_rate=1e-2)
    losses = train_reward_model(model, pairs, config, pad_token_id=PAD)
    assert losses[-1] < 0.1
    assert reward_model.accuracy(model, pairs, PAD) == 1
    scores = torch.cat(score_pairs(model, pairs, PAD))
    reward = ModelReward(model)
    standardised = (scores - reward.mean) / reward.std
    assert standardised.mean().item() == pytest.approx(0, abs=1e-5)
    assert standardised.std().item() == pytest.approx(1, abs=1e-4)


def test_ties_are_not_correct() -> None:
    class Constant(nn.Module):
        model = type("Inner", (), {"device": "cpu"})

        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.zeros(tokens.shape)

    assert reward_model.accuracy(Constant(), PAIRS, PAD) == 0  # type: ignore[arg-type]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_sft_command(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "response": f"{x} b"} for x in LETTERS])
    arguments = ["--model", str(checkpoints["first"]), "--data", data, "--test-data", data]
    settings = ["--epochs", "10", "--batch-size", "7", "--learning-rate", "1e-2"]
    for name in ("sft", "again"):
        assert run_command(sft.main, [*arguments, *settings, "--output", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "20 steps on 14 demonstrations, training loss" in out
    assert "nats per response token" in out
    model, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("sft", "again"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not torch.equal(model.lm_head.weight, make_llama(1).lm_head.weight)


def test_reward_model_command(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": x, "chosen": "a", "rejected": "b c"} for x in LETTERS]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    arguments = ["--model", str(checkpoints["first"]), "--data", data, "--test-data", data]
    settings = ["--epochs", "10", "--batch-size", "7", "--learning-rate", "1e-2"]
    for name in ("reward", "again"):
        assert run_command(reward_model.main, [*arguments, *settings, "--output", str(tmp_path / name)]) == 0
    assert "held-out accuracy 1.000 on 14 pairs" in capsys.readouterr().out
    models = [load_scalar_head_model(tmp_path / name) for name in ("reward", "again")]
    assert torch.equal(models[0].head.weight, models[1].head.weight)  # the seed draws the new head as well
    config = models[0].model.config
    assert (config.num_labels, config.score_std > 0) == (1, True)
    assert ModelReward(models[0]).mean == config.score_mean != 0

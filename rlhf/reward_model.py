"""Reward modelling: a scalar head trained on preference pairs.

    python -m rlhf.reward_model --model FOLDER --data pairs.jsonl --output reward

The data are JSON Lines with ``prompt`` (or chat ``messages``), ``chosen`` and ``rejected``, and perhaps ``margin``, a
number that says by how much. The loss is Bradley–Terry, −log σ(r(chosen) − r(rejected) − margin), averaged over pairs,
with r read at the response's last token (Stiennon et al. 2020, arXiv 2009.01325); --label_smoothing and --center_coef
change it. The folder written is an ordinary ``AutoModelForSequenceClassification`` with one label, whose config carries
``score_mean`` and ``score_std``, the statistics of r over the training responses that :mod:`rlhf.rewards` standardises
with. With --test_data, ``reward_metrics.json`` and figures/reliability.png beside the weights say how well the model
orders held-out pairs, and how far its probabilities can be trusted.

Micro-batches, evaluation, checkpoints, --resume and several processes are those of ``python -m rlhf.sft``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.calibration import PairMetrics, pair_metrics, rows_for_people
from rlhf.command_line import parse_config, required, run_process, setting
from rlhf.data import Example, Pair, load_pairs
from rlhf.data_parallel import DataParallel
from rlhf.metrics import table, write_json
from rlhf.micro_batches import batch_rows
from rlhf.models import ScalarHeadModel, context_length, load_scalar_head_model, load_tokenizer
from rlhf.rewards import last_token_scores
from rlhf.stage import Stage
from rlhf.stage_figures import draw_losses, draw_reliability
from rlhf.stage_folder import StageConfig, StageFolder, training_data
from rlhf.training import ALONE, Objective, Optimization, OptimizationConfig, measured, minimise


@dataclass(kw_only=True)
class RewardModelConfig(StageConfig):
    """Settings of ``python -m rlhf.reward_model``."""

    model: str = required("Checkpoint folder whose body the reward model starts from.")
    data: list[str] = required(
        "Pairs: .jsonl with prompt or messages, chosen and rejected, and perhaps margin; several files count as one."
    )
    margin_coef: float = setting(1.0, "Factor on the margins that pairs carry; 0 leaves them out of the loss.")
    label_smoothing: float = setting(
        0.0, "Share of the labels taken to be wrong: the conservative loss of Mitchell (2023); 0 to below 0.5."
    )
    center_coef: float = setting(
        0.0, "Weight of the mean of (r(chosen) + r(rejected))², which centres rewards on 0 (Eisenstein et al. 2023)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin_coef", "center_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5")


def score_examples(model: ScalarHeadModel, examples: Sequence[Example], pad_token_id: int) -> Tensor:
    """The raw, unstandardised score of each example. → [B]"""
    batch = batch_rows(examples, pad_token_id, model.model.device)
    return last_token_scores(model, batch.tokens, batch.attention_mask)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> Tensor:
    """The loss of each pair. [B], [B], [B] → [B]

    −(1 − ε) log σ(d) − ε log σ(−d) + c · (r_chosen + r_rejected)², with d = r_chosen − r_rejected − margin. The margin
    is Llama 2's (arXiv 2307.09288), ε ``label_smoothing`` (Mitchell 2023, "A note on DPO with noisy preferences") and
    c ``center_coef`` (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -logsigmoid(difference)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-difference)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected) ** 2
    return loss


@torch.no_grad()
def score_pairs(
    model: ScalarHeadModel, pairs: Sequence[Pair], pad_token_id: int, *, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Raw scores of the chosen and of the rejected responses. → [N], [N]"""

    def scores(examples: list[Example]) -> Tensor:
        parts = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
        return torch.cat([score_examples(model, part, pad_token_id) for part in parts])

    return scores([pair.chosen for pair in pairs]), scores([pair.rejected for pair in pairs])


def accuracy(model: ScalarHeadModel, pairs: Sequence[Pair], pad_token_id: int, *, batch_size: int = 64) -> float:
    """Share of pairs whose chosen response scores higher."""
    chosen, rejected = score_pairs(model, pairs, pad_token_id, batch_size=batch_size)
    return float((chosen > rejected).double().mean())


def pair_objective(
    model: ScalarHeadModel,
    pairs: Sequence[Pair],
    pad_token_id: int,
    *,
    margin_coef: float = 1.0,
    **loss_settings: float,
) -> Objective:
    """Bradley–Terry on pairs, both sides of one in one forward; ``loss_settings`` are those of the loss."""
    device = model.model.device
    has_margins = margin_coef > 0 and any(pair.margin for pair in pairs)
    margins = torch.tensor([margin_coef * (pair.margin or 0.0) for pair in pairs], device=device)

    def losses(items: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, rejected = score_both(model, [pairs[i] for i in items], pad_token_id)
        margin = margins[list(items)] if has_margins else None
        return bradley_terry_loss(chosen, rejected, margin, **loss_settings), torch.ones(len(items), device=device)

    sides = [(len(pair.chosen.token_ids), len(pair.rejected.token_ids)) for pair in pairs]
    return Objective(
        losses=losses,
        widths=[max(lengths) for lengths in sides],
        num_tokens=[sum(lengths) for lengths in sides],
        rows=2,
        where=lambda item: pairs[item].chosen.where or f"pair {item}",
    )


def score_both(model: ScalarHeadModel, pairs: Sequence[Pair], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Raw scores of the chosen and the rejected responses, read in one forward. → [B], [B]"""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    chosen, rejected = score_examples(model, rows, pad_token_id).chunk(2)
    return chosen, rejected


def store_score_statistics(model: ScalarHeadModel, scores: Tensor) -> None:
    """Put mean and standard deviation of the training responses' scores, both sides, into the model's config. [N]"""
    model.model.config.score_mean = float(scores.mean())
    model.model.config.score_std = float(scores.std())
    if not model.model.config.score_std > 0:
        raise ValueError("the reward model gives every training response one score; train longer or on other pairs")


def train_reward_model(
    model: ScalarHeadModel,
    pairs: Sequence[Pair],
    config: OptimizationConfig,
    *,
    pad_token_id: int,
    description: str = "reward model",
) -> list[float]:
    """Train ``model`` in place and store its score statistics in its config; returns the loss of every step."""
    losses = minimise(model, pair_objective(model, pairs, pad_token_id), config, description=description)
    scores = score_pairs(model, pairs, pad_token_id, batch_size=config.micro_batch_size or config.batch_size)
    store_score_statistics(model, torch.cat(scores))
    return losses


def all_scores(
    model: ScalarHeadModel,
    pairs: Sequence[Pair],
    config: OptimizationConfig,
    *,
    pad_token_id: int,
    processes: DataParallel = ALONE,
) -> Tensor:
    """Raw scores of chosen and rejected responses, in float32 and in micro-batches of like length. → [2, N]"""
    return measured(
        lambda items: score_both(model, [pairs[i] for i in items], pad_token_id),
        [max(len(pair.chosen.token_ids), len(pair.rejected.token_ids)) for pair in pairs],
        config,
        rows=2,
        processes=processes,
    )


def logged(metrics: PairMetrics) -> dict[str, float]:
    """What ``metrics.jsonl`` has of an evaluation; ``test_loss`` is −mean log σ(r(chosen) − r(rejected))."""
    return {
        "test_loss": -metrics.log_likelihood.mean,
        "test_loss_stderr": metrics.log_likelihood.stderr,
        "test_accuracy": metrics.accuracy.mean,
        "test_accuracy_stderr": metrics.accuracy.stderr,
        "test_calibration_error": metrics.calibration_error,
    }


def write_report(output: Path, rows: Sequence[dict[str, Any]], metrics: PairMetrics | None) -> None:
    """Write ``reward_metrics.json`` and the figures into a folder; ``rows``: those of ``metrics.jsonl``."""
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = None if metrics is None else metrics.to_json()
    write_json(output / "reward_metrics.json", {"held_out": held_out, "training_losses": losses})
    draw_losses(rows, output / "figures" / "loss.png", unit="nats per pair")
    if metrics is not None:
        draw_reliability(metrics.bins, output / "figures" / "reliability.png")


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.reward_model``."""
    config = parse_config(RewardModelConfig, argv, description=__doc__)
    folder = StageFolder(config)
    tokenizer = load_tokenizer(config.model)
    max_tokens = min(config.max_tokens, context_length(config.model) or config.max_tokens)
    pairs = training_data(config, lambda path: load_pairs(path, tokenizer, max_tokens))
    held_out = load_pairs(config.test_data, tokenizer, max_tokens) if config.test_data else []
    processes = DataParallel.launched()
    torch.manual_seed(config.seed)  # the new head is drawn at random
    model = load_scalar_head_model(folder.model_path, device=PartialState().device)
    scored = {"pad_token_id": tokenizer.pad_token_id, "processes": processes}

    def measure() -> PairMetrics:
        chosen, rejected = all_scores(model, held_out, config, **scored)
        return pair_metrics(chosen, rejected, [pair.margin for pair in held_out])

    objective = pair_objective(
        model,
        pairs,
        tokenizer.pad_token_id,
        margin_coef=config.margin_coef,
        label_smoothing=config.label_smoothing,
        center_coef=config.center_coef,
    )
    optimization = Optimization(model, objective, config, description="reward model", processes=processes)
    evaluate = (lambda: logged(measure())) if held_out else None
    stage = Stage(folder, optimization, model.model, tokenizer, evaluate)
    rows = stage.run()
    store_score_statistics(model, all_scores(model, pairs, config, **scored).flatten().float())
    metrics = measure() if held_out else None
    stage.publish(lambda output: write_report(output, rows, metrics))
    if processes.is_main:
        print(stage.summary(rows, f"{len(pairs)} pairs", "nats per pair"))
        if metrics is not None:
            print(f"held-out accuracy {metrics.accuracy.mean:.3f} on {len(held_out)} pairs\n")
            print(table(rows_for_people(metrics)))


if __name__ == "__main__":
    run_process(main)

"""Reward modelling: a scalar head trained on preference pairs.

    python -m rlhf.reward_model --model FOLDER --data pairs.jsonl --output reward

The data are JSON Lines with ``prompt`` (or chat ``messages``), ``chosen`` and ``rejected``. The loss is Bradley–Terry,
−log σ(r(chosen) − r(rejected)), averaged over pairs, with r read at the response's last token (Stiennon et al. 2020,
arXiv 2009.01325). The folder written is an ordinary ``AutoModelForSequenceClassification`` with one label, whose config
carries ``score_mean`` and ``score_std``, the statistics of r over the training responses that :mod:`rlhf.rewards`
standardises with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.checkpointing import require_new, save_model
from rlhf.command_line import parse_config, required, run_command, setting
from rlhf.data import Example, Pair, batch_examples, load_pairs
from rlhf.models import ScalarHeadModel, context_length, load_scalar_head_model, load_tokenizer
from rlhf.rewards import last_token_scores
from rlhf.training import OptimizationConfig, minimise


@dataclass(kw_only=True)
class RewardModelConfig(OptimizationConfig):
    """Settings of ``python -m rlhf.reward_model``."""

    model: str = required("Checkpoint folder whose body the reward model starts from.")
    data: str = required("Pairs: .jsonl with prompt or messages, chosen and rejected.")
    test_data: str | None = setting(None, "Held-out pairs, whose accuracy is reported.")
    output: str = required("Folder of the reward model, made new.")
    max_tokens: int = setting(1024, "Longest prompt and response together; the end of longer responses is cut.")


def score_examples(model: ScalarHeadModel, examples: Sequence[Example], pad_token_id: int) -> Tensor:
    """The raw, unstandardised score of each example. → [B]"""
    batch = batch_examples(examples, pad_token_id, model.model.device)
    return last_token_scores(model, batch.tokens, batch.attention_mask)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_chosen − r_rejected) of each pair. [B], [B] → [B]"""
    return -logsigmoid(chosen - rejected)


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


def train_reward_model(
    model: ScalarHeadModel,
    pairs: Sequence[Pair],
    config: OptimizationConfig,
    *,
    pad_token_id: int,
    description: str = "reward model",
) -> list[float]:
    """Train ``model`` in place and store its score statistics in its config; returns the loss of every step.

    score_mean and score_std are the mean and the standard deviation of r over all responses of the pairs, both sides.
    """

    def loss_sum(indices: Tensor) -> tuple[Tensor, int]:
        batch = [pairs[i] for i in indices.tolist()]
        scores = score_examples(model, [p.chosen for p in batch] + [p.rejected for p in batch], pad_token_id)
        return bradley_terry_loss(*scores.chunk(2)).sum(), len(batch)

    losses = minimise(model, loss_sum, len(pairs), config, description=description)
    scores = torch.cat(score_pairs(model, pairs, pad_token_id, batch_size=config.micro_batch_size or config.batch_size))
    model.model.config.score_mean = float(scores.mean())
    model.model.config.score_std = float(scores.std())
    if not model.model.config.score_std > 0:
        raise ValueError("the reward model gives every training response one score; train longer or on other pairs")
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.reward_model``."""
    config = parse_config(RewardModelConfig, argv, description=__doc__)
    require_new(config.output)
    tokenizer = load_tokenizer(config.model)
    max_tokens = min(config.max_tokens, context_length(config.model) or config.max_tokens)
    pairs = load_pairs(config.data, tokenizer, max_tokens)
    held_out = load_pairs(config.test_data, tokenizer, max_tokens) if config.test_data else []
    torch.manual_seed(config.seed)  # the new head is drawn at random
    model = load_scalar_head_model(config.model, device=Accelerator().device)
    losses = train_reward_model(model, pairs, config, pad_token_id=tokenizer.pad_token_id)
    save_model(model.model, tokenizer, config.output)
    size = config.micro_batch_size or config.batch_size
    print(f"{config.output}: {len(losses)} steps on {len(pairs)} pairs, training loss {losses[-1]:.3f}")
    if held_out:
        print(
            f"held-out accuracy {accuracy(model, held_out, tokenizer.pad_token_id, batch_size=size):.3f} on "
            f"{len(held_out)} pairs"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Supervised fine-tuning: the stage that makes a soup's ingredients.

    python -m rlhf.sft --model FOLDER --data demonstrations.jsonl --output sft1 --seed 1
    python -m rlhf.sft --model FOLDER --data demonstrations.jsonl --output sft2 --seed 2

The data are JSON Lines with ``prompt`` (or chat ``messages``) and ``response`` (more: :mod:`rlhf.conversations`).
The loss is the mean negative log-likelihood per response token (end-of-sequence included) over the response tokens of a
batch; prompts are trained on with --train_on_prompts alone.
Rows of like length share a micro-batch (--micro_batch_tokens), so that hardly any padding is computed.

The output is an ordinary checkpoint folder, with metrics.jsonl and figures/loss.png beside the weights. A killed stage
goes on with --resume from its last checkpoint (--checkpoint_every). Several processes (accelerate launch -m rlhf.sft …,
on CPUs ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 -m rlhf.sft …) have the losses of one with the same batch_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.command_line import parse_config, required, run_process, setting
from rlhf.data import Example, load_examples
from rlhf.data_parallel import DataParallel
from rlhf.logprobs import head_of, hidden_states, token_statistics, unpack
from rlhf.metrics import Estimate, ratio_estimate
from rlhf.micro_batches import batch_rows
from rlhf.models import context_length, load_causal_lm, load_tokenizer
from rlhf.stage import Stage
from rlhf.stage_figures import draw_losses
from rlhf.stage_folder import StageConfig, StageFolder, training_data
from rlhf.training import ALONE, Objective, Optimization, OptimizationConfig, measured, minimise


@dataclass(kw_only=True)
class SFTConfig(StageConfig):
    """Settings of ``python -m rlhf.sft``."""

    data: list[str] = required(
        "Demonstrations: .jsonl with prompt or messages, and response; several files count as one."
    )
    train_on_prompts: bool = setting(
        False, "Train on the prompt's tokens, too. Held-out losses are of responses alone."
    )


def response_nll(model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """−Σ log p over the response tokens of each example, and how many tokens that is. → [B], [B]"""
    batch = batch_rows(examples, pad_token_id, model.device)
    tokens = batch.response_tokens[batch.response_mask]
    logprobs = token_statistics(hidden_states(model, batch), head_of(model), tokens).logprobs
    return -unpack(logprobs, batch.response_mask).sum(dim=1), batch.response_lengths


def all_tokens(example: Example) -> Example:
    """The example with all tokens but the first as its response, so that the loss counts them."""
    return replace(example, prompt_ids=example.token_ids[:1], response_ids=example.token_ids[1:])


def demonstration_objective(model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int) -> Objective:
    """The negative log-likelihood of demonstrations; its terms are response tokens."""
    widths = [len(example.token_ids) for example in examples]
    return Objective(
        losses=lambda items: response_nll(model, [examples[i] for i in items], pad_token_id),
        widths=widths,
        num_tokens=widths,
        where=lambda item: examples[item].where or f"example {item}",
    )


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: OptimizationConfig,
    *,
    pad_token_id: int,
    description: str = "sft",
) -> list[float]:
    """Train ``model`` in place on demonstrations; returns the loss of every step (nats per response token)."""
    objective = demonstration_objective(model, examples, pad_token_id)
    return minimise(model, objective, config, description=description)


def held_out_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: OptimizationConfig,
    *,
    pad_token_id: int,
    processes: DataParallel = ALONE,
) -> Estimate:
    """Σ negative log-likelihood / Σ response tokens over all examples, in nats, with its standard error; in float32."""
    objective = demonstration_objective(model, examples, pad_token_id)
    return ratio_estimate(*measured(objective.losses, objective.widths, config, processes=processes))


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.sft``."""
    config = parse_config(SFTConfig, argv, description=__doc__)
    folder = StageFolder(config)
    tokenizer = load_tokenizer(config.model)
    max_tokens = min(config.max_tokens, context_length(config.model) or config.max_tokens)
    examples = training_data(config, lambda path: load_examples(path, tokenizer, max_tokens))
    held_out = load_examples(config.test_data, tokenizer, max_tokens) if config.test_data else []
    processes = DataParallel.launched()
    model = load_causal_lm(folder.model_path, device=PartialState().device)

    def evaluate() -> dict[str, float]:
        loss = held_out_loss(model, held_out, config, pad_token_id=tokenizer.pad_token_id, processes=processes)
        return {"test_loss": loss.mean, "test_loss_stderr": loss.stderr}

    trained_on = [all_tokens(example) for example in examples] if config.train_on_prompts else examples
    objective = demonstration_objective(model, trained_on, tokenizer.pad_token_id)
    optimization = Optimization(model, objective, config, description="sft", processes=processes)
    stage = Stage(folder, optimization, model, tokenizer, evaluate if held_out else None)
    rows = stage.run()
    stage.publish(lambda output: draw_losses(rows, output / "figures" / "loss.png", unit="nats per token"))
    if processes.is_main:
        print(stage.summary(rows, f"{len(examples)} demonstrations", "nats per response token"))


if __name__ == "__main__":
    run_process(main)

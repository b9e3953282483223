"""Supervised fine-tuning: the stage that makes a soup's ingredients.

    python -m rlhf.sft --model FOLDER --data demonstrations.jsonl --output sft1 --seed 1
    python -m rlhf.sft --model FOLDER --data demonstrations.jsonl --output sft2 --seed 2

The data are JSON Lines with ``prompt`` (or chat ``messages``) and ``response``. The loss is the mean negative
log-likelihood per response token (end-of-sequence included) over the response tokens of a batch; prompts are not
trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checkpointing import require_new, save_model
from rlhf.command_line import parse_config, required, run_command, setting
from rlhf.data import Example, batch_examples, load_examples
from rlhf.evaluation import evaluate_loss
from rlhf.logprobs import head_of, hidden_states, token_statistics
from rlhf.models import context_length, load_causal_lm, load_tokenizer
from rlhf.training import OptimizationConfig, minimise


@dataclass(kw_only=True)
class SFTConfig(OptimizationConfig):
    """Settings of ``python -m rlhf.sft``."""

    model: str = required("Checkpoint folder to start from.")
    data: str = required("Demonstrations: .jsonl with prompt or messages, and response.")
    test_data: str | None = setting(None, "Held-out demonstrations, whose loss is reported before and after.")
    output: str = required("Folder of the fine-tuned model, made new.")
    max_tokens: int = setting(1024, "Longest prompt and response together; the end of longer responses is cut.")


def response_nll(model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int) -> tuple[Tensor, int]:
    """−Σ log p over the response tokens of the examples, and how many tokens that is."""
    batch = batch_examples(examples, pad_token_id, model.device)
    tokens = batch.response_tokens[batch.response_mask]
    return -token_statistics(hidden_states(model, batch), head_of(model), tokens).logprobs.sum(), len(tokens)


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: OptimizationConfig,
    *,
    pad_token_id: int,
    description: str = "sft",
) -> list[float]:
    """Train ``model`` in place on demonstrations; returns the loss of every step (nats per response token)."""
    return minimise(
        model,
        lambda indices: response_nll(model, [examples[i] for i in indices.tolist()], pad_token_id),
        len(examples),
        config,
        description=description,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.sft``."""
    config = parse_config(SFTConfig, argv, description=__doc__)
    require_new(config.output)
    tokenizer = load_tokenizer(config.model)
    max_tokens = min(config.max_tokens, context_length(config.model) or config.max_tokens)
    examples = load_examples(config.data, tokenizer, max_tokens)
    held_out = load_examples(config.test_data, tokenizer, max_tokens) if config.test_data else []
    model = load_causal_lm(config.model, device=Accelerator().device)
    size = config.micro_batch_size or config.batch_size
    before = evaluate_loss(model, held_out, tokenizer.pad_token_id, batch_size=size) if held_out else None
    losses = finetune(model, examples, config, pad_token_id=tokenizer.pad_token_id)
    save_model(model, tokenizer, config.output)
    print(f"{config.output}: {len(losses)} steps on {len(examples)} demonstrations, training loss {losses[-1]:.3f}")
    if before is not None:
        after = evaluate_loss(model, held_out, tokenizer.pad_token_id, batch_size=size)
        print(
            f"held-out loss {before.mean:.3f} ± {before.stderr:.3f} → {after.mean:.3f} ± {after.stderr:.3f} nats "
            "per response token"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The optimisation loop that supervised fine-tuning and reward modelling share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlhf.command_line import setting
from rlhf.randomness import shuffled_batch


@dataclass
class OptimizationConfig:
    """How a loss over examples is minimised: AdamW, linear warm-up, cosine decay to a tenth, gradient clipping."""

    epochs: float = setting(1.0, "Passes over the data; need not be whole.")
    batch_size: int = setting(32, "Examples per optimizer step.")
    micro_batch_size: int | None = setting(
        None, "Examples per forward and backward (gradient accumulation). Default: batch_size."
    )
    learning_rate: float = setting(1e-5, "Peak learning rate.")
    warmup_fraction: float = setting(0.05, "Share of the steps over which the learning rate rises linearly.")
    adam_beta1: float = setting(0.9, "AdamW's first-moment decay.")
    adam_beta2: float = setting(0.98, "AdamW's second-moment decay.")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay.")
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.")
    seed: int = setting(0, "Seed of the order of the examples.")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0")
        for name in ("warmup_fraction", "adam_beta1", "adam_beta2", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}; choose a "
                "divisor"
            )


def warmup_then_cosine(step: int, num_steps: int, warmup_fraction: float, floor: float = 0.1) -> float:
    """Factor on the peak learning rate at ``step`` (0-based): linear rise, then cosine fall to ``floor``."""
    num_warmup = round(num_steps * warmup_fraction)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(num_steps - num_warmup - 1, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def minimise(
    model: nn.Module,
    loss_sum: Callable[[Tensor], tuple[Tensor, int]],
    num_items: int,
    config: OptimizationConfig,
    *,
    description: str,
) -> list[float]:
    """Minimise Σ loss / Σ count over shuffled batches of items; returns the loss of every step.

    ``loss_sum(indices)`` gives the sum of the losses of these items, with gradient, and how many terms were summed
    (tokens, say). Raises ValueError when the loss stops being finite.
    """
    num_steps = max(1, math.ceil(config.epochs * num_items / config.batch_size))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_then_cosine(step, num_steps, config.warmup_fraction)
    )
    model.train()
    losses: list[float] = []
    with tqdm(range(num_steps), desc=description) as progress:
        for step in progress:
            batch = shuffled_batch(num_items, config.batch_size, step, config.seed)
            total, count = 0.0, 0
            for indices in batch.split(config.micro_batch_size or len(batch)):
                loss, num_terms = loss_sum(indices)
                loss.backward()
                total, count = total + loss.item(), count + num_terms
            # Sums are accumulated and divided once, so that micro-batches of unequal length do not change the gradient.
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(count)
            losses.append(total / count)
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"{description}: the loss is {losses[-1]} at step {len(losses)}; lower the learning rate"
                )
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses

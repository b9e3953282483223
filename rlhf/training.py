"""The optimisation that supervised fine-tuning and reward modelling share: one loss over items, minimised by AdamW.

A batch is drawn at random and stays what it is; its items are then sorted by length into micro-batches, each padded to
its own width. Losses are summed over all micro-batches and processes, and the gradient is divided once by the number of
terms (tokens or pairs), so that neither micro-batches nor processes change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf.command_line import setting
from rlhf.data_parallel import DataParallel
from rlhf.micro_batches import split_by_length
from rlhf.randomness import shuffled_batch

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("fp32", "bf16")
ALONE = DataParallel()


@dataclass
class OptimizationConfig:
    """How a loss over items (demonstrations, pairs) is minimised."""

    epochs: float = setting(1.0, "Passes over the data; need not be whole.")
    batch_size: int = setting(
        32, "Examples (pairs) per optimizer step, over all processes and micro-batches: the number that training sees."
    )
    micro_batch_size: int | None = setting(
        None,
        "At most this many examples (pairs) per forward and backward. A batch is sorted by length, split, and its "
        "gradients are added up; it changes memory and speed, never the gradient. Default: a process's whole batch.",
    )
    micro_batch_tokens: int | None = setting(
        None,
        "At most this many tokens, padding included, per forward and backward: sorted by length as above, long "
        "examples in small micro-batches, short ones in large. A pair counts both sides.",
    )
    learning_rate: float = setting(1e-5, "Peak learning rate.")
    lr_schedule: str = setting("cosine", "How the learning rate falls after warm-up: cosine, linear or constant.")
    final_lr_fraction: float = setting(0.1, "Share of the peak that a cosine or linear schedule ends at.")
    warmup_fraction: float = setting(0.05, "Share of the steps over which the learning rate rises linearly.")
    adam_beta1: float = setting(0.9, "AdamW's first-moment decay.")
    adam_beta2: float = setting(0.98, "AdamW's second-moment decay.")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay, of matrices alone: not of norms and biases.")
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.")
    precision: str = setting(
        "fp32", "fp32, or bf16: forward and backward under autocast, weights and optimizer in float32."
    )
    activation_checkpointing: bool = setting(
        False, "Keep one activation a layer and compute the rest again in backward: less memory, a third more work."
    )
    seed: int = setting(0, "Seed of the order of the examples.")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0 and finite")
        for name in ("warmup_fraction", "adam_beta1", "adam_beta2", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"final_lr_fraction={self.final_lr_fraction}: must lie between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        for name in ("micro_batch_size", "micro_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1; leave it out for a whole batch at once")
        for name, choices in (("lr_schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")

    def splits(self, items: Sequence[int], widths: Sequence[int], rows: int = 1) -> list[Sequence[int]]:
        """The micro-batches of a batch; without a limit to them, the batch as it is."""
        if self.micro_batch_size is None and self.micro_batch_tokens is None:
            return [items]
        limits = {"max_items": self.micro_batch_size, "max_tokens": self.micro_batch_tokens}
        return list(split_by_length(items, widths, rows=rows, **limits))


@dataclass(frozen=True)
class Objective:
    """A loss that is a sum over items, each of which is ``rows`` rows of tokens.

    losses      items → the loss of each, with gradient, and the number of terms (tokens, pairs) in each; [n], [n]
    widths      tokens of every item's longest row
    num_tokens  tokens of every item's rows together
    where       what an item is called in an error, such as file and line
    """

    losses: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    widths: Sequence[int]
    num_tokens: Sequence[int]
    rows: int = 1
    where: Callable[[int], str] = "item {}".format

    def __len__(self) -> int:
        return len(self.widths)


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all processes.

    loss             Σ loss / num_terms
    num_terms        tokens or pairs that the loss was summed over
    learning_rate    of this step
    grad_norm        before clipping
    num_tokens       tokens that were read
    num_computed     tokens that were computed, padding included
    """

    loss: float
    num_terms: int
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_computed: int


def learning_rate_factor(step: int, num_steps: int, config: OptimizationConfig) -> float:
    """Factor on the peak learning rate at ``step`` (0-based): linear rise, then the schedule's fall to its floor.

    The fall begins at 1 at the first step after warm-up and ends at ``final_lr_fraction`` at the last step.
    """
    num_warmup = round(num_steps * config.warmup_fraction)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - num_warmup) / max(num_steps - num_warmup - 1, 1)
    height = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * height


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings; norms and biases, the parameters of one dimension, are left alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))


def checkpoint_activations(model: nn.Module) -> None:
    """Switch on activation checkpointing in the transformer; it acts in training mode."""
    transformer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if not transformer.supports_gradient_checkpointing:
        raise ValueError(f"activation_checkpointing: {type(transformer).__name__} does not support it; leave it off")
    # Newer versions of transformers call it by its right name and warn of the old one.
    new_name = getattr(transformer, "activation_checkpointing_enable", None)
    (new_name or transformer.gradient_checkpointing_enable)({"use_reentrant": False})


class Optimization:
    """Minimises Σ loss / Σ terms over shuffled batches of an objective's items, one :meth:`step` at a time.

    A step is a function of the weights, the optimizer's state and the step's number: nothing else must be stored to go
    on with it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: OptimizationConfig,
        *,
        description: str,
        processes: DataParallel = ALONE,
    ) -> None:
        if config.batch_size < processes.count:
            raise ValueError(
                f"batch_size={config.batch_size}: fewer examples than the {processes.count} processes; give each at "
                "least one"
            )
        self.model = model
        self.objective = objective
        self.config = config
        self.description = description
        self.processes = processes
        self.num_steps = max(1, math.ceil(config.epochs * len(objective) / config.batch_size))
        self.optimizer = make_optimizer(model, config)
        if config.activation_checkpointing:
            checkpoint_activations(model)

    def step(self, step: int) -> Step:
        """Take step number ``step`` (0-based). Raises ValueError when the loss or its gradient is not finite."""
        batch = self._own_items(step)
        loss, num_terms, num_tokens, num_computed = self._accumulate(batch, step)
        self.processes.sum_gradients(self.model.parameters())
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(int(num_terms))
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", norm, step, self._items_with_broken_gradients(batch))
        learning_rate = self.config.learning_rate * learning_rate_factor(step, self.num_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss / num_terms, int(num_terms), learning_rate, norm, int(num_tokens), int(num_computed))

    def _own_items(self, step: int) -> Sequence[int]:
        """This process's items of a batch. Several processes deal them out by length, so that none has to wait."""
        batch = shuffled_batch(len(self.objective), self.config.batch_size, step, self.config.seed).tolist()
        if self.processes.count > 1:
            batch.sort(key=lambda item: -self.objective.widths[item])
        return self.processes.share(batch)

    def _accumulate(self, batch: Sequence[int], step: int) -> list[float]:
        """Add up the gradient of a batch. → Σ loss, Σ terms, tokens, tokens computed; over all processes"""
        objective = self.objective
        totals = [0.0, 0.0, 0.0, 0.0]
        broken: list[int] = []
        for items in self.config.splits(batch, objective.widths, objective.rows):
            with self._autocast():
                losses, terms = objective.losses(items)
            losses.sum().backward()
            values = losses.detach().double()
            if not values.isfinite().all():
                broken += [item for item, value in zip(items, values.tolist(), strict=True) if not math.isfinite(value)]
            tokens = sum(objective.num_tokens[item] for item in items)
            computed = len(items) * objective.rows * max(objective.widths[item] for item in items)
            for i, value in enumerate((float(values.sum()), float(terms.sum()), tokens, computed)):
                totals[i] += value
        totals = self.processes.summed(totals)
        if not math.isfinite(totals[0]):
            raise self._not_finite("loss", totals[0] / totals[1], step, broken)
        return totals

    def _autocast(self) -> AbstractContextManager[None]:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _items_with_broken_gradients(self, batch: Sequence[int]) -> list[int]:
        """The items whose own gradient is not finite, found one by one: slow, but it happens once."""
        broken = []
        for item in batch:
            self.optimizer.zero_grad()
            with self._autocast():
                losses, _ = self.objective.losses([item])
            losses.sum().backward()
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            if not all(gradient.isfinite().all() for gradient in gradients):
                broken.append(item)
        return broken

    def _not_finite(self, what: str, value: float, step: int, items: Sequence[int]) -> ValueError:
        """The error that names the step and the first few of the items that broke it, of any process."""
        broken = [
            where for part in self.processes.gathered([self.objective.where(item) for item in items]) for where in part
        ]
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        named = f" from {', '.join(broken[:3])}{more}" if broken else ""
        return ValueError(
            f"{self.description}: the {what} is {value} at step {step + 1}{named}; lower the learning rate, or look at "
            "these examples"
        )


@torch.no_grad()
def measured(
    function: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    widths: Sequence[int],
    config: OptimizationConfig,
    *,
    rows: int = 1,
    processes: DataParallel = ALONE,
) -> Tensor:
    """Two numbers for every item, computed in micro-batches of like width and by all processes. → [2, N] float64

    Without a limit to micro-batches, a batch's number of items is theirs.
    """
    own = processes.share(sorted(range(len(widths)), key=lambda item: -widths[item]))
    size = config.micro_batch_size or config.batch_size
    blocks = split_by_length(own, widths, max_items=size, max_tokens=config.micro_batch_tokens, rows=rows)
    parts = [(block, torch.stack([value.double() for value in function(block)]).cpu()) for block in blocks]
    whole = torch.empty(2, len(widths), dtype=torch.float64)
    for block, values in (part for process in processes.gathered(parts) for part in process):
        whole[:, block] = values
    return whole


def minimise(model: nn.Module, objective: Objective, config: OptimizationConfig, *, description: str) -> list[float]:
    """Train ``model`` in place, in this process alone; returns the loss of every step. The model ends in eval mode."""
    optimization = Optimization(model, objective, config, description=description)
    model.train()
    losses: list[float] = []
    with tqdm(range(optimization.num_steps), desc=description) as progress:
        for step in progress:
            losses.append(optimization.step(step).loss)
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses

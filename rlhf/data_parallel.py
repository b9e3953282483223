"""Several processes that train one model: each takes its rows of a batch, and sums go over all of them.

What PPO runs through accelerate (:mod:`rlhf.distributed`), the two stages do by hand, because their gradient is a sum
over tokens that is divided once, by the number of tokens of all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from torch import distributed, nn

Item = TypeVar("Item")


@dataclass(frozen=True)
class DataParallel:
    """Which process this is, of how many. Alone, every method gives back what it was given."""

    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> DataParallel:
        """The processes that ``accelerate launch`` or ``torchrun`` started; one without them.

        Raises ValueError when several were started and accelerate does not connect them, as it does not on CPUs unless
        told so.
        """
        accelerator = Accelerator()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != accelerator.num_processes:
            raise ValueError(
                f"{started} processes were started, but accelerate sees {accelerator.num_processes}; for processes on "
                "CPUs set ACCELERATE_USE_CPU=1"
            )
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``count``-th item, from this process's own place on: of items in order of length, each gets alike."""
        return items[self.rank :: self.count] if self.count > 1 else items

    def summed(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the processes, in float64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=PartialState().device)
        distributed.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for work in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()

    def gathered(self, value: Any) -> list[Any]:
        """What every process has, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

"""One run on several processes: who works on which episodes, and how what they found comes together.

Every process samples, scores and measures its share of a batch; all of it is then gathered, so that each process has
the whole batch, computes advantages and minibatches alike, and takes its share of every minibatch. Gradients are
averaged by accelerate (DDP or FSDP). The learning curve is that of one process with the same batch, up to rounding.

Under FSDP, what is trained lies in shards, one a process, gradients and moments included, and is put together layer by
layer in a training forward. Sampling and measuring read a whole copy, which every process has and which takes over the
weights after each update; so does a moving average. In bf16 that copy's linear layers are rounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad

from rlhf.rollout import Rollout

RESPONSE_FIELDS = ("response_mask", "logprobs", "finished")
Item = TypeVar("Item")


class Processes:
    """The processes of a run, this one among them."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        """Raises ValueError for a way of running that PPO does not have."""
        self.accelerator = accelerator or Accelerator()
        require_known_way(self.accelerator)

    @property
    def shards(self) -> bool:
        """Whether what is trained is split over the processes (FSDP)."""
        return self.number > 1 and self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def number(self) -> int:
        """How many there are."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def share(self, num_items: int) -> slice:
        """This process's part of items that are split evenly, in order."""
        each = -(-num_items // self.number)
        rank = self.accelerator.process_index
        return slice(min(rank * each, num_items), min((rank + 1) * each, num_items))

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in the order of their shares, in every process."""
        return list(items) if self.number == 1 else gather_object(list(items))

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value added up over the processes."""
        if self.number == 1:
            return values
        total = self.accelerator.reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=self.device))
        return dict(zip(values, total.tolist(), strict=True))

    def max(self, value: float) -> float:
        """The largest value of any process."""
        return max(self.gather([value]))

    def any(self, value: bool) -> bool:
        """Whether it holds for any process."""
        return any(self.gather([value]))

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Module and optimizer as accelerate runs them on these processes; as they are on one."""
        if self.number == 1:
            return module, optimizer
        module, optimizer = self.accelerator.prepare(module, optimizer)
        return module, optimizer

    @contextmanager
    def accumulating(self, modules: Sequence[nn.Module], last: bool) -> Iterator[None]:
        """Backward passes inside leave gradients where they are, unless this is the last before the step.

        Gradients that wait would be whole ones, so under FSDP each pass shares out its own.
        """
        with ExitStack() as stack:
            if not last and self.number > 1 and not self.shards:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    @contextmanager
    def failing_together(self, *kinds: type[Exception]) -> Iterator[None]:
        """What one process raises inside, all of them raise, so that none waits for one that has gone."""
        mine: Exception | None = None
        try:
            yield
        except kinds as error:
            mine = error
        failures = [failure for failure in self.gather([mine and (type(mine), str(mine))]) if failure]
        if mine is not None:
            raise mine
        if failures:
            kind, message = failures[0]
            raise kind(message)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()


def require_known_way(accelerator: Accelerator) -> None:
    """Raise ValueError unless accelerate runs one process, DDP, or FSDP as it is meant here."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set to {kind.value}, which rlhf.ppo cannot use; launch it with recipes/accelerate/ddp.yaml "
            "or fsdp.yaml"
        )
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "accelerate is set to version 1 of FSDP; set fsdp_version: 2 (recipes/accelerate/fsdp.yaml)"
            )
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading leaves all models of all but one process without weights; set it to "
                "false (recipes/accelerate/fsdp.yaml)"
            )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"accelerate is set to mixed_precision={accelerator.mixed_precision}, which rounds log-probabilities; set "
            "it to no, and give --precision bf16"
        )


# ── Whole tensors and shards ──────────────────────────────────────────────────────────────────────────────────────────


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its shards put together. All processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept_whole(tensors: Mapping[Any, Any], keep: bool) -> dict[Any, Any]:
    """The tensors in nested dicts, whole and in host memory where they were in shards; None for each unless ``keep``.

    All processes call it together, and one keeps what it gives: a device holds no more than one whole tensor at a time.
    """
    kept: dict[Any, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            kept[name] = kept_whole(value, keep)
        elif isinstance(value, DTensor):
            tensor = value.full_tensor()
            kept[name] = tensor.cpu() if keep else None
        else:
            kept[name] = value
    return kept


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as another of its shape is kept: in its dtype, on its device, and in shards where that one is."""
    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Write a module's trained parameters over those of a whole copy, one by one. All processes do it together."""
    copies = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            copies[name].copy_(whole(parameter))


@torch.no_grad()
def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors over a module's of the same names, which may be shards."""
    present = module.state_dict()
    for name, tensor in tensors.items():
        present[name].copy_(placed_like(tensor, present[name]))


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name, as they are kept."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, as they are kept."""
    names = module.state_dict().keys()
    everything: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in everything.items() if name in names}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over an optimizer's state of whole tensors, in shards where the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {
            name: placed_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": placed, "param_groups": state["param_groups"]})


# ── Rollouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def gather_rollouts(
    processes: Processes, rollout: Rollout, tensors: Mapping[str, Tensor]
) -> tuple[Rollout, dict[str, Tensor]]:
    """The rollouts of all processes as one, with what is known of their responses, [B] or [B, T] each.

    Hidden states stay behind.
    """
    rollout = replace(rollout, hidden=None)
    if processes.number == 1:
        return rollout, dict(tensors)
    fields = {name: getattr(rollout, name) for name in ("tokens", "attention_mask", *RESPONSE_FIELDS)}
    mine = {name: value.cpu() for name, value in (fields | dict(tensors)).items()}
    parts = processes.gather([(mine, rollout.prompts, rollout.responses)])
    num_prompt = max(part["tokens"].shape[1] - part["response_mask"].shape[1] for part, _, _ in parts)
    num_response = max(part["response_mask"].shape[1] for part, _, _ in parts)

    def joined(name: str) -> Tensor:
        rows = []
        for part, _, _ in parts:
            value, width = part[name], part["response_mask"].shape[1]
            if value.dim() == 2:
                left = num_prompt - (value.shape[1] - width) if name in ("tokens", "attention_mask") else 0
                value = pad(value, (left, num_response - width))
            rows.append(value)
        return torch.cat(rows).to(processes.device)

    together = Rollout(
        **{name: joined(name) for name in fields},
        prompts=[text for _, prompts, _ in parts for text in prompts],
        responses=[text for _, _, responses in parts for text in responses],
    )
    return together, {name: joined(name) for name in tensors}

"""Sharded training (FSDP): two processes learn as one, and go on from a checkpoint. On CPUs, which accelerate leaves to
DDP unless it is told so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import as_ranks, assert_same_run, forked, ppo_arguments
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from rlhf import ppo
from rlhf.command_line import run_command
from rlhf.distributed import Processes, copy_whole, kept_whole, load_whole, trained

SETTINGS: dict[str, Any] = {"micro_batch_size": 1, "save_every": 2}
CASES: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"value_model": "shared", "kl_in": "loss", "kl_estimator": "exact"},
    "moving average": {"reference_kind": "moving_average", "reference_decay": 0.5, "activation_checkpointing": True},
    "lora": {"lora_rank": 4},
    "bf16": {"precision": "bf16"},
    "lora in bf16": {"lora_rank": 4, "precision": "bf16"},
}


def sharded_accelerator(version: int = 2) -> Accelerator:
    """What ``Accelerator()`` gives on GPUs under recipes/accelerate/fsdp.yaml."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def sharded(command: Callable[[], object]) -> list[int]:
    """Run a command in two processes that shard."""

    def run() -> object:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("rlhf.distributed.Accelerator", sharded_accelerator)
            return command()

    return forked(*as_ranks(run))


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "case",
    [
        "separate",
        "lora",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("shared", "moving average", "bf16", "lora in bf16")),
    ],
)
def test_shards_learn_as_one_and_resume_to_the_same_bytes(
    case: str,
    checkpoints: dict[str, Path],
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf.figures.draw_run", lambda run: [])
    if case == "lora":
        pytest.importorskip("peft")
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))
    arguments = {path: ppo_arguments(checkpoints, prompt_file, path, **SETTINGS, **CASES[case]) for path in (one, two)}
    ppo.main(arguments[one])
    assert sharded(lambda: run_command(ppo.main, arguments[two])) == [0, 0]
    for row, expected in zip(rows_of(two), rows_of(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
    weights, expected_weights = (load_file(path / "policy" / "model.safetensors") for path in (two, one))
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)

    def ends_after_three() -> int:
        monkeypatch.setattr(ppo, "one_update", ending_at(3, ppo.one_update))
        return run_command(ppo.main, ppo_arguments(checkpoints, prompt_file, stopped, **SETTINGS, **CASES[case]))

    assert sharded(ends_after_three) == [3, 3]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["update-000002"]
    assert sharded(lambda: run_command(ppo.main, ["--output", str(stopped), "--resume"])) == [0, 0]
    assert_same_run(stopped, two)


def ending_at(last: int, one_update: Callable[..., Any]) -> Callable[..., Any]:
    """An update that ends the process instead of update ``last``."""

    def update_or_end(run: Any, update: int) -> Any:
        if update == last:
            raise SystemExit(last)
        return one_update(run, update)

    return update_or_end


def test_what_is_trained_lies_in_shards_and_the_copy_is_whole() -> None:
    def check() -> None:
        processes = Processes(sharded_accelerator())
        assert processes.shards
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
        copy = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
        before = {name: weight.clone() for name, weight in trained(module).items()}
        wrapped, _ = processes.wrap(module, torch.optim.AdamW(module.parameters()))
        for name, parameter in wrapped.named_parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().shape[0] * 2 == parameter.shape[0] == before[name].shape[0]
        copy_whole(wrapped, copy)
        assert all(torch.equal(weight, before[name]) for name, weight in copy.state_dict().items())
        load_whole(wrapped, {"1.weight": 2 * before["1.weight"]})
        found = kept_whole({"weights": trained(wrapped), "step": 3}, keep=processes.is_main)
        assert found["step"] == 3
        expected = before | {"1.weight": 2 * before["1.weight"]}
        for name, weight in found["weights"].items():
            assert torch.equal(weight, expected[name]) if processes.is_main else weight is None

    assert forked(*as_ranks(check)) == [0, 0]


def test_ways_of_running_that_ppo_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(accelerator: Callable[[], Accelerator], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            Processes(accelerator())

    def deepspeed() -> Accelerator:
        accelerator = Accelerator()
        accelerator.state.distributed_type = DistributedType.DEEPSPEED
        return accelerator

    def check() -> None:
        refused(lambda: Accelerator(mixed_precision="bf16"), "accelerate is set to mixed_precision=bf16, which rounds")
        AcceleratorState._reset_state()
        refused(deepspeed, "accelerate is set to DEEPSPEED, which rlhf.ppo cannot use")
        refused(lambda: sharded_accelerator(version=1), "set fsdp_version: 2")
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        refused(sharded_accelerator, "fsdp_cpu_ram_efficient_loading leaves all models of all but one process without")

    assert forked(*as_ranks(check)) == [0, 0]

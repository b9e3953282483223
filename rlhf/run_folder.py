"""The folder of a PPO run: what is written as it goes, and what it resumes from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpointing import publishing, require_new, save_model
from rlhf.config import PPOConfig
from rlhf.evaluation import Evaluation
from rlhf.metrics import append_json_line, read_json_lines, write_json, write_json_lines
from rlhf.rollout import Rollout

LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class Progress:
    """Where a run is, apart from weights and optimizers. Randomness has no state: it depends on seed and update."""

    update: int
    seconds: float
    kl_coef: float
    before: Evaluation

    @classmethod
    def read(cls, path: Path) -> Progress:
        """The progress that a checkpoint's ``progress.json`` holds."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "before": Evaluation.from_json(values["before"])})


@dataclass(frozen=True)
class Trainables:
    """What changes while a run trains, and must be stored to resume it."""

    policy: PreTrainedModel
    value_model: nn.Module
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """All of it but the policy's weights, which a checkpoint folder holds by itself."""
        return {
            "value_model": self.value_model.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
        }

    def restore(self, policy: Mapping[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Take over the weights of a checkpoint's policy and the rest from its :meth:`state`."""
        self.policy.load_state_dict(policy)
        self.value_model.load_state_dict(state["value_model"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])


class RunFolder:
    """Writes one run. Nothing is created before :meth:`create`, so that bad input leaves nothing behind."""

    def __init__(self, config: PPOConfig) -> None:
        """Raises FileExistsError for a new run in an existing folder, FileNotFoundError for resuming none."""
        self.path = Path(config.output or time.strftime("runs/%Y%m%d-%H%M%S"))
        if not config.resume:
            require_new(self.path)
        elif not (self.path / "config.yaml").is_file():
            raise FileNotFoundError(f"{self.path}: no run to resume (no config.yaml); start it without --resume")
        elif (self.path / "summary.json").exists():
            raise FileExistsError(f"{self.path}: this run is finished; start a new one in another --output")

    def create(self, config: PPOConfig, reference: Mapping[str, Any]) -> None:
        """Make the folder with its configuration and the reference's provenance, and empty logs."""
        (self.path / "reference").mkdir(parents=True, exist_ok=True)
        replace(config, resume=False).save(self.path / "config.yaml")
        write_json(self.path / "reference" / "soup.json", reference)
        for name in LOGS:
            (self.path / name).write_text("", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add an update to ``metrics.jsonl``; no timings, so that two runs can be compared byte for byte."""
        append_json_line(self.path / "metrics.jsonl", metrics)

    def log_timing(self, update: int, **seconds: float) -> None:
        """Add the seconds that the phases of an update took to ``timings.jsonl``."""
        append_json_line(self.path / "timings.jsonl", {"update": update, **seconds})

    def log_samples(
        self, update: int, prompts: str, rollout: Rollout, scores: Mapping[str, torch.Tensor], *, number: int
    ) -> None:
        """Add the first responses and their scores to ``samples.jsonl``; ``prompts``: training or held-out ones."""
        for i in range(min(number, len(rollout))):
            row = {"update": update, "prompts": prompts, "prompt": rollout.prompts[i], "response": rollout.responses[i]}
            append_json_line(
                self.path / "samples.jsonl", row | {name: float(values[i]) for name, values in scores.items()}
            )

    def checkpoint(
        self, progress: Progress, trainables: Trainables, tokenizer: PreTrainedTokenizerBase, keep: int
    ) -> None:
        """Publish ``checkpoints/update-N``: the policy's checkpoint folder with all that resuming needs."""
        folder = self.path / "checkpoints" / f"update-{progress.update:06d}"
        with publishing(folder) as partial:
            trainables.policy.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            torch.save(trainables.state(), partial / "training_state.pt")
            write_json(partial / "progress.json", asdict(progress))
        for old in self._checkpoints()[:-keep]:
            shutil.rmtree(old)

    def resume(self, trainables: Trainables) -> Progress | None:
        """Load the newest checkpoint and cut the logs back to it; None when there is none and the run starts over."""
        checkpoints = self._checkpoints()
        if not checkpoints:
            return None
        newest = checkpoints[-1]
        policy = type(trainables.policy).from_pretrained(newest, dtype=torch.float32)
        state = torch.load(newest / "training_state.pt", map_location="cpu", weights_only=True)
        trainables.restore(policy.state_dict(), state)
        progress = Progress.read(newest / "progress.json")
        for name in LOGS:
            kept = [row for row in read_json_lines(self.path / name) if row["update"] <= progress.update]
            write_json_lines(self.path / name, kept)
        return progress

    def finish(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, summary: Mapping[str, Any]) -> None:
        """Publish ``policy/``, draw the figures, and write ``summary.json`` last, which marks the run as finished."""
        from rlhf.figures import draw_run

        if not (self.path / "policy").exists():
            save_model(policy, tokenizer, self.path / "policy")
        draw_run(self.path)
        write_json(self.path / "summary.json", summary)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("update-*"))

"""The folder of a PPO run: what is written as it goes, and what it resumes from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import soupkit
from rlhf.checkpointing import publishing, require_new, save_model
from rlhf.command_line import read_settings
from rlhf.config import PPOConfig
from rlhf.evaluation import Evaluation
from rlhf.lora import base_of, save_adapter
from rlhf.metrics import append_json_line, read_json_lines, write_json, write_json_lines
from rlhf.rollout import Rollout
from rlhf.setup import Run

LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class Progress:
    """Where a run is, apart from what it trains. Randomness has no state: it depends on seed and update."""

    update: int
    seconds: float
    before: Evaluation

    @classmethod
    def read(cls, path: Path) -> Progress:
        """The progress that a checkpoint's ``progress.json`` holds."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "before": Evaluation.from_json(values["before"])})


class RunFolder:
    """Writes one run. Nothing is created before :meth:`create`, so that bad input leaves nothing behind."""

    def __init__(self, config: PPOConfig, *, writes: bool = True) -> None:
        """Raises FileExistsError for a new run in an existing folder, FileNotFoundError for resuming none.

        With ``writes`` False nothing is ever written: of several processes, one writes.
        """
        self.path = Path(config.output or time.strftime("runs/%Y%m%d-%H%M%S"))
        self.writes = writes
        self.board_class = summary_writer() if config.tensorboard and writes else None
        self.board: Any = None
        if not config.resume:
            if writes:
                require_new(self.path)
        elif not (self.path / "config.yaml").is_file():
            raise FileNotFoundError(f"{self.path}: no run to resume (no config.yaml); start it without --resume")
        elif (self.path / "summary.json").exists():
            raise FileExistsError(f"{self.path}: this run is finished; start a new one in another --output")

    def create(self, config: PPOConfig, describe_reference: Callable[[], Mapping[str, Any]]) -> None:
        """Make the folder with its configuration and the reference's provenance, and empty logs."""
        if not self.writes:
            return
        # There already where a run goes on that ended before its first checkpoint.
        with nullcontext(self.path) if self.path.exists() else publishing(self.path) as folder:
            (folder / "reference").mkdir(exist_ok=True)
            replace(config, resume=False).save(folder / "config.yaml")
            write_json(folder / "reference" / "soup.json", describe_reference())
            for name in LOGS:
                (folder / name).write_text("", encoding="utf-8")
        self._open_board(first=1)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add an update to ``metrics.jsonl``; no timings, so that two runs can be compared byte for byte."""
        self._append("metrics.jsonl", metrics)
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["update"])
            self.board.flush()

    def log_timing(self, update: int, **seconds: float) -> None:
        """Add the seconds that the phases of an update took to ``timings.jsonl``."""
        self._append("timings.jsonl", {"update": update, **seconds})

    def log_samples(
        self, update: int, prompts: str, rollout: Rollout, scores: Mapping[str, torch.Tensor], *, number: int
    ) -> None:
        """Add the first responses and their scores to ``samples.jsonl``; ``prompts``: training or held-out ones."""
        for i in range(min(number, len(rollout))):
            row = {"update": update, "prompts": prompts, "prompt": rollout.prompts[i], "response": rollout.responses[i]}
            self._append("samples.jsonl", row | {name: float(values[i]) for name, values in scores.items()})

    def save(self, progress: Progress, run: Run) -> None:
        """Publish ``checkpoints/update-N``: the policy's checkpoint folder with all that resuming needs.

        Raises OSError, with what to do, when it cannot be written; older checkpoints stay.
        """
        folder = self.path / "checkpoints" / f"update-{progress.update:06d}"
        weights, state = run.model_weights(), run.state()
        if not self.writes or folder.exists():
            return
        try:
            with publishing(folder) as partial:
                if run.config.lora_rank:
                    save_adapter(run.model, base_of(str(run.config.policy)), partial, weights)
                else:
                    run.model.save_pretrained(partial, state_dict=weights)
                run.tokenizer.save_pretrained(partial)
                torch.save(state, partial / "training_state.pt")
                run.config.save(partial / "config.yaml")
                write_json(partial / "progress.json", asdict(progress))
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            kept = f"{checkpoints[-1]} is whole" if (checkpoints := self._checkpoints()) else "there is none yet"
            raise OSError(
                f"{folder}: the checkpoint could not be written ({' '.join(str(error).split())}); {kept}: make room "
                f"({free_bytes(folder) / 1e6:.0f} MB are free), then go on with --output {self.path} --resume"
            ) from error
        for old in self._checkpoints()[: -run.config.keep]:
            shutil.rmtree(old)

    def resume(self, run: Run) -> Progress | None:
        """Load the newest checkpoint and cut the logs back to it; None when there is none and the run starts over."""
        checkpoints = self._checkpoints()
        if not checkpoints:
            return None
        newest = checkpoints[-1]
        require_same_settings(newest / "config.yaml", run.config)
        model: Mapping[str, torch.Tensor] = {}
        if not run.config.lora_rank:
            model = type(run.model).from_pretrained(newest, dtype=torch.float32).state_dict()
        state = torch.load(newest / "training_state.pt", map_location="cpu", weights_only=True)
        run.restore(model, state)
        progress = Progress.read(newest / "progress.json")
        for name in LOGS if self.writes else ():
            kept = [row for row in read_json_lines(self.path / name) if row["update"] <= progress.update]
            write_json_lines(self.path / name, kept)
        self._open_board(first=progress.update + 1)
        return progress

    def finish(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Publish ``policy/``, draw the figures, and write ``summary.json`` last, which marks the run as finished."""
        from rlhf.figures import draw_run

        weights = run.model_weights()
        if not self.writes:
            return
        if not (self.path / "policy").exists():
            save_policy(run, weights, self.path)
        draw_run(self.path)
        write_json(self.path / "summary.json", summary)

    def _open_board(self, first: int) -> None:
        """Write to TensorBoard from update ``first`` on; what an earlier process wrote of later ones is hidden."""
        if self.board_class is not None:
            self.board = self.board_class(self.path / "tensorboard", purge_step=first)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.writes:
            append_json_line(self.path / name, row)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("update-*"))


def save_policy(run: Run, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Publish ``policy/``, a whole model also where an adapter was trained; that one is published as ``adapter/``."""
    if not run.config.lora_rank:
        save_model(run.model, run.tokenizer, folder / "policy", weights)
        return
    base = base_of(str(run.config.policy))
    if not (folder / "adapter").exists():
        with publishing(folder / "adapter") as partial:
            save_adapter(run.model, base, partial, weights)
    soupkit.average([f"{base}+{folder / 'adapter'}"], out=folder / "policy", dtype=torch.float32, progress=False)


def free_bytes(path: Path) -> int:
    """Bytes free where a path is, or would be."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def summary_writer() -> Any:
    """TensorBoard's writer class; ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: not installed; pip install tensorboard, or leave the setting out") from None
    return SummaryWriter


def require_same_settings(path: Path, config: PPOConfig) -> None:
    """Raise ValueError, naming what differs, when a checkpoint was made with other settings than ``config``."""
    made_with = read_settings(path)
    differing = [
        f"{name} ({made_with.get(name)!r} there, {value!r} here)"
        for name, value in asdict(config).items()
        if name not in ("resume", "output") and made_with.get(name) != value
    ]
    if differing:
        raise ValueError(f"{path.parent}: a checkpoint of another configuration: {', '.join(differing)}")

"""The settings and the folder of ``rlhf.sft`` and ``rlhf.reward_model``: what is written, and what is resumed from.

A stage in progress lives in ``OUTPUT.unfinished``: ``config.yaml``, ``data.json`` (its hashes), ``metrics.jsonl``
(one object a logged step; nothing that depends on the clock, so that two runs can be compared byte for byte),
``timings.jsonl``, ``checkpoints/step-N`` and, with ``--keep_best``, ``best/step-N``. ``OUTPUT`` appears whole at the
end: an ordinary checkpoint folder with the logs, the settings (``training.yaml``) and ``figures/``.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlhf.checkpointing import require_new
from rlhf.command_line import read_settings, required, setting
from rlhf.metrics import read_json_lines, replace_text, write_json, write_json_lines
from rlhf.training import OptimizationConfig

Item = TypeVar("Item")
LOGS = ("metrics.jsonl", "timings.jsonl")
MAY_CHANGE = ("resume", "checkpoint_every")  # settings that a resumed stage may have otherwise


@dataclass(kw_only=True)
class StageConfig(OptimizationConfig):
    """Settings that the two stages share."""

    model: str = required("Checkpoint folder to start from.")
    data: list[str] = required("Training data, .jsonl; several files count as one.")
    max_examples: int | None = setting(None, "Train on the first so many examples (pairs) of the data alone.")
    test_data: str | None = setting(None, "Held-out data, in the form of --data, measured before and after training.")
    output: str = required("Folder of the trained model, made new; OUTPUT.unfinished until then.")
    max_tokens: int = setting(1024, "Longest prompt and response together; the end of longer responses is cut.")
    log_every: int = setting(1, "Steps between lines of metrics.jsonl.")
    eval_every: int = setting(
        0, "Steps between evaluations on --test_data; 0: before the first and after the last alone."
    )
    keep_best: bool = setting(
        False, "End with the weights of the evaluation with the lowest held-out loss, not with those of the last step."
    )
    checkpoint_every: int = setting(0, "Steps between checkpoints to resume from; 0: on SIGTERM alone.")
    resume: bool = setting(False, "Go on with the stage that was stopped in OUTPUT.unfinished, with the same settings.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples={self.max_examples}: must be at least 1")
        if (self.eval_every or self.keep_best) and self.test_data is None:
            name = "eval_every" if self.eval_every else "keep_best"
            raise ValueError(f"{name}: there is nothing to evaluate on; give held-out data with --test_data FILE")


def training_data(config: StageConfig, read: Callable[[str], list[Item]]) -> list[Item]:
    """The items of all files of training data, each read by ``read``; the first ones where not all are wanted."""
    return [item for path in config.data for item in read(path)][: config.max_examples]


class StageFolder:
    """Writes one stage. Nothing is created before :meth:`create`, so that bad input leaves nothing behind."""

    def __init__(self, config: StageConfig) -> None:
        """Raises FileExistsError when the output, or an unfinished one, is in the way; FileNotFoundError for resuming
        none; ValueError for resuming with other settings.
        """
        self.config = config
        self.output = Path(config.output)
        self.path = self.output.with_name(f"{self.output.name}.unfinished")
        require_new(self.output)
        if not config.resume and self.path.exists():
            raise FileExistsError(
                f"{self.path}: a stopped run; go on with --resume, remove it, or choose another --output"
            )
        if config.resume:
            self._require_same_settings()

    def _require_same_settings(self) -> None:
        if not (self.path / "config.yaml").is_file():
            raise FileNotFoundError(f"{self.path}: nothing to resume (no config.yaml); start without --resume")
        before = read_settings(self.path / "config.yaml") | read_settings(self.path / "data.json")
        now = asdict(self.config) | self._data_hashes()
        changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
        if changed:
            found = ", ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise ValueError(
                f"{self.path}: was started with other settings ({found}); resume with the same ones, "
                "or remove the folder to start anew"
            )

    @property
    def model_path(self) -> Path:
        """The checkpoint folder whose weights the stage starts from, or goes on from."""
        return self.checkpoint_path or Path(self.config.model)

    @property
    def checkpoint_path(self) -> Path | None:
        """The newest checkpoint to go on from, if any."""
        found = sorted((self.path / "checkpoints").glob("step-*")) if self.config.resume else []
        return found[-1] if found else None

    def create(self) -> None:
        """Make the folder with the settings and empty logs, unless it is gone on with."""
        if self.checkpoint_path is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        settings = asdict(replace(self.config, resume=False))
        replace_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        write_json(self.path / "data.json", self._data_hashes())
        for name in LOGS:
            (self.path / name).write_text("", encoding="utf-8")

    def _data_hashes(self) -> dict[str, list[str]]:
        """SHA-256 of the data files that are there."""
        given = {"data": self.config.data, "test_data": [self.config.test_data] if self.config.test_data else []}
        return {
            f"{name}_sha256": [
                hashlib.sha256(path.read_bytes()).hexdigest() for path in map(Path, paths) if path.is_file()
            ]
            for name, paths in given.items()
        }

    def cut_logs(self, step: int) -> None:
        """Forget what was logged after ``step``."""
        for name in LOGS:
            kept = [row for row in read_json_lines(self.path / name) if row["step"] <= step]
            write_json_lines(self.path / name, kept)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_json_lines(self.path / "metrics.jsonl")

    def remove(self) -> None:
        """Remove the unfinished folder, when its output is published."""
        shutil.rmtree(self.path)

"""A stage of training in its folder: logs every step, evaluates, keeps the best weights, stops and resumes."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpointing import publishing, save_model
from rlhf.metrics import append_json_line, write_json
from rlhf.stage_folder import LOGS, StageFolder
from rlhf.training import Optimization, Step

Evaluate = Callable[[], dict[str, float]]


@dataclass
class Trained:
    """Where a stage is, apart from weights and optimizer, which hold the rest. Batches depend on seed and step."""

    step: int = 0
    num_tokens: int = 0
    num_computed: int = 0
    best_step: int | None = None
    best_loss: float = math.inf


class Stage:
    """Runs an optimisation in a folder: logs every step, evaluates, keeps the best, stops and resumes.

    ``evaluate`` returns what is measured on held-out data, ``test_loss`` among it; None without held-out data.
    """

    def __init__(
        self,
        folder: StageFolder,
        optimization: Optimization,
        transformer: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Evaluate | None,
    ) -> None:
        self.folder = folder
        self.config = folder.config
        self.optimization = optimization
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.evaluate = evaluate
        self.processes = optimization.processes
        self.state = Trained()
        self._num_tokens, self._since = 0, time.perf_counter()  # tokens read since then

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, where the model has the weights to keep; → the main process's rows of ``metrics.jsonl``.

        SIGTERM writes a checkpoint after the running step and raises SystemExit(143).
        """
        self._start()
        num_steps = self.optimization.num_steps
        with stop_on_sigterm() as stop, self._progress() as progress:
            for step in range(self.state.step, num_steps):
                self.optimization.model.train()
                result = self.optimization.step(step)
                self._count(result)
                self._log(result)
                progress.update()
                progress.set_postfix(loss=f"{result.loss:.3f}")
                stopping = self.processes.summed([stop.is_set()])[0] > 0
                if step + 1 < num_steps and (stopping or self._due(self.config.checkpoint_every)):
                    self._checkpoint()
                if stopping:
                    break
        if self.state.step < num_steps:
            self._leave()
        self.optimization.model.eval()
        if self.config.keep_best:
            self._load_weights(self._best_path())
        return self.folder.metrics() if self.processes.is_main else []

    def publish(self, extra: Callable[[Path], None]) -> None:
        """Publish the output folder: model, tokenizer, logs, settings, and what ``extra`` writes; remove the rest."""
        if self.processes.is_main:
            with publishing(self.folder.output) as partial:
                self.transformer.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
                for name in LOGS:
                    shutil.copy(self.folder.path / name, partial / name)
                shutil.copy(self.folder.path / "config.yaml", partial / "training.yaml")
                extra(partial)
            self.folder.remove()
        self.processes.wait()

    def summary(self, rows: Sequence[Mapping[str, Any]], data: str, unit: str) -> str:
        """What happened, in a few lines for people; ``rows``: what :meth:`run` returned."""
        padding = 1 - self.state.num_tokens / self.state.num_computed
        lines = [
            f"{self.folder.output}: {self.state.step} steps on {data}, training loss {rows[-1]['loss']:.3f}; "
            f"{padding:.1%} of the tokens computed were padding"
        ]
        tested = [row for row in rows if "test_loss" in row]
        if tested:
            first, last = (f"{row['test_loss']:.3f} ± {row['test_loss_stderr']:.3f}" for row in (tested[0], tested[-1]))
            lines.append(f"held-out loss {first} → {last} {unit}")
        if self.config.keep_best:
            lines.append(f"kept: the weights of step {self.state.best_step}, held-out loss {self.state.best_loss:.3f}")
        return "\n".join(lines)

    def _start(self) -> None:
        """Make the folder and evaluate; or take over a checkpoint, whose weights the model has been loaded from."""
        checkpoint = self.folder.checkpoint_path
        self.processes.wait()  # before the main process changes what the others look at
        if checkpoint is None:
            if self.processes.is_main:
                self.folder.create()
            self._log_evaluation({"step": 0})
            return
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimization.optimizer.load_state_dict(state)
        self.state = Trained(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
        if self.processes.is_main:
            self.folder.cut_logs(self.state.step)

    def _progress(self) -> tqdm[Any]:
        description, total = self.optimization.description, self.optimization.num_steps
        return tqdm(desc=description, initial=self.state.step, total=total, disable=not self.processes.is_main)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _count(self, result: Step) -> None:
        self.state.step += 1
        self.state.num_tokens += result.num_tokens
        self.state.num_computed += result.num_computed
        self._num_tokens += result.num_tokens

    def _log(self, result: Step) -> None:
        """Log a step, where it is due, with what is measured after it; the last step is always logged and measured."""
        step, is_last = self.state.step, self.state.step == self.optimization.num_steps
        row = {
            "step": step,
            "epoch": step * self.config.batch_size / len(self.optimization.objective),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "padding": 1 - result.num_tokens / result.num_computed,
        }
        if self._due(self.config.log_every) or is_last:
            now = time.perf_counter()
            timing = {"step": step, "tokens_per_second": self._num_tokens / (now - self._since)}
            self._append("timings.jsonl", timing)
            self._num_tokens, self._since = 0, now
        if self.evaluate is not None and (self._due(self.config.eval_every) or is_last):
            self._log_evaluation(row)
        elif self._due(self.config.log_every) or is_last:
            self._append("metrics.jsonl", row)

    def _log_evaluation(self, row: dict[str, Any]) -> None:
        """Log a row with what is measured on held-out data, and keep the weights if they are the best so far."""
        if self.evaluate is None:
            return
        self.optimization.model.eval()
        measured = self.evaluate()
        self._append("metrics.jsonl", row | measured)
        if self.config.keep_best and measured["test_loss"] < self.state.best_loss:
            self.state.best_step, self.state.best_loss = self.state.step, measured["test_loss"]
            self._save_best()
        self._since = time.perf_counter()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.processes.is_main:
            append_json_line(self.folder.path / name, row)

    def _best_path(self) -> Path:
        return self.folder.path / "best" / f"step-{self.state.best_step:08d}"

    def _save_best(self) -> None:
        """Publish the weights in ``best/step-N``. An older best may be a checkpoint's, and is left to the next one."""
        path = self._best_path()
        if self.processes.is_main:
            shutil.rmtree(path, ignore_errors=True)  # of the same step, from before a kill
            save_model(self.transformer, self.tokenizer, path)
            if not (self.folder.path / "checkpoints").exists():
                remove_all_but(path)
        self.processes.wait()

    def _checkpoint(self) -> None:
        """Publish ``checkpoints/step-N`` with all that resuming needs; then remove older ones, and former bests."""
        if self.processes.is_main:
            path = self.folder.path / "checkpoints" / f"step-{self.state.step:08d}"
            with publishing(path) as partial:
                self.transformer.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
                torch.save(self.optimization.optimizer.state_dict(), partial / "optimizer.pt")
                write_json(partial / "progress.json", asdict(self.state))
            remove_all_but(path)
            if self.config.keep_best:
                remove_all_but(self._best_path())
        self.processes.wait()

    def _load_weights(self, path: Path) -> None:
        weights = type(self.transformer).from_pretrained(path, dtype=torch.float32).state_dict()
        self.transformer.load_state_dict(weights)

    def _leave(self) -> None:
        if self.processes.is_main:
            print(f"stopped by SIGTERM after step {self.state.step}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


def remove_all_but(kept: Path) -> None:
    """Remove the folders of other steps beside ``kept``."""
    for path in kept.parent.glob("step-*"):
        if path != kept:
            shutil.rmtree(path)


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets in the block, in place of ending the process at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)

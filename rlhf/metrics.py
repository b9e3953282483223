"""Numbers with standard errors, and the files and tables they go to."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of n independent values and s / √n, s² with denominator n − 1 (NaN for n = 1). [n] → Estimate"""
    values = values.double()
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
    return Estimate(float(values.mean()), float(error))


def ratio_estimate(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Σ a / Σ b over n independent pairs, such as a sum over all tokens per token. [n], [n] → Estimate

    The standard error is the linearised one: √(Σ (a_i − m·b_i)² / (n − 1) / n) / mean b, m the ratio.
    """
    numerators, denominators = numerators.double(), denominators.double()
    ratio = numerators.sum() / denominators.sum()
    residuals = mean_estimate(numerators - ratio * denominators)
    return Estimate(float(ratio), float(residuals.stderr / denominators.mean()))


def per_prompt_estimate(numerators: Tensor, denominators: Tensor, prompts: Sequence[str]) -> Estimate:
    """Σ a / Σ b over responses, with prompts as the independent units: responses to one prompt are added up first.

    With a single prompt its responses are the units. [n], [n], n prompts → Estimate
    """
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    if len(index) == 1:
        return ratio_estimate(numerators, denominators)
    group = torch.tensor([index[prompt] for prompt in prompts], device=numerators.device)
    zeros = torch.zeros(len(index), dtype=torch.float64, device=numerators.device)
    return ratio_estimate(*(zeros.index_add(0, group, x.double()) for x in (numerators, denominators)))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − var(returns − values) / var(returns): 1 for a perfect value model, 0 for a constant one. [n], [n]

    0 where the returns do not vary, and nothing is to be explained.
    """
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, and make sure that it is on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON Lines file; an unfinished last line, as a kill leaves it, is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a JSON Lines file in one step."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has used: allocated on a CUDA device, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text: first column to the left, others to the right, a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

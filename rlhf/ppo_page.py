"""The page of PPO's settings and metrics, made from the code: ``python -m rlhf.ppo_page > docs/ppo.md``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from typing import Any

from rlhf import kl, kl_control, ppo, reference
from rlhf.config import CHOICES, PPOConfig
from rlhf.metric_table import METRICS, SAMPLES, SUMMARY, TIMINGS, Metric

INTRODUCTION = """\
# PPO: settings and metrics

Made from the code by `python -m rlhf.ppo_page`. A setting is a flag of `python -m rlhf.ppo` (`--kl_coef 0.1`; lists
take several values), a line of the YAML file given to `--config` (`kl_coef: 0.1`), and a field of
`rlhf.config.PPOConfig`; flags override the file. A run folder's `config.yaml` holds them all, and a resumed run keeps
them.

Without `--policy` the built-in task runs, with values of its own for some settings (`rlhf/reviews/recipe.py`: 60
updates, learning rates 5e-4 and 1e-3, 32 tokens, 1,024 evaluation episodes); it is made once and kept in
`$SOUPKIT_CACHE`, or `~/.cache/soupkit`. SIGTERM ends a run after the update at hand, saved; Ctrl-C at once, with the
last checkpoint to go on from.\
"""
METRICS_TEXT = """\
NAME stands for the short name of a reward or model: the last part of its path, and more of it where two would be alike.
± says that the standard error is logged too, as `<name>_stderr`. Units: "reward" is what the (weighted, standardised)
reward is measured in. What to look for are rules of thumb.\
"""
SUMMARY_TEXT = """\
Measures on `eval_episodes` responses to held-out prompts, the same prompts and random numbers before and after
training. Each is an object of `before`, `before_stderr`, `after`, `after_stderr`; standard errors take prompts, not
responses, as the independent units. Then the totals of the run.\
"""
KINDS = {"str": "text", "int": "whole number", "float": "number", "bool": "flag"}


def ppo_page() -> str:
    """The page in Markdown."""
    parts = [
        INTRODUCTION,
        "## Settings",
        *_settings(),
        "## Kinds of reference",
        markdown(_doc(reference), ("kind", "what the policy is kept close to")),
        "## KL estimators",
        markdown(_doc(kl), ("estimator", "per token", "as an estimate")),
        "## Control of β",
        *(f"**{name}.** {markdown(_doc(controller))}" for name, controller in CONTROLLERS.items()),
        "## Metrics",
        METRICS_TEXT,
        "### metrics.jsonl, an object an update\n\nOf the batch that was sampled; the same names in TensorBoard.",
        metric_rows(METRICS),
        "### timings.jsonl, an object an update",
        metric_rows(TIMINGS),
        "### samples.jsonl, an object a sampled response",
        metric_rows(SAMPLES),
        f"### summary.json\n\n{SUMMARY_TEXT}",
        metric_rows(SUMMARY),
        "## Departures from the original",
        _departures(),
    ]
    return "\n\n".join(parts) + "\n"


CONTROLLERS = {
    "fixed": kl_control.FixedKL,
    "adaptive": kl_control.AdaptiveKL,
    "target": kl_control.TargetKL,
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def metric_rows(metrics: Mapping[str, Metric]) -> str:
    """The table of a file's names."""
    rows = (
        (f"`{name}`" + (" ±" if metric.stderr else ""), metric.unit, metric.meaning, metric.look_for)
        for name, metric in metrics.items()
    )
    return table(("name", "unit", "what it is", "what to look for"), rows)


def markdown(docstring: str, header: Sequence[str] = ()) -> str:
    """A docstring with its simple tables (rules of ``=``) and ``literals`` in Markdown's form.

    ``header`` is for tables that have none.
    """
    paragraphs = docstring.replace("``", "`").split("\n\n")
    return "\n\n".join(_simple_table(p, header) if p.startswith("==") else p for p in paragraphs)


def _simple_table(text: str, header: Sequence[str]) -> str:
    """A table whose columns begin where those of its first rule do; a row without a first cell continues the last."""
    rule, *lines = text.splitlines()
    starts = [match.start() for match in re.finditer("=+", rule)]
    rows: list[list[str]] = []
    rules = 0
    for line in lines:
        if line == rule:
            rules += 1
            continue
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return table(rows[0], rows[1:]) if rules > 1 else table(header, rows)


def _settings() -> list[str]:
    """A heading and a table for every section of the configuration."""
    sections: list[tuple[str, list[Field[Any]]]] = []
    for field in fields(PPOConfig):
        if field.name in PPOConfig.SECTIONS:
            sections.append((PPOConfig.SECTIONS[field.name], []))
        sections[-1][1].append(field)
    parts = []
    for title, members in sections:
        rows = ((f"`{f.name}`", _values(f), _default(f), f.metadata["help"]) for f in members)
        parts += [f"### {title[0].upper()}{title[1:]}", table(("setting", "value", "default", "what it does"), rows)]
    return parts


def _values(field: Field[Any]) -> str:
    if field.name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[field.name])
    # Not field.type, which making a command line's parser changes.
    kind = PPOConfig.__annotations__[field.name].removesuffix(" | None")
    if kind.startswith("list["):
        return f"{KINDS[kind[5:-1]]}, one or more"
    return KINDS[kind]


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "none" if value in (None, []) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _departures() -> str:
    """The list in the docstring of ``rlhf.ppo`` and the sentence before it."""
    paragraphs = _doc(ppo).split("\n\n")
    start = next(i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("Departures"))
    return markdown("\n\n".join(paragraphs[start : start + 2]))


def _doc(documented: Any) -> str:
    return cleandoc(documented.__doc__)


if __name__ == "__main__":
    print(ppo_page(), end="")

"""One page about one or several PPO runs, from their folders alone: no model is loaded.

A page is a list of sections, each of texts, tables and figures, that is written as HTML in one file, or as Markdown
with a folder of figures. Unfinished runs have no results on held-out prompts, but all the rest.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from analysis import plots
from analysis.exploration import LARGEST_N, distinct_n
from analysis.inputs import named_texts, require_run
from analysis.run_frontier import reward_kl_frontier
from analysis.tables import Table, of_reached, of_reached_differences, or_reason, with_error
from rlhf.checkpointing import publishing, require_new
from rlhf.command_line import read_settings
from rlhf.metrics import read_json_lines, replace_text
from soupkit.tables import number, printable, size

MAIN_SETTINGS = (
    "policy", "reference", "reference_kind", "reward", "gold_reward", "kl_coef", "kl_estimator", "kl_in", "updates",
    "batch_size", "learning_rate", "max_new_tokens", "temperature", "seed",
)  # fmt: skip
# What runs of one group may differ in: they are points of one frontier, or say nothing about what was learned.
POINTS_OF_A_GROUP = ("seed", "kl_coef", "output", "resume", "save_every", "keep", "num_samples", "tensorboard")
SHOWN_SAMPLES, LONGEST_SAMPLE = 3, 800


@dataclass(frozen=True)
class Run:
    """What a run folder says: settings, rows of ``metrics.jsonl`` and ``samples.jsonl``, summary (None: unfinished)."""

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def divergences(self) -> list[str]:
        """Names of the models that KL was measured to at every update, from ``metrics.jsonl``."""
        return [name[3:] for name in self.rows[0] if name.startswith("kl/") and not name.endswith("_stderr")]

    @property
    def held_out_divergences(self) -> list[str]:
        """Names of the models that KL was measured to before and after training, from ``summary.json``: more of them,
        since each of the reference's is among these, and the policy's start. None for an unfinished run.
        """
        return [] if self.summary is None else list(self.summary["kl"])


@dataclass(frozen=True)
class Figure:
    """A figure that is drawn when the page is written; the caption says what it shows."""

    name: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    blocks: Sequence[str | Table | Figure]


def read_runs(texts: Sequence[str]) -> dict[str, Run]:
    """{name: run} of ``[NAME=]RUN`` texts.

    Raises FileNotFoundError for what is no run folder, ValueError for a run without updates or two of one name.
    """
    runs = {}
    for name, text in named_texts(texts, "run").items():
        folder = Path(require_run(text))
        rows = read_json_lines(folder / "metrics.jsonl")
        if not rows:
            raise ValueError(f"{folder}: has no updates in its metrics.jsonl yet; wait for the first")
        samples, summary = folder / "samples.jsonl", folder / "summary.json"
        runs[name] = Run(
            folder,
            read_settings(folder / "config.yaml"),
            rows,
            read_json_lines(samples) if samples.is_file() else [],
            json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
        )
    return runs


def write_report(runs: Mapping[str, Run], output: str | os.PathLike[str], *, kl_to: str | None = None) -> Path:
    """Write the page about some runs, and return where it is.

    ``output`` is a new file: ``.html``, with the figures in it, or ``.md``, with the figures in a folder beside it
    (``report_figures`` for ``report.md``). ``kl_to`` is the model of the KL axes; by default the reference where all
    runs have the same, and else the first model that all measured the KL to. Where it was measured on held-out prompts
    alone, it is the axis of the reached frontier, and the learning curves keep theirs and say so.

    Raises ValueError for another suffix, and for a ``kl_to`` that a run has not measured.

        write_report(read_runs(["soup=runs/soup", "plain=runs/plain"]), "report.html")
    """
    output = Path(output)
    if output.suffix not in (".html", ".md"):
        raise ValueError(f"{output}: must end in .html or .md")
    require_new(output)
    sections = page(runs, kl_to=kl_to)
    title = "PPO run" if len(runs) == 1 else f"{len(runs)} PPO runs"
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".html":
        replace_text(output, as_html(title, sections))
        return output
    with publishing(output.with_name(f"{output.stem}_figures")) as folder:
        text = as_markdown(title, sections, folder, output.with_name(f"{output.stem}_figures").name)
    replace_text(output, text)
    return output


# ── The page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(runs: Mapping[str, Run], *, kl_to: str | None = None) -> list[Section]:
    """The sections of the page about some runs."""
    axis, reached_axis = kl_axes(runs, kl_to)
    caption = "Training batches, mean ± one standard error; last, reward against KL, the end ringed."
    if kl_to not in (None, axis):
        caption += (
            f" The KL is that to {axis}, since not all runs measured the KL to {kl_to} at every update; train with "
            "track_kl to see that here too."
        )
    rows = {name: run.rows for name, run in runs.items()}
    divergences = list(dict.fromkeys(f"kl/{name}" for run in runs.values() for name in run.divergences))
    sections = [
        Section("Runs", [_overview(runs), _settings(runs)]),
        Section("Before and after", _before_and_after(runs)),
        Section(
            "Learning curves",
            [
                Figure(
                    "learning_curves",
                    caption,
                    partial(plots.plot_dashboard, rows, x=f"kl/{axis}"),
                )
            ],
        ),
        Section(
            "KL",
            [
                Figure(
                    "kl",
                    "Exact KL(policy ‖ model) on training batches, mean ± one standard error.",
                    partial(plots.plot_grid, rows, divergences),
                )
            ],
        ),
        Section("Exploration", _exploration(runs)),
        Section("Samples", _samples(runs)),
    ]
    if len(runs) > 1:
        sections.append(Section("Reached frontier", _reached(runs, reached_axis)))
    return sections


def kl_axes(runs: Mapping[str, Run], kl_to: str | None = None) -> tuple[str, str]:
    """The models to whose KL rewards are drawn against: over updates, and in the frontier that finished runs reached.

    ``kl_to``, where all measured it; else the reference where all runs share it, or the first other model that all
    measured the KL to. A ``kl_to`` that was measured on held-out prompts alone is the second axis and not the first.

    Raises ValueError for a ``kl_to`` that is neither, and for runs that have no model in common.
    """
    finished = [run for run in runs.values() if run.summary is not None]
    over_updates = _in_common([run.divergences for run in runs.values()])
    held_out = _in_common([run.held_out_divergences for run in finished]) if len(finished) > 1 else []
    if kl_to is not None and kl_to not in [*over_updates, *held_out]:
        measured = kl_to in _in_common([run.held_out_divergences for run in finished])
        why = ", which curves need; train with track_kl to have it" if measured else ""
        also = f" or, for the frontier alone, {held_out}" if held_out else ""
        raise ValueError(
            f"kl_to={kl_to}: not measured by every run at every update{why}; choose one of {over_updates}{also}"
        )
    if not over_updates:
        raise ValueError("runs: measured the KL to no model in common; report them one by one")
    axis = kl_to if kl_to is not None and kl_to in over_updates else _default_axis(runs, over_updates)
    if kl_to is not None and kl_to in held_out:
        return axis, kl_to
    # Rewards are not compared by the KLs to references that differ where finished runs share another model.
    return axis, _default_axis(runs, held_out) if held_out and axis == "reference" and kl_to is None else axis


def _in_common(names: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in (names[0] if names else []) if all(name in others for others in names)]


def _default_axis(runs: Mapping[str, Run], shared: Sequence[str]) -> str:
    references = [
        [run.settings.get(name) for name in ("reference", "reference_weights", "reference_kind")]
        for run in runs.values()
    ]
    same = all(reference == references[0] for reference in references)
    return shared[0] if same else next((name for name in shared if name != "reference"), shared[0])


def _overview(runs: Mapping[str, Run]) -> Table:
    rows = []
    for name, run in runs.items():
        done, planned = run.rows[-1]["update"], run.settings["updates"]
        state = "finished" if run.summary else f"unfinished, {done} of {planned} updates"
        cost = ["-", "-"]
        if run.summary:
            cost = [f"{run.summary['seconds']:.0f}", size(run.summary["peak_memory_bytes"])]
        rows.append([name, str(run.folder), state, str(done), str(run.rows[-1]["episodes"]), *cost])
    return Table(
        "Folders", ["run", "folder", "state", "updates", "episodes", "seconds", "peak memory"], rows, num_left=3
    )


def differing_settings(runs: Mapping[str, Run]) -> list[str]:
    """Names of the settings that are not the same in all runs, but for where they are written."""
    names = dict.fromkeys(name for run in runs.values() for name in run.settings)
    values = [run.settings for run in runs.values()]
    return [
        name
        for name in names
        if name not in ("output", "resume") and any(v.get(name) != values[0].get(name) for v in values)
    ]


def _settings(runs: Mapping[str, Run]) -> Table:
    differing = differing_settings(runs)
    names = [*differing, *(name for name in MAIN_SETTINGS if name not in differing)]
    rows = [
        [f"{name} *" if name in differing else name, *(_value(run.settings.get(name)) for run in runs.values())]
        for name in names
    ]
    title = "Settings" if len(runs) == 1 else "Settings; those marked * differ, all that are not listed are the same"
    return Table(title, ["setting", *runs], rows, num_left=1 + len(runs))


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


def _before_and_after(runs: Mapping[str, Run]) -> list[str | Table]:
    blocks: list[str | Table] = []
    if missing := [name for name, run in runs.items() if run.summary is None]:
        blocks.append(f"Unfinished, hence not measured on held-out prompts: {', '.join(missing)}.")
    measures: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in runs.items():
        for measure, values in _measures(run).items():
            measures.setdefault(measure, {})[name] = values
    rows = []
    for measure, by_run in measures.items():
        for name, m in by_run.items():
            change, error = m["after"] - m["before"], (m["before_stderr"] ** 2 + m["after_stderr"] ** 2) ** 0.5
            cells = [with_error(m[when], m[f"{when}_stderr"]) for when in ("before", "after")]
            rows.append([plots.label_of(measure), name, *cells, with_error(change, error)])
    if rows:
        title = "On held-out prompts, mean ± one standard error over prompts"
        blocks.append(Table(title, ["measure", "run", "before", "after", "change"], rows, num_left=2))
    return blocks


def _measures(run: Run) -> dict[str, dict[str, float]]:
    """{measure: its numbers before and after} of a finished run."""
    if run.summary is None:
        return {}
    names = ("proxy_reward", "gold_reward", "entropy", "response_length")
    return {name: run.summary[name] for name in names if run.summary[name]} | {
        f"kl/{name}": values for name, values in run.summary["kl"].items()
    }


def _exploration(runs: Mapping[str, Run]) -> list[str | Table]:
    """Diversity of logged responses, of the first and the last quarter of the updates, equally many of all runs."""
    parts = {}
    for name, run in runs.items():
        training = [row for row in run.samples if row["prompts"] == "training"]
        updates = sorted({row["update"] for row in training})
        quarter = max(1, len(updates) // 4)
        for when, chosen in (("first", updates[:quarter]), ("last", updates[-quarter:])):
            parts[name, when] = [row["response"].split() for row in training if row["update"] in chosen]
    num = min(map(len, parts.values()))
    if num < 2:
        return ["Too few responses were logged to tell how much they differ; raise num_samples."]
    rows = []
    for (name, when), responses in parts.items():
        words = responses[:num]
        shares = [distinct_n(words, n) for n in range(1, LARGEST_N + 1)]
        unique = len({tuple(response) for response in words}) / num
        rows.append([name, f"{when} quarter", str(num), *(number(share, 3) for share in [*shares, unique])])
    header = ["run", "updates", "responses", *(f"distinct-{n}" for n in range(1, LARGEST_N + 1)), "unique responses"]
    note = (
        "Entropy and response length are among the learning curves. The table is of the responses in samples.jsonl, to "
        "different prompts, by words. These measures fall with the number of responses, which is why all rows have "
        "equally many; for responses to the same prompts, with errors, use analysis.explore."
    )
    return [note, Table("Diversity of logged responses", header, rows, num_left=2)]


def _samples(runs: Mapping[str, Run]) -> list[str | Table]:
    """The same held-out prompts before and after training; the last training responses of an unfinished run."""
    blocks: list[str | Table] = []
    for name, run in runs.items():
        last = max((row["update"] for row in run.samples), default=0)
        kind = "held-out" if run.summary else "training"
        before = [row for row in run.samples if row["update"] == 0][:SHOWN_SAMPLES]
        after = [row for row in run.samples if row["update"] == last and row["prompts"] == kind][:SHOWN_SAMPLES]
        prompts = dict.fromkeys(row["prompt"] for row in [*before, *after])
        ordered = [row for prompt in prompts for row in [*before, *after] if row["prompt"] == prompt]
        scores = [key for key in (ordered[0] if ordered else {}) if "reward" in key]
        rows = [
            [_text(row["prompt"]), str(row["update"]), _text(row["response"]), *(number(row[s], 3) for s in scores)]
            for row in ordered
        ]
        if rows:
            header = ["prompt", "after update", "response", *scores]
            blocks.append(Table(f"Responses of {name}", header, rows, num_left=3))
    return blocks or ["No responses were logged."]


def _text(text: str) -> str:
    """One line that fits a cell."""
    line = printable(text)
    return line if len(line) <= LONGEST_SAMPLE else f"{line[:LONGEST_SAMPLE]} …"


def _reached(runs: Mapping[str, Run], axis: str) -> list[str | Table | Figure]:
    finished = {name: run for name, run in runs.items() if run.summary}
    if len(finished) < 2:
        return ["Fewer than two runs are finished."]
    y = (
        "gold_reward"
        if all(run.summary and run.summary["gold_reward"] for run in finished.values())
        else "proxy_reward"
    )
    groups = group_runs(finished)
    try:
        result = reward_kl_frontier(
            {label: [run.folder for run in members] for label, members in groups.items()}, x=f"kl/{axis}", y=y
        )
        blocks: list[str | Table | Figure] = [
            "Runs that differ in seed and kl_coef alone are one group; means over its seeds.",
            Figure(
                "reached",
                "What groups of runs reached on held-out prompts, and where they started; with three seeds and more, "
                "95 % confidence regions of the means. Hollow points are beaten by another of their group.",
                partial(plots.plot_reached, result),
            ),
            of_reached(result),
        ]
    except ValueError as error:
        return [f"The runs make no frontier: {error}."]
    if len(groups) > 1:
        blocks.append(or_reason(partial(of_reached_differences, result)))
    return blocks


def group_runs(runs: Mapping[str, Run]) -> dict[str, list[Run]]:
    """Runs that differ in seed and coefficient alone, by a label of what tells the groups from each other."""
    differing = [name for name in differing_settings(runs) if name not in POINTS_OF_A_GROUP]
    groups: dict[str, list[Run]] = {}
    for run in runs.values():
        parts = [f"{name}={_short(run.settings.get(name))}" for name in differing]
        groups.setdefault(", ".join(parts) or "all runs", []).append(run)
    return groups


def _short(value: Any) -> str:
    """A setting's value with folders by their last part."""
    return "+".join(Path(str(v)).name for v in value) if isinstance(value, list) else str(value)


# ── As HTML and as Markdown ───────────────────────────────────────────────────────────────────────────────────────────

STYLE = """\
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; --text: #1a1a1a; --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #262626; --text: #e6e6e6; --page: #181818; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1100px;
       margin: 2em auto; padding: 0 1em; }
nav a { display: inline-block; margin-right: 1em; }
.scroll, figure { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-size: 13px; }
caption { text-align: left; text-wrap: balance; font-weight: 600; padding: 0.4em 0; }
th, td { padding: 0.3em 0.7em; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
         font-variant-numeric: tabular-nums; white-space: nowrap; }
th { background: var(--soft); }
.left { text-align: left; }
td.left { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1em 0; } figcaption { font-size: 13px; position: sticky; left: 0; }
img { max-width: max(100%, 45em); background: white; border-radius: 6px; }"""
NARROWEST = 20  # characters that a column of text has room for on the narrowest screen, where it is as long


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The page as one HTML file: no scripts, nothing from elsewhere; all texts are escaped."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections)
    body = "\n".join(
        f'<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>\n'
        + "\n".join(_html_block(block) for block in section.blocks)
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n"
        "</body>\n</html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _html_block(block: str | Table | Figure) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, Table):
        return _html_table(block)
    with TemporaryDirectory() as folder:
        (file,) = plots.save(block.draw(), Path(folder) / block.name, formats=["svg"], close=True)
        picture = base64.b64encode(file.read_bytes()).decode()
    caption = html.escape(block.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{picture}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _html_table(table: Table) -> str:
    lengths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]

    def line(cells: Sequence[str], tag: str, styles: Sequence[str]) -> str:
        tags = [f'{tag} class="left"{style}' for style in styles[: table.num_left]] + [tag] * len(cells)
        return (
            "<tr>"
            + "".join(f"<{opening}>{html.escape(cell)}</{tag}>" for opening, cell in zip(tags, cells, strict=False))
            + "</tr>"
        )

    head = line(table.header, "th", [f' style="min-width: {min(length, NARROWEST)}ch"' for length in lengths])
    rows = "\n".join(line(row, "td", [""] * len(row)) for row in table.rows)
    return (
        f'<div class="scroll"><table>\n<caption>{html.escape(table.title)}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def as_markdown(title: str, sections: Sequence[Section], folder: Path, link: str) -> str:
    """The page as Markdown; its figures are written to ``folder``, which the page finds under ``link``."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Figure):
                plots.save(block.draw(), folder / block.name, close=True)
                parts.append(f"![{block.caption}]({link}/{block.name}.png)\n\n{block.caption}")
            else:
                parts.append(block.markdown() if isinstance(block, Table) else html.escape(block, quote=False))
    return "\n\n".join(parts) + "\n"

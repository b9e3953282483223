"""The page of a study: its parts (:mod:`analysis.study.sections`) as Markdown, between two marks in a page that says
the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from analysis import plots
from analysis.report import Figure, Section
from analysis.study.config import Study
from analysis.study.effects import Tables
from analysis.study.sections import sections_of
from analysis.tables import Table
from rlhf.metrics import replace_text

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"


def write_page(study: Study, tables: Tables) -> Path:
    """Draw the figures into the folder of results and put the tables into the study's page, between its marks.

    Without a page, ``README.md`` in the folder of results holds them alone. Returns where they are. Raises ValueError
    for a page without the marks.
    """
    folder, page = study.results / "figures", study.page or study.results / "README.md"
    text = read_page(study)
    link, found = Path(os.path.relpath(folder, page.parent)).as_posix(), sections_of(study, tables)
    text = replace_between(text, BEGIN, END, "\n\n".join(_markdown(found, link)), name=str(page))
    for section in found:
        for block in section.blocks:
            if isinstance(block, Figure):
                plots.save(block.draw(), folder / block.name, close=True)
    replace_text(page, text)
    return page


def read_page(study: Study) -> str:
    """The page as it is, which the results go into. Raises ValueError or OSError for one that has no place for them."""
    if study.page is None:
        return f"# Results\n\n{BEGIN}\n{END}\n"
    if not study.page.is_file():
        raise FileNotFoundError(f"page: {study.page}: no such file; make it, with the lines {BEGIN} and {END}")
    text = study.page.read_text(encoding="utf-8")
    replace_between(text, BEGIN, END, "", name=str(study.page))
    return text


def replace_between(text: str, begin: str, end: str, new: str, *, name: str = "the page") -> str:
    """The text with what stands between two marks replaced. Raises ValueError where it lacks them."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{name}: has no place for the results; add the lines {begin} and {end}")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def sections(study: Study, tables: Tables, *, figures: str = "figures") -> list[str]:
    """The parts of the page, each a heading with texts, tables and links to the figures in a folder, as Markdown."""
    return _markdown(sections_of(study, tables), figures)


def _markdown(found: Sequence[Section], figures: str) -> list[str]:
    parts = []
    for section in found:
        blocks = [f"### {section.title}"]
        for block in section.blocks:
            if isinstance(block, Table):
                blocks.append(block.markdown().partition("\n\n")[2])  # the section has the heading
            elif isinstance(block, Figure):
                alt = block.caption.partition(". ")[0].replace("*", "")
                blocks.append(f"![{alt}]({figures}/{block.name}.png)\n\n{block.caption}")
            else:
                blocks.append(block)
        parts.append("\n\n".join(blocks))
    return parts

"""The command line: ``python -m analysis.study --config STUDY.yaml``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from analysis.inputs import Parser
from analysis.study.config import Case, Study
from analysis.study.grid import Results, Workers, run_study
from analysis.study.page import read_page, write_page
from rlhf.command_line import run_command

DESCRIPTION = """\
Run a study, as far as it is not done, and write its tables and figures.

  everything that is not done yet; goes on where it was stopped, also by kill -9
    python -m analysis.study --config study/reviews.yaml
  every table and figure again from the stored results: no model is loaded
    python -m analysis.study --config study/reviews.yaml --report
  one arm anew; --draw, --regime and --kl_coef choose as well
    python -m analysis.study --config study/reviews.yaml --arm "soup 2" --again

The configuration says what a draw is made of, the arms and the measures; study/reviews.yaml is an example with every
section. Results are CSV files, a row a run, and figures in the folder `results`; draws and runs are in `work`, which
may be deleted. Exit codes: 0 done; 1 some runs ended by themselves (they are named); 2 bad input.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study. Raises ValueError or OSError for bad input, and KeyboardInterrupt that says how to go on."""
    arguments = _parser().parse_args(argv)
    study = Study.read(arguments.config)
    cases = _chosen(study, arguments)
    read_page(study)
    failed: list[str] = []
    if not arguments.report:
        workers = Workers(arguments.workers or max(1, (os.cpu_count() or 1) // arguments.threads), arguments.threads)
        try:
            failed = run_study(study, cases, workers, again=arguments.again)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on") from None
    tables = Results.read(study).tables()
    if not (tables.runs or tables.models):
        raise ValueError(f"{study.results}: nothing of this study is stored there; run it without --report")
    print(write_page(study, tables))
    if failed:
        print("\n".join([f"{len(failed)} runs ended by themselves:", *failed]), file=sys.stderr)
        sys.exit(1)


def _chosen(study: Study, arguments: argparse.Namespace) -> list[Case]:
    """The cases that the flags choose. Raises ValueError for a flag that chooses what the study has not."""
    if arguments.report:
        for name in ("again", "regime", "draw", "arm", "kl_coef"):
            if getattr(arguments, name):
                raise ValueError(
                    f"--report with --{name}: it writes the page of all that is stored; leave one of them out"
                )
    known: dict[str, list[Any]] = {
        "regime": list(study.regimes),
        "arm": list(study.arms),
        "draw": list(study.draws),
        "kl_coef": list(study.kl_coefs),
    }
    for name, values in known.items():
        for value in getattr(arguments, name) or []:
            if value not in values:
                raise ValueError(f"--{name} {value}: not in {arguments.config}, which has {values}")
    return [
        case
        for case in study.cases()
        if all(getattr(case, name) in (getattr(arguments, name) or [*known[name], None]) for name in known)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m analysis.study",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the study, as YAML")
    parser.add_argument("--report", action="store_true", help="only write tables and figures, from stored results")
    parser.add_argument("--regime", nargs="+", metavar="NAME", help="only these regimes")
    parser.add_argument("--draw", nargs="+", type=int, metavar="N", help="only these draws")
    parser.add_argument("--arm", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--kl_coef", nargs="+", type=float, metavar="BETA", help="only these coefficients")
    parser.add_argument("--again", action="store_true", help="do the chosen runs anew, though they are done")
    parser.add_argument("--workers", type=_positive, metavar="N", help="runs at once (default: the cores)")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="of each run (default: 1)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_command(main))

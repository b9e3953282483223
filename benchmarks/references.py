"""What PPO reaches on the built-in task with each kind of reference, at three KL coefficients, over seeds.

    python benchmarks/references.py run DIR                             # everything; runs in DIR that are done stay
    python benchmarks/references.py table DIR --into docs/references.md

Every run is a `python -m rlhf.ppo` of its own on one thread. `run` makes the task in DIR/task, keeps the run folders in
DIR/runs and gathers their summaries in benchmarks/references.json, from which `table` works without them.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import (
    Record,
    add_command,
    machine,
    machine_text,
    markdown,
    measured,
    read_results,
    replace_between,
    run_command,
    save,
    say,
    write_json,
)
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().with_suffix(".json")
BEGIN, END = "<!-- references: begin -->", "<!-- references: end -->"

# Weak to strong: at the weakest the policy goes some fifteen nats from where it started, at the strongest one or two.
KL_COEFS = (0.02, 0.1, 0.4)
EVAL_EPISODES = 1024
SOUP = "soup.json"  # the recipe of the soup, by which the runs name their KL to it


@dataclass(frozen=True)
class Kind:
    """A kind of reference: what it is called in tables, its flags for rlhf.ppo, and how it is drawn."""

    label: str
    kind: str
    models: tuple[str, ...]
    color: str  # Okabe–Ito, told apart by colour-blind people
    marker: str


KINDS = {
    "single": Kind("single SFT", "soup", ("sft1",), "#0072B2", "o"),
    "soup": Kind("soup", "soup", ("sft1", "sft2"), "#D55E00", "s"),
    "weighted": Kind("weighted KLs", "weighted_kl", ("sft1", "sft2"), "#009E73", "^"),
    "moving": Kind("moving average", "moving_average", ("sft1",), "#CC79A7", "D"),
    "none": Kind("none", "none", (), "#595959", "X"),
}
BASELINE = "single"
DECAY = 0.95  # a step an update: after 50 updates the start weighs 8 %, and the average trails the policy by 20


@dataclass(frozen=True)
class Measure:
    """A number of a summary: its key here, its column's title, and the decimals shown."""

    key: str
    title: str
    decimals: int
    of: Callable[[Record], Mapping[str, float] | None]


# Rewards in their own units, KL in nats per response, entropy in nats per token, length in tokens.
MEASURES = (
    Measure("gold", "gold reward", 3, lambda summary: summary["gold_reward"]),
    Measure("proxy", "proxy reward", 3, lambda summary: summary["proxy_reward"]),
    Measure("kl_sft1", "KL to sft1", 2, lambda summary: summary["kl"]["sft1"]),
    Measure("kl_soup", "KL to soup", 2, lambda summary: summary["kl"][SOUP]),
    Measure("kl_reference", "KL to reference", 2, lambda summary: summary["kl"].get("reference")),
    Measure("entropy", "entropy", 3, lambda summary: summary["entropy"]),
    Measure("length", "length", 2, lambda summary: summary["response_length"]),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what cannot be done, told in one line on stderr."""
    return run_command(_parser(), arguments)


# --- the runs ---


@dataclass(frozen=True)
class Case:
    """One run: a reference, β (0 without a reference), and the seed of PPO."""

    reference: str
    kl_coef: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.reference}-{self.kl_coef:g}-seed{self.seed}"


def cases(seed: int) -> list[Case]:
    """The runs of a seed: every reference at every coefficient, and one without a reference."""
    settings = [(name, kl_coef) for name in KINDS if name != "none" for kl_coef in KL_COEFS]
    return [Case(*setting, seed) for setting in [*settings, ("none", 0.0)]]


def flags(case: Case, folder: Path, updates: int) -> list[str]:
    """The run as flags of ``python -m rlhf.ppo``; what is not said here is as the command has it."""
    task, kind = folder / "task", KINDS[case.reference]
    settings: dict[str, object] = {
        "policy": task / "sft1",
        "reward": task / "reward",
        "gold_reward": "rlhf.reviews:gold_reward",
        "prompts": task / "prompts.jsonl",
        "test_prompts": task / "test_prompts.jsonl",
        "track_kl": folder / SOUP,
        "reference_kind": kind.kind,
        "reference_decay": DECAY,  # of a moving average; the others have no use for it
        "kl_coef": case.kl_coef,
        "updates": updates,
        "max_new_tokens": 32,
        "learning_rate": 5e-4,
        "value_learning_rate": 1e-3,
        "eval_episodes": EVAL_EPISODES,
        "save_every": 0,
        "seed": case.seed,
        "output": folder / "runs" / case.name,
    }
    models = [str(task / model) for model in kind.models]
    return [*(f"--{name}={value}" for name, value in settings.items()), *(["--reference", *models] if models else [])]


def run(options: argparse.Namespace) -> None:
    """Make the task and do all runs that are not done, then gather the results and print the tables."""
    folder = options.folder.resolve()
    wanted = [case for seed in range(options.seeds) for case in cases(seed)]
    missing = [case for case in wanted if not is_done(folder / "runs" / case.name, options.updates)]
    make_task(folder)
    with (
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="runs", unit="run", smoothing=0) as bar,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        futures = [pool.submit(train, case, folder, options) for case in missing]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those under way end before the pool does
            raise
    save(options.results, gather(folder))
    print("\n".join(tables(read_results(options.results))))


def is_done(run: Path, updates: int | None = None) -> bool:
    """Whether the run is there, whole. Raises ValueError for one of other than ``updates``, where they are given."""
    if not (run / "process.json").is_file():
        return False
    found = read_results(run / "summary.json")["updates"]
    if updates is not None and found != updates:
        raise ValueError(f"{run}: has {found} updates, not {updates}; say --updates {found}, or take another DIR")
    return True


def make_task(folder: Path) -> None:
    """Make the built-in task and the recipe of its soup in the folder, once."""
    task = folder / "task"
    if not task.is_dir():
        say(f"making the task in {task}: a minute or two, only this once")
        folder.mkdir(parents=True, exist_ok=True)
        record, _ = measured([sys.executable, "-m", "rlhf.reviews", "--output", task], sampled=False)
        write_json(folder / "task_process.json", record)
    write_json(folder / SOUP, {"method": "linear", "models": [str(task / f"sft{number}") for number in (1, 2)]})


def train(case: Case, folder: Path, options: argparse.Namespace) -> None:
    """Do one run from its start, on one thread; what its process took, written last, marks it as done."""
    output = folder / "runs" / case.name
    shutil.rmtree(output, ignore_errors=True)  # what an interrupted one left
    command = [sys.executable, "-m", "rlhf.ppo", *flags(case, folder, options.updates)]
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    record, _ = measured(command, environment=environment, sampled=False)
    write_json(output / "process.json", {**record, "workers": options.workers})


def gather(folder: Path) -> Record:
    """What the tables are made of: the machine, the task, and the runs of all seeds that are done.

    Raises ValueError where not even the first seed's are.
    """
    process, task = folder / "task_process.json", read_results(folder / "task" / "task.json")
    runs: list[Record] = []
    for seed in count():
        if not all(is_done(folder / "runs" / case.name) for case in cases(seed)):
            break
        runs += [row_of(case, folder / "runs" / case.name) for case in cases(seed)]
    if not runs:
        raise ValueError(f"{folder}: not all runs of seed 0 are done; `python benchmarks/references.py run` does them")
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "task": {"version": task["version"], "seed": task["seed"]},
        "task_seconds": read_results(process)["seconds"] if process.is_file() else None,
        "eval_episodes": EVAL_EPISODES,
        "runs": runs,
    }


def row_of(case: Case, run: Path) -> Record:
    """A run as the results keep it: what it was, what it took, and its measures."""
    summary, process = read_results(run / "summary.json"), read_results(run / "process.json")
    took = {key: process[key] for key in ("seconds", "user_seconds", "workers")}
    length = {key: summary[key] for key in ("updates", "episodes")}
    return {**vars(case), **length, **took, **measures_of(summary)}


def measures_of(summary: Record) -> Record:
    """The measures of one run on held-out prompts, before and after training; None where there is none."""
    values = {measure.key: measure.of(summary) for measure in MEASURES}
    return {
        when: {key: None if value is None else value[when] for key, value in values.items()}
        for when in ("before", "after")
    }


# --- statistics over seeds ---


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds with its standard error, s/√n where s² = Σ (x − mean)² / (n − 1); NaN for one seed."""

    mean: float
    stderr: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Mean:
        stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), stderr)

    def cell(self, decimals: int, sign: str = "") -> str:
        """As tables show it."""
        text = f"{self.mean:{sign}z.{decimals}f}"
        return text if math.isnan(self.stderr) else f"{text} ± {self.stderr:.{decimals}f}"


def settings_in(results: Record) -> Iterator[tuple[str, float]]:
    """The references with their coefficients, in the order of the tables, as far as they were run."""
    there = {(row["reference"], row["kl_coef"]) for row in results["runs"]}
    for name in KINDS:
        yield from sorted(setting for setting in there if setting[0] == name)


def by_seed(results: Record, reference: str, kl_coef: float, key: str, when: str = "after") -> dict[int, float]:
    """A measure of the runs with one reference and coefficient, {seed: value}; empty where it has no meaning."""
    rows = [row for row in results["runs"] if (row["reference"], row["kl_coef"]) == (reference, kl_coef)]
    return {row["seed"]: row[when][key] for row in rows if row[when][key] is not None}


def difference(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Mean:
    """The mean over seeds of the difference between two runs of the same seed, with its standard error."""
    return Mean.over([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


# --- tables and figure ---


def table(options: argparse.Namespace) -> None:
    """Print the results as Markdown, or put them where a page has its tables, with the figure beside the page."""
    if options.folder:
        save(options.results, gather(options.folder.resolve()))
    results = read_results(options.results)
    lines = tables(results)
    if not options.into:
        print("\n".join(lines))
        return
    picture = options.into.with_suffix(".png")
    lines += ["", f"![Gold reward against KL to sft1 for every reference and coefficient]({picture.name})"]
    replace_between(options.into, BEGIN, END, "\n".join(lines))
    figure(results).savefig(picture, dpi=150)


def tables(results: Record) -> list[str]:
    """What was run, the means of every reference, and their differences from the single SFT, as lines of Markdown."""
    return [
        _setting_line(results),
        "",
        "### After training",
        "",
        *_mean_table(results),
        "",
        f"### Difference from the {KINDS[BASELINE].label} at the same β, paired by seed",
        "",
        *_difference_table(results),
    ]


def _setting_line(results: Record) -> str:
    runs = results["runs"]
    seconds = [row["seconds"] for row in runs]
    workers = max(row["workers"] for row in runs)
    seeds = len({row["seed"] for row in runs})
    versions = ", ".join(f"{name} {text}" for name, text in results["versions"].items())
    task = "" if results["task_seconds"] is None else f", and {results['task_seconds']:.0f} s for the task"
    return (
        f"{machine_text(results['machine'])}; {versions}. {len(runs)} runs ({seeds} seeds) of "
        f"{runs[0]['updates']} updates, {runs[0]['episodes']:,} episodes each; measured on "
        f"{results['eval_episodes']:,} responses to held-out prompts. A run took {statistics.median(seconds):.0f} s "
        f"({min(seconds):.0f}–{max(seconds):.0f}) on one thread, {workers} at once: "
        f"{sum(seconds) / workers / 60:.0f} minutes for all{task}."
    )


def _mean_table(results: Record) -> list[str]:
    def cells(reference: str, kl_coef: float, when: str) -> list[str]:
        values = [(by_seed(results, reference, kl_coef, m.key, when), m.decimals) for m in MEASURES]
        return [Mean.over(list(seeds.values())).cell(decimals) if seeds else "–" for seeds, decimals in values]

    rows = [["before training (sft1)", "–", *cells(BASELINE, KL_COEFS[0], "before")]]
    rows[0][2 + [measure.key for measure in MEASURES].index("kl_reference")] = "–"
    for reference, kl_coef in settings_in(results):
        beta = f"{kl_coef:g}" if reference != "none" else "–"
        rows.append([KINDS[reference].label, beta, *cells(reference, kl_coef, "after")])
    return markdown(["reference", "β", *(measure.title for measure in MEASURES)], rows)


def _difference_table(results: Record) -> list[str]:
    measures = [measure for measure in MEASURES if measure.key != "kl_reference"]  # each to another model
    rows = []
    for reference, kl_coef in settings_in(results):
        if reference == BASELINE:
            continue
        for beta in [kl_coef] if reference != "none" else KL_COEFS:
            row = [KINDS[reference].label, f"{beta:g}"]
            for measure in measures:
                mine = by_seed(results, reference, kl_coef, measure.key)
                theirs = by_seed(results, BASELINE, beta, measure.key)
                row.append(difference(mine, theirs).cell(measure.decimals, "+"))
            rows.append(row)
    return markdown(["reference", "β", *(measure.title for measure in measures)], rows)


def figure(results: Record) -> Figure:
    """Gold reward against KL to sft1: a line for each reference through its coefficients, bars of ± one s.e."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.8), layout="constrained", facecolor="white")  # opaque: read on dark pages too
    ax = drawn.subplots()
    for reference, kind in KINDS.items():
        coefs = [kl_coef for name, kl_coef in settings_in(results) if name == reference]
        x, y = (
            [Mean.over(list(by_seed(results, reference, kl_coef, key).values())) for kl_coef in coefs]
            for key in ("kl_sft1", "gold")
        )
        ax.errorbar(
            [point.mean for point in x],
            [point.mean for point in y],
            xerr=[point.stderr for point in x],
            yerr=[point.stderr for point in y],
            label=kind.label,
            color=kind.color,
            marker=kind.marker,
            markersize=6,
            linewidth=1.2,
            capsize=2.5,
        )
        if reference == BASELINE:
            for kl_coef, at, height in zip(coefs, x, y, strict=True):
                ax.annotate(
                    f"β = {kl_coef:g}", (at.mean, height.mean), (7, -13), textcoords="offset points", fontsize=9
                )
    start = Mean.over(list(by_seed(results, BASELINE, KL_COEFS[0], "gold", "before").values()))
    ax.plot(0, start.mean, "*", color="black", markersize=10, label="before training")
    ax.set_xlabel("KL to sft1 (nats per response)")
    ax.set_ylabel("gold reward")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return drawn


# --- the command line ---


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/references.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, "run", run, "do the runs that are not done, and gather the results")
    command.add_argument("folder", type=Path, metavar="DIR", help="of the task and the runs")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    command.add_argument("--seeds", type=_at_least_one, default=5, metavar="N", help="seeds 0 to N − 1 (default: 5)")
    command.add_argument("--workers", type=_at_least_one, default=2, metavar="N", help="runs at once (default: 2)")
    command.add_argument("--updates", type=_at_least_one, default=50, metavar="N", help="updates a run (default: 50)")

    command = add_command(commands, "table", table, "show the results as Markdown, with a figure")
    command.add_argument("folder", type=Path, metavar="DIR", nargs="?", help="gather the runs of DIR anew, before")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    command.add_argument("--into", type=Path, metavar="PAGE", help=f"put them between {BEGIN} and {END}, PAGE.png too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What a landscape costs beside its forward passes: analysis.plane, loss-landscapes and loss-landscape-3d.

    python benchmarks/landscape.py make models                 # once: three checkpoints of one Llama
    python benchmarks/landscape.py run models --output landscape_results.json --peers-python peers/bin/python
    python benchmarks/landscape.py table landscape_results.json --into benchmarks/README.md

Every plane is measured in a process of its own, started from this one, which loads no torch. benchmarks/README.md says
what is measured and why.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import (
    Record,
    add_command,
    add_result,
    column,
    goal_cell,
    machine,
    machine_text,
    markdown,
    measured,
    read_results,
    replace_between,
    run_command,
    say,
    seconds_cell,
    spread,
    versions_of,
    write_json,
)

SELF = Path(__file__).resolve()
CHECKPOINTS = ("one", "two", "three")
FULL = {
    "vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1024, "layers": 6, "heads": 6, "batch": 16,
    "tokens": 64, "steps": 9,
}  # fmt: skip
QUICK = FULL | {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2, "batch": 2,
                "tokens": 8, "steps": 3}  # fmt: skip
TUNING_SPREAD = 0.002  # standard deviation of what a fine-tuning adds
# For memory, larger blocks go back to the kernel when they are freed: else the heap keeps copies of the parameters,
# more or fewer by chance.
KEPT_BYTES = 2**18
NUM_FORWARDS = 3  # before the plane, for the memory that forwards take by themselves

NAMES = {
    "plane": "analysis.plane, three folders",
    "model": "analysis.plane, a model that is put back",
    "random": "analysis.plane, random directions by filter",
    "ll_plane": "loss-landscapes, planar_interpolation",
    "ll_random": "loss-landscapes, random_plane by filter",
    "l3_plane": "loss-landscape-3d, differences of state dicts",
}
PEERS = {"ll_plane": "loss-landscapes", "ll_random": "loss-landscapes", "l3_plane": "loss-landscape-3d"}
PACKAGES = {case: name.replace("-", "_") for case, name in PEERS.items()}
TIME_GOAL, MEMORY_GOAL = 1.05, 3.2  # of the first: total over time inside the forwards; copies of the parameters
BEGIN, END = "<!-- landscape tables: begin -->", "<!-- landscape tables: end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what cannot be measured, told in one line on stderr."""
    return run_command(_parser(), arguments)


# --- the checkpoints ---


def make(options: argparse.Namespace) -> None:
    """Write three checkpoints: a random Llama, each with a little of its own added."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    task = QUICK if options.quick else FULL
    options.folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=task["vocab_size"],
        hidden_size=task["hidden_size"],
        intermediate_size=task["intermediate_size"],
        num_hidden_layers=task["layers"],
        num_attention_heads=task["heads"],
        tie_word_embeddings=False,
    )
    for seed, name in enumerate(CHECKPOINTS):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        own = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += TUNING_SPREAD * torch.randn(parameter.shape, generator=own)
        model.save_pretrained(options.folder / name)
    num = sum(parameter.numel() for parameter in model.parameters())
    write_json(options.folder / "task.json", task | {"num_parameters": num})
    say(f"made {options.folder}")


# --- one process ---


class Clock:
    """The loss of a batch, and the time that was spent in it."""

    def __init__(self, task: Record) -> None:
        import torch

        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(task["vocab_size"], (task["batch"], task["tokens"]), generator=generator)
        self.seconds, self.losses = 0.0, []

    def loss(self, model: Any) -> float:
        """One forward, timed."""
        import torch

        started = time.perf_counter()
        with torch.no_grad():
            value = float(model(input_ids=self.tokens, labels=self.tokens).loss)
        self.seconds += time.perf_counter() - started
        self.losses.append(value)
        return value


def work(options: argparse.Namespace) -> None:
    """Measure one plane: print its seconds, those inside its forwards, and the peaks of both, as JSON."""
    task, folders = read_results(options.folder / "task.json"), [options.folder / name for name in CHECKPOINTS]
    plane, clock = PLANES[options.case], Clock(task)
    import_module(PACKAGES.get(options.case, "analysis"))
    model = load(folders[0])
    _reset_peak()
    for _ in range(NUM_FORWARDS):
        clock.loss(model)
    forward_seconds, forward_peak = clock.seconds / NUM_FORWARDS, _resident_bytes("VmHWM")
    clock.seconds, clock.losses = 0.0, []
    if options.case in LOAD_THEIR_OWN:
        del model
        model = None
        gc.collect()
    _reset_peak()
    started = time.perf_counter()
    plane(model, folders, clock, options.steps or task["steps"])
    record = {
        "seconds": time.perf_counter() - started,
        "inside_seconds": clock.seconds,
        "forward_seconds": forward_seconds,
        "num_points": len(clock.losses),
        "lowest": min(clock.losses),
        "highest": max(clock.losses),
        "forward_peak_bytes": forward_peak,
        "peak_bytes": _resident_bytes("VmHWM"),
        "parameter_bytes": 4 * task["num_parameters"],
    }
    print(json.dumps(record))


def load(folder: Path) -> Any:
    """A checkpoint as transformers loads it, in eval mode."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _resident_bytes(key: str) -> int:
    """Resident memory of this process: VmHWM the most since it began or the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _reset_peak() -> None:
    with suppress(OSError):  # where it is not allowed, the peak is that of the process
        Path("/proc/self/clear_refs").write_text("5")


def plane_of_folders(model: Any, folders: Sequence[Path], clock: Clock, steps: int) -> None:
    """Ours, as the README shows it."""
    from analysis import plane

    plane(folders, {"loss": clock.loss}, steps=steps, progress=False)


def plane_of_a_model(model: Any, folders: Sequence[Path], clock: Clock, steps: int) -> None:
    """Ours, with a model that is put back afterwards."""
    from analysis import plane

    plane(folders, {"loss": clock.loss}, model=model, steps=steps, progress=False)


def random_plane(model: Any, folders: Sequence[Path], clock: Clock, steps: int) -> None:
    """Ours, along random directions, which are made here too."""
    from analysis import directions, plane

    pair = [directions.random(folders[0], seed=seed) for seed in (0, 1)]
    plane(folders[:1], {"loss": clock.loss}, directions=pair, radius=0.5, steps=steps, progress=False)


def ll_plane(model: Any, folders: Sequence[Path], clock: Clock, steps: int) -> None:
    """loss-landscapes, through three models."""
    from loss_landscapes import planar_interpolation

    others = [load(folder) for folder in folders[1:]]
    planar_interpolation(model, *others, lambda wrapper: clock.loss(wrapper.modules[0]), steps)


def ll_random(model: Any, folders: Sequence[Path], clock: Clock, steps: int) -> None:
    """loss-landscapes, along random directions."""
    from loss_landscapes import random_plane as theirs

    theirs(model, lambda wrapper: clock.loss(wrapper.modules[0]), 2, steps, normalization="filter")


def l3_plane(model: Any, folders: Sequence[Path], clock: Clock, steps: int) -> None:
    """loss-landscape-3d, along the differences of state dicts."""
    import torch
    from loss_landscape_3d import LossLandscapeCalculator

    class Timed(torch.nn.Module):
        """The model as they call it, with one tensor in and one out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.tensor(clock.loss(self.model))

    timed = Timed()
    center = {name: tensor.clone() for name, tensor in timed.state_dict().items()}
    pair = []
    for folder in folders[1:]:
        other = load(folder).state_dict()
        pair.append({name: other[name.removeprefix("model.")] - tensor for name, tensor in center.items()})
    del other
    calculator = LossLandscapeCalculator(timed, [(clock.tokens, clock.tokens)], lambda loss, targets: loss)
    grid = [index / (steps - 1) for index in range(steps)]
    calculator.calculate(grid, grid, *pair, center)


PLANES: dict[str, Callable[[Any, Sequence[Path], Clock, int], None]] = {
    "plane": plane_of_folders,
    "model": plane_of_a_model,
    "random": random_plane,
    "ll_plane": ll_plane,
    "ll_random": ll_random,
    "l3_plane": l3_plane,
}
LOAD_THEIR_OWN = ("plane", "random")


# --- all of them ---


def run(options: argparse.Namespace) -> None:
    """Measure all planes in interleaved rounds, and save what is there after each round."""
    if not (options.folder / "task.json").is_file():
        raise ValueError(
            f"{options.folder} holds no task: run `python benchmarks/landscape.py make {options.folder}` first"
        )
    cases = [case for case in options.cases if options.peers_python or case not in PEERS]
    for case in sorted(set(options.cases) - set(cases)):
        say(f"{case}: skipped, no --peers-python was given")
    entry = _setting(options.peers_python if set(cases) & set(PEERS) else None) | {
        "task": read_results(options.folder / "task.json"),
        "threads": options.threads,
        "rounds": [],
    }
    for index in range(options.repeats):
        turn = index % len(cases)
        records = {}
        for case in cases[turn:] + cases[:turn]:
            records[case] = figures(_child(case, options), _child(case, options, for_memory=True))
            say(f"round {index + 1}: {case:<10}{_told(records[case])}")
        entry["rounds"].append({case: records[case] for case in cases})
        entry["summary"] = summary(entry["rounds"])
        add_result(options.output, "run", entry)
    say(f"all in {options.output}; next: python benchmarks/landscape.py table {options.output}")


def _setting(peers_python: Path | None) -> Record:
    packages = {"soupkit": "soupkit-rlhf", "torch": "torch", "transformers": "transformers"}
    versions = {"python": platform.python_version()} | {name: version(package) for name, package in packages.items()}
    if peers_python:
        names = [*dict.fromkeys(PEERS.values()), "torch", "transformers"]
        found = versions_of(peers_python, names)
        versions |= {(f"its {n}" if n in packages else n): text for n, text in zip(names, found, strict=True)}
    return {"machine": machine(), "versions": versions}


def _child(case: str, options: argparse.Namespace, for_memory: bool = False) -> Record:
    """What a process of its own measures. One ``for_memory`` measures few points, and frees what it does not use."""
    python = options.peers_python if case in PEERS else Path(sys.executable)
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    command = [python, SELF, "work", case, options.folder]
    if for_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(KEPT_BYTES)
        command += ["--steps", "2"]
    _, text = measured(command, environment=environment, sampled=False)
    record: Record = json.loads(text.splitlines()[-1])
    return record


def figures(record: Record, memory: Record) -> Record:
    """What a plane's records come to, the second that of the process for memory.

    time_ratio     seconds in all over seconds inside the forwards
    outside_ms     what is left of a point, in milliseconds
    extra_copies   peak memory above that of forwards alone, in copies of the parameters
    """
    record = record | {key: memory[key] for key in ("forward_peak_bytes", "peak_bytes")}
    outside = record["seconds"] - record["inside_seconds"]
    return record | {
        "time_ratio": record["seconds"] / record["inside_seconds"],
        "outside_ms": 1000 * outside / record["num_points"],
        "extra_copies": (record["peak_bytes"] - record["forward_peak_bytes"]) / record["parameter_bytes"],
    }


def _told(record: Record) -> str:
    return (
        f"{record['seconds']:7.2f} s, {record['time_ratio']:.3f} × inside, {record['outside_ms']:.1f} ms outside a "
        f"point, {record['extra_copies']:.2f} copies"
    )


def summary(rounds: Sequence[Mapping[str, Record]]) -> Record:
    """The spread of each figure over the rounds, by case."""
    keys = ("seconds", "inside_seconds", "time_ratio", "outside_ms", "extra_copies")
    return {case: {key: spread(column([row[case] for row in rounds], key)) for key in keys} for case in rounds[0]}


# --- tables ---


def table(options: argparse.Namespace) -> None:
    """Print the results as Markdown, or put them where a file has its tables."""
    text = "\n".join(tables(read_results(options.results)["run"]))
    if options.into:
        replace_between(options.into, BEGIN, END, text)
    else:
        print(text)


def tables(entry: Record) -> list[str]:
    """The table of a run, below a line of what it depends on."""
    rows = []
    for case, figures_of in entry["summary"].items():
        time_ratio, copies = figures_of["time_ratio"], figures_of["extra_copies"]
        goals = ["", ""]
        if case == "plane":
            goals = [
                goal_cell(time_ratio["median"], TIME_GOAL, at_most=True),
                goal_cell(copies["median"], MEMORY_GOAL, at_most=True),
            ]
        times = [seconds_cell(figures_of[key]) for key in ("seconds", "inside_seconds")]
        ratio = f"{time_ratio['median']:.3f} ({time_ratio['min']:.3f}–{time_ratio['max']:.3f})"
        outside = f"{figures_of['outside_ms']['median']:.1f}"
        rows.append([NAMES[case], *times, ratio, goals[0], outside, f"{copies['median']:.2f}", goals[1]])
    versions = ", ".join(f"{name} {text}" for name, text in entry["versions"].items())
    task = entry["task"]
    steps, threads, num = task["steps"], entry["threads"], len(entry["rounds"])
    head = [
        f"a plane of {steps}×{steps}", "in all (s)", "inside the forwards (s)", "in all ÷ inside", "goal",
        "outside, ms a point", "memory, copies", "goal",
    ]  # fmt: skip
    setting = (
        f"{machine_text(entry['machine'])}; {versions}. {task['num_parameters'] / 1e6:.1f} million parameters, batch "
        f"{task['batch']} × {task['tokens']}; {threads} thread{'s' * (threads > 1)}, {num} round{'s' * (num > 1)}."
    )
    return [setting, "", *markdown(head, rows)]


# --- the command line ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/landscape.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, "make", make, "write three random checkpoints")
    command.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    command.add_argument("--quick", action="store_true", help="models of a few kB, to try the benchmark itself")

    command = add_command(commands, "run", run, "measure all planes, in rounds")
    command.add_argument("folder", type=Path, metavar="DIR", help="the checkpoints as `make` writes them")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="results file, new or to replace")
    command.add_argument("--peers-python", type=Path, metavar="PATH", help="a Python that has both peers installed")
    command.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    command.add_argument(
        "--cases", nargs="+", choices=PLANES, default=list(PLANES), metavar="CASE",
        help=f"of {', '.join(PLANES)} (default: all)",
    )  # fmt: skip

    command = add_command(commands, "work", work, "measure one plane in this process (run does it for all)")
    command.add_argument("case", choices=PLANES)
    command.add_argument("--steps", type=int, metavar="N", help="points on each axis (default: as the task has it)")
    command.add_argument("folder", type=Path, metavar="DIR")

    command = add_command(commands, "table", table, "show results as Markdown, the goals beside them")
    command.add_argument("results", type=Path, metavar="FILE")
    command.add_argument("--into", type=Path, metavar="README", help=f"put it between {BEGIN} and {END} instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m analysis line|plane|kl|frontier|curvature|report``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis import (
    barriers,
    best_of_n,
    frontier_of_samples,
    hessian,
    kl_geometry,
    kl_matrix,
    line,
    metrics,
    plane,
    plots,
    reward_kl_frontier,
    score_samples,
    tables,
)
from analysis.divergence import KLMatrix
from analysis.frontier import KL, NUM_SAMPLES, SampledFrontier, too_few_samples
from analysis.inputs import (
    METRICS_HELP,
    Checked,
    Parser,
    device_name,
    read_checkpoints,
    read_groups,
    read_metrics,
    read_rewards,
    real_number,
    whole_number,
)
from analysis.landscape import Landscape
from analysis.report import read_runs, write_report
from analysis.tables import Table, to_json
from rlhf.checkpointing import publishing, require_new
from rlhf.command_line import run_process
from rlhf.data import Prompt, load_examples, load_prompts
from rlhf.metrics import replace_text, write_json
from rlhf.models import context_length, load_tokenizer
from rlhf.reference import load_model_reference

DESCRIPTION = "Measure models and runs, and draw what comes of it."
EXAMPLES = """\
examples:
  loss and gold reward on the way from one model to another, with barriers
    python -m analysis line sft1 sft2 --metric loss=demonstrations.jsonl gold_reward=rlhf.reviews:gold_reward \\
        --prompts prompts.jsonl --output path
  the same over the plane through two models and what PPO made, a soup marked on it; goes on where it was stopped
    python -m analysis plane sft1 sft2 run --mark soup --metric loss=demonstrations.jsonl --output plane --resume
  who is how far from whom; where each lies to the soup of sft1 and sft2
    python -m analysis kl base sft1 sft2 run --ingredients sft1 sft2 --prompts prompts.jsonl --output distances
  what the best policies near each of two references would reach, before any training
    python -m analysis frontier sft1 soup --reward reward --gold_reward rlhf.reviews:gold_reward \\
        --prompts prompts.jsonl --output ideal
  what runs reached, by groups of seeds and coefficients
    python -m analysis frontier --runs soup=runs/soup-* plain=runs/plain-* --kl_to sft1 --output reached
  both ends of the Hessian's spectrum
    python -m analysis curvature sft1 --data demonstrations.jsonl --output curvature
  all about one or several runs on one page
    python -m analysis report run plain --output report.html

Checkpoints are folders, hub ids, BASE+ADAPTER or run folders (their policy/ is meant), also with a name: soup=runs/avg.
Rewards are reward-model folders, module:function or FILE.py:function. Everything is written as numbers (.npz, .json),
tables (.md) and figures (.png, .svg) to a new folder, which is whole or absent. Exit codes: 0 done; 2 bad input.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Raises ValueError or OSError for bad input, before long work where it can be known then.

    Raises KeyboardInterrupt, when interrupted, that says what is left.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        left = "resume" in arguments and _unfinished(arguments).exists()
        raise KeyboardInterrupt("go on with --resume" if left else "nothing is left") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m analysis",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help[:1].upper() + help[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    command = add("line", _line, "metrics on the way from each checkpoint to the next, and the barriers between them")
    _add_landscape(command, steps=11, margin=0.0)

    command = add("plane", _plane, "metrics over the plane through three checkpoints")
    _add_landscape(command, steps=9, margin=0.25)
    _add(command, "--mark", nargs="+", default=[], metavar="CKPT", help="further checkpoints to measure and to show")

    command = add("kl", _kl, "KL between all pairs of models, and where they lie to a soup and its ingredients")
    command.add_argument("checkpoints", nargs="+", metavar="CKPT", help="two models or more")
    _add(command, "--ingredients", nargs="+", default=[], metavar="NAME", help="models whose soup the others lie to")
    _add(command, "--weights", nargs="+", type=float, metavar="W", help="of the ingredients; uniform where not given")
    _add(command, "--soup", default="soup", metavar="NAME", help="the soup's name; made where no model has it")
    _add_count(command, "--num_responses", 1, default=1, metavar="N", help="sampled to every prompt")
    _add(command, "--resume", action="store_true", help="go on with the rows that an interrupted command had measured")
    _add_sampling(command, required=True)
    _add_common(command)

    command = add("frontier", _frontier, "reward against KL: what can be reached from references, or what runs reached")
    command.add_argument("references", nargs="*", metavar="REFERENCE", help="models that policies are to stay close to")
    _add(command, "--reward", metavar="REWARD", help="what is optimised")
    _add(command, "--gold_reward", metavar="REWARD", help="what is only measured")
    _add_count(command, "--num_samples", 2, default=NUM_SAMPLES, metavar="N", help="of a reference to every prompt")
    _add(
        command,
        "--runs",
        nargs="+",
        default=[],
        metavar="GROUP=RUN,RUN",
        help="instead of references: groups of finished runs that differ in seed and kl_coef alone; RUN may be a "
        "pattern, soup=runs/soup-*",
    )
    _add(
        command,
        "--kl_to",
        metavar="NAME",
        help="the model of one KL axis for all: by default the first reference; of runs, the reference of each",
    )
    _add(command, "--y", default="gold_reward", metavar="NAME", help="the reward of runs: gold_reward or proxy_reward")
    _add(command, "--points", choices=["end", "updates"], default="end", help="which points of the runs")
    _add_count(command, "--average", 1, default=1, metavar="N", help="updates that a point is the mean of")
    _add_sampling(command, required=False)
    _add_common(command)

    command = add("curvature", _curvature, "both ends of a loss's Hessian spectrum, its trace and its density")
    command.add_argument("checkpoint", metavar="CKPT")
    _add(command, "--data", required=True, metavar="FILE", help="demonstrations whose loss it is")
    _add_count(command, "--num_eigenvalues", 0, default=5, metavar="K", help="at each end")
    _add_count(command, "--num_probes", 0, default=10, metavar="N", help="random vectors for trace and density")
    _add_count(command, "--num_examples", 1, metavar="N", help="only the first N demonstrations")
    _add_common(command)

    command = add("report", _report, "one page about PPO runs: settings, rewards, KL, exploration, samples, frontier")
    command.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run folders, finished or not")
    _add(command, "--kl_to", metavar="NAME", help="the model of the KL axis; one that all runs measured")
    _add(
        command,
        "--output",
        required=True,
        metavar="FILE",
        help="a new file: .html, one page with everything in it, or .md, with a folder of figures beside it",
    )
    return parser


def _add(parser: argparse.ArgumentParser, flag: str, **options: Any) -> None:
    """A flag that may be written with underscores or dashes."""
    parser.add_argument(*dict.fromkeys([flag, "--" + flag[2:].replace("_", "-")]), **options)


def _add_count(parser: argparse.ArgumentParser, flag: str, least: int, **options: Any) -> None:
    """A flag for a whole number, which is refused where it is too small."""
    _add(parser, flag, action=Checked, parse=whole_number(least), **options)


def _default_device() -> str:
    """A GPU where there is one, each of several processes on a machine its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--output", required=True, metavar="DIR", help="a new folder to write")
    _add_count(parser, "--seed", 0, default=0, help="of all that is random")
    _add(parser, "--device", action=Checked, parse=device_name, default=_default_device(), help="where models are")
    _add_count(parser, "--batch_size", 1, default=64, metavar="N", help="responses or examples handled at once")
    _add(parser, "--quiet", action="store_true", help="show no progress bars")


def _add_sampling(parser: argparse.ArgumentParser, *, required: bool) -> None:
    _add(parser, "--prompts", required=required, metavar="FILE", help="prompts that responses are sampled to")
    _add_count(parser, "--num_prompts", 1, metavar="N", help="only the first N prompts")
    _add_count(parser, "--max_new_tokens", 1, default=64, metavar="N", help="the longest response")
    _add(
        parser,
        "--temperature",
        action=Checked,
        parse=real_number(0, above=True),
        default=1.0,
        help="of sampling and of the distributions compared",
    )


def _add_landscape(parser: argparse.ArgumentParser, *, steps: int, margin: float) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="in order")
    _add(parser, "--metric", nargs="+", required=True, metavar="METRIC", help=METRICS_HELP)
    _add_count(parser, "--steps", 2, default=steps, metavar="N", help="points of each segment or axis, ends included")
    _add(
        parser,
        "--margin",
        action=Checked,
        parse=real_number(0),
        default=margin,
        help="how far to go beyond the checkpoints, as a fraction",
    )
    _add(parser, "--resume", action="store_true", help="go on with what an interrupted command had measured")
    _add_sampling(parser, required=False)
    _add_common(parser)


# ── Commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _line(arguments: argparse.Namespace) -> None:
    result = _measure(arguments, line, {})
    found = {
        name: barriers(result, name, larger_is_better="reward" in name, seed=arguments.seed)
        for name, values in result.values.items()
        if ("loss" in name or "reward" in name) and np.isfinite(values).all()
    }
    shown = [tables.of_checkpoints(result), tables.of_extremes(result)]
    _publish(
        arguments,
        {"line": result},
        {"t": result.t, "length": result.length, "barriers": found, **_numbers(result)},
        [*shown, tables.of_barriers(found)] if found else shown,
        {_file_name(name): partial(plots.plot_line, result, name) for name in result.values},
    )


def _plane(arguments: argparse.Namespace) -> None:
    result = _measure(arguments, plane, {"mark": read_checkpoints(arguments.mark)})
    figures = {_file_name(name): partial(plots.plot_plane, result, name) for name in result.values}
    surfaces = {f"{_file_name(name)}-surface": partial(plots.plot_surface, result, name) for name in result.values}
    _publish(
        arguments,
        {"plane": result},
        {"x": result.x, "y": result.y, "gram": result.gram, "distance": result.distance, **_numbers(result)},
        [tables.of_checkpoints(result), tables.of_extremes(result)],
        figures | surfaces,
    )


def _measure(arguments: argparse.Namespace, measure: Callable[..., Any], further: Mapping[str, Any]) -> Any:
    """The line or plane that is asked for, once all is checked that can be before models are loaded."""
    save = _startable(arguments)
    checkpoints = read_checkpoints(arguments.checkpoints)
    first = next(iter(checkpoints.values()))
    found = read_metrics(
        arguments.metric,
        first,
        _prompts(arguments, first),
        device=arguments.device,
        keep_examples=measure is line,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    return measure(
        checkpoints,
        found,
        steps=arguments.steps,
        margin=arguments.margin,
        device=arguments.device,
        save=save,
        resume=arguments.resume,
        progress=not arguments.quiet,
        **further,
    )


def _kl(arguments: argparse.Namespace) -> None:
    save = _startable(arguments)
    checkpoints = read_checkpoints(arguments.checkpoints)
    first = next(iter(checkpoints.values()))
    prompts = _prompts(arguments, first)
    assert prompts is not None
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "num_responses": arguments.num_responses,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "save": save,
        "resume": arguments.resume,
        "progress": not arguments.quiet,
    }
    tokenizer = load_tokenizer(first)
    result: KLMatrix
    if arguments.ingredients:
        result = geometry = kl_geometry(
            checkpoints,
            prompts,
            tokenizer,
            ingredients=arguments.ingredients,
            weights=arguments.weights,
            soup=arguments.soup,
            **settings,
        )
        shown = [tables.of_kl_matrix(geometry), tables.of_geometry(geometry)]
        figures = {"kl": partial(plots.plot_kl_matrix, geometry), "geometry": partial(plots.plot_geometry, geometry)}
    else:
        if arguments.weights:
            raise ValueError(f"--weights {arguments.weights}: go with --ingredients; give both or neither")
        result = kl_matrix(checkpoints, prompts, tokenizer, **settings)
        shown, figures = [tables.of_kl_matrix(result)], {"kl": partial(plots.plot_kl_matrix, result)}
    _publish(arguments, {"kl": result}, vars(result), shown, figures)


def _frontier(arguments: argparse.Namespace) -> None:
    if bool(arguments.references) == bool(arguments.runs):
        raise ValueError(
            "frontier: give references, for what could be reached from them, or --runs, for what was reached; not both"
        )
    require_new(arguments.output)
    (_reached if arguments.runs else _ideal)(arguments)


def _ideal(arguments: argparse.Namespace) -> None:
    for flag in ("reward", "prompts"):
        if getattr(arguments, flag) is None:
            raise ValueError(f"--{flag}: is needed to see what can be reached from references")
    if reason := too_few_samples(arguments.num_samples):
        raise ValueError(f"--num_samples {arguments.num_samples}: {reason}")
    references = read_checkpoints(arguments.references)
    first, folder = next(iter(references.items()))
    axis = arguments.kl_to or first
    if axis not in references:
        raise ValueError(f"--kl_to {axis}: is none of the references {list(references)}; name one of them")
    prompts = _prompts(arguments, folder)
    assert prompts is not None
    if len(prompts) < 2:
        raise ValueError(f"{arguments.prompts}: one prompt is no sample of prompts; give two or more, better hundreds")
    named = {"proxy_reward": arguments.reward, "gold_reward": arguments.gold_reward}
    rewards = read_rewards({name: spec for name, spec in named.items() if spec}, folder, arguments.device)
    proxy = rewards.pop("proxy_reward")
    others = {axis: load_model_reference([references[axis]], device=arguments.device)}
    samples = {
        name: score_samples(
            reference,
            proxy,
            prompts,
            load_tokenizer(reference),
            rewards=rewards,
            others=others,
            max_new_tokens=arguments.max_new_tokens,
            num_samples=arguments.num_samples,
            temperature=arguments.temperature,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=arguments.device,
            progress=not arguments.quiet,
        )
        for name, reference in references.items()
    }
    ideal: dict[str, SampledFrontier] = {name: frontier_of_samples(each) for name, each in samples.items()}
    best = {name: best_of_n(each) for name, each in samples.items()}
    shown: list[Table | str] = [tables.of_frontier(name, result) for name, result in ideal.items()]
    shown += [tables.of_frontier(name, result) for name, result in best.items()]
    measured = ["proxy_reward", *rewards]
    figures: dict[str, Callable[[], Any]] = {}
    for x, suffix in ((f"kl/{axis}", f"-kl-to-{axis}"), (KL, "-kl-to-own")):
        figures |= {f"{y}{suffix}": partial(plots.plot_frontier, ideal, y, x) for y in measured}
        if len(ideal) > 1:
            shown += [tables.or_reason(partial(tables.of_differences, ideal, y, x)) for y in measured]
    for name, result in best.items():
        both = {"exact optimum": ideal[name], "best of n": result}
        figures |= {f"{name}-{y}": partial(plots.plot_frontier, both, y) for y in measured}
        figures[f"{name}-best-of-n"] = partial(plots.plot_best_of_n, result)
    kinds: dict[str, Mapping[str, Any]] = {"samples": samples, "ideal": ideal, "best-of-n": best}
    _publish(
        arguments,
        {f"{kind}-{name}": result for kind, results in kinds.items() for name, result in results.items()},
        {
            kind: {name: {measure: result[measure] for measure in result.names} for name, result in kinds[kind].items()}
            for kind in ("ideal", "best-of-n")
        },
        shown,
        figures,
    )


def _reached(arguments: argparse.Namespace) -> None:
    result = reward_kl_frontier(
        read_groups(arguments.runs),
        x=f"kl/{arguments.kl_to or 'reference'}",
        y=arguments.y,
        points=arguments.points,
        average=arguments.average,
    )
    shown: list[Table | str] = [tables.of_reached(result)]
    if len(result.names) > 1:
        shown.append(tables.or_reason(partial(tables.of_reached_differences, result)))
    _publish(arguments, {"reached": result}, vars(result), shown, {"reached": partial(plots.plot_reached, result)})


def _curvature(arguments: argparse.Namespace) -> None:
    require_new(arguments.output)
    ((name, folder),) = read_checkpoints([arguments.checkpoint]).items()
    tokenizer = load_tokenizer(folder)
    examples = load_examples(arguments.data, tokenizer)[: arguments.num_examples]
    result = hessian(
        folder,
        metrics.loss(examples, tokenizer),
        num_largest=arguments.num_eigenvalues,
        num_smallest=arguments.num_eigenvalues,
        num_probes=arguments.num_probes,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    numbers = {
        "checkpoint": name,
        "largest": result.largest,
        "smallest": result.smallest,
        "residuals": result.residuals,
        "trace": result.trace if len(result.trace_samples) else None,
        "metadata": result.metadata,
    }
    figures = {"spectrum": partial(plots.plot_spectrum, result)}
    _publish(arguments, {"hessian": result}, numbers, [tables.of_hessian(result)], figures)


def _report(arguments: argparse.Namespace) -> None:
    print(write_report(read_runs(arguments.runs), arguments.output, kl_to=arguments.kl_to))


# ── What they share ───────────────────────────────────────────────────────────────────────────────────────────────────


def _prompts(arguments: argparse.Namespace, checkpoint: str) -> list[Prompt] | None:
    """The prompts, where a file is given, each of which leaves room for a response."""
    if arguments.prompts is None:
        return None
    context = context_length(checkpoint)
    room = None if context is None else context - arguments.max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"--max_new_tokens {arguments.max_new_tokens}: leaves no room for a prompt in the {context} tokens that "
            f"{checkpoint} can read; give fewer"
        )
    return load_prompts(arguments.prompts, load_tokenizer(checkpoint), room)[: arguments.num_prompts]


def _startable(arguments: argparse.Namespace) -> Path:
    """The file for what is measured until all is; it must not be there unless to go on with, and no output either."""
    require_new(arguments.output)
    save = _unfinished(arguments)
    if save.exists() and not arguments.resume:
        raise FileExistsError(
            f"{save}: what an interrupted command had measured; go on with --resume, or remove it to start anew"
        )
    return save


def _unfinished(arguments: argparse.Namespace) -> Path:
    """The file that holds what is measured until all is."""
    output = Path(arguments.output)
    return output.with_name(f"{output.name}.unfinished.npz")


def _numbers(result: Landscape) -> dict[str, Any]:
    names = ("values", "stderr", "coordinates", "at", "metadata")
    return {name: getattr(result, name) for name in names}


def _file_name(metric: str) -> str:
    return metric.replace("/", "-")


def _publish(
    arguments: argparse.Namespace,
    results: Mapping[str, Any],
    numbers: Mapping[str, Any],
    shown: Sequence[Table | str],
    figures: Mapping[str, Callable[[], Any]],
) -> None:
    """Write the output folder in one step, and show its tables; of several processes, one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    with publishing(arguments.output) as folder:
        for name, result in results.items():
            result.save(folder / f"{name}.npz")
        write_json(folder / f"{arguments.command}.json", to_json(numbers))
        parts = [part if isinstance(part, str) else part.markdown() for part in shown]
        replace_text(folder / "tables.md", "\n\n".join(parts) + "\n")
        for name, draw in figures.items():
            plots.save(draw(), folder / name, close=True)
    if "resume" in arguments:
        _unfinished(arguments).unlink()
    print("\n\n".join(part if isinstance(part, str) else part.text() for part in shown))
    print(f"\n→ {arguments.output}")


if __name__ == "__main__":
    run_process(main)

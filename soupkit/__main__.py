"""The command line: ``python -m soupkit average|interpolate|sweep|merge|diff|inspect|verify|methods``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soupkit.api import average, interpolate, merge, sweep
from soupkit.card import fallback_of
from soupkit.diff import diff
from soupkit.errors import MergeError
from soupkit.hashing import ALGORITHMS, DEFAULT
from soupkit.inspection import inspect
from soupkit.methods import METHODS, Method, find_method
from soupkit.options import Options
from soupkit.recipe import Recipe, load_recipe
from soupkit.recipe_forms import parse_yaml
from soupkit.verification import read_record, verify

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
DESCRIPTION = "Make one checkpoint folder out of several: a soup."
EXAMPLES = """\
examples:
  uniform soup of two fine-tunings of one model
    python -m soupkit average runs/sft1 runs/sft2 --out runs/soup
  weighted, stored in bfloat16 (the weights are divided by their sum)
    python -m soupkit average runs/sft1 runs/sft2 runs/sft3 --weights 2 1 1 --dtype bfloat16 --out runs/soup
  30 % of the way from one model to another, along the great circle
    python -m soupkit interpolate runs/sft1 runs/sft2 --t 0.3 --method slerp --out runs/between
  five points between two models in one pass: runs/wise-ft/t=0 to runs/wise-ft/t=1
    python -m soupkit sweep base runs/sft1 --ts 0 0.25 0.5 0.75 1 --out runs/wise-ft
  any other method, on the command line or from a recipe file (ours or mergekit's)
    python -m soupkit merge --method ties --base base runs/sft1 runs/sft2 --set weight=0.5,0.5 --set density=0.3 \\
        --out runs/ties
    python -m soupkit merge --method slerp runs/sft1 runs/sft2 --set 't=[0, 0.5, 1]' --out runs/gradient
    python -m soupkit merge recipe.yaml --out runs/soup
  LoRA adapters: each folded into its base as a model, or averaged as adapters
    python -m soupkit average base+runs/lora1 base+runs/lora2 --out runs/soup
    python -m soupkit average runs/lora1 runs/lora2 --out runs/lora-soup
  what each method does, and where it comes from
    python -m soupkit methods
  how far two checkpoints are from each other, what is in one, whether a soup is as it was written
    python -m soupkit diff runs/sft1 runs/sft2 --base base
    python -m soupkit inspect runs/soup
    python -m soupkit verify runs/soup

Models are folders as save_pretrained writes them (safetensors), hub ids, or BASE+ADAPTER for a LoRA adapter and its
base. The soup is such a folder too, with soup.json beside the weights: how it was made, and the hashes of all files.

Exit codes: 0 done; 1 verify found a change; 2 bad input; 3 verify found none, but a model is absent.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 for bad input, which is told in one line.

    verify returns 1 where it finds a difference, and 3 where it finds none but a model was not there to be checked.
    Interrupted (130) or asked to end by SIGTERM (exit with 143) it leaves no unfinished folder behind.
    """
    arguments = _parser().parse_args(argv)
    try:
        with _sigterm_as_exit(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted: no unfinished folder is left", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return code


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m soupkit",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[:1].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    command = add("average", _average, METHODS["linear"].summary)
    command.add_argument("models", nargs="+", metavar="MODEL", help="ingredients: checkpoint folders or hub ids")
    command.add_argument("--weights", nargs="+", type=_number, metavar="W", help="one per model; uniform by default")
    _add_merge_options(command)

    command = add("interpolate", _interpolate, "point between two models, on a line or a great circle")
    _add_ends(command)
    command.add_argument("--t", type=_number, required=True, help="how far from A to B; outside 0 to 1 extrapolates")
    _add_merge_options(command)

    command = add("sweep", _sweep, "many points between two models, in one pass over them")
    _add_ends(command)
    command.add_argument("--ts", nargs="+", type=_number, required=True, metavar="T", help="how far from A to B, each")
    _add_merge_options(command, "folder to write t=T folders into")

    command = add("merge", _merge, "any method, from a recipe file or with --method")
    command.add_argument(
        "models", nargs="+", metavar="RECIPE|MODEL", help="one recipe file, or with --method the ingredients"
    )
    command.add_argument("--method", choices=METHODS, metavar="NAME", help="see: python -m soupkit methods")
    command.add_argument("--base", metavar="MODEL", help="the model that the others were fine-tuned from")
    command.add_argument("--fishers", nargs="+", default=[], metavar="FOLDER", help="Fisher information of each model")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of --method (repeat the option for more); commas separate one value for each model; "
        "'t=[0, 0.5, 1]' goes over the layers, 't=[{filter: mlp, value: 0.3}, {value: 0.5}]' by tensors' names",
    )
    command.add_argument("--tokenizer", metavar="base|union|FOLDER", help="which tokenizer, where the models' differ")
    _add_merge_options(command)

    command = add("diff", _diff, "what differs between two checkpoints, tensor by tensor")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.add_argument("--base", metavar="MODEL", help="compare how A and B moved away from this model, too")
    command.add_argument("--by-layer", action="store_true", help="in the text, a line for each layer in their order")
    _add_reading_options(command)

    command = add("inspect", _inspect, "what a checkpoint holds")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--tensors", action="store_true", help="list every tensor")
    command.add_argument("--statistics", action="store_true", help="with mean, spread and range of its values")
    _add_reading_options(command)

    command = add("verify", _verify, "check a soup's files against the hashes in its soup.json")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("--ingredients", action="store_true", help="check the models that it was made of, too")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument("--quiet", action="store_true", help="show no progress bar")

    command = add("methods", _methods, "what each method does, needs and is based on")
    command.add_argument("names", nargs="*", metavar="NAME", help="only these")
    return parser


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        hint = f": write {text.replace(',', ' ')}" if "," in text else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no number{hint}") from None


def _add_ends(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="the model at t = 0")
    command.add_argument("b", metavar="B", help="the model at t = 1")
    command.add_argument("--method", choices=["linear", "slerp"], default="linear", help="line (default) or arc")


def _add_merge_options(command: argparse.ArgumentParser, out: str = "folder to write; it must not exist") -> None:
    command.add_argument("--out", required=True, metavar="DIR", help=out)
    command.add_argument("--dtype", metavar="NAME", help="store in float16, bfloat16, float32 or float64")
    command.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --out")
    command.add_argument(
        "--max-shard-size", metavar="SIZE", help="bytes, or such as 5GB (default: files as in the first model)"
    )
    command.add_argument("--allow-nonfinite", action="store_true", help="go on where a model holds NaN or inf")
    command.add_argument("--allow-pickle", action="store_true", help="read weights, nothing else, from .bin files")
    command.add_argument("--hash", choices=ALGORITHMS, default=DEFAULT, help=f"for soup.json (default: {DEFAULT})")
    command.add_argument("--sync", action="store_true", help="wait until the disk has it all, against a power cut")
    command.add_argument(
        "--device",
        default="cpu",
        help="where to compute, such as cuda; a merge waits for files, so a GPU seldom helps (default: cpu)",
    )
    command.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    command.add_argument("--quiet", action="store_true", help="show no progress bar")


def _add_reading_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allow-pickle", action="store_true", help="read weights, nothing else, from .bin files")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument("--quiet", action="store_true", help="show no progress bar")


def _options(arguments: argparse.Namespace) -> Options:
    return {
        "dtype": arguments.dtype,
        "overwrite": arguments.overwrite,
        "max_shard_size": arguments.max_shard_size,
        "allow_nonfinite": arguments.allow_nonfinite,
        "allow_pickle": arguments.allow_pickle,
        "hash": arguments.hash,
        "sync": arguments.sync,
        "device": arguments.device,
        "num_threads": arguments.threads,
        "progress": not arguments.quiet,
    }


def _average(arguments: argparse.Namespace) -> int:
    print(average(arguments.models, arguments.weights, out=arguments.out, **_options(arguments)))
    return 0


def _interpolate(arguments: argparse.Namespace) -> int:
    between = {"method": arguments.method, "out": arguments.out}
    out = interpolate(arguments.a, arguments.b, arguments.t, **between, **_options(arguments))
    print(out)
    _tell_fallback(out)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    outs = [Path(arguments.out) / f"t={str(t).removesuffix('.0')}" for t in arguments.ts]
    for out in sweep(arguments.a, arguments.b, arguments.ts, method=arguments.method, outs=outs, **_options(arguments)):
        print(out)
    _tell_fallback(out)  # the same for every t
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    out = merge(_recipe(arguments), out=arguments.out, **_options(arguments))
    print(out)
    _tell_fallback(out)
    return 0


def _tell_fallback(soup: Path) -> None:
    """Say for how many tensors the method did not do what it is named for."""
    for line in fallback_of(read_record(soup)):
        print(f"note: {line}", file=sys.stderr)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe file that is named, or the recipe that the options spell out."""
    models = arguments.models
    spelt_out = [f"--{name}" for name in ("method", "base", "fishers", "set", "tokenizer") if getattr(arguments, name)]
    recipes = [model for model in models if Path(model).suffix in RECIPE_SUFFIXES and Path(model).is_file()]
    if recipes and (spelt_out or len(models) > 1):
        models.remove(recipes[0])
        raise MergeError(
            f"found {', '.join(spelt_out or models)} beside the recipe file {recipes[0]}, which says by itself what is "
            "merged and how: write it there, or spell all out with --method and no file (options such as --dtype go "
            "with either)"
        )
    if arguments.method is None:
        if len(models) != 1 or spelt_out:
            found = ", ".join(spelt_out) or f"{len(models)} models"
            raise MergeError(f"found {found} without --method: name the method, or give one recipe file alone")
        return load_recipe(models[0])
    shared, own = _settings(arguments.set, find_method(arguments.method), len(models))
    return Recipe(
        arguments.method,
        models,
        base=arguments.base,
        parameters=shared,
        model_parameters=own,
        fishers=arguments.fishers,
        tokenizer=arguments.tokenizer,
    )


def _settings(texts: Sequence[str], method: Method, num_models: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters that NAME=VALUE texts spell out: for all models, and for each."""
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(num_models)]
    for text in texts:
        name, _, value = text.partition("=")
        if not value.strip() or value.rstrip().endswith(","):
            raise MergeError(f"--set {text} lacks a value: write NAME=VALUE, or NAME=VALUE,VALUE with one per model")
        if name in shared or name in own[0]:
            raise MergeError(f"--set {name}=... is given twice: give it once, with commas for one value per model")
        try:
            values = parse_yaml(f"[{value}]")
        except MergeError as error:
            raise MergeError(f"--set {text}: {error}") from None
        if len(values) == 1:
            shared[name] = values[0]
            continue
        per_model = name in method.parameters and method.parameters[name].per_ingredient
        if not per_model or len(values) != num_models:
            wanted = f"one value, or {num_models} (one per model)" if per_model else "one value"
            raise MergeError(
                f"--set {text} has {len(values)} values: {name} takes {wanted}; values over the layers stand in "
                f"brackets, '{name}=[{value}]'"
            )
        for settings, each in zip(own, values, strict=True):
            settings[name] = each
    return shared, own


def _diff(arguments: argparse.Namespace) -> int:
    found = diff(
        arguments.a,
        arguments.b,
        base=arguments.base,
        allow_pickle=arguments.allow_pickle,
        progress=not arguments.quiet,
    )
    if arguments.by_layer and not arguments.json:
        print(found.render(by_layer=True))
    else:
        _show(found, arguments.json)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(
        arguments.model,
        statistics=arguments.statistics,
        allow_pickle=arguments.allow_pickle,
        progress=not arguments.quiet,
    )
    if arguments.json:
        _show(found, True)
    else:
        print(found.render(tensors=arguments.tensors or arguments.statistics))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found = verify(arguments.folder, ingredients=arguments.ingredients, progress=not arguments.quiet)
    _show(found, arguments.json)
    if found.changed:
        return 1
    return 0 if found.ok else 3


def _show(found: Any, as_json: bool) -> None:
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else found)


def _methods(arguments: argparse.Namespace) -> int:
    names = arguments.names or list(METHODS)
    print("\n\n".join(_describe(name, find_method(name)) for name in names))
    return 0


def _describe(name: str, method: Method) -> str:
    base = {"none": "no base", "optional": "a base if you like", "required": "a base"}[method.base]
    passes = "reads each model once" if method.survey is None else "reads each model more than once"
    needs = [f"{method.num_models} models", base, *(["Fisher information"] if method.needs_fishers else []), passes]
    lines = [("formula", method.formula), ("needs", ", ".join(needs))]
    for key, parameter in method.parameters.items():
        default = "required" if parameter.required else f"default {json.dumps(parameter.default)}"
        per_model = "one per model, " if parameter.per_ingredient else ""
        lines.append((key, f"{parameter.meaning} ({per_model}{default})"))
    lines += [("departures", method.departures), ("paper", method.paper)]
    width = max(len(key) for key, _ in lines) + 2
    wrapper = textwrap.TextWrapper(110, initial_indent="  ", subsequent_indent=" " * (width + 2))
    return "\n".join([f"{name}: {method.summary}", *(wrapper.fill(f"{key:<{width}}{text}") for key, text in lines)])


if __name__ == "__main__":
    sys.exit(main())

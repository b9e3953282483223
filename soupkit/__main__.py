"""The command line: ``python -m soupkit average|interpolate|methods``."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence

from soupkit.api import average, interpolate
from soupkit.errors import MergeError
from soupkit.methods import METHODS, Method

DESCRIPTION = "Make one checkpoint folder out of several: a soup."
EXAMPLES = """\
examples:
  uniform soup of two fine-tunings of one model
    python -m soupkit average runs/sft1 runs/sft2 --out runs/soup
  weighted, stored in bfloat16 (the weights are divided by their sum)
    python -m soupkit average runs/sft1 runs/sft2 runs/sft3 --weights 2 1 1 --dtype bfloat16 --out runs/soup
  30 % of the way from one model to another, along the great circle
    python -m soupkit interpolate runs/sft1 runs/sft2 --t 0.3 --method slerp --out runs/between
  what each method does, and where it comes from
    python -m soupkit methods

Ingredients are folders as save_pretrained writes them (safetensors), or hub ids. The soup is such a folder too, with
soup.json beside the weights: how it was made, and the hashes of what it was made of.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for bad input, told in one line on stderr."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "methods":
        print("\n\n".join(_describe(name, method) for name, method in METHODS.items()))
        return 0
    options = {
        "out": arguments.out,
        "dtype": arguments.dtype,
        "overwrite": arguments.overwrite,
        "max_shard_size": arguments.max_shard_size,
        "progress": not arguments.quiet,
    }
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if arguments.command == "average":
                out = average(arguments.folders, arguments.weights, **options)
            else:
                out = interpolate(arguments.a, arguments.b, arguments.t, method=arguments.method, **options)
    except (MergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m soupkit",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("average", help=METHODS["average"].summary)
    command.add_argument("folders", nargs="+", metavar="FOLDER", help="ingredients: checkpoint folders or hub ids")
    command.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder; uniform by default")
    _add_output_options(command)

    command = commands.add_parser("interpolate", help="point between two models, on a line or a great circle")
    command.add_argument("a", metavar="A", help="the model at t = 0")
    command.add_argument("b", metavar="B", help="the model at t = 1")
    command.add_argument("--t", type=float, required=True, help="how far from A to B; outside 0 to 1 extrapolates")
    command.add_argument("--method", choices=["linear", "slerp"], default="linear", help="line (default) or arc")
    _add_output_options(command)

    commands.add_parser("methods", help="what each method does, needs and is based on")
    return parser


def _add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist")
    command.add_argument("--dtype", metavar="NAME", help="store in float16, bfloat16, float32 or float64")
    command.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --out")
    command.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB (default: files as in the first folder)")
    command.add_argument("--quiet", action="store_true", help="show no progress bar")


def _describe(name: str, method: Method) -> str:
    most = method.max_ingredients
    count = f"{method.min_ingredients} or more" if most is None else f"exactly {most}"
    needs = [f"{count} ingredients", "a base" if method.needs_base else "no base"]
    needs.append("reads each ingredient twice" if method.needs_gram else "reads each ingredient once")
    lines = [("needs", ", ".join(needs))]
    lines += [(key, parameter.meaning) for key, parameter in method.parameters.items()]
    lines += [("departures", method.departures), ("paper", method.paper)]
    wrapper = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent=" " * 14)
    return "\n".join([f"{name}: {method.summary}", *(wrapper.fill(f"{key:<12}{text}") for key, text in lines)])


if __name__ == "__main__":
    sys.exit(main())

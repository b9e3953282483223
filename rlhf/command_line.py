"""Settings of commands: dataclass fields that explain themselves, and how command lines and YAML files become one."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from transformers import HfArgumentParser
from transformers.utils import logging

from rlhf import processor
from soupkit.errors import MergeError
from soupkit.recipe_forms import parse_yaml

Config = TypeVar("Config")


def setting(default: Any, help: str) -> Any:
    """A dataclass field whose help is shown by ``--help``."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A dataclass field without a default: a flag that must be given."""
    return field(metadata={"help": help})


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, unchecked but for being 'name: value' lines."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except MergeError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'name: value' lines, found {type(values).__name__}")
    return values


def _as_arguments(settings: dict[str, Any], source: str, config_class: type) -> list[str]:
    """Settings as command-line arguments, so that one parser converts and checks them wherever they come from."""
    known = [f.name for f in fields(config_class)]
    arguments = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{source}: unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        items = value if isinstance(value, list) else [value]
        if items and value is not None:
            arguments += [f"--{name}", *map(str, items)]
    return arguments


def _program() -> str | None:
    """The command as it was given, ``python -m rlhf.ppo``, where argparse would show a file's name."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {specification.name.removesuffix('.__main__')}" if specification else None


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and shows every default."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise, so that a wrong flag is reported in one line like any other bad input."""
        raise ValueError(message)


def _group(parser: argparse.ArgumentParser, sections: dict[str, str]) -> None:
    """Show the flags under titles in ``--help``; ``sections`` give the title of each first flag.

    argparse knows groups from the start or not at all, and the flags are made by HfArgumentParser.
    """
    group: argparse._ArgumentGroup | None = None
    ungrouped: list[argparse.Action] = []
    for action in parser._optionals._group_actions:
        if action.dest in sections:
            group = parser.add_argument_group(sections[action.dest])
        (ungrouped if group is None else group._group_actions).append(action)
    parser._optionals._group_actions[:] = ungrouped


def parse_config(
    config_class: type[Config], argv: Sequence[str] | None, *, description: str, defaults: dict[str, Any] | None = None
) -> Config:
    """A validated ``config_class`` from a command line: class defaults < ``defaults`` < the YAML file of ``--config`` <
    flags.

    Every dataclass field is a flag, with dashes or underscores. Raises ValueError for a setting that is unknown or out
    of range.
    """
    parser = _Parser(
        cast(Any, config_class),
        prog=_program(),
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _group(parser, getattr(config_class, "SECTIONS", {}))
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags override it.")
    arguments = sys.argv[1:] if argv is None else list(argv)
    config_file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_file.add_argument("--config")
    path = config_file.parse_known_args(arguments)[0].config
    settings = _as_arguments(defaults or {}, "defaults", config_class)
    if path:
        settings += _as_arguments(read_settings(path), path, config_class)
    values = vars(parser.parse_args(settings + arguments))
    values.pop("config")
    return config_class(**values)


def checked_config(config_class: type[Config], settings: dict[str, Any], source: str) -> Config:
    """A validated ``config_class`` from settings as a YAML file has them. Its errors begin with ``source``."""
    arguments = _as_arguments(settings, source, config_class)
    try:
        return config_class(**vars(_Parser(cast(Any, config_class), allow_abbrev=False).parse_args(arguments)))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command line; bad input becomes one line on stderr and exit status 2 instead of a traceback.

    Of several processes on a machine, which find the same, one says it.
    """
    logging.disable_progress_bar()  # transformers' bars for single files would break the ones of the stages
    try:
        command(argv)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:  # its text, where it has one, says what is left
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0


def run_process(command: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a command as a process of its own, which it may set up for itself."""
    processor.prepare()
    sys.exit(run_command(command))

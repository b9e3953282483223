"""What the command line names: checkpoints, rewards and metrics, as texts, and what they become.

CKPT      [NAME=]FOLDER, a checkpoint folder, a hub id, BASE+ADAPTER, or a run folder, whose policy/ is meant
METRIC    loss=FILE              demonstrations: nats per response token
          proxy_reward=REWARD    a reward folder, module:function or FILE.py:function; gold_reward= likewise
          reward/NAME=REWARD     a further one
          kl=CKPT                exact KL to a model, nats per response; kl/NAME=CKPT gives it a name
          entropy                with response_length measured beside every reward and KL
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NoReturn

from analysis import metrics
from analysis.exploration import policy_of
from analysis.metrics import Metric
from rlhf.data import load_examples
from rlhf.models import load_tokenizer, require_language_model, require_same_tokenizer
from rlhf.reference import load_model_reference
from rlhf.rewards import Reward, load_reward
from soupkit.options import parse_device

REWARDS = ("proxy_reward", "gold_reward")
# A name before "=": what has a slash or a plus is the start of a path that contains "=".
_NAMED = re.compile(r"([\w. -]+)=(.+)")
METRICS_HELP = "loss=FILE, proxy_reward=REWARD, gold_reward=REWARD, reward/NAME=REWARD, kl=CKPT, kl/NAME=CKPT, entropy"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are reported in one line like any other bad input."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)


class Checked(argparse.Action):
    """Stores what ``parse`` makes of a text; its ValueError is told with the flag as it was typed."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, parse: Callable[[str], Any], **settings: Any
    ) -> None:
        super().__init__(option_strings, dest, **settings)
        self.parse = parse

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value, or raise ValueError."""
        try:
            setattr(namespace, self.dest, self.parse(values))
        except ValueError as error:
            raise ValueError(f"{option_string} {values}: {error}") from None


def whole_number(least: int) -> Callable[[str], int]:
    """A parser of whole numbers that are at least this."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"is no whole number; give one of {least} or more") from None
        if value < least:
            raise ValueError(f"must be at least {least}")
        return value

    return parse


def real_number(least: float, *, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers that are at least this, or with ``above`` greater."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value < math.inf or (value == least and not above)):
            raise ValueError(f"must be a finite number {'greater than' if above else 'of at least'} {least:g}")
        return value

    return parse


def device_name(text: str) -> str:
    """The name of a device that torch has here, or ValueError."""
    try:
        parse_device(text)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"device {text!r}").lstrip(": ")) from None
    return text


def named_texts(texts: Sequence[str], what: str) -> dict[str, str]:
    """{name: folder} of ``[NAME=]FOLDER`` texts, by default named by the folder's last part."""
    named: dict[str, str] = {}
    for text in texts:
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        name, folder = match.groups() if match else (Path(text).resolve().name, text)
        if name in named:
            raise ValueError(f"{text}: a second {what} called {name!r}; give it another name, NAME={folder}")
        named[name] = folder
    return named


def read_checkpoints(texts: Sequence[str]) -> dict[str, str]:
    """{name: folder} of ``[NAME=]FOLDER`` texts; of a run folder, its policy.

    Raises FileNotFoundError for a folder that is absent or no checkpoint, ValueError for a name given twice, for a
    reward model and for models whose tokenizers differ.
    """
    named = {name: str(policy_of(folder)) for name, folder in named_texts(texts, "checkpoint").items()}
    for folder in named.values():
        require_language_model(folder)
    for other in list(named.values())[1:]:
        require_same_tokenizer(next(iter(named.values())), other)
    return named


def read_groups(texts: Sequence[str]) -> dict[str, list[str]]:
    """{group: run folders} of ``GROUP=RUN,RUN`` texts, each RUN a folder or a pattern.

    Raises ValueError for a text without a group, FileNotFoundError for what is no run.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        group, _, runs = text.partition("=")
        if not group or not runs:
            raise ValueError(f"--runs {text}: write GROUP=RUN,RUN with the folders of the group's runs")
        for run in runs.split(","):
            found = sorted(glob(run)) or [run]
            groups.setdefault(group, []).extend(map(require_run, found))
    return groups


def require_run(folder: str) -> str:
    """The folder, or FileNotFoundError when it is absent or none of a PPO run."""
    if not (Path(folder) / "config.yaml").is_file() or not (Path(folder) / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder}: no PPO run; expected a folder with config.yaml and metrics.jsonl")
    return folder


def read_rewards(specs: Mapping[str, str], policy: str, device: str) -> dict[str, Reward]:
    """{name: reward} of {name: folder, module:function or FILE.py:function}."""
    return {name: load_reward(spec, policy=policy, device=device) for name, spec in specs.items()}


def read_metrics(
    texts: Sequence[str],
    checkpoint: str,
    prompts: Sequence[Any] | None,
    *,
    device: str,
    batch_size: int,
    keep_examples: bool,
    **sampling: Any,
) -> dict[str, Metric]:
    """Metrics of METRIC texts for models with the tokenizer of ``checkpoint``.

    ``keep_examples`` keeps the losses of single examples, for intervals of barriers; ``sampling`` are the settings of
    :func:`analysis.metrics.sampled`. Raises ValueError for a metric that is unknown or lacks prompts.
    """
    tokenizer = load_tokenizer(checkpoint)
    make_loss = metrics.loss_per_example if keep_examples else metrics.loss
    found: dict[str, Metric] = {}
    rewards: dict[str, str] = {}
    references: dict[str, str] = {}
    by_samples = []
    for text in texts:
        name, _, value = text.partition("=")
        kind, _, own = name.partition("/")
        if kind == "loss" and value:
            _enter(found, name, make_loss(load_examples(value, tokenizer), tokenizer, batch_size=batch_size))
            continue
        by_samples.append(text)
        if (name in REWARDS or (kind == "reward" and own)) and value:
            _enter(rewards, name, value)
        elif kind == "kl" and value:
            folder = str(policy_of(value))
            require_language_model(folder)
            require_same_tokenizer(checkpoint, folder)
            _enter(references, own or Path(value).resolve().name, folder)
        elif text != "entropy":
            raise ValueError(f"--metric {text}: unknown metric; write one of {METRICS_HELP}")
    if by_samples and prompts is None:
        raise ValueError(f"--metric {by_samples[0]}: is measured on sampled responses; give --prompts FILE")
    if by_samples and prompts is not None:
        found["responses"] = metrics.sampled(
            prompts,
            tokenizer,
            rewards=read_rewards(rewards, checkpoint, device),
            references={name: load_model_reference([folder], device=device) for name, folder in references.items()},
            batch_size=batch_size,
            **sampling,
        )
    return found


def _enter(named: dict[str, Any], name: str, value: Any) -> None:
    if name in named:
        raise ValueError(f"--metric {name}: given twice; write {name.partition('/')[0]}/NAME= for a second one")
    named[name] = value

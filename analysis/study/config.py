"""A study's configuration: what a draw is made of, the arms, what is measured and what is compared.

Texts may hold ``{draw}``, the draw's number, ``{NAME}`` of a stage, its folder, and ``{NAME}`` of a model, its path.
``study/reviews.yaml`` is an example with every section.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from analysis.frontier import MIN_EFFECTIVE
from rlhf.command_line import checked_config, read_settings
from rlhf.config import PPOConfig

START = "start"  # the arm that is no run: the policy before training
REWARDS = ("proxy_reward", "gold_reward")  # which have to be measured
OF_SAMPLING = ("policy", "max_new_tokens", "temperature", "engine")  # settings of runs that models are sampled with


@dataclass(frozen=True)
class Measuring:
    """How policies and models are measured.

    episodes  fresh responses to each set of prompts, going round the prompts
    prompts   the training prompts
    held_out  prompts that no training had
    rewards   {name: reward}; ``proxy_reward`` is what PPO optimises, ``gold_reward`` what it should
    models    {name: model, or models whose uniform soup is meant}; measured as they are, too
    kl        names of ``models`` that every policy's KL is measured to
    loss      demonstrations that the models' held-out loss is measured on
    """

    episodes: int
    prompts: str
    held_out: str
    rewards: Mapping[str, str]
    models: Mapping[str, str | list[str]]
    kl: Sequence[str]
    loss: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What is predicted before any run: the ideal frontier of each reference (:mod:`analysis.frontier`).

    references  names of the measured models
    samples     responses to each training prompt
    """

    references: Sequence[str]
    samples: int


@dataclass(frozen=True)
class Comparison:
    """What is compared with what.

    baseline   the arm that the others are compared with, and whose KL is the one that rewards are read at
    treatment  the arm of the claims
    regime     where the claims are tested
    kl_coef    the coefficient at which the baseline's KL is taken, and arms are compared at equal coefficient
    axis       the KL that is primary: ``kl/NAME``
    moved      the KL that says how far a policy moved
    """

    baseline: str
    treatment: str
    regime: str
    kl_coef: float
    axis: str
    moved: str


@dataclass(frozen=True)
class Regime:
    """A variation of the whole: models other than usual, and the arms that are run with them (default: all)."""

    description: str
    models: Mapping[str, str] = field(default_factory=dict)
    arms: Sequence[str] = ()


@dataclass(frozen=True)
class Case:
    """One run. ``kl_coef`` is None for an arm without a reference."""

    regime: str
    draw: int
    arm: str
    kl_coef: float | None

    def __str__(self) -> str:
        beta = "" if self.kl_coef is None else f", β = {self.kl_coef:g}"
        return f"regime {self.regime}, draw {self.draw}, {self.arm}{beta}"


@dataclass(frozen=True)
class Study:
    """The whole. Folders: ``work`` holds draws and runs, and may be deleted; ``results`` the tables and figures.

    stages    {name: a command line without ``python -m`` and ``--output``}, done in this order for every draw; none
              where all draws have the same models
    models    {name: path}
    ppo       settings of every run, those of ``python -m rlhf.ppo``
    arms      {arm: its further settings}
    """

    work: Path
    results: Path
    draws: Sequence[int]
    models: Mapping[str, str]
    ppo: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    kl_coefs: Sequence[float]
    regimes: Mapping[str, Regime]
    measure: Measuring
    compare: Comparison
    stages: Mapping[str, str] = field(default_factory=dict)
    predict: Prediction | None = None
    page: Path | None = None

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """A validated study from YAML. Raises ValueError or FileNotFoundError naming what is wrong."""
        source = str(path)
        values = _checked(cls, read_settings(path), source)
        for name, kind in (("measure", Measuring), ("compare", Comparison), ("predict", Prediction)):
            if values.get(name) is not None:
                values[name] = kind(**_checked(kind, values[name], f"{source}: {name}"))
        for name, settings in values["regimes"].items():
            values["regimes"][name] = Regime(**_checked(Regime, settings, f"{source}: regimes.{name}"))
        values |= {name: Path(values[name]) for name in ("work", "results", "page") if values.get(name)}
        values["arms"] = {arm: {} if settings is None else settings for arm, settings in values["arms"].items()}
        for name, settings in _run_settings(values["ppo"], values["arms"]).items():
            if not isinstance(settings, dict):
                raise ValueError(f"{source}: {name}: expected settings of a run, 'name: value', found {settings!r:.60}")
        study = cls(**values)
        study._check(source)
        return study

    def cases(self) -> Iterator[Case]:
        """All runs, regime by regime and draw by draw, the baseline first."""
        for name, regime in self.regimes.items():
            for draw in self.draws:
                for arm in sorted(regime.arms or self.arms, key=lambda arm: arm != self.compare.baseline):
                    for kl_coef in self.coefficients(arm):
                        yield Case(name, draw, arm, kl_coef)

    def coefficients(self, arm: str) -> Sequence[float | None]:
        """The coefficients that an arm is run with."""
        return [None] if self.arms[arm].get("reference_kind") == "none" else self.kl_coefs

    def draw_folder(self, draw: int) -> Path:
        """Where a draw's stages and runs are."""
        return self.work / f"draw-{draw}"

    def paths(self, draw: int, regime: str | None = None) -> dict[str, str]:
        """What ``{NAME}`` stands for: the draw, the stages' folders, and the models, in a regime's variation."""
        folder = self.draw_folder(draw)
        found = {"draw": str(draw)} | {name: str(folder / name) for name in self.stages}
        models = {**self.models, **(self.regimes[regime].models if regime else {})}
        return found | {name: path.format_map(found) for name, path in models.items()}

    def settings(self, case: Case) -> dict[str, Any]:
        """The settings of ``python -m rlhf.ppo`` for a run, but for its output."""
        own = {} if case.kl_coef is None else {"kl_coef": case.kl_coef}
        return filled({**self.ppo, **self.arms[case.arm], **own}, self.paths(case.draw, case.regime))

    def run_folder(self, case: Case) -> Path:
        """Where a run is. Regimes in which its settings are the same share it."""
        beta = "" if case.kl_coef is None else f"-{case.kl_coef:g}"
        digest = self._digest(self.settings(case))
        return self.draw_folder(case.draw) / "runs" / f"{case.arm.replace(' ', '_')}{beta}-{digest}"

    def version(self, case: Case) -> str:
        """A hash of all settings that a run's results depend on, wherever ``work`` is."""
        measure = filled(asdict(self.measure), self.paths(case.draw, case.regime))
        return self._digest([self.settings(case), self.stages, measure])

    def draw_version(self, draw: int, regime: str) -> str:
        """The same of what is measured of a draw's models."""
        paths = self.paths(draw, regime)
        sampling = {name: self.ppo[name] for name in OF_SAMPLING if name in self.ppo}
        measure = filled([asdict(self.measure), sampling], paths)
        return self._digest([measure, self.stages, None if self.predict is None else asdict(self.predict)])

    def _digest(self, settings: Any) -> str:
        text = json.dumps(settings).replace(json.dumps(str(self.work))[1:-1], "")
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def _check(self, source: str) -> None:
        def require(name: str, given: Sequence[Any], known: Sequence[Any]) -> None:
            for item in given:
                if item not in known:
                    raise ValueError(f"{source}: {name}: {item!r} is none of {list(known)}{_closest(item, known)}")

        for name in ("draws", "models", "arms", "kl_coefs", "regimes"):
            if not getattr(self, name):
                raise ValueError(f"{source}: {name}: empty; give at least one")
        for draw in self.draws:
            _require_whole(f"{source}: draws", draw, least=0)
        for kl_coef in self.kl_coefs:
            if isinstance(kl_coef, bool) or not isinstance(kl_coef, int | float) or not 0 <= kl_coef < math.inf:
                raise ValueError(f"{source}: kl_coefs: {kl_coef!r}: expected a number, at least 0")
        _require_whole(f"{source}: measure.episodes", self.measure.episodes, least=1)
        if self.predict is not None:  # fewer samples never leave enough effective ones
            _require_whole(
                f"{source}: predict.samples", self.predict.samples, least=math.ceil(MIN_EFFECTIVE["prompts"])
            )
        for name in ("draws", "kl_coefs"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{source}: {name}: {list(getattr(self, name))} names one twice")
        if START in self.arms:
            raise ValueError(f"{source}: arms: {START!r} is the policy before training; choose another name")
        if twice := set(self.stages) & set(self.models) | {"draw"} & {*self.stages, *self.models}:
            raise ValueError(f"{source}: {sorted(twice)[0]!r} names two things; choose another name")
        compare = self.compare
        require("compare.regime", [compare.regime], list(self.regimes))
        require("compare.baseline", [compare.baseline], list(self.arms))
        require("compare.treatment", [compare.treatment], list(self.arms))
        require("compare.kl_coef", [compare.kl_coef], self.kl_coefs)
        require("measure.kl", self.measure.kl, list(self.measure.models))
        require("compare.axis", [compare.axis, compare.moved], [f"kl/{name}" for name in self.measure.kl])
        for name in REWARDS:
            if name not in self.measure.rewards:
                raise ValueError(f"{source}: measure.rewards: lacks {name!r}; {' and '.join(REWARDS)} are needed")
        require("predict.references", self.predict.references if self.predict else [], list(self.measure.models))
        for name, regime in self.regimes.items():
            require(f"regimes.{name}.arms", regime.arms, list(self.arms))
            require(f"regimes.{name}.models", list(regime.models), list(self.models))
            if regime.arms and compare.baseline not in regime.arms:
                raise ValueError(f"{source}: regimes.{name}.arms: lacks {compare.baseline!r}, the baseline; add it")
        for setting in ("policy", "reward", "prompts", "max_new_tokens", "seed"):
            if setting not in self.ppo:
                raise ValueError(f"{source}: ppo: lacks {setting!r}; every run needs it")
        for name, settings in _run_settings(self.ppo, self.arms).items():
            for setting in ("output", "resume", "config"):
                if setting in settings:
                    raise ValueError(f"{source}: {name}: {setting!r} is set by the study; leave it out")
            if "kl_coef" in settings and settings.get("reference_kind") != "none":
                raise ValueError(f"{source}: {name}: 'kl_coef' is set by the study, from kl_coefs; leave it out")
        for case in self.cases():  # every placeholder, before anything is made
            self._fill(source, case)
        for case in {(case.arm, case.kl_coef): case for case in self.cases()}.values():  # and every setting of a run
            checked_config(PPOConfig, self.settings(case) | {"output": "run"}, f"{source}: ppo, with arms.{case.arm}")

    def _fill(self, source: str, case: Case) -> None:
        """Fill every text of a case. Raises ValueError that says where one holds an unknown ``{NAME}``."""
        where = "models"
        try:
            paths = self.paths(case.draw, case.regime)
            where = f"ppo, with arms.{case.arm}"
            self.settings(case)
            where = "measure"
            filled(asdict(self.measure), paths)
            known = {"draw": str(case.draw)}
            for name, command in self.stages.items():
                where = f"stages.{name}"
                known_here = known | {model: "" for model, path in self.models.items() if _is_filled(path, known)}
                filled(shlex.split(command), known_here)
                known[name] = ""
        except KeyError as error:
            unknown, known_names = error.args[0], ["draw", *self.stages, *self.models]
            raise ValueError(
                f"{source}: {where}: {{{unknown}}} is neither draw, nor an earlier stage, nor a model"
                f"{_closest(unknown, [name for name in known_names if name != unknown])}"
            ) from None


def filled(value: Any, paths: Mapping[str, str]) -> Any:
    """A setting with every ``{NAME}`` in its texts replaced. Raises KeyError for an unknown one."""
    if isinstance(value, str):
        return value.format_map(paths)
    if isinstance(value, Mapping):
        return {name: filled(item, paths) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled(item, paths) for item in value]
    return value


def _checked(section: type, settings: Any, source: str) -> dict[str, Any]:
    """A section's settings, whose names are its fields; lists where lists are meant, and mappings likewise."""
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: expected 'name: value' lines, found {settings!r:.60}")
    known = {f.name: f for f in fields(section)}
    for name in settings:
        if name not in known:
            raise ValueError(f"{source}: unknown setting {name!r}{_closest(name, list(known))}")
    for name, f in known.items():
        if name not in settings:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"{source}: lacks {name!r}; study/reviews.yaml is an example")
            continue
        for meant, kind in (("Sequence", list), ("Mapping", dict)):
            if str(f.type).startswith(meant) and not isinstance(settings[name], kind):
                raise ValueError(f"{source}: {name}: expected a {kind.__name__}, found {settings[name]!r:.60}")
    return dict(settings)


def _run_settings(ppo: Any, arms: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that hold settings of runs, by what they are called in the file."""
    return {"ppo": ppo} | {f"arms.{arm}": settings for arm, settings in arms.items()}


def _require_whole(name: str, value: Any, *, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: {value!r}: expected a whole number, at least {least}")


def _is_filled(text: str, paths: Mapping[str, str]) -> bool:
    try:
        text.format_map(paths)
    except KeyError:
        return False
    return True


def _closest(item: Any, known: Sequence[Any]) -> str:
    close = difflib.get_close_matches(str(item), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

"""Settings: precedence, one-line errors, and every one of them in use."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from rlhf import ppo, reward_model, sft
from rlhf.command_line import parse_config, read_settings, run_command
from rlhf.config import PPOConfig
from rlhf.reward_model import RewardModelConfig
from rlhf.sft import SFTConfig

STAGE = ("stage", "stage_folder", "training")
NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


def parse(*argv: str, **defaults: Any) -> PPOConfig:
    return parse_config(PPOConfig, argv, description=None, defaults=defaults)


def test_flags_override_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 2\nupdates: 20\nreference: [x, y]\n", encoding="utf-8")
    config = parse("--config", str(path), "--updates", "30", seed=1, gamma=0.5, updates=10)
    assert (config.updates, config.seed, config.gamma, config.gae_lambda) == (30, 2, 0.5, 0.95)
    assert config.reference == ["x", "y"]
    assert parse("--seed", "3", "--config", str(path), "--reference", "z").reference == ["z"]


def test_values_of_a_file_are_converted_like_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 3e-4\nwhiten_rewards: true\nwhiten_advantages: false\nreference_weights: [1, 2]\n"
        "kl_target:\ntrack_kl: []\npolicy: models/a b\nreward: m:f\nmicro_batch_size: 8\n",
        encoding="utf-8",
    )
    config = parse("--config", str(path))
    assert config.learning_rate == 3e-4  # text, for YAML 1.1
    assert (config.whiten_rewards, config.whiten_advantages) == (True, False)
    assert config.reference_weights == [1.0, 2.0]
    assert (config.kl_target, config.track_kl, config.micro_batch_size) == (None, [], 8)
    assert (config.policy, config.reward) == ("models/a b", ["m:f"])


def test_dashes_underscores_and_switches() -> None:
    for flags in (["--batch-size", "4", "--minibatch-size", "2"], ["--batch_size=4", "--minibatch_size=2"]):
        assert (parse(*flags).batch_size, parse(*flags).minibatch_size) == (4, 2)
    assert parse("--whiten_rewards").whiten_rewards
    assert not parse("--no_whiten_advantages").whiten_advantages


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    config = parse(
        "--reference",
        "a",
        "b",
        "--reference-weights",
        "1",
        "2",
        "--kl-control",
        "target",
        "--kl-target",
        "6",
        "--updates",
        "7",
    )
    config.save(tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    assert parse(**read_settings(tmp_path / "config.yaml")) == config
    default = PPOConfig()
    default.save(tmp_path / "default.yaml")
    assert parse("--config", str(tmp_path / "default.yaml")) == default


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--updates", "0"], "updates=0: must be greater than 0"),
        (["--batch-size", "-4"], "batch_size=-4: must be greater than 0"),
        (["--ppo-epochs", "0"], "ppo_epochs=0"),
        (["--minibatch-size", "0"], "minibatch_size=0: must be greater than 0"),
        (["--minibatch-size", "48"], "minibatch_size=48 does not divide batch_size=64; choose a divisor"),
        (["--minibatch-size", "128"], "minibatch_size=128 does not divide batch_size=64"),
        (["--micro-batch-size", "5"], "micro_batch_size=5 does not divide minibatch_size=32; choose a divisor"),
        (["--micro-batch-size", "0"], "micro_batch_size=0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--temperature", "0"], r"temperature=0\.0: must be greater than 0"),
        (["--temperature", "nan"], "temperature=nan: must be greater than 0"),
        (["--kl-coef", "-0.1"], r"kl_coef=-0\.1: must be finite and not negative"),
        (["--kl-target", "0"], r"kl_target=0\.0: must be greater than 0 and finite"),
        (["--kl-horizon", "0"], "kl_horizon=0"),
        (["--gamma", "1.1"], r"gamma=1\.1: must lie between 0 and 1"),
        (["--gae-lambda", "-0.5"], r"gae_lambda=-0\.5: must lie between 0 and 1"),
        (["--clip-range", "0"], r"clip_range=0\.0"),
        (["--clip-range-value", "-1"], r"clip_range_value=-1\.0"),
        (["--missing-eos-penalty", "-1"], r"missing_eos_penalty=-1\.0: must be finite and not negative"),
        (["--value-init", "zero"], "value_init='zero': must be auto, reward or policy"),
        (["--value-model", "none"], "value_model='none': must be separate or shared"),
        (["--reference-kind", "mean"], "reference_kind='mean': must be soup, weighted_kl, mixture, moving_average or"),
        (["--kl-in", "loss"], "kl_in=loss: k1 has no gradient in expectation there; use kl_estimator exact, k2 or k3"),
        (["--kl-in", "both", "--kl-estimator", "k3"], "kl_in=both counts k3 twice; use kl_estimator=exact"),
        (["--kl-target", "3"], r"kl_control=fixed, kl_target=3\.0: give a target"),
        (["--kl-control", "target"], "kl_control=target, kl_target=None: give a target"),
        (["--top-p", "1.5"], r"top_p=1\.5: must lie between 0 and 1"),
        (["--max-ratio", "0"], r"max_ratio=0\.0"),
        (["--early-stop-kl", "0"], r"early_stop_kl=0\.0"),
        (["--reference-decay", "2"], r"reference_decay=2\.0"),
        (["--learning-rate", "0"], r"learning_rate=0\.0"),
        (["--value-learning-rate", "nan"], "value_learning_rate=nan"),
        (["--warmup-updates", "-1"], "warmup_updates=-1"),
        (["--final-lr-fraction", "2"], r"final_lr_fraction=2\.0"),
        (["--adam-beta1", "1.5"], r"adam_beta1=1\.5"),
        (["--adam-beta2", "-0.1"], r"adam_beta2=-0\.1"),
        (["--adam-eps", "0"], r"adam_eps=0\.0"),
        (["--max-grad-norm", "0"], r"max_grad_norm=0\.0"),
        (["--eval-episodes", "0"], "eval_episodes=0"),
        (["--num-samples", "-1"], "num_samples=-1"),
        (["--save-every", "-1"], "save_every=-1"),
        (["--keep", "0"], "keep=0"),
        (["--seed", "-1"], "seed=-1: must be finite and not negative"),
        (["--temperature", "inf"], "temperature=inf: must be greater than 0 and finite"),
        (["--resume"], "resume: say which run to go on with, by --output FOLDER"),
        (["--updates", "many"], "--updates: invalid int value: 'many'"),
        (["--reference-weights", "1", "half"], "invalid float value: 'half'"),
        (["--update", "3"], "--update"),  # no abbreviations: a new setting would change what they mean
        (["--no-such-flag", "3"], "--no-such-flag"),
        (["--config", "absent.yaml"], r"absent\.yaml: no such configuration file"),
    ],
)
def test_settings_out_of_range_are_named(flags: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        parse(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_coeff: 0.1", r"run\.yaml: unknown setting 'kl_coeff'; did you mean 'kl_coef'\?"),
        ("zzz: 0.1", r"run\.yaml: unknown setting 'zzz'"),
        ("config: other.yaml", r"run\.yaml: unknown setting 'config'"),
        ("updates: many", "--updates: invalid int value: 'many'"),
        ("updates: [1, 2]", "unrecognized arguments: 2"),
        ("updates: 0", "updates=0: must be greater than 0"),
        ("- updates", r"run\.yaml: expected 'name: value' lines, found list"),
        ("just text", r"run\.yaml: expected 'name: value' lines, found str"),
        ("a: [1, 2", r"run\.yaml: not valid YAML"),
        ("{", r"run\.yaml: not valid YAML"),
        ("updates: 1\nseed: 2\nupdates: 3", r"run\.yaml: key 'updates' occurs twice: keep one"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        parse("--config", str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", [SFTConfig, RewardModelConfig])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "required: --model, --data, --output"),
        ([*NEEDED, "--epochs", "0"], r"epochs=0\.0: must be greater than 0"),
        ([*NEEDED, "--batch-size", "0"], "batch_size=0"),
        ([*NEEDED, "--micro-batch-size", "0"], "micro_batch_size=0: must be at least 1"),
        ([*NEEDED, "--learning-rate", "-1"], r"learning_rate=-1\.0"),
        ([*NEEDED, "--warmup-fraction", "1"], r"warmup_fraction=1\.0: must be at least 0 and below 1"),
        ([*NEEDED, "--adam-beta1", "1"], r"adam_beta1=1\.0"),
        ([*NEEDED, "--adam-beta2", "-1"], r"adam_beta2=-1\.0"),
        ([*NEEDED, "--weight-decay", "nan"], "weight_decay=nan"),
        ([*NEEDED, "--max-grad-norm", "0"], r"max_grad_norm=0\.0"),
        ([*NEEDED, "--seed", "-1"], "seed=-1: must not be negative"),
    ],
)
def test_the_other_stages_check_theirs(config_class: type, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_config(config_class, flags, description=None)
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: Sequence[str] | None) -> None:
        raise ValueError(f"{argv}: wrong")

    assert run_command(command, ["x"]) == 2
    assert capsys.readouterr() == ("", "error: ['x']: wrong\n")
    assert run_command(lambda argv: None, []) == 0
    with pytest.raises(KeyError):  # a defect of ours is not dressed up as bad input
        run_command(lambda argv: {}["x"], [])


@pytest.mark.parametrize(
    ("config_class", "main"), [(PPOConfig, ppo.main), (SFTConfig, sft.main), (RewardModelConfig, reward_model.main)]
)
def test_help_explains_every_setting_and_shows_every_default(
    config_class: Any, main: Callable[[Sequence[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for field in fields(config_class):
        assert len(field.metadata["help"]) > 15, field.name
    with pytest.raises(SystemExit) as exit_status:
        main(["--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    shown = re.sub(r"\s+", " ", text)
    for field in fields(config_class):
        assert f"--{field.name}" in shown
        if field.default not in (MISSING, None):
            assert f"(default: {field.default})" in shown


def settings_read(*modules: str) -> set[str]:
    """Attributes read off something called ``config`` in these modules, or in a config's own properties."""
    names: set[str] = set()
    for module in modules:
        tree = ast.parse((ROOT / "rlhf" / f"{module}.py").read_text(encoding="utf-8"))
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
        skipped = {id(inner) for node in classes for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in skipped:
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
                if name == "config":
                    names.add(node.attr)
        names |= {
            node.attr
            for config in classes
            for method in config.body
            if isinstance(method, ast.FunctionDef) and "property" in map(ast.unparse, method.decorator_list)
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
        }
    return names


@pytest.mark.parametrize(
    ("config_class", "modules"),
    [
        (PPOConfig, ("ppo", "setup", "run_folder", "config")),
        (SFTConfig, ("sft", *STAGE)),
        (RewardModelConfig, ("reward_model", *STAGE)),
    ],
)
def test_every_setting_is_read_somewhere(config_class: Any, modules: tuple[str, ...]) -> None:
    unread = {field.name for field in fields(config_class)} - settings_read(*modules)
    assert not unread


def test_list_defaults_are_not_shared() -> None:
    PPOConfig().reference.append("x")
    assert PPOConfig().reference == []
    assert asdict(PPOConfig()) == asdict(parse())

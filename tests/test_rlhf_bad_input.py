"""Bad input ends in one line that names the offender, exit status 2, before any long work, with nothing written."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXT, ROOT, ppo_arguments
from safetensors.torch import load_file, save_file

from rlhf import ppo, processor, reward_model, sft
from rlhf.command_line import run_command

Place = Callable[[str], str]


@pytest.fixture(scope="module")
def place(checkpoints: dict[str, Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Paths by name: the checkpoints, and broken folders and files made here."""
    root = tmp_path_factory.mktemp("broken")
    paths = {name: str(path) for name, path in checkpoints.items()} | {"prompts": str(prompt_file)}

    def broken_copy(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        folder = shutil.copytree(checkpoints["first"], root / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        paths[name] = str(folder)

    broken_copy("lacking", lambda tensors: tensors.pop("model.norm.weight"))
    broken_copy("misshapen", lambda tensors: tensors.update({"model.norm.weight": torch.ones(15)}))
    broken_copy("renamed", lambda tensors: tensors.update({"model.extra.weight": tensors.pop("model.norm.weight")}))
    weightless = shutil.copytree(checkpoints["first"], root / "weightless")
    (weightless / "model.safetensors").unlink()
    torn = shutil.copytree(checkpoints["first"], root / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-500])
    paths |= {"weightless": str(weightless), "torn": str(torn)}

    files = {
        "empty.txt": "\n \n",
        "one.txt": "a b\n",
        "long.txt": "a b\n" + "c " * (CONTEXT - 6) + "\n",
        "rows.jsonl": json.dumps({"prompt": "a"}) + "\n" + json.dumps({"text": "b"}) + "\n",
        "garbled.jsonl": '{"prompt": "a"}\n{"prompt": \n',
        "unknown.yaml": "learning_rates: 0.1\n",
        "recipe.yaml": f"method: slerp\nmodels: [{paths['first']}, {paths['second']}]\nparameters: {{t: 0.5}}\n",
    }
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
        paths[name] = str(root / name)
    existing = root / "existing"
    existing.mkdir()
    return lambda name: paths.get(name, str(root / name))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error on stderr; progress bars of loading may come before it, and nothing after."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in re.split(r"[\r\n]+", captured.err) if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in captured.err
    return lines[-1]


# changed settings (@NAME is a path, see `place`), and what the line must say
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"reference": ["@reward"]},
        r"reward: a reward model \(LlamaForSequenceClassification\), but a language model is exp",
    ),
    ({"policy": "@reward"}, "reward: a reward model .*, but a language model is expected"),
    ({"output": "@one.txt/run"}, "one.txt/run: cannot be made, .*one.txt is no writable folder"),
    ({"reward": None}, "--policy, --reward and --prompts belong together"),
    ({"prompts": None}, "--policy, --reward and --prompts belong together"),
    ({"policy": "@absent"}, "absent: no such folder"),
    ({"reference": ["@first", "@absent"]}, "absent: no such folder"),
    ({"track_kl": ["@absent"]}, "absent: no such folder"),
    ({"policy": "@weightless"}, "weightless"),
    ({"policy": "@torn"}, "torn"),
    ({"policy": "@lacking"}, r"lacking.*model\.norm\.weight"),
    ({"policy": "@misshapen"}, r"misshapen.*model\.norm\.weight"),
    ({"policy": "@no_eos"}, "no_eos: its tokenizer has no end-of-sequence token"),
    ({"reference": ["@lacking"]}, r"lacking.*model\.norm\.weight"),
    ({"reference": ["@first", "@lacking"]}, r"^(?=.*/first\b)(?=.*/lacking\b).*model\.norm\.weight"),
    ({"reference": ["@first", "@renamed"]}, r"^(?=.*/first\b)(?=.*/renamed\b).*model\.(norm|extra)\.weight"),
    ({"reference": ["@first", "@misshapen"]}, r"^(?=.*/first\b)(?=.*/misshapen\b).*model\.norm\.weight"),
    ({"reference": ["@first", "@torn"]}, "torn"),
    ({"reference": ["@first", "@wider"]}, r"^(?=.*/first\b).*/wider\b"),
    ({"reference": ["@first", "@shallower"]}, r"^(?=.*/first\b).*/shallower\b"),
    ({"reference": ["@larger_vocabulary"]}, "larger_vocabulary: vocabulary of 21 tokens, but .*first has 20"),
    ({"reference": ["@first", "@larger_vocabulary"]}, "larger_vocabulary: vocabulary of 21 tokens, but .*first has 20"),
    ({"reference": ["@reordered_vocabulary"]}, "reordered_vocabulary: its tokenizer differs from that of .*first"),
    ({"reference": ["@other_eos"]}, "other_eos: end-of-sequence token 'n', but .*first has '<eos>'"),
    ({"track_kl": ["@reordered_vocabulary"]}, "reordered_vocabulary: its tokenizer differs from that of .*first"),
    ({"reference": ["@first", "@second"], "reference_weights": [1]}, "weight"),
    ({"reference": ["@first", "@second"], "reference_weights": [1, 1, 1]}, "weight"),
    ({"reference": ["@first", "@second"], "reference_weights": [1, -1]}, "-1"),
    ({"reference": ["@first", "@second"], "reference_weights": [0, 0]}, "weights"),
    ({"reference": ["@first", "@first"], "reference_kind": "mixture"}, "names a model twice"),
    (
        {"reference": ["@first", "@second"], "reference_kind": "weighted_kl", "reference_weights": [1]},
        "1 weights for 2",
    ),
    ({"reference_kind": "none", "reference_weights": [1]}, "reference_kind=none takes no reference_weights"),
    ({"reference": ["@recipe.yaml", "@first"]}, "recipe.yaml: a recipe is a whole reference by itself"),
    ({"reference": ["@absent.yaml"]}, "absent.yaml"),
    ({"reference_weights": [1, 1]}, "weight"),
    ({"reward": "@larger_vocabulary"}, "larger_vocabulary: vocabulary of 21 tokens"),
    ({"reward": "@reordered_vocabulary"}, "reordered_vocabulary: its tokenizer differs"),
    ({"reward": "@absent"}, "reward .*absent: neither a checkpoint folder nor module:function"),
    ({"reward": "@first"}, "first: a language model, without a reward head; train one"),
    ({"reward": "no_module:f"}, "reward no_module:f: cannot import 'no_module'"),
    ({"reward": "helpers:no_function"}, "module helpers has no function 'no_function'"),
    ({"gold_reward": "helpers:no_function"}, "module helpers has no function 'no_function'"),
    ({"prompts": "@absent.txt"}, r"absent\.txt: no such file"),
    ({"prompts": "@empty.txt"}, r"empty\.txt: no prompts"),
    ({"prompts": "@one.txt"}, r"one\.txt: one prompt cannot be split; add prompts, or give --test[-_]prompts"),
    ({"prompts": "@long.txt"}, rf"long\.txt:2: prompt of {CONTEXT - 5} tokens, but only {CONTEXT - 6} fit"),
    ({"test_prompts": "@long.txt"}, r"long\.txt:2: prompt of"),
    ({"test_prompts": "@empty.txt"}, r"empty\.txt: no prompts"),
    ({"prompts": "@rows.jsonl"}, r"rows\.jsonl:2: has neither a string prompt nor a list messages"),
    ({"prompts": "@garbled.jsonl"}, r"garbled\.jsonl:2: not JSON"),
    ({"max_new_tokens": CONTEXT}, "max_new_tokens|prompt of"),
    ({"minibatch_size": 3}, "minibatch_size=3 does not divide batch_size=8; choose a divisor"),
    ({"updates": 0}, "updates=0: must be greater than 0"),
    ({"updates": "many"}, "invalid int value: 'many'"),
    ({"no_such_setting": 1}, "no_such_setting"),
    ({"config": "@unknown.yaml"}, r"unknown\.yaml: unknown setting 'learning_rates'; did you mean 'learning_rate'\?"),
    ({"config": "@absent.yaml"}, r"absent\.yaml: no such configuration file"),
    ({"value_init": "reward"}, "value_init=reward, but helpers:share_of_a is no reward-model folder"),
    ({"resume": True}, r"run: no run to resume|run/config\.yaml: no such"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_ppo_refuses(
    checkpoints: dict[str, Path],
    prompt_file: Path,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    def located(value: Any) -> Any:
        if isinstance(value, list):
            return [located(item) for item in value]
        return place(value[1:]) if str(value).startswith("@") else value

    monkeypatch.setattr(ppo, "sample", lambda *args, **kwargs: pytest.fail("sampled before all input was checked"))
    output = tmp_path / "runs" / "run"
    arguments = ppo_arguments(checkpoints, prompt_file, output, **{n: located(v) for n, v in changes.items()})
    assert run_command(ppo.main, arguments) == 2
    assert re.search(message, error_line(capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("helpers:one_too_few", r"reward helpers:one_too_few: returned shape \(\d,\) for 2 responses"),
        ("helpers:nan_for_second", "reward helpers:nan_for_second: returned nan for prompt '[a-n ]+' and response '"),
    ],
)
@pytest.mark.parametrize("which", ["reward", "gold_reward"])
def test_a_broken_reward_is_found_before_training_and_leaves_nothing(
    checkpoints: dict[str, Path],
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    which: str,
    reward: str,
    message: str,
) -> None:
    monkeypatch.setattr(ppo, "evaluate_policy", lambda *args: pytest.fail("sampled for a broken reward"))
    arguments = ppo_arguments(checkpoints, prompt_file, tmp_path / "run", **{which: reward})
    assert run_command(ppo.main, arguments) == 2
    assert re.search(message, error_line(capsys))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_refused_and_left_alone(
    checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    mains = (ppo.main, sft.main, reward_model.main)
    stage = ["--model", str(checkpoints["first"]), "--data", "unused.jsonl", "--output", str(tmp_path / "run")]
    for main in mains:
        arguments = ppo_arguments(checkpoints, prompt_file, tmp_path / "run") if main is ppo.main else stage
        assert run_command(main, arguments) == 2
        assert re.search("run: exists already; choose another --output or remove it", error_line(capsys))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_finished_run_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("updates: 3\n", encoding="utf-8")
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    assert run_command(ppo.main, ["--output", str(tmp_path), "--resume"]) == 2
    assert "this run is finished" in error_line(capsys)


@pytest.mark.parametrize("main", [sft.main, reward_model.main])
@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("absent", "rows.jsonl", "absent: no such folder"),
        ("lacking", "rows.jsonl", "rows.jsonl|lacking"),
        ("first", "absent.jsonl", r"absent\.jsonl: no such file"),
        ("first", "empty.txt", r"empty\.txt: no (examples|pairs)"),
        ("first", "garbled.jsonl", r"garbled\.jsonl:"),
        ("first", "rows.jsonl", r"rows\.jsonl:1: field '(response|chosen)' must be a non-empty string; found None"),
    ],
)
def test_the_other_stages_refuse(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any, model: str, data: str, message: str
) -> None:
    arguments = ["--model", place(model), "--data", place(data), "--output", str(tmp_path / "out")]
    assert run_command(main, arguments) == 2
    assert re.search(message, error_line(capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "graph"}, "engine=graph: needs a GPU, and this is a cpu; use engine=decode"),
        (
            {"reference_device": "foo"},
            r"reference_device=foo: cannot be used here \(.+\); leave it out, or name another",
        ),
    ],
)
def test_devices_that_are_not_there(
    settings: dict[str, str],
    message: str,
    checkpoints: dict[str, Path],
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ppo_arguments(checkpoints, prompt_file, tmp_path / "run", **settings)
    assert run_command(ppo.main, arguments) == 2
    assert re.search(message, error_line(capsys))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(ppo.main, ["--output", str(tmp_path), "--resume"]) == 2
    assert "no run to resume (no config.yaml); start it without --resume" in error_line(capsys)


def test_the_command_exits_with_status_two_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = []
    monkeypatch.setattr(processor, "prepare", lambda: prepared.append(True))  # it would stay so for all tests to come
    monkeypatch.setattr("sys.argv", ["ppo.py", "--minibatch-size", "7", "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as exit_status:
        runpy.run_path(str(ROOT / "rlhf" / "ppo.py"), run_name="__main__")
    assert exit_status.value.code == 2
    assert prepared
    message = (
        "minibatch_size=7 does not divide batch_size=64; choose a divisor, so that every episode counts once an epoch"
    )
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []

"""``python -m analysis`` measures, writes folders that are whole or absent, and tells bad input in one line."""

from __future__ import annotations

import json
import os
import shutil
from argparse import _SubParsersAction
from collections.abc import Sequence
from errno import ENOENT
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import interrupted_at, ppo_arguments, run_python
from matplotlib.figure import Figure

import analysis.points
import rlhf.models
import rlhf.ppo
import soupkit
from analysis import Hessian, IdealFrontier, KLGeometry, KLMatrix, Line, Plane, RewardKLFrontier
from analysis.__main__ import _parser, main
from analysis.divergence import Samples
from analysis.inputs import read_checkpoints
from analysis.metrics import measure
from rlhf.command_line import run_command

SAMPLING = ["--max_new_tokens", "5", "--num_prompts", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    rows = [{"prompt": f"{a} b", "response": f"c {a}"} for a in "adefgh"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two groups of one run."""
    root = tmp_path_factory.mktemp("runs")
    first, second = checkpoints["first"], checkpoints["second"]
    for name, reference in (("plain", [first]), ("soup", [first, second])):
        settings: dict[str, Any] = {"reference": reference, "track_kl": second, "updates": 1, "eval_episodes": 8}
        settings["gold_reward"] = "helpers:count_words"
        rlhf.ppo.main(ppo_arguments(checkpoints, prompt_file, root / f"{name}-0", **settings))
    return {name: root / f"{name}-0" for name in ("plain", "soup")}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered, which takes longest."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


def run(*arguments: object) -> int:
    return run_command(main, [*map(str, arguments), *([] if arguments[0] == "report" else ["--quiet"])])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that bad input ends in."""
    capsys.readouterr()
    assert run(*arguments) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pictures(*names: str) -> set[str]:
    return {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}


def test_names_stand_before_folders_but_a_folder_may_have_an_equals_sign(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=0.1", "run/policy"):
        shutil.copytree(checkpoints["first"], folder)
    found = read_checkpoints([str(checkpoints["first"]), "my.v2=lr=0.1", "lr=0.1", "run"])
    assert found == {
        "first": str(checkpoints["first"]), "my.v2": "lr=0.1", "lr=0.1": "lr=0.1", "run": "run/policy",
    }  # fmt: skip


def test_line_measures_draws_and_tabulates(
    checkpoints: dict[str, Path], data: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, end = checkpoints["first"], checkpoints["second"]
    metrics = [f"loss={data}", "gold_reward=helpers:count_words", f"kl={end}", f"kl/start={start}"]
    sampling = ["--prompts", prompt_file, *SAMPLING, "--steps", "3"]
    assert run("line", start, f"other={end}", "--metric", *metrics, *sampling, "--output", tmp_path / "line") == 0
    names = ["loss", "gold_reward", "kl-second", "kl-start", "entropy", "response_length"]
    assert files_of(tmp_path) == {"line"}
    assert files_of(tmp_path / "line") == {"line.npz", "line.json", "tables.md", *pictures(*names)}
    path = Line.load(tmp_path / "line" / "line.npz")
    assert (path.names, path.t.tolist()) == (["first", "other"], [0, 0.5, 1])
    assert path.at["first"]["kl/start"].mean == pytest.approx(0, abs=1e-6)
    assert path.at["other"]["kl/second"].mean == pytest.approx(0, abs=1e-6)
    numbers = json.loads((tmp_path / "line" / "line.json").read_text(encoding="utf-8"))
    assert numbers["values"]["loss"] == path.values["loss"].tolist()
    assert set(numbers["barriers"]) == {"loss", "gold_reward"}
    assert numbers["barriers"]["loss"]["excess"]["low"] < numbers["barriers"]["loss"]["excess"]["high"]
    assert numbers["barriers"]["gold_reward"]["excess"]["low"] is None  # no examples to resample
    shown = capsys.readouterr().out
    assert "| other | " in (tmp_path / "line" / "tables.md").read_text(encoding="utf-8")
    assert "At the checkpoints" in shown
    assert "instability" in shown


@pytest.mark.usefixtures("undrawn")
def test_plane_marks_a_soup_and_goes_on_after_an_interrupt(
    checkpoints: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soup = soupkit.average([checkpoints["first"], checkpoints["second"]], out=tmp_path / "soup", progress=False)
    models = [checkpoints[name] for name in ("first", "second", "third")]
    command = ["plane", *models, "--mark", soup, "--metric", f"loss={data}", "--steps", "2", "--output"]
    assert run(*command, tmp_path / "whole") == 0
    assert files_of(tmp_path / "whole") == {
        "plane.npz", "plane.json", "tables.md", *pictures("loss", "loss-surface"),
    }  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(analysis.points, "measure", interrupted_at(4, measure, []))
        assert run(*command, tmp_path / "cut") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: go on with --resume"
    assert not (tmp_path / "cut").exists()
    unfinished = tmp_path / "cut.unfinished.npz"
    assert Plane.load(unfinished).measurements.done.sum() == 3
    assert "cut.unfinished.npz: what an interrupted command had measured; go on with --resume" in error_of(
        capsys, *command, tmp_path / "cut"
    )
    assert run(*command, tmp_path / "cut", "--resume") == 0
    assert not unfinished.exists()
    whole, resumed = (Plane.load(tmp_path / name / "plane.npz") for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole.values["loss"], resumed.values["loss"])
    assert whole.distance["soup"] == pytest.approx(0, abs=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_kl_gives_the_matrix_and_with_ingredients_the_geometry(
    checkpoints: dict[str, Path],
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [checkpoints[name] for name in ("first", "second", "third")]
    sampling = ["--prompts", prompt_file, *SAMPLING, "--output"]
    assert run("kl", *models, *sampling, tmp_path / "matrix") == 0
    matrix = KLMatrix.load(tmp_path / "matrix" / "kl.npz")
    assert matrix.names == ["first", "second", "third"]
    assert matrix.metadata["num_prompts"] == 4
    assert files_of(tmp_path / "matrix") == {"kl.npz", "kl.json", "tables.md", *pictures("kl")}
    settings = ["--ingredients", "first", "second", "--weights", "1", "3"]
    assert run("kl", *models, *settings, *sampling, tmp_path / "geometry") == 0
    geometry = KLGeometry.load(tmp_path / "geometry" / "kl.npz")
    assert geometry.names == ["first", "second", "third", "soup"]
    assert geometry.weights.tolist() == [0.25, 0.75]
    np.testing.assert_array_equal(geometry.mean[:3, :3], matrix.mean)
    numbers = json.loads((tmp_path / "geometry" / "kl.json").read_text(encoding="utf-8"))
    assert numbers["mean"] == geometry.mean.tolist()
    assert "triangle_gap" in (tmp_path / "geometry" / "tables.md").read_text(encoding="utf-8")

    calls: list[int] = []
    monkeypatch.setattr(Samples, "compare", interrupted_at(2, Samples.compare, calls))
    assert run("kl", *models, *sampling, tmp_path / "cut") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: go on with --resume"
    assert run("kl", *models, *sampling, tmp_path / "cut", "--resume") == 0
    assert len(calls) == 4
    assert not list(tmp_path.glob("*unfinished*"))
    np.testing.assert_array_equal(KLMatrix.load(tmp_path / "cut" / "kl.npz").mean, matrix.mean)


@pytest.mark.usefixtures("undrawn")
def test_frontier_of_references(checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path) -> None:
    references = [checkpoints["first"], checkpoints["second"]]
    rewards = ["--reward", "helpers:share_of_a", "--gold_reward", "helpers:count_words"]
    sampling = ["--prompts", prompt_file, *SAMPLING, "--num_samples", "64"]
    assert run("frontier", *references, *rewards, *sampling, "--output", tmp_path / "ideal") == 0
    own = IdealFrontier.load(tmp_path / "ideal" / "ideal-first.npz")
    assert own.names == ["proxy_reward", "gold_reward", "kl/reference", "kl/first"]
    np.testing.assert_allclose(own["kl/first"].estimate, own["kl/reference"].estimate, atol=1e-4)
    text = (tmp_path / "ideal" / "tables.md").read_text(encoding="utf-8")
    assert text.count("gold_reward at equal kl/reference") == 1  # on the other axis they have no KL in common
    assert "| second − first |" in text
    assert pictures("gold_reward-kl-to-first", "gold_reward-kl-to-own", "second-best-of-n") <= files_of(
        tmp_path / "ideal"
    )


@pytest.mark.usefixtures("undrawn")
def test_frontier_of_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    plain, soup = runs["plain"], runs["soup"]
    groups = [f"plain={plain}", f"soup={soup.parent}/soup-*"]
    assert run("frontier", "--runs", *groups, "--kl_to", "second", "--output", tmp_path / "reached") == 0
    reached = RewardKLFrontier.load(tmp_path / "reached" / "reached.npz")
    assert (reached.names, reached.x, reached.seeds("soup")) == (["plain", "soup"], "kl/second", [0])
    assert files_of(tmp_path / "reached") == {"reached.npz", "frontier.json", "tables.md", *pictures("reached")}


@pytest.mark.usefixtures("undrawn")
def test_curvature(checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    settings = ["--num_eigenvalues", "1", "--num_probes", "1", "--num_examples", "3"]
    assert run("curvature", checkpoints["first"], "--data", data, *settings, "--output", tmp_path / "curvature") == 0
    spectrum = Hessian.load(tmp_path / "curvature" / "hessian.npz")
    numbers = json.loads((tmp_path / "curvature" / "curvature.json").read_text(encoding="utf-8"))
    assert numbers["largest"] == spectrum.largest.tolist()
    assert "loss of 3 examples" in numbers["metadata"]["loss"]


def test_report_of_real_runs(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", *runs.values(), "--output", tmp_path / "report.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("Reached frontier", "reference=first+second", "KL to second", "soup-0", "runs of one seed"):
        assert part in text, part
    assert "unfinished" not in text


def test_bad_input_is_told_in_one_line_and_leaves_nothing(
    checkpoints: dict[str, Path],
    data: Path,
    prompt_file: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second, third = (checkpoints[name] for name in ("first", "second", "third"))
    middle = soupkit.average([first, second], out=tmp_path / "middle", progress=False)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    before = files_of(tmp_path)
    prompts: Sequence[object] = ["--prompts", prompt_file, "--max_new_tokens", "5"]
    loss = ["--metric", f"loss={data}"]
    cases: list[tuple[list[object], str]] = [
        (["line", first, tmp_path / "absent", *loss], "absent: no such folder"),
        (["line", first, *loss], "a line needs at least two"),
        (["line", first, first, *loss], "a second checkpoint called 'first'"),
        (["line", first, f"copy={first}", *loss], "checkpoints 'first' and 'copy' are equal"),
        (["line", first, checkpoints["larger_vocabulary"], *loss], "vocabulary of 21 tokens"),
        (["line", first, second, "--metric", "perplexity=x"], "perplexity=x: unknown metric; write one of loss"),
        (["line", first, second, "--metric", "loss"], "--metric loss: unknown metric"),
        (["line", first, second, *loss, f"loss={data}"], "--metric loss: given twice"),
        (["line", first, second, "--metric", "loss=absent.jsonl"], "absent.jsonl: no such file"),
        (["line", first, second, "--metric", f"kl={third}"], "give --prompts FILE"),
        (["line", first, second, "--metric", "gold_reward=helpers:nothing", *prompts], "has no function 'nothing'"),
        (["line", first, second, "--metric", "entropy", "--prompts", empty, *SAMPLING], "empty.txt: no prompts"),
        (["line", first, second, *loss, "--steps", "1"], "--steps 1: must be at least 2"),
        (["line", first, second, *loss, "--step", "3"], "unrecognized arguments: --step 3"),
        (["plane", first, second, middle, *loss], "checkpoint 'middle': lies on the line through 'first' and 'second'"),
        (["plane", first, second, *loss], "a plane needs three, found 2"),
        (["kl", first, second, "--prompts", empty, *SAMPLING], "no prompts"),
        (["kl", first, *prompts], "a matrix needs at least two"),
        (["kl", first, second, *prompts, "--weights", "1"], "go with --ingredients"),
        (["kl", first, second, *prompts, "--ingredients", "first", "base"], "not among the models"),
        (["kl", first, second, *prompts, "--max_new_tokens", "0"], "must be at least 1"),
        (["kl", first, second, *prompts, "--max_new_tokens", "64"], "leaves no room for a prompt in the 64 tokens"),
        (["frontier"], "give references, for what could be reached"),
        (["frontier", first, *prompts], "--reward: is needed"),
        (["frontier", first, *prompts, "--reward", "helpers:share_of_a", "--kl_to", "x"], "is none of the references"),
        (
            ["frontier", first, *prompts, "--reward", "helpers:share_of_a", "--num_samples", "19"],
            "--num_samples 19: every β would be refused, since each needs 20 effective samples a prompt",
        ),
        (
            ["frontier", first, *prompts, "--reward", "helpers:share_of_a", "--num_prompts", "1"],
            "prompts.txt: one prompt is no sample of prompts; give two or more",
        ),
        (["frontier", "--runs", runs["plain"]], "write GROUP=RUN,RUN"),
        (["frontier", "--runs", f"plain={first}"], "first: no PPO run"),
        (["frontier", "--runs", f"plain={runs['plain']}", "--kl_to", "third"], "did not measure 'kl/third'"),
        (["curvature", first, "--data", empty], "no examples"),
        (["study"], "invalid choice: 'study'"),
    ]  # fmt: skip
    for arguments, message in cases:
        assert message in error_of(capsys, *arguments, "--output", tmp_path / "out"), arguments
        assert files_of(tmp_path) == before, arguments
    assert "exists already" in error_of(capsys, "line", first, second, *loss, "--output", middle)
    assert "the following arguments are required: --output" in error_of(capsys, "line", first, second, *loss)
    for arguments, message in (
        (["report", first, "--output", tmp_path / "report.html"], "no PPO run"),
        (["report", runs["plain"], "--output", tmp_path / "report.pdf"], "must end in .html or .md"),
        (
            ["report", runs["plain"], "--kl_to", "x", "--output", tmp_path / "r.md"],
            "not measured by every run",
        ),
    ):
        assert message in error_of(capsys, *arguments)
    assert files_of(tmp_path) == before


COMMANDS = ("line", "plane", "kl", "frontier", "curvature")
SAMPLED = COMMANDS[:-1]
LEAST = {"--batch_size": 1, "--seed": 0}
LEAST_OF = {
    "line": LEAST | {"--steps": 2, "--num_prompts": 1, "--max_new_tokens": 1},
    "plane": LEAST | {"--steps": 2, "--num_prompts": 1, "--max_new_tokens": 1},
    "kl": LEAST | {"--num_responses": 1, "--num_prompts": 1, "--max_new_tokens": 1},
    "frontier": LEAST | {"--num_samples": 2, "--average": 1, "--num_prompts": 1, "--max_new_tokens": 1},
    "curvature": LEAST | {"--num_eigenvalues": 0, "--num_probes": 0, "--num_examples": 1},
}  # fmt: skip


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in COMMANDS for flag in LEAST_OF[command]])
def test_counts_that_are_too_small_are_refused_as_typed(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    least = LEAST_OF[command][flag]
    for typed in (flag, "--" + flag[2:].replace("_", "-")):
        assert error_of(capsys, command, typed, least - 1) == f"{typed} {least - 1}: must be at least {least}"
    assert error_of(capsys, command, flag, "2.5") == f"{flag} 2.5: is no whole number; give one of {least} or more"
    assert "required" in error_of(capsys, command, flag, least)


def test_every_count_of_every_command_is_checked() -> None:
    (commands,) = (action for action in _parser()._actions if isinstance(action, _SubParsersAction))
    for name, command in commands.choices.items():
        counts = {action.option_strings[0] for action in command._actions if isinstance(action.default, int)}
        switches = {action.option_strings[0] for action in command._actions if action.nargs == 0}
        assert counts - switches <= set(LEAST_OF.get(name, {})), name
        assert int not in [action.type for action in command._actions], name


@pytest.mark.parametrize("temperature", ["0", "-1", "nan", "inf", "warm"])
@pytest.mark.parametrize("command", SAMPLED)
def test_temperatures_are_finite_and_greater_than_0(
    command: str, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, command, "--temperature", temperature)
    assert message == f"--temperature {temperature}: must be a finite number greater than 0"


@pytest.mark.parametrize("margin", ["-0.1", "inf", "nan", "wide"])
@pytest.mark.parametrize("command", ["line", "plane"])
def test_margins_are_finite_and_not_negative(command: str, margin: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, command, f"--margin={margin}")
    assert message == f"--margin {margin}: must be a finite number of at least 0"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda", "torch finds 0 CUDA devices: use cpu"),
        ("cuda:7", "torch finds 0 CUDA devices: use cpu"),
        ("gpu", "is unknown: choose cpu, cuda or cuda:N"),
        ("meta", "is not supported: choose cpu, cuda or cuda:N"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_devices_that_are_not_there_are_refused(
    command: str, device: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = error_of(capsys, command, "--device", device)
    assert message.startswith(f"--device {device}: ")
    assert message.endswith(reason)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["reference", "first", "second", "third"])
def test_report_and_frontier_agree_on_what_runs_measured(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    groups = [f"{group}={folder}" for group, folder in runs.items()]
    expected = 2 if name == "third" else 0
    assert run("frontier", "--runs", *groups, "--kl_to", name, "--output", tmp_path / "reached") == expected
    assert run("report", *runs.values(), "--kl_to", name, "--output", tmp_path / "report.md") == expected
    if expected == 0:
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert f"| kl/{name} | gold_reward |" in text


def inputs_of(command: str, models: Sequence[Path], data: Path, prompts: Path) -> list[object]:
    """What a command cannot do without; its models are the last of those given."""
    return {
        "line": [*models[-2:], "--metric", f"loss={data}"],
        "plane": [*models[-3:], "--metric", f"loss={data}"],
        "kl": [*models[-2:], "--prompts", prompts],
        "frontier": [*models[-2:], "--reward", "helpers:share_of_a", "--prompts", prompts],
        "curvature": [models[-1], "--data", data],
    }[command]


@pytest.mark.parametrize("command", [*COMMANDS, "report"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    command: str,
    checkpoints: dict[str, Path],
    data: Path,
    prompt_file: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(ENOENT, os.strerror(ENOENT), "what /proc says to root")

    models = [checkpoints[name] for name in ("first", "second", "third")]
    needed = [runs["plain"]] if command == "report" else inputs_of(command, models, data, prompt_file)
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(rlhf.models, "_load", pytest.fail)
    output = tmp_path / "sealed" / "page.html"
    message = error_of(capsys, command, *needed, "--output", output)
    assert message == f"{output}: cannot be made, {tmp_path} is no writable folder; choose another --output"


@pytest.mark.parametrize("command", [*COMMANDS, "kl="])
def test_a_reward_model_is_no_language_model(
    command: str,
    checkpoints: dict[str, Path],
    data: Path,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, reward = (checkpoints[name] for name in ("first", "second", "reward"))
    if command == "kl=":
        arguments = ["line", first, second, "--metric", f"kl={reward}", "--prompts", prompt_file, *SAMPLING]
    else:
        arguments = [command, *inputs_of(command, [first, second, reward], data, prompt_file)]
    monkeypatch.setattr(rlhf.models, "_load", pytest.fail)
    assert error_of(capsys, *arguments, "--output", tmp_path / "out") == (
        f"{reward}: a reward model (LlamaForSequenceClassification), but a language model is expected; give one"
    )


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in ("line", "plane", "kl", "frontier", "curvature", "report"):
        assert f"python -m analysis {command}" in shown
    with pytest.raises(SystemExit, match="0"):
        main(["plane", "--help"])
    assert "reward/NAME=REWARD" in capsys.readouterr().out


def test_the_module_runs() -> None:
    process = run_python(["-m", "analysis", "line"])
    assert process.returncode == 2
    assert process.stderr == "error: the following arguments are required: CKPT, --metric, --output\n"

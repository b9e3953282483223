"""The commands ``rlhf.sft`` and ``rlhf.reward_model``: losses, folders, evaluations, stopping and resuming."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOS, EOS, LETTERS, PAD, WORDS, make_llama, random_examples, run_python
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf import reward_model, sft, stage
from rlhf.command_line import run_command
from rlhf.data import Example, Pair
from rlhf.evaluation import evaluate_loss
from rlhf.models import load_causal_lm, load_scalar_head_model
from rlhf.reward_model import all_scores, bradley_terry_loss, score_examples, score_pairs, train_reward_model
from rlhf.rewards import ModelReward
from rlhf.sft import all_tokens, finetune, held_out_loss, response_nll
from rlhf.training import OptimizationConfig, Step

EXAMPLES = random_examples(seed=1, num=8)
PAIRS = [Pair(Example(a.prompt_ids, a.response_ids), b) for a, b in zip(EXAMPLES[:4], EXAMPLES[4:], strict=True)]


def manual_nll(model: nn.Module, example: Example) -> float:
    """−Σ log p of the response, from a forward over the unpadded row."""
    logits = model(torch.tensor([example.token_ids])).logits[0].detach()
    first = len(example.prompt_ids)
    predicted = logits.log_softmax(-1)[first - 1 : -1]
    return -sum(float(predicted[t, token]) for t, token in enumerate(example.response_ids))


@pytest.mark.parametrize("name", ["first", "gpt2"])
def test_sft_loss_counts_response_tokens_alone(checkpoints: dict[str, Path], name: str) -> None:
    model = load_causal_lm(checkpoints[name])
    totals, counts = response_nll(model, EXAMPLES, PAD)
    expected = [manual_nll(model, example) for example in EXAMPLES]
    assert totals.tolist() == pytest.approx(expected, rel=1e-5)
    assert counts.tolist() == [len(example.response_ids) for example in EXAMPLES]
    mean = sum(expected) / int(counts.sum())
    for settings in ({"batch_size": 3}, {"batch_size": 100}, {"micro_batch_size": 1}, {"micro_batch_tokens": 20}):
        estimate = held_out_loss(model, EXAMPLES, OptimizationConfig(**settings), pad_token_id=PAD)
        assert estimate == pytest.approx(evaluate_loss(model, EXAMPLES, PAD), rel=1e-5)
        assert estimate.mean == pytest.approx(mean, rel=1e-5)


def test_training_on_prompts_counts_every_token_but_the_first(checkpoints: dict[str, Path]) -> None:
    example = all_tokens(Example([BOS, 6, 7], [8, EOS], where="data.jsonl:1"))
    assert example == Example([BOS], [6, 7, 8, EOS])
    assert example.where == "data.jsonl:1"


def test_fine_tuning_learns_and_is_the_same_twice(checkpoints: dict[str, Path]) -> None:
    config = OptimizationConfig(epochs=25, batch_size=4, learning_rate=1e-2, seed=1)
    losses = [finetune(load_causal_lm(checkpoints["first"]), EXAMPLES, config, pad_token_id=PAD) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.5 * losses[0][0]
    other_order = finetune(load_causal_lm(checkpoints["first"]), EXAMPLES, replace(config, seed=2), pad_token_id=PAD)
    assert other_order[0] != losses[0][0]


def test_bradley_terry_by_hand() -> None:
    # −log σ(0) = ln 2; −log σ(ln 3) = −log ¾; −log σ(−ln 3) = −log ¼; and linear, not infinite, far out
    chosen = torch.tensor([1.0, math.log(3), 0.0, 0.0])
    rejected = torch.tensor([1.0, 0.0, math.log(3), 1000.0])
    expected = [math.log(2), math.log(4 / 3), math.log(4), 1000]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)


def test_margin_label_smoothing_and_centering_by_hand() -> None:
    chosen, rejected = torch.tensor([2 + math.log(3), 1.0]), torch.tensor([1.0, -1.0])
    margin = torch.tensor([1.0, 2.0])  # d = ln 3 and 0
    assert bradley_terry_loss(chosen, rejected, margin).tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    smoothed = bradley_terry_loss(chosen, rejected, margin, label_smoothing=0.25)
    assert smoothed.tolist() == pytest.approx([0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2)])
    centered = bradley_terry_loss(chosen, rejected, margin, center_coef=0.1)
    assert centered.tolist() == pytest.approx([math.log(4 / 3) + 0.1 * (3 + math.log(3)) ** 2, math.log(2)])


def test_smoothed_labels_are_least_costly_where_the_label_is_right_that_often() -> None:
    """dL/dd = 0 at σ(d) = 1 − ε, and centering pulls both rewards to sum 0."""
    rewards = torch.tensor([[3.0], [5.0]], requires_grad=True)
    optimizer = torch.optim.SGD([rewards], lr=1.0)
    for _ in range(500):
        optimizer.zero_grad()
        bradley_terry_loss(*rewards, label_smoothing=0.2, center_coef=0.1).sum().backward()
        optimizer.step()
    assert torch.sigmoid(rewards[0] - rewards[1]).item() == pytest.approx(0.8, abs=1e-4)
    assert rewards.sum().item() == pytest.approx(0, abs=1e-4)


def test_the_reward_models_loss_is_bradley_terry_over_pairs(checkpoints: dict[str, Path]) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    chosen, rejected = score_pairs(model, PAIRS, PAD, batch_size=3)
    differences = [float(c - r) for c, r in zip(chosen, rejected, strict=True)]
    config = OptimizationConfig(epochs=1, batch_size=len(PAIRS))
    objective = reward_model.pair_objective(
        model, [replace(PAIRS[0], margin=0.5), *PAIRS[1:]], PAD, margin_coef=2.0, label_smoothing=0.0
    )
    losses, terms = objective.losses([1, 0])
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-d)) for d in (differences[1], differences[0] - 1)])
    assert terms.tolist() == [1, 1]
    expected = sum(math.log1p(math.exp(-d)) for d in differences) / len(PAIRS)
    assert train_reward_model(model, PAIRS, config, pad_token_id=PAD) == [pytest.approx(expected, rel=1e-4)]


def test_scores_of_pairs_do_not_depend_on_the_batch(checkpoints: dict[str, Path]) -> None:
    model = load_scalar_head_model(checkpoints["reward"])
    chosen, rejected = score_pairs(model, PAIRS, PAD, batch_size=2)
    for scores, sides in ((chosen, [p.chosen for p in PAIRS]), (rejected, [p.rejected for p in PAIRS])):
        alone = [score_examples(model, [side], EOS).item() for side in sides]
        assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    split = all_scores(model, PAIRS, OptimizationConfig(micro_batch_tokens=25), pad_token_id=PAD)
    assert torch.allclose(split.float(), torch.stack([chosen, rejected]), atol=1e-5)


def test_a_trained_reward_model_prefers_and_is_standardised(checkpoints: dict[str, Path]) -> None:
    letters = [WORDS.index(letter) for letter in LETTERS]
    good, bad = letters[0], letters[1]
    pairs = [Pair(Example([BOS, x], [good, x, EOS]), Example([BOS, x], [bad, x, x, EOS])) for x in letters[2:]]
    model = load_scalar_head_model(checkpoints["reward"])
    config = OptimizationConfig(epochs=20, batch_size=6, learning_rate=1e-2)
    losses = train_reward_model(model, pairs, config, pad_token_id=PAD)
    assert losses[-1] < 0.1
    assert reward_model.accuracy(model, pairs, PAD) == 1
    scores = torch.cat(score_pairs(model, pairs, PAD))
    reward = ModelReward(model)
    standardised = (scores - reward.mean) / reward.std
    assert standardised.mean().item() == pytest.approx(0, abs=1e-5)
    assert standardised.std().item() == pytest.approx(1, abs=1e-4)


def test_ties_are_not_correct() -> None:
    class Constant(nn.Module):
        model = type("Inner", (), {"device": "cpu"})

        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.zeros(tokens.shape)

    assert reward_model.accuracy(Constant(), PAIRS, PAD) == 0  # type: ignore[arg-type]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of demonstrations and of pairs with margins, each with held-out rows that are all wrong."""
    root = tmp_path_factory.mktemp("data")
    answers = {letter: f"{letter} b" * (1 + i % 3) for i, letter in enumerate(LETTERS)}
    sides = [{"prompt": x, "chosen": "a", "rejected": "b c", "margin": i / 4} for i, x in enumerate(LETTERS)]
    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in sides]
    return {
        "sft": write_rows(root / "sft.jsonl", [{"prompt": x, "response": y} for x, y in answers.items()]),
        "sft_test": write_rows(root / "sft_test.jsonl", [{"prompt": x, "response": "n m l k"} for x in LETTERS]),
        "pairs": write_rows(root / "pairs.jsonl", sides),
        "pairs_test": write_rows(root / "pairs_test.jsonl", swapped),
    }


def arguments(
    checkpoints: dict[str, Path], files: dict[str, str], kind: str, output: Path, **settings: Any
) -> list[str]:
    """A command line for a stage of eight steps; True is a flag."""
    defaults = {"model": checkpoints["first"], "data": files[kind], "test_data": files[kind], "output": output}
    defaults |= {"epochs": 4, "batch_size": 7, "learning_rate": 1e-2}
    words = []
    for name, value in (defaults | settings).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


MAINS = {"sft": sft.main, "pairs": reward_model.main}


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but those that hold times or the output's own name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in ("timings.jsonl", "training.yaml")
    }


def test_sft_command(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sft", "again"):
        line = arguments(checkpoints, data, "sft", tmp_path / name, epochs=10, eval_every=5, micro_batch_tokens=20)
        assert run_command(sft.main, line) == 0
    out = capsys.readouterr().out
    assert "20 steps on 14 demonstrations, training loss" in out
    assert "of the tokens computed were padding" in out
    assert "nats per response token" in out
    assert tree(tmp_path / "sft") == tree(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert not torch.equal(model.lm_head.weight, make_llama(1).lm_head.weight)
    rows = read_rows(tmp_path / "sft" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(21))
    assert [row["step"] for row in rows if "test_loss" in row] == [0, 5, 10, 15, 20]
    assert set(rows[1]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "padding"}
    assert rows[20]["test_loss"] < 0.7 * rows[0]["test_loss"]
    assert rows[20]["epoch"] == 10
    assert [set(row) for row in read_rows(tmp_path / "sft" / "timings.jsonl")] == [{"step", "tokens_per_second"}] * 20
    assert (tmp_path / "sft" / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "sft"]


def test_reward_model_command(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("reward", "again"):
        assert run_command(reward_model.main, arguments(checkpoints, data, "pairs", tmp_path / name, epochs=10)) == 0
    out = capsys.readouterr().out
    assert "held-out accuracy 1.000 on 14 pairs" in out
    assert re.search(r"accuracy, margin 0 to 1 \(5 pairs\) +1\.000 ± 0\.000\n", out)
    assert tree(tmp_path / "reward") == tree(tmp_path / "again")  # the seed draws the new head as well
    model = load_scalar_head_model(tmp_path / "reward")
    config = model.model.config
    assert (config.num_labels, config.score_std > 0) == (1, True)
    assert ModelReward(model).mean == config.score_mean != 0
    report = json.loads((tmp_path / "reward" / "reward_metrics.json").read_text())
    rows = read_rows(tmp_path / "reward" / "metrics.jsonl")
    assert report["training_losses"] == [row["loss"] for row in rows[1:]]
    assert report["held_out"]["accuracy"] == [1.0, 0.0]
    assert report["held_out"]["log_likelihood"][0] == pytest.approx(-rows[-1]["test_loss"])
    assert [group["pairs"] for group in report["held_out"]["by_margin"]] == [5, 4, 5]
    for name in ("loss.png", "reliability.png"):
        assert (tmp_path / "reward" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_margins_reach_the_loss(checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    first: dict[str, float] = {}
    for name, settings in {"with": {}, "without": {"margin_coef": 0}}.items():
        line = arguments(checkpoints, data, "pairs", tmp_path / name, epochs=0.1, **settings)
        assert run_command(reward_model.main, line) == 0
        first[name] = read_rows(tmp_path / name / "metrics.jsonl")[1]["loss"]
    assert first["with"] > first["without"]


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_the_best_weights_are_kept(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Held-out rows contradict the training rows: the longer the training, the worse they get."""
    settings = {"test_data": data[f"{kind}_test"], "eval_every": 2, "learning_rate": 3e-2}
    for name, more in {"best": {"keep_best": True}, "last": {}}.items():
        line = arguments(checkpoints, data, kind, tmp_path / name, **(settings | more))
        assert run_command(MAINS[kind], line) == 0
    rows = read_rows(tmp_path / "best" / "metrics.jsonl")
    assert rows == read_rows(tmp_path / "last" / "metrics.jsonl")
    best = min((row for row in rows if "test_loss" in row), key=lambda row: row["test_loss"])
    assert best["step"] < 8
    assert f"kept: the weights of step {best['step']}, held-out loss {best['test_loss']:.3f}" in capsys.readouterr().out
    # what is in the folder, measured anew
    again = arguments(checkpoints, data, kind, tmp_path / "again", **(settings | {"model": tmp_path / "best"}))
    assert run_command(MAINS[kind], again) == 0
    assert read_rows(tmp_path / "again" / "metrics.jsonl")[0]["test_loss"] == pytest.approx(best["test_loss"])


KILLED = """
import sys
from test_rlhf_stages import MAINS, signalled_after
from rlhf.command_line import run_command

signalled_after(5, int(sys.argv[1]))
sys.exit(run_command(MAINS[sys.argv[2]], sys.argv[3:]))
"""


def signalled_after(step: int, number: int) -> None:
    """Have this process sent a signal once a stage has logged a step."""
    log = stage.Stage._log

    def log_then_signal(self: stage.Stage, result: Step) -> None:
        log(self, result)
        if self.state.step == step:
            os.kill(os.getpid(), number)

    stage.Stage._log = log_then_signal  # type: ignore[method-assign]


STOPPED = {"eval_every": 2, "keep_best": True, "weight_decay": 0.1, "epochs": 4}


def saved_steps(output: Path) -> list[str]:
    assert not output.exists()
    return [path.name for path in Path(f"{output}.unfinished", "checkpoints").glob("step-*")]


def require_same_when_resumed(kind: str, line: list[str], output: Path, whole: list[str]) -> None:
    assert run_command(MAINS[kind], [*line, "--resume"]) == 0
    assert run_command(MAINS[kind], whole) == 0
    assert tree(output) == tree(output.with_name("whole"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["run", "whole"]


def test_a_killed_stage_goes_on_bitwise(checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    whole, line = (arguments(checkpoints, data, "sft", tmp_path / name, **STOPPED) for name in ("whole", "run"))
    line += ["--checkpoint_every", "3"]
    process = run_python(["-c", KILLED, str(int(signal.SIGKILL)), "sft", *line])
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert saved_steps(tmp_path / "run") == ["step-00000003"]
    require_same_when_resumed("sft", line, tmp_path / "run", whole)


def test_sigterm_saves_and_ends_in_one_line(
    checkpoints: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    whole, line = (arguments(checkpoints, data, "pairs", tmp_path / name, **STOPPED) for name in ("whole", "run"))
    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "_log", stage.Stage._log)  # so that it is put back
        signalled_after(5, signal.SIGTERM)
        with pytest.raises(SystemExit) as exit_status:
            run_command(reward_model.main, line)
    assert exit_status.value.code == 143
    assert capsys.readouterr().err.endswith("stopped by SIGTERM after step 5; go on with --resume\n")
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_steps(tmp_path / "run") == ["step-00000005"]
    require_same_when_resumed("pairs", line, tmp_path / "run", whole)


def test_a_stage_killed_before_its_first_checkpoint_starts_over(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    line = arguments(checkpoints, data, "sft", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "_log", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            sft.main(line)
    assert run_command(sft.main, [*line, "--resume"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(9))


def test_checkpoints_and_bests_do_not_pile_up(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[str]] = []
    checkpoint = stage.Stage._checkpoint

    def watched(self: stage.Stage) -> None:
        checkpoint(self)
        found = [*(self.folder.path / "checkpoints").iterdir(), *(self.folder.path / "best").iterdir()]
        kept.append([f"{path.parent.name}/{path.name}" for path in found])

    monkeypatch.setattr(stage.Stage, "_checkpoint", watched)
    settings = {"checkpoint_every": 3, "eval_every": 1, "keep_best": True}
    assert run_command(sft.main, arguments(checkpoints, data, "sft", tmp_path / "run", **settings)) == 0
    assert kept == [[f"checkpoints/step-0000000{n}", f"best/step-0000000{n}"] for n in (3, 6)]


@pytest.fixture
def stopped(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command line of a stage that was stopped."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    line = arguments(checkpoints, data, "sft", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "_log", leave)
        with pytest.raises(SystemExit):
            sft.main(line)
    return line


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_otherwise(
    stopped: list[str], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run_command(sft.main, stopped) == 2
    assert capsys.readouterr().err.endswith(
        "run.unfinished: a stopped run; go on with --resume, remove it, or choose another --output\n"
    )
    assert run_command(sft.main, [*stopped, "--resume", "--epochs", "2", "--seed", "3"]) == 2
    assert "(epochs was 4.0, now 2.0, seed was 0, now 3); resume with the same ones, or" in capsys.readouterr().err
    with Path(data["sft"]).open("a") as file:
        file.write("\n")
    assert run_command(sft.main, [*stopped, "--resume"]) == 2
    assert "data_sha256 was" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_several_files_count_as_one_and_may_be_cut(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, kind: str
) -> None:
    lines = Path(data[kind]).read_text().splitlines(keepends=True)
    parts = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    parts[0].write_text("".join(lines[:3]))
    parts[1].write_text("".join(lines[3:]))
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:5]))
    several = ["--data", *map(str, parts), "--test_data", data[kind]]
    for name, flags, whole in (
        ("all", [], data[kind]),
        ("some", ["--max_examples", "5"], str(cut)),
    ):
        line = arguments(checkpoints, data, kind, tmp_path / name, epochs=1)
        assert run_command(MAINS[kind], [*line, *several, *flags]) == 0
        expected = arguments(checkpoints, data | {kind: whole}, kind, tmp_path / f"{name}-one", epochs=1)
        assert run_command(MAINS[kind], [*expected, "--test_data", data[kind]]) == 0
        assert tree(tmp_path / name) == tree(tmp_path / f"{name}-one")


def test_resuming_needs_something_to_resume(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*arguments(checkpoints, data, "sft", tmp_path / "run"), "--resume"]
    assert run_command(sft.main, line) == 2
    assert "run.unfinished: nothing to resume (no config.yaml); start without --resume" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert run_command(sft.main, line) == 2
    assert "run: exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_best": True}, "keep_best: there is nothing to evaluate on; give held-out data with --test_data FILE"),
        ({"eval_every": 3}, "eval_every: there is nothing to evaluate on"),
        ({"log_every": 0}, "log_every=0: must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1: must not be negative"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: must be at least 0 and below 0.5"),
        ({"center_coef": -1.0}, "center_coef=-1.0: must be finite and not negative"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_model.RewardModelConfig(model="m", data="d", output="o", **settings)


def test_a_broken_example_is_named_by_its_line(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": x, "chosen": "a", "rejected": "b", "margin": 1e30 if x == "c" else 0} for x in LETTERS]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    line = arguments(checkpoints, data, "pairs", tmp_path / "run", data=pairs, margin_coef=1e30, batch_size=14)
    assert run_command(reward_model.main, line) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: reward model: the loss is inf at step 1 from")
    assert f"{pairs}:3; lower the learning rate" in errors[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_two_processes_have_the_losses_of_one(
    checkpoints: dict[str, Path], data: dict[str, str], tmp_path: Path, kind: str
) -> None:
    settings = {"eval_every": 4, "keep_best": True, "micro_batch_tokens": 20}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    module = {"sft": "rlhf.sft", "pairs": "rlhf.reward_model"}[kind]
    for count in (1, 2):
        line = arguments(checkpoints, data, kind, tmp_path / str(count), **settings)
        process = run_python([*launch, str(count), "-m", module, *line], ACCELERATE_USE_CPU="true")
        assert process.returncode == 0, process.stderr
    one, two = (read_rows(tmp_path / str(count) / "metrics.jsonl") for count in (1, 2))
    assert len(one) == len(two) == 9
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if name != "padding":  # each process has micro-batches of its own
                assert second[name] == pytest.approx(first[name], rel=1e-4), name
    weights = [load_file(tmp_path / str(count) / "model.safetensors") for count in (1, 2)]
    for name, tensor in weights[0].items():
        assert torch.allclose(weights[1][name], tensor, atol=1e-3), name

"""Making the reviews task: what is in the folder, that it repeats, and that the cache is safe. Tiny sizes."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlhf.reviews.__main__ as command
from rlhf.command_line import run_command
from rlhf.data import load_examples, load_pairs
from rlhf.evaluation import evaluate_loss
from rlhf.models import load_causal_lm, load_scalar_head_model, load_tokenizer, require_same_tokenizer
from rlhf.reviews import ReviewsTask, gold_reward, task, tiny_task
from rlhf.reviews.grammar import split_prompts
from rlhf.reviews.task import FULL, NO_NOISE, TINY, Samples, cached_task, version
from rlhf.reward_model import accuracy
from rlhf.rollout import Rollout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ReviewsTask:
    return tiny_task(tmp_path_factory.mktemp("reviews") / "task")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_folder_holds_ordinary_checkpoints_with_one_tokenizer(made: ReviewsTask) -> None:
    for folder in (made.base, made.sft1, made.sft2, made.sft3):
        assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == TINY.hidden_size
        require_same_tokenizer(made.base, folder)
    require_same_tokenizer(made.base, made.reward)
    reward = AutoModelForSequenceClassification.from_pretrained(made.reward)
    assert reward.config.num_labels == 1
    assert reward.config.score_std > 0


def test_models_differ_from_each_other_and_sft_stays_near_base(made: ReviewsTask) -> None:
    weights = [load_file(f / "model.safetensors") for f in (made.base, made.sft1, made.sft2, made.sft3)]
    flat = [torch.cat([w[name].flatten() for name in sorted(w)]) for w in weights]
    distance = torch.cdist(torch.stack(flat), torch.stack(flat))
    assert (distance + torch.eye(4) > 0).all()
    assert distance[0].max() < flat[0].norm()


def test_held_out_prompts_are_held_out(made: ReviewsTask) -> None:
    train, test = map(set, split_prompts())
    assert {row["prompt"] for row in rows(made.prompts)} == train
    assert {row["prompt"] for row in rows(made.test_prompts)} == test
    for path in (made.folder / "sft1.jsonl", made.folder / "sft2.jsonl", made.folder / "sft3.jsonl", made.pairs):
        assert {row["prompt"] for row in rows(path)} <= train
    for path in (made.sft_test, made.folder / "test_pairs.jsonl"):
        assert {row["prompt"] for row in rows(path)} <= test


def test_sft_models_have_data_of_their_own(made: ReviewsTask) -> None:
    texts = [{(row["prompt"], row["response"]) for row in rows(made.folder / f"sft{k}.jsonl")} for k in (1, 2, 3)]
    assert [len(t) for t in texts] == [TINY.sft_reviews] * 3
    assert len(set.union(*texts)) == 3 * TINY.sft_reviews


def test_recorded_quality_is_what_the_files_give(made: ReviewsTask) -> None:
    tokenizer = load_tokenizer(made.base)
    examples = load_examples(made.sft_test, tokenizer)
    assert len(examples) == TINY.test_reviews
    for name in ("base", "sft3"):
        loss = evaluate_loss(load_causal_lm(made.folder / name), examples, tokenizer.pad_token_id)
        assert made.quality["loss"][name] == pytest.approx(list(loss), rel=1e-5)
        assert loss.mean < math.log(len(tokenizer))
    pairs = load_pairs(made.folder / "test_pairs.jsonl", tokenizer)
    measured = accuracy(load_scalar_head_model(made.reward), pairs, tokenizer.pad_token_id)
    assert made.quality["reward_accuracy"] == pytest.approx(measured)


def test_pairs_agree_with_gold_as_recorded(made: ReviewsTask) -> None:
    for path in (made.pairs, made.folder / "test_pairs.jsonl"):
        pairs = rows(path)
        golds = [gold_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]]) for row in pairs]
        agreement = sum(chosen > rejected for chosen, rejected in golds) / len(golds)
        if path == made.pairs:
            assert made.quality["label_agreement"] == agreement
        else:
            assert all(chosen >= rejected for chosen, rejected in golds)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(made: ReviewsTask, tmp_path: Path) -> None:
    torch.manual_seed(123)  # what the caller does with torch's generator must not matter, nor be disturbed
    state = torch.get_rng_state()
    again, other = tiny_task(tmp_path / "again"), tiny_task(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    files = sorted(path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again.folder) for path in again.folder.rglob("*") if path.is_file())
    for file in files:
        assert (made.folder / file).read_bytes() == (again.folder / file).read_bytes(), file
    same = {str(file) for file in files if (made.folder / file).read_bytes() == (other.folder / file).read_bytes()}
    assert {"prompts.jsonl", "test_prompts.jsonl"} <= same
    seeded = {
        "base/model.safetensors",
        "sft1/model.safetensors",
        "reward/model.safetensors",
        "sft1.jsonl",
        "pairs.jsonl",
    }
    assert not seeded & same


def two_samples(golds: list[float]) -> Samples:
    empty = torch.zeros(2, 0)
    rollout = Rollout(empty, empty, empty, empty, empty, prompts=["p", "p"], responses=["a", "b"])
    return Samples(rollout, golds)


def test_preferences_follow_bradley_terry() -> None:
    count = 20_000
    pairs = task._preferences(two_samples([0.0, 1.0]), count, 0.5, seed=0, purpose="test")
    share = sum(chosen == 1 for chosen, _ in pairs) / count
    assert share == pytest.approx(0.880797, abs=3 * 0.0023)  # σ(1 / 0.5); standard error √(0.88 · 0.12 / 20000)
    assert all({chosen, rejected} == {0, 1} for chosen, rejected in pairs)


def test_preferences_without_noise_choose_the_better_of_any_order() -> None:
    for golds, best in (([5.0, -700.0], 0), ([0.0, 1e-6], 1)):
        pairs = task._preferences(two_samples(golds), 100, NO_NOISE, seed=0, purpose="test")
        assert pairs == [(best, 1 - best)] * 100


def test_failing_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "task"

    def fail(*args: object, **kwargs: object) -> None:
        assert not output.exists()
        assert any((path / "sft3" / "model.safetensors").exists() for path in tmp_path.iterdir())
        raise RuntimeError("power cut")

    monkeypatch.setattr(task, "train_reward_model", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        tiny_task(output)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fake_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[OSError | None], list[Path]]:
    """Replaces making by making an empty folder, optionally followed by an error; returns the list of folders made."""
    monkeypatch.setenv("SOUPKIT_CACHE", str(tmp_path / "cache"))

    def install(error: OSError | None) -> list[Path]:
        calls: list[Path] = []

        def make(output: Path, seed: int, *, sizes: task.Sizes) -> None:
            calls.append(output)
            if error is None or error.errno == errno.ENOTEMPTY:
                output.mkdir(parents=True)
            if error is not None:
                raise error

        monkeypatch.setattr(task, "make_task", make)
        return calls

    return install


def test_cache_makes_once_and_says_where(
    fake_make: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_make(None)
    first, second, other = cached_task(), cached_task(), cached_task(seed=1)
    assert first == second
    assert calls == [first.folder, other.folder]
    assert first.folder == tmp_path / "cache" / f"reviews-{version()}-seed0"
    assert str(first.folder) in capsys.readouterr().err


def test_losing_the_race_to_publish_uses_the_winner(fake_make: Callable[..., list[Path]]) -> None:
    fake_make(OSError(errno.ENOTEMPTY, "Directory not empty"))
    assert cached_task().folder.is_dir()


def test_other_errors_are_not_swallowed(fake_make: Callable[..., list[Path]]) -> None:
    fake_make(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        cached_task()


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOUPKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert task.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("SOUPKIT_CACHE")
    assert task.cache_directory() == tmp_path / "xdg" / "soupkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert task.cache_directory() == tmp_path / "home" / ".cache" / "soupkit"


def test_version_changes_with_sizes_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = version()
    assert version() == original
    assert version(replace(FULL, sft_reviews=401)) != original
    for module in (task.grammar, task.gold, task.tokenizer, task.training, task.sft):
        changed = tmp_path / "changed.py"
        changed.write_bytes(Path(str(module.__file__)).read_bytes() + b"\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert version() != original


def test_command_prints_the_quality(
    made: ReviewsTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "make_task", lambda output, seed: made)
    assert run_command(command.main, ["--output", str(tmp_path / "new"), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["base", "sft1", "sft2", "sft3"]
    assert f"{made.quality['loss']['sft2'][0]:.3f} ±" in out
    assert str(made.folder) in out


def test_command_refuses_bad_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command.main, ["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: exists already; choose another --output or remove it\n"
    assert run_command(command.main, ["--output", str(tmp_path / "new"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error: --seed -1")
    assert list(tmp_path.iterdir()) == []


def test_scoring_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from rlhf.reviews import gold_reward; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0

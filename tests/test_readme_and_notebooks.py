"""The README's commands and Python, and the notebooks, run: with a barely trained task and tiny settings."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

import analysis.__main__
import rlhf.ppo
import rlhf.reward_model
import rlhf.sft
import soupkit.__main__
from rlhf.command_line import run_command
from rlhf.reviews import ReviewsTask, task

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

TINY_STAGE = ["--epochs", "0.5", "--batch_size", "8"]
TINY_PPO = shlex.split(
    "--updates 2 --batch_size 8 --minibatch_size 4 --max_new_tokens 8 --eval_episodes 8 --save_every 1"
)
TINY_SAMPLING = ["--max_new_tokens", "8", "--num_prompts", "2"]
TINY_ANALYSIS = {
    "report": [],
    "line": ["--steps", "2"],
    "plane": ["--steps", "2"],
    "kl": TINY_SAMPLING,
    "frontier": TINY_SAMPLING,
}
# module -> (its main, flags that make it quick)
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "rlhf.sft": (lambda argv: run_command(rlhf.sft.main, argv), TINY_STAGE),
    "rlhf.reward_model": (lambda argv: run_command(rlhf.reward_model.main, argv), TINY_STAGE),
    "rlhf.ppo": (lambda argv: run_command(rlhf.ppo.main, argv), TINY_PPO),
    "soupkit": (soupkit.__main__.main, []),
    "analysis": (lambda argv: run_command(analysis.__main__.main, [*argv, *TINY_ANALYSIS[argv[0]]]), []),
}
# notebook -> parameters that make it quick
TINY_NOTEBOOKS = {
    "01_soup_reference": "UPDATES, EPISODES, STEPS, AVERAGE, SEED, PICTURE = 2, 16, 3, 1, 0, None",
    "02_landscapes": "EPISODES, STEPS, UPDATES, DIRECTIONS, PROBES, SEED = 36, 3, 2, 2, 2, 0",
    "03_kl_geometry": "EPISODES, UPDATES, STEPS, SEED = 72, 2, 3, 0",
    "04_choose_a_reference": "SAMPLES, UPDATES, EPISODES, MATCHED, SEED, STORED = 64, 2, 16, (0.05,), 0, "
    f"{str(ROOT / 'benchmarks' / 'references.json')!r}",
}


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> ReviewsTask:
    """A tiny task where the full one is looked for, so that nothing is made but this."""
    cache = tmp_path_factory.mktemp("cache")
    return task.make_task(cache / f"reviews-{task.version()}-seed0", sizes=task.TINY)


@pytest.fixture
def workspace(cached: ReviewsTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the files that the README's commands start from."""
    monkeypatch.setenv("SOUPKIT_CACHE", str(cached.folder.parent))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cached.base, "base")
    for number in (1, 2):
        shutil.copy(cached.folder / f"sft{number}.jsonl", f"demonstrations{number}.jsonl")
    shutil.copy(cached.pairs, "pairs.jsonl")
    shutil.copy(cached.prompts, "prompts.jsonl")
    return tmp_path


def test_every_command_of_the_readme_runs(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        shlex.split(command)[2:]
        for block in blocks("bash")
        for line in block.splitlines()
        for command in line.split(" && ")
        if command.startswith("python -m ")
    ]
    assert {module for module, *_ in commands} == set(COMMANDS)
    assert ["rlhf.ppo"] in commands, "the main job takes no arguments"
    for module, *arguments in commands:
        main, tiny = COMMANDS[module]
        assert main([*arguments, *tiny]) == 0, capsys.readouterr().err
    for name in ("sft1", "sft2", "reward", "run/policy", "plain/policy", "soup", "nearer-sft1"):
        assert (workspace / name / "model.safetensors").is_file(), name
    for name in ("report.html", "path/loss.png", "plane/loss-surface.svg", "distances/kl.npz", "ideal/tables.md"):
        assert (workspace / name).stat().st_size > 0, name
    assert len(list((workspace / "runs").glob("*/summary.json"))) == 1
    assert "gold reward" in capsys.readouterr().out

    # The Python block goes on where the commands ended.
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    assert (workspace / "weighted" / "soup.json").is_file()
    assert (workspace / "path.png").stat().st_size > 0


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_names_every_module() -> None:
    tree = README[README.index("## The tree") : README.index("## Cite")]
    modules = [path for package in ("soupkit", "rlhf", "analysis") for path in (ROOT / package).glob("*.py")]
    missing = [
        str(path.relative_to(ROOT))
        for path in modules
        if path.name not in ("__init__.py", "__main__.py", "errors.py") and f"`{path.name}`" not in tree
    ]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, cached: ReviewsTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUPKIT_CACHE", str(cached.folder.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = TINY_NOTEBOOKS[path.stem]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_with_its_pictures(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4

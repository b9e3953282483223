"""What the README, the page on measuring and the notebooks show runs: with a barely trained task and tiny settings."""

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
import analysis.study.__main__
import rlhf.ppo
import rlhf.reward_model
import rlhf.sft
import soupkit.__main__
from rlhf.command_line import run_command
from rlhf.reviews import ReviewsTask, task

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURING = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [
    *NOTEBOOKS,
    *(page for part in (".", "docs", "study", "recipes", "benchmarks") for page in sorted((ROOT / part).glob("*.md"))),
]
PAGES += sorted((ROOT / "study").glob("*/README.md"))

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
    "curvature": ["--num_examples", "4", "--num_eigenvalues", "1", "--num_probes", "1"],
}
# module -> (its main, flags that make it quick)
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "rlhf.sft": (lambda argv: run_command(rlhf.sft.main, argv), TINY_STAGE),
    "rlhf.reward_model": (lambda argv: run_command(rlhf.reward_model.main, argv), TINY_STAGE),
    "rlhf.ppo": (lambda argv: run_command(rlhf.ppo.main, argv), TINY_PPO),
    "soupkit": (soupkit.__main__.main, []),
    "analysis": (lambda argv: run_command(analysis.__main__.main, [*argv, *TINY_ANALYSIS[argv[0]]]), []),
    "analysis.study": (lambda argv: run_command(analysis.study.__main__.main, argv), ["--report"]),
}
# what docs/analysis.md says -> what makes its Python quick
TINY_MEASURING = {
    r"steps=\d+": "steps=3",
    r"prompts \* 4": "prompts[:4]",
    r"examples\[:\d+\]": "examples[:4]",
    r"num_samples=\d+": "num_samples=64",
    r"max_new_tokens(=|\": )\d+": r"max_new_tokens\g<1>8",
}
# notebook -> parameters that make it quick
TINY_NOTEBOOKS = {
    "01_soup_reference": "UPDATES, EPISODES, STEPS, AVERAGE, SEED, PICTURE = 2, 16, 3, 1, 0, None",
    "02_landscapes": "EPISODES, STEPS, UPDATES, DIRECTIONS, PROBES, SEED = 36, 3, 2, 2, 2, 0",
    "03_kl_geometry": "EPISODES, UPDATES, STEPS, SEED = 72, 2, 3, 0",
    "04_choose_a_reference": "SAMPLES, MATCHED, DRAW, SEED, STUDY = 64, (0.05,), 1, 0, "
    f"{str(ROOT / 'study' / 'reviews.yaml')!r}",
    # reads what is stored and nothing else
    "04_choose_a_reference_smollm2": "SAMPLES, PROMPTS, DRAW, SEED, STUDY = None, None, 1, 0, "
    f"{str(ROOT / 'study' / 'smollm2.yaml')!r}",
}


def blocks(language: str, page: str = README) -> list[str]:
    """A page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> ReviewsTask:
    """A tiny task where the full one is looked for, so that nothing is made but this."""
    cache = tmp_path_factory.mktemp("cache")
    made = task.make_task(cache / f"reviews-{task.version()}-seed0", sizes=task.TINY)
    (cache / f"reviews-{task.version()}-seed1").symlink_to(made.folder)
    return made


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
    shutil.copytree(ROOT / "study", "study", ignore=shutil.ignore_patterns("work", "figures"))
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "study.md", "docs")
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
    page = Path("docs", "study.md").read_text(encoding="utf-8")
    assert page == (ROOT / "docs" / "study.md").read_text(encoding="utf-8"), "not what the stored results give"
    assert "gold reward" in capsys.readouterr().out

    # The Python block goes on where the commands ended.
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    assert (workspace / "weighted" / "soup.json").is_file()
    assert (workspace / "path.png").stat().st_size > 0


@pytest.mark.slow
def test_every_snippet_of_the_page_on_measuring_runs(workspace: Path, cached: ReviewsTask) -> None:
    Path("reviews").symlink_to(cached.folder)
    setup, *later = [block.replace("\\\n", "") for block in blocks("bash", MEASURING)]
    (average,) = re.findall(r"python -m soupkit (.*)", setup)
    assert soupkit.__main__.main(shlex.split(average)) == 0
    (ppo,) = re.findall(r"python -m rlhf.ppo (.*) \"\$@\"", setup)
    for seed in "01":
        for line in re.findall(r"  ppo (.*)", setup):
            main, tiny = COMMANDS["rlhf.ppo"]
            assert main([*shlex.split(f"{ppo} {line.replace('$seed', seed)}"), *tiny, "--updates", "8"]) == 0

    names: dict[str, object] = {}
    for program in blocks("python", MEASURING):
        for said, quick in TINY_MEASURING.items():
            program = re.sub(said, quick, program)
        exec(compile(program, "docs/analysis.md", "exec"), names)
    assert len(list(Path("figures").glob("*.png"))) >= 12

    commands = [shlex.split(line) for block in later for line in re.findall(r"^python -m analysis (.*)", block, re.M)]
    assert {command for command, *_ in commands} == {"line", "plane", "kl", "frontier", "curvature", "report"}
    main, _ = COMMANDS["analysis"]
    for command in commands:
        assert main(command) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix().replace("/", "-"))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join(
            cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown"
        )
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", text)
    assert links or page not in (ROOT / "README.md", ROOT / "docs" / "analysis.md")
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_page_of_the_study_on_smollm2_is_what_its_results_give(workspace: Path) -> None:
    page = Path("study", "smollm2", "README.md")
    page.unlink()
    assert run_command(analysis.study.__main__.main, ["--config", "study/smollm2.yaml", "--report"]) == 0
    assert page.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")


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

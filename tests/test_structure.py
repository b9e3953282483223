"""The packages keep to their layers, cost little to import, and explain themselves."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from helpers import ROOT, run_python

PACKAGES = ("soupkit", "rlhf", "analysis")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Third-party and own packages that a package may import at module level. Progress bars are welcome everywhere.
AT_IMPORT_TIME = {
    "soupkit": {"soupkit", "torch", "safetensors", "numpy", "tqdm"},
    "rlhf": {
        "rlhf", "soupkit", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "yaml", "tqdm",
    },
    "analysis": {
        "analysis", "soupkit", "rlhf", "torch", "transformers", "safetensors", "numpy", "scipy", "yaml", "tqdm",
    },
}  # fmt: skip
# ... and inside functions on top of those.
WHEN_ASKED_FOR = {
    "soupkit": {"yaml", "huggingface_hub", "transformers", "xxhash"},
    "rlhf": {"matplotlib", "gguf", "pyarrow", "datasets", "peft"},
    "analysis": set(),
}
# What measures rather than trains.
PURE_PARTS_OF_RLHF = {
    "checkpointing", "command_line", "config", "data", "decoding", "distributed", "evaluation", "figures", "kl",
    "logprobs", "masking", "metrics", "models", "processor", "randomness", "reference", "rewards", "rollout",
}  # fmt: skip
PLOTTING = set((ROOT / "analysis" / "plots").glob("*.py"))


@lru_cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported when the module is); what only type checkers read is left out."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[tuple[str, bool]]:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import_time) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            yield from (
                (f"{base}{node.module or ''}".rstrip(".") + f".{alias.name}", at_import_time) for alias in node.names
            )
        inside_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import_time and not inside_function)

    yield from visit(tree_of(path), True)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20
    assert ("rlhf.masking.masked_mean", True) in imports(ROOT / "rlhf" / "ppo.py")
    assert ("matplotlib.figure.Figure", False) in imports(ROOT / "rlhf" / "figures.py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_table(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = AT_IMPORT_TIME[package] | ({"matplotlib", "mpl_toolkits"} if path in PLOTTING else set())
    for name, at_import_time in imports(path):
        root = name.split(".")[0]
        if root in sys.stdlib_module_names:
            continue
        assert root in (allowed if at_import_time else allowed | WHEN_ASKED_FOR[package]), name


@pytest.mark.parametrize("path", [path for path in MODULES if "analysis" in name_of(path)], ids=name_of)
def test_analysis_uses_the_pure_parts_of_rlhf_alone(path: Path) -> None:
    used = {name for name, _ in imports(path) if name.split(".")[0] == "rlhf"}
    assert {name.split(".")[1] for name in used if name != "rlhf"} <= PURE_PARTS_OF_RLHF
    assert "rlhf" not in used


def test_importing_analysis_does_not_load_ppo_by_a_detour() -> None:
    reached: set[str] = set()
    paths = [path for path in MODULES if path.relative_to(ROOT).parts[0] == "analysis"]
    while paths:
        for name, at_import_time in imports(paths.pop()):
            package, *rest = name.split(".")
            if package == "rlhf" and rest and at_import_time and rest[0] not in reached:
                reached.add(rest[0])
                paths.append(ROOT / "rlhf" / f"{rest[0]}.py")
    assert "rollout" in reached
    assert not reached & {"ppo", "run_folder"}


def test_rlhf_init_imports_nothing() -> None:
    """``python -m rlhf.ppo`` would otherwise load that module twice."""
    assert {name for name, _ in imports(ROOT / "rlhf" / "__init__.py")} <= {"__future__.annotations"}


def test_importing_soupkit_is_light() -> None:
    script = "import sys, soupkit; print(*{name.split('.')[0] for name in sys.modules})"
    process = run_python(["-c", script])
    assert process.returncode == 0, process.stderr
    loaded = set(process.stdout.split())
    assert {"soupkit", "torch"} <= loaded
    assert not loaded & {"transformers", "rlhf", "analysis", "matplotlib", "yaml", "huggingface_hub", "accelerate"}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_public_functions_have_docstrings(path: Path) -> None:
    tree = tree_of(path)
    assert path.name == "__main__.py" or ast.get_docstring(tree)
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert [function.name for function in public if not ast.get_docstring(function)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_argument_and_result_is_annotated(path: Path) -> None:
    for function in functions(path):
        assert function.returns is not None, f"{function.name}: result"
        given = function.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        missing = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        assert missing == [], function.name

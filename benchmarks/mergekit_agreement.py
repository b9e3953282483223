"""Does soupkit compute what mergekit computes? For developers: it needs a Python that has mergekit installed.

    python benchmarks/mergekit_agreement.py methods --mergekit-python mergekit-venv/bin/python
    python benchmarks/mergekit_agreement.py recipes models --mergekit-python mergekit-venv/bin/python

``methods`` runs one bfloat16 tensor through soupkit, and through mergekit's functions in float64. ``recipes`` runs the
recipes beside this file through both programs, on small checkpoints that it makes. Differences are in units in the last
place of bfloat16 (ulp): the distance between neighbouring bfloat16 numbers at the value that mergekit gives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, markdown, replace_between
from safetensors.torch import load_file, save_file
from torch import Tensor

RECIPES = Path(__file__).resolve().parent / "recipes"
WEIGHTS = (0.5, 0.3, 0.2)
SHARE_GOAL = 5e-4  # of the elements may lie further than HALF from the float64 result
HALF = 0.501
CANCELLED = 2**-13  # of the largest input; a smaller result has no more digits in float32 than bfloat16 shows
ORACLE_NOISE = 2**-48  # of the largest input; what float64 itself does not know
MODELS = ("base", "a", "b", "c")  # what the recipes call them
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"


@dataclass(frozen=True)
class Case:
    """A method with parameters, as both programs take them."""

    method: str
    num_ingredients: int  # without the base
    base: bool
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the whole merge
    own: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of each ingredient
    promised: bool = True  # whether the goals hold for it


WEIGHTED = {"weight": WEIGHTS}
TRIMMED = WEIGHTED | {"density": (0.5, 0.4, 0.3)}
CASES = {
    "linear": Case("linear", 3, False, own=WEIGHTED),
    "slerp": Case("slerp", 2, False, {"t": 0.3}),
    "task_arithmetic": Case("task_arithmetic", 3, True, {"lambda": 0.9}, WEIGHTED),
    "ties": Case("ties", 3, True, {"lambda": 0.9}, TRIMMED),
    "model_stock": Case("model_stock", 3, True),
    "breadcrumbs": Case("breadcrumbs", 3, True, {"lambda": 0.9}, TRIMMED | {"gamma": (0.01, 0.02, 0.03)}),
    "sce": Case("sce", 3, True, {"select_topk": 0.4}),
    "karcher": Case("karcher", 3, False),
    "multislerp": Case("multislerp", 3, False, own=WEIGHTED, promised=False),
    "multislerp, base": Case("multislerp", 3, True, own=WEIGHTED, promised=False),
    "nuslerp": Case("nuslerp", 2, False, own={"weight": WEIGHTS[:2]}, promised=False),
    "nuslerp, rows": Case(
        "nuslerp", 2, False, {"nuslerp_flatten": False}, {"weight": WEIGHTS[:2]}, promised=False
    ),
    "nuslerp, columns": Case(
        "nuslerp", 2, False, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": WEIGHTS[:2]},
        promised=False,
    ),
    "nuslerp, base": Case("nuslerp", 2, True, own={"weight": WEIGHTS[:2]}, promised=False),
    "model_stock, rows": Case("model_stock", 3, True, {"filter_wise": True}, promised=False),
    "nearswap": Case("nearswap", 1, True, {"t": 0.001}, promised=False),
    "arcee_fusion": Case("arcee_fusion", 1, True, promised=False),
    "breadcrumbs_ties": Case("breadcrumbs_ties", 3, True, {}, TRIMMED | {"gamma": (0.01, 0.02, 0.03)}, promised=False),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 when a goal is missed, or 2 for what cannot be compared."""
    options = _parser().parse_args(arguments)
    try:
        met: bool = options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if met else 1


# --- distances ---


def ulp(x: Tensor) -> Tensor:
    """Distance between neighbouring bfloat16 numbers at |x|: 2^(e − 7) for 2^e ≤ |x| < 2^(e + 1), in float64."""
    normal = x.double().abs().clamp(min=2**-126)  # below it the distance stays the same
    return torch.exp2((torch.frexp(normal).exponent - 8).double())


def distance(ours: Tensor, reference: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """How far ours lies from the reference beyond the reference's own noise, in ulp of the reference, by element."""
    return ((ours.double() - reference.double()).abs() - noise).clamp(min=0) / ulp(reference)


# --- methods ---


def random_models(spread: str, num_elements: int, seed: int) -> dict[str, Tensor]:
    """A base and three ingredients, as matrices of rows of 1000, in bfloat16.

    ``close``: fine-tunings, N(0, 0.002) away from a base of N(0, 0.02). Differences of such numbers in bfloat16 take
    few values, so thresholds and sign votes tie often. ``apart``: ingredients of N(0, 0.02) and a base of N(0, 0.0001),
    whose differences have twice the digits, and hardly ever tie. A third of each difference's variance is common to the
    ingredients, as fine-tunings have it, and without which model_stock would have nothing to go by.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(deviation: float) -> Tensor:
        return torch.randn(num_elements // 1000, 1000, generator=generator) * deviation

    base = normal(0.02 if spread == "close" else 1e-4)
    deviation = 0.002 if spread == "close" else 0.02
    common = normal(deviation * 3**-0.5)
    tuned = {f"x{i}": base + common + normal(deviation * (2 / 3) ** 0.5) for i in range(3)}
    return {name: x.bfloat16() for name, x in ({"base": base} | tuned).items()}


def compare_methods(options: argparse.Namespace) -> bool:
    """One tensor through every method, in both programs."""
    lines, met = [], True
    with tempfile.TemporaryDirectory() as folder:
        for spread in ("close", "apart"):
            models = random_models(spread, options.elements, options.seed)
            reference = _mergekit_results(options.mergekit_python, models, Path(folder))
            rows = [_method_row(name, models, reference[name]) for name in CASES]
            met = met and all(row[-1] != "**no**" for row in rows)
            head = ["method", f"over {HALF} ulp", "over 1 ulp", "at a tie", "cancelled", "largest (ulp)", "goal met"]
            lines += [f"{options.elements:,} elements, models {spread}:", "", *markdown(head, rows), ""]
    _show(lines[:-1], options.into, "methods")
    return met


def _method_row(name: str, models: Mapping[str, Tensor], reference: Tensor) -> list[str]:
    case = CASES[name]
    largest = torch.stack([x.double().abs() for x in models.values()]).amax(dim=0)
    far = distance(_soupkit_result(case, models), reference, ORACLE_NOISE * largest)
    tied = at_a_tie(case, models)
    cancelled = _cancelled(reference, list(models.values())).view_as(tied)
    wide, beyond = far > HALF, far > 1
    counts = [beyond, beyond & tied, beyond & cancelled & ~tied]
    # What ties may go either way, and is not counted against the goal.
    missed = float((wide & ~tied).double().mean()) > SHARE_GOAL or bool((beyond & ~tied & ~cancelled).any())
    verdict = "**no**" if missed else "but for cancellation" if bool(counts[-1].any()) else "yes"
    goal = verdict if case.promised else f"{verdict.strip('*')} (not promised)"
    return [name, f"{wide.double().mean():.4%}", *(f"{count.sum():,}" for count in counts), f"{far.max():.3g}", goal]


def _soupkit_result(case: Case, models: Mapping[str, Tensor]) -> Tensor:
    import soupkit

    recipe = soupkit.Recipe(
        case.method,
        [models[f"x{i}"] for i in range(case.num_ingredients)],
        base=models["base"] if case.base else None,
        parameters=case.parameters,
        model_parameters=[{key: values[i] for key, values in case.own.items()} for i in range(case.num_ingredients)],
    )
    result: Tensor = soupkit.merge(recipe)
    return result


def _mergekit_results(python: Path, models: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Every case through mergekit, in a process of its own interpreter."""
    save_file(dict(models), folder / "models.safetensors")
    merged = folder / "merged.safetensors"
    _run([python, Path(__file__).resolve(), "oracle", folder / "models.safetensors", merged])
    return load_file(merged)


def oracle(options: argparse.Namespace) -> bool:
    """(In mergekit's environment.) Every case through mergekit's functions, in float64."""
    from mergekit.merge_methods import merge_tensors  # type: ignore[import-not-found, unused-ignore]

    models = load_file(options.models)
    results = {}
    for name, case in CASES.items():
        ingredients = [f"x{i}" for i in range(case.num_ingredients)]
        # mergekit's slerp must have a base: the side of t = 0.
        inputs = ["base", *ingredients] if case.base else ingredients
        own = {key: dict(zip(ingredients, values, strict=True)) for key, values in case.own.items()}
        results[name] = merge_tensors(
            [models[key] for key in inputs],
            case.method,
            parameters={**case.parameters, **own},
            ids=inputs,
            base_index=0 if case.base or case.method == "slerp" else None,
            dtype=torch.float64,
        ).contiguous()
    save_file(results, options.output)
    return True


def at_a_tie(case: Case, models: Mapping[str, Tensor]) -> Tensor:
    """Where a threshold or a sign vote is so close that rounding, or the order of equal values, decides it."""
    base = models["base"].double()
    deltas = [models[f"x{i}"].double() - base for i in range(case.num_ingredients)]
    tied = torch.zeros_like(base, dtype=torch.bool)
    if case.method == "arcee_fusion":
        return _arcee_fusion_ties(base, base + deltas[0])
    if case.method == "sce":
        variance = torch.stack(deltas).var(dim=0, unbiased=False)
        least = _ascending(variance, variance.numel() - int(int((variance > 0).sum()) * case.parameters["select_topk"]))
        # Its weights are sums over the positions selected: where several tie for the last place, all elements move.
        tied |= _near(variance, least) | bool(_near(variance, least, 1e-12).sum() > 1)
        deltas = [delta * (variance >= least) for delta in deltas]
    thresholds = _thresholds(case, base.numel())
    for i, (delta, ranks) in enumerate(zip(deltas, thresholds, strict=False)):
        values = [_ascending(delta.abs(), rank) for rank in ranks]
        for value in values:
            tied |= _near(delta.abs(), value)
        highest = values[1] if len(values) > 1 else torch.inf
        deltas[i] = delta * ((delta.abs() >= values[0]) & (delta.abs() <= highest))
    if case.method in ("ties", "breadcrumbs_ties", "sce"):
        weights = case.own.get("weight", [1.0] * len(deltas))
        votes = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
        strength = torch.stack(votes).abs().sum(dim=0)
        tied |= (torch.stack(votes).sum(dim=0).abs() <= 1e-6 * strength) & (strength > 0)
    return tied


def _thresholds(case: Case, num_elements: int) -> list[list[int]]:
    """Ascending ranks of the |delta| between which an ingredient is kept: the least and, for bands, the greatest."""
    if case.method == "ties":
        return [[num_elements - max(1, int(density * num_elements))] for density in case.own["density"]]
    if case.method in ("breadcrumbs", "breadcrumbs_ties"):
        bands = []
        for density, gamma in zip(case.own["density"], case.own["gamma"], strict=True):
            kept = int(density * num_elements)
            least = max(0, num_elements - kept - int(gamma * num_elements))
            bands.append([least, least + kept - 1])
        return bands
    return []


def _arcee_fusion_ties(base: Tensor, other: Tensor) -> Tensor:
    p, q = (torch.softmax(x, dim=-1) + 1e-8 for x in (other, base))
    importance = (other - base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    low, median, high = (_ascending(importance, int(q * (importance.numel() - 1))) for q in (0.25, 0.5, 0.75))
    return _near(importance, median + 1.5 * (high - low))


def _ascending(x: Tensor, rank: int) -> float:
    return float(x.flatten().kthvalue(rank + 1).values)


def _near(x: Tensor, value: float, tolerance: float = 1e-6) -> Tensor:
    return (x - value).abs() <= tolerance * abs(value)


# --- recipes ---


def compare_recipes(options: argparse.Namespace) -> bool:
    """Each recipe through both programs, on each kind of model; then with mergekit's arithmetic in float32."""
    rows = []
    for family in ("llama", "gpt2"):
        folder = (options.folder / family).resolve()
        if not folder.exists():
            _make_models(folder, family)
        for recipe in sorted(RECIPES.glob("*.yml")):
            rows += [[family, recipe.stem, *_recipe_row(recipe, folder, exact, options)] for exact in (False, True)]
            print(*rows[-2], *rows[-1][2:], sep="  ", file=sys.stderr, flush=True)
    head = [
        "model",
        "recipe",
        "mergekit computes in",
        "tensors",
        "elements",
        "over 1 ulp",
        "cancelled",
        "largest (ulp)",
    ]
    _show(markdown(head, rows), options.into, "recipes")
    return all(row[-3] == row[-2] for row in rows if row[2] == "float32")


def _make_models(folder: Path, family: str) -> None:
    """``base``, ``a``, ``b`` and ``c``: random weights in bfloat16.

    The base is so small that the differences from it have three times bfloat16's digits and do not tie; half of their
    variance is common to ``a``, ``b`` and ``c``.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

    config: PretrainedConfig = GPT2Config(vocab_size=96, n_embd=64, n_layer=4, n_head=4, n_positions=64)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    common = [torch.randn_like(parameter) for parameter in model.parameters()]
    for name in MODELS:
        with torch.no_grad():
            for parameter, shared in zip(model.parameters(), common, strict=True):
                own = torch.randn_like(parameter)
                parameter.copy_(own * 1e-6 if name == "base" else (own + shared) * 0.014)
        model.bfloat16().save_pretrained(folder / name)
        model.float()


def _recipe_row(recipe: Path, folder: Path, exact: bool, options: argparse.Namespace) -> list[str]:
    """One recipe through both programs. ``exact`` lets mergekit compute in float32 and write bfloat16."""
    import yaml

    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    unchanged = content.get("dtype", "bfloat16")
    if exact:
        content |= {"dtype": "float32", "out_dtype": "bfloat16"}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        copied = Path(scratch) / "recipe.yml"
        # Unless it must be changed, both programs get the very file.
        copied.write_text(yaml.safe_dump(content)) if exact else shutil.copyfile(recipe, copied)
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        _run([sys.executable, "-m", "soupkit", "merge", copied, "--out", ours, "--quiet"], folder)
        script = [options.mergekit_python, "-m", "mergekit.scripts.run_yaml"]
        # Its model card asks the hub about every model.
        _run([*script, copied, theirs, "--no-copy-tokenizer", "--no-write-model-card", "--quiet"], folder)
        soups = [_weights(path) for path in (ours, theirs)]
    if soups[0].keys() != soups[1].keys():
        raise ValueError(f"{recipe.name}: the two soups differ in {sorted(soups[0].keys() ^ soups[1].keys())}")
    models = [_weights(folder / name) for name in MODELS]
    far = torch.cat([distance(soups[0][name], soups[1][name]).flatten() for name in soups[0]])
    cancelled = torch.cat([_cancelled(soups[1][name], [model[name] for model in models]) for name in soups[0]])
    counts = [f"{count.sum():,}" for count in (far > 1, (far > 1) & cancelled)]
    return ["float32" if exact else unchanged, f"{len(soups[0])}", f"{far.numel():,}", *counts, f"{far.max():.3g}"]


def _cancelled(soup: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Where so little is left of what was added up that float32 has no digits to spare. Flat."""
    return (soup.double().abs() < CANCELLED * torch.stack([x.double().abs() for x in models]).amax(dim=0)).flatten()


def _weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


# --- shared ---


def _run(command: Sequence[Any], folder: Path | None = None) -> None:
    """Run a program in a folder. Raises ValueError with its last line when it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    parts, environment = [str(part) for part in command], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(parts, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout or "nothing").strip().splitlines()[-1]
        raise ValueError(f"{' '.join(parts)} ended with code {done.returncode} and printed: {last}")


def _show(lines: Sequence[str], into: Path | None, mark: str) -> None:
    if into:
        replace_between(into, BEGIN.format(mark), END.format(mark), "\n".join(lines))
    else:
        print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/mergekit_agreement.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("methods", help="one tensor through every method, against mergekit in float64")
    command.add_argument("--elements", type=int, default=10**6, help="a multiple of 1000 (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)
    _add_shared(command, "methods")
    command.set_defaults(command=compare_methods)

    command = commands.add_parser("recipes", help="recipes for whole models through both programs")
    command.add_argument("folder", type=Path, metavar="DIR", help="where to make small checkpoints, or has them")
    _add_shared(command, "recipes")
    command.set_defaults(command=compare_recipes)

    command = commands.add_parser("oracle", help="(a child of methods, in mergekit's environment)")
    command.add_argument("models", type=Path)
    command.add_argument("output", type=Path)
    command.set_defaults(command=oracle)
    return parser


def _add_shared(command: argparse.ArgumentParser, mark: str) -> None:
    command.add_argument(
        "--mergekit-python", type=Path, required=True, metavar="PATH", help="a Python that has mergekit installed"
    )
    marks = f"{BEGIN.format(mark)} and {END.format(mark)}"
    command.add_argument("--into", type=Path, metavar="README", help=f"put the tables between {marks} instead")


if __name__ == "__main__":
    sys.exit(main())

"""Model soups: merge tensors, state dicts, modules and checkpoint folders.

>>> import soupkit
>>> soupkit.average(["runs/sft1", "runs/sft2"], out="runs/soup")
"""

from soupkit.api import average, interpolate, merge, sweep
from soupkit.diff import diff
from soupkit.errors import MergeError
from soupkit.fisher import fisher_information, save_fisher
from soupkit.inspection import inspect
from soupkit.learned import learned_soup
from soupkit.methods import METHODS, Method
from soupkit.provenance import VERSION as __version__
from soupkit.provenance import provenance
from soupkit.recipe import Recipe, load_recipe
from soupkit.selection import greedy_soup
from soupkit.trajectory import checkpoints_of, ema, lawa
from soupkit.verification import verify

__all__ = [
    "METHODS",
    "MergeError",
    "Method",
    "Recipe",
    "__version__",
    "average",
    "checkpoints_of",
    "diff",
    "ema",
    "fisher_information",
    "greedy_soup",
    "inspect",
    "interpolate",
    "lawa",
    "learned_soup",
    "load_recipe",
    "merge",
    "provenance",
    "save_fisher",
    "sweep",
    "verify",
]

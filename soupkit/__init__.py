"""Model soups: average and interpolate tensors, state dicts, modules and checkpoint folders.

>>> import soupkit
>>> soupkit.average(["runs/sft1", "runs/sft2"], out="runs/soup")
"""

from soupkit.api import average, interpolate
from soupkit.errors import MergeError
from soupkit.methods import METHODS, Method
from soupkit.provenance import VERSION as __version__
from soupkit.provenance import provenance

__all__ = ["METHODS", "MergeError", "Method", "__version__", "average", "interpolate", "provenance"]

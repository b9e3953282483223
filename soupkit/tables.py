"""Plain text that a person reads: aligned tables, lists of names, and numbers short enough for both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Columns aligned by spaces: the first ``num_left`` to the left, the others, numbers, to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def name_list(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")


def number(x: float, digits: int = 4) -> str:
    """So many significant digits; "-" for what is not defined."""
    return "-" if math.isnan(x) else f"{x:.{digits}g}"


def finite_or_none(x: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return x if math.isfinite(x) else None


def shape_text(shape: Sequence[int]) -> str:
    """ "2048×512"; "()" for a tensor of no dimensions."""
    return "×".join(map(str, shape)) or "()"


def percent(share: float) -> str:
    """A share in per cent. What is not all, or not nothing, never reads as if it were."""
    if math.isnan(share):
        return "-"
    if 0 < share < 1:
        return f"{min(max(100 * share, 0.01), 99.99):.2f} %"
    return f"{100 * share:.0f} %"


def size(num_bytes: int) -> str:
    """Bytes in decimal units: "831 B", "2.20 GB"."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.2f} {'kMGT'[power - 1]}B"


def printable(text: str) -> str:
    """The text on one line, with control characters and the like as escapes: names come from files of any origin."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

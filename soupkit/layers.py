"""Which layer a tensor belongs to, told by its name alone: no list of architectures is needed.

The first part of a name that is a number is the layer: 3 in ``model.layers.3.mlp.experts.5.weight``. Names with the
same text before it form one stack, so that an encoder and a decoder have layers of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LAYER_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack and the layer, such as ("model.layers.", 3); None for a tensor outside stacks."""
    found = LAYER_INDEX.search(name)
    return (name[: found.start()], int(found.group())) if found else None


def layer_name(name: str) -> str | None:
    """The layer of a tensor in one piece, such as "model.layers.3"; None for a tensor outside stacks."""
    place = layer_of(name)
    return f"{place[0]}{place[1]}" if place else None


def stack_sizes(names: Iterable[str]) -> dict[str, int]:
    """Each stack's number of layers: one more than its largest number."""
    sizes: dict[str, int] = {}
    for stack, layer in filter(None, map(layer_of, names)):
        sizes[stack] = max(sizes.get(stack, 0), layer + 1)
    return sizes


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor lies along the layers, from 0 (first layer) to 1 (last): i / (L − 1) for layer i of L.

    A stack of one layer is at 1, tensors outside stacks are at 0, as in mergekit.
    """
    names = list(names)
    sizes = stack_sizes(names)
    positions = dict.fromkeys(names, 0.0)
    for name in names:
        if place := layer_of(name):
            stack, layer = place
            positions[name] = layer / (sizes[stack] - 1) if sizes[stack] > 1 else 1.0
    return positions

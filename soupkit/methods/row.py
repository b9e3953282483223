"""What a row of the table of methods consists of, and what a method gets to see.

A method sees the same block of every model, already in the working precision, and gives the soup's block. What it must
know of the whole tensors (dot products, thresholds) it asks for beforehand, in its ``survey``: each question is one
pass over the tensor, block by block, so no method ever holds a whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from soupkit.errors import MergeError


@dataclass(frozen=True)
class Blocks:
    """The same block of every model. Each is flat, [N], or whole rows, [R, C], for methods that ask for whole rows.

    The blocks are copies that the method may overwrite: memory that is in the cache already is the fastest there is.
    A row is a slice along the tensor's first dimension, flattened; a tensor of at most one dimension is one row.
    """

    ingredients: Sequence[Tensor]
    base: Tensor | None
    fishers: Sequence[Tensor]
    shape: tuple[int, ...]  # of the whole tensor
    random: Callable[[int], Tensor]  # ingredient → uniform int16 values, one per element of the block

    @property
    def origin(self) -> Tensor:
        """The base, for methods that require one."""
        assert self.base is not None
        return self.base

    def take_deltas(self) -> list[Tensor]:
        """The task vectors xᵢ − base, in the place of the ingredients."""
        return [x.sub_(self.origin) for x in self.ingredients]

    def take_directions(self) -> list[Tensor]:
        """The task vectors where there is a base, else the ingredients."""
        return list(self.ingredients) if self.base is None else self.take_deltas()

    def copy(self) -> Blocks:
        """Blocks of its own for another use."""
        base = None if self.base is None else self.base.clone()
        return replace(
            self,
            ingredients=[x.clone() for x in self.ingredients],
            base=base,
            fishers=[x.clone() for x in self.fishers],
        )


class Whole(Protocol):
    """The whole tensors, as a survey sees them."""

    @property
    def num_elements(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def total(self, function: Callable[[Blocks], Tensor]) -> Tensor:
        """Σ function(blocks) over all blocks, in order, in float64 on the CPU. One pass."""

    def order_statistics(
        self, function: Callable[[Blocks], Sequence[Tensor]], ranks: Sequence[Sequence[int]], *, rowwise: bool = False
    ) -> list[list[float]]:
        """The exact values that would stand at 0-based ``ranks[q]`` if quantity q were sorted in ascending order.

        ``function`` gives the quantities as tensors of the blocks' size. It must be elementwise, unless ``rowwise``.
        About two passes.
        """


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method: what it means, its kind and range, and its default unless it is required."""

    meaning: str
    kind: type = float
    default: Any = None
    required: bool = False
    per_ingredient: bool = False  # one value per ingredient; a single value serves all
    low: float | None = None
    high: float | None = None
    counts_models: bool = False  # it cannot exceed the number of ingredients

    def check(self, name: str, value: Any) -> Any:
        """One value, brought to the parameter's kind. Raises MergeError for what is none or out of range."""
        if value is None and self.default is None and not self.required:
            return None
        if self.kind is bool:
            if not isinstance(value, bool):
                raise MergeError(f"{name} is {value!r}: it must be true or false")
            return value
        try:
            # Whole numbers stay as they are, however large: a seed may have more digits than a float.
            number = value if self.kind is int and isinstance(value, int) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not -math.inf < number < math.inf:
            raise MergeError(f"{name} is {value!r}: it must be a finite number")
        if self.kind is int and number != int(number):
            raise MergeError(f"{name} is {value!r}: it must be a whole number")
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            raise MergeError(f"{name} is {value!r}: it must be {self.range}")
        return int(number) if self.kind is int else number

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return "any number" if self.high is None else f"at most {self.high:g}"


@dataclass(frozen=True)
class Fallback:
    """What a method does instead with tensors that it does not fit. soup.json says how many they were."""

    rule: str  # what it does, and with which tensors
    taken: Callable[..., bool]  # (**what the survey found) -> whether the tensor is one of them


@dataclass(frozen=True)
class Method:
    """A row of the table: how a method is computed, what it needs, where it comes from."""

    function: Callable[..., Tensor]  # (blocks, **parameters, **what the survey found) -> block
    summary: str
    formula: str
    paper: str
    departures: str = "none"
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["none", "optional", "required"] = "none"
    min_ingredients: int = 1  # not counting the base
    max_ingredients: int | None = None
    needs_fishers: bool = False
    survey: Callable[..., dict[str, Any]] | None = None  # (whole, **parameters) -> more keywords for the function
    fallback: Fallback | None = None  # for methods with a survey
    whole_rows: Callable[[Mapping[str, Any]], bool] = lambda parameters: False
    shows_non_finite: bool = True  # whether a NaN or infinite value of any model shows in the result
    check: Callable[[Mapping[str, Any]], object] = lambda parameters: None  # raises MergeError for a bad combination

    @property
    def num_models(self) -> str:
        """How many models it takes beside the base, in words."""
        least, most = self.min_ingredients, self.max_ingredients
        if most is None:
            return f"{least} or more"
        return ("exactly one" if most == 1 else f"exactly {least}") if least == most else f"{least} to {most}"

    def require_fit(self, name: str, num_ingredients: int, has_base: bool, num_fishers: int) -> None:
        """Raise MergeError unless the method can be applied to so many models."""
        if not self.min_ingredients <= num_ingredients <= (self.max_ingredients or num_ingredients):
            beside = " beside the base" if has_base else ""
            raise MergeError(f"found {num_ingredients} models to merge{beside}: {name} takes {self.num_models}")
        if self.base == "required" and not has_base:
            raise MergeError(f"{name} needs a base model, the one that the others were fine-tuned from: give base")
        if self.base == "none" and has_base:
            raise MergeError(f"{name} takes no base model: leave base out, or list it among the models")
        if num_fishers != (num_ingredients if self.needs_fishers else 0):
            takes = "one Fisher estimate per model" if self.needs_fishers else "no Fisher estimates"
            raise MergeError(f"found {num_fishers} Fisher estimates for {num_ingredients} models: {name} takes {takes}")

    def keywords(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as the function takes them: ``lambda`` is no name in Python, and some have no effect."""
        return {"lambda_" if name == "lambda" else name: v for name, v in parameters.items() if name != "int8_mask"}

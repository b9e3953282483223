"""Greedy soups: which of many candidates are worth averaging, decided by a score on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soupkit.api import Model, average
from soupkit.errors import MergeError
from soupkit.options import check_options, without_writing
from soupkit.publish import check_target


@dataclass(frozen=True)
class GreedySoup:
    """What :func:`greedy_soup` tried and made.

    ``names`` and ``scores`` (each candidate's own) are in the order given, ``order`` has the names by falling score.
    ``history`` holds (name, score of the soup with it, whether it was kept) in the order tried; ``accepted`` the names
    that were kept, and ``score`` the score of ``soup``, their average.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...]
    order: tuple[str, ...]
    accepted: tuple[str, ...]
    history: tuple[tuple[str, float, bool], ...]
    score: float
    soup: Any


def greedy_soup(
    candidates: Sequence[Model],
    evaluate: Callable[[Any], float],
    *,
    names: Sequence[str] | None = None,
    out: str | Path | None = None,
    tolerance: float = 0.0,
    progress: bool = True,
    **options: Any,
) -> GreedySoup:
    """Average the candidates that raise a held-out score: the best first, then each next one that does not lower it.

    Recipe 1 of the paper: sort the candidates by their own score, highest first (equal scores keep the order given).
    Start from the best. Add the others one at a time: a candidate stays when

        evaluate(average(accepted + candidate)) ≥ evaluate(average(accepted)) − tolerance

    With tolerance 0 the soup is never worse than the best candidate on the held-out data. The paper's recipe accepts
    equal scores (≥), as here; the authors' published code asks for a higher one (>). For n candidates ``evaluate`` is
    called 2n − 1 times, always on a copy: candidates are never changed. Every soup is rounded once from its
    ingredients, so the result does not depend on what was tried before. The whole is as deterministic as ``evaluate``.

    Args:
        candidates: tensors, state dicts, modules or folders, as :func:`soupkit.average` takes them.
        evaluate: ``evaluate(model) -> float``, higher is better. It receives the candidates' kind; for folders, a state
            dict in memory, so that no more than one model is held. Its exceptions pass through.
        names: one per candidate, for the result and the messages. None: the folders, or "candidate 1" and so on.
        out: the folder to write the soup to (folders only). None: the soup is the candidates' kind, or a state dict.
        tolerance: how far a new ingredient may lower the current soup's score; with a negative one it must raise the
            score by at least that much. It counts at each step, so several steps may add up to more.
        progress: show a progress bar on stderr.
        options: those of :func:`soupkit.average`, such as ``dtype`` and ``overwrite``.

    Raises:
        MergeError (a ValueError): candidates that do not fit together (before anything is evaluated), or a score that
            is not a number, with the candidate's name.
        FileExistsError: ``out`` exists and ``overwrite`` is not set.

    Example:
        >>> candidates = [torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([9.0])]
        >>> soupkit.greedy_soup(candidates, lambda x: -abs(x.item() - 3), progress=False).accepted
        ('candidate 2', 'candidate 1')

    Paper: Wortsman et al. 2022, "Model soups", recipe 1, https://arxiv.org/abs/2203.05482
    """
    labels = _names(candidates, names)
    if not math.isfinite(tolerance):
        raise MergeError(f"tolerance is {tolerance}: give a finite number, such as 0")
    check_candidates(candidates, out, options)

    def score_of(chosen: Sequence[int], tried: int) -> float:
        soup = average([candidates[index] for index in chosen], progress=False, **without_writing(options))
        score = _number(evaluate(soup), labels[tried])
        bar.update()
        return score

    with tqdm(total=2 * len(labels) - 1, desc="greedy soup", disable=not progress, dynamic_ncols=True) as bar:
        scores = [score_of([index], index) for index in range(len(labels))]
        order = sorted(range(len(labels)), key=lambda index: -scores[index])  # stable: equal scores keep their order
        accepted, score = [order[0]], scores[order[0]]
        history = [(labels[order[0]], score, True)]
        for index in order[1:]:
            new_score = score_of([*accepted, index], index)
            kept = new_score >= score - tolerance
            history.append((labels[index], new_score, kept))
            if kept:
                accepted.append(index)
                score = new_score
    soup = average([candidates[index] for index in accepted], out=out, progress=progress, **options)
    return GreedySoup(
        names=tuple(labels),
        scores=tuple(scores),
        order=tuple(labels[index] for index in order),
        accepted=tuple(labels[index] for index in accepted),
        history=tuple(history),
        score=score,
        soup=soup,
    )


def check_candidates(candidates: Sequence[Model], out: str | Path | None, options: Mapping[str, Any]) -> None:
    """Refuse what would fail in the end before the long work begins: an ``out`` in the way, candidates that do not fit.

    Raises what :func:`soupkit.average` raises. It is called to find out: one merge costs far less than one evaluation.
    """
    check_options(options)
    if out is not None:
        for candidate in candidates:
            if not isinstance(candidate, (str, Path)):
                kind = type(candidate).__name__
                raise MergeError(f"out={str(out)!r} is for folders, and a candidate is a {kind}: leave it out")
        check_target(out, map(str, candidates), bool(options.get("overwrite")))
    average(candidates, progress=False, **(options if out is None else without_writing(options)))


def _names(candidates: Sequence[Model], names: Sequence[str] | None) -> list[str]:
    if names is None:
        labels = [
            str(candidate) if isinstance(candidate, (str, Path)) else f"candidate {number}"
            for number, candidate in enumerate(candidates, start=1)
        ]
    else:
        labels = list(names)
    if len(labels) != len(candidates):
        raise MergeError(f"found {len(labels)} names for {len(candidates)} candidates: give one each")
    for position, label in enumerate(labels):
        if label in labels[:position]:
            raise MergeError(f"two candidates are called {label!r}: give each its own name with names=[...]")
    return labels


def _number(score: Any, name: str) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise MergeError(
            f"evaluate gave a {type(score).__name__} for {name}: return one number, higher is better"
        ) from None
    if math.isnan(value):
        raise MergeError(f"evaluate gave NaN for {name}: return a number, or leave this candidate out")
    return value

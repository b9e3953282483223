"""Tables of a study that was never run: plausible numbers for every row that a configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from helpers import ROOT

from analysis.study.config import START, Study
from analysis.study.effects import Tables
from analysis.study.references import reference_weights
from analysis.study.store import HELD_OUT, Row

REACHED = {None: 32.0, 0.02: 26.0, 0.1: 8.5, 0.4: 1.4}  # KL to the start, nats
LAXER = {"soup 2": 1.25, "soup 3": 1.3, "both": 1.15, "weighted KLs": 1.22, "mixture": 1.2, "moving average": 1.1}
PREDICTED_KL = (0.6, 1.0, 1.5, 2.2, 3.0)


@lru_cache
def read_study() -> Study:
    return Study.read(ROOT / "study" / "reviews.yaml")


def reviews_study(draws: int = 8, results: Path = Path("results"), page: Path | None = None) -> Study:
    """The project's own study, with so many draws."""
    return replace(read_study(), draws=list(range(1, draws + 1)), results=results, page=page)


def plausible_tables(study: Study, seed: int = 0) -> Tables:
    """Rows in a shuffled order. Gold rises with √KL and falls with KL; soups go further, and earn a little more."""
    random = np.random.default_rng(seed)
    level = {draw: 0.15 * random.normal() for draw in study.draws}

    def measures(kl: float, gain: float, draw: int) -> dict[str, float]:
        kl = max(kl * (1 + 0.06 * random.normal()), 0) if kl else 0.0
        row: dict[str, float] = {}
        for prefix, shift in (("", 0.0), (HELD_OUT, -0.1)):
            gold = 1.25 + level[draw] + shift + 1.05 * kl**0.5 - 0.2 * kl + gain * (kl > 0) + 0.03 * random.normal()
            row |= {
                f"{prefix}gold_reward": gold,
                f"{prefix}proxy_reward": 0.05 + 0.72 * kl**0.5 + 0.02 * random.normal(),
                f"{prefix}kl/base": 2.4 + 0.95 * kl + 0.1 * random.normal(),
                f"{prefix}kl/sft1": kl,
                f"{prefix}kl/soup 2": 0.6 + kl * 0.97,
                f"{prefix}kl/reference": np.nan,
                f"{prefix}entropy": 1.35 - 0.1 * kl**0.5,
                f"{prefix}response_length": 21 - 0.2 * kl**0.5 + 0.2 * random.normal(),
                f"{prefix}distinct_2": 0.21 - 0.01 * kl**0.5,
                f"{prefix}unique_responses": 1 - 0.02 * kl**0.5,
                f"{prefix}win_rate/start": 0.5 + 0.1 * min(kl, 3),
                f"{prefix}win_rate/baseline": 0.5 + gain,
            }
        return row

    runs: list[Row] = []
    for case in study.cases():
        weights = reference_weights(study, case.arm) or {}
        other = weights.get("{sft2}", 0.0)
        gain = (
            0.0 if case.arm in ("single", "none") else 0.08 if case.arm == "both" else 0.05 + 0.2 * other * (1 - other)
        )
        factor = LAXER.get(case.arm, 1 + 0.5 * other)
        row = measures(REACHED[case.kl_coef] * factor, gain, case.draw)
        if case.arm not in ("none", "moving average"):
            for prefix in ("", HELD_OUT):
                row[f"{prefix}kl/reference"] = row[f"{prefix}kl/{'sft1' if case.arm == 'single' else 'soup 2'}"]
        row |= {"distance": 0.5 + 0.02 * REACHED[case.kl_coef], "skipped_steps": float(random.integers(3))}
        row |= {"largest_drop": 0.3 + 0.05 * random.normal()}
        beta = np.nan if case.kl_coef is None else case.kl_coef
        names = {"regime": case.regime, "draw": case.draw, "arm": case.arm, "kl_coef": beta, "version": "0" * 8}
        runs.append(names | row)
    models: list[Row] = []
    predictions: list[Row] = []
    for regime in study.regimes:
        for draw in study.draws:
            for number, model in enumerate([*study.measure.models, START]):
                loss = (1.60 if model == "base" else 1.30 + 0.01 * number) + 0.01 * random.normal()
                names = {"regime": regime, "draw": draw, "model": model, "version": "0" * 8}
                models.append(names | measures(0, 0, draw) | {"loss": np.nan if model == START else loss})
            for number, reference in enumerate(study.predict.references if study.predict else []):
                noise = 0.04 * random.normal()
                for kl, kl_coef in zip(PREDICTED_KL, (8.0, 4.0, 2.0, 1.0, 0.5), strict=True):
                    gold = 1.25 + level[draw] + 0.5 * kl**0.5 + 0.05 * number + noise
                    names = {"regime": regime, "draw": draw, "reference": reference, "kl_coef": kl_coef}
                    predictions.append(names | {"gold_reward": gold, "kl/base": 2.0 + kl, "kl/reference": kl})
    timings: list[Row] = [
        {"table": "runs", "regime": row["regime"], "draw": row["draw"], "name": row["arm"], "kl_coef": row["kl_coef"]}
        | {"seconds": 30 + random.exponential(5), "workers": 2.0, "machine": "a laptop, 2 cores"}
        for row in runs
    ]
    return Tables(*([rows[i] for i in random.permutation(len(rows))] for rows in (runs, models, predictions, timings)))

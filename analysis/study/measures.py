"""What one policy is worth, and what samples of a reference promise: rows of a study's tables, without their keys.

Responses to training prompts, and to held-out ones under ``held_out/``:

==========================  ============================================================================================
proxy_reward, gold_reward   and every other reward by its name; mean over responses, in the reward's own units
kl/NAME                     exact KL(π‖NAME), nats per response
kl/reference                to the reference of the run: Σ_i w_i KL(π‖ρ_i) for weighted KLs; NaN for one that moves
entropy                     exact, nats per token
response_length             tokens, end of sequence included
distinct_2                  different pairs of neighbouring tokens / all, over all responses together
unique_responses            different responses / all
win_rate/NAME               share of responses with more gold than NAME's to the same prompt; ties count ½
==========================  ============================================================================================

and of a run ``distance``, ‖π − π₀‖₂ over all weights from the policy it started at, ``skipped_steps``, and
``largest_drop``, the most that the batch's proxy reward fell from one update to the next (0 where it never did).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import soupkit
from analysis.exploration import distinct_n, response_tokens
from analysis.frontier import frontier_of_samples, score_samples
from analysis.study.config import START, Study, filled
from analysis.study.store import HELD_OUT
from rlhf.data import load_examples, load_prompts
from rlhf.evaluation import evaluate, evaluate_loss
from rlhf.metrics import read_json_lines
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.randomness import generator
from rlhf.reference import ModelReference, ReferenceSettings, Source, load_model_reference
from rlhf.rewards import Reward, load_reward
from rlhf.rollout import sample

OWN = "reference"  # of the run that is measured
BATCH = 512  # responses handled at once


class Measures:
    """The prompts, rewards and models of a draw in one regime, loaded once for all that is measured there."""

    def __init__(self, study: Study, paths: Mapping[str, str], device: torch.device) -> None:
        self.study, self.device, self.paths = study, device, paths
        policy = filled(study.ppo["policy"], paths)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(policy)
        rewards = filled(study.measure.rewards, paths)
        self.rewards: dict[str, Reward] = {
            name: load_reward(reward, policy=policy, device=device) for name, reward in rewards.items()
        }
        self.prompts = {
            "": load_prompts(filled(study.measure.prompts, paths), self.tokenizer),
            HELD_OUT: load_prompts(filled(study.measure.held_out, paths), self.tokenizer),
        }
        self.start: PreTrainedModel = load_causal_lm(policy, device=device)
        self._models: dict[str, ModelReference] = {}

    def model(self, name: str) -> ModelReference:
        """A model of the study's ``measure.models``."""
        if name not in self._models:
            given = filled(self.study.measure.models[name], self.paths)
            folders = [given] if isinstance(given, str) else given
            self._models[name] = load_model_reference(folders, device=self.device)
        return self._models[name]

    def of_policy(
        self, policy: PreTrainedModel, reference: Mapping[str, tuple[float, Source]]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The sampled measures of a policy, and the gold reward of every response, {prompts: [n]}.

        ``reference`` are the models that make its reference, with their weights; empty where it has none to measure.
        """
        row: dict[str, float] = {}
        golds: dict[str, np.ndarray] = {}
        others: dict[str, Source] = {name: self.model(name) for name in self.study.measure.kl}
        parts = {f"{OWN}/{name}": source for name, (_, source) in reference.items()}
        for where, prompts in self.prompts.items():
            rollout = sample(
                policy,
                self.tokenizer,
                list(islice(cycle(prompts), self.study.measure.episodes)),
                max_new_tokens=self.study.ppo["max_new_tokens"],
                temperature=self.temperature,
                generator=generator(self.seed, f"study {where}"),
                batch_size=BATCH,
                engine=self.study.ppo.get("engine", "decode"),
            )
            scores = {name: reward(rollout) for name, reward in self.rewards.items()}
            found = evaluate(policy, rollout, scores, others | parts, temperature=self.temperature, batch_size=BATCH)
            responses = response_tokens(rollout, self.tokenizer.eos_token_id)
            own = sum(weight * found.kl[f"{OWN}/{name}"].mean for name, (weight, _) in reference.items())
            measured = {
                **{name: estimate.mean for name, estimate in found.rewards.items()},
                **{f"kl/{name}": found.kl[name].mean for name in others},
                f"kl/{OWN}": own if reference else math.nan,
                "entropy": found.entropy.mean,
                "response_length": found.response_length.mean,
                "distinct_2": distinct_n(responses, 2),
                "unique_responses": len({tuple(response) for response in responses}) / len(responses),
            }
            row |= {f"{where}{name}": float(value) for name, value in measured.items()}
            golds[where] = scores["gold_reward"].double().cpu().numpy()
        return row, golds

    def of_models(self) -> dict[str, tuple[dict[str, float], dict[str, np.ndarray]]]:
        """The same of the policy's start and of every measured model, with the loss on held-out demonstrations."""
        loss = filled(self.study.measure.loss, self.paths)
        examples = load_examples(loss, self.tokenizer) if loss else []
        measured = {}
        for name in (START, *self.study.measure.models):
            model = self.start if name == START else self.model(name).model
            row, golds = self.of_policy(model, {})
            if examples:
                row["loss"] = evaluate_loss(model, examples, self.tokenizer.pad_token_id).mean
            measured[name] = row, golds
        return measured

    def of_run(self, folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """All measures of a finished run but its win rates, and its gold rewards."""
        policy = load_causal_lm(folder / "policy", device=self.device)
        row, golds = self.of_policy(policy, _reference(settings, self.device))
        row["distance"] = soupkit.diff(self.start, policy, progress=False).total.l2
        updates = read_json_lines(folder / "metrics.jsonl")
        row["skipped_steps"] = float(sum(update["skipped_steps"] for update in updates))
        row["largest_drop"] = largest_drop([update["proxy_reward"] for update in updates])
        return row, golds

    def predictions(self) -> dict[str, list[dict[str, float]]]:
        """The ideal frontier of every predicted reference, from samples of the reference alone: {reference: points}."""
        predict = self.study.predict
        if predict is None:
            return {}
        axis = self.study.compare.axis.removeprefix("kl/")
        found = {}
        for name in predict.references:
            samples = score_samples(
                self.model(name).model,
                self.rewards["proxy_reward"],
                self.prompts[""],
                self.tokenizer,
                max_new_tokens=self.study.ppo["max_new_tokens"],
                num_samples=predict.samples,
                rewards={"gold_reward": self.rewards["gold_reward"]},
                others={axis: self.model(axis)},
                temperature=self.temperature,
                seed=self.seed,
                device=self.device,
                progress=False,
            )
            frontier = frontier_of_samples(samples, num_resamples=1)
            found[name] = [
                {"kl_coef": beta, **dict(zip(frontier.names, means, strict=True)), "effective": effective}
                for beta, means, effective in zip(
                    frontier.kl_coefs.tolist(), frontier.mean.T.tolist(), frontier.mean_effective.tolist(), strict=True
                )
                if not math.isnan(means[0])
            ]
        return found

    @property
    def temperature(self) -> float:
        """The temperature that runs sample at."""
        return float(self.study.ppo.get("temperature", 1.0))

    @property
    def seed(self) -> int:
        """The seed of what is sampled: all policies of a draw share their random numbers."""
        return int(self.paths["draw"])


def win_rate(golds: np.ndarray, others: np.ndarray) -> float:
    """Share of n responses with more gold than the other's to the same prompt; ties count ½. [n], [n]"""
    return float(((golds > others) + 0.5 * (golds == others)).mean())


def largest_drop(rewards: Sequence[float]) -> float:
    """max_t (r_{t−1} − r_t), and 0 where no update fell."""
    return float(max(0.0, *(-np.diff(rewards)))) if len(rewards) > 1 else 0.0


def _reference(settings: Mapping[str, Any], device: torch.device) -> Mapping[str, tuple[float, Source]]:
    """The models of a run's reference with their weights; none for a reference that moves, or where there is none."""
    kind = settings.get("reference_kind", "soup")
    if kind not in ("soup", "weighted_kl", "mixture"):
        return {}
    models = settings.get("reference") or [settings["policy"]]
    reference = ReferenceSettings(kind, models, settings.get("reference_weights") or None).load(device)
    return reference.sources

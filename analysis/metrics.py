"""Metrics for landscapes: functions of a model that return an estimate, or several by name.

A metric is any callable ``metric(model)`` that returns

- a float, or
- a pair (mean, standard error), such as :class:`rlhf.metrics.Estimate`, or
- a :class:`PerExample`, whose values are kept for barriers with confidence intervals, or
- a mapping of names to any of these: several metrics in one pass.

A landscape takes a dict of name to metric. A mapping's entries are filed under their own names, anything else under the
metric's. NaN is a value like others: it is kept, counted (``num_nan``) and drawn as missing.

Metrics are called under ``torch.no_grad``; one that needs gradients enables them itself. A metric may carry
a string ``description``, which is stored with results and must agree on resuming.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data import Example, Prompt
from rlhf.evaluation import evaluate, evaluate_loss, example_losses
from rlhf.metrics import Estimate, ratio_estimate
from rlhf.randomness import generator
from rlhf.reference import Source
from rlhf.rewards import Reward
from rlhf.rollout import sample


@dataclass(frozen=True)
class PerExample:
    """A metric of n examples, in an order that is the same at every point: mean Σ a / Σ b, a and b for each example.

    numerators    [n]  a, such as the sum of an example's negative log-likelihoods
    denominators  [n]  b, such as its number of tokens; 1 for a plain mean
    """

    numerators: ArrayLike | Tensor
    denominators: ArrayLike | Tensor = 1.0

    @property
    def pairs(self) -> np.ndarray:
        """Numerators and denominators, [2, n] float64."""
        a, b = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (self.numerators, self.denominators))
        return torch.stack([a, b.expand_as(a)]).numpy()

    def estimate(self) -> Estimate:
        """The mean, with its linearised standard error."""
        return ratio_estimate(*torch.from_numpy(self.pairs))


Value = float | tuple[float, float] | PerExample
Measured = Estimate | PerExample
Metric = Callable[[Any], Value | Mapping[str, Value]]


@dataclass(frozen=True)
class Described:
    """A metric that says what it measures, so that an unfinished result is not continued with another."""

    function: Metric
    description: str

    def __call__(self, model: Any) -> Value | Mapping[str, Value]:
        return self.function(model)


@dataclass(frozen=True)
class ResponseLoss(Described):
    """The metric of :func:`loss`, which also says what it is the loss of, for those who differentiate it."""

    examples: Sequence[Example]
    pad_token_id: int


def loss(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32) -> ResponseLoss:
    """Mean negative log-likelihood per response token, in nats: Σ nll / Σ tokens over all examples.

    :func:`analysis.hessian` takes its second derivative.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("examples: none given; give at least one demonstration")

    def measure(model: PreTrainedModel) -> Estimate:
        return evaluate_loss(model, examples, tokenizer.pad_token_id, batch_size=batch_size)

    description = f"loss of {len(examples)} examples {digest(examples)}"
    return ResponseLoss(measure, description, examples, tokenizer.pad_token_id)


def loss_per_example(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32
) -> Metric:
    """:func:`loss`, with the sum and the number of tokens of every example kept at every point."""
    whole, examples = loss(examples, tokenizer), list(examples)

    def measure(model: PreTrainedModel) -> PerExample:
        return PerExample(*example_losses(model, examples, tokenizer.pad_token_id, batch_size=batch_size))

    return Described(measure, f"{describe({'loss': whole})['loss']}, each kept")


def sampled(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rewards: Mapping[str, Reward],
    references: Mapping[str, Source],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> Metric:
    """Samples one response to every prompt, once, and measures it every way: the names are those of a run's metrics.

    NAME of ``rewards``   the reward's own units, mean over responses
    ``kl/NAME``           exact KL(model ‖ reference) for NAME of ``references``, nats per response, mean over responses
    ``entropy``           exact, nats per token, mean over all response tokens
    ``response_length``   tokens per response, end-of-sequence included

    Every call draws the same random numbers, each response its own (common random numbers), so that differences
    between points are less noisy than the standard errors, which are over prompts and samples, suggest.

    ``references`` must not share weights with the model that is moved. ``batch_size`` bounds how many responses are
    handled at once.
    """
    prompts, rewards, references = list(prompts), dict(rewards), dict(references)
    if not prompts:
        raise ValueError("prompts: none given; give at least one prompt")

    def measure(model: PreTrainedModel) -> dict[str, Value]:
        for name, reference in references.items():
            if getattr(reference, "model", None) is model:
                raise ValueError(f"reference {name!r}: is the model that is moved; load it once more for a reference")
        rollout = sample(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator(seed, "landscape"),
            batch_size=batch_size,
        )
        scores = {name: reward(rollout) for name, reward in rewards.items()}
        result = evaluate(model, rollout, scores, references, temperature=temperature, batch_size=batch_size)
        return {
            **result.rewards,
            **{f"kl/{name}": estimate for name, estimate in result.kl.items()},
            "entropy": result.entropy,
            "response_length": result.response_length,
        }

    return Described(
        measure,
        f"one response of at most {max_new_tokens} tokens to {len(prompts)} prompts {digest(prompts)}, temperature "
        f"{temperature}, seed {seed}; rewards {_names_of(rewards)}, references {_names_of(references)}",
    )


def describe(metrics: Mapping[str, Metric]) -> dict[str, str]:
    """What each metric says of itself, its name where it says nothing."""
    if not metrics:
        raise ValueError("metrics: none given; give a dict of name to metric")
    for name, metric in metrics.items():
        if not callable(metric):
            raise ValueError(
                f"metric {name!r}: a {type(metric).__name__} is not callable; give a function of the model"
            )
    return {name: getattr(metric, "description", name) for name, metric in metrics.items()}


def measure(metrics: Mapping[str, Metric], model: Any) -> dict[str, Measured]:
    """Call every metric once; a standard error that a metric does not give is NaN."""
    estimates: dict[str, Measured] = {}
    for name, metric in metrics.items():
        value = metric(model)
        for key, entry in value.items() if isinstance(value, Mapping) else [(name, value)]:
            if key in estimates:
                raise ValueError(f"metric {name!r}: gives {key!r}, which another metric gives already; rename one")
            estimates[key] = _estimate(key, entry)
    return estimates


def _estimate(name: str, value: Value) -> Measured:
    try:
        if isinstance(value, PerExample):
            return PerExample(*value.pairs)  # in memory of its own, not on the model's device
        mean, stderr = value if isinstance(value, tuple) else (value, math.nan)
        return Estimate(float(mean), float(stderr))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"metric {name!r}: returned {value!r:.80}; return a float, (mean, stderr) or PerExample"
        ) from None


def _names_of(things: Mapping[str, object]) -> dict[str, str]:
    """What rewards and references are called by themselves: a folder's or function's name, else their kind's."""
    found = {}
    for name, thing in sorted(things.items()):
        model = getattr(thing, "model", None)
        found[name] = getattr(thing, "name", None) or getattr(model, "name_or_path", None) or type(thing).__name__
    return found


def digest(items: Sequence[object]) -> str:
    """A short hash of prompts or examples: what tells those of two computations apart."""
    return hashlib.sha256(repr(items).encode()).hexdigest()[:12]

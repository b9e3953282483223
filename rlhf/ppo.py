"""PPO whose KL reference is a soup of supervised-fine-tuned models (SALSA, arXiv 2411.01798), told top to bottom.

    python -m rlhf.ppo                    # the built-in task: minutes on two cores, nothing to download
    python -m rlhf.ppo --policy sft1 --reference sft1 sft2 --reward reward --prompts prompts.jsonl --output run
    accelerate launch -m rlhf.ppo ...     # several processes: the same learning curve

One update: sample responses, score them, measure the KL to the reference, turn both into token rewards, estimate
advantages, then train policy and value model on minibatches. With one folder the reference is a plain model, with
several their average; --reference_kind has others.

Departures from the PPO of Ziegler et al. 2019 (arXiv 1909.08593) and Stiennon et al. 2020 (arXiv 2009.01325):

- Responses end at the end-of-sequence token instead of having a fixed length; tokens after it do not exist, and the
  score belongs to the last token that does. Prompts are padded on the left, and masked, never compared with the pad id.
- A response that does not end has ``missing_eos_penalty`` subtracted from its score, not its score replaced.
- In float32 the old log-probabilities are those of the states kept while sampling, which training repeats to rounding
  (the first ratio is 1 to 1e-5: ``ratio_deviation_first``). In bf16, or on request, a forward pass scores the finished
  responses again, and what sampling said is compared with it (``sampling_gap``).
- Token rewards are whitened only on request, advantages once per batch, with the biased variance.
- Policy and value model are separate networks with their own AdamW (eps 1e-5, no weight decay), so there is no value
  coefficient; ``value_model=shared`` puts a head on the policy's trunk, and then there is one. Gradients are clipped;
  learning rates rise over a few updates and fall linearly to a tenth, not to 0.
- A minibatch whose loss or gradient is not finite, or whose mean ratio is above ``max_ratio``, is skipped and counted.
- Held-out responses are sampled at the training temperature, so that their KL is that of the distribution trained.
- An adaptive β follows the exact KL to the reference, not its estimate from sampled tokens.
- Other defaults: temperature 1 (not 0.7), 2 passes of 2 minibatches (not 4 of 1), AdamW's β₂ 0.99; scores standardised
  over the reward model's training responses, and over fresh samples of the reference only by ``normalize_rewards``.
- Every loss is a mean over the response tokens of a minibatch (Σ over tokens / their number), whatever their lengths.

A run folder holds ``config.yaml``, ``metrics.jsonl`` (one object an update), ``timings.jsonl``, ``samples.jsonl``,
``policy/``, ``reference/soup.json``, ``checkpoints/``, ``figures/`` and ``summary.json``.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf import kl, scoring
from rlhf.command_line import parse_config, read_settings, run_process
from rlhf.config import PPOConfig
from rlhf.data import Prompt, by_length
from rlhf.distributed import Processes, gather_rollouts, whole
from rlhf.evaluation import Evaluation, compare, evaluation_of
from rlhf.guards import DivergedError
from rlhf.kl import Comparison
from rlhf.logprobs import Distributions, hidden_states
from rlhf.masking import masked_mean, masked_sum, masked_whiten
from rlhf.metrics import Estimate, explained_variance, mean_estimate, peak_memory_bytes, ratio_estimate
from rlhf.models import require_checkpoint
from rlhf.policy import PolicyOutput, mixed_precision
from rlhf.randomness import generator, shuffled_batch
from rlhf.reference import ModelReference, Source, folders_in, load_model_reference
from rlhf.rewards import RewardError
from rlhf.rollout import Rollout, sample
from rlhf.run_folder import Progress, RunFolder
from rlhf.scoring import Scores, Standardisation, combine, fit_standardisation, penalties
from rlhf.setup import Run, reference_settings, set_up
from rlhf.summary import summarise, summary_table

# ── The maths ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# B responses, T response tokens; a mask is True on tokens that count.


def token_rewards(scores: Tensor, token_kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """−β·KL_t at every response token, plus the score at the last; 0 outside the mask. [B], [B, T], [B, T] → [B, T]"""
    rewards = torch.where(mask, -kl_coef * token_kl, 0.0)
    last = mask.long().sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438). [B, T] each → advantages, returns

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  R_t = A_t + V_t

    V and A are 0 after the last response token: a response is an episode and nothing follows it. Results are [B, T],
    and 0 outside the mask.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage).where(mask[:, t], 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347) per token. [B, T] each → loss, clipped [B, T]

    ratio = π/π_old;  loss = −min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A)

    ``clipped`` is True on tokens whose gradient is cut.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped squared error per token. [B, T] each → loss, clipped [B, T]

    V_clip = V_old + clip(V − V_old, −ε, ε);  loss = ½ max((V − R)², (V_clip − R)²).
    """
    move = values - old_values
    unclipped = (values - returns) ** 2
    clipped = (old_values + move.clamp(-clip_range, clip_range) - returns) ** 2
    # V_old + (V − V_old) is V but for rounding, which alone is no clipping.
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped) & (move.abs() > clip_range)


def learning_rate_factor(update: int, config: PPOConfig) -> float:
    """Factor on the peak learning rates at ``update`` (1-based): linear rise over the warm-up, then linear fall."""
    warmup = min(config.warmup_updates, config.updates - 1)
    if update <= warmup:
        return update / (warmup + 1)
    done = (update - warmup - 1) / max(config.updates - warmup - 1, 1)
    return 1.0 - done * (1.0 - config.final_lr_fraction)


# ── One update ────────────────────────────────────────────────────────────────────────────────────────────────────────

SAMPLED_ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
SHOWN = {"reward": "proxy_reward", "kl": "kl/reference"}  # beside the progress bar


@dataclass(frozen=True)
class Experience:
    """One batch of episodes with all that the losses need. Tensors are [B, T].

    ``ref_logprobs`` are log ρ_i(y_t|s_t) by the reference's models.
    """

    rollout: Rollout
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    ref_logprobs: dict[str, Tensor]

    def rows(self, indices: Tensor) -> Experience:
        """The given episodes, cut to the widths that they need."""
        rollout = self.rollout.rows(indices)
        width = rollout.response_mask.shape[1]

        def cut(tensor: Tensor) -> Tensor:
            return tensor[indices, :width]

        return Experience(
            rollout,
            cut(self.logprobs),
            cut(self.values),
            cut(self.advantages),
            cut(self.returns),
            {name: cut(tensor) for name, tensor in self.ref_logprobs.items()},
        )


def roll_out(
    run: Run,
    prompts: list[Prompt],
    purpose: str,
    index: int = 0,
    *,
    progress: str | None = None,
    model: PreTrainedModel | None = None,
) -> Rollout:
    """One response of the policy (or ``model``) to each prompt; random numbers depend on seed, purpose, index alone.

    Of several processes, each answers its share of the prompts.
    """
    config = run.config
    keep = config.old_logprobs == "sampled" or (config.old_logprobs == "auto" and config.precision == "float32")
    with mixed_precision(run.device, config.precision):
        return sample(
            model or run.model,
            run.tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            engine=config.engine,
            keep_hidden=keep,
            generator=generator(config.seed, purpose, index),
            batch_size=config.batch_size,
            progress=progress if run.processes.is_main else None,
            share=run.processes.share(len(prompts)),
        )


def score(run: Run, rollout: Rollout) -> Scores:
    """What is optimised, what it is made of where that is several rewards, and the gold reward. → [B] each"""
    with run.processes.failing_together(RewardError, ValueError), mixed_precision(run.device, run.config.precision):
        rewards = scoring.score(run.rewards, rollout)
        gold = None if run.gold_reward is None else run.gold_reward(rollout)
    scores = {"proxy_reward": combine(rewards, run.reward_weights, run.standardisation, run.config.reward_clip)}
    if len(rewards) > 1:
        scores |= {f"reward/{name}": values for name, values in rewards.items()}
    if gold is not None:
        scores["gold_reward"] = gold
    return scores


@torch.no_grad()
def collect(run: Run, rollout: Rollout, scores: Scores) -> tuple[Experience, dict[str, float]]:
    """Measure a scored rollout's KL to the reference, estimate advantages; also returns the batch's metrics."""
    config = run.config
    sources = reference_sources(run) | run.tracked
    with run.reference.loaded():
        compared = compare_with(run, rollout, sources)
    with mixed_precision(run.device, config.precision):
        values = old_values(run, rollout)
    tensors = {f"score/{name}": values for name, values in scores.items()} | compared.tensors() | {"values": values}
    rollout, tensors = gather_rollouts(run.processes, rollout, tensors)
    scores = {name: tensors[f"score/{name}"] for name in scores}
    compared, values, mask = Comparison.of(tensors, sources), tensors["values"], rollout.response_mask

    costs = penalties(
        rollout.finished,
        rollout.response_lengths,
        missing_eos_penalty=config.missing_eos_penalty,
        length_penalty=config.length_penalty,
        length_penalty_after=config.length_penalty_after,
    )
    penalised = scores["proxy_reward"] - sum(costs.values())
    penalty = token_penalty(run, compared, config.kl_estimator)
    in_reward = penalty if config.kl_in != "loss" else torch.zeros_like(penalty)
    rewards = token_rewards(penalised, in_reward, mask, run.kl_controller.coef)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)

    estimates = {name: mean_estimate(values) for name, values in scores.items()}
    estimates |= kl_estimates(run, compared, mask)
    estimates["entropy"] = ratio_estimate(kl.per_response(compared.entropy, mask), rollout.response_lengths)
    estimates["response_length"] = mean_estimate(rollout.response_lengths)
    metrics: dict[str, float] = {}
    for name, estimate in estimates.items():
        metrics |= {name: estimate.mean, f"{name}_stderr": estimate.stderr}
    metrics |= {f"penalty/{name}": float(cost.mean()) for name, cost in costs.items()}
    metrics |= {
        "kl_coef": run.kl_controller.coef,
        "objective": float((penalised - run.kl_controller.coef * kl.per_response(penalty, mask)).mean()),
        "eos_rate": float(rollout.finished.float().mean()),
        "sampling_gap": float((compared.logprobs - rollout.logprobs).where(mask, 0.0).abs().max()),
        "explained_variance": explained_variance(values[mask], returns[mask]),
        "value_mean": float(masked_mean(values, mask)),
        "return_mean": float(masked_mean(returns, mask)),
    }
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    ref_logprobs = {name: compared.other_logprobs[name] for name in run.reference.sources}
    return Experience(rollout, compared.logprobs, values, advantages, returns, ref_logprobs), metrics


def reference_sources(run: Run) -> dict[str, Source]:
    """The reference's distributions, by name."""
    return {name: source for name, (_, source) in run.reference.sources.items()}


def compare_with(run: Run, rollout: Rollout, others: Mapping[str, Source]) -> Comparison:
    """The policy beside other models over a rollout."""
    config = run.config
    with mixed_precision(run.device, config.precision):
        return compare(run.model, rollout, others, temperature=config.temperature, batch_size=config.forward_batch_size)


def old_values(run: Run, rollout: Rollout) -> Tensor:
    """V(s_t) before the update. → [B, T], 0 outside the mask"""
    values = torch.zeros(rollout.response_mask.shape, device=run.device)
    for indices in by_length(rollout, run.config.forward_batch_size):
        part = rollout.rows(indices)
        mask = part.response_mask
        if run.value_model is not None:
            found = run.value_model(part)
        else:
            hidden = hidden_states(run.model, part) if part.hidden is None else part.hidden[mask]
            found = run.policy.values(hidden, mask)
        values[indices, : mask.shape[1]] = found
    return values


def token_penalty(run: Run, compared: Comparison, estimator: str) -> Tensor:
    """Σ_i w_i KL(π‖ρ_i) at every response token, by an estimator; 0 without a reference. → [B, T]"""
    penalty = torch.zeros_like(compared.logprobs)
    for name, (weight, _) in run.reference.sources.items():
        if estimator == "exact":
            penalty += weight * compared.kl[name]
        else:
            penalty += weight * SAMPLED_ESTIMATORS[estimator](compared.logprobs, compared.other_logprobs[name])
    return penalty


def kl_estimates(run: Run, compared: Comparison, mask: Tensor) -> dict[str, Estimate]:
    """KL to the reference, by the exact estimator and by those on sampled tokens, and to every model that is followed.

    Nats per response, and nats per token where the name says so.
    """
    estimates = {f"kl/{name}": mean_estimate(kl.per_response(values, mask)) for name, values in compared.kl.items()}
    if run.reference.sources:
        exact = kl.per_response(token_penalty(run, compared, "exact"), mask)
        estimates = {"kl/reference": mean_estimate(exact)} | estimates
        estimates["kl_per_token/reference"] = ratio_estimate(exact, mask.sum(dim=1))
        for estimator in sorted({"k1", run.config.kl_estimator} - {"exact"}):
            sampled = kl.per_response(token_penalty(run, compared, estimator), mask)
            estimates[f"kl_{estimator}/reference"] = mean_estimate(sampled)
    return estimates


def optimise(run: Run, experience: Experience, update: int) -> dict[str, float]:
    """``ppo_epochs`` passes of minibatch steps on policy and value model. Returns means over the steps."""
    config = run.config
    factor = learning_rate_factor(update, config)
    for learner in run.learners.values():
        for group, rate in zip(learner.optimizer.param_groups, learner.learning_rates, strict=True):
            group["lr"] = rate * factor
    steps = []
    for indices in minibatches(config, len(experience.rollout), update):
        steps.append(minibatch_step(run, experience.rows(indices)))
        if config.early_stop_kl is not None and steps[-1]["approx_kl"] > config.early_stop_kl:
            break
    metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    metrics["ratio_deviation_first"] = steps[0]["ratio_deviation"]
    metrics["skipped_steps"] = sum(step["skipped_steps"] for step in steps)
    metrics["optimizer_steps"] = len(steps) - metrics["skipped_steps"]
    metrics["learning_rate"] = config.learning_rate * factor
    return metrics


def minibatches(config: PPOConfig, num_episodes: int, update: int) -> Iterator[Tensor]:
    """The episodes of each optimizer step: a fresh permutation in every pass."""
    shuffle = generator(config.seed, "minibatches", update)
    for _ in range(config.ppo_epochs):
        yield from torch.randperm(num_episodes, generator=shuffle).split(config.minibatch_size)


def minibatch_step(run: Run, minibatch: Experience) -> dict[str, float]:
    """One optimizer step on the losses of a minibatch, Σ over response tokens / their number.

    Each process computes its share of the episodes, in micro-batches of like length whose gradients add up, all divided
    by the minibatch's number of tokens.
    """
    processes = run.processes
    num_tokens = int(minibatch.rollout.response_mask.sum())
    mine = minibatch.rows(torch.arange(len(minibatch.rollout))[processes.share(len(minibatch.rollout))])
    parts = by_length(mine.rollout, run.config.micro_batch_size)
    sums: dict[str, float] = defaultdict(float)
    deviation = 0.0
    for number, indices in enumerate(parts, start=1):
        with processes.accumulating([learner.module for learner in run.learners.values()], number == len(parts)):
            # Gradients are averaged over the processes, and here added up.
            part_sums, part_deviation = backward(run, mine.rows(indices), processes.number / num_tokens)
        deviation = max(deviation, part_deviation)
        for name, value in part_sums.items():
            sums[name] += value
    metrics = {name: total / num_tokens for name, total in processes.sum(sums).items()}
    metrics["ratio_deviation"] = processes.max(deviation)
    norms = {
        name: float(whole(clip_grad_norm_(learner.module.parameters(), run.config.max_grad_norm)))
        for name, learner in run.learners.items()
    }
    allowed = run.guard.allows(metrics["policy_loss"] + metrics["value_loss"], metrics["mean_ratio"], norms)
    for learner in run.learners.values():
        if allowed:
            learner.optimizer.step()
        learner.optimizer.zero_grad()
    return metrics | {f"grad_norm/{name}": norm for name, norm in norms.items()} | {"skipped_steps": float(not allowed)}


def backward(run: Run, part: Experience, scale: float) -> tuple[dict[str, float], float]:
    """Add a micro-batch's gradients, of its summed losses times ``scale``, to those of policy and value model.

    Returns sums over the response tokens by metric, and the largest |ratio − 1|.
    """
    config, mask = run.config, part.rollout.response_mask
    with mixed_precision(run.device, config.precision):
        output: PolicyOutput = run.learners["policy"].module(
            part.rollout, config.temperature, entropy=config.entropy_coef > 0, references=loss_references(run, part)
        )
    token_losses, clipped = policy_loss(output.logprobs, part.logprobs, part.advantages, config.clip_range)
    total = token_losses
    if config.kl_in != "reward" and run.reference.sources:
        total = total + run.kl_controller.coef * loss_penalty(run, part, output)
    if output.entropy is not None:
        total = total - config.entropy_coef * output.entropy
    if output.values is not None:
        values = output.values
        token_value_losses, value_clipped = value_loss(values, part.values, part.returns, config.clip_range_value)
        total = total + config.value_coef * token_value_losses
    (masked_sum(total, mask) * scale).backward()
    if output.values is None:
        with mixed_precision(run.device, config.precision):
            values = run.learners["value"].module(part.rollout)
        token_value_losses, value_clipped = value_loss(values, part.values, part.returns, config.clip_range_value)
        (masked_sum(token_value_losses, mask) * scale).backward()

    with torch.no_grad():
        log_ratio = output.logprobs - part.logprobs
        sums = {
            "policy_loss": token_losses,
            "value_loss": token_value_losses,
            "clip_fraction": clipped.float(),
            "value_clip_fraction": value_clipped.float(),
            "approx_kl": kl.k3(part.logprobs, output.logprobs),  # KL(old ‖ new), on the sampled tokens
            "mean_ratio": log_ratio.exp(),
        }
        deviation = float(torch.expm1(log_ratio).where(mask, 0.0).abs().max())
        return {name: float(masked_sum(values, mask)) for name, values in sums.items()}, deviation


def loss_references(run: Run, part: Experience) -> list[tuple[float, Distributions]]:
    """The reference's distributions for a micro-batch, where the exact KL is part of the loss."""
    if run.config.kl_in == "reward" or run.config.kl_estimator != "exact":
        return []
    with torch.no_grad(), run.reference.loaded():
        return [
            (weight, source.distributions(part.rollout, run.config.temperature))
            for weight, source in run.reference.sources.values()
        ]


def loss_penalty(run: Run, part: Experience, output: PolicyOutput) -> Tensor:
    """Σ_i w_i KL(π‖ρ_i) at every response token, differentiable. → [B, T]"""
    if output.kl is not None:
        return output.kl
    estimator = SAMPLED_ESTIMATORS[run.config.kl_estimator]
    terms = [
        weight * estimator(output.logprobs, part.ref_logprobs[name])
        for name, (weight, _) in run.reference.sources.items()
    ]
    return torch.stack(terms).sum(0)


# ── The run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate_policy(run: Run, when: str) -> tuple[Evaluation, Rollout, Scores]:
    """The policy on held-out prompts: rewards, entropy, length, exact KL to the reference and to every named model.

    Before and after training use the same prompts and the same random numbers.
    """
    config = run.config
    prompts = [run.test_prompts[i % len(run.test_prompts)] for i in range(config.eval_episodes)]
    rollout = roll_out(run, prompts, "evaluation", progress=f"evaluate {when}")
    scores = score(run, rollout)
    with run.reference.loaded():
        compared = compare_with(run, rollout, reference_sources(run))
    tensors = {f"score/{name}": values for name, values in scores.items()} | compared.tensors()
    for name, folder in run.names.items():  # one at a time: they may be many, and are as large as the policy
        others = {name: run.tracked.get(name) or load_model_reference([folder], device=run.device)}
        tensors |= compare_with(run, rollout, others).tensors()
        del others  # before the next is loaded
    rollout, tensors = gather_rollouts(run.processes, rollout, tensors)
    scores = {name: tensors[f"score/{name}"] for name in scores}
    compared = Comparison.of(tensors, [*run.reference.sources, *run.names])
    divergences = {name: compared.kl[name] for name in run.names}
    if run.reference.sources:
        divergences = {"reference": token_penalty(run, compared, "exact")} | divergences
    return evaluation_of(rollout, scores, compared.entropy, divergences), rollout, scores


def standardise(run: Run) -> Standardisation:
    """Mean and deviation of each reward over responses to training prompts (Ziegler et al. 2019, §2.2).

    They are the reference's where that is one model, and else the policy's before training.
    """
    config = run.config
    sources = [source for _, source in run.reference.sources.values()]
    single = sources[0] if len(sources) == 1 and isinstance(sources[0], ModelReference) else None
    indices = shuffled_batch(len(run.prompts), config.normalize_rewards, 0, config.seed).tolist()
    with run.reference.loaded():
        rollout = roll_out(
            run,
            [run.prompts[i] for i in indices],
            "normalise rewards",
            progress="normalise rewards",
            model=single.model if single else run.model,
        )
    return fit_standardisation(gather_rollouts(run.processes, rollout, scoring.score(run.rewards, rollout))[1])


@contextmanager
def noticing_sigterm() -> Iterator[list[int]]:
    """A list that holds SIGTERM once it has come, instead of the process ending at once."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def train(config: PPOConfig) -> dict[str, Any]:
    """Run PPO as ``config`` says, writing the run folder as it goes; returns the summary.

    After SIGTERM the update at hand is finished and saved, and SystemExit raised.
    """
    started = time.perf_counter()
    processes = Processes()
    folder = RunFolder(config, writes=processes.is_main)
    run = set_up(config, processes)
    run.distribute()
    progress = folder.resume(run) if config.resume else None
    if progress is None:
        if config.normalize_rewards:
            run.standardisation = standardise(run)
        score(run, roll_out(run, run.test_prompts[: 2 * processes.number], "probe"))  # a broken reward shows now
        before, rollout, scores = evaluate_policy(run, "before")
        folder.create(config, reference_settings(config).describe)
        folder.log_samples(0, "held-out", rollout, scores, number=config.num_samples)
        progress = Progress(update=0, seconds=0.0, before=before)

    def reached(update: int) -> Progress:
        return Progress(update, progress.seconds + time.perf_counter() - started, progress.before)

    def keep(error: Exception, update: int) -> None:
        """Save a run that an error ends, and tell; what one process raises alone, none puts shards together for."""
        if isinstance(error, RewardError) or not processes.shards:
            folder.save(reached(update), run)
            if processes.is_main:
                print(f"saved after update {update}; go on with --output {folder.path} --resume", file=sys.stderr)

    done = progress.update
    updates = range(done + 1, config.updates + 1)
    with (
        noticing_sigterm() as stop,
        tqdm(updates, initial=done, total=config.updates, desc="ppo", disable=not processes.is_main) as bar,
    ):
        for update in bar:
            try:
                metrics, rollout, scores, seconds = one_update(run, update)
            except DivergedError:  # in the middle of an update: the checkpoints there are stay the last
                raise
            except (RewardError, ValueError) as error:
                keep(error, done)
                raise
            done = update
            folder.log({"update": update, "episodes": update * config.batch_size, **metrics})
            folder.log_samples(update, "training", rollout, scores, number=config.num_samples)
            folder.log_timing(update, **seconds)
            bar.set_postfix({name: f"{metrics[key]:.2f}" for name, key in SHOWN.items() if key in metrics})
            stopped = processes.any(bool(stop)) and update < config.updates
            if stopped or (config.save_every and update % config.save_every == 0 and update < config.updates):
                folder.save(reached(update), run)
            if stopped:
                if processes.is_main:
                    bar.close()  # which would end on the same line
                    print(f"stopped after update {update}; go on with --output {folder.path} --resume", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)

    try:
        after, rollout, scores = evaluate_policy(run, "after")
    except (RewardError, ValueError) as error:
        keep(error, config.updates)
        raise
    summary = summarise(
        progress.before,
        after,
        updates=config.updates,
        episodes=config.updates * config.batch_size,
        seconds=reached(config.updates).seconds,
        peak_memory_bytes=peak_memory_bytes(run.device),
    )
    folder.log_samples(config.updates, "held-out", rollout, scores, number=config.num_samples)
    folder.finish(run, summary)
    if processes.is_main:
        print(summary_table(summary))
        print(f"\n{config.updates} updates, {summary['episodes']} episodes, {summary['seconds']:.0f} s → {folder.path}")
    return summary


def one_update(run: Run, update: int) -> tuple[dict[str, float], Rollout, Scores, dict[str, float]]:
    """Sample, score, measure, train. → metrics, the rollout with its scores, and the seconds of each phase"""
    config = run.config
    start = time.perf_counter()
    indices = shuffled_batch(len(run.prompts), config.batch_size, update - 1, config.seed).tolist()
    rollout = roll_out(run, [run.prompts[i] for i in indices], "rollout", update)
    sampled = time.perf_counter()
    scores = score(run, rollout)
    experience, metrics = collect(run, rollout, scores)
    collected = time.perf_counter()
    metrics |= optimise(run, experience, update)
    run.copy_policy()
    run.reference.after_update(run.model, update)
    if "kl/reference" in metrics:
        run.kl_controller.update(metrics["kl/reference"], config.batch_size)
    trained = time.perf_counter()
    seconds = {"rollout": sampled - start, "scoring": collected - sampled, "training": trained - collected}
    return metrics, rollout, scores, seconds


def resumed_config(given: PPOConfig, argv: Sequence[str] | None) -> PPOConfig:
    """The settings that the run in ``given.output`` started with; ValueError when the command line has others."""
    path = Path(str(given.output)) / "config.yaml"
    settings = read_settings(path)
    started = parse_config(PPOConfig, ["--output", str(given.output), "--resume"], description="", defaults=settings)
    asked = parse_config(PPOConfig, argv, description="", defaults=settings)
    differing = [
        f"{field.name} ({getattr(started, field.name)!r} there, {getattr(asked, field.name)!r} asked for)"
        for field in fields(PPOConfig)
        if getattr(asked, field.name) != getattr(started, field.name)
    ]
    if differing:
        raise ValueError(f"a resumed run keeps the settings of {path}; leave out {', '.join(differing)}")
    return started


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.ppo``."""
    config = parse_config(PPOConfig, argv, description=__doc__)
    if config.resume:
        RunFolder(config)  # whatever is wrong with the folder is said before its settings are read
        config = resumed_config(config, argv)
    elif config.policy is None and config.prompts is None:
        RunFolder(config)  # whatever is wrong with the command line is said before the task is made
        for folder in (folder for model in [*config.reference, *config.track_kl] for folder in folders_in(model)):
            require_checkpoint(folder)
        from rlhf.reviews.recipe import ppo_settings

        config = parse_config(PPOConfig, argv, description=__doc__, defaults=ppo_settings())
    train(config)


if __name__ == "__main__":
    run_process(main)

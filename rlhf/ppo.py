"""PPO whose KL reference is a soup of supervised-fine-tuned models (SALSA, arXiv 2411.01798), told top to bottom.

    python -m rlhf.ppo                    # the built-in task: minutes on two cores, nothing to download
    python -m rlhf.ppo --policy sft1 --reference sft1 sft2 --reward reward --prompts prompts.jsonl --output run

One update: sample responses, score them, measure the KL to the reference, turn both into token rewards, estimate
advantages, then train policy and value model on minibatches. With one folder the reference is a plain model, with
several their average.

Departures from the PPO of Ziegler et al. 2019 (arXiv 1909.08593) and Stiennon et al. 2020 (arXiv 2009.01325):

- Responses end at the end-of-sequence token instead of having a fixed length; tokens after it do not exist, and the
  score belongs to the last token that does. Prompts are padded on the left, and masked, never compared with the pad id.
- A response that does not end has ``missing_eos_penalty`` subtracted from its score, not its score replaced.
- The old log-probabilities come from a forward pass over the finished responses, the same computation as in training,
  so that the first ratio is 1; those captured while sampling are compared with it (``sampling_gap``).
- Token rewards are whitened only on request, advantages once per batch, with the biased variance.
- Policy and value model are separate networks with their own AdamW (eps 1e-5, no weight decay), so there is no value
  coefficient. Gradients are clipped; learning rates rise over a few updates and fall linearly to a tenth, not to 0.
- Held-out responses are sampled at the training temperature, so that their KL is that of the distribution trained.
- Other defaults: temperature 1 (not 0.7), 2 passes of 2 minibatches (not 4 of 1), AdamW's β₂ 0.99; scores standardised
  over the reward model's training responses, not over fresh samples of the reference.
- Every loss is a mean over the response tokens of a minibatch (Σ over tokens / their number), whatever their lengths.

A run folder holds ``config.yaml``, ``metrics.jsonl`` (one object an update), ``timings.jsonl``, ``samples.jsonl``,
``policy/``, ``reference/soup.json``, ``checkpoints/``, ``figures/`` and ``summary.json``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import kl
from rlhf.command_line import parse_config, read_settings, run_command
from rlhf.config import PPOConfig
from rlhf.data import Prompt, load_prompts
from rlhf.evaluation import Evaluation, evaluate
from rlhf.masking import masked_mean, masked_sum, masked_whiten
from rlhf.metrics import explained_variance, mean_estimate, peak_memory_bytes, ratio_estimate
from rlhf.models import (
    ScalarHeadModel,
    context_length,
    gather_logprobs,
    load_causal_lm,
    load_scalar_head_model,
    load_tokenizer,
    require_checkpoint,
    require_same_tokenizer,
    response_log_distributions,
    response_values,
)
from rlhf.randomness import generator, shuffled_batch
from rlhf.reference import ModelReference, describe_reference, load_reference
from rlhf.rewards import Reward, load_reward
from rlhf.rollout import Rollout, sample
from rlhf.run_folder import Progress, RunFolder, Trainables
from rlhf.summary import summarise, summary_table
from soupkit.api import average_recipe

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
    unclipped = (values - returns) ** 2
    clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def learning_rate_factor(update: int, config: PPOConfig) -> float:
    """Factor on the peak learning rates at ``update`` (1-based): linear rise over the warm-up, then linear fall."""
    warmup = min(config.warmup_updates, config.updates - 1)
    if update <= warmup:
        return update / (warmup + 1)
    done = (update - warmup - 1) / max(config.updates - warmup - 1, 1)
    return 1.0 - done * (1.0 - config.final_lr_fraction)


# ── What a run holds ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Run:
    """Everything that training uses, loaded and checked against each other."""

    config: PPOConfig
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    value_model: ScalarHeadModel
    reference: ModelReference
    names: dict[str, str]  # short name → folder, of every model that the KL is reported to
    tracked: dict[str, ModelReference]  # those of them that it is measured to at every update
    rewards: dict[str, Reward]
    prompts: list[Prompt]
    test_prompts: list[Prompt]
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    kl_controller: kl.FixedKL

    @property
    def trainables(self) -> Trainables:
        """What training changes."""
        return Trainables(self.policy, self.value_model, self.policy_optimizer, self.value_optimizer)


@dataclass(frozen=True)
class Experience:
    """One batch of episodes with all that the losses need. Tensors are [B, T]."""

    rollout: Rollout
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, indices: Tensor) -> Experience:
        """The given episodes."""
        tensors = (self.logprobs, self.values, self.advantages, self.returns)
        return Experience(self.rollout.rows(indices), *(tensor[indices] for tensor in tensors))


Scores = dict[str, Tensor]  # by reward, one per response: [B]


def names_of(folders: Sequence[str]) -> dict[str, str]:
    """Short names for folders, {name: folder}: the last path component, more of the path where that is ambiguous.

    No name is "reference", which metrics use for the reference itself.
    """
    unique = {str(Path(folder).resolve()): folder for folder in folders}
    parts = [Path(resolved).parts for resolved in unique]
    depth = 1
    while len({p[-depth:] for p in parts} - {("reference",)}) < len(parts):
        depth += 1
    return {"/".join(p[-depth:]): folder for p, folder in zip(parts, unique.values(), strict=True)}


def split_test_prompts(prompts: list[Prompt], config: PPOConfig) -> tuple[list[Prompt], list[Prompt]]:
    """A random tenth of the prompts (at least one) set aside as test prompts. → training prompts, test prompts"""
    if len(prompts) < 2:
        raise ValueError(f"{config.prompts}: one prompt cannot be split; add prompts, or give --test_prompts")
    order = torch.randperm(len(prompts), generator=generator(config.seed, "test prompts")).tolist()
    num_test = max(1, len(prompts) // 10)
    return [prompts[i] for i in order[num_test:]], [prompts[i] for i in order[:num_test]]


def set_up(config: PPOConfig) -> Run:
    """Check and load everything a run needs; ValueError or FileNotFoundError names what does not fit."""
    policy_folder, reward = config.policy, config.reward
    if policy_folder is None or reward is None or config.prompts is None:
        raise ValueError(
            "--policy, --reward and --prompts belong together: give all three, or only --reward for the built-in task"
        )
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(
            f"{accelerator.num_processes} processes: rlhf.ppo runs in one; start it without accelerate launch"
        )
    device = accelerator.device
    for folder in [*config.reference, *config.track_kl]:
        require_same_tokenizer(policy_folder, folder)
    average_recipe(*reference_of(config)).validate()
    value_folder = value_start(config)
    tokenizer = load_tokenizer(policy_folder)
    context = context_length(policy_folder)
    room = None if context is None else context - config.max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in the {context} tokens that "
            f"{policy_folder} can read; lower it"
        )
    prompts = load_prompts(config.prompts, tokenizer, room)
    if config.test_prompts:
        test_prompts = load_prompts(config.test_prompts, tokenizer, room)
    else:
        prompts, test_prompts = split_test_prompts(prompts, config)

    specs = {"proxy_reward": reward, **({"gold_reward": config.gold_reward} if config.gold_reward else {})}
    rewards = {
        name: load_reward(spec, policy=policy_folder, device=device, batch_size=config.forward_batch_size)
        for name, spec in specs.items()
    }
    names = names_of([policy_folder, *config.reference, *config.track_kl])
    tracked_paths = {Path(folder).resolve() for folder in config.track_kl}
    policy = load_causal_lm(policy_folder, device=device)
    value_model = load_scalar_head_model(value_folder, device=device, zero_head=True)
    betas = (config.adam_beta1, config.adam_beta2)
    return Run(
        config=config,
        device=device,
        tokenizer=tokenizer,
        policy=policy,
        value_model=value_model,
        reference=load_reference(*reference_of(config), device=device),
        names=names,
        tracked={
            name: load_reference([folder], device=device)
            for name, folder in names.items()
            if Path(folder).resolve() in tracked_paths
        },
        rewards=rewards,
        prompts=prompts,
        test_prompts=test_prompts,
        policy_optimizer=torch.optim.AdamW(policy.parameters(), betas=betas, eps=config.adam_eps, weight_decay=0.0),
        value_optimizer=torch.optim.AdamW(value_model.parameters(), betas=betas, eps=config.adam_eps, weight_decay=0.0),
        kl_controller=(
            kl.FixedKL(config.kl_coef)
            if config.kl_target is None
            else kl.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        ),
    )


def reference_of(config: PPOConfig) -> tuple[list[str], list[float] | None]:
    """Folders and weights of the reference: the policy's own folder where none is named, None for uniform weights."""
    return config.reference or [str(config.policy)], config.reference_weights or None


def value_start(config: PPOConfig) -> str:
    """The folder whose body the value model starts from, by ``value_init``; its head starts at 0."""
    assert config.policy is not None
    assert config.reward is not None
    if config.value_init == "policy":
        return config.policy
    if Path(config.reward).is_dir():
        return config.reward
    if config.value_init == "reward":
        raise ValueError(f"value_init=reward, but {config.reward} is no reward-model folder; use value_init=policy")
    return config.policy


# ── One update ────────────────────────────────────────────────────────────────────────────────────────────────────────


def roll_out(run: Run, prompts: list[Prompt], purpose: str, index: int = 0, progress: str | None = None) -> Rollout:
    """One response of the policy to each prompt; the random numbers depend on seed, purpose and index alone."""
    return sample(
        run.policy,
        run.tokenizer,
        prompts,
        max_new_tokens=run.config.max_new_tokens,
        temperature=run.config.temperature,
        generator=generator(run.config.seed, purpose, index),
        batch_size=run.config.batch_size,
        progress=progress,
    )


def score(run: Run, rollout: Rollout) -> Scores:
    """What every reward says of a rollout."""
    return {name: reward(rollout) for name, reward in run.rewards.items()}


@torch.no_grad()
def collect(run: Run, rollout: Rollout, scores: Scores) -> tuple[Experience, dict[str, float]]:
    """Measure a scored rollout's KL to the reference, estimate advantages; also returns the batch's metrics."""
    config, mask = run.config, rollout.response_mask
    penalised = scores["proxy_reward"] - config.missing_eos_penalty * (~rollout.finished).float()

    parts: list[tuple[Tensor, ...]] = []
    exact_kl: dict[str, list[Tensor]] = {name: [] for name in ("reference", *run.tracked)}
    for part in rollout.split(run.config.forward_batch_size):
        log_distributions = response_log_distributions(run.policy, part, config.temperature)
        ref_log_distributions = run.reference.log_distributions(part, config.temperature)
        tokens = part.response_tokens
        parts.append(
            (
                gather_logprobs(log_distributions, tokens),
                gather_logprobs(ref_log_distributions, tokens),
                kl.entropy(log_distributions),
                response_values(run.value_model, part),
            )
        )
        exact_kl["reference"].append(kl.exact(log_distributions, ref_log_distributions))
        for name, other in run.tracked.items():
            exact_kl[name].append(kl.exact(log_distributions, other.log_distributions(part, config.temperature)))
    logprobs, ref_logprobs, entropy, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    token_kl = kl.k1(logprobs, ref_logprobs)
    rewards = token_rewards(penalised, token_kl, mask, run.kl_controller.coef)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)

    divergences = {name: mean_estimate(kl.per_response(torch.cat(kls), mask)) for name, kls in exact_kl.items()}
    estimates = {name: mean_estimate(values) for name, values in scores.items()}
    estimates |= {f"kl/{name}": estimate for name, estimate in divergences.items()}
    estimates["kl_k1/reference"] = mean_estimate(kl.per_response(token_kl, mask))
    estimates["entropy"] = ratio_estimate(kl.per_response(entropy, mask), rollout.response_lengths)
    estimates["response_length"] = mean_estimate(rollout.response_lengths)
    metrics: dict[str, float] = {}
    for name, estimate in estimates.items():
        metrics |= {name: estimate.mean, f"{name}_stderr": estimate.stderr}
    metrics |= {
        "kl_coef": run.kl_controller.coef,
        "objective": float((penalised - run.kl_controller.coef * kl.per_response(token_kl, mask)).mean()),
        "eos_rate": float(rollout.finished.float().mean()),
        "sampling_gap": float((logprobs - rollout.logprobs).where(mask, 0.0).abs().max()),
        "explained_variance": explained_variance(values[mask], returns[mask]),
        "value_mean": float(masked_mean(values, mask)),
        "return_mean": float(masked_mean(returns, mask)),
    }
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return Experience(rollout, logprobs, values, advantages, returns), metrics


def optimise(run: Run, experience: Experience, update: int) -> dict[str, float]:
    """``ppo_epochs`` passes of minibatch steps on policy and value model. Returns means over the optimizer steps."""
    config = run.config
    factor = learning_rate_factor(update, config)
    learning_rates = (
        (run.policy_optimizer, config.learning_rate * factor),
        (run.value_optimizer, config.value_learning_rate * factor),
    )
    for optimizer, learning_rate in learning_rates:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    shuffle = generator(config.seed, "minibatches", update)
    steps = [
        minibatch_step(run, experience.rows(indices))
        for _ in range(config.ppo_epochs)
        for indices in torch.randperm(len(experience.rollout), generator=shuffle).split(config.minibatch_size)
    ]
    metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    metrics["ratio_deviation_first"] = steps[0]["ratio_deviation"]
    metrics["learning_rate"] = config.learning_rate * factor
    metrics["optimizer_steps"] = len(steps)
    return metrics


def minibatch_step(run: Run, minibatch: Experience) -> dict[str, float]:
    """One optimizer step on the losses of a minibatch, Σ over response tokens / their number.

    Gradients accumulate over micro-batches, all divided by the minibatch's number of tokens.
    """
    config = run.config
    num_tokens = int(minibatch.rollout.response_mask.sum())
    sums: dict[str, float] = {}
    ratio_deviation = 0.0
    for indices in torch.arange(len(minibatch.rollout)).split(run.config.forward_batch_size):
        part = minibatch.rows(indices)
        mask, tokens = part.rollout.response_mask, part.rollout.response_tokens
        logprobs = gather_logprobs(response_log_distributions(run.policy, part.rollout, config.temperature), tokens)
        # Padding drifts freely as the policy changes, and exp of a large log-ratio would make its zero gradient NaN.
        logprobs = logprobs.where(mask, part.logprobs)
        token_losses, clipped = policy_loss(logprobs, part.logprobs, part.advantages, config.clip_range)
        (masked_sum(token_losses, mask) / num_tokens).backward()
        values = response_values(run.value_model, part.rollout)
        token_value_losses, value_clipped = value_loss(values, part.values, part.returns, config.clip_range_value)
        (masked_sum(token_value_losses, mask) / num_tokens).backward()

        with torch.no_grad():
            log_ratio = logprobs - part.logprobs
            ratio_deviation = max(ratio_deviation, float(torch.expm1(log_ratio).where(mask, 0.0).abs().max()))
            for name, token_values in {
                "policy_loss": token_losses,
                "value_loss": token_value_losses,
                "clip_fraction": clipped.float(),
                "value_clip_fraction": value_clipped.float(),
                # KL(old ‖ new) by k3, on the sampled tokens
                "approx_kl": kl.k3(part.logprobs, logprobs),
            }.items():
                sums[name] = sums.get(name, 0.0) + float(masked_sum(token_values, mask))
    metrics = {name: total / num_tokens for name, total in sums.items()}
    metrics["ratio_deviation"] = ratio_deviation
    for name, model, optimizer in (
        ("policy", run.policy, run.policy_optimizer),
        ("value", run.value_model, run.value_optimizer),
    ):
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not norm.isfinite():
            raise ValueError(
                f"the gradient of the {name} model is {norm.item()}; lower its learning rate or clip_range"
            )
        metrics[f"grad_norm/{name}"] = float(norm)
        optimizer.step()
        optimizer.zero_grad()
    return metrics


# ── The run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate_policy(run: Run, when: str) -> tuple[Evaluation, Rollout, Scores]:
    """The policy on held-out prompts: rewards, entropy, length, exact KL to the reference and to every named model.

    Before and after training use the same prompts and the same random numbers.
    """
    prompts = [run.test_prompts[i % len(run.test_prompts)] for i in range(run.config.eval_episodes)]
    rollout = roll_out(run, prompts, "evaluation", progress=f"evaluate {when}")
    scores = score(run, rollout)
    others = {name: run.tracked.get(name) or load_reference([f], device=run.device) for name, f in run.names.items()}
    evaluation = evaluate(
        run.policy,
        rollout,
        scores,
        {"reference": run.reference, **others},
        temperature=run.config.temperature,
        batch_size=run.config.forward_batch_size,
    )
    return evaluation, rollout, scores


def train(config: PPOConfig) -> dict[str, Any]:
    """Run PPO as ``config`` says, writing the run folder as it goes; returns the summary."""
    started = time.perf_counter()
    folder = RunFolder(config)
    run = set_up(config)
    progress = folder.resume(run.trainables) if config.resume else None
    if progress is None:
        score(run, roll_out(run, run.test_prompts[:2], "probe"))  # a broken reward shows now, not after long sampling
        before, rollout, scores = evaluate_policy(run, "before")
        folder.create(config, describe_reference(*reference_of(config)))
        folder.log_samples(0, "held-out", rollout, scores, number=config.num_samples)
        progress = Progress(update=0, seconds=0.0, kl_coef=config.kl_coef, before=before)
    run.kl_controller.coef = progress.kl_coef

    def seconds() -> float:
        return progress.seconds + time.perf_counter() - started

    updates = range(progress.update + 1, config.updates + 1)
    with tqdm(updates, initial=progress.update, total=config.updates, desc="ppo") as bar:
        for update in bar:
            start = time.perf_counter()
            indices = shuffled_batch(len(run.prompts), config.batch_size, update - 1, config.seed).tolist()
            rollout = roll_out(run, [run.prompts[i] for i in indices], "rollout", update)
            sampled = time.perf_counter()
            scores = score(run, rollout)
            experience, metrics = collect(run, rollout, scores)
            collected = time.perf_counter()
            metrics |= optimise(run, experience, update)
            trained = time.perf_counter()

            folder.log({"update": update, "episodes": update * config.batch_size, **metrics})
            folder.log_samples(update, "training", rollout, scores, number=config.num_samples)
            folder.log_timing(
                update, rollout=sampled - start, scoring=collected - sampled, training=trained - collected
            )
            run.kl_controller.update(metrics["kl_k1/reference"], config.batch_size)
            bar.set_postfix(reward=f"{metrics['proxy_reward']:.2f}", kl=f"{metrics['kl/reference']:.2f}")
            if config.checkpoint_every and update % config.checkpoint_every == 0 and update < config.updates:
                state = Progress(update, seconds(), run.kl_controller.coef, progress.before)
                folder.checkpoint(state, run.trainables, run.tokenizer, config.keep_checkpoints)

    after, rollout, scores = evaluate_policy(run, "after")
    summary = summarise(
        progress.before,
        after,
        updates=config.updates,
        episodes=config.updates * config.batch_size,
        seconds=seconds(),
        peak_memory_bytes=peak_memory_bytes(run.device),
    )
    folder.log_samples(config.updates, "held-out", rollout, scores, number=config.num_samples)
    folder.finish(run.policy, run.tokenizer, summary)
    print(summary_table(summary))
    print(f"\n{config.updates} updates, {summary['episodes']} episodes, {summary['seconds']:.0f} s → {folder.path}")
    return summary


def resumed_config(given: PPOConfig, argv: Sequence[str] | None) -> PPOConfig:
    """The settings that the run in ``given.output`` started with; ValueError when the command line has others."""
    path = Path(str(given.output)) / "config.yaml"
    settings = read_settings(path)
    started = parse_config(PPOConfig, ["--output", str(given.output), "--resume"], description="", defaults=settings)
    asked = parse_config(PPOConfig, argv, description="", defaults=settings)
    for setting in fields(PPOConfig):
        if getattr(asked, setting.name) != getattr(started, setting.name):
            raise ValueError(f"--{setting.name}: a resumed run keeps the settings of {path}; leave it out")
    return started


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.ppo``."""
    config = parse_config(PPOConfig, argv, description=__doc__)
    if config.resume:
        config = resumed_config(config, argv)
    elif config.policy is None and config.prompts is None:
        RunFolder(config)  # whatever is wrong with the command line is said before the task is made
        for folder in [*config.reference, *config.track_kl]:
            require_checkpoint(folder)
        from rlhf.reviews.recipe import ppo_settings

        config = parse_config(PPOConfig, argv, description=__doc__, defaults=ppo_settings())
    train(config)


if __name__ == "__main__":
    sys.exit(run_command(main))

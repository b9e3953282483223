"""Every name in the files of a run, with its unit, its formula, and what to look for. docs/ppo.md is made from it.

NAME stands for the short name of a reward or a model. β is the coefficient of the KL penalty, ``ratio`` π/π_old.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What one logged number is. With ``stderr``, its standard error is logged beside it as ``<name>_stderr``."""

    unit: str
    meaning: str
    look_for: str = ""
    stderr: bool = False


TOKENS = "mean over the tokens of a minibatch, then over the steps"

METRICS = {
    "update": Metric("count", "Number of the update, from 1."),
    "episodes": Metric("count", "Episodes sampled so far: update · `batch_size`."),
    "proxy_reward": Metric(
        "reward",
        "Σ_i w_i r̂_i, mean over responses, before penalties; r̂_i: reward i, standardised and clipped where asked for.",
        "Rises, fast at first. Rising while the gold reward falls: the policy exploits the reward.",
        stderr=True,
    ),
    "reward/NAME": Metric(
        "its own",
        "Each of several rewards by itself, mean over responses, not standardised, weighted or clipped.",
        "Whether one rises at the cost of another.",
        stderr=True,
    ),
    "gold_reward": Metric(
        "its own",
        "`gold_reward`, mean over responses; never optimised.",
        "Rises with the proxy. Where it turns down, the best policy lies behind.",
        stderr=True,
    ),
    "kl/reference": Metric(
        "nats per response",
        "Σ_i w_i KL(π‖ρ_i), exact, summed over a response's tokens, mean over responses.",
        "0 at update 1 where the policy starts as the reference; rises and levels off. No levelling: raise `kl_coef`.",
        stderr=True,
    ),
    "kl/NAME": Metric(
        "nats per response",
        "KL(π‖NAME), exact, likewise: to each of `track_kl`, and to each model that `weighted_kl` keeps apart; without "
        "any of these, to the policy's start.",
        "An axis on which runs with different references can be compared.",
        stderr=True,
    ),
    "kl_per_token/reference": Metric(
        "nats per token",
        "Σ over all response tokens of the batch / their number, of the same KL.",
        "Whether the KL grew because responses grew: then this stays.",
        stderr=True,
    ),
    "kl_k1/reference": Metric(
        "nats per response",
        "The same by k1, log π − log ρ of the sampled tokens.",
        "Within a few standard errors of `kl/reference`, unless `top_k` or `top_p` cut the sampling.",
        stderr=True,
    ),
    "kl_k2/reference": Metric(
        "nats per response",
        "The same by k2, where that is `kl_estimator`.",
        "Close while the KL is small.",
        stderr=True,
    ),
    "kl_k3/reference": Metric(
        "nats per response",
        "The same by k3, where that is `kl_estimator`.",
        "A standard error that jumps: single tokens far likelier under the reference.",
        stderr=True,
    ),
    "entropy": Metric(
        "nats per token",
        "Entropy of π(·|s_t), exact, at the sampling temperature: Σ over all response tokens / their number.",
        "Falls slowly. A fall to 0 is a policy that says one thing only.",
        stderr=True,
    ),
    "response_length": Metric(
        "tokens",
        "Tokens of a response, end of sequence included, mean over responses.",
        "Steady growth that the task does not ask for: the reward likes length.",
        stderr=True,
    ),
    "penalty/missing_eos": Metric(
        "reward", "Mean of what is subtracted for not ending: `missing_eos_penalty` · (1 − `eos_rate`).", "Goes to 0."
    ),
    "penalty/length": Metric(
        "reward", "Mean of `length_penalty` · max(0, tokens − `length_penalty_after`).", "Small beside the reward."
    ),
    "kl_coef": Metric(
        "reward per nat",
        "β in this update.",
        "Settles, where it is steered; at ever smaller or larger β the target is out of reach.",
    ),
    "objective": Metric(
        "reward",
        "Mean over responses of score − penalties − β · KL, the KL by `kl_estimator`: what PPO climbs.",
        "Rises. It may fall while β is raised.",
    ),
    "eos_rate": Metric(
        "share of responses",
        "Those that ended with the end-of-sequence token.",
        "Near 1, or `max_new_tokens` is short.",
    ),
    "sampling_gap": Metric(
        "nats",
        "Largest |log π scored − log π sampled| of any response token.",
        "1e-5 in float32, some hundredths in bf16; more with `top_k` or `top_p`, which sampling counts in. Else more: "
        "sampling and training disagree about the model.",
    ),
    "explained_variance": Metric(
        "share",
        "1 − var(R − V) / var(R) over response tokens, before the update; R the returns, V the values.",
        "0 at first, then towards 1. Below 0: worse than a constant; lower `value_learning_rate`.",
    ),
    "value_mean": Metric("reward", "V, mean over response tokens, before the update.", "Follows `return_mean`."),
    "return_mean": Metric(
        "reward", "R = A + V, mean over response tokens, A not whitened.", "Rises with the objective."
    ),
    "policy_loss": Metric(
        "",
        f"Clipped surrogate max(−ratio · A, −clip(ratio) · A), {TOKENS}; without KL and entropy terms.",
        "Finite and near 0; it does not measure progress.",
    ),
    "value_loss": Metric("reward²", f"½ max((V − R)², (V_clip − R)²), {TOKENS}.", "Falls, and rises with new rewards."),
    "clip_fraction": Metric(
        "share of tokens",
        f"Those whose policy gradient is cut, {TOKENS}.",
        "0 to 0.2. More: lower `learning_rate` or `ppo_epochs`. 0 all along: steps could be larger.",
    ),
    "value_clip_fraction": Metric(
        "share of tokens",
        f"Those whose value gradient is cut, {TOKENS}.",
        "Below 0.5, or `clip_range_value` is small for rewards of this size.",
    ),
    "approx_kl": Metric(
        "nats per token",
        f"KL(old ‖ new) by k3 on the sampled tokens: ratio − 1 − log ratio, {TOKENS}.",
        "Below 0.05. A jump is a step too large; `early_stop_kl` ends an update there.",
    ),
    "mean_ratio": Metric("", f"ratio, {TOKENS}.", "1 within a few hundredths; above `max_ratio` a step is skipped."),
    "ratio_deviation": Metric(
        "",
        "Largest |ratio − 1| of a minibatch's tokens, mean over the steps.",
        "A spike is a single token that was very unlikely.",
    ),
    "ratio_deviation_first": Metric(
        "",
        "The same in the first step alone, before the policy has moved.",
        "1e-5 in float32, some hundredths in bf16. More: training does not compute what sampling did.",
    ),
    "grad_norm/policy": Metric(
        "", "Norm of the policy's gradient before it is clipped to `max_grad_norm`, mean over the steps.", "No spikes."
    ),
    "grad_norm/value": Metric("", "The same of a separate value model.", "Large at first, while values are 0."),
    "skipped_steps": Metric(
        "count",
        "Steps left out: loss or gradient not finite, or mean ratio above `max_ratio`.",
        "0. After `max_skipped` in a row the run stops.",
    ),
    "optimizer_steps": Metric(
        "count", "Steps taken.", "`ppo_epochs` · `batch_size` / `minibatch_size`, unless skipped or stopped early."
    ),
    "learning_rate": Metric("", "The policy's in this update.", "Rises over `warmup_updates`, then falls linearly."),
}

TIMINGS = {
    "update": Metric("count", "Number of the update."),
    "rollout": Metric("seconds", "Sampling the responses.", "Grows with their length."),
    "scoring": Metric(
        "seconds",
        "Rewards, log-probabilities, KL to every model, values, advantages.",
        "Each `track_kl` costs a forward.",
    ),
    "training": Metric("seconds", "All optimizer steps.", "The largest part, or nearly."),
}

SAMPLES = {
    "update": Metric("count", "After how many updates it was sampled; 0: before training."),
    "prompts": Metric("text", "Where the prompt is from: `training` or `held-out`."),
    "prompt": Metric("text", "The prompt."),
    "response": Metric(
        "text", "The response, without special tokens.", "Read them: a number that rises may mean nonsense."
    ),
    "proxy_reward": Metric("reward", "What is optimised, before penalties."),
    "reward/NAME": Metric("its own", "Each of several rewards by itself."),
    "gold_reward": Metric("its own", "The gold reward, where there is one."),
}

SUMMARY = {
    "proxy_reward": Metric("reward", "Mean over responses, as in metrics.jsonl.", "Up by many standard errors."),
    "gold_reward": Metric("its own", "Mean over responses; null where there is none.", "Up as well."),
    "entropy": Metric("nats per token", "Exact, Σ over all response tokens / their number.", "Well above 0."),
    "response_length": Metric("tokens", "Mean over responses, end of sequence included.", "About what it was."),
    "kl.reference": Metric("nats per response", "Exact Σ_i w_i KL(π‖ρ_i).", "What the reward has cost."),
    "kl.NAME": Metric(
        "nats per response",
        "Exact KL to the policy's start, to every folder or recipe of the reference and of `track_kl`.",
    ),
    "updates": Metric("count", "Updates of the run."),
    "episodes": Metric("count", "Episodes trained on: updates · `batch_size`."),
    "seconds": Metric("seconds", "Wall-clock time with loading and both evaluations; that of resumed parts added up."),
    "peak_memory_bytes": Metric("bytes", "Most memory of this process: allocated on a CUDA device, resident on a CPU."),
}

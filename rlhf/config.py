"""The settings of a PPO run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from rlhf.command_line import setting
from rlhf.metrics import replace_text


@dataclass
class PPOConfig:
    """Settings of ``python -m rlhf.ppo``. An episode is one prompt with one sampled response."""

    policy: str | None = setting(
        None, "Checkpoint folder the policy starts from. Without it, the built-in reviews task runs."
    )
    reference: list[str] = setting(
        [],
        "Checkpoint folders of the KL reference: one is plain PPO, several are averaged in memory. Default: the "
        "policy.",
    )
    reference_weights: list[float] = setting(
        [], "Weights of the reference folders, normalised to sum 1. Default: uniform."
    )
    reward: str | None = setting(None, "The reward to optimise: a reward-model folder, or module:function.")
    gold_reward: str | None = setting(
        None, "A reward that is reported and never optimised: a folder or module:function."
    )
    prompts: str | None = setting(None, "Training prompts: .txt, one a line, or .jsonl with prompt or messages.")
    test_prompts: str | None = setting(
        None, "Held-out prompts for the before-and-after table. Default: a tenth of --prompts is set aside."
    )
    track_kl: list[str] = setting(
        [], "More checkpoint folders to report the policy's KL to, at every update and at the end."
    )
    output: str | None = setting(None, "Run folder, made new. Default: runs/DATE-TIME.")
    resume: bool = setting(
        False, "Go on from the last checkpoint in --output; the metrics equal those of an unbroken run."
    )

    updates: int = setting(100, "PPO updates: each samples a batch of episodes and trains on it.")
    batch_size: int = setting(64, "Episodes sampled per update.")
    ppo_epochs: int = setting(2, "Passes over each batch.")
    minibatch_size: int = setting(32, "Episodes per optimizer step; must divide batch_size.")
    micro_batch_size: int | None = setting(
        None,
        "Episodes per forward and backward (gradient accumulation); must divide minibatch_size. Default: "
        "minibatch_size.",
    )
    max_new_tokens: int = setting(64, "Longest response, in tokens.")
    temperature: float = setting(1.0, "Sampling temperature; it divides the logits in every log-probability as well.")

    kl_coef: float = setting(0.05, "β, the weight of the KL penalty to the reference in the token rewards.")
    kl_target: float | None = setting(
        None, "Adapt β towards this KL to the reference, in nats per response. Default: β stays fixed."
    )
    kl_horizon: int = setting(10_000, "Episodes over which an adaptive β moves by its whole error.")
    gamma: float = setting(1.0, "Discount of the rewards.")
    gae_lambda: float = setting(0.95, "λ of generalised advantage estimation.")
    clip_range: float = setting(0.2, "ε, how far the probability ratio may move before its gradient is cut.")
    clip_range_value: float = setting(0.2, "How far a value may move from the sampled one before its gradient is cut.")
    missing_eos_penalty: float = setting(1.0, "Subtracted from the score of a response that did not end.")
    whiten_rewards: bool = setting(False, "Scale token rewards to variance 1, keeping their mean.")
    whiten_advantages: bool = setting(True, "Scale advantages to mean 0 and variance 1.")
    value_init: str = setting(
        "auto", "Where the value model starts: reward (the reward model's body), policy (a copy of its body), or auto."
    )

    learning_rate: float = setting(1e-5, "Peak learning rate of the policy (AdamW, no weight decay).")
    value_learning_rate: float = setting(2e-5, "Peak learning rate of the value model.")
    warmup_updates: int = setting(5, "Updates over which the learning rates rise linearly to their peaks.")
    final_lr_fraction: float = setting(0.1, "Learning rates fall linearly to this fraction of their peaks.")
    adam_beta1: float = setting(0.9, "AdamW's first-moment decay.")
    adam_beta2: float = setting(0.99, "AdamW's second-moment decay.")
    adam_eps: float = setting(1e-5, "AdamW's denominator offset.")
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.")

    eval_episodes: int = setting(512, "Held-out episodes sampled before and after training.")
    num_samples: int = setting(4, "Sampled responses written to samples.jsonl at every update.")
    checkpoint_every: int = setting(20, "Updates between checkpoints to resume from; 0 writes none.")
    keep_checkpoints: int = setting(1, "How many of the newest checkpoints are kept.")
    seed: int = setting(0, "Seed of everything random: prompt order, sampling, minibatches.")

    def __post_init__(self) -> None:
        positive = (
            "updates", "batch_size", "ppo_epochs", "minibatch_size", "max_new_tokens", "temperature", "kl_horizon",
            "clip_range", "clip_range_value", "learning_rate", "value_learning_rate", "adam_eps", "max_grad_norm",
            "eval_episodes", "keep_checkpoints",
        )  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0 and finite")
        for name in ("batch_size", "eval_episodes"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 2, for a standard error")
        non_negative = ("kl_coef", "missing_eos_penalty", "warmup_updates", "num_samples", "checkpoint_every", "seed")
        for name in non_negative:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative")
        for name in ("gamma", "gae_lambda", "final_lr_fraction", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie between 0 and 1")
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} does not divide batch_size={self.batch_size}; choose a divisor, "
                "so that every episode counts once an epoch"
            )
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.minibatch_size % self.micro_batch_size
        ):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide minibatch_size={self.minibatch_size}; "
                "choose a divisor"
            )
        if self.kl_target is not None and not self.kl_target > 0:
            raise ValueError(f"kl_target={self.kl_target}: must be greater than 0, in nats per response")
        if self.value_init not in ("auto", "reward", "policy"):
            raise ValueError(f"value_init={self.value_init!r}: must be auto, reward or policy")
        if self.resume and self.output is None:
            raise ValueError("resume: say which run to go on with, by --output FOLDER")

    @property
    def forward_batch_size(self) -> int:
        """Episodes per forward pass, in training and in scoring alike."""
        return self.micro_batch_size or self.minibatch_size

    def save(self, path: Path) -> None:
        """Write the settings as YAML, which ``--config`` reads."""
        replace_text(path, yaml.safe_dump(asdict(self), sort_keys=False))

"""The settings of a PPO run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from rlhf.command_line import setting
from rlhf.metrics import replace_text

CHOICES = {
    "reference_kind": ("soup", "weighted_kl", "mixture", "moving_average", "none"),
    "reference_dtype": ("float32", "bfloat16", "float16"),
    "kl_estimator": ("k1", "k2", "k3", "exact"),
    "kl_in": ("reward", "loss", "both"),
    "kl_control": ("fixed", "adaptive", "target"),
    "value_model": ("separate", "shared"),
    "value_init": ("auto", "reward", "policy"),
    "precision": ("float32", "bf16"),
    "engine": ("decode", "graph", "generate"),
    "old_logprobs": ("auto", "sampled", "scored"),
}


@dataclass
class PPOConfig:
    """Settings of ``python -m rlhf.ppo``. An episode is one prompt with one sampled response."""

    SECTIONS: ClassVar[dict[str, str]] = {
        "policy": "models and data",
        "reference": "reference",
        "kl_coef": "KL penalty",
        "updates": "update",
        "lora_rank": "LoRA",
        "learning_rate": "optimizer",
        "max_new_tokens": "sampling",
        "eval_episodes": "run",
    }

    policy: str | None = setting(
        None,
        "Checkpoint folder, BASE+ADAPTER or hub id the policy starts from. Without it, the built-in reviews task runs.",
    )
    reward: list[str] = setting(
        [], "The rewards to optimise: reward-model folders or module:function; several are added up with their weights."
    )
    reward_weights: list[float] = setting([], "Weights of the rewards. Default: 1 each.")
    normalize_rewards: int = setting(
        0,
        "Responses of the reference over which each reward is brought to mean 0 and standard deviation 1 before "
        "training; 0: rewards are taken as they are.",
    )
    reward_clip: float | None = setting(None, "Each reward, once normalised, counts as at most so much, either way.")
    gold_reward: str | None = setting(
        None, "A reward that is reported and never optimised: a folder or module:function."
    )
    prompts: str | None = setting(
        None,
        "Training prompts: .txt (one a line), .jsonl or .parquet (prompt or messages), a saved dataset's folder, or "
        "hf:NAME:SPLIT.",
    )
    test_prompts: str | None = setting(
        None, "Held-out prompts for the before-and-after table. Default: a tenth of --prompts is set aside."
    )
    output: str | None = setting(None, "Run folder, made new. Default: runs/DATE-TIME.")
    resume: bool = setting(
        False, "Go on from the last checkpoint in --output; the metrics equal those of an unbroken run."
    )

    reference: list[str] = setting(
        [],
        "What the policy is kept close to: checkpoint folders, or merge recipes (.yaml). One folder is plain PPO, "
        "several are averaged in memory. Default: the policy.",
    )
    reference_weights: list[float] = setting([], "Weights of the references, normalised to sum 1. Default: uniform.")
    reference_kind: str = setting(
        "soup",
        "soup: one averaged model; weighted_kl: Σ w_i KL to each; mixture: KL to their geometric mixture; "
        "moving_average: of the policy, starting at the soup; none.",
    )
    reference_decay: float = setting(0.99, "moving_average: ρ ← decay · ρ + (1 − decay) · π; 0 copies the policy.")
    reference_every: int = setting(1, "moving_average: updates between two steps of the average.")
    reference_dtype: str = setting("float32", "float32, bfloat16 or float16: how the reference is kept and computed.")
    reference_device: str | None = setting(None, "Device of the reference. Default: that of the policy.")
    reference_offload: bool = setting(False, "Keep the reference in host memory while it is not read.")
    track_kl: list[str] = setting(
        [], "More folders or recipes to report the policy's KL to, at every update and at the end."
    )

    kl_coef: float = setting(0.05, "β, the weight of the KL penalty.")
    kl_estimator: str = setting("k1", "k1, k2, k3 or exact (the full vocabulary's sum); see rlhf/kl.py for biases.")
    kl_in: str = setting("reward", "Where the penalty goes: reward, loss, or both (with exact: the whole gradient).")
    kl_control: str = setting(
        "fixed",
        "fixed; adaptive: proportional (Ziegler et al. 2019); target: proportional–integral, reaches kl_target.",
    )
    kl_target: float | None = setting(None, "The KL that β is steered towards, in nats per response.")
    kl_horizon: int = setting(10_000, "adaptive: episodes over which β moves by its whole error.")
    kl_gain: float = setting(0.1, "target: change of log β by an update whose KL is e times the target.")

    updates: int = setting(100, "PPO updates: each samples a batch of episodes and trains on it.")
    batch_size: int = setting(64, "Episodes sampled per update, by all processes together.")
    ppo_epochs: int = setting(2, "Passes over each batch.")
    minibatch_size: int = setting(32, "Episodes per optimizer step, in all processes; must divide batch_size.")
    micro_batch_size: int | None = setting(
        None,
        "Episodes per forward and backward of a process (gradient accumulation), of like length. Default: its share of "
        "a minibatch.",
    )
    gamma: float = setting(1.0, "Discount of the rewards.")
    gae_lambda: float = setting(0.95, "λ of generalised advantage estimation.")
    clip_range: float = setting(0.2, "ε, how far the probability ratio may move before its gradient is cut.")
    clip_range_value: float = setting(0.2, "How far a value may move from the sampled one before its gradient is cut.")
    entropy_coef: float = setting(0.0, "Weight of an entropy bonus in the loss.")
    missing_eos_penalty: float = setting(1.0, "Subtracted from the score of a response that did not end.")
    length_penalty: float = setting(0.0, "Subtracted from the score for every token beyond length_penalty_after.")
    length_penalty_after: int = setting(0, "Tokens, end of sequence included, that cost nothing.")
    whiten_rewards: bool = setting(False, "Scale token rewards to variance 1, keeping their mean.")
    whiten_advantages: bool = setting(True, "Scale advantages to mean 0 and variance 1.")
    value_model: str = setting("separate", "separate: a network of its own; shared: a head on the policy's trunk.")
    value_init: str = setting(
        "auto",
        "Where a separate value model starts: reward (the reward model's body), policy (a copy of its body), or auto.",
    )
    value_coef: float = setting(0.1, "Weight of the value loss where the trunk is shared.")
    max_ratio: float = setting(
        10.0, "A step whose mean ratio π/π_old is above this is skipped, and counted (the policy has run away)."
    )
    max_skipped: int = setting(3, "The run stops after so many skipped steps in a row.")
    early_stop_kl: float | None = setting(
        None, "Leave an update's remaining steps out once a step's KL(old ‖ new) per token is above this."
    )

    lora_rank: int = setting(
        0,
        "0: all weights are trained. Else LoRA adapters of this rank are, in the policy and in a separate value model "
        "(needs peft). With its adapter's rank, a policy BASE+ADAPTER goes on with that; with 0 it is folded in.",
    )
    lora_alpha: float | None = setting(
        None, "An adapter's product is scaled by lora_alpha / lora_rank. Default: 32 for a new one."
    )
    lora_targets: list[str] = setting(
        [], "Layers with an adapter, e.g. q_proj v_proj. Default: all linear ones but the head."
    )
    learning_rate: float = setting(1e-5, "Peak learning rate of the policy (AdamW, no weight decay).")
    value_learning_rate: float = setting(2e-5, "Peak learning rate of the value model or head.")
    warmup_updates: int = setting(5, "Updates over which the learning rates rise linearly to their peaks.")
    final_lr_fraction: float = setting(0.1, "Learning rates fall linearly to this fraction of their peaks.")
    adam_beta1: float = setting(0.9, "AdamW's first-moment decay.")
    adam_beta2: float = setting(0.99, "AdamW's second-moment decay.")
    adam_eps: float = setting(1e-5, "AdamW's denominator offset.")
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.")
    precision: str = setting("float32", "float32, or bf16: products in bfloat16, weights and sums in float32.")
    activation_checkpointing: bool = setting(False, "Compute activations again in the backward pass; saves memory.")

    max_new_tokens: int = setting(64, "Longest response, in tokens.")
    temperature: float = setting(1.0, "Sampling temperature; it divides the logits in every log-probability as well.")
    top_k: int = setting(0, "Sample from the k likeliest tokens only (0: all). The KL is that of the uncut policy.")
    top_p: float = setting(1.0, "Sample from the fewest likeliest tokens of this mass (1: all).")
    engine: str = setting(
        "decode",
        "decode: our own loop; graph: one step captured as a CUDA graph, for GPUs; generate: the framework's, slow, to "
        "compare with.",
    )
    old_logprobs: str = setting(
        "auto", "sampled: from the states kept while sampling; scored: by a forward; auto: sampled in float32."
    )

    eval_episodes: int = setting(512, "Held-out episodes sampled before and after training.")
    num_samples: int = setting(4, "Sampled responses written to samples.jsonl at every update.")
    save_every: int = setting(20, "Updates between checkpoints to resume from; 0 writes none.")
    keep: int = setting(1, "How many of the newest checkpoints are kept.")
    tensorboard: bool = setting(False, "Write the metrics for TensorBoard too (pip install tensorboard).")
    seed: int = setting(0, "Seed of everything random: prompt order, sampling, minibatches.")

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_choices()
        self._check_sizes()
        if self.kl_in != "reward" and self.kl_estimator == "k1":
            raise ValueError(
                f"kl_in={self.kl_in}: k1 has no gradient in expectation there; use kl_estimator exact, k2 or k3"
            )
        if self.kl_in == "both" and self.kl_estimator != "exact":
            raise ValueError(f"kl_in=both counts {self.kl_estimator} twice; use kl_estimator=exact, or kl_in=reward")
        if (self.kl_control == "fixed") != (self.kl_target is None):
            raise ValueError(
                f"kl_control={self.kl_control}, kl_target={self.kl_target}: give a target in nats per response, and "
                "adaptive or target as its control; or neither"
            )
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets):
            raise ValueError("lora_alpha and lora_targets change nothing without adapters; give lora_rank too")
        if self.lora_rank and self.reference_kind == "moving_average":
            raise ValueError(
                "lora_rank with reference_kind=moving_average: a policy with adapters is not averaged; use "
                "lora_rank=0, or another kind"
            )
        if self.resume and self.output is None:
            raise ValueError("resume: say which run to go on with, by --output FOLDER")

    def _check_ranges(self) -> None:
        positive = (
            "updates", "batch_size", "ppo_epochs", "minibatch_size", "max_new_tokens", "temperature", "kl_horizon",
            "kl_gain", "clip_range", "clip_range_value", "learning_rate", "value_learning_rate", "adam_eps",
            "max_grad_norm", "eval_episodes", "keep", "reference_every", "value_coef", "max_ratio", "max_skipped",
        )  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0 and finite")
        for name in ("kl_target", "early_stop_kl", "reward_clip", "lora_alpha"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0 and finite")
        for name in ("batch_size", "eval_episodes"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 2, for a standard error")
        if self.normalize_rewards < 0 or self.normalize_rewards == 1:
            raise ValueError(f"normalize_rewards={self.normalize_rewards}: must be 0 (off) or at least 2 responses")
        non_negative = (
            "kl_coef", "missing_eos_penalty", "length_penalty", "length_penalty_after", "warmup_updates",
            "num_samples", "save_every", "seed", "top_k", "entropy_coef", "lora_rank",
        )  # fmt: skip
        for name in non_negative:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative")
        fractions = ("gamma", "gae_lambda", "final_lr_fraction", "adam_beta1", "adam_beta2", "reference_decay", "top_p")
        for name in fractions:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie between 0 and 1")

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {', '.join(choices[:-1])} or {choices[-1]}")

    def _check_sizes(self) -> None:
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

    @property
    def forward_batch_size(self) -> int:
        """Episodes per forward pass, in training and in scoring alike."""
        return self.micro_batch_size or self.minibatch_size

    def save(self, path: Path) -> None:
        """Write the settings as YAML, which ``--config`` reads."""
        replace_text(path, yaml.safe_dump(asdict(self), sort_keys=False))

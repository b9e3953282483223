"""What a PPO run holds, loaded and checked against each other before anything long starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import kl_control
from rlhf.config import PPOConfig
from rlhf.data import Prompt, load_prompts, shared_prompts
from rlhf.distributed import Processes, copy_whole, kept_whole, load_optimizer, load_whole, stored, trained
from rlhf.guards import StepGuard
from rlhf.lora import LoraSettings, add_adapter, load_with_adapter
from rlhf.models import (
    ScalarHeadModel,
    context_length,
    load_causal_lm,
    load_scalar_head_model,
    load_tokenizer,
    require_same_tokenizer,
)
from rlhf.policy import Policy, ValueModel, checkpoint_activations, halve_linear_layers
from rlhf.randomness import generator
from rlhf.reference import ModelReference, Reference, ReferenceSettings, folders_in, load_model_reference, names_of
from rlhf.rewards import Reward, load_reward, name_rewards
from rlhf.scoring import Standardisation, weigh
from soupkit.checkpoint import base_and_adapter

MODEL = "model."  # where the weights of a policy's model are among the policy's


@dataclass
class Learner:
    """A module that is trained, its optimizer, and the peak learning rate of each of the optimizer's groups."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    learning_rates: list[float]


@dataclass
class Run:
    """Everything that training uses."""

    config: PPOConfig
    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    policy: Policy  # what samples and is measured: what is trained, or under FSDP a whole copy of it
    value_model: ValueModel | None  # None where the value head sits on the policy's trunk
    learners: dict[str, Learner]  # "policy", and "value" where it is apart
    reference: Reference
    names: dict[str, str]  # short name → folder or recipe, of every model that the KL is reported to
    tracked: dict[str, ModelReference]  # those of them that it is measured to at every update
    rewards: dict[str, Reward]
    reward_weights: dict[str, float]
    gold_reward: Reward | None
    standardisation: Standardisation | None  # of the rewards, once it is fitted
    prompts: list[Prompt]
    test_prompts: list[Prompt]
    kl_controller: kl_control.FixedKL
    guard: StepGuard

    @property
    def model(self) -> PreTrainedModel:
        """The policy's language model."""
        return self.policy.model

    @property
    def device(self) -> torch.device:
        """The device of the policy."""
        return self.processes.device

    def model_weights(self) -> dict[str, Tensor]:
        """What a checkpoint folder of the policy's language model holds, of LoRA the adapter alone, as whole tensors.

        Only the process that writes has them; all processes call this together.
        """
        model = self._plain(self.learners["policy"]).get_submodule("model")
        return self._kept(trained(model) if self.config.lora_rank else stored(model))

    def state(self) -> dict[str, Any]:
        """What training changes beside :meth:`model_weights`, with LoRA these too, as :meth:`model_weights` has it."""
        weights = {name: trained(self._plain(learner)) for name, learner in self.learners.items()}
        if not self.config.lora_rank:
            weights["policy"] = {name: w for name, w in weights["policy"].items() if not name.startswith(MODEL)}
        return {
            "weights": self._kept(weights),
            "optimizers": {name: self._kept(lr.optimizer.state_dict()) for name, lr in self.learners.items()},
            "kl_controller": self.kl_controller.state(),
            "reference": self.reference.state(),
            "skipped_in_a_row": self.guard.in_a_row,
            "standardisation": None if self.standardisation is None else asdict(self.standardisation),
        }

    def restore(self, model: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Take over weights of the policy's language model, and what :meth:`state` gave."""
        load_whole(self._plain(self.learners["policy"]), {MODEL + name: weight for name, weight in model.items()})
        for name, learner in self.learners.items():
            load_whole(self._plain(learner), state["weights"][name])
            load_optimizer(learner.optimizer, state["optimizers"][name])
        self.copy_policy()
        self.kl_controller.restore(state["kl_controller"])
        self.reference.restore(state["reference"])
        self.guard.in_a_row = state["skipped_in_a_row"]
        if state["standardisation"] is not None:
            self.standardisation = Standardisation(**state["standardisation"])

    def distribute(self) -> None:
        """Hand what is trained to accelerate, where there are several processes."""
        for learner in self.learners.values():
            learner.module, learner.optimizer = self.processes.wrap(learner.module, learner.optimizer)

    def copy_policy(self) -> None:
        """Give the policy that samples the weights that are trained, where it is a copy; all processes do together."""
        policy = self._plain(self.learners["policy"])
        if policy is not self.policy:
            copy_whole(policy, self.policy)

    def _kept(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return kept_whole(tensors, self.processes.is_main)

    def _plain(self, learner: Learner) -> torch.nn.Module:
        """A learner's module without what accelerate has put around it."""
        return self.processes.accelerator.unwrap_model(learner.module)


def reference_settings(config: PPOConfig) -> ReferenceSettings:
    """The reference that a configuration asks for: the policy's own folder where none is named."""
    if config.reference_device is not None:
        require_device(config.reference_device)
    return ReferenceSettings(
        kind=config.reference_kind,
        models=config.reference or [str(config.policy)],
        weights=config.reference_weights or None,
        decay=config.reference_decay,
        every=config.reference_every,
        dtype=getattr(torch, config.reference_dtype),
        device=None if config.reference_device is None else torch.device(config.reference_device),
        offload=config.reference_offload,
    )


def require_device(name: str) -> None:
    """Raise ValueError unless a tensor can be put on the device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"reference_device={name}: cannot be used here ({reason}); leave it out, or name another"
        ) from None


def set_up(config: PPOConfig, processes: Processes | None = None) -> Run:
    """Check and load everything a run needs; ValueError or FileNotFoundError names what does not fit."""
    policy_folder = config.policy
    if policy_folder is None or not config.reward or config.prompts is None:
        raise ValueError(
            "--policy, --reward and --prompts belong together: give all three, or only --reward for the built-in task"
        )
    processes = processes or Processes()
    if config.engine == "graph" and processes.device.type != "cuda":
        raise ValueError(f"engine=graph: needs a GPU, and this is a {processes.device.type}; use engine=decode")
    require_even_shares(config, processes.number)
    settings = reference_settings(config)
    named = [*config.reference, *config.track_kl]
    for folder in (folder for model in named for folder in folders_in(model)):
        require_same_tokenizer(policy_folder, folder)
    value_folder = None if config.value_model == "shared" else value_start(config)
    tokenizer = load_tokenizer(policy_folder)
    prompts, test_prompts = load_all_prompts(config, tokenizer)
    device = processes.device

    load = partial(load_reward, policy=policy_folder, device=device, batch_size=config.forward_batch_size)
    specs = name_rewards(config.reward)
    weights = weigh(list(specs), config.reward_weights)
    rewards = {name: load(spec) for name, spec in specs.items()}
    gold_reward = load(config.gold_reward) if config.gold_reward else None
    place = torch.device("cpu") if processes.shards else device  # from where accelerate takes each process's shard
    policy = sampling = Policy(load_policy(config, place), value_head=config.value_model == "shared")
    value_model = None if value_folder is None else ValueModel(load_value_model(config, value_folder, place))
    modules = [policy, *([value_model] if value_model else [])]
    if config.lora_rank and config.precision == "bf16":
        for module in modules:
            halve_linear_layers(module, frozen_only=True)
    if processes.shards:
        sampling = deepcopy(policy)
        if config.precision == "bf16":
            halve_linear_layers(sampling, frozen_only=False)
        sampling.to(device)
    if config.activation_checkpointing:
        for model in (policy.model, *([value_model.scalar.model] if value_model else [])):
            checkpoint_activations(model)
    names = names_of([policy_folder, *named])
    tracked = config.track_kl or ([policy_folder] if config.reference_kind == "none" else [])
    return Run(
        config=config,
        processes=processes,
        tokenizer=tokenizer,
        policy=sampling,
        value_model=value_model,
        learners=make_learners(config, policy, value_model),
        reference=settings.load(device),
        names=names,
        tracked={
            name: load_model_reference([model], device=device)
            for name, model in names.items()
            if Path(model).resolve() in {Path(path).resolve() for path in tracked}
        },
        rewards=rewards,
        reward_weights=weights,
        gold_reward=gold_reward,
        standardisation=None,
        prompts=prompts,
        test_prompts=test_prompts,
        kl_controller=make_controller(config),
        guard=StepGuard(config.max_ratio, config.max_skipped),
    )


def lora_settings(config: PPOConfig) -> LoraSettings:
    """The adapters that a configuration asks for."""
    return LoraSettings(config.lora_rank, config.lora_alpha, tuple(config.lora_targets), config.seed)


def load_policy(config: PPOConfig, device: torch.device) -> PreTrainedModel:
    """The model that PPO starts from; with LoRA, frozen but for its adapter."""
    assert config.policy is not None
    if base_and_adapter(config.policy) and not config.lora_rank:
        print(
            f"note: the adapter of {config.policy} is folded in, and all weights are trained; its rank as --lora_rank "
            "goes on with it",
            file=sys.stderr,
        )
    if config.lora_rank:
        return load_with_adapter(config.policy, lora_settings(config), device=device)
    return load_causal_lm(config.policy, device=device)


def load_value_model(config: PPOConfig, folder: str, device: torch.device) -> ScalarHeadModel:
    """A separate value model, whose head starts at 0; with LoRA, frozen but for its adapter and the head."""
    scalar = load_scalar_head_model(folder, device=device, zero_head=True)
    if config.lora_rank:
        add_adapter(scalar.model, lora_settings(config))
        scalar.head.requires_grad_(True)
    return scalar


def make_learners(config: PPOConfig, policy: Policy, value_model: ValueModel | None) -> dict[str, Learner]:
    """Policy and value model with an AdamW each; a value head on the trunk is a group of the policy's."""

    def adamw(groups: list[dict[str, object]]) -> torch.optim.AdamW:
        betas = (config.adam_beta1, config.adam_beta2)
        return torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, weight_decay=0.0, fused=True)

    def trained_group(module: torch.nn.Module) -> dict[str, object]:
        return {"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}

    groups = [trained_group(policy.model)]
    rates = [config.learning_rate]
    if policy.value_head is not None:
        groups.append(trained_group(policy.value_head))
        rates.append(config.value_learning_rate)
    learners = {"policy": Learner(policy, adamw(groups), rates)}
    if value_model is not None:
        optimizer = adamw([trained_group(value_model)])
        learners["value"] = Learner(value_model, optimizer, [config.value_learning_rate])
    return learners


def make_controller(config: PPOConfig) -> kl_control.FixedKL:
    """The controller of β."""
    if config.kl_target is None:
        return kl_control.FixedKL(config.kl_coef)
    if config.kl_control == "adaptive":
        return kl_control.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    return kl_control.TargetKL(config.kl_coef, config.kl_target, config.kl_gain)


def require_even_shares(config: PPOConfig, num_processes: int) -> None:
    """Raise ValueError unless every process has the same number of episodes of each minibatch."""
    for name in ("batch_size", "minibatch_size", "eval_episodes"):
        if getattr(config, name) % num_processes:
            raise ValueError(
                f"{name}={getattr(config, name)} does not split evenly over {num_processes} processes; choose a "
                "multiple"
            )
    share = config.minibatch_size // num_processes
    if config.micro_batch_size is not None and share % config.micro_batch_size:
        raise ValueError(
            f"micro_batch_size={config.micro_batch_size} does not divide the {share} episodes that each of "
            f"{num_processes} processes has of a minibatch; choose a divisor"
        )


def load_all_prompts(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts that leave room for a response in what the policy can read."""
    assert config.policy is not None
    assert config.prompts is not None
    context = context_length(config.policy)
    room = None if context is None else context - config.max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in the {context} tokens that "
            f"{config.policy} can read; lower it"
        )
    prompts = load_prompts(config.prompts, tokenizer, room)
    if not config.test_prompts:
        return split_test_prompts(prompts, config)
    test_prompts = load_prompts(config.test_prompts, tokenizer, room)
    shared = shared_prompts(prompts, test_prompts)
    if shared:
        print(
            f"warning: {shared} of {len(test_prompts)} prompts of {config.test_prompts} are trained on as well, and no "
            "longer held out",
            file=sys.stderr,
        )
    return prompts, test_prompts


def split_test_prompts(prompts: list[Prompt], config: PPOConfig) -> tuple[list[Prompt], list[Prompt]]:
    """A random tenth of the prompts (at least one) set aside as test prompts. → training prompts, test prompts"""
    if len(prompts) < 2:
        raise ValueError(f"{config.prompts}: one prompt cannot be split; add prompts, or give --test_prompts")
    order = torch.randperm(len(prompts), generator=generator(config.seed, "test prompts")).tolist()
    num_test = max(1, len(prompts) // 10)
    return [prompts[i] for i in order[num_test:]], [prompts[i] for i in order[:num_test]]


def value_start(config: PPOConfig) -> str:
    """The folder whose body the value model starts from, by ``value_init``; its head starts at 0."""
    assert config.policy is not None
    if config.value_init == "policy":
        return config.policy
    folders = [reward for reward in config.reward if Path(reward).is_dir()]
    if config.value_init == "reward" and not folders:
        raise ValueError(f"value_init=reward, but {config.reward[0]} is no reward-model folder; use value_init=policy")
    return folders[0] if folders else config.policy

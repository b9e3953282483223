"""What memory and time a run of PPO needs, on paper: before a GPU is asked for.

    python -m rlhf.scale --size 7b --precision bf16 --processes 8 --sharded --activation_checkpointing
    python -m rlhf.scale --config run/config.yaml --prompt_tokens 300     # any flags of rlhf.ppo, and a few more

Sizes are those of a Llama: gated feed-forward, grouped keys and values. They come from the folder of ``--policy``, from
``--size``, or one by one. docs/scale.md has tables made with it, and compares it with what was measured.

Symbols: L layers, d hidden size, f of the feed-forward, q = heads · head size, k = key–value heads · head size,
V vocabulary; an episode has P prompt tokens and T response tokens; W processes. Numbers are bytes, floating-point
operations (two for a multiplication with its addition) and seconds, of one process.

Memory is a list of parts, each with the moments of a run at which it is there (:data:`MOMENTS`); what a device must
have is the largest sum of any moment. Time is, for every pass, the larger of arithmetic and of memory traffic, and a
fixed cost for every layer that is started. Neither knows of fragmentation, of a device's own context (about a gigabyte
on a GPU), or of padding: every response has T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import AutoConfig, AutoModel

from rlhf.command_line import parse_config, run_command, setting
from rlhf.config import PPOConfig
from rlhf.logprobs import KEPT, chunks
from rlhf.metrics import table
from rlhf.models import require_checkpoint

GB = 1e9
FLOAT32 = 4  # bytes
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# ── What there is ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; ``tied``: the head's weight is the embedding's."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool = False
    head_size: int | None = None  # None: hidden size / heads

    @classmethod
    def of(cls, folder: str | Path) -> Shape:
        """The sizes of a checkpoint folder's model, by its config; ValueError where it is no Llama in all but name."""
        config = AutoConfig.from_pretrained(require_checkpoint(folder)).get_text_config()
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        missing = [name for name in names if getattr(config, name, None) is None]
        if missing:
            raise ValueError(f"{folder}: its config has no {missing[0]}; the sizes must be those of a Llama")
        shape = cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            vocab_size=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            head_size=getattr(config, "head_dim", None),
        )
        with torch.device("meta"):
            real = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
        if abs(shape.body / real - 1.0) > 0.02:  # biases and norms of heads are less
            raise ValueError(
                f"{folder}: its body has {real:,} parameters, a Llama of its sizes {shape.body:,}; the model on paper "
                "knows gated feed-forward layers without experts only"
            )
        return shape

    @property
    def queries(self) -> int:
        """q, the width of all heads together."""
        return self.num_heads * (self.head_size or self.hidden_size // self.num_heads)

    @property
    def keys(self) -> int:
        """k, the width of all key heads together, and of all value heads."""
        return self.queries // self.num_heads * self.num_kv_heads

    @property
    def layer_products(self) -> int:
        """Weights of a layer's linear maps: 2dq + 2dk + 3df."""
        return self.hidden_size * (2 * self.queries + 2 * self.keys + 3 * self.intermediate_size)

    @property
    def products(self) -> int:
        """Weights of the linear maps of all layers: L · (2dq + 2dk + 3df)."""
        return self.num_layers * self.layer_products

    @property
    def embedding(self) -> int:
        """V · d."""
        return self.vocab_size * self.hidden_size

    @property
    def head(self) -> int:
        """Weights of a language-model head of its own: V · d, or 0 where it is tied."""
        return 0 if self.tied else self.embedding

    @property
    def body(self) -> int:
        """All parameters but the head's: V·d + L · (2dq + 2dk + 3df + 2d) + d."""
        return self.embedding + self.products + (2 * self.num_layers + 1) * self.hidden_size

    @property
    def language_model(self) -> int:
        """Parameters of the policy."""
        return self.body + self.head

    @property
    def scalar_model(self) -> int:
        """Parameters of a reward or value model: the body and a head of d weights."""
        return self.body + self.hidden_size

    def adapters(self, rank: int) -> int:
        """LoRA's numbers with adapters on every linear map of the layers: L · r · Σ (inputs + outputs)."""
        d, q, k, f = self.hidden_size, self.queries, self.keys, self.intermediate_size
        return self.num_layers * rank * (2 * (d + q) + 2 * (d + k) + 3 * (d + f))


@dataclass(frozen=True)
class Device:
    """What a process runs on. Rates are a second's.

    flops, bf16_flops  operations of dense matrix products, the data sheet's; ``efficiency`` of them are reached
    bandwidth          bytes of memory traffic
    memory             bytes
    link, host_link    bytes to each other process, and to host memory, one way
    launch             seconds that starting a layer costs, however little it computes: Python, kernels' launches
    kind               torch's name, which decides how many logits are made at a time
    """

    flops: float
    bf16_flops: float
    bandwidth: float
    memory: float
    link: float
    host_link: float
    launch: float = 5e-4
    efficiency: float = 0.4
    kind: str = "cuda"

    def rate(self, bf16: bool) -> float:
        """Operations a second that are reached."""
        return self.efficiency * (self.bf16_flops if bf16 else self.flops)

    def seconds(self, flops: float, num_bytes: float, bf16: bool, layers: float = 0) -> float:
        """max(operations / rate, bytes / bandwidth) + layers · launch."""
        return max(flops / self.rate(bf16), num_bytes / self.bandwidth) + layers * self.launch


# Sizes of models that are out there: Llama 3.2 1B, Llama 2 7B, Llama 3.1 70B.
SIZES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, tied=True),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "70b": Shape(80, 8192, 28672, 64, 8, 128256),
}
# Data sheets of the SXM cards; float32 without TF32, as torch computes unless told otherwise.
DEVICES = {
    "a100": Device(19.5e12, 312e12, 2.04e12, 80 * GB, 300 * GB, 25 * GB),
    "h100": Device(67e12, 989e12, 3.35e12, 80 * GB, 450 * GB, 50 * GB),
    "h200": Device(67e12, 989e12, 4.8e12, 141 * GB, 450 * GB, 50 * GB),
}


@dataclass
class ScaleConfig(PPOConfig):
    """Settings of ``python -m rlhf.scale``: those of ``rlhf.ppo``, and what no run has to be told."""

    SECTIONS: ClassVar[dict[str, str]] = {**PPOConfig.SECTIONS, "size": "sizes", "processes": "machine"}

    size: str | None = setting(None, f"Sizes of the policy: {', '.join(SIZES)}. Default: those of the --policy folder.")
    reward_size: str | None = setting(
        None, "Sizes of reward and value model. Default: those of the --reward folder, or else the policy's."
    )
    num_layers: int | None = setting(None, "Layers of the policy; with the next five instead of --size.")
    hidden_size: int | None = setting(None, "Its hidden size.")
    intermediate_size: int | None = setting(None, "Width of its feed-forward layers.")
    num_heads: int | None = setting(None, "Its attention heads.")
    num_kv_heads: int | None = setting(None, "Its key-value heads. Default: as many as heads.")
    vocab_size: int | None = setting(None, "Its vocabulary.")
    tied: bool = setting(False, "Its head is its embedding.")
    prompt_tokens: int = setting(512, "Tokens of a prompt.")

    processes: int = setting(1, "Processes, one a device.")
    sharded: bool = setting(False, "FSDP: what is trained is spread over the processes. Default: DDP, all on each.")
    device: str = setting("h100", f"What a process runs on: {', '.join(DEVICES)}.")
    device_memory: float | None = setting(None, "Gigabytes of memory, for a device unlike --device.")
    device_bandwidth: float | None = setting(None, "Gigabytes of memory traffic a second, likewise.")
    device_tflops: float | None = setting(None, "10¹² operations a second of dense float32 products, likewise.")
    device_bf16_tflops: float | None = setting(None, "10¹² operations a second of bfloat16 products, likewise.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_tokens", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be one of {', '.join(DEVICES)}")
        for name in ("size", "reward_size"):
            if getattr(self, name) not in (None, *SIZES):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(SIZES)}")
        if self.sharded and self.processes == 1:
            raise ValueError("sharded: one process has nobody to share with; give --processes")


def shape_of(config: ScaleConfig) -> Shape:
    """The policy's sizes, from ``size``, from single sizes, or from its folder."""
    if config.size:
        return SIZES[config.size]
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "vocab_size")
    sizes = {name: getattr(config, name) for name in names}
    if config.policy and not any(sizes.values()):
        return Shape.of(config.policy)
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(f"{missing[0]}: not given; give --policy FOLDER, --size, or {', '.join(names)}")
    return Shape(**sizes, num_kv_heads=config.num_kv_heads or sizes["num_heads"], tied=config.tied)


@dataclass(frozen=True)
class Plan:
    """A run on paper: its settings, the sizes of its models, and how many it reads."""

    config: ScaleConfig
    policy: Shape
    scalar: Shape  # of reward and value model
    device: Device

    @classmethod
    def of(cls, config: ScaleConfig) -> Plan:
        """The plan for some settings. A reward that is no folder here has the policy's sizes, a function none."""
        policy = shape_of(config)
        folders = [reward for reward in config.reward if Path(reward).is_dir()]
        named = SIZES[config.reward_size] if config.reward_size else Shape.of(folders[0]) if folders else policy
        given = {
            "memory": (config.device_memory, GB),
            "bandwidth": (config.device_bandwidth, GB),
            "flops": (config.device_tflops, 1e12),
            "bf16_flops": (config.device_bf16_tflops, 1e12),
        }
        changes: dict[str, Any] = {name: value * unit for name, (value, unit) in given.items() if value is not None}
        return cls(config, policy, named, replace(DEVICES[config.device], **changes))

    @property
    def bf16(self) -> bool:
        """Whether products are taken in bfloat16."""
        return self.config.precision == "bf16"

    @property
    def separate(self) -> bool:
        """Whether the value model is a network of its own."""
        return self.config.value_model == "separate"

    @property
    def num_references(self) -> int:
        """Models of the reference: one, but for those kinds that keep theirs apart."""
        apart = self.config.reference_kind in ("weighted_kl", "mixture")
        return 0 if self.config.reference_kind == "none" else max(len(self.config.reference), 1) if apart else 1

    @property
    def num_rewards(self) -> int:
        """Reward models: all rewards but ``module:function``; one where none is named."""
        return sum(":" not in reward for reward in self.config.reward) if self.config.reward else 1

    @property
    def num_tracked(self) -> int:
        """Models that are kept to report the KL to them at every update."""
        return len(set(self.config.track_kl)) or int(self.config.reference_kind == "none")

    @property
    def num_named(self) -> int:
        """Models that the KL is reported to before and after training: policy, references and followed ones."""
        config = self.config
        return len({config.policy, *config.reference, *config.track_kl})

    @property
    def shards(self) -> int:
        """Processes that what is trained is spread over."""
        return self.config.processes if self.config.sharded else 1

    @property
    def episodes(self) -> int:
        """Episodes of a batch that a process samples and scores."""
        return -(-self.config.batch_size // self.config.processes)

    @property
    def evaluated(self) -> int:
        """Held-out episodes that a process samples at once."""
        return min(self.config.batch_size, -(-self.config.eval_episodes // self.config.processes))

    @property
    def micro_batch(self) -> int:
        """Episodes of a forward and backward pass."""
        return self.config.micro_batch_size or -(-self.config.minibatch_size // self.config.processes)

    @property
    def num_micro_batches(self) -> int:
        """Passes whose gradients add up to those of a minibatch."""
        return -(-self.config.minibatch_size // self.config.processes // self.micro_batch)

    @property
    def forward_batch(self) -> int:
        """Episodes of a forward pass that scores."""
        return min(self.config.forward_batch_size, self.episodes)

    @property
    def length(self) -> int:
        """Tokens of an episode."""
        return self.config.prompt_tokens + self.config.max_new_tokens

    @property
    def keeps_hidden(self) -> bool:
        """Whether the hidden states of sampling are kept, so that no forward pass makes the old log-probabilities."""
        return self.config.old_logprobs == "sampled" or (self.config.old_logprobs == "auto" and not self.bf16)


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MOMENTS = {
    "prefill": "rollout: the prompts are read",
    "decode": "rollout: a token is drawn",
    "forward": "scoring: a model reads the episodes",
    "compare": "scoring: distributions over the vocabulary are compared",
    "backward": "training: the policy's backward pass begins",
    "value backward": "training: that of a separate value model begins",
    "step": "training: all gradients are there",
    "copy": "training: the copy that samples takes over the weights",
    "save": "a checkpoint is written",
    "evaluation rollout": "before and after training: held-out prompts are read",
    "evaluation": "before and after training: the policy is compared with every model that was named",
}
PHASES = {
    "rollout": ("prefill", "decode"),
    "scoring": ("forward", "compare"),
    "training": ("backward", "value backward", "step", "copy"),
    "saving": ("save",),
    "evaluation": ("evaluation rollout", "evaluation"),
}
ALWAYS = tuple(MOMENTS)
MINIBATCHES = ("backward", "value backward", "step")
# What is there before the first update, and stays.
LOADED = (
    "policy weights",
    "value model weights",
    "reference",
    "reward models",
    "models followed",
    "policy that samples",
)


class Part(NamedTuple):
    """Something that takes memory at some moments; its name is unique but for parts whose moments differ."""

    name: str
    num_bytes: float
    moments: tuple[str, ...] = ALWAYS


def weight_bytes(num: int, products: int, product_bytes: int) -> int:
    """Bytes of ``num`` weights of which ``products``, those of nn.Linear, take ``product_bytes`` each, the others 4."""
    return FLOAT32 * (num - products) + product_bytes * products


def trained_numbers(plan: Plan) -> tuple[int, int]:
    """Numbers that are trained of the policy and of a value model of its own: all weights, or those of adapters."""
    rank = plan.config.lora_rank
    policy = plan.policy.adapters(rank) if rank else plan.policy.language_model
    value = plan.scalar.adapters(rank) if rank else plan.scalar.scalar_model
    return policy, value if plan.separate else 0


def trained_parts(plan: Plan, shape: Shape, name: str, num: int, head: int) -> list[Part]:
    """Weights, gradients and AdamW's moments of policy or value model, ``num`` weights, ``head`` of them a head.

    Full: 4 bytes a weight, 4 a gradient, 8 two moments. LoRA: 4 a frozen weight, or 2 in bf16 where it is an
    nn.Linear's, and 16 an adapter's number. FSDP divides all of it by W. DDP adds 4 a gradient for the buckets in which
    gradients travel. Gradients are there from the first backward pass to the step, and so at the beginning of the next
    micro-batch's, if there is one.
    """
    rank, accumulating = plan.config.lora_rank, plan.num_micro_batches > 1
    weights, trained = FLOAT32 * num, num
    if rank:
        trained = shape.adapters(rank)
        weights = weight_bytes(num, shape.products + head, 2 if plan.bf16 else FLOAT32) + FLOAT32 * trained
    once = ("value backward", "step") if name == "policy" else ("step",)  # the policy's backward pass comes first
    of_gradients = MINIBATCHES if accumulating else once
    parts = [
        Part(f"{name} weights", weights / plan.shards),
        Part(f"{name} gradients", FLOAT32 * trained / plan.shards, of_gradients),
        Part(f"{name} AdamW moments", 2 * FLOAT32 * trained / plan.shards),
    ]
    if plan.config.processes > 1 and not plan.config.sharded:
        parts.append(Part(f"{name} DDP buckets", FLOAT32 * trained))
    return parts


def model_parts(plan: Plan) -> list[Part]:
    """Everything that grows with the number of weights.

    Reference models are whole on every process, in ``reference_dtype``; offloaded ones only while they are read. Reward
    models, and those that the KL is reported to, are whole and float32. Under FSDP a whole copy of the policy samples,
    adapters included, its nn.Linear weights in bfloat16 in bf16, unless they are the embedding's too.
    """
    config, policy, scalar = plan.config, plan.policy, plan.scalar
    parts = trained_parts(plan, policy, "policy", policy.language_model, policy.head)
    if plan.separate:
        parts += trained_parts(plan, scalar, "value model", scalar.scalar_model, 0)
    if config.sharded:
        products = policy.products + policy.head + policy.adapters(config.lora_rank)
        num = policy.language_model + policy.adapters(config.lora_rank)
        parts.append(Part("policy that samples", weight_bytes(num, products, 2 if plan.bf16 else FLOAT32)))
    reading = ("forward", "compare", "evaluation", *(("backward",) if config.kl_in != "reward" else ()))
    one = BYTES[config.reference_dtype] * policy.language_model
    if plan.num_references and config.reference_device is None:
        parts.append(Part("reference", plan.num_references * one, reading if config.reference_offload else ALWAYS))
    parts.append(Part("reward models", FLOAT32 * plan.num_rewards * scalar.scalar_model))
    parts.append(Part("models followed", FLOAT32 * plan.num_tracked * policy.language_model))
    one_at_a_time = plan.num_named > plan.num_tracked
    return [*parts, Part("model of the table", FLOAT32 * one_at_a_time * policy.language_model, ("evaluation",))]


def cast_parts(plan: Plan) -> list[Part]:
    """The bfloat16 copies of trained float32 weights that autocast makes: 2 bytes for each nn.Linear weight.

    They live as long as sampling, scoring or a training pass does, and until its backward pass is done. Frozen bfloat16
    weights need none; under FSDP the copy that samples has none, and is what scoring reads.
    """
    if not plan.bf16 or plan.config.lora_rank:
        return []
    policy = 2 * (plan.policy.products + plan.policy.embedding)
    reading: tuple[str, ...] = ()
    if not plan.config.sharded:
        reading = (*PHASES["rollout"], "evaluation rollout")
        if not plan.keeps_hidden:
            reading += (*PHASES["scoring"], "evaluation")
    value = [Part("casts of weights", 2 * plan.scalar.products, ("forward", "value backward"))] if plan.separate else []
    return [Part("casts of weights", policy, ("backward", *reading)), *value]


def gathered_parts(plan: Plan) -> list[Part]:
    """What FSDP puts together of the shards: two layers, and embedding and head, with the gradients of one and those.

    4 · (2 + 1) · layer + 4 · (1 + 1) · (V·d + head). Of LoRA no gradients, and frozen weights as they are kept.
    """
    if not plan.config.sharded:
        return []

    def gathered(shape: Shape, head: int) -> float:
        frozen = plan.config.lora_rank > 0
        product_bytes = 2 if frozen and plan.bf16 else FLOAT32
        layer, outside = product_bytes * shape.layer_products, FLOAT32 * shape.embedding + product_bytes * head
        return (2 if frozen else 3) * layer + (1 if frozen else 2) * outside

    value = [Part("layers gathered", gathered(plan.scalar, 0), ("forward", "value backward"))] if plan.separate else []
    return [Part("layers gathered", gathered(plan.policy, plan.policy.head), ("backward",)), *value]


def whole_parts(plan: Plan) -> list[Part]:
    """The tensor that FSDP puts together of its shards, one at a time, for the copy that samples or a checkpoint.

    4 bytes a number of the largest that is trained: embedding or linear map, or of LoRA an adapter's matrix.
    """
    if not plan.config.sharded:
        return []
    policy = plan.policy
    if plan.config.lora_rank:
        largest = plan.config.lora_rank * max(policy.hidden_size, policy.intermediate_size, policy.queries)
    else:
        largest = max(policy.embedding, policy.hidden_size * max(policy.intermediate_size, policy.queries))
    return [Part("whole tensor", FLOAT32 * largest, ("copy", "save"))]


def cache_bytes(shape: Shape, episodes: int, tokens: int, bf16: bool) -> int:
    """The key–value cache: L · 2k numbers a token, 4 bytes each; values take 2 in bf16, keys, once rotated, still 4."""
    return episodes * tokens * shape.num_layers * shape.keys * (FLOAT32 + (2 if bf16 else FLOAT32))


def layer_activations(shape: Shape, bf16: bool) -> int:
    """Bytes a token that a layer keeps for its backward pass.

    float32: 4 · (6d + 2q + 2k + 4f + heads + 2): each norm's input, normalised input, output and scale; queries, keys,
    values and output of attention with its log-sums; gate, its activation, the other branch and their product.
    bf16: each norm's input and normalised input in float32, and its output in bfloat16 once for every product that
    reads it; all inside attention and feed-forward in bfloat16: 16d + 2·5d + 4q + 4k + 8f + 4 · (heads + 2).
    """
    d, q, k, f = shape.hidden_size, shape.queries, shape.keys, shape.intermediate_size
    scales = FLOAT32 * (shape.num_heads + 2)
    if bf16:
        return 26 * d + 4 * q + 4 * k + 8 * f + scales
    return FLOAT32 * (6 * d + 2 * q + 2 * k + 4 * f) + scales


def activation_bytes(shape: Shape, tokens: int, bf16: bool, checkpointing: bool) -> int:
    """What a micro-batch's forward pass keeps: L layers, or with checkpointing their inputs (4d a token) and one layer.

    And 8d a token for the last norm.
    """
    layer, inputs = layer_activations(shape, bf16), FLOAT32 * shape.hidden_size
    layers = shape.num_layers * inputs + layer if checkpointing else shape.num_layers * layer
    return tokens * (layers + 2 * inputs)


def working_bytes(shape: Shape, bf16: bool) -> int:
    """Bytes a token inside a layer, where nothing is kept: its input, the norm's output, three tensors as wide as f.

    4 · (2d + 3f), or in bf16 10d + 6f.
    """
    d, f = shape.hidden_size, shape.intermediate_size
    return 10 * d + 6 * f if bf16 else FLOAT32 * (2 * d + 3 * f)


def chunk_rows(plan: Plan, rows: int) -> int:
    """Positions whose logits are made at once (:func:`rlhf.logprobs.chunks`)."""
    first = next(chunks(rows, plan.policy.vocab_size, torch.device(plan.device.kind)))
    return min(int(first.stop), rows)


def training_logits(plan: Plan) -> float:
    """Bytes for the logits of a micro-batch and their gradients.

    A chunk's log-probabilities become their own gradients, 4 bytes each; in bf16 there are a bfloat16 copy, its
    transpose in float32, and the head in bfloat16; with entropy or exact KL in the loss two blocks more. All chunks are
    kept where the micro-batch has at most KEPT logits. See :mod:`rlhf.logprobs`.
    """
    vocabulary, rows = plan.policy.vocab_size, plan.micro_batch * plan.config.max_new_tokens
    whole = plan.config.entropy_coef > 0 or (plan.config.kl_in != "reward" and plan.config.kl_estimator == "exact")
    chunk = chunk_rows(plan, rows) * vocabulary
    kept = FLOAT32 * (rows * vocabulary if rows * vocabulary <= KEPT else chunk)
    in_bf16 = 6 * chunk + 2 * plan.policy.embedding if plan.bf16 else 0
    return kept + in_bf16 + (2 * FLOAT32 * chunk if whole else 0)


def rollout_parts(plan: Plan, episodes: int, prefill: str, others: Sequence[str]) -> list[Part]:
    """What sampling for some episodes at once takes.

    The cache; the hidden states [episodes, T, d], float32; the prompts inside a layer; and at a token's draw its
    distribution, the probabilities and their sums (on a GPU in float64), V · (4 + 4 + 8) bytes an episode.
    """
    shape, config = plan.policy, plan.config
    drawing = FLOAT32 + FLOAT32 + (8 if plan.device.kind == "cuda" else FLOAT32)
    parts = [
        Part("key–value cache", cache_bytes(shape, episodes, plan.length, plan.bf16), (prefill, *others)),
        Part("activations", episodes * config.prompt_tokens * working_bytes(shape, plan.bf16), (prefill,)),
    ]
    if others:
        parts.append(Part("logits", episodes * shape.vocab_size * drawing, tuple(others)))
    return parts


def pass_parts(plan: Plan) -> list[Part]:
    """Everything that grows with the number of tokens.

    Hidden states that are kept for the old log-probabilities stay until the update ends. Comparing distributions takes
    five blocks of a chunk's logits: log π, π, log ρ, the difference of the logarithms, and π times that. The head's
    gradient, 4·V·d, waits in the backward pass, and at its end that of the embedding beside it where they are tied, or
    where there are gradients to add it to.
    """
    config, policy, scalar = plan.config, plan.policy, plan.scalar
    full = not config.lora_rank
    hidden = FLOAT32 * config.max_new_tokens * policy.hidden_size
    updates = (*PHASES["rollout"], *((*PHASES["scoring"], *PHASES["training"]) if plan.keeps_hidden else ()))
    evaluating = PHASES["evaluation"] if plan.keeps_hidden else ("evaluation rollout",)
    parts = [
        *rollout_parts(plan, plan.episodes, "prefill", ("decode",)),
        *rollout_parts(plan, plan.evaluated, "evaluation rollout", ()),
        Part("hidden states", plan.episodes * hidden, updates),
        Part("hidden states", -(-config.eval_episodes // config.processes) * hidden, evaluating),
    ]

    # Of the models that read, one after the other, the largest counts.
    tokens = plan.forward_batch * plan.length
    reads = max(working_bytes(scalar, plan.bf16) if plan.num_rewards else 0, working_bytes(policy, plan.bf16))
    rows = plan.forward_batch * config.max_new_tokens
    compared = 5 * FLOAT32 * chunk_rows(plan, rows) * policy.vocab_size
    states = (1 + plan.num_references) * FLOAT32 * rows * policy.hidden_size
    parts += [
        Part("activations", tokens * reads, ("forward",)),
        Part("activations", states, ("compare", "evaluation")),
        Part("logits", compared, ("compare", "evaluation")),
    ]

    tokens = plan.micro_batch * (plan.length - 1)
    states = plan.micro_batch * hidden
    kept = activation_bytes(policy, tokens, plan.bf16, config.activation_checkpointing) + states
    # The logits are gone when the layers' own backward passes begin, which need room as a forward pass does.
    working = tokens * working_bytes(policy, plan.bf16)
    parts += [
        Part("activations", kept, ("backward",)),
        Part("logits", max(training_logits(plan), working), ("backward",)),
    ]
    if plan.separate:
        of_value = activation_bytes(scalar, tokens, plan.bf16, config.activation_checkpointing) + states
        parts.append(Part("activations", of_value + tokens * working_bytes(scalar, plan.bf16), ("value backward",)))
    if full:
        at_the_end = int(policy.tied) + int(plan.num_micro_batches > 1)
        of_embedding = FLOAT32 * policy.embedding
        parts += [
            Part("gradient of the head", of_embedding, ("backward",)),
            Part("gradient of the head", at_the_end * of_embedding, ("step",)),
        ]
    return parts


def memory(plan: Plan) -> list[Part]:
    """Everything that takes memory on a device, but for parts of no bytes."""
    parts = [*model_parts(plan), *cast_parts(plan), *gathered_parts(plan), *whole_parts(plan), *pass_parts(plan)]
    return [part for part in parts if part.num_bytes]


def at(parts: Iterable[Part], moment: str) -> float:
    """Bytes in use at a moment."""
    return sum(part.num_bytes for part in parts if moment in part.moments)


def peak(parts: Sequence[Part], moments: Iterable[str] = ALWAYS) -> tuple[str, float]:
    """The moment that takes the most memory, of some, and its bytes."""
    moment = max(moments, key=lambda name: at(parts, name))
    return moment, at(parts, moment)


# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Work(NamedTuple):
    """A part of an update: its phase, its name, operations and seconds."""

    phase: str
    name: str
    flops: float
    seconds: float


def forward_flops(shape: Shape, episodes: float, length: int) -> float:
    """Operations of a body that reads episodes: 2 · products a token, and 2 · length² · q a layer for causal attention.

    Attention computes half a square of scores and of weighted sums.
    """
    return episodes * (2.0 * shape.products * length + 2.0 * shape.num_layers * shape.queries * length**2)


def head_flops(shape: Shape, rows: float) -> float:
    """Operations of the language-model head at some positions: 2·V·d each."""
    return 2.0 * shape.embedding * rows


def rollout_work(plan: Plan) -> list[Work]:
    """Sampling: the prompts at once, then T − 1 steps of a token for every episode.

    A step reads all weights and the cache so far: max(operations / rate, (weights + cache) / bandwidth) + L · launch.
    With ``engine=graph`` it reads the whole cache, and starts no layer by itself.
    """
    shape, config, device = plan.policy, plan.config, plan.device
    episodes, prompt = plan.episodes, config.prompt_tokens
    weights = (2 if plan.bf16 else FLOAT32) * (shape.products + shape.embedding)
    flops = forward_flops(shape, episodes, prompt) + head_flops(shape, episodes)
    prefill = Work("rollout", "prefill", flops, device.seconds(flops, weights, plan.bf16, shape.num_layers))
    total = seconds = 0.0
    graph = config.engine == "graph"
    for so_far in range(prompt + 1, plan.length):
        length = plan.length if graph else so_far
        attention = 4.0 * length * shape.num_layers * shape.queries
        flops = episodes * (2.0 * shape.products + attention) + head_flops(shape, episodes)
        traffic = weights + cache_bytes(shape, episodes, length, plan.bf16)
        total += flops
        seconds += device.seconds(flops, traffic, plan.bf16, 0 if graph else shape.num_layers)
    return [prefill, Work("rollout", "decode", total, seconds)]


def scoring_work(plan: Plan) -> list[Work]:
    """One forward pass of every model over all episodes; policy and references with their heads at response tokens.

    The policy's body is read only where the hidden states of sampling were not kept. An offloaded reference travels to
    the device and back.
    """
    config, device, episodes = plan.config, plan.device, plan.episodes
    passes = -(-episodes // plan.forward_batch)
    rows = episodes * config.max_new_tokens

    def work(name: str, num: int, shape: Shape, length: int, bf16: bool, head_rows: int, body: bool = True) -> Work:
        flops = num * (forward_flops(shape, episodes, length) * body + head_flops(shape, head_rows))
        traffic = num * passes * (2 if bf16 else FLOAT32) * shape.products * body
        seconds = device.seconds(flops, traffic, bf16, num * passes * shape.num_layers * body)
        return Work("scoring", name, flops, seconds)

    policy, read = plan.policy, plan.length - 1
    reference_bf16 = plan.bf16 or config.reference_dtype != "float32"
    works = [
        work("reward", plan.num_rewards, plan.scalar, plan.length, plan.bf16, 0),
        work("policy", 1, policy, read, plan.bf16, rows, not plan.keeps_hidden),
        work("reference", plan.num_references + plan.num_tracked, policy, read, reference_bf16, rows),
    ]
    if config.reference_offload:
        moved = 2 * plan.num_references * BYTES[config.reference_dtype] * policy.language_model
        works.append(Work("scoring", "reference, moving", 0.0, moved / device.host_link))
    if plan.separate:
        works.append(work("value", 1, plan.scalar, read, plan.bf16, 0))
    return [work for work in works if work.seconds]


def training_work(plan: Plan) -> list[Work]:
    """ppo_epochs passes over the batch: forward and backward of policy and value model, and AdamW's steps.

    Forward and backward are 3 forward passes, 2 with LoRA, whose frozen weights have no gradients; checkpointing is one
    more. So is computing the logits again where they are not kept. Gradients of DDP travel once a step, 2 · 4 bytes
    each; weights of FSDP twice a micro-batch and gradients once, 4 bytes each; all times (W − 1) / W. Computing hides
    it or waits for it, whichever is longer. FSDP also refreshes the copy that samples. AdamW moves 28 bytes a weight:
    four tensors read, three written.
    """
    config, device = plan.config, plan.device
    lora, tokens = config.lora_rank > 0, plan.length - 1
    episodes = config.ppo_epochs * plan.episodes
    steps = config.ppo_epochs * config.batch_size // config.minibatch_size
    passes = steps * plan.num_micro_batches
    factor = (2 if lora else 3) + config.activation_checkpointing
    rows = plan.micro_batch * config.max_new_tokens
    head_factor = (2 if lora else 3) + (rows * plan.policy.vocab_size > KEPT)
    away = (config.processes - 1) / config.processes

    def work(name: str, shape: Shape, num: int, trained: int, head: float) -> Work:
        flops = factor * forward_flops(shape, episodes, tokens) + head
        traffic = factor * passes * (2 if plan.bf16 else FLOAT32) * shape.products
        seconds = device.seconds(flops, traffic, plan.bf16, factor * passes * shape.num_layers)
        sent = passes * (2 * num + trained) if config.sharded else 2 * steps * trained
        return Work("training", name, flops, max(seconds, away * FLOAT32 * sent / device.link))

    policy, scalar = plan.policy, plan.scalar
    heads = head_factor * head_flops(policy, episodes * config.max_new_tokens)
    of_policy, of_value = trained_numbers(plan)
    works = [work("policy", policy, policy.language_model, of_policy, heads)]
    if plan.separate:
        works.append(work("value", scalar, scalar.scalar_model, of_value, 0.0))
    optimizer = 7 * FLOAT32 * steps * (of_policy + of_value) / plan.shards
    works.append(Work("training", "AdamW", 0.0, optimizer / device.bandwidth))
    if config.sharded:
        works.append(Work("training", "copy that samples", 0.0, away * FLOAT32 * of_policy / device.link))
    return works


def update_work(plan: Plan) -> list[Work]:
    """An update, in order; a process's operations, and the seconds of all, which wait for each other."""
    return [*rollout_work(plan), *scoring_work(plan), *training_work(plan)]


# ── The command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_table(plan: Plan) -> str:
    """Gigabytes of every part by phase, each at the moment of the phase that takes the most, and what that comes to."""
    parts = memory(plan)
    worst = {phase: peak(parts, moments)[0] for phase, moments in PHASES.items()}
    rows = [["GB a device", *worst]]
    for name in dict.fromkeys(part.name for part in parts):
        of_name = [part for part in parts if part.name == name]
        rows.append([name, *(_gigabytes(at(of_name, moment)) for moment in worst.values())])
    return table([*rows, ["together", *(_gigabytes(at(parts, moment)) for moment in worst.values())]])


def time_table(plan: Plan) -> str:
    """Operations and seconds of every part of an update."""
    works = update_work(plan)
    rows = [[f"{work.phase}: {work.name}", f"{work.flops / 1e12:.3g}", f"{work.seconds:.2f}"] for work in works]
    total = ["together", f"{sum(w.flops for w in works) / 1e12:.3g}", f"{sum(w.seconds for w in works):.2f}"]
    return table([["an update", "TFLOP a device", "seconds"], *rows, total])


def verdict(plan: Plan) -> str:
    """Whether the device has enough memory, and when it is needed."""
    moment, needed = peak(memory(plan))
    have = plan.device.memory
    fits = "fits" if needed <= have else "does not fit"
    return f"{fits}: {needed / GB:.1f} of {have / GB:.0f} GB ({MOMENTS[moment]})"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f}" if num_bytes else ""


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.scale``."""
    plan = Plan.of(parse_config(ScaleConfig, argv, description=__doc__))
    sizes = f"policy of {plan.policy.language_model / 1e9:.3g} billion parameters"
    print(f"{sizes}, {plan.config.processes} × {plan.config.device}\n")
    print(memory_table(plan), verdict(plan), time_table(plan), sep="\n\n")


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The model on paper: parameters, bytes and operations beside those of real tiny models, formulas by hand, its page."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, llama_config, make_llama, random_examples
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf import scale, scale_page
from rlhf.command_line import parse_config, run_command
from rlhf.data import TokenBatch, batch_examples
from rlhf.decoding import Sampling, decode, make_cache
from rlhf.logprobs import CHUNK, KEPT
from rlhf.policy import Policy, checkpoint_activations, mixed_precision
from rlhf.scale import (
    DEVICES,
    SIZES,
    Device,
    Part,
    Plan,
    ScaleConfig,
    Shape,
    at,
    forward_flops,
    head_flops,
    memory,
    peak,
    update_work,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import measuring
import ppo_work
import scale as benchmark

PAGE = ROOT / "docs" / "scale.md"
CPU = torch.device("cpu")
# L = 3, d = 8, f = 12, q = 8, k = 4, V = 20
TINY = Shape(3, 8, 12, 2, 1, 20, tied=True)
SMALL = {"batch_size": 16, "minibatch_size": 8, "prompt_tokens": 5, "max_new_tokens": 3, "eval_episodes": 16}


def plan_of(shape: Shape = TINY, scalar: Shape | None = None, device: Device | None = None, **settings: Any) -> Plan:
    """A plan of a tiny run, 16 episodes of 5 + 3 tokens."""
    config = ScaleConfig(**(SMALL | settings))
    return Plan(config, shape, scalar or shape, device or replace(DEVICES["h100"], kind="cpu"))


def of(plan: Plan, name: str, moment: str | None = None) -> float:
    """Bytes of the parts of a name, at a moment or at the one with the most."""
    parts = [part for part in memory(plan) if part.name == name]
    return at(parts, moment) if moment else max(at(parts, m) for m in scale.ALWAYS)


# --- sizes ---


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2, "head_dim": 4}])
def test_parameters_are_those_of_the_real_models(settings: dict[str, Any], tmp_path: Path) -> None:
    config = llama_config(**settings)
    config.save_pretrained(tmp_path)
    shape = Shape.of(tmp_path)
    assert shape.language_model == LlamaForCausalLM(config).num_parameters()
    config.num_labels = 1
    assert shape.scalar_model == LlamaForSequenceClassification(config).num_parameters()


def test_named_sizes_are_those_of_the_models_they_are_of() -> None:
    numbers = {name: shape.language_model for name, shape in SIZES.items()}
    assert numbers == {"1b": 1_235_814_400, "7b": 6_738_415_616, "70b": 70_553_706_496}


def test_adapters_by_hand() -> None:
    """In and out of a layer's seven maps: q 8+8, k and v 8+4, o 8+8, gate and up 8+12, down 12+8."""
    assert TINY.adapters(5) == 3 * 5 * (16 + 12 + 12 + 16 + 20 + 20 + 20)


def test_a_model_that_is_no_llama_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its config has no intermediate_size"):
        Shape.of(checkpoints["gpt2"])
    settings = json.loads((checkpoints["first"] / "config.json").read_text())
    experts = settings | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(experts))
    with pytest.raises(ValueError, match="a Llama of its sizes"):
        Shape.of(tmp_path)


# --- memory of weights ---


def test_adamw_takes_sixteen_bytes_a_weight() -> None:
    model = make_llama(0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shape = Shape(2, 16, 32, 2, 1, 20, tied=True)
    parts = scale.trained_parts(plan_of(), shape, "policy", shape.language_model, 0)
    real = [sum(t.nbytes for t in ts) for ts in (list(model.parameters()), gradients, moments)]
    assert [part.num_bytes for part in parts] == real
    assert sum(real) == 16 * model.num_parameters()


def test_what_is_trained_is_divided_or_buffered() -> None:
    n, s = TINY.language_model, TINY.scalar_model
    one, ddp = plan_of(), plan_of(processes=2)
    sharded = plan_of(processes=4, sharded=True)
    assert [of(one, f"policy {name}") for name in ("weights", "gradients", "AdamW moments")] == [4 * n, 4 * n, 8 * n]
    assert of(one, "value model AdamW moments") == 8 * s
    assert of(one, "policy DDP buckets") == 0
    assert (of(ddp, "policy weights"), of(ddp, "policy DDP buckets")) == (4 * n, 4 * n)
    assert [of(sharded, f"policy {name}") for name in ("weights", "gradients", "AdamW moments")] == [n, n, 2 * n]
    assert of(sharded, "value model gradients") == s
    assert (of(sharded, "policy that samples"), of(one, "policy that samples")) == (4 * n, 0)
    assert of(plan_of(value_model="shared"), "value model weights") == 0


def test_bf16_keeps_linear_weights_of_the_copy_and_of_lora_in_two_bytes() -> None:
    model = make_llama(0, hidden_size=8, intermediate_size=12, num_hidden_layers=3, tie_word_embeddings=False)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    others = model.num_parameters() - linear
    shape = replace(TINY, tied=False)
    copied = plan_of(shape, processes=2, sharded=True, precision="bf16")
    assert of(copied, "policy that samples") == 2 * linear + 4 * others
    lora = plan_of(shape, precision="bf16", lora_rank=2)
    adapters = shape.adapters(2)
    copied = replace(copied, config=replace(copied.config, lora_rank=2))
    assert of(copied, "policy that samples") == 2 * (linear + adapters) + 4 * others
    assert of(lora, "policy weights") == 2 * linear + 4 * others + 4 * adapters
    assert (of(lora, "policy gradients"), of(lora, "policy AdamW moments")) == (4 * adapters, 8 * adapters)
    assert of(plan_of(shape, lora_rank=2), "policy weights") == 4 * model.num_parameters() + 4 * adapters
    assert (of(lora, "casts of weights"), of(lora, "gradient of the head")) == (0, 0)
    full = plan_of(shape, precision="bf16")
    assert of(full, "casts of weights", "backward") == of(full, "casts of weights", "decode") == 2 * linear
    assert of(full, "casts of weights", "value backward") == 2 * (linear - 20 * 8)
    assert of(full, "casts of weights", "compare") == 2 * linear
    assert of(copied, "casts of weights", "decode") == of(copied, "casts of weights", "compare") == 0
    kept = plan_of(shape, precision="bf16", old_logprobs="sampled")
    assert (of(kept, "casts of weights", "compare"), of(kept, "casts of weights", "decode")) == (0, 2 * linear)
    assert of(plan_of(shape), "casts of weights") == 0


def test_models_that_are_read() -> None:
    n, s = TINY.language_model, TINY.scalar_model
    assert of(plan_of(reference_dtype="bfloat16"), "reference") == 2 * n
    assert of(plan_of(reference=["a", "b"]), "reference") == 4 * n
    assert of(plan_of(reference=["a", "b"], reference_kind="mixture"), "reference") == 8 * n
    assert of(plan_of(reference_kind="none"), "reference") == 0
    assert of(plan_of(reference_kind="none"), "models followed") == 4 * n
    assert of(plan_of(reference_device="cuda:1"), "reference") == 0
    offloaded = plan_of(reference_offload=True)
    assert [of(offloaded, "reference", m) for m in ("decode", "compare", "backward")] == [0, 4 * n, 0]
    assert of(plan_of(reference_offload=True, kl_in="loss", kl_estimator="k2"), "reference", "backward") == 4 * n
    assert of(plan_of(reward=["x", "module:function", "y"]), "reward models") == 8 * s
    named = plan_of(policy="a", reference=["a", "b"], track_kl=["c"])
    assert (of(named, "models followed"), of(named, "model of the table", "evaluation")) == (4 * n, 4 * n)
    assert of(named, "model of the table", "step") == 0
    assert of(plan_of(policy="a", reference=["a"], track_kl=["a"]), "model of the table", "evaluation") == 0


def test_gradients_are_there_from_their_pass_to_the_step() -> None:
    together = plan_of()
    moments = ("decode", "backward", "value backward", "step")
    n, s = 4 * TINY.language_model, 4 * TINY.scalar_model
    assert [of(together, "policy gradients", m) for m in moments] == [0, 0, n, n]
    assert [of(together, "value model gradients", m) for m in moments] == [0, 0, 0, s]
    in_parts = plan_of(micro_batch_size=2)
    assert [of(in_parts, "policy gradients", m) for m in moments] == [0, n, n, n]
    assert [of(in_parts, "value model gradients", m) for m in moments] == [0, s, s, s]
    # The head's gradient waits; the embedding's comes beside it where they are tied or where there is one already.
    embedding = 4 * 20 * 8
    found = {
        (tied, size): of(plan_of(replace(TINY, tied=tied), micro_batch_size=size), "gradient of the head", "step")
        for tied in (True, False)
        for size in (8, 2)
    }
    expected = {(True, 8): 1, (True, 2): 2, (False, 8): 0, (False, 2): 1}
    assert found == {key: number * embedding for key, number in expected.items()}
    assert of(together, "gradient of the head", "backward") == embedding


def test_fsdp_gathers_two_layers_and_what_is_outside_of_them() -> None:
    plan = plan_of(processes=2, sharded=True)
    layer, embedding = 8 * (2 * 8 + 2 * 4 + 3 * 12), 20 * 8
    assert of(plan, "layers gathered", "backward") == 4 * (3 * layer + 2 * embedding)
    untied = plan_of(replace(TINY, tied=False), processes=2, sharded=True)
    assert of(untied, "layers gathered", "backward") == 4 * (3 * layer + 4 * embedding)
    lora = plan_of(processes=2, sharded=True, lora_rank=2, precision="bf16")
    assert of(lora, "layers gathered", "backward") == 2 * 2 * layer + 4 * embedding
    assert of(plan, "layers gathered", "decode") == 0


def test_fsdp_puts_one_whole_tensor_together_at_a_time() -> None:
    settings = {"processes": 2, "sharded": True}
    moments = ("step", "copy", "save")
    assert [of(plan_of(**settings), "whole tensor", m) for m in moments] == [0, 4 * 20 * 8, 4 * 20 * 8]
    wide = replace(TINY, vocab_size=5)
    assert of(plan_of(wide, **settings), "whole tensor", "save") == 4 * 8 * 12
    assert of(plan_of(**settings, lora_rank=2), "whole tensor", "save") == 4 * 2 * 12
    assert of(plan_of(processes=2), "whole tensor") == 0


# --- memory of tokens ---


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_activations_are_what_autograd_keeps(num_kv_heads: int, precision: str) -> None:
    """A second layer adds, for each token, what the formula says."""
    tokens = torch.ones(3, 50, dtype=torch.long)

    def kept(num_layers: int) -> int:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
        model = make_llama(0, **sizes, num_key_value_heads=num_kv_heads, num_hidden_layers=num_layers)
        weights = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}  # and casts of them
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed_precision(CPU, precision):
            model.base_model(input_ids=tokens, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    shape = Shape(1, 64, 176, 4, num_kv_heads, 20)
    assert kept(2) - kept(1) == tokens.numel() * scale.layer_activations(shape, precision == "bf16")


def test_activations_by_hand() -> None:
    """A layer keeps 4 · (48 + 16 + 8 + 48 + 2 + 2) = 496 bytes a token; the last norm 64."""
    assert scale.layer_activations(TINY, False) == 496
    assert scale.layer_activations(TINY, True) == 26 * 8 + 4 * 8 + 4 * 4 + 8 * 12 + 16
    assert scale.activation_bytes(TINY, 10, False, False) == 10 * (3 * 496 + 64)
    assert scale.activation_bytes(TINY, 10, False, True) == 10 * (3 * 32 + 496 + 64)
    assert scale.working_bytes(TINY, False) == 4 * (16 + 36)
    plan = plan_of(micro_batch_size=2)  # two episodes, read to their 7th token; states of 2 · 3 tokens
    assert of(plan, "activations", "backward") == 14 * (3 * 496 + 64) + 6 * 32
    assert of(plan, "activations", "value backward") == of(plan, "activations", "backward") + 14 * 208
    assert of(plan_of(value_model="shared"), "activations", "value backward") == 0


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    """What is reachable after a forward pass: an input for each layer, and nothing inside them."""
    model = make_llama(0, num_hidden_layers=3)
    checkpoint_activations(model)
    widths: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        widths.add(tensor.shape[-1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert 16 in widths
    assert 32 not in widths  # nothing of the feed-forward's width


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_cache_takes_what_the_real_one_does(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Any] = []

    def kept(*arguments: Any) -> Any:
        caches.append(make_cache(*arguments))
        return caches[-1]

    monkeypatch.setattr("rlhf.decoding.make_cache", kept)
    model = make_llama(0, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    tokens = torch.full((5, 6), 7)
    with mixed_precision(CPU, precision):
        decoded = decode(model, tokens, torch.ones_like(tokens), torch.rand(5, 4), sampling=Sampling(), eos_token_id=-1)
    real = sum(stored.nbytes for layer in caches[0].layers for stored in layer.storage)
    shape = Shape(3, 16, 32, 4, 2, 20)
    assert scale.cache_bytes(shape, 5, 10, precision == "bf16") == real
    sizes = {"batch_size": 5, "minibatch_size": 5, "prompt_tokens": 6, "max_new_tokens": 4}
    plan = plan_of(shape, **sizes, precision=precision)
    assert of(plan, "key–value cache", "decode") == real
    assert of(plan, "hidden states", "decode") == decoded.hidden.nbytes


def test_logits_are_bounded_by_chunks() -> None:
    """On a processor 2²¹ logits at a time, 4 bytes each, unless a micro-batch has at most 2²⁴ and all are kept."""
    assert (CHUNK["cpu"], KEPT) == (2**21, 2**24)
    wide = replace(TINY, vocab_size=2**16)  # 64 positions at least: 2²² at once
    few = plan_of(wide, micro_batch_size=2, max_new_tokens=128)
    many = plan_of(wide, micro_batch_size=4, max_new_tokens=128)
    assert scale.training_logits(few) == 4 * 2**24
    assert scale.training_logits(many) == 4 * 2**22
    assert scale.training_logits(plan_of(wide, micro_batch_size=4, max_new_tokens=128, entropy_coef=0.1)) == 12 * 2**22
    in_bf16 = scale.training_logits(plan_of(wide, micro_batch_size=4, max_new_tokens=128, precision="bf16"))
    assert in_bf16 == 10 * 2**22 + 2 * 2**16 * 8
    gpu = plan_of(wide, device=DEVICES["h100"], micro_batch_size=4, max_new_tokens=2**10)
    assert scale.training_logits(gpu) == 4 * 2**26
    assert of(many, "logits", "compare") == 20 * 2**22
    assert of(gpu, "logits", "decode") == 16 * 2**16 * 16
    assert of(many, "logits", "decode") == 16 * 2**16 * 12


def test_hidden_states_stay_where_they_are_kept() -> None:
    kept, scored = plan_of(), plan_of(precision="bf16")
    states = 16 * 3 * 8 * 4
    assert [of(kept, "hidden states", m) for m in ("decode", "compare", "step")] == [states] * 3
    assert [of(scored, "hidden states", m) for m in ("decode", "compare", "step")] == [states, 0, 0]
    assert of(plan_of(precision="bf16", old_logprobs="sampled"), "hidden states", "step") == states
    # Held-out episodes are sampled up to batch_size at once, by each process.
    many = plan_of(processes=4, eval_episodes=128)
    assert of(many, "key–value cache", "evaluation rollout") == 4 * of(many, "key–value cache", "decode")


def test_the_peak_is_the_largest_sum_of_a_moment() -> None:
    parts = [Part("a", 1.0), Part("b", 2.0, ("step", "decode")), Part("c", 2.5, ("backward",)), Part("d", 9, ("step",))]
    assert [at(parts, moment) for moment in ("prefill", "decode", "backward", "step")] == [1.0, 3.0, 3.5, 12.0]
    assert peak(parts) == ("step", 12.0)
    assert peak(parts, ("decode", "backward")) == ("backward", 3.5)
    assert set(scale.ALWAYS) == {moment for moments in scale.PHASES.values() for moment in moments}
    used = {moment for part in memory(plan_of(processes=2, sharded=True)) for moment in part.moments}
    assert used == set(scale.ALWAYS)


# --- time ---


def counted(function: Callable[[], object]) -> int:
    """Operations of matrix products as torch counts them; its count of attention has no causal half."""
    with FlopCounterMode(display=False) as counter:
        function()
    return sum(number for name, number in counter.get_flop_counts()["Global"].items() if "mm" in str(name))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(checkpointing: bool) -> None:
    """Of the policy's forward pass, and of forward and backward pass; without attention, 2 · length² · q a layer."""
    model = make_llama(0, num_hidden_layers=3)
    shape = Shape(3, 16, 32, 2, 1, 20, tied=True)
    example = random_examples(0)[0]
    batch = batch_examples([replace(example, response_ids=[7, 8, 9, 2], prompt_ids=[1, 5, 6])] * 4, 0)
    policy = Policy(model)
    if checkpointing:
        checkpoint_activations(model)
    attention = 4 * 3 * 2.0 * 6**2 * 16

    def forward(batch: TokenBatch = batch) -> torch.Tensor:
        return policy(batch).logprobs

    body = forward_flops(shape, 4, 6) - attention
    assert counted(forward) == body + head_flops(shape, 16)
    # The second forward pass of a layer ends with the last tensor that was kept: down_proj, 32 · 16, is left out.
    again = body - 24 * 3 * 2.0 * 32 * 16 if checkpointing else 0.0
    assert counted(lambda: forward().sum().backward()) == 3 * body + again + 3 * head_flops(shape, 16)


def test_an_update_has_the_operations_of_the_benchmark_of_ppo() -> None:
    """Counted there one by one, with every episode read to its 80th token, and attention 3.5 times in training."""
    task = ppo_work.FULL[0]
    shape = Shape(4, 256, 704, 4, 4, 8192, tied=True)
    plan = plan_of(
        shape, batch_size=64, minibatch_size=16, micro_batch_size=8, ppo_epochs=4, prompt_tokens=32, max_new_tokens=48
    )
    found = {w.name if w.phase != "training" else f"{w.name} training": w.flops for w in update_work(plan)}
    theirs = {
        part: sum(ppo_work.flops(task, operation) * number for operation, number in operations.items())
        for part, operations in ppo_work.update_operations(task).items()
    }
    assert found["prefill"] == pytest.approx(theirs["prefill"])
    assert found["decode"] == pytest.approx(theirs["decoding"])
    assert found["reward"] == pytest.approx(theirs["reward"])
    one_token_less = forward_flops(shape, 64, 80) - forward_flops(shape, 64, 79)
    assert found["reference"] == pytest.approx(theirs["reference"] - one_token_less)
    assert found["value"] == pytest.approx(theirs["value"] - one_token_less)
    attention = 64 * 2.0 * 4 * 256 * 80**2
    of_training = 4 * (3 * one_token_less + 0.5 * attention)
    # Micro-batches of 8 · 48 positions have fewer than KEPT logits.
    assert found["policy training"] == pytest.approx(theirs["policy_training"] - of_training)
    assert found["value training"] == pytest.approx(theirs["value_training"] - of_training)


# 10 operations, 5 bytes and 2 sent bytes a second, no cost of a layer
SLOW = Device(20.0, 40.0, 5.0, 1e9, 2.0, 4.0, launch=0.0, efficiency=0.5, kind="cpu")


def test_time_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert SLOW.seconds(100, 10, False) == 10.0
    assert SLOW.seconds(100, 10, True) == 5.0
    assert SLOW.seconds(100, 100, True) == 20.0
    assert replace(SLOW, launch=0.25).seconds(100, 100, True, layers=8) == 22.0


def test_decoding_reads_weights_and_cache_at_every_step() -> None:
    """Two steps after the prompt's token, with 6 and 7 tokens in the cache: 4 bytes a weight, 4 · 2 · 3 · 4 a token."""
    fast = replace(SLOW, flops=1e12)
    plan = plan_of(device=fast)
    weights = 4 * (3 * 480 + 160)
    cache = [16 * tokens * 3 * 4 * 8 for tokens in (6, 7)]
    decode_work = scale.rollout_work(plan)[1]
    assert decode_work.seconds == pytest.approx((2 * weights + sum(cache)) / 5.0)
    assert decode_work.flops == sum(16 * (2 * 1440 + 4 * t * 3 * 8 + 2 * 160) for t in (6, 7))
    with_launch = scale.rollout_work(plan_of(device=replace(fast, launch=1.0)))
    assert with_launch[1].seconds - decode_work.seconds == pytest.approx(2 * 3)
    graph = scale.rollout_work(plan_of(device=replace(fast, launch=1.0), engine="graph"))[1]
    assert graph.seconds == pytest.approx((2 * weights + 2 * 16 * 8 * 3 * 4 * 8) / 5.0)


def names(plan: Plan, phase: str) -> dict[str, scale.Work]:
    return {work.name: work for work in update_work(plan) if work.phase == phase}


def test_scoring_reads_each_model_once() -> None:
    read, head = forward_flops(TINY, 16, 7), head_flops(TINY, 48)
    works = names(plan_of(device=SLOW), "scoring")
    assert {name: work.flops for name, work in works.items()} == {
        "reward": forward_flops(TINY, 16, 8),
        "policy": head,
        "reference": read + head,
        "value": read,
    }
    in_bf16 = names(plan_of(device=SLOW, precision="bf16"), "scoring")
    assert in_bf16["policy"].flops == read + head  # its states were not kept
    assert in_bf16["policy"].seconds == pytest.approx((read + head) / 20)
    assert in_bf16["reward"].seconds == pytest.approx(forward_flops(TINY, 16, 8) / 20)
    apart = plan_of(device=SLOW, reference=["a", "b"], reference_kind="mixture", track_kl=["c"], reward=["m:f"])
    assert names(apart, "scoring")["reference"].flops == 3 * (read + head)
    assert "reward" not in names(apart, "scoring")
    moved = names(plan_of(device=SLOW, reference_offload=True), "scoring")["reference, moving"]
    assert moved.seconds == 2 * 4 * TINY.language_model / 4.0


def test_training_by_hand() -> None:
    """Two epochs of two minibatches; 16 episodes to their 7th token."""
    n, s = TINY.language_model, TINY.scalar_model
    body, head = forward_flops(TINY, 32, 7), head_flops(TINY, 96)
    works = names(plan_of(device=SLOW), "training")
    assert works["policy"].flops == 3 * (body + head)
    assert works["policy"].seconds == pytest.approx(3 * (body + head) / 10)
    assert works["value"].flops == 3 * body
    assert works["AdamW"].seconds == 28 * 4 * (n + s) / 5.0
    assert names(plan_of(activation_checkpointing=True), "training")["policy"].flops == 4 * body + 3 * head
    lora = names(plan_of(device=SLOW, lora_rank=1), "training")
    assert lora["policy"].flops == 2 * (body + head)
    assert lora["AdamW"].seconds == 28 * 4 * 2 * TINY.adapters(1) / 5.0
    wide = replace(TINY, vocab_size=2**20)  # 8 · 3 · 2²⁰ logits are not kept
    assert names(plan_of(wide), "training")["policy"].flops == pytest.approx(3 * body + 4 * head_flops(wide, 96))
    assert "value" not in names(plan_of(value_model="shared"), "training")


def test_what_travels_between_processes() -> None:
    n = TINY.language_model
    slow_link = replace(SLOW, flops=1e15, bandwidth=1e15)
    ddp = names(plan_of(device=slow_link, processes=4), "training")
    assert ddp["policy"].seconds == 0.75 * 4 * 2 * 4 * n / 2.0  # 4 steps
    assert "copy that samples" not in ddp
    sharded = names(plan_of(device=slow_link, processes=4, sharded=True, micro_batch_size=1), "training")
    assert sharded["policy"].seconds == 0.75 * 4 * 8 * (2 * n + n) / 2.0  # 4 steps of 2 micro-batches
    assert sharded["copy that samples"].seconds == 0.75 * 4 * n / 2.0
    one = names(plan_of(device=replace(slow_link, link=1e-9)), "training")
    assert one["policy"].seconds < 1.0


# --- the command, the page, the configurations ---


def test_the_command_reads_a_folder_and_says_whether_it_fits(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--policy", str(checkpoints["first"]), "--reward", str(checkpoints["reward"]), "--prompts", "none.txt"]
    assert run_command(scale.main, flags) == 0
    told = capsys.readouterr().out
    assert "\nfits: " in told
    assert "training: value" in told
    assert Plan.of(parse_config(ScaleConfig, flags, description="")).policy == Shape(2, 16, 32, 2, 1, 20, True, 8)
    assert run_command(scale.main, ["--size", "70b", "--processes", "8", "--sharded"]) == 0
    assert "does not fit: " in capsys.readouterr().out
    other = "--size 1b --device_memory 24 --device_bandwidth 900 --device_tflops 20 --device_bf16_tflops 70"
    device = Plan.of(parse_config(ScaleConfig, other.split(), description="")).device
    assert device == replace(DEVICES["h100"], memory=24e9, bandwidth=9e11, flops=2e13, bf16_flops=7e13)
    sizes = "--num_layers 3 --hidden_size 8 --intermediate_size 12 --num_heads 2 --num_kv_heads 1 --vocab_size 20"
    assert scale.shape_of(parse_config(ScaleConfig, [*sizes.split(), "--tied"], description="")) == TINY


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharded": True}, "one process has nobody to share with"),
        ({"device": "abacus"}, "must be one of a100, h100, h200"),
        ({"size": "3b"}, "size='3b': must be one of 1b, 7b, 70b"),
        ({"processes": 0}, "processes=0: must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleConfig(**settings)
    with pytest.raises(ValueError, match="num_layers: not given; give --policy FOLDER, --size"):
        scale.shape_of(ScaleConfig(hidden_size=8))


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    page = Path(shutil.copy(PAGE, tmp_path))
    page.write_text(page.read_text().replace("| **fits** |", "| stale |"))
    scale_page.main([str(page)])
    assert page.read_text() == PAGE.read_text(), "run: python -m rlhf.scale_page docs/scale.md"
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the tables"):
        scale_page.main([str(tmp_path / "bare.md")])
    with pytest.raises(ValueError, match="give the page"):
        scale_page.main([])


def test_the_measured_tables_are_up_to_date(tmp_path: Path) -> None:
    page = Path(shutil.copy(PAGE, tmp_path))
    results = ROOT / "benchmarks" / "scale.json"
    assert benchmark.main(["table", str(results), "--into", str(page)]) == 0
    assert page.read_text() == PAGE.read_text(), (
        "run: python benchmarks/scale.py table benchmarks/scale.json --into docs/scale.md"
    )
    assert list(measuring.read_results(results)["cases"]) == list(benchmark.CASES)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = "activation checkpointing"
    output = tmp_path / "results.json"
    assert benchmark.main(["run", "--output", str(output), "--quick", "--cases", case]) == 0
    phases = measuring.read_results(output)["cases"][case]["phases"]
    assert list(phases) == ["rollout", "scoring", "training"]
    assert all(record["cpu_seconds"] > 0 for record in phases.values())
    assert benchmark.main(["table", str(output)]) == 0
    assert f"| {case}: training |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ddp", "fsdp", "multi_node"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    machines = 2 if name == "multi_node" else 1
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert config.mixed_precision == "no"  # the word, which YAML would read as false
    assert config.distributed_type == ("MULTI_GPU" if name == "ddp" else "FSDP")
    # What the launcher does not know it ignores.
    known = {action.dest for action in launch_command_parser()._actions}
    assert not config.fsdp_config.keys() - known
    if name != "ddp":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
        assert config.fsdp_config["fsdp_reshard_after_forward"] is True
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert f"--config_file recipes/accelerate/{name}.yaml" in path.read_text()
    assert f"--config_file recipes/accelerate/{name}.yaml" in PAGE.read_text()

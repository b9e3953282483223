"""The policy's training forward: outputs, the value head on its trunk, recomputed activations, bfloat16 products."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import PAD, random_examples
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf import kl
from rlhf.data import batch_examples
from rlhf.models import load_causal_lm, load_scalar_head_model
from rlhf.policy import Policy, PolicyOutput, ValueModel, checkpoint_activations, mixed_precision

EXAMPLES = random_examples(seed=0)
BATCH = batch_examples(EXAMPLES, PAD)
MASK = BATCH.response_mask
ARCHITECTURES = pytest.mark.parametrize("name", ["first", "gpt2"])


class Uniform(NamedTuple):
    """The same distribution everywhere."""

    size: int

    def rows(self, rows: slice) -> Tensor:
        return torch.full((len(range(*rows.indices(int(MASK.sum())))), self.size), 1 / self.size).log()


def total(output: PolicyOutput) -> Tensor:
    """A sum of everything with different weights, so that nothing cancels."""
    weights = torch.linspace(-1, 1, MASK.numel()).view(MASK.shape)
    return sum(((weights + i) * x).sum() for i, x in enumerate(output) if x is not None)  # type: ignore[return-value]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@ARCHITECTURES
def test_outputs_are_those_of_each_row_alone(checkpoints: dict[str, Path], name: str) -> None:
    policy = Policy(load_causal_lm(checkpoints[name]))
    output = policy(BATCH, 0.7, entropy=True, references=[(2.0, Uniform(20))])
    assert output.values is None
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
    for i, example in enumerate(EXAMPLES):
        logits = model(torch.tensor([example.token_ids])).logits[0, len(example.prompt_ids) - 1 : -1]
        log_p = (logits.detach() / 0.7).log_softmax(-1)
        length = len(example.response_ids)
        expected = log_p.gather(1, torch.tensor(example.response_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(output.logprobs[i, :length], expected, atol=1e-5, rtol=1e-5)
        entropy = kl.entropy(log_p)
        torch.testing.assert_close(output.entropy[i, :length], entropy, atol=1e-5, rtol=1e-5)
        # KL to the uniform distribution is log V − H
        to_uniform = 2.0 * (torch.tensor(20.0).log() - entropy)
        torch.testing.assert_close(output.kl[i, :length], to_uniform, atol=2e-5, rtol=1e-5)
    for values in output[:3]:
        assert values.shape == MASK.shape
        assert values[~MASK].abs().sum() == 0
    bare = policy(BATCH)
    assert (bare.entropy, bare.kl, bare.values) == (None, None, None)


@ARCHITECTURES
def test_a_value_head_starts_at_zero_and_reads_the_states_that_predict(checkpoints: dict[str, Path], name: str) -> None:
    policy = Policy(load_causal_lm(checkpoints[name]), value_head=True)
    assert policy(BATCH).values.abs().max() == 0
    assert policy.value_head is not None
    nn.init.normal_(policy.value_head.weight)
    values = policy(BATCH).values
    assert values.dtype == torch.float32
    for i, example in enumerate(EXAMPLES):
        hidden = policy.model.base_model(torch.tensor([example.token_ids])).last_hidden_state[0]
        expected = (hidden @ policy.value_head.weight[0])[len(example.prompt_ids) - 1 : -1]
        torch.testing.assert_close(values[i, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert values[~MASK].abs().sum() == 0


def test_the_value_loss_reaches_the_trunk_and_not_the_language_models_head(checkpoints: dict[str, Path]) -> None:
    policy = Policy(load_causal_lm(checkpoints["wider"]), value_head=True)
    policy(BATCH).values.sum().backward()
    at_zero = gradients(policy)
    assert at_zero["value_head.weight"].abs().sum() > 0
    assert all(g.abs().sum() == 0 for name, g in at_zero.items() if name != "value_head.weight")

    assert policy.value_head is not None
    nn.init.normal_(policy.value_head.weight)
    policy(BATCH).values.sum().backward()
    moved = {name for name, g in gradients(policy).items() if g.abs().sum() > 0}
    assert {f"model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} <= moved
    # tied here: its rows of tokens that are read get a gradient as embeddings, no other row does
    policy(BATCH).values.sum().backward()
    embedding = gradients(policy)["model.model.embed_tokens.weight"]
    read = BATCH.tokens[:, :-1][BATCH.attention_mask[:, :-1]].unique()
    unread = torch.tensor([token for token in range(20) if token not in read])
    assert len(unread) > 0
    assert embedding[unread].abs().sum() == 0


def test_a_value_model_of_its_own_shares_nothing_with_the_policy(checkpoints: dict[str, Path]) -> None:
    scalar = load_scalar_head_model(checkpoints["reward"])
    values = ValueModel(scalar)(BATCH)
    for i, example in enumerate(EXAMPLES):
        everywhere = scalar(torch.tensor([example.token_ids]), torch.ones(1, len(example.token_ids), dtype=torch.bool))
        expected = everywhere[0, len(example.prompt_ids) - 1 : -1]
        torch.testing.assert_close(values[i, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert values[~MASK].abs().sum() == 0
    state = {name: p for name, p in scalar.named_parameters() if "layers" in name}
    values.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in state.items() if "q_proj" in name)


def test_a_policy_refuses_a_model_without_a_linear_head(checkpoints: dict[str, Path]) -> None:
    model = load_causal_lm(checkpoints["first"])
    model.lm_head = nn.Sequential(nn.Linear(16, 20), nn.Tanh())
    with pytest.raises(ValueError, match="first: the logits of LlamaForCausalLM"):
        Policy(model)


class Calls:
    """Counts the forward calls of a model's attention layers."""

    def __init__(self, model: nn.Module) -> None:
        self.num = 0
        self.layers = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attn")]
        for layer in self.layers:
            layer.register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, args: object) -> None:
        self.num += 1


@ARCHITECTURES
def test_checkpointed_activations_are_computed_again_to_the_same_gradients(
    checkpoints: dict[str, Path], name: str
) -> None:
    results = []
    for checkpointing in (False, True):
        policy = Policy(load_causal_lm(checkpoints[name]), value_head=True)
        assert policy.value_head is not None
        nn.init.ones_(policy.value_head.weight)
        if checkpointing:
            checkpoint_activations(policy.model)
        calls = Calls(policy.model)
        output = policy(BATCH, 0.7, entropy=True, references=[(1.0, Uniform(20))])
        assert calls.num == len(calls.layers) == 2
        total(output).backward()
        assert calls.num == (2 + checkpointing * 2)
        results.append((output, gradients(policy)))
    (plain, expected), (checkpointed, found) = results
    for before, after in zip(plain, checkpointed, strict=True):
        assert torch.equal(before, after)
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter


@ARCHITECTURES
def test_bfloat16_products_give_float32_outputs_and_gradients_near_the_float32_ones(
    checkpoints: dict[str, Path], name: str
) -> None:
    policy = Policy(load_causal_lm(checkpoints[name]), value_head=True)
    assert policy.value_head is not None
    nn.init.constant_(policy.value_head.weight, 0.1)
    results = []
    for precision in ("float32", "bf16"):
        with mixed_precision(torch.device("cpu"), precision):
            output = policy(BATCH, entropy=True, references=[(1.0, Uniform(20))])
        assert {values.dtype for values in output} == {torch.float32}
        total(output).backward()
        results.append((output, gradients(policy)))
    (exactly, gradient), (roughly, rough_gradient) = results
    for left, right in zip(exactly, roughly, strict=True):
        assert not torch.equal(left, right)
        torch.testing.assert_close(left, right, atol=0.15, rtol=0.05)
    flat, rough = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradient, rough_gradient))
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(flat, rough, dim=0) > 0.99

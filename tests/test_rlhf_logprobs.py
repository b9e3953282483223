"""Log-probabilities with a gradient of their own, against plain autograd in float64; bodies and heads of many makes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import EOS, PAD, WORDS, make_gpt2, make_llama, pad_more, random_examples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from rlhf import logprobs
from rlhf.data import TokenBatch, batch_examples, by_length
from rlhf.logprobs import (
    Head,
    TokenStatistics,
    chunks,
    head_of,
    hidden_states,
    log_distribution,
    model_distributions,
    position_ids,
    require_split,
    token_statistics,
    unpack,
)

NUM, SIZE, WIDTH = 11, 23, 5  # tokens, vocabulary, hidden states
EXAMPLES = random_examples(seed=0)
ARCHITECTURES = pytest.mark.parametrize("name", ["first", "gpt2"])  # rotary positions, and absolute ones


class Given(NamedTuple):
    """Distributions that are simply there."""

    log_distributions: Tensor

    def rows(self, rows: slice) -> Tensor:
        return self.log_distributions[rows].float()


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    tokens: Tensor
    references: list[Tensor]
    upstream: Tensor  # gradients of the three results


def inputs(num: int = NUM, size: int = SIZE) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(size, (num,), generator=generator)
    references = [(2 * normal(num, size)).log_softmax(-1) for _ in range(3)]
    return Inputs(normal(num, WIDTH), normal(size, WIDTH), normal(size), tokens, references, normal(3, num))


def in_float64(given: Inputs, settings: dict[str, Any], weights: list[float], bias: bool) -> list[Tensor]:
    """The three results and the gradients of hidden states, weight and bias, by autograd on a block of logits."""
    leaves = [tensor.double().requires_grad_() for tensor in (given.hidden, given.weight, given.bias)]
    hidden, weight, b = leaves
    logits = (hidden @ weight.T + (b if bias else 0.0 * b)) * settings.get("scale", 1.0)
    if "cap" in settings:
        logits = settings["cap"] * torch.tanh(logits / settings["cap"])
    log_p = torch.log_softmax(logits / settings.get("temperature", 1.0), dim=-1)
    kl = sum(
        (w * (log_p.exp() * (log_p - q.double())).sum(-1) for w, q in zip(weights, given.references, strict=False)),
        start=torch.zeros(len(hidden)).double(),
    )
    results = [log_p[torch.arange(len(hidden)), given.tokens], -(log_p.exp() * log_p).sum(-1), kl]
    upstream = given.upstream.double()
    sum((a * result).sum() for a, result in zip(upstream, results, strict=True)).backward()  # type: ignore[union-attr]
    return [result.detach() for result in results] + [leaf.grad for leaf in leaves]


class Attempt(NamedTuple):
    statistics: TokenStatistics
    loss: Tensor
    leaves: list[Tensor]

    def gradients(self) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.grad = None
        self.loss.backward(retain_graph=True)
        return [leaf.grad for leaf in self.leaves]  # type: ignore[misc]


def attempt(
    given: Inputs, settings: dict[str, Any], weights: list[float], bias: bool = True, entropy: bool = True
) -> Attempt:
    leaves = [tensor.clone().requires_grad_() for tensor in (given.hidden, given.weight, given.bias)][: 2 + bias]
    head = Head(leaves[1], leaves[2] if bias else None, **settings)
    references = [(w, Given(q)) for w, q in zip(weights, given.references, strict=False)]
    statistics = token_statistics(leaves[0], head, given.tokens, entropy=entropy, references=references)
    terms = [(a * x).sum() for a, x in zip(given.upstream, statistics, strict=True) if x is not None]
    return Attempt(statistics, torch.stack(terms).sum(), leaves)


@pytest.fixture(params=["whole", "in chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven rows at once, or four, four and three."""
    if request.param == "in chunks":
        monkeypatch.setattr(logprobs, "MIN_ROWS", 1)
        monkeypatch.setitem(logprobs.CHUNK, "cpu", 4 * SIZE + SIZE - 1)


# ── The gradient ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("weights", [[], [1.0], [0.3, 1.5, 0.2]], ids=["no reference", "one", "three"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"scale": 0.4, "temperature": 1.7}, {"scale": 1.3, "cap": 2.0, "temperature": 0.8}],
    ids=["plain", "temperature", "scale", "cap"],
)
def test_results_and_gradients_are_those_of_autograd_in_float64(
    monkeypatch: pytest.MonkeyPatch, chunked: None, settings: dict[str, Any], weights: list[float], kept: bool
) -> None:
    if not kept:
        monkeypatch.setattr(logprobs, "KEPT", 0)
    given = inputs()
    for bias in (True, False):
        expected = in_float64(given, settings, weights, bias)
        found = attempt(given, settings, weights, bias)
        for name, value, oracle in zip(TokenStatistics._fields, found.statistics, expected, strict=False):
            if value is None:
                assert (name, weights) == ("kl", [])
            else:
                torch.testing.assert_close(value.double(), oracle, atol=1e-5, rtol=1e-5, msg=name)
        first, second = found.gradients(), found.gradients()  # the second pass finds nothing kept
        for gradient, again, oracle in zip(first, second, expected[3:], strict=False):
            torch.testing.assert_close(gradient.double(), oracle, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(again, gradient, atol=1e-6, rtol=1e-6)


def test_what_is_not_asked_for_is_not_there_and_changes_no_gradient() -> None:
    given = inputs()._replace(upstream=torch.stack([torch.ones(NUM), torch.zeros(NUM), torch.zeros(NUM)]))
    everything, bare = attempt(given, {}, [1.0]), attempt(given, {}, [], entropy=False)
    assert bare.statistics.entropy is None
    assert bare.statistics.kl is None
    assert torch.equal(bare.statistics.logprobs, everything.statistics.logprobs)
    for with_zeros, without in zip(everything.gradients(), bare.gradients(), strict=True):
        torch.testing.assert_close(with_zeros, without)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same_one() -> None:
    given = inputs()
    free = attempt(given, {}, [1.0])
    hidden = given.hidden.clone().requires_grad_()
    frozen = Head(given.weight, given.bias)
    statistics = token_statistics(
        hidden, frozen, given.tokens, entropy=True, references=[(1.0, Given(given.references[0]))]
    )
    torch.stack(
        [(a * x).sum() for a, x in zip(given.upstream, statistics, strict=True) if x is not None]
    ).sum().backward()
    assert torch.equal(hidden.grad, free.gradients()[0])  # type: ignore[arg-type]
    assert (given.weight.grad, given.bias.grad) == (None, None)


def test_a_head_can_be_trained_on_frozen_hidden_states() -> None:
    given = inputs()
    weight = given.weight.clone().requires_grad_()
    token_statistics(given.hidden, Head(weight), given.tokens).logprobs.sum().backward()
    p = (given.hidden @ given.weight.T).softmax(-1)
    expected = (nn.functional.one_hot(given.tokens, SIZE) - p).T @ given.hidden
    torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-5)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    given = inputs()
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (given.hidden, given.weight))
    total = token_statistics(hidden, Head(weight), given.tokens).logprobs.sum()
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.square().sum().backward()


def test_no_tokens_at_all() -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    weight = torch.ones(SIZE, WIDTH, requires_grad=True)
    statistics = token_statistics(hidden, Head(weight), torch.zeros(0, dtype=torch.long), entropy=True)
    assert statistics.logprobs.shape == (0,)
    statistics.logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.num = max(self.num, tensor.numel())
        return result


def floats_of_width(size: int) -> int:
    """Elements of all tensors alive whose last dimension has this size."""
    alive = [x for x in gc.get_objects() if type(x) is Tensor and x.dim() == 2 and x.shape[-1] == size]
    return sum(tensor.numel() for tensor in alive)


@pytest.mark.parametrize("fits", [True, False])
def test_no_block_of_logits_is_made_or_kept(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    num, size, rows = 60, 101, 4
    given = inputs(num, size)
    references = [(0.5, Given(reference)) for reference in given.references[:2]]
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (given.hidden, given.weight))
    monkeypatch.setattr(logprobs, "MIN_ROWS", 1)
    monkeypatch.setitem(logprobs.CHUNK, "cpu", rows * size)
    monkeypatch.setattr(logprobs, "KEPT", num * size if fits else num * size - 1)
    before = floats_of_width(size)
    with Largest() as largest:
        statistics = token_statistics(hidden, Head(weight), given.tokens, entropy=True, references=references)
        kept = floats_of_width(size) - before
        sum(x.sum() for x in statistics if x is not None).backward()  # type: ignore[union-attr]
    assert kept == (num * size if fits else 0)
    assert largest.num <= 2 * rows * size  # one chunk for each of the two references
    assert floats_of_width(size) == before


def test_chunks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "MIN_ROWS", 3)
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 50)
    cpu = torch.device("cpu")
    assert [(part.start, part.stop) for part in chunks(12, 10, cpu)] == [(0, 5), (5, 10), (10, 15)]
    assert [(part.start, part.stop) for part in chunks(6, 40, cpu)] == [(0, 3), (3, 6)]  # at least MIN_ROWS
    assert list(chunks(0, 10, cpu)) == []


# ── Body and head ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_position_ids_by_hand() -> None:
    mask = torch.tensor([[False, False, True, True, False], [True, True, True, True, True]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 3, 4]]


def test_unpack_by_hand() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    packed = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    values = unpack(packed, mask)
    assert values.tolist() == [[1, 0, 2], [0, 0, 3]]
    (values * torch.tensor([[10.0, 20, 30], [40, 50, 60]])).sum().backward()
    assert packed.grad is not None
    assert packed.grad.tolist() == [10, 30, 60]
    assert torch.equal(unpack(values.detach()[mask], mask), values.detach())


def test_log_distribution_is_log_softmax_written_in_place() -> None:
    logits = 40 * torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(-1)
    assert log_distribution(logits) is logits
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-6)


@ARCHITECTURES
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 4), (3, 7)])
@pytest.mark.parametrize("pad_token_id", [PAD, EOS])
def test_body_and_head_give_the_logits_of_each_row_alone(
    checkpoints: dict[str, Path], name: str, left: int, right: int, pad_token_id: int
) -> None:
    """In transformers' own words, without padding, masks or positions."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
    batch = pad_more(batch_examples(EXAMPLES, pad_token_id), left, right)
    logits = [model(torch.tensor([e.token_ids])).logits[0, len(e.prompt_ids) - 1 : -1] for e in EXAMPLES]
    expected = torch.cat(logits).detach()
    hidden = hidden_states(model, batch)
    torch.testing.assert_close(head_of(model).logits(hidden), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model_distributions(model, batch, 0.7).rows(slice(2, 9)), (expected / 0.7).log_softmax(-1)[2:9],
        atol=2e-5, rtol=1e-5,
    )  # fmt: skip


TINY = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2_with_bias() -> PreTrainedModel:
    model = make_gpt2(0)
    model.lm_head = nn.Linear(16, len(WORDS))
    nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: make_llama(0), (1.0, None)),
        (lambda: make_gpt2(0), (1.0, None)),
        (gpt2_with_bias, (1.0, None)),
        (lambda: CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25)), (0.25, None)),
        (lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)), (0.125, None)),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0)), (1.0, 2.0)),
    ],
    ids=["llama", "gpt2", "bias", "cohere", "granite", "gemma2"],
)
def test_heads_of_many_makes_give_their_models_logits(
    make: Callable[[], PreTrainedModel], expected: tuple[float, float | None]
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    require_split(model)
    head = head_of(model, temperature=0.5)
    assert (head.scale, head.cap) == expected
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = model(tokens).logits.detach()
    assert logits.std() > 0.2  # far from nothing, and from all at the cap
    hidden = model.base_model(tokens).last_hidden_state.detach()
    torch.testing.assert_close(head.logits(hidden[0]), logits[0] / 0.5, atol=1e-5, rtol=1e-5)


def squared(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose logits are something else than a head on its last hidden state."""
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = changed  # type: ignore[method-assign]
    return model


def deep_head(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, len(WORDS)))
    return model


@pytest.mark.parametrize("spoil", [squared, deep_head])
def test_models_whose_logits_are_something_else_are_refused(
    spoil: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    model = spoil(make_llama(0))
    model.name_or_path = "odd-one"
    with pytest.raises(
        ValueError, match=r"^odd-one: the logits of LlamaForCausalLM are no linear function.*; use a"
    ) as e:
        require_split(model)
    assert "\n" not in str(e.value)


def test_a_scale_that_the_config_does_not_tell_is_refused() -> None:
    model = make_llama(0)
    model.config.logit_scale = 1.01  # Llama's forward knows nothing of it
    with pytest.raises(ValueError, match="no linear function"):
        require_split(model)


def test_bfloat16_models_give_float32_distributions(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["first"], dtype=torch.bfloat16).eval()
    rows = model_distributions(model, batch_examples(EXAMPLES, PAD)).rows(slice(None))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(rows)))


# ── Batches in parts ──────────────────────────────────────────────────────────────────────────────────────────────────


def batch_of_lengths(*lengths: int) -> TokenBatch:
    attention_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TokenBatch(attention_mask.long(), attention_mask, attention_mask[:, 1:])


def test_parts_of_like_length_by_hand() -> None:
    batch = batch_of_lengths(3, 7, 5, 7, 2)
    assert [part.tolist() for part in by_length(batch, 2)] == [[1, 3], [2, 0], [4]]  # longest first, ties in order
    assert [part.tolist() for part in by_length(batch, 3)] == [[1, 3, 2], [0, 4]]
    assert [part.tolist() for part in by_length(batch, None)] == [[1, 3, 2, 0, 4]]


def test_a_batch_moves_as_a_whole() -> None:
    batch = batch_of_lengths(3, 7)
    moved = batch.to(torch.device("meta"))
    assert {moved.tokens.device.type, moved.attention_mask.device.type, moved.response_mask.device.type} == {"meta"}
    assert moved.response_mask.shape == batch.response_mask.shape

"""The decode loop: against the framework's own decoding, with ends, drops and padding that must not matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BOS, EOS, PAD, WORDS, pad_more
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from rlhf import decoding, graph_decoding
from rlhf.data import TokenBatch, pad_left
from rlhf.decoding import Decoded, PreallocatedLayer, Sampling, cache_argument, decode, sample_tokens
from rlhf.graph_decoding import decode_by_graph
from rlhf.logprobs import head_of

PROMPTS = [[BOS, *(WORDS.index(letter) for letter in text)] for text in ("abc", "d", "efghi", "jk", "", "lmnabcd")] * 3
LONGEST = 12
NEVER = -1  # no token has this id
JUST_BELOW_ONE = 1 - 2**-24  # the largest float32 that torch.rand can return


@pytest.fixture(scope="module", params=["first", "gpt2"])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoints[request.param]).eval()


def run(
    model: PreTrainedModel, *, left: int = 0, eos_token_id: int = EOS, decode: Any = decode, **sampling: Any
) -> Decoded:
    """Responses to the prompts, with ``left`` more columns of padding; always the same uniforms."""
    tokens, mask = pad_left(PROMPTS, PAD)
    padded = pad_more(TokenBatch(tokens, mask, torch.zeros(len(mask), 0, dtype=torch.bool)), left, 0)
    uniforms = torch.rand(len(PROMPTS), LONGEST, generator=torch.Generator().manual_seed(0))
    settings = Sampling(**sampling)
    return decode(model, padded.tokens, padded.attention_mask, uniforms, sampling=settings, eos_token_id=eos_token_id)


def lengths(tokens: Tensor, eos_token_id: int) -> list[int]:
    """Tokens of each row up to its first end, which counts."""
    rows = tokens.tolist()
    return [row.index(eos_token_id) + 1 if eos_token_id in row else len(row) for row in rows]


def common_end(tokens: Tensor) -> int:
    """A token whose first places in the rows vary most: rows end early and late, and some never."""
    return max(range(len(WORDS)), key=lambda token: (len(set(lengths(tokens, token))), -token))


# ── Ends and drops ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def batch_sizes(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many rows the body is given, step by step."""
    sizes: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield sizes
    handle.remove()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.125, 1.0])
def test_rows_that_end_are_as_those_that_do_not_up_to_there(
    model: PreTrainedModel,
    batch_sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    sampling: dict[str, float],
) -> None:
    """Ended rows leave the batch at once, in groups or never: the others go on as if nothing had happened."""
    endless = run(model, eos_token_id=NEVER, **sampling)
    assert endless.tokens.shape == (len(PROMPTS), LONGEST)
    end = common_end(endless.tokens)
    expected = lengths(endless.tokens, end)
    assert len(set(expected)) > 2

    batch_sizes.clear()
    monkeypatch.setattr(decoding, "DROP_SHARE", share)
    decoded = run(model, eos_token_id=end, **sampling)
    assert lengths(decoded.tokens, end) == expected
    for row, length in enumerate(expected):
        for name, atol in (("tokens", 0.0), ("logprobs", 1e-5), ("hidden", 1e-5)):
            ours, theirs = (getattr(result, name)[row, :length] for result in (decoded, endless))
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=atol)

    alive = [sum(length > step for length in expected) for step in range(max(expected))]
    if share == 0.0:
        assert batch_sizes == alive
    elif share == 1.0:
        assert batch_sizes == [len(PROMPTS)] * max(expected)
    else:
        assert all(rows >= needed >= rows * (1 - share) for rows, needed in zip(batch_sizes, alive, strict=True))
        assert len(set(batch_sizes)) > 1


def test_decoding_stops_once_all_have_ended(model: PreTrainedModel) -> None:
    first = run(model, eos_token_id=NEVER, temperature=0.0).tokens[:1, 0].item()
    tokens, mask = pad_left(PROMPTS[:1], PAD)
    decoded = decode(
        model, tokens, mask, torch.zeros(1, LONGEST), sampling=Sampling(temperature=0.0), eos_token_id=int(first)
    )
    assert decoded.tokens.tolist() == [[first]]
    assert decoded.hidden.shape[:2] == decoded.logprobs.shape == (1, 1)


@pytest.mark.parametrize("left", [1, 6])
def test_padding_changes_nothing(model: PreTrainedModel, left: int) -> None:
    """Random tokens stand in the padding."""
    plain, padded = run(model), run(model, left=left)
    assert torch.equal(padded.tokens, plain.tokens)
    torch.testing.assert_close(padded.logprobs, plain.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("looks", [1, 3, 100])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}], ids=str
)
def test_a_step_of_fixed_shapes_decodes_the_same(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, looks: int, sampling: dict[str, float]
) -> None:
    """What a GPU replays, step by step here: rows that end at once, early, late and never, with padding and without."""
    monkeypatch.setattr(graph_decoding, "STEPS_BETWEEN_LOOKS", looks)
    for end in (NEVER, common_end(run(model, eos_token_id=NEVER, **sampling).tokens)):
        expected = run(model, eos_token_id=end, **sampling)
        decoded = run(model, eos_token_id=end, decode=decode_by_graph, left=2, **sampling)
        row_lengths = lengths(expected.tokens, end)
        assert lengths(decoded.tokens, end) == row_lengths
        assert decoded.tokens.shape == (len(PROMPTS), max(row_lengths))
        for row, length in enumerate(row_lengths):
            for name, atol in (("tokens", 0.0), ("logprobs", 1e-5), ("hidden", 1e-5)):
                ours, theirs = (getattr(result, name)[row, :length] for result in (decoded, expected))
                torch.testing.assert_close(ours, theirs, atol=atol, rtol=atol)


def test_a_step_in_bf16_rounds_the_prompt_s_copies_of_weights_and_no_more(checkpoints: dict[str, Path]) -> None:
    """The copies that autocast keeps are made with the prompt, so that no replay has to make them again."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints["first"]).eval()
    weights = {tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) in weights:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    tokens, mask = pad_left(PROMPTS, PAD)
    casts: list[Any] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts():
        step = graph_decoding.Step(model, tokens, mask, torch.rand(len(PROMPTS), LONGEST), Sampling())
        assert casts
        casts.clear()
        step()
    assert casts == []


def test_a_step_stands_where_it_stood_once_its_place_is_put_back(checkpoints: dict[str, Path]) -> None:
    """As before a graph is captured, whose warm-up takes steps that must leave nothing behind."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints["first"]).eval()
    tokens, mask = pad_left(PROMPTS, PAD)
    uniforms = torch.rand(len(PROMPTS), LONGEST, generator=torch.Generator().manual_seed(0))
    plain, disturbed = (graph_decoding.Step(model, tokens, mask, uniforms, Sampling()) for _ in range(2))
    for index in range(LONGEST - 1):
        plain()
        before = [tensor.clone() for tensor in disturbed.place]
        for _ in range(2 if index < LONGEST - 2 else 0):
            disturbed()
            for tensor, value in zip(disturbed.place, before, strict=True):
                tensor.copy_(value)
        disturbed()
    for name in ("sampled", "logprobs", "states"):
        assert torch.equal(getattr(disturbed, name), getattr(plain, name)), name


def test_a_step_of_fixed_shapes_refuses_layers_that_see_a_window() -> None:
    config = Gemma2Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="engine=graph: Gemma2ForCausalLM has layers whose cache is no plain one"):
        run(Gemma2ForCausalLM(config).eval(), decode=decode_by_graph)


# ── What is sampled ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", [NEVER, "common"])
def test_greedy_decoding_is_the_frameworks(model: PreTrainedModel, end: Any) -> None:
    if end == "common":
        end = common_end(run(model, eos_token_id=NEVER, temperature=0.0).tokens)
    decoded = run(model, eos_token_id=end, temperature=0.0)
    row_lengths = lengths(decoded.tokens, end)
    for i, prompt in enumerate(PROMPTS[:6]):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LONGEST,
            eos_token_id=None if end == NEVER else end,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_logits=True,
        )
        response = output.sequences[0, len(prompt) :]
        assert decoded.tokens[i, : row_lengths[i]].tolist() == response.tolist()
        logprobs = torch.cat(output.logits).log_softmax(-1).gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(decoded.logprobs[i, : len(response)], logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 5, "top_p": 0.8}],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_sampled_from(
    model: PreTrainedModel, sampling: dict[str, float]
) -> None:
    """Against whole forwards of each row alone, and a numpy version of the cuts."""
    decoded = run(model, eos_token_id=NEVER, **sampling)
    for i, prompt in enumerate(PROMPTS[:6]):
        ids = torch.tensor([prompt + decoded.tokens[i].tolist()])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].detach().double().numpy()
        for t, token in enumerate(decoded.tokens[i].tolist()):
            probability = cut_in_numpy(logits[t] / sampling.get("temperature", 1.0), sampling)[token]
            assert decoded.logprobs[i, t].item() == pytest.approx(np.log(probability), abs=2e-5)


def test_hidden_states_are_those_that_predicted_the_tokens(model: PreTrainedModel) -> None:
    decoded = run(model, temperature=0.6, eos_token_id=NEVER)
    log_p = head_of(model, 0.6).logits(decoded.hidden.flatten(0, 1)).log_softmax(-1)
    expected = log_p.gather(1, decoded.tokens.flatten()[:, None]).view_as(decoded.logprobs)
    torch.testing.assert_close(decoded.logprobs, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_models_with_sliding_windows_and_soft_caps_decode_as_in_the_framework(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Gemma 2: every other layer sees three tokens only, and keeps a cache of its own kind."""
    monkeypatch.setattr(decoding, "DROP_SHARE", share)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=3, final_logit_softcapping=2.0, initializer_range=0.5,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    end = common_end(run(model, eos_token_id=NEVER, temperature=0.0).tokens)
    decoded = run(model, eos_token_id=end, temperature=0.0)
    for i, prompt in enumerate(PROMPTS[:6]):
        response: list[int] = []
        while len(response) < LONGEST and end not in response:
            response.append(int(model(torch.tensor([prompt + response]), use_cache=False).logits[0, -1].argmax()))
        assert decoded.tokens[i, : len(response)].tolist() == response


def test_a_cache_layer_with_room_grows_and_loses_rows_as_a_concatenation_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, num: int) -> tuple[Tensor, Tensor]:
        keys, values = torch.randn(2, rows, 2, num, 4, generator=generator)
        return keys, values

    layer = PreallocatedLayer(7)
    first, second, third = states(3, 4), states(3, 1), states(2, 2)
    assert all(torch.equal(*pair) for pair in zip(layer.update(*first), first, strict=True))
    grown = [torch.cat(pair, dim=2) for pair in zip(first, second, strict=True)]
    assert all(torch.equal(*pair) for pair in zip(layer.update(*second), grown, strict=True))
    assert layer.get_seq_length() == 5
    layer.batch_select_indices(torch.tensor([2, 0]))
    fewer = [torch.cat([old[[2, 0]], new], dim=2) for old, new in zip(grown, third, strict=True)]
    assert all(torch.equal(*pair) for pair in zip(layer.update(*third), fewer, strict=True))
    assert layer.get_seq_length() == 7


# ── Cuts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_in_numpy(logits: np.ndarray, sampling: dict[str, float]) -> np.ndarray:
    """The probabilities of one position after top-k and then top-p, token by token from the likeliest."""
    p = np.exp(logits - logits.max())
    kept = sorted(range(len(p)), key=lambda v: -p[v])[: int(sampling.get("top_k", 0)) or None]
    total, mass, nucleus = sum(p[v] for v in kept), 0.0, []
    for v in kept:
        nucleus.append(v)
        mass += p[v] / total
        if mass >= sampling.get("top_p", 1.0):
            break
    cut = np.zeros_like(p)
    cut[nucleus] = p[nucleus] / p[nucleus].sum()
    return cut


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        # of 1/8, 1/2, 1/8, 1/4
        (0, 1.0, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (1, 1.0, [0, 1, 0, 0]),
        (2, 1.0, [0, 2 / 3, 0, 1 / 3]),
        (3, 1.0, [1 / 7, 4 / 7, 0, 2 / 7]),  # the first of two that are equally likely
        (9, 1.0, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (0, 0.01, [0, 1, 0, 0]),  # never nothing at all
        (0, 0.5, [0, 1, 0, 0]),  # exactly reached
        (0, 0.51, [0, 2 / 3, 0, 1 / 3]),
        (0, 0.75, [0, 2 / 3, 0, 1 / 3]),
        (0, 0.8, [1 / 7, 4 / 7, 0, 2 / 7]),
        (0, 0.9, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (2, 0.6, [0, 1, 0, 0]),  # of the mass that top_k leaves, 2/3 suffice
        (2, 0.7, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_cuts_by_hand(top_k: int, top_p: float, expected: list[float]) -> None:
    log_p = torch.tensor([[1 / 8, 1 / 2, 1 / 8, 1 / 4]]).log()
    cut = Sampling(top_k=top_k, top_p=top_p).cut(log_p.clone())
    assert cut.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert (cut == -torch.inf)[0].tolist() == [p == 0 for p in expected]


@pytest.mark.parametrize("top_k", [0, 1, 4, 17])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 1.0])
def test_cuts_agree_with_numpy_row_by_row(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(50, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Sampling(top_k=top_k, top_p=top_p).cut(logits.log_softmax(-1)).exp()
    for row, cut in zip(logits.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(cut, cut_in_numpy(row, {"top_k": top_k, "top_p": top_p}), atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be finite and not negative"),
        ({"temperature": float("nan")}, "temperature=nan: must be finite"),
        ({"temperature": float("inf")}, "temperature=inf: must be finite"),
        ({"top_k": -1}, r"top_k=-1: must be 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01: must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p=nan: must be above 0"),
    ],
)
def test_settings_that_make_no_distribution_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**settings)  # type: ignore[arg-type]


# ── Sampling a token ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_temperature_zero_takes_the_likeliest_and_leaves_the_distribution() -> None:
    log_p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]).log()
    cold = Sampling(temperature=0.0)
    assert cold.draw(log_p, torch.tensor([0.99, 0.99])).tolist() == [1, 0]
    assert cold.scale == 1.0
    assert Sampling(temperature=0.5).scale == 0.5
    assert Sampling().draw(log_p, torch.tensor([0.99, 0.99])).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("uniform", "token"),
    [
        # cumulative probabilities: 0, ¼, ¼, ¾, 1, 1
        (0.0, 1),
        (0.1, 1),
        (0.2499, 1),
        (0.25, 3),  # a token's interval holds its lower end, not its upper
        (0.5, 3),
        (0.7499, 3),
        (0.75, 4),
        (0.99, 4),
        (JUST_BELOW_ONE, 4),
    ],
)
def test_inverse_cdf_by_hand(uniform: float, token: int) -> None:
    log_distributions = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    assert sample_tokens(log_distributions, torch.tensor([uniform])).tolist() == [token]


def test_each_row_uses_its_own_distribution_and_uniform() -> None:
    log_distributions = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]).log()
    assert sample_tokens(log_distributions, torch.tensor([0.6, 0.4, 0.0])).tolist() == [1, 1, 2]


def test_impossible_tokens_are_never_drawn_whatever_the_rounding() -> None:
    """Zero probabilities at both ends and in between, cumulative sums that do not end at exactly 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 1000, generator=generator)
    impossible = torch.rand(200, 1000, generator=generator) < 0.5
    impossible[:, [0, -1]] = True
    log_distributions = logits.masked_fill(impossible, -torch.inf).log_softmax(-1)
    for uniforms in (torch.zeros(200), torch.full((200,), JUST_BELOW_ONE), torch.rand(200, generator=generator)):
        tokens = sample_tokens(log_distributions, uniforms)
        assert not impossible.gather(1, tokens[:, None]).any()


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.05, 0.3, 0.15, 0.5])
    num_draws = 20_000
    uniforms = torch.rand(num_draws, generator=torch.Generator().manual_seed(0))
    counts = sample_tokens(probabilities.log().expand(num_draws, -1), uniforms).bincount(minlength=4)
    assert chisquare(counts, num_draws * probabilities.double() / probabilities.double().sum()).pvalue > 0.001


def test_the_cache_goes_by_the_name_that_the_model_has_for_it() -> None:
    class Before(torch.nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: object = None, **others: object) -> None: ...

    class Since(torch.nn.Module):
        def forward(self, input_ids: Tensor, cache: object = None, **others: object) -> None: ...

    assert [cache_argument(Before()), cache_argument(Since())] == ["past_key_values", "cache"]

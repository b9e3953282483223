"""KL geometry, against categorical distributions whose KL and Fisher information are known, and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EOS, WORDS, make_llama, make_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from analysis import (
    FisherPath,
    KLGeometry,
    SoupMixtureSlope,
    fisher_path,
    kl_geometry,
    kl_matrix,
    soup_mixture_slope,
    weights,
)
from analysis.divergence import jackknife, means_and_errors
from analysis.fisher import fisher_quadratic, softmax_variance
from rlhf.data import Prompt
from rlhf.randomness import generator
from rlhf.rollout import Rollout, sample

SPECIAL = WORDS[:4]
TOKENIZER = make_tokenizer(SPECIAL)
PROMPTS = [Prompt("", [1])] * 40


@torch.no_grad()
def categorical(logits: Sequence[float], scale: float = 1.0) -> LlamaForCausalLM:
    """A language model whose tokens are independent: their logits are logits · scale, a product of two weights."""
    model = make_llama(0, vocab_size=4, hidden_size=4, num_hidden_layers=1, tie_word_embeddings=False)
    model.model.embed_tokens.weight.fill_(1)  # so hidden states are all (1, 1, 1, 1), once the layer adds nothing
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(scale)
    model.config.rms_norm_eps = model.model.norm.variance_epsilon = 0.0
    model.lm_head.weight.copy_(torch.tensor(logits)[:, None].expand(4, 4) / 4)
    return model


def softmax(logits: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def kl_of(logits: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    p, q = softmax(np.array(logits)), softmax(np.array(others))
    return float((p * np.log(p / q)).sum())


def expected_length(logits: Sequence[float], max_new_tokens: int) -> float:
    """Tokens until the first end-of-sequence token, at most ``max_new_tokens``."""
    return sum((1 - softmax(logits)[EOS]) ** step for step in range(max_new_tokens))


BASE, ONE, TWO, POLICY = [0.0, 0.5, -1.0, 0.2], [1.0, 0.0, -1.5, 0.3], [-0.5, 1.5, -0.5, 0.0], [0.3, 1.8, -1.0, 1.5]
NAMED = {"base": BASE, "one": ONE, "two": TWO, "policy": POLICY}


# ── Who is how far from whom ──────────────────────────────────────────────────────────────────────────────────────────


def test_quantities_of_categoricals_by_hand() -> None:
    models = {name: categorical(logits) for name, logits in NAMED.items()}
    result = kl_geometry(
        models,
        PROMPTS,
        TOKENIZER,
        ingredients=["one", "two"],
        weights=[1, 3],
        max_new_tokens=1,
        progress=False,
    )
    # One token after one prompt: nothing is random. Logits are linear in the weights, so that the soup is the mixture.
    soup = 0.25 * np.array(ONE) + 0.75 * np.array(TWO)
    assert result.names == ["base", "one", "two", "policy", "soup"]
    np.testing.assert_allclose(result.weights, [0.25, 0.75])
    for name, logits in {**NAMED, "soup": soup}.items():
        to_one, to_two, to_soup = kl_of(logits, ONE), kl_of(logits, TWO), kl_of(logits, soup)
        expected = {
            "kl_soup": to_soup,
            "kl_ingredients": 0.25 * to_one + 0.75 * to_two,
            "kl_mixture": to_soup,
            "triangle_gap": to_soup - 0.25 * to_one - 0.75 * to_two,
            "log_normalizer": -math.log((softmax(ONE) ** 0.25 * softmax(TWO) ** 0.75).sum()),
        }
        assert {quantity: value.mean for quantity, value in result.of(name).items()} == pytest.approx(
            expected, abs=1e-6
        )
        assert max(value.stderr for value in result.of(name).values()) < 1e-7
        for other, others in NAMED.items():
            assert result[name, other].mean == pytest.approx(kl_of(logits, others), abs=1e-6)


def test_quantities_add_up_over_tokens_and_their_errors_are_paired() -> None:
    models = {name: categorical(logits) for name, logits in NAMED.items()}
    result = kl_geometry(
        models,
        PROMPTS,
        TOKENIZER,
        ingredients=["one", "two"],
        max_new_tokens=4,
        num_responses=50,
        progress=False,
    )
    soup = (np.array(ONE) + np.array(TWO)) / 2
    length = expected_length(POLICY, 4)
    policy = result.of("policy")
    to_soup, to_each = kl_of(POLICY, soup), (kl_of(POLICY, ONE) + kl_of(POLICY, TWO)) / 2
    assert policy["kl_soup"].mean == pytest.approx(length * to_soup, abs=4 * policy["kl_soup"].stderr)
    gap = policy["triangle_gap"]
    assert gap.mean == pytest.approx(length * (to_soup - to_each), abs=4 * gap.stderr)
    # All terms are multiples of the response's length here, so their errors are in proportion to them: the error of the
    # difference is less than that of either term, which it could not be if they were taken to be independent.
    assert 0 < gap.stderr == pytest.approx(policy["kl_ingredients"].stderr * abs(to_soup - to_each) / to_each, rel=1e-4)


@torch.no_grad()
def nudged(model: LlamaForCausalLM, seed: int, size: float) -> LlamaForCausalLM:
    """The model moved by a fraction of the weights of a random one."""
    other = make_llama(seed, vocab_size=model.config.vocab_size)
    for theirs, mine in zip(other.parameters(), model.parameters(), strict=True):
        theirs.mul_(size).add_(mine)
    return other


def random_models(size: float = 0.1) -> dict[str, LlamaForCausalLM]:
    """Models around a base; the policy is further off than the others."""
    base = make_llama(0, vocab_size=4)
    sizes = {"one": size, "two": size, "policy": 2 * size}
    return {"base": base, **{name: nudged(base, seed, far) for seed, (name, far) in enumerate(sizes.items(), 1)}}


def test_the_multi_reference_identity_holds_in_float64() -> None:
    result = kl_geometry(
        random_models(),
        [Prompt("", [1, 3]), Prompt("", [0, 1, 3])],
        TOKENIZER,
        ingredients=["one", "two"],
        weights=[0.3, 0.7],
        max_new_tokens=6,
        num_responses=10,
        batch_size=7,
        progress=False,
    )
    assert result.identity_error.shape == (5,)
    assert result.identity_error.max() < 1e-10
    for name in result.names:
        of = {quantity: estimate.mean for quantity, estimate in result.of(name).items()}
        assert of["kl_ingredients"] - of["kl_mixture"] == pytest.approx(of["log_normalizer"], abs=1e-10)
        assert of["triangle_gap"] == pytest.approx(of["kl_soup"] - of["kl_ingredients"], abs=1e-12)
        assert of["log_normalizer"] > 0.001
    # The soup is nearer to the mixture than to anything else, and nearer than its ingredients are to each other.
    to_mixture = result.of("soup")["kl_mixture"].mean
    assert 0 < to_mixture < 0.1 * result["soup", "one"].mean


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, rollout: Rollout, row: int) -> Tensor:
    """[T, V] float64, by the model's own forward on one row without its padding."""
    tokens = rollout.tokens[row][rollout.attention_mask[row]]
    length = int(rollout.response_lengths[row])
    return model(tokens[None]).logits[0, -length - 1 : -1].double().log_softmax(-1)


def test_quantities_of_language_models_on_the_same_samples() -> None:
    models = random_models()
    prompts = [Prompt("", [1, 3]), Prompt("", [0, 1, 3])]
    result = kl_geometry(
        models, prompts, TOKENIZER, ingredients=["one", "two"], soup="base", max_new_tokens=5, progress=False
    )
    assert result.names == list(models)
    rollout = sample(models["policy"], TOKENIZER, prompts, max_new_tokens=5, generator=generator(0, "kl_matrix"))
    rows = {"kl_mixture": 0.0, "log_normalizer": 0.0, "k1": 0.0}
    for row in range(2):
        log_p, log_one, log_two, log_base = (
            log_probabilities(models[name], rollout, row) for name in ("policy", "one", "two", "base")
        )
        unnormalized = (log_one + log_two) / 2
        log_z = unnormalized.logsumexp(-1)
        rows["kl_mixture"] += float((log_p.exp() * (log_p - unnormalized + log_z[:, None])).sum()) / 2
        rows["log_normalizer"] -= float(log_z.sum()) / 2
        tokens = rollout.response_tokens[row][rollout.response_mask[row]]
        rows["k1"] += float((log_p - log_base)[range(len(tokens)), tokens].sum()) / 2
    for quantity in ("kl_mixture", "log_normalizer"):
        assert result.of("policy")[quantity].mean == pytest.approx(rows[quantity], rel=1e-5)
    assert result.k1[result.names.index("policy"), result.names.index("base")] == pytest.approx(rows["k1"], rel=1e-4)
    matrix = kl_matrix(models, prompts, TOKENIZER, max_new_tokens=5, progress=False)
    np.testing.assert_array_equal(result.mean, matrix.mean)
    np.testing.assert_array_equal(result.stderr, matrix.stderr)


def test_the_exact_estimator_has_a_tenth_of_the_error_of_k1() -> None:
    # The ratio grows with √KL: this is for models as near as a hundredth of a nat.
    base = make_llama(0)
    models = {"base": base, "one": nudged(base, 1, 0.005), "two": nudged(base, 2, 0.005)}
    result = kl_geometry(
        models,
        [Prompt("", [1, 3, 6 + i % 14]) for i in range(40)],
        make_tokenizer(),
        ingredients=["one", "two"],
        max_new_tokens=12,
        num_responses=4,
        progress=False,
    )
    pairs = ~np.eye(len(result.names), dtype=bool)
    assert result.stderr_ratio[pairs].max() < 0.1
    assert np.isnan(result.stderr_ratio[~pairs]).all()
    assert (np.abs(result.k1 - result.mean)[pairs] < 4 * result.k1_stderr[pairs]).all()


# ── Soup and geometric mixture ────────────────────────────────────────────────────────────────────────────────────────


STEPS = [(np.array([0.4, -0.2, 0.0, 0.1]), 0.3), (np.array([-0.3, 0.5, 0.2, 0.0]), -0.5)]


def bilinear(epsilon: float, around_soup: bool) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Logits of soup, geometric mixture and ingredients where both logits and scale move: a_v(ε) · s(ε)."""
    mean_a, mean_s = (sum(step[part] for step in STEPS) / 2 for part in (0, 1))
    start, scale = (BASE + mean_a, 1 + mean_s) if around_soup else (BASE, 1.0)
    steps = [(a - mean_a, s - mean_s) for a, s in STEPS] if around_soup else STEPS
    ingredients = [(start + epsilon * a) * (scale + epsilon * s) for a, s in steps]
    soup = (start + epsilon * sum(a for a, _ in steps) / 2) * (scale + epsilon * sum(s for _, s in steps) / 2)
    return soup, sum(ingredients) / 2, ingredients


def bilinear_models() -> dict[str, LlamaForCausalLM]:
    return {
        "one": categorical((BASE + STEPS[0][0]).tolist(), scale=1 + STEPS[0][1]),
        "two": categorical((BASE + STEPS[1][0]).tolist(), scale=1 + STEPS[1][1]),
    }


@pytest.mark.parametrize("around_soup", [False, True])
def test_soup_and_mixture_part_by_the_fourth_power(around_soup: bool) -> None:
    base = None if around_soup else categorical(BASE)
    result = soup_mixture_slope(bilinear_models(), PROMPTS, TOKENIZER, base=base, max_new_tokens=1, progress=False)
    np.testing.assert_allclose(result.epsilons[[0, -1]], [0.1, 1])
    for index, epsilon in enumerate(result.epsilons):
        soup, mixture, ingredients = bilinear(epsilon, around_soup)
        assert result.to_mixture[index] == pytest.approx(kl_of(soup, mixture), rel=1e-3)
        expected = (kl_of(soup, ingredients[0]) + kl_of(soup, ingredients[1])) / 2
        assert result.to_ingredients[index] == pytest.approx(expected, rel=1e-4)
    assert result.slope == pytest.approx(4, abs=0.1)
    assert result.ingredient_slope == pytest.approx(2, abs=0.1)
    assert result.slope_stderr < 1e-6


@pytest.mark.parametrize("with_base", [True, False])
def test_slopes_of_language_models(with_base: bool) -> None:
    models = random_models(0.03)
    base = models["base"] if with_base else None
    before = {name: tensor.clone() for name, tensor in models["one"].state_dict().items()}
    result = soup_mixture_slope(
        {name: models[name] for name in ("one", "two")},
        [Prompt("", [1, 3]), Prompt("", [0, 1, 3]), Prompt("", [1, 0])],
        TOKENIZER,
        base=base,
        weights=[2, 1],
        max_new_tokens=6,
        num_responses=20,
        progress=False,
    )
    assert result.slope == pytest.approx(4, abs=0.3)
    assert result.ingredient_slope == pytest.approx(2, abs=0.15)
    assert 0 < result.slope_stderr < 0.2
    assert result.metadata["around"] == ("base" if with_base else "soup")
    assert (result.to_mixture < 0.2 * result.to_ingredients).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in models["one"].state_dict().items())


def test_jackknife_by_hand() -> None:
    # Of a mean, the jackknife is the usual standard error: of 1, 2, 6 that is √(7/3).
    np.testing.assert_allclose(means_and_errors(np.array([[1.0, 2.0, 6.0]])), [[3], [math.sqrt(7 / 3)]])
    assert jackknife(np.array([[1.0, 2.0, 6.0]]), lambda means: float(means[0])) == pytest.approx((3, math.sqrt(7 / 3)))
    # Of the product of two means, (3 · 2, then without each unit): 4 · 1.5, 3.5 · 2, 1.5 · 2.5.
    units = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 1.0]])
    left_out = np.array([6.0, 7.0, 3.75])
    expected = math.sqrt(2 / 3 * ((left_out - left_out.mean()) ** 2).sum())
    assert jackknife(units, lambda means: float(means.prod())) == pytest.approx((6, expected))
    assert math.isnan(jackknife(np.array([[2.0]]), lambda means: float(means[0])).stderr)


# ── Fisher information ────────────────────────────────────────────────────────────────────────────────────────────────


def test_softmax_variance_by_hand() -> None:
    logits = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    slopes = torch.tensor([[4.0, 0.0, 8.0]])
    # Mean 2 + 2 = 4; variance ½·0 + ¼·16 + ¼·16.
    torch.testing.assert_close(softmax_variance(logits, slopes), torch.tensor([8.0], dtype=torch.float64))
    # At temperature ½ the probabilities are (⅔, ⅙, ⅙), the slopes twice as large: mean 8, variance (64 + 64) / 6.
    expected = torch.tensor([128 / 6], dtype=torch.float64)
    torch.testing.assert_close(softmax_variance(logits, slopes, 0.5), expected, rtol=1e-6, atol=0)
    # A constant added to all logits changes nothing.
    assert float(softmax_variance(logits, torch.full((1, 3), 7.0))) == pytest.approx(0, abs=1e-12)


def test_path_of_categoricals_by_hand() -> None:
    # One token's logit moves: an exponential family in p = P(token), of Fisher–Rao length 2 |arcsin √p₁ − arcsin √p₀|.
    start, end = [0.0, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 4.0]
    result = fisher_path(
        {"start": categorical(start), "end": categorical(end)},
        PROMPTS,
        TOKENIZER,
        steps=61,
        max_new_tokens=1,
        progress=False,
    )
    p = np.array([softmax(np.array(start) + t * (np.array(end) - start))[3] for t in result.t])
    np.testing.assert_allclose(result.quadratic, 0.5 * 36 * p * (1 - p), rtol=1e-5)
    np.testing.assert_allclose(result.quadratic_stderr, 0, atol=1e-6)
    assert result.length == pytest.approx(2 * (math.asin(math.sqrt(p[-1])) - math.asin(math.sqrt(p[0]))), rel=1e-4)
    assert result.length_stderr < 1e-6
    assert result.names == ["start", "end"]


def test_temperature_divides_the_logits_of_a_path() -> None:
    hot, cold = (
        fisher_path(
            {
                "one": categorical((factor * np.array(ONE)).tolist()),
                "two": categorical((factor * np.array(TWO)).tolist()),
            },
            PROMPTS,
            TOKENIZER,
            steps=3,
            max_new_tokens=1,
            temperature=temperature,
            progress=False,
        )
        for factor, temperature in ((1, 1.0), (0.5, 0.5))
    )
    np.testing.assert_allclose(hot.quadratic, cold.quadratic, rtol=1e-5)
    assert hot.length == pytest.approx(cold.length, rel=1e-5)


def test_quadratic_form_adds_up_over_tokens() -> None:
    models = {"one": categorical(ONE), "two": categorical(TWO)}
    result = fisher_path(models, PROMPTS, TOKENIZER, steps=2, max_new_tokens=4, num_responses=50, progress=False)
    for index, (logits, other) in enumerate(((ONE, TWO), (TWO, ONE))):
        p, change = softmax(logits), np.array(other) - logits
        variance = (p * change**2).sum() - (p * change).sum() ** 2
        expected = expected_length(logits, 4) * 0.5 * variance
        assert result.quadratic[index] == pytest.approx(expected, abs=4 * result.quadratic_stderr[index])
        assert 0 < result.quadratic_stderr[index] < 0.05 * expected


def rollout_of(model: LlamaForCausalLM, temperature: float = 1.0) -> Rollout:
    prompts = [Prompt("", [1, 3]), Prompt("", [0, 1, 3])] * 3
    return sample(model, TOKENIZER, prompts, max_new_tokens=4, generator=generator(0, "test"), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_quadratic_form_is_that_of_the_dense_fisher_information(temperature: float) -> None:
    models = random_models()
    model = models["one"]
    direction = weights.subtract(*(weights.read("", models[name], model) for name in ("two", "one")))
    rollout = rollout_of(model, temperature)
    form = fisher_quadratic(model, rollout, direction, temperature=temperature, batch_size=4)
    assert form.shape == rollout.response_mask.shape
    assert (form[~rollout.response_mask] == 0).all()
    # F = Σ_v p_v ∇log p_v ∇log p_vᵀ, with every gradient by its own backward pass.
    model.set_attn_implementation("eager")
    parameters = list(weights.moving_parameters(model).values())
    for row, length in enumerate(rollout.response_lengths.tolist()):
        tokens = rollout.tokens[row][rollout.attention_mask[row]]
        log_p = (model(tokens[None]).logits[0, -length - 1 : -1] / temperature).log_softmax(-1)
        for step in range(length):
            expected = 0.0
            for entry in log_p[step]:
                gradients = torch.autograd.grad(entry, parameters, retain_graph=True)
                slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
                expected += 0.5 * float(entry.detach().exp()) * slope**2
            assert float(form[row, step]) == pytest.approx(expected, rel=2e-4)


def test_quadratic_form_is_the_limit_of_kl() -> None:
    models = random_models()
    model, prompts = models["one"], [Prompt("", [1, 3]), Prompt("", [0, 1, 3])]
    start = weights.read("", model, model)
    direction = weights.subtract(weights.read("", models["two"], model), start)
    path = fisher_path(
        {"one": models["one"], "two": models["two"]}, prompts, TOKENIZER, steps=2, max_new_tokens=4, progress=False
    )
    near = nudged(model, 0, 0.0)
    for step, agreement in ((0.1, 0.1), (0.01, 0.01)):
        weights.put(near, start, [direction], [step])
        matrix = kl_matrix({"one": model, "near": near}, prompts, TOKENIZER, max_new_tokens=4, progress=False)
        assert matrix["one", "near"].mean / step**2 == pytest.approx(path.quadratic[0], rel=agreement)


# ── Files, models afterwards, bad input ───────────────────────────────────────────────────────────────────────────────


def test_results_are_saved_and_models_left_as_they_were(tmp_path: Path) -> None:
    models: Mapping[str, LlamaForCausalLM] = {name: model.train() for name, model in random_models().items()}
    for model in models.values():
        model.set_attn_implementation("sdpa")
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    prompts = [Prompt("", [1, 3]), Prompt("", [3])]
    two = {name: models[name] for name in ("one", "two")}
    sampling = {"max_new_tokens": 2, "progress": False}
    geometry = kl_geometry(models, prompts, TOKENIZER, ingredients=["one", "two"], **sampling)
    law = soup_mixture_slope(two, prompts, TOKENIZER, epsilons=[0.5, 1], **sampling)
    path = fisher_path(two, prompts, TOKENIZER, steps=2, **sampling)
    form = fisher_quadratic(models["one"], rollout_of(models["one"]), {"model.norm.weight": torch.ones(16)})
    assert float(form.sum()) > 0
    results: list[KLGeometry | SoupMixtureSlope | FisherPath] = [geometry, law, path]
    for number, result in enumerate(results):
        loaded = type(result).load(result.save(tmp_path / f"{number}.npz"))
        for field, value in vars(result).items():
            np.testing.assert_equal(getattr(loaded, field), value)
    assert geometry["policy", "soup"].mean == geometry.of("policy")["kl_soup"].mean
    for name, model in models.items():
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert model.config._attn_implementation == "sdpa"
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in model.state_dict().items())


def test_folders_are_loaded_and_named(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [checkpoints[name] for name in ("first", "second")]
    prompts, sampling = [Prompt("", [1, 7]), Prompt("", [1, 8])], {"max_new_tokens": 2}
    geometry = kl_geometry(folders, prompts, make_tokenizer(), ingredients=["second", "first"], **sampling)
    assert geometry.names == ["first", "second", "soup"]
    law = soup_mixture_slope([folders[0], checkpoints["third"]], prompts, make_tokenizer(), base=folders[1], **sampling)
    assert law.metadata["ingredients"] == ["first", "third"]
    assert fisher_path(folders, prompts, make_tokenizer(), steps=2, **sampling).names == ["first", "second"]
    shown = capsys.readouterr().err
    assert all(f"{name}: 100%" in shown for name in ("kl geometry", "soup and mixture", "fisher path"))
    with pytest.raises(ValueError, match="vocabulary of 21 tokens"):
        fisher_path([folders[0], checkpoints["larger_vocabulary"]], prompts, make_tokenizer(), **sampling)


def test_bad_input_is_named() -> None:
    models = {name: categorical(logits) for name, logits in NAMED.items()}
    for settings, message in (
        ({"ingredients": ["one"]}, r"ingredients=\['one'\]: a soup needs at least two"),
        ({"ingredients": ["one", "three"]}, r"ingredients=\['three'\]: not among the models"),
        ({"ingredients": ["one", "one"]}, "names one twice"),
        ({"ingredients": ["one", "two"], "soup": "two"}, "soup='two': is one of the ingredients"),
        ({"ingredients": ["one", "two"], "weights": [1]}, "weights: 1 for 2 ingredients"),
        ({"ingredients": ["one", "two"], "weights": [1, -1]}, r"weights=\[1, -1\]: must be finite and positive"),
        ({"ingredients": ["one", "two"], "num_responses": 0}, "num_responses=0"),
    ):
        with pytest.raises(ValueError, match=message):
            kl_geometry(models, PROMPTS, TOKENIZER, max_new_tokens=1, progress=False, **settings)
    two = {name: models[name] for name in ("one", "two")}
    for epsilons in ([0.1], [0.1, 0.1], [0.1, 0.0]):
        with pytest.raises(ValueError, match="a slope needs two or more different positive numbers"):
            soup_mixture_slope(two, PROMPTS, TOKENIZER, epsilons=epsilons, max_new_tokens=1)
    same = {"one": models["one"], "two": models["one"]}
    with pytest.raises(ValueError, match="ingredients: to_mixture is 0 at some ε; are they equal"):
        soup_mixture_slope(same, PROMPTS, TOKENIZER, max_new_tokens=1, progress=False)
    with pytest.raises(ValueError, match=r"ends=\['base', 'one', 'two', 'policy'\]: a path has two, found 4"):
        fisher_path(models, PROMPTS, TOKENIZER, max_new_tokens=1)
    with pytest.raises(ValueError, match="steps=1: must be at least 2"):
        fisher_path(two, PROMPTS, TOKENIZER, max_new_tokens=1, steps=1)
    with pytest.raises(ValueError, match=r"direction: \['head'\] are no parameters of the model"):
        fisher_quadratic(models["one"], rollout_of(models["one"]), {"head": torch.zeros(1)})

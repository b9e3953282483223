"""The Hessian, against quadratic losses of known spectrum and the dense Hessian of a small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import PAD, make_gpt2, make_llama, make_tokenizer, random_examples
from scipy.integrate import trapezoid
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM

from analysis import Hessian, hessian, metrics, weights
from analysis.differentiation import differentiable
from analysis.plots import plot_spectrum
from rlhf.data import batch_examples
from rlhf.logprobs import head_of, hidden_states, token_statistics

EXAMPLES = random_examples(3, num=7)
SPECTRUM = [9.0, 4.0, 2.0, 1.0, 0.5, 0.25, -0.5, -1.5, -3.0, -12.0]


class Vector(nn.Module):
    """Ten weights in two tensors, and two that no loss here curves in."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=dtype))
        self.b = nn.Parameter(torch.randn(4, generator=generator, dtype=dtype))

    def flat(self) -> Tensor:
        return torch.cat([self.a.flatten(), self.b])


class WithIdle(Vector):
    """... and two more, of which one is unused and the other linear in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones((), dtype=torch.float64))


def quadratic(matrix: Tensor) -> Callable[[Vector], Tensor]:
    """½ θᵀAθ + Σθ, whose Hessian is A everywhere."""
    return lambda model: 0.5 * model.flat() @ matrix @ model.flat() + model.flat().sum()


def rotated(eigenvalues: list[float]) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def small_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    return make_llama(1, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1).to(dtype)


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double().numpy()


@lru_cache
def dense_hessian() -> np.ndarray:
    """∂²/∂θ² of Σ nll / Σ tokens, one example at a time through the model's own forward, in float64."""
    model = small_llama()
    model.set_attn_implementation("eager")
    parameters = dict(model.named_parameters())
    start = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([parameter.numel() for parameter in parameters.values()])
        named = {
            name: piece.view_as(parameter) for (name, parameter), piece in zip(parameters.items(), pieces, strict=True)
        }
        total = torch.zeros((), dtype=torch.float64)
        for example in EXAMPLES:
            logits = functional_call(model, named, (torch.tensor([example.token_ids]),)).logits[0]
            first = len(example.prompt_ids) - 1
            log_p = logits[first:-1].log_softmax(-1)
            total = total - log_p[range(len(example.response_ids)), example.response_ids].sum()
        return total / sum(len(example.response_ids) for example in EXAMPLES)

    vector = start.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(vector), vector, create_graph=True)
    rows = torch.eye(len(gradient), dtype=torch.float64)
    (dense,) = torch.autograd.grad(gradient, vector, rows, is_grads_batched=True)
    return dense.numpy()


# ── Quadratic losses ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_ends_of_a_quadratic_are_exact() -> None:
    matrix = rotated(SPECTRUM)
    result = hessian(
        Vector(), quadratic(matrix), num_largest=3, num_smallest=2, eigenvectors=True, tolerance=1e-12, progress=False
    )
    # The eigenvalue of largest absolute value is at the bottom, and not mistaken for the top.
    np.testing.assert_allclose(result.largest, [9, 4, 2], rtol=1e-12)
    np.testing.assert_allclose(result.smallest, [-12, -3], rtol=1e-12)
    np.testing.assert_allclose(result.eigenvalues, [9, 4, 2, -3, -12], rtol=1e-12)
    assert result.converged.all()
    assert result.residuals.max() < 1e-10
    for index, value in enumerate([9, 4, 2, -3, -12]):
        vector = result.eigenvector(index)
        assert {name: tuple(tensor.shape) for name, tensor in vector.items()} == {"a": (2, 3), "b": (4,)}
        np.testing.assert_allclose(matrix.numpy() @ flat(vector), value * flat(vector), atol=1e-5)
        assert weights.norm(vector) == pytest.approx(1, abs=1e-6)


def test_trace_and_density_of_a_diagonal_by_hand() -> None:
    # Random signs square to 1, so every probe sees the trace itself, and every eigenvalue with weight 1/10.
    result = hessian(Vector(), quadratic(torch.diag(torch.tensor(SPECTRUM, dtype=torch.float64))), progress=False)
    np.testing.assert_allclose(result.trace_samples, [sum(SPECTRUM)] * 10)
    assert result.trace == pytest.approx((sum(SPECTRUM), 0), abs=1e-12)
    assert result.nodes.shape == result.weights.shape == (10, 10)
    np.testing.assert_allclose(np.sort(result.nodes), np.sort([SPECTRUM] * 10), atol=1e-9)
    np.testing.assert_allclose(result.weights, 0.1, atol=1e-9)


def test_trace_and_moments_of_the_density() -> None:
    matrix = rotated(SPECTRUM)
    result = hessian(
        Vector(), quadratic(matrix), num_largest=0, num_smallest=0, num_probes=400, num_steps=3, progress=False
    )
    assert result.eigenvalues.shape == (0,)
    # The variance of zᵀAz over random signs is 2 (‖A‖² − Σ A_ii²).
    spread = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    assert result.trace.stderr == pytest.approx((spread / 400) ** 0.5, rel=0.15)
    assert result.trace.mean == pytest.approx(sum(SPECTRUM), abs=4 * result.trace.stderr)
    np.testing.assert_allclose(result.weights.sum(axis=1), 1)
    assert (result.weights >= 0).all()
    # m steps integrate polynomials up to degree 2m − 1 = 5: the mean over probes is tr Aᵏ / 10.
    for power in range(6):
        samples = (result.weights * result.nodes**power).sum(axis=1)
        error = samples.std() / 20
        assert samples.mean() == pytest.approx(np.mean(np.array(SPECTRUM) ** power), abs=4 * error + 1e-9)


def test_density_integrates_to_one_and_has_its_peaks_at_the_eigenvalues() -> None:
    result = hessian(Vector(), quadratic(torch.diag(torch.tensor(SPECTRUM, dtype=torch.float64))), progress=False)
    x = np.linspace(-16, 13, 5801)
    density = result.density(x, width=0.2)
    assert trapezoid(density, x) == pytest.approx(1, abs=1e-6)
    assert trapezoid(density[x < -11], x[x < -11]) == pytest.approx(0.1, abs=1e-5)
    assert x[np.argmax(np.where(x > 6, density, 0))] == pytest.approx(9, abs=1e-6)


def test_parameters_without_curvature_have_eigenvalue_zero() -> None:
    definite = rotated([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])

    def loss(model: WithIdle) -> Tensor:
        return quadratic(definite)(model) + 3 * model.linear

    result = hessian(WithIdle(), loss, num_largest=2, num_smallest=3, progress=False)
    np.testing.assert_allclose(result.largest, [10, 9], rtol=1e-6)
    # Eigenvalues of 0 converge too, although no residual is small relative to them.
    np.testing.assert_allclose(result.smallest, [0, 0, 1], atol=1e-6)
    assert result.metadata["num_parameters"] == 12


def test_a_probe_that_finds_its_whole_space_stops() -> None:
    result = hessian(Vector(), lambda model: model.flat() @ model.flat(), num_largest=1, num_smallest=0, progress=False)
    np.testing.assert_allclose(result.nodes[:, 0], 2)
    np.testing.assert_allclose(result.weights, [[1.0] + [0.0] * 9] * 10)
    assert result.trace.mean == pytest.approx(20)


class Wide(nn.Module):
    """400 weights, whose eigenvalues below are so dense that Lanczos takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(400, dtype=torch.float64))


DENSE = torch.linspace(1, 2, 400, dtype=torch.float64)


def test_residuals_are_relative_to_the_eigenvalue() -> None:
    result = hessian(
        Wide(),
        lambda model: 5 * (DENSE * model.x**2).sum(),
        num_largest=2,
        num_smallest=2,
        num_probes=0,
        tolerance=1e-2,
        eigenvectors=True,
        progress=False,
    )
    for index, (value, residual) in enumerate(zip(result.eigenvalues, result.residuals, strict=True)):
        vector = flat(result.eigenvector(index))
        expected = np.linalg.norm(10 * DENSE.numpy() * vector - value * vector) / value
        assert residual == pytest.approx(expected, rel=1e-2)
        assert 1e-4 < residual < 2e-2


def test_eigenvalues_near_zero_converge_relative_to_the_largest() -> None:
    values = torch.linspace(0, 1, 400, dtype=torch.float64) ** 2  # 0, 6e-6, 3e-5, …, 1
    result = hessian(
        Wide(),
        lambda model: 0.5 * (values * model.x**2).sum(),
        num_largest=1,
        num_smallest=2,
        num_probes=0,
        tolerance=1e-3,
        max_products=200,
        progress=False,
    )
    assert result.converged.all()
    np.testing.assert_allclose(result.smallest, 0, atol=1e-3)
    # Relative to themselves they are anything but exact, and the residuals say so.
    assert result.residuals[0] < 1e-3 < 0.1 < result.residuals[-1]


def test_what_did_not_converge_is_told() -> None:
    with pytest.warns(UserWarning, match=r"[1-4] of the 4 largest eigenvalues did not converge in 30 products"):
        result = hessian(
            Wide(),
            lambda model: 0.5 * (DENSE * model.x**2).sum(),
            num_largest=4,
            num_smallest=0,
            num_probes=0,
            max_products=30,
            tolerance=1e-10,
            progress=False,
        )
    assert np.isnan(result.eigenvalues[-1])
    assert not result.converged.all()
    assert "not converged" in result.table()


# ── Language models ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "agreement"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_agrees_with_the_dense_hessian(dtype: torch.dtype, agreement: float) -> None:
    model = small_llama(dtype)
    assert model.config._attn_implementation == "sdpa"
    tokenizer = make_tokenizer()
    result = hessian(
        model,
        metrics.loss(EXAMPLES, tokenizer),
        num_largest=4,
        num_smallest=4,
        batch_size=3,
        num_steps=1,
        num_probes=20,
        progress=False,
    )
    dense = dense_hessian()
    expected = np.linalg.eigvalsh(dense)
    print(result.table())
    np.testing.assert_allclose(result.largest, expected[::-1][:4], rtol=agreement)
    np.testing.assert_allclose(result.smallest, expected[:4], rtol=agreement)
    assert result.residuals.max() < 1e-3
    assert result.trace.mean == pytest.approx(np.trace(dense), abs=4 * result.trace.stderr)
    value, _ = metrics.measure({"loss": metrics.loss(EXAMPLES, tokenizer)}, small_llama())["loss"]
    assert result.metadata["value"] == pytest.approx(value, rel=1e-5)
    assert result.metadata["attention"] == "eager"
    # The head and the embeddings are one tensor.
    assert result.metadata["num_parameters"] == len(dense) == sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in result.shapes


def test_loss_curves_along_an_eigenvector_as_its_eigenvalue_says() -> None:
    model, tokenizer = small_llama(), make_tokenizer()
    loss = metrics.loss(EXAMPLES, tokenizer)
    result = hessian(model, loss, num_probes=0, eigenvectors=True, progress=False)
    origin = weights.read("", small_llama(), model)
    step = 1e-2
    for index, value in ((0, result.largest[0]), (-1, result.smallest[0])):
        values = []
        for shift in (-step, 0, step):
            weights.put(model, origin, [{k: v.double() for k, v in result.eigenvector(index).items()}], [shift])
            values.append(loss(model).mean)
        assert (values[0] - 2 * values[1] + values[2]) / step**2 == pytest.approx(value, rel=0.02)


def test_micro_batches_do_not_matter() -> None:
    one, two = (
        hessian(
            small_llama(),
            metrics.loss(EXAMPLES, make_tokenizer()),
            num_largest=1,
            num_smallest=1,
            num_probes=2,
            num_steps=2,
            tolerance=1e-6,
            batch_size=size,
            progress=False,
        )
        for size in (2, 100)
    )
    # Llama takes its norms and its positions in float32, whatever its weights are.
    np.testing.assert_allclose(one.eigenvalues, two.eigenvalues, rtol=1e-6)
    np.testing.assert_allclose(one.trace_samples, two.trace_samples, rtol=1e-6)


def test_dropout_is_off_and_a_loss_of_ones_own_is_differentiated() -> None:
    model = make_gpt2(4).train()
    batch = batch_examples(EXAMPLES, PAD)

    def loss(model: nn.Module) -> Tensor:
        logits = model(batch.tokens, attention_mask=batch.attention_mask).logits
        return logits.log_softmax(-1).square().mean()

    one, two = (
        hessian(model, loss, num_largest=1, num_smallest=0, num_probes=1, num_steps=1, progress=False) for _ in "12"
    )
    assert one.trace_samples[0] == two.trace_samples[0]
    assert one.metadata["loss"] == "loss"


def test_attention_of_other_modules_has_a_second_derivative() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0)))

    def loss(model: Attention) -> Tensor:
        return nn.functional.scaled_dot_product_attention(model.x, model.x, model.x, is_causal=True).square().sum()

    result = hessian(Attention(), loss, num_largest=1, num_smallest=1, num_probes=0, progress=False)
    assert result.converged.all()
    assert result.metadata["attention"] is None


# ── Its figure ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [{}, {"num_probes": 0}, {"num_largest": 0, "num_smallest": 0}])
def test_plot_shows_what_there_is(settings: dict[str, int]) -> None:
    result = hessian(Vector(), quadratic(rotated(SPECTRUM)), progress=False, **settings)
    ax = plot_spectrum(result, color="red")
    curves = [line for line in ax.lines if len(line.get_xdata()) == 2000]
    assert [line.get_color() for line in curves] == ["red"] * bool(len(result.nodes))
    (marks,) = [line for line in ax.lines if line.get_marker() == "|"]
    np.testing.assert_array_equal(marks.get_xdata(), result.eigenvalues)
    assert ("trace" in ax.get_title()) == bool(len(result.nodes))
    ax.figure.canvas.draw()
    plt.close("all")


# ── The model afterwards, files, bad input ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fail_at", [None, 4])
def test_the_model_is_left_as_it_was(fail_at: int | None) -> None:
    model = small_llama(torch.float32).train()
    frozen, carrying = model.model.norm.weight, model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    carrying.grad = torch.ones_like(carrying)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = 0

    def loss(model: LlamaForCausalLM) -> Tensor:
        nonlocal calls
        calls += 1
        assert not model.training
        assert model.config._attn_implementation == "eager"
        if calls == fail_at:
            raise KeyboardInterrupt
        return model(torch.tensor([[1, 7, 8, 9]])).logits.square().mean()

    # As a sum of two parts, so that the loss is computed for every product.
    def run() -> Hessian:
        return hessian(model, loss, num_largest=1, num_smallest=1, num_probes=1, num_steps=2, progress=False)

    if fail_at is None:
        assert run().metadata["num_parameters"] == sum(p.numel() for p in model.parameters())
    else:
        calls = fail_at - 1
        with pytest.raises(KeyboardInterrupt):
            run()
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.weight"]
    assert (carrying.grad == 1).all()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_attention_is_put_back_by_name() -> None:
    model = small_llama()
    model.set_attn_implementation("eager")
    with differentiable(model) as attention:
        assert attention == "eager"
    assert model.config._attn_implementation == "eager"


def test_a_folder_is_loaded_and_a_result_saved(tmp_path: Path) -> None:
    small_llama(torch.float32).save_pretrained(tmp_path / "folder")
    result = hessian(
        tmp_path / "folder",
        metrics.loss(EXAMPLES, make_tokenizer()),
        num_largest=2,
        num_smallest=1,
        eigenvectors=True,
        num_probes=2,
        num_steps=3,
        progress=False,
    )
    loaded = Hessian.load(result.save(tmp_path / "hessian.npz"))
    for field, value in vars(result).items():
        np.testing.assert_equal(getattr(loaded, field), value)
    torch.testing.assert_close(loaded.eigenvector(-1), result.eigenvector(-1))
    assert loaded.trace == result.trace


def test_progress_counts_products(capsys: pytest.CaptureFixture[str]) -> None:
    result = hessian(Vector(), quadratic(rotated(SPECTRUM)), num_probes=1)
    assert f"hessian: {result.metadata['num_products']} products" in capsys.readouterr().err


def test_bad_input_is_named() -> None:
    model, fine = Vector(), quadratic(rotated(SPECTRUM))
    for settings, message in (
        ({"num_largest": -1}, "num_largest=-1: must be at least 0"),
        ({"num_largest": 0, "num_smallest": 0, "num_probes": 0}, "nothing to compute"),
        ({"num_steps": 0}, "num_steps=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"tolerance": 0.0}, "tolerance=0.0: must be above 0"),
        ({"num_smallest": 10}, "has 10 parameters, too few for 10 eigenvalues"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian(model, fine, progress=False, **settings)
    for loss, message in (
        (lambda model: (1.0, 2.0), "returned a tuple; give metrics.loss"),
        (lambda model: model.b, r"returned a tensor of shape \[4\]"),
        (lambda model: model.b.sum().detach(), "does not depend on the model's parameters"),
        (lambda model: model.b.sum() * float("nan"), "loss: is nan"),
        (lambda model: (model.b - model.b.detach()).norm(), "second derivative is not finite"),
        (metrics.loss(EXAMPLES, make_tokenizer()), "is one of language models, but the model is a Vector"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian(model, loss, progress=False)
    with pytest.raises(ValueError, match=r"parameter 'a': is torch.bfloat16, too coarse"):
        hessian(Vector(torch.bfloat16), fine, progress=False)
    with pytest.raises(ValueError, match="none were kept; compute the Hessian with eigenvectors=True"):
        hessian(model, fine, num_probes=0, progress=False).eigenvector(0)


def test_a_loss_without_second_derivative_is_named() -> None:
    batch = batch_examples(EXAMPLES, PAD)

    def loss(model: LlamaForCausalLM) -> Tensor:
        tokens = batch.response_tokens[batch.response_mask]
        return -token_statistics(hidden_states(model, batch), head_of(model), tokens).logprobs.mean()

    with pytest.raises(ValueError, match="loss: has no second derivative"):
        hessian(small_llama(torch.float32), loss, progress=False)

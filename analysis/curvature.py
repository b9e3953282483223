"""How a loss curves around a model: both ends of the Hessian's spectrum, its trace, and its spectral density.

The Hessian H = ∂²L/∂θ² of P parameters is never built. Everything comes from products H·v, by double backward:

    eigenvalues   Lanczos with implicit restarts (ARPACK, through scipy), for either end of the spectrum by itself
    trace         E[zᵀHz] over random signs z (Hutchinson 1990)
    density       stochastic Lanczos quadrature: m steps of Lanczos from z give a tridiagonal matrix whose eigenvalues
                  θ_j are nodes, and whose eigenvectors' *squared first components* τ_j are weights, Σ_j τ_j = 1
                  (Golub & Welsch 1969; Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159)

The end of largest |λ|, which power iteration finds, may be either end: in a language model it is often negative. P
counts floating-point parameters, frozen ones included and tied ones once.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.differentiation import differentiable, response_logits
from analysis.metrics import ResponseLoss
from analysis.results import Saved
from analysis.weights import moving_parameters
from rlhf.data import batch_examples
from rlhf.metrics import Estimate, mean_estimate
from rlhf.models import load_causal_lm
from rlhf.randomness import generator
from soupkit.fisher import requiring_grad

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Hessian(Saved):
    """The spectrum of a Hessian. K eigenvalues; S probes of m Lanczos steps; P parameters.

    eigenvalues    [K]     descending: ``num_largest`` from the top of the spectrum, then the others from its bottom;
                           NaN where not converged
    residuals      [K]     ‖Hv − λv‖ / |λ| of each, v its eigenvector of norm 1; NaN where not converged
    num_largest            how many of them are the largest
    vectors        [K, P]  eigenvectors, float32; [0, P] unless they were asked for
    shapes                 {parameter: its shape}, in the order of the eigenvectors' entries
    trace_samples  [S]     zᵀHz of each probe
    nodes          [S, m]  θ_j of each probe
    weights        [S, m]  τ_j; 0 after a probe that has found its whole space in fewer steps
    metadata               the loss and its value, settings, number of products H·v, the attention it was computed with
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    num_largest: int
    vectors: np.ndarray
    shapes: dict[str, list[int]]
    trace_samples: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    metadata: dict[str, Any]

    @property
    def largest(self) -> np.ndarray:
        """The largest eigenvalues, descending."""
        return self.eigenvalues[: self.num_largest]

    @property
    def smallest(self) -> np.ndarray:
        """The smallest (most negative) eigenvalues, ascending."""
        return self.eigenvalues[self.num_largest :][::-1]

    @property
    def converged(self) -> np.ndarray:
        """[K] which eigenvalues converged, bool."""
        return ~np.isnan(self.eigenvalues)

    @property
    def trace(self) -> Estimate:
        """The trace, with its standard error over probes."""
        return mean_estimate(torch.from_numpy(self.trace_samples))

    def eigenvector(self, index: int) -> dict[str, Tensor]:
        """The eigenvector of ``eigenvalues[index]`` as {parameter: tensor}, of norm 1: a direction in weight space.

        Its sign is arbitrary. Index 0 is the largest eigenvalue's, −1 the smallest's.
        """
        if not len(self.vectors):
            raise ValueError("eigenvectors: none were kept; compute the Hessian with eigenvectors=True")
        return _split(torch.from_numpy(self.vectors[index]), self.shapes)

    def density(self, x: np.ndarray, width: float) -> np.ndarray:
        """Spectral density at x: every node is spread to a Gaussian of standard deviation ``width``. [n] → [n]

        It integrates to 1, in units of 1 / eigenvalue; times P it counts eigenvalues.
        """
        bumps = np.exp(-0.5 * ((np.asarray(x)[:, None] - self.nodes.ravel()) / width) ** 2)
        return bumps @ self.weights.ravel() / (len(self.weights) * width * math.sqrt(2 * math.pi))

    def table(self) -> str:
        """The eigenvalues with their residuals, and the trace, as text."""
        lines = [
            f"{value:14.6g}  residual {residual:.1e}" if found else " not converged"
            for value, residual, found in zip(self.eigenvalues, self.residuals, self.converged, strict=True)
        ]
        if len(self.trace_samples):
            lines.append(f"{self.trace.mean:14.6g}  trace, ± {self.trace.stderr:.2g}")
        return "\n".join(lines)


def hessian(
    model: str | os.PathLike[str] | nn.Module,
    loss: ResponseLoss | Loss,
    *,
    num_largest: int = 5,
    num_smallest: int = 5,
    eigenvectors: bool = False,
    num_probes: int = 10,
    num_steps: int = 20,
    tolerance: float = 1e-4,
    max_products: int = 500,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Hessian:
    """Eigenvalues at both ends of a loss's Hessian, its trace and its spectral density.

    model         a folder, loaded in float32 on ``device``, or a module; float64 stays float64
    loss          what :func:`analysis.metrics.loss` gives, nats per response token over all its examples; or a function
                  of the model that returns a scalar tensor
    num_largest   eigenvalues from the top of the spectrum, ``num_smallest`` from its bottom; 0 leaves an end out
    eigenvectors  keep them: directions for :mod:`analysis.landscape`
    num_probes    random vectors for trace and density; 0 leaves both out
    num_steps     Lanczos steps from each: 1 is enough for the trace, the density has as many nodes from each probe
    tolerance     an eigenvalue has converged when ‖Hv − λv‖ is at most this fraction of |λ|; at the bottom, of its
                  distance from the largest eigenvalue, so that one near 0 can converge too. See ``residuals``.
    max_products  products H·v for each end, before the rest counts as not converged (NaN, with a warning)
    batch_size    examples handled at once; the sum over them is exact, whatever it is

    A product costs about nine forwards. In memory are up to 2·max(20, 2K + 1) vectors of P float64 for an end's K
    eigenvalues, then ``num_steps`` for the density.

    The attention of a transformers model is switched to ``eager`` meanwhile, since the default one has no second
    derivative (see :mod:`analysis.differentiation`), and the model is in eval mode. Both are put back, and gradients
    and ``requires_grad`` are as they were, also after an exception.

    Raises ValueError when the loss is no finite scalar tensor that depends on the model, when a parameter has too few
    bits, or when the model has too few parameters for so many eigenvalues.

        spectrum = hessian("sft1", metrics.loss(examples, tokenizer), eigenvectors=True)
        print(spectrum.table())
        spectrum.eigenvector(0)["model.norm.weight"]
    """
    _check(num_largest, num_smallest, num_probes, num_steps, tolerance, batch_size)
    if not isinstance(model, nn.Module):
        model = load_causal_lm(os.fspath(model), device=device)
    parameters = moving_parameters(model)
    size = sum(parameter.numel() for parameter in parameters.values())
    _check_model(parameters, size, max(num_largest, num_smallest))
    steps = min(num_steps, size)
    bar = tqdm(desc="hessian", unit=" products", disable=not progress)
    with bar, differentiable(model) as attention, requiring_grad(list(parameters.values())):
        product = _Product(model, parameters, _parts(loss, model, batch_size), bar)
        top, *of_top = _end(product, num_largest, 1.0, 0.0, tolerance, max_products, seed)
        # Away from the top, so that the tolerance has a scale where the smallest eigenvalue is about 0.
        shift = float(top[0]) if num_largest and not np.isnan(top[0]) else 0.0
        bottom, *of_bottom = _end(product, num_smallest, -1.0, shift, tolerance, max_products, seed)
        residuals, vectors = (np.concatenate([one, other[::-1]]) for one, other in zip(of_top, of_bottom, strict=True))
        probes = [_probe(product, steps, generator(seed, "probe", index)) for index in range(num_probes)]
    samples, nodes, weights = (
        (np.array(column) for column in zip(*probes, strict=True))
        if probes
        else (np.empty(0), np.empty((0, steps)), np.empty((0, steps)))
    )
    metadata = {
        "loss": getattr(loss, "description", getattr(loss, "__name__", type(loss).__name__)),
        "value": product.value,
        "num_parameters": size,
        "num_products": product.count,
        "attention": attention,
        "dtype": str(next(iter(parameters.values())).dtype).removeprefix("torch."),
        "tolerance": tolerance,
        "seed": seed,
    }
    return Hessian(
        eigenvalues=np.concatenate([top, bottom[::-1]]),
        residuals=residuals,
        num_largest=num_largest,
        vectors=vectors if eigenvectors else np.empty((0, size), np.float32),
        shapes=product.shapes,
        trace_samples=samples,
        nodes=nodes,
        weights=weights,
        metadata=metadata,
    )


class _Product:
    """v ↦ H·v for flat float64 vectors [P], counted, with the loss as a sum of parts."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], parts: Sequence[Loss], bar: tqdm) -> None:
        self.model = model
        self.parameters = list(parameters.values())
        self.parts = parts
        self.bar = bar
        self.shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.count = 0
        self.value = math.nan
        self._only: list[Tensor] = []  # the gradient of an only part, whose graph then serves all products

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        first = self.parameters[0]
        flat = torch.tensor(vector.reshape(-1), dtype=first.dtype, device=first.device)
        pieces = _split(flat, self.shapes).values()
        total = np.zeros(self.size)
        with _second_derivative():
            for gradient in self._gradients():
                # The gradient of a parameter that takes no part is a zero without a history.
                curved = [(g, v) for g, v in zip(gradient, pieces, strict=True) if g.requires_grad]
                if curved:
                    gs, vs = zip(*curved, strict=True)
                    products = torch.autograd.grad(
                        gs, self.parameters, vs, retain_graph=bool(self._only), materialize_grads=True
                    )
                    total += torch.cat([x.flatten() for x in products]).double().cpu().numpy()
        if not np.isfinite(total).all():
            raise ValueError(
                "loss: its second derivative is not finite; check the model and the loss (a norm at 0, say)"
            )
        self.count += 1
        self.bar.update()
        return total

    def _gradients(self) -> Iterator[list[Tensor]]:
        if self._only:
            yield self._only
            return
        value = 0.0
        for part in self.parts:
            loss = _checked(part(self.model))
            value += float(loss.detach())
            # By a factor 1 with a history, functions that are once differentiable notice that they are asked for more.
            loss = loss * torch.ones_like(loss, requires_grad=True)
            gradient = list(torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True))
            if not self.count:
                _refuse_once_differentiable(gradient)
            if len(self.parts) == 1:
                self._only = gradient
            yield gradient
        self.value = value


def _end(
    product: _Product, num: int, sign: float, shift: float, tolerance: float, max_products: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues of one end, outermost first, their residuals and vectors. → [num], [num], [num, P] float32

    ``sign`` 1 is the top, −1 the bottom; convergence is judged relative to the distance from ``shift``.
    """
    values, residuals = np.full((2, num), np.nan)
    vectors = np.zeros((num, product.size), np.float32)
    if not num:
        return values, residuals, vectors
    basis = min(product.size, max(2 * num + 1, 20))
    try:
        found, directions = eigsh(
            LinearOperator((product.size,) * 2, matvec=lambda v: product(v) - shift * v.reshape(-1), dtype=np.float64),
            k=num,
            which="LA" if sign > 0 else "SA",
            v0=torch.randn(product.size, generator=generator(seed, "lanczos"), dtype=torch.float64).numpy(),
            ncv=basis,
            maxiter=max(1, (max_products - basis) // (basis - num)),  # restarts, of so many products each
            tol=tolerance,
        )
    except ArpackNoConvergence as error:
        found, directions = error.eigenvalues, error.eigenvectors
        warnings.warn(
            f"hessian: {num - len(found)} of the {num} {'largest' if sign > 0 else 'smallest'} eigenvalues did not "
            f"converge in {max_products} products; raise max_products, or tolerance",
            stacklevel=3,
        )
    for place, index in enumerate(np.argsort(-sign * found)):
        value, vector = found[index] + shift, directions[:, index] / np.linalg.norm(directions[:, index])
        rest = np.linalg.norm(product(vector) - value * vector)
        values[place], residuals[place], vectors[place] = value, rest / max(abs(value), np.finfo(float).tiny), vector
    return values, residuals, vectors


def _probe(product: _Product, steps: int, random: torch.Generator) -> tuple[float, np.ndarray, np.ndarray]:
    """Lanczos from a vector z of random signs: zᵀHz, the nodes and their weights. → (), [m], [m]"""
    signs = 2.0 * torch.randint(2, (product.size,), generator=random, dtype=torch.float64).numpy() - 1.0
    basis = np.empty((steps, product.size))
    basis[0] = signs / math.sqrt(product.size)
    diagonal, off_diagonal = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        image = product(basis[step])
        diagonal[step] = basis[step] @ image
        for _ in range(2):  # against all vectors before, twice: without it, copies of eigenvalues appear
            image -= basis[: step + 1].T @ (basis[: step + 1] @ image)
        off_diagonal[step] = np.linalg.norm(image)
        found = step + 1
        if found == steps or off_diagonal[step] <= 1e-12 * np.abs(diagonal).max():
            break
        basis[found] = image / off_diagonal[step]
    nodes, weights = np.zeros(steps), np.zeros(steps)
    nodes[:found], components = eigh_tridiagonal(diagonal[:found], off_diagonal[: found - 1])
    weights[:found] = components[0] ** 2
    return product.size * diagonal[0], nodes, weights


def _parts(loss: ResponseLoss | Loss, model: nn.Module, batch_size: int) -> list[Loss]:
    """The loss as functions of the model that add up to it."""
    if not isinstance(loss, ResponseLoss):
        return [loss]
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"loss: {loss.description} is one of language models, but the model is a {type(model).__name__}; give a "
            "function of it that returns a scalar tensor"
        )
    rows = sorted(loss.examples, key=lambda example: -len(example.token_ids))  # alike in length: little padding
    num_tokens = sum(len(example.response_ids) for example in rows)

    def share(start: int, model: PreTrainedModel) -> Tensor:
        batch = batch_examples(rows[start : start + batch_size], loss.pad_token_id, model.device)
        tokens = batch.response_tokens[batch.response_mask]
        return torch.nn.functional.cross_entropy(response_logits(model, batch), tokens, reduction="sum") / num_tokens

    return [partial(share, start) for start in range(0, len(rows), batch_size)]


@contextmanager
def _second_derivative() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error) and "differentiated twice" not in str(error):
            raise
        raise ValueError(
            f"loss: has no second derivative ({str(error).splitlines()[0]}); build it of operations that have one, or "
            "load the model with attn_implementation='eager'"
        ) from error


def _refuse_once_differentiable(gradient: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a part of a gradient's graph is a node that does nothing but refuse to be passed.

    autograd goes around such a node when it is asked for gradients of parameters alone: the products would lack terms.
    """
    todo, seen = [tensor.grad_fn for tensor in gradient], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "Error":
            raise RuntimeError("a function in it cannot be differentiated twice")
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]


def _split(flat: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    pieces = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(
            f"loss: returned {found}; give metrics.loss(examples, tokenizer), or a function of the model that returns "
            "a scalar tensor"
        )
    if not loss.requires_grad:
        raise ValueError("loss: does not depend on the model's parameters; compute it with them, not under no_grad")
    if not loss.isfinite():
        raise ValueError(f"loss: is {float(loss.detach())}; check the model and the data")
    return loss.reshape(())


def _check(
    num_largest: int, num_smallest: int, num_probes: int, num_steps: int, tolerance: float, batch_size: int
) -> None:
    counts = {"num_largest": num_largest, "num_smallest": num_smallest, "num_probes": num_probes}
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name}={value}: must be at least 0")
    if not any(counts.values()):
        raise ValueError("num_largest, num_smallest and num_probes are all 0: nothing to compute; give one of them")
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: must be above 0")


def _check_model(parameters: dict[str, nn.Parameter], size: int, num: int) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name!r}: is {parameter.dtype}, too coarse for derivatives; load the model in float32"
            )
    if size <= num:
        raise ValueError(f"model: has {size} parameters, too few for {num} eigenvalues of an end; ask for fewer")

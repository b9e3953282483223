"""Fisher information of language models: how far apart two of them are to second order, and along the path between.

F(θ) = E_{y∼π_θ} Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t, with p_t the distribution of token t and J_t the Jacobian of its
logits. Close by, KL is its quadratic form, KL(π_θ‖π_{θ+Δ}) = ½ ΔᵀFΔ + O(Δ³), and it is the metric of the space of
distributions: ∫ √(θ̇ᵀFθ̇) dt is the length of a path there, whatever its parametrisation (Rao 1945, Amari 1998).

F is never built, nor a diagonal of it (that is :mod:`soupkit.fisher`): along one direction it is the variance of J_tΔ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch import Tensor, nn
from torch.func import functional_call, jvp
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis import weights as space
from analysis.differentiation import differentiable, response_logits
from analysis.divergence import Models, Samples, jackknife, load_models, means_and_errors
from analysis.results import Saved
from analysis.weights import named_sources
from rlhf.data import Prompt, TokenBatch, by_length
from rlhf.logprobs import unpack
from rlhf.rollout import Rollout


@dataclass(frozen=True)
class FisherPath(Saved):
    """The Fisher information's quadratic form along the straight path θ(t) = a + tΔ, at G points t from 0 to 1.

    names                              of the two ends a and b = a + Δ
    t                             [G]
    quadratic, quadratic_stderr   [G]  ½ ΔᵀF(θ(t))Δ, nats per response: at t = 0 the quadratic approximation of KL(a‖b)
    length, length_stderr              the Fisher–Rao length ∫ √(ΔᵀF(θ(t))Δ) dt, by the trapezoid rule
    metadata
    """

    names: list[str]
    t: np.ndarray
    quadratic: np.ndarray
    quadratic_stderr: np.ndarray
    length: float
    length_stderr: float
    metadata: dict[str, Any]


def fisher_path(
    ends: Models,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int = 11,
    max_new_tokens: int,
    num_responses: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FisherPath:
    """The Fisher quadratic form at ``steps`` points of the straight path between two models, and the path's length.

    At every point the model there samples responses of its own, with random numbers that all points share, and
    :func:`fisher_quadratic` is taken on them. The length's error is by the jackknife over prompts (over responses for
    one prompt). Lengths of segments add up. ``ends`` are two; the other arguments are those of :func:`kl_geometry`.

    Raises ValueError when the ends are not two models of one family.

        path = fisher_path(["sft1", "policy"], prompts, tokenizer, max_new_tokens=48)
        path.quadratic[0], path.length

    Paper: Amari 1998, "Natural gradient works efficiently in learning".
    """
    sources = named_sources(ends)
    if len(sources) != 2:
        raise ValueError(f"ends={list(sources)}: a path has two, found {len(sources)}; give two models")
    if steps < 2:
        raise ValueError(f"steps={steps}: must be at least 2")
    samples = Samples(prompts, tokenizer, max_new_tokens, num_responses, temperature, seed, batch_size)
    loaded = load_models(sources, device)
    first = next(iter(loaded.values()))
    start, end = (space.read(name, model, first) for name, model in loaded.items())
    direction = space.subtract(end, start)
    grid = np.linspace(0, 1, steps)
    model = space.movable(first)
    bar = tqdm(grid.tolist(), "fisher path", disable=not progress)
    rows = []
    with bar:
        for t in bar:
            space.put(model, start, [direction], [t])
            rollout = samples.draw(model)
            form = fisher_quadratic(model, rollout, direction, temperature=temperature, batch_size=batch_size)
            rows.append(samples.units(form))
    units = torch.stack(rows).cpu().numpy()
    quadratic, quadratic_stderr = means_and_errors(units)
    length = jackknife(units, lambda means: float(trapezoid(np.sqrt(2 * means), grid)))
    return FisherPath(
        names=list(sources),
        t=grid,
        quadratic=quadratic,
        quadratic_stderr=quadratic_stderr,
        length=length.mean,
        length_stderr=length.stderr,
        metadata={"distance": space.norm(direction), **samples.metadata()},
    )


def fisher_quadratic(
    model: PreTrainedModel,
    rollout: Rollout,
    direction: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> Tensor:
    """½ ΔᵀFΔ at every token of responses that the model sampled: ½ Var_{v∼p_t}((J_tΔ)_v), exact per prefix. → [B, T]

    p_t = softmax(z_t / temperature), J_tΔ the derivative of z_t / temperature along ``direction`` {parameter: Δ}, by
    one forward-mode pass with ``eager`` attention (see :mod:`analysis.differentiation`). The sum over a response's
    tokens, averaged over responses, estimates ½ ΔᵀFΔ in nats per response. Parameters that ``direction`` leaves out
    stay. Logits [N, V] and their derivatives are kept whole: ``batch_size`` bounds the responses handled at once.
    """
    parameters = space.moving_parameters(model)
    if unknown := sorted(direction.keys() - parameters.keys()):
        raise ValueError(
            f"direction: {unknown[:3]} are no parameters of the model; name them as it does, tied ones once"
        )
    prefix = "model."
    moving = {prefix + name: parameters[name].detach() for name in direction}
    tangents = {
        prefix + name: tensor.to(parameters[name].device, parameters[name].dtype) for name, tensor in direction.items()
    }
    wrapped = _ResponseLogits(model)
    form = torch.zeros(rollout.response_mask.shape, dtype=torch.float64, device=rollout.tokens.device)
    with differentiable(model), torch.no_grad():
        for indices in by_length(rollout, batch_size):
            part = rollout.rows(indices)
            outputs = jvp(lambda p, part=part: functional_call(wrapped, p, (part,)), (moving,), (tangents,))
            logits, slopes = cast(tuple[Tensor, Tensor], outputs)
            inside = part.response_mask
            form[indices, : inside.shape[1]] = unpack(0.5 * softmax_variance(logits, slopes, temperature), inside)
    return form


class _ResponseLogits(nn.Module):
    """:func:`analysis.differentiation.response_logits` as a module, whose parameters can be replaced for a call."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        return response_logits(self.model, batch)


def softmax_variance(logits: Tensor, slopes: Tensor, temperature: float = 1.0) -> Tensor:
    """Var_{v∼p}(u_v) with p = softmax(logits / temperature) and u = slopes / temperature, in float64. [N, V] → [N]"""
    p = (logits.double() / temperature).softmax(-1)
    u = slopes.double() / temperature
    centred = u - (p * u).sum(-1, keepdim=True)
    return (p * centred.square()).sum(-1)

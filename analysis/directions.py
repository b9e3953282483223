"""Directions in weight space, for lines and planes: mappings of parameter name to tensor, in the units of the weights.

:func:`random`      Gaussian, brought to the scale of the weights filter by filter (Li et al. 2018, arXiv 1712.09913)
:func:`trajectory`  principal components of a run's checkpoints (Li et al. 2018, section 7)
:func:`delta`       one checkpoint minus another; for "BASE+ADAPTER", what the LoRA adapter adds

Any other mapping will do as well: an eigenvector of the Hessian, a task vector. Names that it lacks stay put. Tied
weights are one tensor, under any of their names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import soupkit
from analysis import weights
from analysis.weights import Source, Tensors
from rlhf.randomness import generator
from soupkit.checkpoint import base_and_adapter

Direction = Mapping[str, Tensor]

NORMALIZATIONS = ("filter", "layer", "model", "none")
VECTORS = ("fixed", "scaled")
# Layers whose weights have a filter for each index of their second axis, not their first.
FILTERS_IN_COLUMNS = (Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def random(
    checkpoint: Source,
    *,
    model: nn.Module | None = None,
    seed: int = 0,
    normalize: str = "filter",
    vectors: str = "fixed",
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """A Gaussian direction, normalised to the checkpoint's weights by :func:`normalized`.

    Every tensor has random numbers of its own, seeded by ``seed`` and its name and drawn on the CPU, so that they do
    not depend on the other tensors, their order, the device or the dtype. In many dimensions two seeds give directions
    that are orthogonal but for a cosine of order 1/√P for P parameters.

        plane(["sft1"], metrics, directions=[random("sft1", seed=0), random("sft1", seed=1)], radius=1)
    """
    model = _model({"checkpoint": checkpoint}, model, device)
    drawn = {
        name: torch.randn(parameter.shape, generator=generator(seed, f"direction {name}")).to(parameter.device)
        for name, parameter in weights.moving_parameters(model).items()
    }
    return normalized(drawn, checkpoint, model=model, normalize=normalize, vectors=vectors)


def normalized(
    direction: Direction,
    checkpoint: Source,
    *,
    model: nn.Module | None = None,
    normalize: str = "filter",
    vectors: str = "fixed",
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """The direction d with its parts scaled to the norms of the checkpoint's weights θ: d_i ← d_i ‖θ_i‖ / ‖d_i‖.

    Then θ + t d changes every part by the share t of its norm, which makes pictures of networks comparable whose
    layers can be rescaled without changing their function (Li et al. 2018, arXiv 1712.09913). ``normalize`` says what
    the parts are:

    ``filter``  the weights of one output unit: a slice along a tensor's first axis, a column in GPT-2's Conv1D
    ``layer``   a whole tensor
    ``model``   all tensors together
    ``none``    nothing is scaled

    ``vectors`` says what becomes of tensors with one axis or none (biases, norm weights): ``fixed`` sets them to 0, as
    Li et al. do for their figures, so that they stay put and count in no norm; ``scaled`` treats each as one part.
    Parts of θ or d that are zero become zero. Norms are taken in float64.

    Raises ValueError for a direction that does not fit the model, or is zero where anything moves.
    """
    for name, value, choices in (("normalize", normalize, NORMALIZATIONS), ("vectors", vectors, VECTORS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
    model = _model({"checkpoint": checkpoint}, model, device)
    origin = weights.read("checkpoint", checkpoint, model)
    tensors = weights.read_direction("direction", direction, model)
    moved = {name: tensor for name, tensor in tensors.items() if vectors == "scaled" or tensor.dim() > 1}
    if normalize == "model":
        factor = _share(weights.norm({name: origin[name] for name in moved}), weights.norm(moved))
        result = {name: tensor * float(factor) for name, tensor in moved.items()}
    elif normalize == "none":
        result = dict(moved)
    else:
        columns = _filters_in_columns(model) if normalize == "filter" else set()
        result = {}
        for name, tensor in moved.items():
            axis = None if normalize == "layer" or tensor.dim() < 2 else int(name in columns)
            scales = _share(_norms(origin[name], axis), _norms(tensor, axis))
            result[name] = (tensor * scales).to(tensor.dtype)
    return weights.read_direction(f"direction, normalize={normalize!r}, vectors={vectors!r}", result, model)


def _norms(tensor: Tensor, axis: int | None) -> Tensor:
    """L2 norms of a tensor's slices along an axis, in its number of dimensions; of the whole for None. float64"""
    others = [each for each in range(tensor.dim()) if each != axis] or None
    return torch.linalg.vector_norm(tensor, dim=others, keepdim=True, dtype=torch.float64)


def _share(wanted: Tensor | float, found: Tensor | float) -> Tensor:
    """wanted / found, 0 where nothing is found."""
    above, below = (torch.as_tensor(norm, dtype=torch.float64) for norm in (wanted, found))
    return torch.where(below > 0, above / below, 0.0)


def _filters_in_columns(model: nn.Module) -> set[str]:
    modules = {id(module.weight) for module in model.modules() if isinstance(module, FILTERS_IN_COLUMNS)}
    return {name for name, parameter in weights.moving_parameters(model).items() if id(parameter) in modules}


def delta(
    checkpoint: Source,
    base: Source | None = None,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """checkpoint − base: from ``base`` (t = 0) towards ``checkpoint`` (t = 1).

    For "BASE+ADAPTER" the base is BASE unless another is given, and the difference is what the LoRA adapter adds,
    s B A. It is taken in float64 and rounded once, so that it is not lost in the rounding of the weights. Raises
    ValueError where a base is needed.

        line(["base"], metrics, direction=delta("base+adapter"), radius=2)
    """
    if base is None:
        parts = base_and_adapter(os.fspath(checkpoint)) if weights.is_folder(checkpoint) else None
        if parts is None:
            raise ValueError('base: none given, and the checkpoint is no "BASE+ADAPTER"; pass base=')
        base = parts[0]
    sources = {"checkpoint": checkpoint, "base": base}
    model = _model(sources, model, device)
    end, start = (weights.read(name, source, model, torch.float64) for name, source in sources.items())
    return {
        name: (end.pop(name) - start.pop(name)).to(weights.working_dtype(parameter))
        for name, parameter in weights.moving_parameters(model).items()
    }


@dataclass(frozen=True)
class Trajectory:
    """The principal components of n checkpoints.

    components   K orthonormal directions, by decreasing variance
    explained    [K]  the share of each in the variance of the checkpoints about their mean, Σᵢ ‖θᵢ − mean‖²
    coordinates  {checkpoint: [K]}  where each projects, from the last as the origin, in L2 distance
    """

    components: list[dict[str, Tensor]]
    explained: np.ndarray
    coordinates: dict[str, np.ndarray]


def trajectory(
    checkpoints: str | os.PathLike[str] | Mapping[str, Source] | Sequence[Source],
    *,
    num_components: int = 2,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Trajectory:
    """Principal components of a run's checkpoints, in order (Li et al. 2018, arXiv 1712.09913, section 7).

    checkpoints     a run's folder (see :func:`soupkit.checkpoints_of`), {name: checkpoint}, or a sequence of folders
    num_components  K, less than the number of checkpoints
    model           as for :func:`analysis.line`; it is not changed

    The components come from the n × n matrix of inner products ⟨θᵢ − θₙ, θⱼ − θₙ⟩, in float64, centred by both means.
    Three checkpoints are held at a time, each pair is read once. A component's sign is that which the checkpoint that
    weighs most has on it. A random walk in many dimensions, too, has most of its variance in two components, and looks
    like a parabola on them (Antognini & Sohl-Dickstein 2018, arXiv 1806.08805): a high share is no sign of structure.

    Raises ValueError for too few checkpoints, or when they differ in fewer dimensions.

        checkpoints = soupkit.checkpoints_of("run")
        path = trajectory(checkpoints)
        plane(checkpoints[-1:], metrics, directions=path.components, mark=checkpoints[:-1])
    """
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = soupkit.checkpoints_of(os.fspath(checkpoints))
    sources = weights.named_sources(checkpoints)
    num = len(sources)
    if not 1 <= num_components < num:
        raise ValueError(
            f"num_components={num_components}: must be at least 1 and less than the {num} checkpoints {list(sources)}"
        )
    model = model if model is not None else weights.load_model(sources, device)
    names = list(sources)
    last = weights.read(names[-1], sources[names[-1]], model)

    def offset(index: int) -> dict[str, Tensor]:
        return weights.difference(weights.read(names[index], sources[names[index]], model), last, sources[names[index]])

    gram = np.zeros((num, num))
    bar = tqdm(total=num * (num - 1) // 2, desc="trajectory", disable=not progress)
    with bar, torch.no_grad():
        for i in range(num - 1):
            one = offset(i)
            for j in range(i, num - 1):
                gram[i, j] = gram[j, i] = weights.inner(one, one if j == i else offset(j))
                bar.update()
        shares, variances = principal_shares(gram, num_components)
        components: list[dict[str, Tensor]] = [{} for _ in range(num_components)]
        for i in range(num - 1):
            one = offset(i)
            for component, share in zip(components, shares[i], strict=True):
                for name, tensor in one.items():
                    if name not in component:
                        component[name] = tensor * share
                    else:
                        component[name].add_(tensor, alpha=share)
    return Trajectory(components, variances, dict(zip(names, gram @ shares, strict=True)))


def principal_shares(gram: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights c of points in their K unit principal components Σᵢ c_ik xᵢ, and their shares in the variance.

    [n, n] inner products ⟨xᵢ, xⱼ⟩ → [n, K], [K]. With λ and u the eigenvalues and eigenvectors of the matrix centred by
    both means, c = u / √λ, and the shares are λ / Σ λ.
    """
    centred = gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()
    eigenvalues, vectors = np.linalg.eigh(centred)
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    kept = eigenvalues[:num_components]
    if not kept[-1] > 1e-9 * max(eigenvalues[0], np.finfo(float).tiny):
        raise ValueError(
            f"checkpoints: differ in fewer than {num_components} dimensions (variances {kept.tolist()}); "
            "give others, or a smaller num_components"
        )
    vectors = vectors[:, :num_components]
    heaviest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[heaviest, np.arange(num_components)])
    return vectors * signs / np.sqrt(kept), kept / eigenvalues.clip(min=0).sum()


def orthogonal(direction: dict[str, Tensor], axis: Tensors) -> float:
    """Subtract the part along a unit ``axis`` from ``direction``, in its place; returns its length ⟨d, axis⟩."""
    along = weights.inner(direction, axis)
    for name, tensor in direction.items():
        tensor.add_(axis[name], alpha=-along)
    return along


def _model(sources: Mapping[str, Source], model: nn.Module | None, device: str | torch.device) -> nn.Module:
    """The model whose parameters the directions are of: the one given, a source that is one, or the first folder's."""
    modules = (source for source in sources.values() if isinstance(source, nn.Module))
    return model if model is not None else next(modules, None) or weights.load_model(sources, device)

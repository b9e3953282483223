"""Diagonal Fisher information: how much each parameter matters to a model, for Fisher-weighted averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter
from tqdm import tqdm

from soupkit.errors import MergeError
from soupkit.files import SINGLE_FILE
from soupkit.memory import shared_tensors
from soupkit.publish import check_output, published_folder


def fisher_information(
    model: Module,
    log_likelihood: Callable[[Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    samples: int | Literal["all"] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, one number per parameter: F = E[(∂ log p(y|x) / ∂θ)²].

    The square is taken of each example's own gradient, then averaged over examples (of all batches together):

        F = 1/N Σₙ E_y[(∂ log p(y|xₙ) / ∂θ)²]

    x always comes from the batches. Where y comes from makes two different quantities:

    - ``samples=None``: ``log_likelihood(model, batch)`` gives [B], the log-likelihood of each example's y. With the y
      of the data this is the *empirical* Fisher: not an approximation of the Fisher where the model does not fit the
      data. With y that you sampled from the model beforehand (responses of a language model, say) it is an unbiased
      estimate of the Fisher.
    - ``samples=k``: ``log_likelihood(model, batch)`` gives [B, C], the log-probabilities of all C possible y (a
      classifier's log-softmax). For each x, k values of y are drawn from the model: an unbiased estimate of the Fisher.
    - ``samples="all"``: the same [B, C], but every y counts with its probability: the expectation over y is exact. This
      is what the paper does where there are few classes.

    Each example takes one backward pass through its batch (per sample, or per class), so batches of one are the
    cheapest way where passes are long. Examples of a batch must not influence each other: put the model in eval mode,
    which also turns dropout off.

    Args:
        model: left unchanged; also its frozen parameters are measured.
        log_likelihood: see above; natural logarithms; for a sequence, the sum over its tokens.
        batches: any iterable of what ``log_likelihood`` understands.
        samples: None, a positive number, or "all": see above.
        seed: of the samples.
        progress: show a progress bar on stderr.

    Returns:
        {name: F}, of the parameters' shapes, in float32 (float64 for float64 parameters), under the names of
        ``model.state_dict()``. Tied names share one tensor, whose gradient is that of all its uses together.
        Floating-point buffers have zeros: Fisher averaging then takes their plain mean.

    Raises:
        MergeError (a ValueError): no examples, results of another shape, or values that are not finite.

    Paper: Matena & Raffel 2022, "Merging models with Fisher-weighted averaging", https://arxiv.org/abs/2111.09832
    """
    if not (samples is None or samples == "all" or (isinstance(samples, int) and samples >= 1)):
        raise MergeError(f"samples is {samples!r}: give None, a positive number or 'all'")
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in parameters]
    num_examples = 0
    with requiring_grad(parameters):
        for number, batch in enumerate(tqdm(batches, desc="Fisher", disable=not progress, dynamic_ncols=True)):
            outputs = log_likelihood(model, batch)
            _check(outputs, 1 if samples is None else 2, number)
            num_examples += len(outputs)
            terms = list(_terms(outputs, samples, generator))
            for left, (term, weight) in zip(range(len(terms) - 1, -1, -1), terms, strict=True):
                gradients = torch.autograd.grad(term, parameters, retain_graph=left > 0, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:  # parameters that took no part
                        total += gradient.to(total.dtype).square() * weight
    if num_examples == 0:
        raise MergeError("batches holds no examples: give at least one")
    for total in sums:
        total /= num_examples
    return _named(model, parameters, sums)


def save_fisher(fisher: Mapping[str, Tensor], folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write Fisher information as ``folder/model.safetensors``, complete or not at all; recipes refer to the folder.

    Names that share one tensor are stored once, under the first of them, as checkpoints of tied models are. Returns the
    folder. Raises FileExistsError when it exists and ``overwrite`` is False.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    repeated = shared_tensors(fisher)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in fisher.items() if name not in repeated}
    with published_folder(folder, overwrite) as partial:
        save_file(stored, partial / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def _terms(
    outputs: Tensor, samples: int | Literal["all"] | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Log-likelihoods to differentiate, each with its weight in the expectation over y."""
    for output in outputs:
        if samples is None:
            yield output, 1.0
            continue
        probabilities = output.detach().double().exp().cpu()
        if samples != "all":
            drawn = torch.multinomial(probabilities, samples, replacement=True, generator=generator)
            probabilities = torch.bincount(drawn, minlength=len(output)) / samples
        for y, weight in enumerate(probabilities.tolist()):
            if weight > 0:
                yield output[y], weight


def _check(outputs: Tensor, num_dimensions: int, number: int) -> None:
    expected = {1: "[B], one log-likelihood per example", 2: "[B, C], the log-probabilities of every y"}[num_dimensions]
    if not isinstance(outputs, Tensor) or outputs.dim() != num_dimensions:
        found = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise MergeError(f"log_likelihood gave {found} for batch {number}: return {expected}")
    if not outputs.requires_grad:
        raise MergeError(
            f"log_likelihood of batch {number} has no gradient: compute it with the model, not under no_grad"
        )
    values = outputs.detach().double()
    if num_dimensions == 1 and not values.isfinite().all():
        raise MergeError(f"log_likelihood is not finite in batch {number}: check the model and the data")
    if num_dimensions == 2 and not (values.exp().sum(dim=1) - 1).abs().le(1e-3).all():
        raise MergeError(f"the probabilities of batch {number} do not sum to 1: return log_softmax(logits, dim=1)")


@contextmanager
def requiring_grad(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Gradients for all of them, frozen or not; their flags as they were afterwards."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _named(model: Module, parameters: Sequence[Parameter], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The values under the names of the state dict; zeros for floating-point buffers."""
    of_parameter = {id(parameter): value for parameter, value in zip(parameters, values, strict=True)}
    fisher = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            fisher[name] = of_parameter.get(id(tensor), torch.zeros_like(tensor))
            if not fisher[name].isfinite().all():
                raise MergeError(f"the Fisher information of {name!r} is not finite: check the model and the data")
    return fisher

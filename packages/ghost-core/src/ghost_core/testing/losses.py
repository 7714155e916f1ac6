"""The loss that checks take of whatever a layer returns: nonlinear, and of every element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves


def is_floating(value: Any) -> bool:
    """Tell whether a value is a tensor that can require a gradient."""
    return isinstance(value, Tensor) and value.is_floating_point()


def nonlinear_losses(
    outputs: Any, n: int, *, dim: int = 0, draw: int = 0, what: str = "the module"
) -> Tensor:
    """Return a loss per sample of whatever a module returned, float64 `[N]`.

    Every element of every output with N rows counts, with a random weight. The slope depends on the
    element and, as tokens meet in most losses, on the sum of all elements of a sample. It stays
    moderate where outputs are large, so that their rounding errors stay small.

    Args:
        outputs: The outputs, in any structure.
        n: Number of samples N.
        dim: Axis of the samples.
        draw: Which weights to draw; equal draws give equal weights.
        what: What the outputs are of, for messages.

    Raises:
        AssertionError: If no output has N rows and requires a gradient.
    """
    generator, found = Generator().manual_seed(2 + draw), []
    for leaf in tree_leaves(outputs):
        # Also those that require no gradient: the weights of the others are not to depend on it.
        if is_floating(leaf) and leaf.dim() > dim and leaf.shape[dim] == n:
            total = _elements(leaf.movedim(dim, 0), generator).sum(1)
            found.append(3 * total + (1 + total**2).sqrt())
    if not any(each.requires_grad for each in found):
        raise AssertionError(f"{what} has no differentiable output with {n} rows")
    return torch.stack(found).sum(0)


def losses_by_token(output: Tensor) -> Iterator[Tensor]:
    """Split the losses of one output by position, `[N, T]`, for each way to see positions.

    What is yielded has other values than the losses, and the gradients of its sums are theirs.

    Args:
        output: `[N, ..., features]` or `[N, features, ...]`, three axes or more.
    """
    elements = _elements(output, Generator().manual_seed(2))
    total = elements.detach().sum(1, keepdim=True)
    slope = 3 + total / (1 + total**2).sqrt()
    weighted = (slope * elements).reshape(output.shape)
    yield weighted.sum(-1).flatten(1)
    yield weighted.sum(1).flatten(1)


def _elements(output: Tensor, generator: Generator) -> Tensor:
    """Return what each element of an output `[N, ...]` adds to the sums, `[N, elements]`."""
    values = output.double().reshape(len(output), output.shape[1:].numel())
    weights = torch.randn(values.shape, dtype=torch.float64, generator=generator)
    return weights * (values + (1 + values**2).sqrt())

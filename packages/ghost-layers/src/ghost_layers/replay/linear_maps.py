"""Calls that are written out, down to the linear maps that they consist of.

One backward pass for all samples gives the gradients b of the maps' results; with their inputs x,
these are the weights' gradients, `g_n = Σ_t b[n, t] ⊗ x[n, t]`, never built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Size, Tensor, nn
from torch.nn import functional

from ghost_core import Dense, Outer, PerSampleGradient, Tokens
from ghost_core._torch import start_of_backward

_WHOLE = slice(None)


@dataclass(frozen=True)
class LinearMap:
    """One use of a linear map in a call, or of as much of it as one input goes through.

    Attributes:
        weight: Name of its weight.
        bias: Name of its bias, if it has one.
        rows: Which rows of the weight make the results.
        entries: Which entries of the bias are added to them.
        inputs: `[N, T, d]`; for one step of several, `[N, d]`.
        results: `[N, T, p]`, or `[N, p]`.
    """

    weight: str
    bias: str | None
    rows: slice
    entries: slice
    inputs: Tensor
    results: Tensor

    @classmethod
    def of(
        cls,
        module: nn.Module,
        weight: str,
        bias: str | None,
        inputs: Tensor,
        rows: slice = _WHOLE,
        entries: slice = _WHOLE,
    ) -> LinearMap:
        """Map inputs by some rows of a module's weight, and some entries of its bias, if any."""
        matrix = attrgetter(weight)(module)
        values = attrgetter(bias)(module) if bias else None
        added = values if values is None or entries == _WHOLE else values[entries]
        used = matrix if rows == _WHOLE else matrix[rows]
        results: Tensor = functional.linear(inputs, used, added)
        # Gradients are taken to here: those of the weight have a closed form.
        results = results if results.requires_grad else results.requires_grad_()
        return cls(weight, bias, rows, entries, inputs.detach(), results)

    def place(self, name: str) -> slice:
        """Return where its results belong along the first axis of its weight or bias."""
        return self.rows if name == self.weight else self.entries


@dataclass(frozen=True)
class WrittenOut:
    """A call that was written out.

    Attributes:
        outputs: The floating tensors that it returns, as the module lays them out.
        maps: The linear maps in it.
    """

    outputs: list[Tensor]
    maps: list[LinearMap]


def differentiate(
    outputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    maps: Sequence[LinearMap],
    shapes: Mapping[str, Size],
) -> dict[str, PerSampleGradient]:
    """Return the per-sample gradients from one backward pass for all samples.

    A recurrent layer computes `W x_t + U h_t` in each of three steps, six maps in all:

        W   inputs x_0, x_1, x_2 as three tokens, with the gradients of their results
        U   inputs h_0, h_1, h_2 likewise
        b   added to each: the gradients of the results, as they are for W

    Args:
        outputs: What the loss depends on.
        slopes: Gradients of the loss, laid out as the outputs.
        maps: The linear maps of the call.
        shapes: Shapes of the parameters asked for.
    """
    maps = [each for each in maps if not shapes.keys().isdisjoint((each.weight, each.bias))]
    results = [each.results for each in maps]
    start = start_of_backward(outputs, slopes)
    found = torch.autograd.grad(start, results, allow_unused=True)
    grads = [
        torch.zeros_like(result) if grad is None else grad
        for result, grad in zip(results, found, strict=True)
    ]
    made: dict[str, PerSampleGradient] = {}
    joined: dict[object, Tensor] = {}  # most biases have the results of their weight
    for name, shape in shapes.items():
        used = [(at, each) for at, each in enumerate(maps) if name in (each.weight, each.bias)]
        places = tuple((at, *each.place(name).indices(shape[0])) for at, each in used)
        if places not in joined:
            placed = [_placed(grads[at], slice(*place), shape[0]) for at, *place in places]
            joined[places] = _joined(placed)
        if used[0][1].weight == name:
            inputs = _joined([each.inputs.to(grads[at].dtype) for at, each in used])
            made[name] = Outer(Tokens(inputs.unsqueeze(2)), joined[places].unsqueeze(2), shape)
        else:
            made[name] = Dense(joined[places])
    return made


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put tokens behind each other, `[N, T, ...]` each, or steps, `[N, ...]` each."""
    if parts[0].dim() == 2:
        return torch.stack(list(parts), 1)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _placed(grad: Tensor, place: slice, size: int) -> Tensor:
    """Give the gradient of some results, `[..., p]`, zeros for all others."""
    if place == slice(0, size, 1):
        return grad
    whole = grad.new_zeros(*grad.shape[:-1], size)
    whole[..., place] = grad
    return whole

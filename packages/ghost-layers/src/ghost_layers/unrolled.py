"""Recurrent layers written out step by step, down to the linear maps that they consist of.

An RNN with two steps is `h1 = tanh(W x1 + V h0)`, `h2 = tanh(W x2 + V h1)`: W is one map, used at
two steps. One backward pass for all samples gives the gradients b1, b2 of the maps' results, and

    g_n = b1[n] ⊗ x1[n] + b2[n] ⊗ x2[n]  for W
    g_n = b1[n] ⊗ h0[n] + b2[n] ⊗ h1[n]  for V
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn import functional

from ghost_core import Dense, Outer, PerSampleGradient, Tokens
from ghost_core._torch import start_of_backward


@dataclass(frozen=True)
class LinearMap:
    """One use of a weight, at one or several steps.

    Attributes:
        weight: Name of the weight.
        bias: Name of the bias; None where there is none.
        inputs: One `[N, d]` for each of T steps.
        results: What the map made of them, `[N, p]` each.
    """

    weight: str
    bias: str | None
    inputs: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.RNNBase, inputs: Tensor) -> Tensor:
        """Map the inputs of a step, `[N, d]` to `[N, p]`."""
        bias = getattr(module, self.bias) if self.bias else None
        result = functional.linear(inputs, getattr(module, self.weight), bias)
        self.inputs.append(inputs)
        self.results.append(result)
        return result

    def gradients(
        self, grads: Sequence[Tensor], shapes: Mapping[str, Size]
    ) -> Iterator[tuple[str, PerSampleGradient]]:
        """Yield the per-sample gradients of weight and bias, as far as they are asked for.

        Args:
            grads: Gradients of the results.
            shapes: Shapes of the parameters asked for.
        """
        grad = torch.stack(list(grads), dim=1)  # [N, T, p]
        if self.weight in shapes:
            inputs = torch.stack([each.detach() for each in self.inputs], dim=1).to(grad.dtype)
            factor = Tokens(inputs.unsqueeze(2))
            yield self.weight, Outer(factor, grad.unsqueeze(2), shapes[self.weight])
        if self.bias is not None and self.bias in shapes:
            yield self.bias, Dense(grad)


@dataclass(frozen=True)
class Unrolled:
    """A recurrent layer's call.

    Attributes:
        outputs: What the layer returns, flattened.
        maps: The linear maps in it.
    """

    outputs: list[Tensor]
    maps: list[LinearMap]


def unroll(module: nn.RNNBase, inputs: Tensor, hx: Any = None) -> Unrolled:
    """Run a recurrent layer step by step.

    Args:
        module: An `RNN`, `LSTM` or `GRU`.
        inputs: `[T, N, d]`, or `[N, T, d]` with `batch_first`.
        hx: The first state, or states, `[layers, N, p]`; zeros by default.
    """
    steps = list(inputs.unbind(1 if module.batch_first else 0))
    ways = 2 if module.bidirectional else 1
    maps: list[LinearMap] = []
    last: list[list[Tensor]] = []
    for layer in range(module.num_layers):
        sides = []
        for way in range(ways):
            state = _first_state(module, inputs, hx, ways * layer + way)
            suffix = f"l{layer}" + ("_reverse" if way else "")
            order = slice(None, None, -1 if way else 1)
            made, state = _run(module, suffix, steps[order], state, maps)
            sides.append(made[order])
            last.append(state)
        stacked = torch.stack([torch.cat(each, -1) for each in zip(*sides, strict=True)])
        if layer < module.num_layers - 1:
            stacked = functional.dropout(stacked, module.dropout, module.training)
        steps = list(stacked.unbind())
    output = torch.stack(steps, dim=1 if module.batch_first else 0)
    return Unrolled([output, *(torch.stack(each) for each in zip(*last, strict=True))], maps)


def _first_state(module: nn.RNNBase, inputs: Tensor, hx: Any, at: int) -> list[Tensor]:
    given = hx if isinstance(hx, tuple | list) else [hx]
    if hx is not None:
        return [state[at] for state in given]
    n = inputs.shape[0 if module.batch_first else 1]
    sizes = [module.proj_size or module.hidden_size]
    if module.mode == "LSTM":
        sizes.append(module.hidden_size)
    return [inputs.new_zeros(n, size) for size in sizes]


def _run(
    module: nn.RNNBase,
    suffix: str,
    steps: Sequence[Tensor],
    state: list[Tensor],
    maps: list[LinearMap],
) -> tuple[list[Tensor], list[Tensor]]:
    """Run one direction of one layer; return its outputs and its last state."""

    def make(kind: str, *, biased: bool) -> LinearMap:
        maps.append(
            LinearMap(f"weight_{kind}_{suffix}", f"bias_{kind}_{suffix}" if biased else None)
        )
        return maps[-1]

    seen, kept = make("ih", biased=module.bias), make("hh", biased=module.bias)
    projected = make("hr", biased=False) if module.proj_size else None
    made = []
    for step in steps:
        gates = seen(module, step), kept(module, state[0])
        state = _CELLS[module.mode](*gates, *state)
        if projected is not None:
            state[0] = projected(module, state[0])
        made.append(state[0])
    return made, state


def _tanh(seen: Tensor, kept: Tensor, h: Tensor) -> list[Tensor]:
    return [torch.tanh(seen + kept)]


def _relu(seen: Tensor, kept: Tensor, h: Tensor) -> list[Tensor]:
    return [torch.relu(seen + kept)]


def _lstm(seen: Tensor, kept: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    i, f, g, o = (seen + kept).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def _gru(seen: Tensor, kept: Tensor, h: Tensor) -> list[Tensor]:
    (i_r, i_z, i_n), (h_r, h_z, h_n) = seen.chunk(3, -1), kept.chunk(3, -1)
    z = torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
    return [(h - n) * z + n]


_CELLS: Mapping[str, Callable[..., list[Tensor]]] = {
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
    "LSTM": _lstm,
    "GRU": _gru,
}


def differentiate(
    outputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    maps: Sequence[LinearMap],
    shapes: Mapping[str, Size],
) -> dict[str, PerSampleGradient]:
    """Return the per-sample gradients from one backward pass for all samples.

    Args:
        outputs: What the loss depends on, with a graph from the parameters asked for.
        slopes: Gradients of the loss, laid out as the outputs.
        maps: The linear maps of the call.
        shapes: Shapes of the parameters asked for.
    """
    maps = [each for each in maps if not shapes.keys().isdisjoint((each.weight, each.bias))]
    results = [result for each in maps for result in each.results]
    start = start_of_backward(outputs, slopes)
    found = torch.autograd.grad(start, results, allow_unused=True)
    grads = iter(
        torch.zeros_like(result) if grad is None else grad
        for result, grad in zip(results, found, strict=True)
    )
    return {
        name: gradient
        for each in maps
        for name, gradient in each.gradients([next(grads) for _ in each.results], shapes)
    }

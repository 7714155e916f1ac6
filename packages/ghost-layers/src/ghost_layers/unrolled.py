"""Recurrent layers written out step by step, down to the linear maps that they consist of.

An RNN with two steps is `h1 = tanh(W x1 + V h0)`, `h2 = tanh(W x2 + V h1)`: W is one map, used at
two steps. One backward pass for all samples gives the gradients b1, b2 of the maps' results, and

    g_n = b1[n] ⊗ x1[n] + b2[n] ⊗ x2[n]  for W
    g_n = b1[n] ⊗ h0[n] + b2[n] ⊗ h1[n]  for V
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_layers.replay import LinearMap, WrittenOut


def unroll(module: nn.RNNBase, input: Tensor, hx: Any = None) -> WrittenOut:
    """Run a recurrent layer step by step.

    Args:
        module: An `RNN`, `LSTM` or `GRU`.
        input: `[T, N, d]`, or `[N, T, d]` with `batch_first`.
        hx: The first state, or states, `[layers, N, p]`; zeros by default.
    """
    steps = list(input.unbind(1 if module.batch_first else 0))
    ways = 2 if module.bidirectional else 1
    maps: list[LinearMap] = []
    last: list[list[Tensor]] = []
    for layer in range(module.num_layers):
        sides = []
        for way in range(ways):
            state = _first_state(module, input, hx, ways * layer + way)
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
    return WrittenOut([output, *(torch.stack(each) for each in zip(*last, strict=True))], maps)


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

    def mapped(kind: str, inputs: Tensor) -> Tensor:
        bias = f"bias_{kind}_{suffix}" if module.bias and kind != "hr" else None
        maps.append(LinearMap.of(module, f"weight_{kind}_{suffix}", bias, inputs))
        return maps[-1].results

    made = []
    for step in steps:
        gates = mapped("ih", step), mapped("hh", state[0])
        state = _CELLS[module.mode](*gates, *state)
        if module.proj_size:
            state[0] = mapped("hr", state[0])
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

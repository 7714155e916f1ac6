"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ghost_core.testing.cases import roots
from ghost_core.testing.cases.roots import around
from ghost_core.testing.examples import LayerExample, N, named, normal

Example = partial(LayerExample, generic=True)


class Outputs(roots.Around):
    """Returns the outputs of all steps, `[N, T, h]`, and not the last state."""

    def forward(self, inputs: Tensor) -> Any:
        """Run over the sequence."""
        return self.inner(inputs)[0]


class LastState(roots.Around):
    """Returns the last state of the last layer, `[N, h]`."""

    def forward(self, inputs: Tensor) -> Any:
        """Run over the sequence."""
        state = self.inner(inputs)[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]


class FromState(roots.Around):
    """Starts from given states, `[N, layers, h]`, one for each that the layer has."""

    def forward(self, inputs: Tensor, *states: Tensor) -> Any:
        """Run over the sequence."""
        given = tuple(state.transpose(0, 1).contiguous() for state in states)
        return self.inner(inputs, given if len(given) > 1 else given[0])[0]


class Unrolled(roots.Around):
    """Calls a cell for every step of a sequence."""

    def forward(self, inputs: Tensor) -> Any:
        """Run over the sequence, `[N, T, d]`."""
        state, outputs = None, []
        for step in inputs.unbind(1):
            state = self.inner(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, dim=1)


_LAYERS: dict[str, Any] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
_CELLS: dict[str, Any] = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}

_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "two layers, dropout in training": {"num_layers": 2, "dropout": 0.5},
}

_TOKENS = (normal(N, 3, 5),)


class Packed(roots.Around):
    """Runs over sequences of several lengths, packed."""

    def forward(self, inputs: Tensor) -> Any:
        """Return the outputs, padded."""
        lengths = torch.arange(len(inputs), 0, -1).clamp(max=inputs.shape[1])
        packed = pack_padded_sequence(inputs, lengths, batch_first=True)
        return pad_packed_sequence(self.inner(packed)[0], batch_first=True)[0]


def _recurrent() -> Iterator[LayerExample]:
    for name, kind in _LAYERS.items():
        made = partial(kind, 5, 6, batch_first=True)
        for what, options in _OPTIONS.items():
            yield Example(
                f"{name}, {what}".removesuffix(", "),
                around(Outputs, partial(made, **options)),
                _TOKENS,
            )
        yield Example(f"{name}, last state", around(LastState, made), _TOKENS)
        states = [normal(N, 1, 6)] * (2 if kind is nn.LSTM else 1)
        yield Example(f"{name}, given state", around(FromState, made), (*_TOKENS, *states))
        yield Example(
            f"{name}, as many steps as samples",
            around(Outputs, made),
            (normal(N, N, 5),),
        )
        yield Example(
            f"{name}, sequence first",
            around(roots.SequenceFirst, partial(kind, 5, 6)),
            _TOKENS,
            options={"batch_dim": {"inner": 1}},
        )
        yield Example(
            f"{name}, only the recurrent weight",
            around(Outputs, made),
            _TOKENS,
            frozen=("inner.weight_ih_l0", "inner.bias_ih_l0", "inner.bias_hh_l0"),
        )
    yield Example("rnn, relu", lambda: Outputs(_rnn(nonlinearity="relu")), _TOKENS)
    for what, options in {"": {}, ", both directions": {"bidirectional": True}}.items():
        yield Example(
            f"lstm, projected{what}",
            around(Outputs, partial(nn.LSTM, 5, 6, batch_first=True, proj_size=4, **options)),
            _TOKENS,
        )


def _rnn(**options: Any) -> nn.Module:
    return nn.RNN(5, 6, batch_first=True, **options)


def _cells() -> Iterator[LayerExample]:
    for name, kind in _CELLS.items():
        yield Example(f"{name} cell", partial(kind, 5, 6), (normal(N, 5),), frozen=("weight_hh",))
        yield Example(
            f"{name} cell, over a sequence", around(Unrolled, partial(kind, 5, 6)), _TOKENS
        )
        yield Example(
            f"{name} cell, no bias", around(Unrolled, partial(kind, 5, 6, bias=False)), _TOKENS
        )
    yield Example(
        "rnn cell, relu", lambda: Unrolled(nn.RNNCell(5, 6, nonlinearity="relu")), _TOKENS
    )
    yield Example("gru cell, given state", lambda: nn.GRUCell(5, 6), (normal(N, 5), normal(N, 6)))


def _packed() -> Iterator[LayerExample]:
    yield Example("lstm, packed", lambda: Packed(nn.LSTM(5, 6, batch_first=True)), _TOKENS)
    both = partial(nn.GRU, 5, 6, batch_first=True, bidirectional=True)
    yield Example("gru, packed, both directions", lambda: Packed(both()), _TOKENS)


RECURRENT = named("recurrent", [*_recurrent(), *_cells(), *_packed()])

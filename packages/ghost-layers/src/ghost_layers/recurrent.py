"""Samplers for the recurrent layers of torch: `RNN`, `LSTM`, `GRU` and their cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ghost_core import Call, WrongSplitError
from ghost_core._torch import flat_weights
from ghost_layers.replay import Formula, InputRows, ReplaySampler
from ghost_layers.unrolled import unroll


class RecurrentSampler(ReplaySampler):
    """Per-sample gradients of `RNN`, `LSTM` and `GRU`.

    Inputs are `[T, N, d]`, or `[N, T, d]` with `batch_first`; states are `[layers, N, p]` always.

    The layer runs again step by step, for all samples at once, which gives the gradients of the
    results of its linear maps; with their inputs, these are the weights' gradients, never built.
    Where that does not return what the layer did, as with cuDNN's dropout, or weights are
    parametrised, it runs again as any module does.
    """

    def batch_dims(self, module: nn.Module, outputs: int) -> tuple[int, ...]:
        """Only the first output depends on `batch_first`."""
        layer: Any = module
        return (0 if layer.batch_first else 1, 1, 1)[:outputs]

    def sides(self, call: Call) -> Mapping[int, InputRows]:
        """Find the samples of the inputs and states.

        Raises:
            WrongSplitError: If there is no axis for samples, or sequences are packed.
        """
        layer: Any = call.module
        inputs = call.argument(0, "input")
        if isinstance(inputs, PackedSequence):
            raise WrongSplitError(
                reason="it got a PackedSequence, whose rows are steps of several samples",
                remedy="give it padded tensors, and mask the loss",
            )
        if inputs.dim() != 3:
            raise WrongSplitError(
                reason=f"its input has the shape {tuple(inputs.shape)}, without an "
                "axis for samples",
                remedy="give it an input with three axes",
            )
        states = call.args[1:] or (call.kwargs.get("hx"),)
        sides = {
            id(state): InputRows(own=True, axis=1)
            for state in tree_leaves(states)
            if isinstance(state, Tensor)
        }
        return {**sides, id(inputs): InputRows(own=True, axis=0 if layer.batch_first else 1)}

    def rewritten(self, module: nn.Module) -> Formula | None:
        """Run it step by step, where nothing stands behind its weights."""
        layer: Any = module
        return unroll if flat_weights(layer) is not None else None

    def draws(self, module: nn.Module) -> bool:
        """Only dropout draws, and what may stand behind a weight."""
        layer: Any = module
        return flat_weights(layer) is None or (layer.training and layer.dropout > 0)


class RecurrentCellSampler(ReplaySampler):
    """Per-sample gradients of `RNNCell`, `LSTMCell` and `GRUCell`, for inputs `[N, d]`."""

    parameters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def draws(self, module: nn.Module) -> bool:
        """Cells have no dropout."""
        return False

    def sides(self, call: Call) -> Mapping[int, InputRows]:
        """Find the samples of the input and the states.

        Raises:
            WrongSplitError: If there is no axis for samples.
        """
        tensors = [value for value in tree_leaves((call.args, call.kwargs)) if value is not None]
        for value in tensors:
            if value.dim() != 2:
                raise WrongSplitError(
                    reason=f"it got a tensor of shape {tuple(value.shape)}, without an "
                    "axis for samples",
                    remedy="give it inputs with two axes",
                )
        return {id(value): InputRows(own=True) for value in tensors}

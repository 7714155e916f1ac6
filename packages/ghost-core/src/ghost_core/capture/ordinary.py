"""Tells at a glance that an operation is on values of samples alone, as nearly all are.

A mode that follows shared values sees every function of torch, hundreds in a pass, and few of them
have to do with one. Whatever it does for the others, each step of the training pays for.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from ghost_core._torch import NUMBERS, is_custom
from ghost_core.capture.state import CaptureState
from ghost_core.tracking import TrackedModule, TrackedParameter

Owners = dict[int, tuple[Tensor, TrackedModule, TrackedParameter]]
"""Tracked parameters by identity, each with its owner."""

_TENSORS = frozenset({Tensor, nn.Parameter})
_SEEN: set[type] = set()
"""Types of nodes that are no custom function's; torch's own, so that none is kept alive by this."""


def on_samples_alone(
    given: list[Any],
    shared: Container[int],
    constant: Container[int],
    owners: Owners,
    state: CaptureState,
) -> bool:
    """Tell whether what an operation is given are values of samples, and nothing to follow.

    False says nothing: dictionaries, for one, are for others to look into.

    Where a layer with a weight of its own runs, on samples x:

        linear(x, weight)   true: x has a graph, and the weight is the layer's to use
        x + positions       false: positions are followed
        x * other.scale     false: a parameter of another module is to be followed

    Args:
        given: What it is given, one by one; tuples and lists are taken apart in it.
        shared: Identities of values that are followed.
        constant: Identities of others that are the same for all samples.
        owners: The parameters that may be followed.
        state: What the hooks on the model share: it tells which module's own parameters are none to
            follow now, as it runs.
    """
    found = False
    for value in given:
        kind = type(value)
        if kind in NUMBERS:
            continue
        if kind is tuple or kind is list:
            given.extend(value)  # which this comes to in the end
            continue
        at = id(value)
        if kind not in _TENSORS or at in shared or at in constant:
            return False
        owned = owners.get(at)
        if owned is not None:
            if owned[1] is not state.runs_alone():
                return False
            continue
        node = value.grad_fn
        if node is not None:
            if type(node) not in _SEEN and not is_seen(type(node)):
                return False
            found = True
    return found


def is_seen(kind: type) -> bool:
    """Tell whether a mode sees what is behind nodes of a type, as it does but for custom ones."""
    if kind in _SEEN:
        return True
    if is_custom(kind):
        return False
    _SEEN.add(kind)
    return True

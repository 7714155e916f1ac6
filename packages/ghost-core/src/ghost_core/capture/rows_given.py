"""What a call's inputs tell of its rows: whether they join samples, or are but one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ghost_core._torch import tensors_in
from ghost_core.capture.refusals import packed_unasked
from ghost_core.capture.state import CaptureState
from ghost_core.tracking import TrackedModule


def is_joined(state: CaptureState, tracked: TrackedModule, args: Any, kwargs: Any) -> bool:
    """Tell whether no rows stand for themselves, as a call needs to be taken apart by row.

    What joins samples in one tensor, as graphs and packed sequences are, has none.

    Raises:
        WrongSplitError: If it is packed, and nobody is going to ask whose rows are.
    """
    batch, pass_ = state.batch, state.pass_
    assert batch is not None
    assert pass_ is not None
    given, axis = (*args, *kwargs.values()), tracked.batch_dim
    packed = [value for value in given if isinstance(value, PackedSequence)]
    if packed:
        steps = max(len(value.batch_sizes) for value in packed)
        if not (state.verifying or tracked.row_owner) and steps > 1 and pass_.n > 1:
            raise packed_unasked(tracked.label, tracked.name)
        return True
    if not batch.joined:
        return False
    sizes = {
        value.shape[axis]
        for value in tree_leaves(given)
        if isinstance(value, Tensor) and value.dim() > axis
    }
    return pass_.n not in sizes


def is_lone_row(
    state: CaptureState, tracked: TrackedModule, args: Any, kwargs: Any, n: int
) -> bool:
    """Tell whether a module got one row of several samples', as an expert gets one token.

    A row for all samples has no graph that leads to them.
    """
    sharing = state.sharing
    if sharing is None or n < 2 or tracked.row_owner:
        return False
    given = [value for value in tensors_in((args, kwargs)) if value.dim() > 1]
    return any(
        len(value) == 1 and value.grad_fn is not None and not sharing.is_shared_call(value, {})
        for value in given
    )

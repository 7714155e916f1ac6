"""Where a value that shared values and samples were combined to may have its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ghost_core.capture.state import CaptureState
from ghost_core.errors import WrongSplitError
from ghost_core.split import RowAxes, Site


def site_of(state: CaptureState, value: Tensor, names: Sequence[str], operation: str) -> Site:
    """Return where a value may have its rows, the likeliest first: probes tell.

    With 4 samples, a value that positions and samples were combined to may be

        [4, 4, d]   rows on axis 0 or 1: two alternatives, of which probes leave one
        [8, d]      folded rows on axis 0
        [5, 7]      none of these: on axis 0 or 1 if rows are routed, else refused

    Args:
        state: What the hooks on the model share.
        value: The value.
        names: The modules that computed what samples were combined with.
        operation: What combined them, for messages; empty if the model returns the value.

    Raises:
        WrongSplitError: If it has no rows.
    """
    assert state.pass_ is not None
    n, tracked = state.pass_.n, [state.tracked[name] for name in names]
    keys = [each.row_owner for each in tracked if each.row_owner]
    owner = state.pass_.owners[keys[0]] if keys else None
    count = n if owner is None else len(owner)
    folds = owner is None and n and state.verifying
    # What was told goes first, there plain rows; folded ones are nowhere else. Inside of an
    # attention, samples may be behind positions.
    batch_dims, shape = [each.batch_dim for each in tracked], value.shape
    told = {*batch_dims, state.dim, 0}
    first: list[RowAxes] = []
    folded: list[RowAxes] = []
    last: list[RowAxes] = []
    others: list[int] = []
    for axis in dict.fromkeys((*batch_dims, state.dim, *range(len(shape)))):
        if axis >= len(shape):
            continue
        size = shape[axis]
        if size == count:
            (first if axis in told else last).append(RowAxes(0, (axis,), count, owner))
        elif folds and axis in told and size and not size % n:
            folded.append(RowAxes(0, (axis,), size))
        else:
            others.append(axis)
    unowned = owner is None or not (first or last)  # none told of flattened rows that these are all
    if owner is not None and unowned:
        folded = _flattened({axis: shape[axis] for axis in others if axis in told}, owner)
    alternatives = [*first, *folded, *last]
    refusal = None if alternatives else _no_rows(value, names, operation, n)
    routable = state.verifying and unowned and operation and value.dim()
    if refusal is not None and not routable:
        raise refusal
    site = Site(tuple(names), operation or "returned", alternatives, refusal)
    if routable:
        site.spare = [RowAxes(0, (at,), value.shape[at], routed=True) for at in others]
    if state.verifier.routes or refusal is not None:
        site.spread_out()
    return site


def _flattened(sizes: Mapping[int, int], owner: Tensor) -> list[RowAxes]:
    """Return axes that may have several rows for each that has an owner, one after the other."""
    count = len(owner)
    return [
        RowAxes(0, (axis,), size, owner.repeat_interleave(size // count))
        for axis, size in sizes.items()
        if count and size and not size % count
    ]


def _no_rows(value: Tensor, names: Sequence[str], operation: str, n: int) -> WrongSplitError:
    what = f"meets them in {operation}" if operation else "is returned by the model"
    return WrongSplitError(
        "gradients cannot be split by sample: what "
        f"{', '.join(names)} computed, the same for all samples, {what}, in a value of "
        f"shape {tuple(value.shape)}",
        reason=f"it has no axis of {n} samples",
        remedy=f"say where samples are, with batch_dim={{{names[0]!r}: axis}}, or which "
        f"sample each row belongs to, with row_owner={{{names[0]!r}: key}}; or leave these "
        "modules out with exclude=...",
    )

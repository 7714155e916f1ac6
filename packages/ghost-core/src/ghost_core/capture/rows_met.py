"""Where a value that shared values and samples were combined to may have its rows."""

from __future__ import annotations

from collections.abc import Sequence

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
    # Inside of an attention, samples may be behind positions.
    axes = dict.fromkeys((*(each.batch_dim for each in tracked), state.dim, *range(value.dim())))
    present = [axis for axis in axes if axis < value.dim()]
    told = [axis for axis in present if axis in {state.dim, 0, *(t.batch_dim for t in tracked)}]
    plain = [RowAxes(0, (axis,), count, owner) for axis in present if value.shape[axis] == count]
    folded = [
        RowAxes(0, (axis,), value.shape[axis])
        for axis in (told if owner is None and state.verifying and n else ())
        if value.shape[axis] not in (0, n) and not value.shape[axis] % n
    ]
    flattened = [
        RowAxes(0, (axis,), size, owner.repeat_interleave(size // count))
        for axis, size in ((axis, value.shape[axis]) for axis in told)
        if owner is not None and not plain and count and size and not size % count
    ]
    # What was told goes first, there plain rows; folded ones are nowhere else.
    alternatives = sorted(
        [*plain, *folded, *flattened], key=lambda axes: axes.outputs[0] not in told
    )
    refusal = None if alternatives else _no_rows(value, names, operation, n)
    unowned = owner is None or not plain  # nobody told of flattened rows that these are all
    routable = state.verifying and unowned and operation and value.dim()
    if refusal is not None and not routable:
        raise refusal
    site = Site(tuple(names), operation or "returned", alternatives, refusal)
    if routable:
        known = [*plain, *folded]
        others = [axis for axis in present if all(axis not in axes.outputs for axes in known)]
        site.spare = [RowAxes(0, (at,), value.shape[at], routed=True) for at in others]
    if state.verifier.routes or refusal is not None:
        site.spread_out()
    return site


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

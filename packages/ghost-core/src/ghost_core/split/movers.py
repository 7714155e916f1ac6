"""Operations that may move rows, each with what its node of the graph keeps of it.

How an operation moves rows is told by the axes that it works along, and by numbers along each:
which entries are picked, or written to. Tensors are looked at when these numbers are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghost_core._torch import all_sizes_of, is_kept_elsewhere, number_of, sizes_into, sizes_of

UNTOLD = object()
"""Numbers of which nothing is known."""

_ANY = (0,)
"""Sizes of which nothing is known: samples may lie anywhere."""


class Move(NamedTuple):
    """How an operation moves rows.

    Attributes:
        shape: The sizes of the value that rows are picked from or written to.
        along: The axes that it works along, each with its numbers, or a function that finds what
            they keep in order; `UNTOLD` where nothing is known.
        moved: The nodes of what is moved.
    """

    shape: Sequence[int]
    along: Mapping[int, object]
    moved: Sequence[Any] = ()

    def numbers(self, axis: int, n: int, turned: bool) -> object:
        """Return what identifies what is done along an axis.

        Args:
            axis: The axis.
            n: Number of samples.
            turned: Whether samples may be on any axis, or in turn, `[k, N]` flattened.
        """
        numbers = self.along[axis]
        return numbers(n, turned) if callable(numbers) else numbers


def _kept_by(numbers: Tensor, size: int, n: int, turned: bool) -> object:
    """Return which orders of samples rows keep, given where each is taken from or written to.

    With 2 samples that have 2 of 4 rows each, rows are taken from

        1 0 3 2   in order, [N, k] flattened: each sample keeps its rows
        2 3 0 1   in turn, [k, N] flattened: the same
        0 2 1 3   in neither: nothing is known

    Args:
        numbers: Where, on an axis of some size, int64 `[R]`.
        size: That size.
        n: Number of samples.
        turned: Whether samples may be in turn, `[k, N]` flattened, as well.
    """
    rows = len(numbers)
    if size % n or rows % n or not rows:
        return UNTOLD
    at, place = numbers.cpu() % size, torch.arange(rows)
    in_order = torch.equal(at // (size // n), place // (rows // n))  # [N, k] flattened
    in_turn = turned and torch.equal(at % n, place % n)  # [k, N] flattened
    return (in_order, in_turn) if in_order or in_turn else UNTOLD


def _behind(node: Any, first: int = 0) -> list[Any]:
    return [behind for behind, _ in node.next_functions[first:]]


def signed(axis: int, shape: Sequence[int]) -> int:
    """Return an axis that a node keeps as one from the front."""
    return axis if 0 <= axis < len(shape) else number_of(axis) % max(len(shape), 1)


def _one_axis(node: Any, name: str) -> Move:
    """Describe a node that keeps an axis and a number, or several."""
    shape = node._saved_self_sym_sizes
    axis = signed(node._saved_dim, shape)
    return Move(shape, {axis: (getattr(node, f"_saved_{name}"), shape[axis])}, _behind(node))


def _slice(node: Any) -> Move:
    shape = node._saved_self_sym_sizes
    axis = signed(node._saved_dim, shape)
    numbers = node._saved_start, number_of(node._saved_end), node._saved_step, shape[axis]
    whole = numbers[0] == 0 and numbers[1] >= shape[axis] and numbers[2] == 1
    return Move(shape, {} if whole else {axis: numbers}, _behind(node))


def _unbind(node: Any) -> Move:
    made = all_sizes_of(node)
    axis = number_of(node._saved_dim) % (len(made[0]) + 1)
    shape = (*made[0][:axis], len(made), *made[0][axis:])
    return Move(shape, {axis: len(made)}, _behind(node))


def _join(node: Any) -> Move:
    """Describe what is put one behind the other: pieces of known sizes, but for one."""
    shape = sizes_of(node)
    axis = signed(node._saved_dim, shape)
    sizes = [None if each is None else sum(each[axis : axis + 1]) for each in sizes_into(node)]
    known = sizes.count(None) < 2
    return Move(shape, {axis: (*sizes, shape[axis]) if known else UNTOLD}, _behind(node))


def _stack(node: Any) -> Move:
    shape = sizes_of(node)
    axis = signed(node._saved_dim, shape)
    return Move(shape, {axis: shape[axis]}, _behind(node))


def _shifted(node: Any) -> Move:
    shape, dims = sizes_of(node), node._saved_dims
    shifts = getattr(node, "_saved_shifts", dims)
    at = zip((signed(dim, shape) for dim in dims), shifts, strict=False)
    along: dict[int, object] = {axis: (shift, shape[axis]) for axis, shift in at}
    return Move(shape, along or {0: (shifts, shape)}, _behind(node))


def _padded(node: Any) -> Move:
    shape, pad = sizes_of(node), node._saved_pad
    pairs = zip(reversed(range(len(shape))), zip(pad[::2], pad[1::2], strict=True), strict=False)
    along = {axis: (each, shape[axis]) for axis, each in pairs if any(each)}
    return Move(shape, along, _behind(node))


def _tensor(node: Any, name: str) -> Any:
    """Return a tensor that a node keeps, or several; None if it is not at hand.

    That is looked at where the numbers are needed, since to ask takes as long as a hundred nodes.
    """
    return None if is_kept_elsewhere(node, name) else getattr(node, f"_saved_{name}")


def _at(node: Any, name: str, size: int) -> object:
    """Return what finds the numbers of picks along an axis, by a tensor that a node keeps."""

    def numbers(n: int, turned: bool) -> object:
        index = _tensor(node, name)
        return UNTOLD if index is None else _kept_by(index.flatten(), size, n, turned)

    return numbers


def _positions(node: Any, shape: Sequence[int]) -> dict[int, object]:
    """Return the numbers along each axis, given what tensors take in brackets.

    x[:, mask]         axis 1, with the entries at which the mask `[T]` is true
    x[rows, columns]   axes 0 and 1, with the numbers of each
    x[mask]            axes 0 and 1 of a mask `[N, T]`, with the entries at which it is true
    """
    indices = _tensor(node, "indices")
    if indices is None:
        return dict.fromkeys(range(len(shape)), UNTOLD)
    masks = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices]
    picked = [
        picks
        for index, mask in zip(indices, masks, strict=True)
        for picks in [index is not None] * (index.dim() if mask else 1)
    ]

    @cache
    def spread() -> dict[int, Tensor]:
        """Find the entries of masks, for which a device is waited for."""
        each: list[Tensor] = []
        for index, mask in zip(indices, masks, strict=True):
            if index is not None:
                each += index.nonzero().unbind(1) if mask else [index]
        common = [index.flatten() for index in torch.broadcast_tensors(*each)]
        return dict(zip((axis for axis, picks in enumerate(picked) if picks), common, strict=True))

    def numbers(axis: int, n: int, turned: bool) -> object:
        return _kept_by(spread()[axis], shape[axis], n, turned)

    return {axis: partial(numbers, axis) for axis, picks in enumerate(picked) if picks}


def _index(node: Any) -> Move:
    shape = node._saved_self_sym_sizes
    return Move(shape, _positions(node, shape), _behind(node))


def _index_put(node: Any) -> Move:
    shape = sizes_of(node)
    return Move(shape, _positions(node, shape), _behind(node, 1))


def _along(node: Any) -> Move:
    """Describe picks of whole rows, or writing these."""
    writes = len(node.next_functions) > 1
    shape = sizes_of(node) if writes else node._saved_self_sym_sizes
    axis = signed(node._saved_dim, shape)
    numbers = _at(node, "index", shape[axis])
    return Move(shape, {axis: numbers}, _behind(node, int(writes)))


def _by_entry(node: Any) -> Move:
    """Describe picks of single entries along an axis, or writing these."""
    sizes = sizes_into(node)
    writes = len(sizes) > 1
    shape = sizes_of(node) if writes else sizes[0]
    assert shape is not None  # or there would be no node
    return Move(shape, {signed(node._saved_dim, shape): UNTOLD}, _behind(node, int(writes)))


def _masked(node: Any) -> Move:
    """Describe picks of the entries of a mask, or writing these: as many for each sample?

    Of 2 samples with 3 entries each, a mask takes

        1 1 1   1 1 1   all: rows stay where they are
        0 1 1   1 1 0   as many of each: samples stay in order
        0 1 1   1 0 0   2 and 1: nothing is known
    """
    sizes = sizes_into(node)
    writes = len(sizes) > 1
    made, into = sizes_of(node), sizes[-1]
    shape = made if writes else sizes[0]
    if into is None or shape is None:
        return Move(made, {})
    given = prod(into if writes else made)

    def numbers(n: int, turned: bool) -> object:
        mask = _tensor(node, "mask")
        if mask is None:
            return UNTOLD
        whole = mask.expand(torch.broadcast_shapes(mask.shape, shape))
        if whole.numel() == given and bool(whole.all()):
            return True, True
        elsewhere = turned and (whole.shape[:1] != (n,) or n in whole.shape[1:])
        if whole.numel() % n or elsewhere:
            return UNTOLD
        each = whole.reshape(n, -1).sum(1)
        return (True, False) if bool((each * n == given).all()) else UNTOLD

    return Move(_ANY, {0: numbers}, _behind(node, int(writes)))


def _slices(node: Any) -> Move:
    """Describe writing into a part, of which nothing tells which it is but sizes."""
    shape, values = sizes_of(node), [each for each in sizes_into(node)[1:] if each is not None]

    def numbers(n: int, turned: bool) -> object:
        return (True, turned) if all(whole(value, turned) for value in values) else UNTOLD

    def whole(value: Sequence[int], turned: bool) -> bool:
        if not value or value == shape:
            return True
        as_many = value[0] == shape[0] and (len(value) == len(shape) or shape[1] < shape[0])
        return as_many and not turned

    return Move(_ANY, {0: numbers}, _behind(node, 1))


def _strided(node: Any) -> Move:
    numbers = node._saved_size, node._saved_stride, node._saved_storage_offset
    return Move(_ANY, {0: numbers}, _behind(node))


def _unfolded(node: Any) -> Move:
    shape = node._saved_self_sym_sizes
    axis = signed(node._saved_dimension, shape)
    return Move(shape, {axis: (node._saved_size, node._saved_step, shape[axis])}, _behind(node))


def _diagonal(node: Any) -> Move:
    shape = node._saved_self_sym_sizes
    axes = sorted(signed(dim, shape) for dim in (node._saved_dim1, node._saved_dim2))
    numbers = number_of(node._saved_offset), *(shape[axis] for axis in axes)
    return Move(shape, dict.fromkeys(axes, numbers), _behind(node))


def _packed(node: Any) -> Move:
    full = node._saved_input_sym_sizes[0 if node._saved_batch_first else 1]

    def numbers(n: int, turned: bool) -> object:
        steps = _tensor(node, "result1")
        return (True, True) if steps is not None and bool((steps == full).all()) else UNTOLD

    return Move(_ANY, {0: numbers}, _behind(node))


def _looked_up(node: Any) -> Move:
    size = node._saved_weight_sym_argsize_0
    return Move((size,), {0: _at(node, "indices", size)}, _behind(node))


def _anything(node: Any) -> Move:
    return Move(_ANY, {0: UNTOLD}, _behind(node))


def custom(node: Any) -> Move:
    """Describe what only its author knows: it leaves rows where they are if it leaves their number.

    One that picks rows, picks all of them then.
    """
    values = [type(behind).__name__ != "AccumulateGrad" for behind in _behind(node)]
    known = {
        size[0] for size, value in zip(sizes_into(node), values, strict=True) if value and size
    }
    other = any(each and each[0] not in known for each in all_sizes_of(node))
    return Move(_ANY, {0: UNTOLD} if other and known else {}, _behind(node))


MOVING: dict[str, Callable[[Any], Move]] = {
    "Select": partial(_one_axis, name="index"),
    "Slice": _slice,
    **dict.fromkeys(["Split", "UnsafeSplit"], partial(_one_axis, name="split_size")),
    **dict.fromkeys(
        ["SplitWithSizes", "UnsafeSplitWithSizes"], partial(_one_axis, name="split_sizes")
    ),
    "Unbind": _unbind,
    "Cat": _join,
    "Stack": _stack,
    "Flip": _shifted,
    "Roll": _shifted,
    "Rot90": _anything,
    "ConstantPadNd": _padded,
    "Index": _index,
    "IndexPut": _index_put,
    **dict.fromkeys(["IndexSelect", "IndexAdd", "IndexCopy", "IndexReduce"], _along),
    **dict.fromkeys(["Gather", "Scatter", "ScatterAdd", "ScatterReduce"], _by_entry),
    **dict.fromkeys(["SelectScatter", "SliceScatter", "Sort", "Topk"], _by_entry),
    **dict.fromkeys(["MaskedSelect", "MaskedScatter"], _masked),
    "Embedding": _looked_up,
    **dict.fromkeys(["EmbeddingBag", "Take", "Put", "SegmentReduce", "BlockDiag"], _anything),
    **dict.fromkeys(["UniqueConsecutive", "UniqueDim", "SparseAddmm"], _anything),
    "AsStrided": _strided,
    "Unfold": _unfolded,
    "Diagonal": _diagonal,
    "PackPaddedSequence": _packed,
    "CopySlices": _slices,
}
"""What may move rows, by the name of its node without its ending."""

ALONG_ONE_AXIS = {
    MOVING[name]
    for name in (
        *("Select", "Slice", "Split", "UnsafeSplit", "SplitWithSizes", "UnsafeSplitWithSizes"),
        *("Cat", "Stack"),
    )
}
"""Those that keep the one axis that they work along, and whose sizes show."""

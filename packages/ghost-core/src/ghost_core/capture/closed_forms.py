"""Closed forms of the operations in which values that are the same for all samples meet them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional

from ghost_core._torch import version
from ghost_core.algebra import Dense, Outer, PerSampleGradient, Tokens
from ghost_core.capture.functions import operation
from ghost_core.capture.sources import Shared
from ghost_core.capture.ways_back import way_back
from ghost_core.errors import WrongSplitError
from ghost_core.sampler import as_tokens

ClosedForm = Callable[[Tensor], PerSampleGradient]
"""Makes the gradients of a shared value from that of a result, rows first `[R, ...]`."""

FormOn = Callable[[int], ClosedForm | None]
"""Returns the closed form, given the axis of the rows in the result; None if it has none there."""

_ADDITIONS = {"add", "__add__", "__radd__"}
_SUBTRACTIONS = {"sub": 1, "subtract": 1, "__sub__": 1, "__rsub__": 0}
"""With the position of what is taken away."""
_SCALINGS = {"mul", "multiply", "__mul__", "__rmul__"}
_QUOTIENTS = {"div", "divide", "true_divide", "__truediv__", "__div__"}
_PRODUCTS = {"linear", "matmul", "__matmul__", "mm"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}
_EXPANSIONS = {"expand", "expand_as", "broadcast_to"}
_REPETITIONS = {"repeat", "tile"}


@dataclass(frozen=True)
class _Kept:
    """Values of samples that a form needs in the backward pass as they are now."""

    values: Tensor
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_version", version(self.values))

    def get(self) -> Tensor:
        """Return them.

        Raises:
            WrongSplitError: If they were written to.
        """
        if version(self.values) != self._version:
            raise WrongSplitError(
                "gradients cannot be split by sample: values that met what is the same for all "
                "samples were written to afterwards",
                reason="the gradient depends on what they had been",
                remedy="use an operation that is not in place",
            )
        return self.values


def closed_forms(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
    met: Sequence[tuple[Tensor, Shared]],
) -> dict[int, FormOn]:
    """Return the closed forms of an operation, by position of shared values in `met`.

    Most operations have none, and are differentiated once for each sample. Forms are of the
    value that a shared one is an expansion of, if it is one.

    Of a table `p [T, d]`, the same for all samples, and samples `x [N, T, d]`, given row n of the
    gradient of the result:

        x + p            that row
        x * p            that row times x[n]
        linear(x, p)     an outer product of that row and x[n]
        x ** p           none: differentiated once for each sample

    Args:
        func: The operation.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        result: Its result.
        met: The shared values and what stands for them.
    """
    name = operation(func)
    if name in _CONCATENATIONS:
        return _joined_forms(args, kwargs, result, met)
    forms: dict[int, FormOn] = {}
    for at, (stand, shared) in enumerate(met):
        places = [place for place, arg in enumerate(args) if arg is stand]
        if len(places) != 1:
            continue
        position = places[0]
        if len(args) == 2 and not kwargs and stand.dtype == result.dtype:  # add() takes a factor
            form = _elementwise(name, position, args, _shape(shared), result.dim())
            if form is not None:
                forms[at] = form
        if func is torch.einsum and (form := _contracted(position, args, shared)) is not None:
            forms[at] = form
        if func is functional.linear and position == 2:
            forms[at] = partial(_bias, result.dim())
        elif name in _PRODUCTS and position == 1 and _multiplies(args[0], shared, result):
            inputs, is_linear = args[0].to(result.dtype), func is functional.linear
            forms[at] = partial(_product, _Kept(inputs), is_linear, shared.value.shape)
    return forms


def derived(func: Any, args: Sequence[Any], shared: Collection[Shared], value: Tensor) -> Shared:
    """Return what an operation made of shared values alone.

    Args:
        func: The operation.
        args: Its positional inputs.
        shared: The shared values.
        value: The result.
    """
    sources = tuple(dict.fromkeys([source for each in shared for source in each.sources]))
    if len(shared) > 1:
        return Shared(value, sources)
    (before,) = shared
    narrow = before if _is_expansion(func, before.value, value) else None
    way = way_back(func, args, before.value, value)
    return Shared(value, sources, narrow, None if way is None else (before, way))


def _is_expansion(func: Any, narrow: Tensor, value: Tensor) -> bool:
    """Tell whether a value repeats the entries of another one along new axes, or those of size 1.

    Args:
        func: The operation that made it.
        narrow: The other one.
        value: The value.
    """
    name = operation(func)
    if name not in _EXPANSIONS and not (name in _REPETITIONS and narrow.is_leaf):
        return False  # what is written to a copy, or to what was copied, only one of them has
    pairs = zip(_aligned(narrow.shape, value.dim()), value.shape, strict=True)
    return all(before in (1, after) for before, after in pairs)


def _shape(shared: Shared) -> Size:
    return shared.value.shape if shared.narrow is None else shared.narrow.value.shape


def _aligned(shape: Size, dims: int) -> list[int]:
    return [1] * (dims - len(shape)) + list(shape)


def _elementwise(
    name: str, position: int, args: Sequence[Any], shape: Size, dims: int
) -> FormOn | None:
    """Return the closed form of an operation on two values, entry by entry, if it has one."""
    if name in _ADDITIONS:
        return partial(_sum, shape, dims)
    other = args[1 - position]
    if name in _SUBTRACTIONS:
        return partial(_sum, shape, dims, sign=-1 if position == _SUBTRACTIONS[name] else 1)
    if not isinstance(other, Tensor) or other.is_complex():
        return None
    kept = _Kept(other.detach())
    if name in _SCALINGS:
        return partial(_scaled, kept.get, shape, dims)
    if name in _QUOTIENTS and position == 0:
        return partial(_scaled, lambda: kept.get().reciprocal(), shape, dims)
    if name in _QUOTIENTS:
        below = _Kept(args[1].detach())
        return partial(_scaled, lambda: -kept.get() / below.get().square(), shape, dims)
    return None


def _sum(shape: Size, dims: int, axis: int, *, sign: int = 1) -> ClosedForm:
    return lambda rows: _added(shape, dims, axis, rows if sign > 0 else -rows)


def _scaled(factor: Callable[[], Tensor], shape: Size, dims: int, axis: int) -> ClosedForm:
    """Return the closed form of a value that was multiplied with a factor, entry by entry."""

    def made(rows: Tensor) -> PerSampleGradient:
        wide = torch.promote_types(rows.dtype, torch.float32)
        by = factor().to(wide)
        by = by.reshape(_aligned(by.shape, dims)).movedim(axis, 0)
        return _added(shape, dims, axis, rows.to(wide) * by, rows.dtype)

    return made


def _added(
    shape: Size, dims: int, axis: int, rows: Tensor, dtype: torch.dtype | None = None
) -> PerSampleGradient:
    """Return the gradient of a value that was added: that of the sum, where it was broadcast.

    Of a sum `[N, T, d]` with the gradient `rows`, sample n has

        [T, d]      rows[n]
        [T, 1]      rows[n], summed over d
        [N, T, d]   rows[n] in row n, zeros in all others
    """
    aligned = _aligned(shape, dims)
    moved = [aligned[axis], *aligned[:axis], *aligned[axis + 1 :]]
    if moved[0] != 1:  # it had rows already
        each = rows.new_zeros(len(rows), *rows.shape)
        each[torch.arange(len(rows)), torch.arange(len(rows))] = rows
        values = each
    else:
        values = rows.unsqueeze(1)
    summed = [at for at, size in enumerate(moved, 1) if size == 1 and values.shape[at] != 1]
    values = values.sum(summed, keepdim=True) if summed else values
    values = values.movedim(1, axis + 1).reshape(len(rows), *shape)
    return Dense(values.unsqueeze(1).to(dtype))


def _joined_forms(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
    met: Sequence[tuple[Tensor, Shared]],
) -> dict[int, FormOn]:
    """Return the closed forms of a concatenation: each value has the gradient of its part."""
    given = args[0] if args else kwargs.get("tensors", ())
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % result.dim()
    forms: dict[int, FormOn] = {}
    for at, (stand, shared) in enumerate(met):
        places = [place for place, value in enumerate(given) if value is stand]
        if len(places) != 1 or any(each.dim() != result.dim() for each in given):
            continue
        if stand.dtype == result.dtype and "out" not in kwargs:
            start = sum(value.shape[dim] for value in given[: places[0]])
            part = dim, start, stand.shape[dim]
            forms[at] = partial(_part, part, _shape(shared), result.dim())
    return forms


def _part(part: tuple[int, int, int], shape: Size, dims: int, axis: int) -> ClosedForm | None:
    dim, start, length = part
    if dim == axis:
        return None
    after = dim + 1 if dim < axis else dim  # once rows are first
    return lambda rows: _added(shape, dims, axis, rows.narrow(after, start, length))


def _contracted(position: int, args: Sequence[Any], shared: Shared) -> FormOn | None:
    """Return the closed form of an `einsum` of two values, if it has one.

    With samples in b, `einsum("bhqd,qkd->bhqk", x, table)` gives the table the gradients
    `einsum("bhqk,bhqd->bqkd", grad, x)`.
    """
    if len(args) != 3 or shared.narrow is not None:
        return None
    given, _, made = args[0].replace(" ", "").partition("->")
    parts = given.split(",")
    mine, others = parts[position - 1], parts[2 - position]
    letters = all(part.isalpha() and len(set(part)) == len(part) for part in (mine, others, made))
    if not letters or not set(mine) <= set(others + made):
        return None
    kept, spec = _Kept(args[3 - position].detach()), (mine, others, made)
    return partial(_contraction, kept, spec)


def _contraction(kept: _Kept, spec: tuple[str, str, str], axis: int) -> ClosedForm | None:
    mine, others, made = spec
    sample = made[axis]
    if sample in mine:
        return None
    rows_first = sample + made.replace(sample, "")

    def gradients(rows: Tensor) -> PerSampleGradient:
        wide = torch.promote_types(rows.dtype, torch.float32)
        pattern = f"{rows_first},{others}->{sample}{mine}"
        values = torch.einsum(pattern, rows.to(wide), kept.get().to(wide))
        return Dense(values.unsqueeze(1).to(rows.dtype))

    return gradients


def _terms(rows: Tensor) -> PerSampleGradient:
    """Return the gradient of a bias: that of the result, token by token."""
    return Dense(as_tokens(rows).squeeze(2))


def _bias(dims: int, axis: int) -> ClosedForm | None:
    return _terms if axis < dims - 1 else None


def _multiplies(inputs: Any, shared: Shared, result: Tensor) -> bool:
    """Tell whether samples are multiplied with a matrix that is a source itself."""
    if not isinstance(inputs, Tensor) or inputs.dim() != result.dim() or inputs.dim() < 2:
        return False
    if shared.value.dim() != 2:
        return False
    return shared.value is shared.sources[0].tensor and len(shared.sources) == 1


def _product(kept: _Kept, is_linear: bool, shape: Size, axis: int) -> ClosedForm | None:
    """Return the closed form of a matrix that samples are multiplied with, if there is one."""
    if axis == kept.values.dim() - 1:
        return None

    def made(rows: Tensor) -> PerSampleGradient:
        factor = Tokens(as_tokens(kept.get().movedim(axis, 0)), transposed=not is_linear)
        return Outer(factor, as_tokens(rows), shape)

    return made

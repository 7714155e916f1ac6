"""Tells functions that a mode sees apart: questions, attributes, and what writes in place."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodWrapperType
from typing import Any

from torch import Tensor

from ghost_core._torch import SET_GRAD_ENABLED, base_of, is_registered, tensors_in

QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "is_leaf", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "ndim", "is_cuda")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.data_ptr),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.element_size),
    SET_GRAD_ENABLED,
}
"""What is asked most, at times of ghost's own, and answered with no tensor."""


def is_attribute(func: Any) -> bool:
    """Tell whether a function gets an attribute, such as a shape, that is no view of a tensor."""
    # Those of torch's own and of properties are bound methods of C.
    if type(func) is not MethodWrapperType or func.__name__ != "__get__":
        return False
    return getattr(func.__self__, "__name__", "") not in ("T", "mT", "H", "mH")


def is_in_place(func: Any) -> bool:
    """Tell whether the result of an operation is not what it returns."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def operation(func: Any) -> str:
    """Return the name of one of torch's operations, which tells what it does; else nothing.

    Operations that anyone adds to `torch.ops` may have the same names, and do something else.
    """
    return "" if is_registered(func) else getattr(func, "__name__", "")


def results(func: Any, args: Sequence[Any], result: Any) -> Sequence[Tensor]:
    """Return what came of an operation: what it returned, or wrote to, views' bases included."""
    if not is_in_place(func) or not args or not isinstance(args[0], Tensor):
        return tensors_in(result)
    base = base_of(args[0])
    return [args[0]] if base is None else [args[0], base]


def named(func: Any) -> str:
    """Return the name of a function, for messages."""
    return str(getattr(func, "__qualname__", None) or getattr(func, "__name__", func))

"""Modes of torch, and what keeps its compiler from ghost's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import (
    BuiltinFunctionType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.torch_version import TorchVersion
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from ghost_core.restoring import restored, undo

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Result = TypeVar("_Result")


def uncompiled(function: _Function) -> _Function:
    """Make a function one that torch's compiler leaves alone, whatever runs it. Torch 2.11.

    `torch.compiler.disable` imports the compiler, which takes seconds; this waits for others to.
    """
    disabled: list[Any] = []

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # What `compiles` asks first, without a call where nothing was ever compiled.
        looked_at = torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules
        if not looked_at or not compiles():
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch._dynamo.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(_Function, run)


_CALLBACK_IS_KNOWN = TorchVersion(torch.__version__) >= "2.13"


def compiles() -> bool:
    """Tell whether torch's compiler looks at the functions that are called now. Torch 2.13.

    What keeps it from one takes as long as a small operation. Where it looks, it finds that it
    does and nothing private, nor `sys.modules`, of which it would guard every name. Older versions
    than those that were looked at may count references to what this reads wrongly; there it always
    may.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    if not _CALLBACK_IS_KNOWN:
        return True
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def caller_of(frame: FrameType | None) -> str:
    """Return the module whose code called what an `uncompiled` function is, by its frame."""
    frame = None if frame is None else frame.f_back
    while frame is not None:
        name: str = frame.f_globals.get("__name__", "")
        if name != __name__ and not name.startswith("torch._dynamo"):
            return name
        frame = frame.f_back
    return ""


class DispatchMode(TorchDispatchMode):
    """A mode that sees every operation and does not import torch's compiler to do so.

    `TorchDispatchMode` wraps `__torch_dispatch__` to keep the compiler from compiling it, which
    imports all of the compiler, for seconds, at the first operation; unless `_should_skip_dynamo`
    says no, in torch 2.11. A compiled model runs uncompiled under a mode.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]
        cls.__torch_dispatch__ = uncompiled(cls.__torch_dispatch__)  # type: ignore[method-assign]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def only_own_modes() -> bool:
    """Tell whether there are no dispatch modes but ghost's. Torch 2.11."""
    if not torch._C._len_torch_dispatch_stack():  # asked for at each call of a module
        return True
    modes: list[Any] = _python_dispatch._get_current_dispatch_mode_stack()
    return all(isinstance(mode, DispatchMode) for mode in modes)


@contextmanager
def foreign_modes_left() -> Iterator[None]:
    """Leave dispatch modes that are not ghost's: what a checkpoint keeps is not ghost's to change.

    Modes of torch's own machinery, which stand in for tensors or trace, stay. Torch 2.11.
    """
    modes: list[Any] = _python_dispatch._get_current_dispatch_mode_stack()
    if only_own_modes() or any(mode.is_infra_mode() for mode in modes):
        yield
        return
    with _python_dispatch._disable_current_modes():
        yield


def own_mode_left() -> AbstractContextManager[None]:
    """Leave a dispatch mode of ghost's that is on top: it watches the user's passes. Torch 2.11."""
    if not torch._C._len_torch_dispatch_stack():
        return _NOTHING_TO_LEAVE
    mode = _python_dispatch._get_current_dispatch_mode()
    return _left(mode) if isinstance(mode, DispatchMode) else _NOTHING_TO_LEAVE


_NOTHING_TO_LEAVE = nullcontext()


def unwatched(function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function outside of a dispatch mode of ghost's that is on top. Torch 2.11."""
    if not torch._C._len_torch_dispatch_stack():  # asked for at each gradient of a module
        return function(*args)
    with own_mode_left():
        return function(*args)


@contextmanager
def _left(mode: DispatchMode) -> Iterator[None]:
    with restored() as stack:
        undo(stack, _enter_again, mode)
        _python_dispatch._pop_mode()
        yield


def _enter_again(mode: DispatchMode) -> None:
    """Put a mode on top again, unless it is there."""
    if _python_dispatch._get_current_dispatch_mode() is not mode:
        _python_dispatch._push_mode(mode)


class FunctionMode(TorchFunctionMode):
    """A mode of ghost's that sees every function of torch, attributes of tensors included."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__torch_function__ = uncompiled(cls.__torch_function__)  # type: ignore[method-assign]


def function_modes() -> list[Any]:
    """Return the modes that see functions of torch, the innermost last. Torch 2.11."""
    modes: list[Any] = _get_current_function_mode_stack()
    return modes


def is_registered(function: Any) -> bool:
    """Tell whether a function is one of `torch.ops`, which anyone may add to. Torch 2.11."""
    if type(function) in _OF_PYTHON:  # as nearly all are; the others are looked up as abstract
        return False
    return isinstance(function, torch._ops.OperatorBase | torch._ops.OpOverloadPacket)


_OF_PYTHON = frozenset(
    {
        BuiltinFunctionType,
        FunctionType,
        MethodDescriptorType,
        MethodType,
        MethodWrapperType,
        WrapperDescriptorType,
    }
)
"""Types of functions that no class of torch's derives from."""


def seen_by_none() -> AbstractContextManager[None]:
    """Let no function mode see what is called meanwhile. Torch 2.11."""
    guard: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return guard


SET_GRAD_ENABLED: Callable[[bool], None] = torch._C._set_grad_enabled
"""What `torch.no_grad` and the like call, as modes see it. Torch 2.11."""


def unseen(function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function of ghost's own, of which no mode of ghost's sees anything. Torch 2.11.

    Modes of others stay on, and then ghost's too. Put back twice, since an interrupt may end the
    first; see `ghost_core.restoring`.
    """
    modes = torch._C._len_torch_function_stack()  # asked for at each call of a module
    if not modes:
        return function(*args)
    for at in range(modes):
        if not isinstance(torch._C._get_function_stack_at(at), FunctionMode):
            return function(*args)
    guard = torch._C.DisableTorchFunction()
    try:
        try:
            guard.__enter__()
            return function(*args)
        finally:
            guard.__exit__(None, None, None)
    finally:
        guard.__exit__(None, None, None)

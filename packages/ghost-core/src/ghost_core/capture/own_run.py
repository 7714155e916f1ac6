"""Answers what requires gradients, while a model is frozen, as if it were not."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ghost_core._torch import FunctionMode, caller_of, in_function, tensors_in
from ghost_core.capture.fused import FusedModules
from ghost_core.capture.state import CaptureState
from ghost_core.errors import CaptureError

_ASKED = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]

_CUT = ("detach", "data", "grad", "empty", "zeros", "ones", "full", "rand", "new_")
"""How names of functions begin that return what requires no gradients, whatever they are given."""


class OwnRun(FunctionMode):
    """Answers code that asks what requires gradients as if no parameter were frozen.

        y = self.layer(x)
        if self.layer.weight.requires_grad: ...   what it was before parameters were frozen
        if y.requires_grad: ...                   yes: it comes from a trainable parameter
        if Own.apply(y).requires_grad: ...        no mode sees what such a function does: refused

    That it is on keeps torch's fused modules from the way that they have for what requires no
    gradients. It is on, and follows values, in the first pass and in all that are watched; in all
    others as far as code asked before.

    Args:
        model: The root module, its parameters frozen.
        state: What the hooks on it share.
        on: Whether to be on in all passes.
        follows: Whether to follow values in all passes.
    """

    def __init__(self, model: nn.Module, state: CaptureState, *, on: bool, follows: bool) -> None:
        super().__init__()
        self._model, self._state = model, state
        self._always_on, self._always_follows, self._follows = on, follows, True
        self._flags = {id(parameter): flag for parameter, flag in state.flags.items()}
        self._first = True
        self._would: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._on = ExitStack()

    @classmethod
    def of(cls, state: CaptureState, fused: FusedModules) -> OwnRun:
        """Return what answers for the model of a state, whose parameters are frozen."""
        return cls(state.model, state, on=fused.present, follows=fused.any_plain)

    def start(self, inputs: Any) -> None:
        """Be on from now on, if code may ask.

        Args:
            inputs: What the model is called on.
        """
        watches = self._first or self._state.verifier.watching
        self._follows = watches or self._always_follows
        if self._follows:
            self.note((inputs, list(self._model.buffers())), would=False)
        if self._follows or self._always_on:
            self._on.enter_context(self)
        self._first = False

    def stop(self) -> None:
        """Be off, also where a pass was cut short."""
        self._on.close()
        self._would.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and note whether what it returns would require gradients."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._state.paused or not (self._follows or func == _ASKED):
            return result
        if func == _ASKED:
            own = caller_of(sys._getframe()).startswith("ghost_")
            return result if own or result else self._answer(args[0])
        would = self.would((args, kwargs))
        if would is not False:
            if func.__name__.startswith(_CUT):
                would = False
            elif not torch.is_grad_enabled():  # a function of autograd's returns what it made
                would = None if in_function() else False
        self.note((result, args[:1] if would and result is None else ()), would=would)
        return result

    def note(self, values: Any, *, would: bool | None) -> None:
        """Note whether tensors would require gradients; None where nobody knows."""
        for value in tensors_in(values):
            if not value.is_floating_point() and not value.is_complex():
                self._would[value] = False
            elif would is None:
                self._would.pop(value, None)
            else:
                self._would[value] = would or value.requires_grad

    def would(self, values: Any) -> bool | None:
        """Tell whether any of some tensors would require gradients; None where nobody knows."""
        answers = [self._told(value) for value in tensors_in(values)]
        return True if any(answers) else None if None in answers else False

    def _told(self, value: Tensor) -> bool | None:
        if value.requires_grad:
            return True
        flag: bool | None = self._flags.get(id(value), self._would.get(value))
        return flag

    def _answer(self, asked: Tensor) -> bool:
        """Answer for a tensor that does not require gradients while the model is frozen.

        Raises:
            CaptureError: If nobody knows.
        """
        answer = self._told(asked)
        if answer is None and (asked.is_floating_point() or asked.is_complex()):
            raise CaptureError(
                f"{self._asking()} asks whether a value requires gradients, and under frozen() "
                "nothing tells what the answer is without it",
                reason="the value comes from something that is seen by no function mode of torch",
                remedy="attach by `with engine:` instead of frozen()",
            )
        self._always_on |= bool(answer)
        self._always_follows |= bool(answer) and id(asked) not in self._flags
        return bool(answer)

    def _asking(self) -> str:
        """Return the label of the module whose code runs."""
        names = {id(module): name for name, module in self._model.named_modules()}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if id(module) in names:
                return f"{names[id(module)] or '(root)'} ({type(module).__name__})"
            frame = frame.f_back
        return "the model"

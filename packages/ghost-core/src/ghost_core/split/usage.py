"""Watches a forward pass for operations that would make gradients, or training, wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ghost_core._torch import DispatchMode, address, in_backward, in_function, tensors_in
from ghost_core.split.refusals import misused_row, unfit_row, used_outside
from ghost_core.tracking import TrackedModule

_CAST = torch.ops.aten._to_copy.default

_BROADCASTING = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.sub_.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.mul_.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.div_.Tensor,
}
"""Operations whose result is the same whether one row is broadcast or expanded before."""

_PLAIN = {"aten", "prims", "c10d", "_c10d_functional", "fsdp"}
"""Namespaces of operations that are no functions with a backward pass of their own."""


class UsageMode(DispatchMode):
    """Reports operations that make per-sample gradients, or the training itself, wrong.

    These are operations on a tracked parameter outside a module that owns it, and operations on an
    output of one row, expanded to N, other than to combine it once with a value of N rows:

        h + p[None]        p is `[1, T, d]` expanded to `[N, T, d]`: the sum is the same
        (p * p)[None] + h  the product is not: its gradient is summed in another order
        h + p; h - p       nor are two uses, for the same reason

    Args:
        parameters: The tracked parameters by name.
        owned: Returns the names that the innermost running tracked module owns.
        frozen: Whether parameters are frozen for the time being, so that `requires_grad` does not
            tell whether a use of one would have a gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        owned: Callable[[], frozenset[str]],
        frozen: bool,
    ) -> None:
        super().__init__()
        self._owned = owned
        self._frozen = frozen
        self._names: dict[int, list[tuple[range, str]]] = {}
        for name, parameter in parameters.items():
            self._know(parameter, name)
        self._expanded: dict[int, TrackedModule] = {}
        self._used: set[int] = set()
        self._computed: list[tuple[Tensor, frozenset[str]]] = []
        self._alive: list[Tensor] = []  # so that their addresses are not given away
        self.outside: dict[str, str] = {}
        """Operation by name of the parameter that it used outside."""
        self.inside: dict[str, str] = {}
        """The same for operations inside of custom functions, until these are followed."""
        self.shared: dict[str, str] = {}
        """Operation by label of the module whose single row it used."""

    def watch(self, output: Tensor, tracked: TrackedModule) -> None:
        """Watch what becomes of a module's output that was expanded from one row."""
        self._expanded[address(output)] = tracked
        self._alive.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it touched."""
        kwargs = kwargs or {}
        backward = in_backward()  # where operations are many, and nothing is noted
        found = [] if backward else tensors_in((args, kwargs))
        given = [(each, at) for each in found if (at := address(each))]
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            for value in tensors_in((args, kwargs)):
                if tracked := self._expanded.get(address(value)):
                    raise unfit_row(tracked, func) from error
            if self.shared:  # sizes that only the expansion made differ
                raise misused_row(self.shared) from error
            raise
        differentiable = torch.is_grad_enabled()
        for value, at in given:
            if at in self._names:
                self._see_parameter(value, at, func, result, differentiable)
            if differentiable and at in self._expanded:
                self._see_expanded(at, func, [each for each, _ in given], result)
        return result

    def _see_parameter(
        self, value: Tensor, at: int, func: Any, result: Any, differentiable: bool
    ) -> None:
        """Note an operation on a parameter, or a part of one, outside of its modules.

        Without gradients, nothing is missed, unless a function makes them in its own way.
        """
        # What is detached has no gradient to miss.
        if func is torch.ops.aten.detach.default or not (value.requires_grad or self._frozen):
            return
        extent = _extent(value)  # parameters may be parts of one buffer
        names = [
            name
            for other, name in self._names[at]
            if extent.start < other.stop and other.start < extent.stop
        ]
        hidden = bool(names) and not differentiable
        if hidden and not _has_own_backward(func):
            return
        if names and self._owned().isdisjoint(names):
            seen = self.inside if hidden and in_function() else self.outside
            seen.setdefault(names[0], str(func))
        if names and func is _CAST:  # autocast uses a copy in place of the weight
            self._alive.append(result)
            for name in names:
                self._know(result, name)

    def _see_expanded(self, at: int, func: Any, given: list[Tensor], result: Any) -> None:
        """Note an operation on an expanded row that would differ without the expansion."""
        tracked = self._expanded[at]
        first = at not in self._used
        self._used.add(at)
        if first and func is _CAST:
            self.watch(result, tracked)
        elif not first or not self._is_broadcast(func, given, result):
            self.shared.setdefault(tracked.label, str(func))

    def _is_broadcast(self, func: Any, given: list[Tensor], result: Any) -> bool:
        """Tell whether an operation combines expanded rows with a value of as many rows."""
        return func in _BROADCASTING and any(
            other.dim() == result.dim() and other.shape[0] == len(result)
            for other in given
            if address(other) not in self._expanded
        )

    def _know(self, parameter: Tensor, name: str) -> None:
        if at := address(parameter):
            self._names.setdefault(at, []).append((_extent(parameter), name))

    def know(self, value: Tensor, names: frozenset[str]) -> None:
        """Take what was computed from parameters for a part of them."""
        if address(value) not in self._names:
            self._computed.append((value, names))
            for name in names:
                self._know(value, name)

    def used_outside(self, names: frozenset[str]) -> bool:
        """Tell whether parameters, or what was computed from them, were used outside."""
        return not names.isdisjoint(self.outside.keys() | self.inside.keys())

    def forget(self, names: frozenset[str]) -> None:
        """Forget what was computed from parameters, and where they were used."""
        for value, known in self._computed:
            if known & names:
                self._names.pop(address(value), None)
        self._computed = [each for each in self._computed if not each[1] & names]
        self.outside = {name: at for name, at in self.outside.items() if name not in names}
        self.settle(names)

    def settle(self, names: Iterable[str]) -> None:
        """Take note that the custom functions which parameters went into are followed."""
        for name in names:
            self.inside.pop(name, None)

    def check_returned(self, output: Any) -> None:
        """Note values of one row for all samples that the model returns."""
        for leaf in tensors_in(output):
            if (tracked := self._expanded.get(address(leaf))) is not None:
                self.shared.setdefault(tracked.label, "returned by the model")

    def check(self) -> None:
        """Raise if there is anything to report.

        Raises:
            WrongSplitError: Naming modules, parameters and operations.
        """
        if self.shared:
            raise misused_row(self.shared)
        if self.outside or self.inside:
            raise used_outside(self.inside | self.outside)


def _has_own_backward(func: Any) -> bool:
    """Tell whether an operation without gradients is part of a function that makes its own.

    Those of other libraries than torch may be: a function in C++ is seen nowhere else.
    """
    return func.namespace not in _PLAIN or in_function()


def _extent(tensor: Tensor) -> range:
    """Return the elements of its storage that a tensor spans."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    return range(tensor.storage_offset(), tensor.storage_offset() + length)

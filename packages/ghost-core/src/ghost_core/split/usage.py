"""Watches a forward pass for operations that would make gradients, or training, wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghost_core.errors import WrongSplitError
from ghost_core.hooks import in_backward
from ghost_core.tracking import TrackedModule

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


class UsageMode(TorchDispatchMode):
    """Reports operations that make per-sample gradients, or the training itself, wrong.

    These are operations on a tracked parameter outside a module that owns it, and operations on an
    output of one row, expanded to N, other than to combine it with a value of N rows.

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
        self._casts: list[Tensor] = []  # kept, so that their addresses are not given away
        self.outside: dict[str, str] = {}
        """Operation by name of the parameter that it used outside."""
        self.shared: dict[str, str] = {}
        """Operation by label of the module whose single row it used."""
        self._expanded: dict[int, TrackedModule] = {}
        self._uses: dict[int, int] = {}

    def watch(self, output: Tensor, tracked: TrackedModule) -> None:
        """Watch what becomes of a module's output that was expanded from one row."""
        self._expanded[_address(output)] = tracked
        self._uses[_address(output)] = 0
        self._casts.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it touched."""
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            for value in self._expanded_among((args, kwargs)):
                raise _does_not_fit(self._expanded[_address(value)], func) from error
            raise
        if not torch.is_grad_enabled() or in_backward():
            return result
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self._touch(value, func, result)
                source = self._expanded.get(_address(value))
                if source is not None and not self._is_broadcast(value, func, args, result):
                    self.shared.setdefault(source.label, str(func))
        return result

    def _expanded_among(self, values: Any) -> list[Tensor]:
        return [
            value
            for value in tree_leaves(values)
            if isinstance(value, Tensor)
            and value.layout is torch.strided
            and _address(value) in self._expanded
        ]

    def _is_broadcast(self, value: Tensor, func: Any, args: Any, result: Any) -> bool:
        """Tell whether an operation combines an expanded row with a value of as many rows.

        Just one may: gradients of several would be summed in another order than without ghost.
        """
        self._uses[_address(value)] += 1
        if self._uses[_address(value)] > 1:
            return False
        if func is torch.ops.aten._to_copy.default:
            tracked = self._expanded[_address(value)]
            self.watch(result, tracked)
            return True
        others = [
            other
            for other in tree_leaves(args)
            if isinstance(other, Tensor)
            and other.layout is torch.strided
            and _address(other) not in self._expanded
        ]
        return func in _BROADCASTING and any(
            other.dim() == result.dim() and other.shape[0] == len(result) for other in others
        )

    def _know(self, parameter: Tensor, name: str) -> None:
        if parameter.numel():
            address = _address(parameter)
            self._names.setdefault(address, []).append((_extent(parameter), name))

    def _touch(self, value: Tensor, func: Any, result: Any) -> None:
        known = self._names.get(_address(value))
        if known is None or not value.numel() or not (value.requires_grad or self._frozen):
            return
        if func is torch.ops.aten.detach.default:  # what is detached has no gradient to miss
            return
        extent = _extent(value)  # parameters may be parts of one buffer
        names = [
            name for other, name in known if extent.start < other.stop and other.start < extent.stop
        ]
        if names and self._owned().isdisjoint(names):
            self.outside.setdefault(names[0], str(func))
        if func is torch.ops.aten._to_copy.default:  # autocast uses a copy in place of the weight
            self._casts.append(result)
            for name in names:
                self._know(result, name)

    def check_returned(self, output: Any) -> None:
        """Note values of one row for all samples that the model returns."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                source = self._expanded.get(_address(leaf))
                if source is not None:
                    self.shared.setdefault(source.label, "returned by the model")

    def check(self) -> None:
        """Raise if there is anything to report.

        Raises:
            WrongSplitError: Naming modules, parameters and operations.
        """
        if self.shared:
            uses = "\n".join(f"  {label}: {operation}" for label, operation in self.shared.items())
            raise WrongSplitError(
                "these modules compute one row for all samples, and their output is not just "
                f"added once to a value of one row per sample:\n{uses}",
                reason="the part of each sample in their gradient cannot be told",
                remedy="expand their input to one row per sample, or leave them out with "
                "exclude=...",
            )
        if not self.outside:
            return
        uses = "\n".join(f"  {name}: {operation}" for name, operation in self.outside.items())
        raise WrongSplitError(
            f"parameters are used outside the modules that own them:\n{uses}",
            reason="their per-sample gradients cannot be seen there",
            remedy=f"leave them out with exclude={','.join(self.outside)!r}, call the owning "
            "module inside the model instead of using its parameter, or compute penalties on "
            "parameters outside of engine.batch()",
        )


def _does_not_fit(tracked: TrackedModule, func: Any) -> WrongSplitError:
    return WrongSplitError(
        f"{tracked.label} computed one row for all samples, which does not fit what {func} "
        "combines it with once there is one for each sample",
        reason="rows there are not samples",
        remedy="say which sample each row belongs to, with "
        f"row_owner={{{tracked.name!r}: key}}, or leave the module out with exclude=...",
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> range:
    """Return the elements of its storage that a tensor spans."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    return range(tensor.storage_offset(), tensor.storage_offset() + length)

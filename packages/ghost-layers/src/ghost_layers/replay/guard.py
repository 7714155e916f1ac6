"""Watches a call that runs again, which may touch nothing of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import WrongSplitError
from ghost_core._torch import DispatchMode, address, tensors_in, written_by


class Guard(DispatchMode):
    """Watches a call that runs again for uses of the user's own tensors.

    It may write only into what it makes itself. A call `x.mul_(scale)` on an input writes, one
    `y = x + 1; y.mul_(scale)` writes too, but into what it made, and `self.cache[0] * x` uses the
    user's own parameter in place of the copy that it was given:

        x.mul_(scale)       writes to an address that no operation returned: refused
        y.mul_(scale)       y's address was returned by an addition: runs
        self.cache[0] * x   reads the address of the user's scale: refused

    Args:
        parameters: The parameters that copies were given for, by name.
        aliases: The copies given to modules inside that share these parameters, by name.
        differentiable: Whether what runs is to be differentiated, which a kernel of recurrent
            layers asks for.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        aliases: Mapping[str, Tensor],
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._differentiable = differentiable
        self._names = {address(tensor): name for name, tensor in parameters.items()}
        self._aliases = {address(tensor): name for name, tensor in aliases.items()}
        self._made: set[int] = {0}
        self._depth = 0

    def enter_with(self, module: nn.Module) -> None:
        """Let a copy of a module use what it shares while it runs: ghost sees that by itself."""

        def enter(*_: Any) -> None:
            self._depth += 1

        def leave(*_: Any) -> None:
            self._depth -= 1

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, if it may run."""
        kwargs = kwargs or {}
        given = {address(value) for value in tensors_in((args, kwargs))} - {0}
        for place in given:
            self._check_use(place, func)
        for written in written_by(func, args, kwargs):
            if {address(value) for value in tensors_in(written)} - self._made:
                raise writes(func)
        # Modes below are for the user's own passes; autograd is done with the operation.
        kernel = self._differentiable and func is torch.ops.aten.mkldnn_rnn_layer.default
        with torch.set_grad_enabled(kernel):
            result = func(*args, **kwargs)
        made = {address(value) for value in tensors_in(result)}
        self._made |= made if func is torch.ops.aten.lift_fresh.default else made - given
        return result

    def _check_use(self, place: int, func: Any) -> None:
        if name := self._names.get(place):
            raise WrongSplitError(
                reason=f"its code keeps {name} in another place than its parameters, so that it "
                f"cannot be run with a copy ({func})",
                remedy=f"use the parameter itself, self.{name}, in forward",
            )
        if not self._depth and (name := self._aliases.get(place)):
            raise WrongSplitError(
                reason=f"it uses {name}, a parameter that it owns under another name, outside of "
                f"the module inside that has it ({func})",
                remedy="use its own name for it, or call that module",
            )


def writes(how: object) -> WrongSplitError:
    """Return the error for a call that changes what is not its own, and how that showed."""
    return WrongSplitError(
        reason="it writes into its inputs, its parameters or tensors that it keeps "
        f"({how}), which are not what they were before the call",
        remedy="use operations that are not in place, and buffers for what it keeps",
    )

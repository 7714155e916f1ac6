"""Lets torch's fused modules run as they do without ghost, whatever modes are on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ghost_core._torch import FunctionMode, function_modes, seen_by_none
from ghost_core.model_hooks import Hook

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class FusedModules:
    """Torch's transformer modules, which run other code for what requires no gradients.

    It returns zeros at padding, and it is taken in evaluation mode where neither the parameters nor
    the inputs require gradients, and no function mode is on. So a mode of ghost's keeps all of them
    from it, and those that would take it without ghost run as if there were none:

        trainable, under frozen()            not fused without ghost, nor with it
        frozen by the user, on plain inputs  fused without ghost: hooks see to it that it is
        frozen by the user, behind others    not fused without ghost, nor with it
        any, under torch.no_grad()           fused without ghost: hooks see to it that it is

    Args:
        model: The root module.
        trainable: Tells whether a parameter is, unless ghost froze it.
        would: Tells whether any of some values requires gradients, unless ghost froze something.
        note: Is told on what a call was that no mode saw, and what came of it.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Callable[[nn.Parameter], bool],
        would: Callable[[Any], bool | None],
        note: Callable[[Any, Any], None],
    ) -> None:
        found = [module for module in model.modules() if isinstance(module, _FUSED)]
        self.present = bool(found)
        """Whether there are any."""
        self._trains: dict[nn.Module, bool] = {
            each: any(map(trainable, each.parameters())) for each in found
        }
        self.any_plain = not all(self._trains.values())
        """Whether any has no trainable parameter, so that its inputs decide."""
        self._would, self._note = would, note
        self._running: list[tuple[int, nn.Module, ExitStack]] = []

    def install(self) -> Iterator[RemovableHandle]:
        """Put hooks on them, those of tracked modules come later."""
        for module in self._trains:
            yield module.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
            yield module.register_forward_hook(
                Hook(self._after), prepend=True, with_kwargs=True, always_call=True
            )

    def stop(self) -> None:
        """End calls that were cut short."""
        while self._running:
            self._running.pop()[2].close()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        modes = function_modes()
        if not modes or not all(isinstance(mode, FunctionMode) for mode in modes):
            return
        if torch.is_grad_enabled() and (
            self._trains[module] or self._would((args, kwargs)) is not False
        ):
            return
        self._running.append((get_ident(), module, ExitStack()))
        self._running[-1][2].enter_context(seen_by_none())

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._running and self._running[-1][:2] == (get_ident(), module):
            self._running.pop()[2].close()
            self._note((args, kwargs), output)

"""Tells which gradients were thrown away before a step could use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_core._torch import backward_id

Filled = dict[str, Tensor]
"""Whether a gradient is anything but zero, a scalar each; parameters without one are left out."""


class Discards:
    """Compares gradients with those that the last batch left behind.

    Which tensor holds a gradient tells nothing: DDP and hooks put it into another. What is in it
    does: `zero_grad` leaves None or zeros where there was more. What a backward pass added to is
    gone for good, so gradients are looked at before it adds to them.

    Nothing here waits for a GPU while the batch runs.

    Args:
        parameters: Returns the parameters by name, as the optimizer holds them.
    """

    def __init__(self, parameters: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        self._find = parameters
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._left: Filled = {}
        self._found: Filled = {}
        self._passes: dict[str, int] = {}
        self._torn: set[str] = set()

    def start(self) -> set[str]:
        """Begin a batch; return the parameters whose gradients were thrown away since the last."""
        self._parameters = self._find()
        self._found, self._passes, self._torn = {}, {}, set()
        return self.lost()

    def lost(self) -> set[str]:
        """Return the parameters whose gradients were thrown away since the last batch."""
        return self._forget(_lost(self._left, self._now(self._left))) if self._left else set()

    def arriving(self, name: str) -> None:
        """Look at a gradient that a backward pass is about to add to."""
        running = backward_id()
        before = self._passes.get(name)
        if before == running:
            return  # another use of the parameter: nothing was added yet
        self._passes[name] = running
        gradient = self._parameters[name].grad
        if before is not None:
            if gradient is None:
                self._torn.add(name)
        elif gradient is not None and name in self._left:
            self._found[name] = _filled(gradient)

    def end(self) -> tuple[set[str], set[str]]:
        """End a batch.

        Returns:
            The parameters whose earlier gradients were thrown away before the batch added to them,
            and those that the batch has left a gradient for.

        Raises:
            CaptureError: If a gradient of the batch itself is not where it arrived.
        """
        training = {name: p for name, p in self._parameters.items() if p.requires_grad}
        now = self._now(training)
        self._check_kept(training.keys(), now)
        untouched = {name: now[name] for name in now.keys() - self._passes.keys()}
        lost = _lost(self._left, untouched | self._found) if self._left else set()
        self._left = now
        return lost, set(now)

    def forget(self) -> None:
        """Begin anew after a step: nothing that is left has to be looked at."""
        self._left = {}

    def _check_kept(self, training: Set[str], now: Filled) -> None:
        if gone := training & (self._torn | (self._passes.keys() - now.keys())):
            raise CaptureError(
                f"gradients of {', '.join(sorted(gone))} were taken out of .grad inside the batch",
                reason="nobody can tell whether a step will be made with them",
                remedy="call zero_grad before the first backward pass of a batch, and close the "
                "batch before gradients are moved elsewhere",
            )

    def _now(self, names: Iterable[str]) -> Filled:
        gradients = {name: self._parameters[name].grad for name in names}
        return {name: _filled(grad) for name, grad in gradients.items() if grad is not None}

    def _forget(self, names: set[str]) -> set[str]:
        self._left = {name: each for name, each in self._left.items() if name not in names}
        return names


def _lost(before: Filled, after: Filled) -> set[str]:
    """Return the names whose gradients are gone.

    Zeros that were zeros before tell nothing by themselves: they go with the others.
    """
    were, are = _names(before), _names(after)
    lost = (before.keys() - after.keys()) | (were - are)
    return set(before) if lost >= were and lost else lost


def _names(filled: Filled) -> set[str]:
    """Return the names of gradients that are not zero; the one place that waits for a GPU."""
    if not filled:
        return set()
    device = next(iter(filled.values())).device
    flags = torch.stack([each.to(device, non_blocking=True) for each in filled.values()]).tolist()
    return {name for name, flag in zip(filled, flags, strict=True) if flag}


def _filled(gradient: Tensor) -> Tensor:
    with torch.no_grad():
        return gradient.any()

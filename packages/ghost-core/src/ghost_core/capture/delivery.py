"""Takes the gradients of one tracked call to the engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_core.algebra import Owned, PerSampleGradient, Record, full_precision
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.listener import Listener, Pass
from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.sampler import Call
from ghost_core.split import Fold, Layout, Verifier, unclear_fold
from ghost_core.tracking import Site, TrackedModule


@dataclass
class View:
    """How some of the engines keep the records of a call.

    Attributes:
        listeners: The engines that share it.
        records: Records by local name, without their tensors.
        layout: Position of each tensor among the saved ones, by local name and field.
        whole: Whether records are as the sampler made them, not compressed.
    """

    listeners: list[Listener]
    records: dict[str, Record]
    layout: dict[str, dict[str, int]]
    whole: bool

    def restore(self, saved: Sequence[Tensor]) -> dict[str, Record]:
        """Put the saved tensors back into their records."""
        return {
            name: record.replace(**{key: saved[at] for key, at in self.layout[name].items()})
            for name, record in self.records.items()
        }


@dataclass
class Arrival:
    """Receives the gradients of one tracked call.

    Attributes:
        verifier: Takes the gradients instead while it probes.
        batch: The batch of the call.
        pass_: The pass of the call; None if the call is a recomputation.
        tracked: The module.
        call: The call.
        layout: Where its outputs have their rows.
        views: How the engines keep its records.
        made: Local names of the parameters whose gradients an engine makes.
        silence: Keeps ghost's hooks from seeing what a sampler runs.
    """

    verifier: Verifier
    batch: BatchCapture
    pass_: Pass | None
    tracked: TrackedModule
    call: Call
    layout: Layout
    views: list[View]
    made: tuple[str, ...]
    silence: Callable[[], AbstractContextManager[None]]

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.call.name

    def arrive(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Hand the gradients to the engines and return the parameters' gradients they made."""
        if self.verifier.probe is not None:
            self.verifier.probe.see(self.call.name, self.layout, self.layout.rows_first(grads))
            return [None] * len(self.made)
        if not self.verifier.is_training:
            return [None] * len(self.made)
        if self.pass_ is None:
            raise CaptureError(
                f"{self.call.name} was recomputed by reentrant activation checkpointing, which "
                "hides calls from the graph: use torch.utils.checkpoint with use_reentrant=False"
            )
        if self.batch.closed:
            raise CaptureError(
                f"a gradient reached {self.call.name} after its batch was closed: run backward() "
                "inside engine.batch()"
            )
        self.batch.arrived = True
        made = self._deliver(self.pass_, saved, grads)
        if missing := set(self.made) - set(made):
            raise CaptureError(f"no engine made the gradient of {self.call.name}.{missing.pop()}")
        return [made[local] for local in self.made]

    def _deliver(
        self, pass_: Pass, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        self.verifier.check_reached(self.tracked, self.layout.is_folded(pass_.n))
        with full_precision(_device(grads)):
            for at, view in enumerate(self.views):
                for site, local, gradient in self._gradients(pass_, view, saved, grads):
                    if self.batch.balance is not None and not at:
                        self.batch.balance.add(
                            site.parameter, gradient, self.call.autocast, view.whole
                        )
                    for listener in view.listeners:
                        still_open = listener in self.batch.listeners
                        if still_open and site.parameter in listener.tracking.names:
                            result = listener.on_gradient(pass_, site, gradient)
                            if result is not None:
                                made[local] = result.to(site.dtype)
        return made

    def _gradients(
        self,
        pass_: Pass,
        view: View,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> list[tuple[Site, str, PerSampleGradient]]:
        """Return the per-sample gradients with their parameters and local names."""
        by_row = self.layout.rows_first(grads)
        owner = self._owner(pass_.n, by_row)
        with self.silence():
            gradients = self.tracked.sampler.gradients(self.call, view.restore(saved), by_row)
        self._check(gradients)
        return [
            (
                self.tracked.sites[local],
                local,
                gradient if owner is None else Owned(gradient, owner.to(_device(grads)), pass_.n),
            )
            for local, gradient in gradients.items()
        ]

    def _owner(self, n: int, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Return the sample of each row; None where each row is a sample."""
        if any(grad is not None and not grad.dim() for grad in grads):
            raise WrongSplitError(
                f"gradients cannot be split by sample: the loss depends on a scalar that "
                f"{self.tracked.label} returned",
                reason="a scalar belongs to all samples",
                remedy="compute the loss from outputs with one row per sample, or leave the "
                "module out with exclude=...",
            )
        if not self.layout.is_folded(n):
            return self.layout.owner
        fold = Fold.SAMPLE_MAJOR if n == 1 else self.verifier.fold(self.call.name)
        if fold is None:
            raise unclear_fold(self.tracked, True)
        return fold.owners(n, self.layout.rows)

    def _check(self, gradients: Mapping[str, PerSampleGradient]) -> None:
        n = self.layout.rows
        if gradients.keys() != self.call.shapes.keys():
            raise CaptureError(
                f"{type(self.tracked.sampler).__name__} returned gradients of "
                f"{sorted(gradients)} for {sorted(self.call.shapes)}"
            )
        for local, gradient in gradients.items():
            if gradient.n != n or gradient.shape != self.call.shapes[local]:
                raise CaptureError(
                    f"{type(self.tracked.sampler).__name__} returned {gradient.n} gradients of "
                    f"shape {tuple(gradient.shape)} for {self.call.name}.{local}, of shape "
                    f"{tuple(self.call.shapes[local])} and {n} rows"
                )


def _device(grads: Sequence[Tensor | None]) -> torch.device:
    return next(grad.device for grad in grads if grad is not None)


def keep(
    listeners: Sequence[Listener], tracked: TrackedModule, records: dict[str, Record]
) -> tuple[list[View], list[Tensor]]:
    """Let every engine keep records in its own way; equal ways share tensors and later work.

    Returns:
        The views, and the tensors to save for the backward pass.
    """
    positions: dict[int, int] = {}
    saved: list[Tensor] = []
    views: list[View] = []
    kept_by_view: list[dict[str, Record]] = []
    for listener in listeners:
        kept = {
            local: listener.on_input(tracked.sites[local], record)
            if tracked.sites[local].parameter in listener.tracking.names
            else record
            for local, record in records.items()
        }
        for view, other in zip(views, kept_by_view, strict=True):
            if all(kept[local] is other[local] for local in kept):
                view.listeners.append(listener)
                break
        else:
            kept_by_view.append(kept)
            whole = all(kept[local] is records[local] for local in kept)
            views.append(_pack(listener, kept, positions, saved, whole))
    return views, saved


def _pack(
    listener: Listener,
    records: dict[str, Record],
    positions: dict[int, int],
    saved: list[Tensor],
    whole: bool,
) -> View:
    """Take the tensors out of records and note where they are saved."""
    layout: dict[str, dict[str, int]] = {}
    empty: dict[str, Record] = {}
    for local, record in records.items():
        tensors = record.tensors()
        layout[local] = {}
        for key, tensor in tensors.items():
            if id(tensor) not in positions:
                positions[id(tensor)] = len(saved)
                # Detached: the Tap is no user of the value, and shares its version counter.
                saved.append(tensor.detach())
            layout[local][key] = positions[id(tensor)]
        empty[local] = record.replace(**dict.fromkeys(tensors))
    return View([listener], empty, layout, whole)

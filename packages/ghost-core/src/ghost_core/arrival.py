"""Takes the gradients of one tracked call to the engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ghost_core.capture import BatchCapture, Listener, Pass
from ghost_core.errors import CaptureError
from ghost_core.factors import Record
from ghost_core.gradients import PerSampleGradient
from ghost_core.numerics import full_precision
from ghost_core.sampler import Call
from ghost_core.tracking import TrackedModule
from ghost_core.verification import Verifier


@dataclass
class View:
    """How some of the engines keep the records of a call.

    Attributes:
        listeners: The engines that share it.
        records: Records by local name, without their tensors.
        layout: Position of each tensor among the saved ones, by local name and field.
    """

    listeners: list[Listener]
    records: dict[str, Record]
    layout: dict[str, dict[str, int]]

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
        views: How the engines keep its records.
        made: Local names of the parameters whose gradients an engine makes.
    """

    verifier: Verifier
    batch: BatchCapture
    pass_: Pass | None
    tracked: TrackedModule
    call: Call
    views: list[View]
    made: tuple[str, ...]

    def arrive(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Hand the gradients to the engines and return the parameters' gradients they made."""
        if self.verifier.probe is not None:
            self.verifier.probe.see(self.call.name, grads)
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
        device = next(grad.device for grad in grads if grad is not None)
        made: dict[str, Tensor] = {}
        with full_precision(device):
            for view in self.views:
                gradients = self.tracked.sampler.gradients(self.call, view.restore(saved), grads)
                self._check(gradients, pass_.n)
                for local, gradient in gradients.items():
                    site = self.tracked.sites[local]
                    for listener in view.listeners:
                        still_open = listener in self.batch.listeners
                        if still_open and site.parameter in listener.tracking.names:
                            result = listener.on_gradient(pass_, site, gradient)
                            if result is not None:
                                made[local] = result.to(site.dtype)
        return made

    def _check(self, gradients: Mapping[str, PerSampleGradient], n: int) -> None:
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
                    f"{tuple(self.call.shapes[local])} and {n} samples"
                )


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
            views.append(_pack(listener, kept, positions, saved))
    return views, saved


def _pack(
    listener: Listener,
    records: dict[str, Record],
    positions: dict[int, int],
    saved: list[Tensor],
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
    return View([listener], empty, layout)

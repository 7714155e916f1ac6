"""Takes the gradients of one tracked call from its Tap to the engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from ghost_core._torch import unseen
from ghost_core.algebra import Owned, PerSampleGradient, Record, full_precision, weighed
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.listener import Listener, Pass
from ghost_core.capture.refusals import arrived_late
from ghost_core.capture.state import Audience, CaptureState
from ghost_core.errors import CaptureError
from ghost_core.sampler import PastCall
from ghost_core.split import Balance, Site, owner_of_rows
from ghost_core.tracking import TrackedModule, TrackedParameter


@dataclass
class Kept:
    """How some of the engines keep the records of a call.

    Attributes:
        listeners: The engines that keep them in this way.
        records: Records by local name, without their tensors.
        places: Position of each tensor among the saved ones, by local name and field.
        whole: Whether records are as the sampler made them, not compressed.
    """

    listeners: list[Listener]
    records: dict[str, Record]
    places: dict[str, dict[str, int]]
    whole: bool

    def restore(self, saved: Sequence[Tensor]) -> dict[str, Record]:
        """Put the saved tensors back into their records."""
        return {
            name: record.replace(**{key: saved[at] for key, at in self.places[name].items()})
            for name, record in self.records.items()
        }


@dataclass
class Delivery:
    """The way of one call's gradients.

    Attributes:
        state: What the hooks on the model share.
        batch: The batch of the call.
        pass_: The pass of the call; None if the call is a recomputation.
        tracked: The module.
        call: What is left of the call.
        site: Where the call has its rows.
        kept: How the engines keep its records.
        made: Local names of the parameters whose gradients an engine makes.
        withheld: Whether autograd was kept from making them.
    """

    state: CaptureState
    batch: BatchCapture
    pass_: Pass | None
    tracked: TrackedModule
    call: PastCall
    site: Site
    kept: list[Kept]
    made: tuple[str, ...]
    withheld: bool

    def deliver(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Hand gradients to whom they are for, and return those of parameters that were made."""
        audience = self.state.audience
        if audience is Audience.ENGINES:
            return self._to_engines(saved, grads)
        if audience is Audience.PROBE:
            assert self.state.verifier.probe is not None
            unseen(self.state.verifier.probe.see, self.site, grads)
        return [None] * len(self.made)

    def _to_engines(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor]:
        pass_ = self._checked_pass()
        self.state.verifier.check_reached(self.tracked, self.site.axes.is_folded(pass_.n))
        self.state.verifier.look(self.call.name, saved, grads)
        if pass_.n and not self.site.axes.count:  # an expert that got no row, say
            shapes = [self.tracked.parameters[local] for local in self.made]
            return [
                torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in shapes
            ]
        made: dict[str, Tensor] = {}
        with full_precision(_device(grads)):
            for at, kept in enumerate(self.kept):
                gradients = self._gradients(pass_, kept, saved, grads)
                if not at:
                    gradients = self._weighed(gradients)
                with self.batch.told():
                    for local, parameter, result in self._heard(kept, pass_, gradients):
                        if local in self.made:
                            made[local] = self._returned(parameter, gradients[local], result)
                    if not at:
                        self._weigh(kept, gradients)
        if missing := set(self.made) - set(made):
            raise CaptureError(f"no engine made the gradient of {self._name(missing.pop())}")
        return [made[local] for local in self.made]

    def _returned(
        self, parameter: TrackedParameter, gradient: PerSampleGradient, made: Tensor
    ) -> Tensor:
        """Return what the Tap adds to a parameter's gradient, given what an engine made of it."""
        if self.withheld and self.state.balance is None:
            return made.to(parameter.dtype)
        correction = made - gradient.sum()
        if self.state.balance is not None:
            self.state.balance.correct(parameter.name, correction)
        return (made if self.withheld else correction).to(parameter.dtype)

    def _checked_pass(self) -> Pass:
        if self.pass_ is None:
            raise CaptureError(
                f"{self.tracked.label} was recomputed by reentrant activation checkpointing, which "
                "hides calls from the graph: use torch.utils.checkpoint with use_reentrant=False"
            )
        if self.batch.closed:
            raise arrived_late(self.tracked.label)
        return self.pass_

    def _weighed(
        self, gradients: Mapping[str, PerSampleGradient]
    ) -> Mapping[str, PerSampleGradient]:
        """Let what is compared in every batch be taken along where engines reduce gradients."""
        state, tracked = self.state, self.tracked
        compared = () if state.balance is None else self._compared(state.balance)
        always = [local for local in compared if state.compares_always(tracked, local)]
        if not always:
            return gradients
        return {**gradients, **{local: weighed(gradients[local]) for local in always}}

    def _compared(self, balance: Balance) -> list[str]:
        """Return the local names of parameters that are compared with what autograd makes."""
        given = self.tracked.parameters
        return [local for local in self.call.shapes if balance.compares(given[local].name)]

    def _weigh(self, kept: Kept, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Let gradients be compared with those that autograd makes."""
        balance = self.state.balance
        for local in () if balance is None else self._compared(balance):
            assert balance is not None
            balance.add(self._name(local), gradients[local], self.call.autocast, kept.whole)

    def _heard(
        self, kept: Kept, pass_: Pass, gradients: Mapping[str, PerSampleGradient]
    ) -> Iterator[tuple[str, TrackedParameter, Tensor]]:
        """Tell engines of gradients by local name, and yield what they make of each."""
        for local, gradient in gradients.items():
            parameter = self.tracked.parameters[local]
            for listener in kept.listeners:
                if listener in self.batch.listeners and parameter.name in listener.tracking.names:
                    result = listener.on_gradient(pass_, parameter, gradient)
                    if result is not None:
                        yield local, parameter, result

    def _gradients(
        self, pass_: Pass, kept: Kept, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Return the per-sample gradients by local name."""
        by_row = self.site.axes.rows_first(grads)
        fold = self.state.verifier.fold(self.call.name)
        owner = owner_of_rows(self.tracked, self.site, by_row, pass_.n, fold)
        with self.state.silence(), self.tracked.blame:
            gradients = self.tracked.sampler.gradients(self.call, kept.restore(saved), by_row)
        self._check(gradients)
        if owner is None:
            return gradients
        owner = owner.to(_device(grads))
        return {local: Owned(each, owner, pass_.n) for local, each in gradients.items()}

    def _check(self, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Raise if a sampler returned other gradients than it was asked for."""
        n, sampler = self.site.axes.count, type(self.tracked.sampler).__name__
        if gradients.keys() != self.call.shapes.keys():
            raise CaptureError(
                f"{sampler} returned gradients of {sorted(gradients)} for "
                f"{sorted(self.call.shapes)}"
            )
        for local, gradient in gradients.items():
            if gradient.n != n or gradient.shape != self.call.shapes[local]:
                raise CaptureError(
                    f"{sampler} returned {gradient.n} gradients of shape {tuple(gradient.shape)} "
                    f"for {self._name(local)}, of shape {tuple(self.call.shapes[local])} and "
                    f"{n} rows"
                )

    def _name(self, local: str) -> str:
        return self.tracked.parameters[local].name


def _device(grads: Sequence[Tensor | None]) -> torch.device:
    first = grads[0]  # as nearly all have that arrives
    return (
        next(grad.device for grad in grads if grad is not None) if first is None else first.device
    )


def keep(
    listeners: Sequence[Listener], tracked: TrackedModule, records: Mapping[str, Record]
) -> tuple[list[Kept], list[Tensor]]:
    """Let every engine keep records in its own way; equal ways share tensors and later work.

    Three engines and one record, of inputs `x [N, T, d]`:

        dot products, norms   x itself: one way for both, saved once
        projection            x mixed, [N, T, k]: another way

    Returns:
        How they are kept, and the tensors to save for the backward pass.
    """
    ways: list[tuple[dict[str, Record], list[Listener]]] = []
    for listener in listeners:
        chosen = {
            local: listener.on_input(tracked.parameters[local], record)
            if tracked.parameters[local].name in listener.tracking.names
            else record
            for local, record in records.items()
        }
        for other, sharing in ways:
            if all(map(is_, chosen.values(), other.values())):
                sharing.append(listener)
                break
        else:
            ways.append((chosen, [listener]))
    saved: list[Tensor] = []
    positions: dict[int, int] = {}
    kept: list[Kept] = []
    for chosen, sharing in ways:
        bare: dict[str, Record] = {}
        places: dict[str, dict[str, int]] = {}
        for local, record in chosen.items():
            tensors = record.tensors()
            bare[local] = record.replace(**dict.fromkeys(tensors))
            places[local] = _placed(tensors, positions, saved)
        whole = all(map(is_, chosen.values(), records.values()))
        kept.append(Kept(sharing, bare, places, whole))
    return kept, saved


def _placed(
    tensors: Mapping[str, Tensor], positions: dict[int, int], saved: list[Tensor]
) -> dict[str, int]:
    """Save the tensors of a record, each of them once, and return their places."""
    for tensor in tensors.values():
        if id(tensor) not in positions:
            positions[id(tensor)] = len(saved)
            # Detached: the Tap is no user of the value, and shares its version counter.
            saved.append(tensor.detach())
    return {key: positions[id(tensor)] for key, tensor in tensors.items()}

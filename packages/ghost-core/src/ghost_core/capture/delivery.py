"""Takes the gradients of one tracked call from its Tap to the engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from ghost_core._torch import unseen
from ghost_core.algebra import Dense, Owned, PerSampleGradient, Record, precisely, weighed
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.listener import Listener, Pass
from ghost_core.capture.refusals import arrived_late
from ghost_core.capture.silence import silently
from ghost_core.capture.state import Audience, CaptureState
from ghost_core.errors import CaptureError
from ghost_core.sampler import PastCall
from ghost_core.split import Site, owner_of_rows
from ghost_core.tracking import TrackedModule, TrackedParameter


@dataclass
class Kept:
    """How some of the engines keep the records of a call.

    Attributes:
        listeners: The engines that keep them in this way.
        records: Local names and records without their tensors, each with the position of these
            among the saved ones, by field.
        whole: Whether records are as the sampler made them, not compressed.
    """

    listeners: list[Listener]
    records: list[tuple[str, Record, dict[str, int]]]
    whole: bool

    def restore(self, saved: Sequence[Tensor]) -> dict[str, Record]:
        """Put the saved tensors back into their records."""
        restored: dict[str, Record] = {}
        for local, record, places in self.records:  # no comprehensions: it is done for each Tap
            tensors: dict[str, Tensor] = {}
            for key, at in places.items():
                tensors[key] = saved[at]
            restored[local] = record.replace(**tensors)
        return restored


@dataclass(slots=True, eq=False)
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
    ) -> Sequence[Tensor | None]:
        pass_, axes, verifier = self._checked_pass(), self.site.axes, self.state.verifier
        folded = axes.is_folded(pass_.n)
        verifier.check_reached(self.tracked, folded)
        verifier.look(self.call.name, saved, grads)
        if pass_.n and not axes.count:  # an expert that got no row, say
            shapes = [self.tracked.parameters[local] for local in self.made]
            return [
                torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in shapes
            ]
        device, by_row = _device(grads), axes.rows_first(grads)
        fold = verifier.fold(self.call.name) if folded else None
        owner = owner_of_rows(self.tracked, self.site, by_row, pass_.n, fold)
        owner = None if owner is None else owner.to(device)
        made = precisely(device, self._hand_over, pass_, saved, by_row, owner)
        return [self._made(local, made) for local in self.made] if self.made else ()

    def _hand_over(
        self,
        pass_: Pass,
        saved: Sequence[Tensor],
        by_row: Sequence[Tensor | None],
        owner: Tensor | None,
    ) -> Mapping[str, Tensor | None]:
        """Make gradients and tell the engines; return those of parameters that these made."""
        compared, made, unused = self._compared(), dict[str, Tensor](), set[str]()
        for at, kept in enumerate(self.kept):
            gradients = self._gradients(kept.restore(saved), by_row)
            unused.update(local for local in self.made if not _is_used(gradients[local]))
            if owner is not None:
                gradients = {
                    local: Owned(each, owner, pass_.n) for local, each in gradients.items()
                }
            weighs = compared and not at
            if weighs:
                gradients = self._weighed(gradients, compared)
            with self.batch.told():
                self._tell(kept.listeners, pass_, gradients, made)
                if weighs:
                    self._weigh(kept.whole, gradients, compared)
        return made | dict.fromkeys(unused)

    def _made(self, local: str, made: Mapping[str, Tensor | None]) -> Tensor | None:
        """Return the gradient of a parameter that an engine has to make."""
        if local not in made:
            raise CaptureError(f"no engine made the gradient of {self._name(local)}")
        return made[local]

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

    def _compared(self) -> list[str]:
        """Return the local names of parameters that are compared with what autograd makes."""
        balance, given = self.state.balance, self.tracked.parameters
        if balance is None or not balance.names:
            return []
        return [local for local in self.call.shapes if balance.compares(given[local].name)]

    def _weighed(
        self, gradients: Mapping[str, PerSampleGradient], compared: Iterable[str]
    ) -> Mapping[str, PerSampleGradient]:
        """Let what is compared in every batch be taken along where engines reduce gradients."""
        always = [each for each in compared if self.state.compares_always(self.tracked, each)]
        return {**gradients, **{local: weighed(gradients[local]) for local in always}}

    def _weigh(
        self, whole: bool, gradients: Mapping[str, PerSampleGradient], compared: Iterable[str]
    ) -> None:
        """Let gradients be compared with those that autograd makes."""
        balance = self.state.balance
        assert balance is not None
        for local in compared:
            balance.add(self._name(local), gradients[local], self.call.autocast, whole)

    def _tell(
        self,
        listeners: Iterable[Listener],
        pass_: Pass,
        gradients: Mapping[str, PerSampleGradient],
        made: dict[str, Tensor],
    ) -> None:
        """Tell engines of gradients by local name, and note those of parameters that they make."""
        for local, gradient in gradients.items():
            parameter = self.tracked.parameters[local]
            for listener in listeners:
                if listener in self.batch.listeners and parameter.name in listener.tracking.names:
                    result = listener.on_gradient(pass_, parameter, gradient)
                    if result is not None and local in self.made:
                        made[local] = self._returned(parameter, gradient, result)

    def _gradients(
        self, records: Mapping[str, Record], by_row: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Return the per-sample gradients by local name, of rows as they are."""
        try:
            sampler, silence = self.tracked.sampler, self.batch.silence
            gradients = silently(silence, sampler.gradients, self.call, records, by_row)
        except Exception as error:
            self.tracked.blame.note(error)
            raise
        self._check(gradients)
        return gradients

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


def _is_used(gradient: PerSampleGradient) -> bool:
    return not isinstance(gradient, Dense) or gradient.used


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
        chosen: dict[str, Record] = {}
        for local, record in records.items():
            parameter = tracked.parameters[local]
            heard = parameter.name in listener.tracking.names
            chosen[local] = listener.on_input(parameter, record) if heard else record
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
        bare: list[tuple[str, Record, dict[str, int]]] = []
        whole = True
        for local, record in chosen.items():
            whole = whole and record is records[local]
            places: dict[str, int] = {}
            for key, tensor in record.tensors().items():
                at = places[key] = positions.setdefault(id(tensor), len(saved))
                if at == len(saved):
                    # Detached: the Tap is no user of the value, and shares its version counter.
                    saved.append(tensor.detach())
            bare.append((local, record.replace(**dict.fromkeys(places)), places))
        # Those of the first are compared with autograd's, which takes what is not compressed.
        kept.insert(0 if whole else len(kept), Kept(sharing, bare, whole))
    return kept, saved

"""Custom functions that parameters go into: each sample's part, by their own backward pass.

What a `torch.autograd.Function` does with a parameter, nobody sees; a head that is fused with its
loss is one. But its backward pass is linear in the gradients that arrive at its outputs, given what
it kept, and so it tells each sample's part by itself:

    backward(grad)                           the gradient of all samples
    backward(grad, zero but in rows of n)    that of sample n

Hooks on the node of the graph run it once more for each sample. The graph stays as it is. That the
function is linear, the comparison with autograd's gradient shows, in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ghost_core._torch import (
    dtypes_into,
    function_of,
    outputs_of,
    run_apart,
    unwatched,
    version,
    without_gradients,
)
from ghost_core.algebra import Dense, Owned, Precision, chunks, full_precision
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.listener import Pass
from ghost_core.capture.meeting import alone, check_unchanged, note_followed, owner_at
from ghost_core.capture.refusals import arrived_late, hidden_in_function, not_repeatable
from ghost_core.capture.rows_met import site_of
from ghost_core.capture.sources import ParameterSource, Shared
from ghost_core.capture.state import Audience, CaptureState
from ghost_core.capture.tap import Branch, Tap
from ghost_core.errors import WrongSplitError
from ghost_core.split import Site
from ghost_core.state import random_state_kept

Gradients = Mapping[int, Tensor]
"""Gradients that arrive at a function, by position of its output."""


def follow_function(
    state: CaptureState,
    node: Any,
    names: tuple[str, ...],
    entering: Mapping[int, Shared],
    corrected: Collection[ParameterSource],
) -> None:
    """Tell each sample's part of what a custom function does with shared values.

    Args:
        state: What the hooks on the model share.
        node: The function's node of the graph.
        names: The modules whose parameters go into it.
        entering: The shared values, by position of the function's input.
        corrected: The parameters whose gradients by autograd need correction.

    Raises:
        WrongSplitError: If its outputs have no rows of samples, or it does not tell.
    """
    assert state.batch is not None
    assert state.pass_ is not None
    direct = {source: at for at, each in entering.items() for source in each.sources}
    meeting = FunctionMeeting(
        state,
        state.batch,
        state.pass_,
        ref(node),
        _sites(state, node, names),
        entering,
        tuple(version(each.value) for each in entering.values()),
        {direct[source]: source for source in corrected if source in direct},
        _dtypes(node),
        repeats=state.verifier.watching,
    )
    if not meeting.sites:
        raise meeting.hidden("no output that has rows of samples")
    if len(meeting.corrected) < len(corrected):
        raise meeting.hidden("values computed from them as inputs, where an engine makes gradients")
    if not _is_behind_tap(node):
        raise meeting.hidden("no module before it that is measured")
    for site in meeting.sites.values():
        state.add(site)
    parameters = meeting.parameters
    state.batch.seen.update(names)
    state.told_apart = True
    state.shared_names |= set(parameters)
    state.verifier.settle(parameters)
    note_followed(state.followed, node.name(), [(e.value, e) for e in entering.values()], {})
    node.register_prehook(meeting.before)
    if corrected:
        node.register_hook(meeting.after)


def _sites(state: CaptureState, node: Any, names: tuple[str, ...]) -> dict[int, Site]:
    """Return where a function has its rows, by position of the output, where it has some."""
    sites: dict[int, Site] = {}
    for at, (shape, _, _) in enumerate(outputs_of(node)):
        if not shape:
            continue
        try:
            sites[at] = site_of(state, torch.empty(shape, device="meta"), names, node.name())
        except WrongSplitError:
            continue
    return sites


def _dtypes(node: Any) -> frozenset[torch.dtype]:
    """Return the floating dtypes of what goes into a function and comes out, and of autocast."""
    made = outputs_of(node)
    met = {*dtypes_into(node), *(each.dtype for each in made)}
    autocast = {
        torch.get_autocast_dtype(device)
        for device in {each.device.type for each in made}
        if torch.is_autocast_enabled(device)
    }
    return frozenset(dtype for dtype in met | autocast if dtype.is_floating_point)


def _behind(node: Any) -> Iterator[Any]:
    """Yield what leads to a node, back to the Taps before it."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        for behind, _ in waiting.pop().next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                yield behind
                if not _is_tap(behind):
                    waiting.append(behind)


def _is_tap(node: Any) -> bool:
    return function_of(type(node)) in (Tap, Branch)


def _is_behind_tap(node: Any) -> bool:
    """Tell whether a probe can reach a node, and a backward pass is known for one that counts."""
    return any(map(_is_tap, _behind(node)))


@dataclass(eq=False)
class FunctionMeeting:
    """A call of a custom function on shared values and on samples.

    Attributes:
        state: What the hooks on the model share.
        batch: The batch.
        pass_: The pass.
        node: Returns the call's node of the graph, which holds this.
        sites: Where it has its rows, by position of the output, for those that have some.
        shared: The shared values by position of the input.
        versions: How often each of them had been written to.
        corrected: The parameters whose gradients by autograd need correction, by the same.
        dtypes: The floating dtypes that it may compute in.
        repeats: Whether it is looked at whether the backward pass can run again.
    """

    state: CaptureState
    batch: BatchCapture
    pass_: Pass
    node: Callable[[], Any]
    sites: Mapping[int, Site]
    shared: Mapping[int, Shared]
    versions: tuple[int, ...]
    corrected: Mapping[int, ParameterSource]
    dtypes: frozenset[torch.dtype]
    repeats: bool
    _corrections: dict[int, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that go into it."""
        return [each.parameter.name for shared in self.shared.values() for each in shared.reached()]

    def hidden(self, what: str) -> WrongSplitError:
        """Say what the function has, so that it does not tell what samples do."""
        return hidden_in_function(self.node().name(), self.parameters, what)

    def before(self, grads: Sequence[Tensor | None]) -> None:
        """Tell each sample's part of the gradients that arrive at the node."""
        arrived = {at: grad for at, grad in enumerate(grads) if grad is not None}
        if self.state.audience is not Audience.NOBODY and arrived:
            unwatched(without_gradients, self._deliver, arrived)

    def after(
        self, made: Sequence[Tensor | None], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Add what engines make beside the gradients that autograd makes."""
        corrections, self._corrections = self._corrections, {}
        return tuple(
            grad if grad is None or at not in corrections else grad + corrections[at].to(grad.dtype)
            for at, grad in enumerate(made)
        )

    def _deliver(self, arrived: Gradients) -> None:
        for at, grad in arrived.items():
            if at not in self.sites and bool((grad != 0).any()):
                raise self.hidden("an output that the loss depends on without rows of samples")
        arrived = {at: grad for at, grad in arrived.items() if at in self.sites}
        probe = self.state.verifier.probe
        if probe is not None:
            for at, grad in arrived.items():
                probe.see(self.sites[at], [grad])
        elif arrived:
            self._to_engines(arrived)

    def _to_engines(self, arrived: Gradients) -> None:
        names = next(iter(self.sites.values())).names
        if self.batch.closed:
            raise arrived_late(names[0])
        check_unchanged(self.shared.values(), self.versions, names)
        for at in arrived:
            self.state.verifier.check_probed(self.sites[at])
        self.state.verifier.look(names[0], (), arrived.values())
        with full_precision(_device(arrived)):
            if self.repeats:
                self._check_repeatable(arrived)
            self._spread(arrived)
        for at, source in self.corrected.items():
            correction = self.state.corrections.pop(source.parameter.name, None)
            if correction is not None:
                self._corrections[at] = correction

    def _spread(self, arrived: Gradients) -> None:
        """Hand on the gradients of some samples after the other, as many as fit into memory."""
        n = self.pass_.n
        each = {at: self._alone(at, grad) for at, grad in arrived.items()}
        size = sum(shared.value.numel() for shared in self.shared.values())
        for part in chunks(n, size):
            samples = range(part.start, part.stop)
            rows = [self._of_shared({at: next(g) for at, g in each.items()}) for _ in samples]
            for at, shared in enumerate(self.shared.values()):
                column = [row[at] for row in rows]
                if all(row is None for row in column):
                    continue
                dense = [torch.zeros_like(shared.value) if row is None else row for row in column]
                gradient = Dense(torch.stack(dense).unsqueeze(1))
                self._note_rounding(shared)
                owner = torch.arange(part.start, part.stop, device=dense[0].device)
                whole = len(dense) == n
                shared.spread(self.pass_, gradient if whole else Owned(gradient, owner, n))

    def _note_rounding(self, shared: Shared) -> None:
        """Let sums be compared as those of numbers that were rounded to what it computes in."""
        if self.state.balance is not None:
            for source in shared.reached():
                self.state.balance.round(source.account, self.dtypes)

    def _alone(self, at: int, grad: Tensor) -> Iterator[Tensor]:
        site = self.sites[at]
        return alone(grad, owner_at(self.state, self.pass_, site, grad), site, self.pass_.n)

    def _of_shared(self, arrived: Gradients) -> list[Tensor | None]:
        """Return the gradients of the shared values, given those of some samples."""
        made = self._run(arrived)
        found = [(made[at], shared.value) for at, shared in self.shared.items()]
        return [
            None if grad is None else grad.to_dense().sum_to_size(value.shape).to(value.dtype)
            for grad, value in found
        ]

    def _run(self, arrived: Gradients) -> Sequence[Tensor | None]:
        """Run the backward pass once more, and return the gradients of all inputs."""
        made: list[Any] = []
        device = _device(arrived)
        with random_state_kept([device]):  # each draws what the function is going to draw
            run_apart(lambda: made.append(self._applied(arrived)), device)
        (found,) = made
        return found if isinstance(found, tuple) else (found,)

    def _applied(self, arrived: Gradients) -> Any:
        node = self.node()
        # As autograd does, but for what is no result, or a number.
        given = [
            torch.zeros(made.shape, dtype=made.dtype, device=made.device) if made.shape else None
            for made in outputs_of(node)
        ]
        for at, grad in arrived.items():
            given[at] = grad
        try:
            return node.apply(*given)
        except (TypeError, AttributeError) as error:
            raise self.hidden("a backward pass that needs gradients of all outputs") from error

    def _check_repeatable(self, arrived: Gradients) -> None:
        """Refuse a function whose backward pass is spoilt by running it."""
        for first, again in zip(self._run(arrived), self._run(arrived), strict=True):
            if first is None or again is None:
                continue
            apart, size = (torch.linalg.vector_norm(each) for each in (again - first, first))
            if bool(apart > Precision.of([first.dtype]).tolerance * size):
                raise not_repeatable(self.node().name(), self.parameters)


def _device(arrived: Gradients) -> torch.device:
    return next(iter(arrived.values())).device

"""What shared values are computed from, and each sample's way back to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ghost_core._torch import start_of_backward, tree_map
from ghost_core.algebra import (
    Dense,
    PerSampleGradient,
    Record,
    full_precision,
    read_only,
    weighed,
)
from ghost_core.capture.at_once import all_at_once
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.listener import Pass
from ghost_core.capture.state import CaptureState
from ghost_core.capture.ways_back import WayBack
from ghost_core.differentiation import differentiated
from ghost_core.sampler import PastCall
from ghost_core.split import Lift, RowAxes, describe
from ghost_core.tracking import TrackedModule, TrackedParameter

_IS_LIVE = attrgetter("live")  # no generator: it is asked at each operation


class Source(ABC):
    """What a shared value is computed from.

    Attributes:
        tensor: Where gradients are taken to in the graph.
    """

    tensor: Tensor

    @property
    def live(self) -> bool:
        """Whether gradients are taken back to it."""
        return any(map(_IS_LIVE, self.reached()))

    @abstractmethod
    def reached(self) -> Sequence[ParameterSource]:
        """Return the parameters that gradients are handed on to."""

    def costs(self) -> Sequence[tuple[ParameterSource, bool]]:
        """Return these, each with whether no graph is differentiated by sample on the way there."""
        return [(source, source is self) for source in self.reached()]

    @abstractmethod
    def spread(self, pass_: Pass, gradient: PerSampleGradient, *, cut: bool = False) -> None:
        """Hand on the gradient of each sample, of the tensor's shape.

        Args:
            pass_: The pass.
            gradient: The gradient of each sample.
            cut: Whether the user's graph ends before the tensor, so that autograd makes no gradient
                of it to compare this with.
        """


@dataclass(frozen=True, eq=False)
class ParameterSource(Source):
    """A tracked parameter.

    Attributes:
        tensor: The parameter; where it is frozen, a leaf in its place that requires gradients.
        parameter: The same, as it is tracked.
        account: Under which name contributions are compared with autograd's gradient.
        state: What the hooks on the model share.
        batch: The batch of the use.
        lift: The call in which it is tried to follow it; None where it is followed in any case.
    """

    tensor: Tensor
    parameter: TrackedParameter
    account: str
    state: CaptureState
    batch: BatchCapture
    lift: Lift | None = None

    @property
    def live(self) -> bool:
        """Whether it is still followed."""
        return self.lift is None or not self.lift.given_up

    def reached(self) -> Sequence[ParameterSource]:
        """Return itself."""
        return (self,)

    def spread(self, pass_: Pass, gradient: PerSampleGradient, *, cut: bool = False) -> None:
        """Tell the engines."""
        balance = None if cut else self.state.balance
        if balance is not None and balance.compares(self.account):
            gradient = weighed(gradient)
        with self.batch.told():
            for listener in self.batch.listeners:
                if self.parameter.name in listener.tracking.names:
                    made = listener.on_gradient(pass_, self.parameter, gradient)
                    if made is not None and self.state.reweights():
                        name = self.parameter.name
                        self.state.correct(self.account, name, made - gradient.sum())
            if balance is not None:
                balance.add(self.account, gradient, None, True)


@dataclass(frozen=True)
class Form:
    """A call on nothing of the samples, as the module's sampler sees it: as a call on one.

    Attributes:
        tracked: The module.
        call: What is left of the call.
        records: What its sampler kept.
        axis: Axis of size 1 that stands for the samples in its output; None if it has none.
        sources: The module's parameters by local name.
        state: What the hooks on the model share.
    """

    tracked: TrackedModule
    call: PastCall
    records: Mapping[str, Record]
    axis: int | None
    sources: Mapping[str, ParameterSource]
    state: CaptureState

    @classmethod
    def of(
        cls,
        state: CaptureState,
        tracked: TrackedModule,
        call: tuple[Any, Any, Tensor, object],
        sources: Mapping[str, ParameterSource],
    ) -> Form:
        """Record a call as if it was one on a single sample.

        Args:
            state: What the hooks on the model share.
            tracked: The module.
            call: Its positional and keyword inputs, its output, and what its sampler kept before.
            sources: The module's parameters by local name.
        """
        args, kwargs, output, before = call
        dim, value = tracked.batch_dim, output.detach()
        axis = dim if output.dim() > dim and output.shape[dim] == 1 else None
        if axis is None:
            args, kwargs = tree_map(
                lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
        axes = RowAxes(axis or 0, (axis or 0,), 1)
        rows = [value.unsqueeze(0)] if axis is None else axes.rows_first([value])
        described = describe(tracked, rows, axes, args, kwargs, before)
        with full_precision(output.device), state.silence(), tracked.blame:
            records = dict(tracked.sampler.record(described))
        return cls(tracked, described.past(), records, axis, sources, state)

    def spread(self, pass_: Pass, rows: Tensor, *, cut: bool) -> None:
        """Tell the engines, given the gradient of the output for each sample, `[N, *shape]`."""
        if self.axis is not None:
            rows = rows.squeeze(self.axis + 1)
        records = {local: record.expand(len(rows)) for local, record in self.records.items()}
        with self.state.silence(), self.tracked.blame:
            gradients = self.tracked.sampler.gradients(self.call, records, [rows])
        for local, gradient in gradients.items():
            self.sources[local].spread(pass_, gradient, cut=cut)


@dataclass(frozen=True, eq=False)
class CallSource(Source):
    """An output of a module that was called on nothing of the samples.

    Attributes:
        tensor: The output; where parameters are frozen, a leaf in its place.
        output: The output, with the graph that leads to what it is computed from.
        form: The closed form of its parameters; None where these are behind it.
        behind: What it is computed from besides.
        account: Under which name what arrives is compared with autograd's gradient of a leaf.
        state: What the hooks on the model share.
    """

    tensor: Tensor
    output: Tensor
    form: Form | None
    behind: tuple[Source, ...]
    account: str
    state: CaptureState

    def copied(self) -> Shared:
        """Return a copy of the output for the user.

        The copy may be written to, as by an activation in place, and another value is there then. A
        leaf may not be, nor would a hook of the user's on it be met.
        """
        value, own = self.tensor.clone(), Shared(self.tensor, (self,))
        return Shared(value, (self,), moved=(own, WayBack(self.tensor, value, lambda rows: rows)))

    def reached(self) -> Sequence[ParameterSource]:
        """Return the parameters of the module, and those behind it."""
        return [source for source, _ in self.costs()]

    def costs(self) -> Sequence[tuple[ParameterSource, bool]]:
        """Return the module's own with whether it has a closed form, and those behind without."""
        own = () if self.form is None else self.form.sources.values()
        found = [(source, True) for source in own]
        for source in self.behind:
            found += [(reached, False) for reached in source.reached()]
        return found

    def spread(self, pass_: Pass, gradient: PerSampleGradient, *, cut: bool = False) -> None:
        """Take gradients back to what is behind."""
        if self.state.balance is not None and not cut:
            self.state.balance.add(self.account, gradient, None, True)
        rows, cut = read_only(gradient), cut or self.tensor is not self.output
        if self.form is not None:
            self.form.spread(pass_, rows, cut=cut)
        with _requiring_gradients([source.tensor for source in self.behind]):
            take_back(pass_, self.output, self.behind, rows, cut=cut)


@dataclass(frozen=True)
class Shared:
    """A value that is the same for all samples.

    Attributes:
        value: The value.
        sources: What it is computed from; itself, where it is a source.
        narrow: The value that it is an expansion of, entry by entry; None where it is none.
        moved: The value whose entries were moved to get it, and the way back; None where more was
            done.
    """

    value: Tensor
    sources: tuple[Source, ...]
    narrow: Shared | None = None
    moved: tuple[Shared, WayBack] | None = None

    @property
    def live(self) -> bool:
        """Whether gradients are taken back to any of what it is computed from."""
        return any(map(_IS_LIVE, self.sources))

    def as_it_was(self) -> Tensor:
        """Return the value that it is a copy of, or that its entries come from in their order."""
        before = self.moved[0] if self.moved is not None else None
        if before is None or before.value.numel() != self.value.numel():
            return self.value
        return before.as_it_was() if self.value.is_contiguous() else self.value

    def reached(self) -> Sequence[ParameterSource]:
        """Return the parameters that gradients are taken back to."""
        return [each for source in self.sources for each in source.reached() if each.live]

    def lifts(self) -> Sequence[Lift]:
        """Return the calls in which it is being tried to follow what it is computed from."""
        return [source.lift for source in self.reached() if source.lift is not None]

    def spread(self, pass_: Pass, gradient: PerSampleGradient) -> None:
        """Hand on the gradient of each sample."""
        for source in self.sources:
            if source.tensor is self.value and len(self.sources) == 1:
                source.spread(pass_, gradient)
                return
        rows = read_only(gradient)
        if self.moved is not None and self.moved[1].is_open:
            before, way = self.moved
            before.spread(pass_, Dense(way.take(rows).unsqueeze(1)))
            return
        take_back(pass_, self.value, self.sources, rows)


@contextmanager
def _requiring_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let leaves that were frozen since the graph was made be asked for."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def take_back(
    pass_: Pass,
    value: Tensor,
    sources: Sequence[Source],
    gradients: Tensor,
    *,
    cut: bool = False,
) -> None:
    """Take the gradient of each sample back through the graph to what a value comes from.

    With one table as the only source:

        table            the gradients as they are
        table.view(-1)   in the table's shape
        0.5 * table[:T]  one backward pass for each sample, or one for all; see `all_at_once`

    Args:
        pass_: The pass.
        value: A value with its graph.
        sources: What it is computed from; itself, where it is a source.
        gradients: The gradient of the value for each sample, `[N, *shape]`.
        cut: Whether the user's graph ends before these; see `Source.spread`.
    """
    sources = [source for source in sources if source.live]
    if len(sources) == 1 and has_entries_of(value, sources[0].tensor):
        gradients = gradients.reshape(len(gradients), 1, *sources[0].tensor.shape)
        sources[0].spread(pass_, Dense(gradients), cut=cut)
        return
    for source in sources:
        if source.tensor is value:
            source.spread(pass_, Dense(gradients.unsqueeze(1)), cut=cut)
    behind = [source for source in sources if source.tensor is not value]
    tensors = [source.tensor for source in behind]
    at_once = all_at_once(value, tensors, gradients)
    columns = by_sample(value, tensors, gradients) if at_once is None else at_once
    for source, column in zip(behind, columns, strict=True):
        if column is not None:
            source.spread(pass_, Dense(column.unsqueeze(1)), cut=cut)


def has_entries_of(value: Tensor, source: Tensor) -> bool:
    """Tell whether a value is a source in another shape, or the source itself."""
    if value.dtype != source.dtype or value.numel() != source.numel():
        return False
    there = value.is_contiguous() and source.is_contiguous()
    return value is source or (there and value.data_ptr() == source.data_ptr())


def by_sample(
    value: Tensor, tensors: Sequence[Tensor], gradients: Iterable[Tensor]
) -> list[Tensor | None]:
    """Differentiate once for each sample.

    Args:
        value: A value with its graph, which is kept.
        tensors: What to differentiate for.
        gradients: The gradient of the value for each of N samples.

    Returns:
        `[N, *shape]` for each tensor; None for those that the value does not depend on.
    """
    if not tensors:
        return []
    rows = [_differentiated(value, tensors, each) for each in gradients]
    found: list[Tensor | None] = []
    for tensor, column in zip(tensors, zip(*rows, strict=True), strict=True):
        dense = [torch.zeros_like(tensor) if each is None else each.to_dense() for each in column]
        found.append(None if all(each is None for each in column) else torch.stack(dense))
    return found


def _differentiated(
    value: Tensor, tensors: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    if value.is_complex():  # where no backward pass starts of itself
        return torch.autograd.grad(value, tensors, gradient, retain_graph=True, allow_unused=True)
    start = start_of_backward([value], [gradient])
    return differentiated(start, tensors, (value, gradient, *tensors))

"""Where a value that is the same for all samples meets them, and each sample's part is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_core._torch import unseen, version
from ghost_core.algebra import Owned, full_precision
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.closed_forms import FormOn
from ghost_core.capture.listener import Pass
from ghost_core.capture.refusals import arrived_late
from ghost_core.capture.sources import ParameterSource, Shared, by_sample, has_entries_of, take_back
from ghost_core.capture.state import Audience, CaptureState
from ghost_core.errors import WrongSplitError
from ghost_core.split import Site, owner_of_rows
from ghost_core.tracking import Followed, TrackedParameter


@dataclass(frozen=True, eq=False)
class Meeting:
    """The result of an operation on shared values and on samples.

    Attributes:
        state: What the hooks on the model share.
        batch: The batch.
        pass_: The pass.
        result: The result, with its graph.
        site: Where it has its rows.
        shared: The shared values, each with what stands for it in this operation alone. A sample's
            other values may come from the same sources, by another operation.
        forms: Closed forms by position among the shared values, where there may be some.
        versions: How often each shared value had been written to.
        corrected: The parameters whose gradients by autograd need correction.
    """

    state: CaptureState
    batch: BatchCapture
    pass_: Pass
    result: Tensor
    site: Site
    shared: tuple[tuple[Tensor, Shared], ...]
    forms: Mapping[int, FormOn]
    versions: tuple[int, ...]
    corrected: tuple[ParameterSource, ...]

    def deliver(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None] | None:
        """Tell each sample's part of the gradient, and hand it to whom it is for."""
        (grad,) = grads
        assert grad is not None
        audience = self.state.audience
        if not self.site.counts:
            return None
        if audience is Audience.PROBE:
            probe = self.state.verifier.probe
            assert probe is not None
            unseen(probe.see, self.site, [grad])
        elif audience is Audience.ENGINES:
            self._to_engines(grad)
            return [self._correction(source.parameter) for source in self.corrected]
        return [None] * len(self.corrected)

    def _correction(self, parameter: TrackedParameter) -> Tensor | None:
        correction = self.state.corrections.pop(parameter.name, None)
        return None if correction is None else correction.to(parameter.dtype)

    def _to_engines(self, grad: Tensor) -> None:
        if self.batch.closed:
            raise arrived_late(self.site.names[0])
        check_unchanged((each for _, each in self.shared), self.versions, self.site.names)
        self.state.verifier.check_probed(self.site)
        self.state.verifier.look(self.site.names[0], (), [grad])
        (axis,) = self.site.axes.outputs
        (rows,) = self.site.axes.rows_first([grad])
        owner = owner_at(self.state, self.pass_, self.site, grad)
        graph: list[tuple[Tensor, Shared]] = []
        # Not in silence: what is recomputed under checkpointing is to be as it was.
        with full_precision(grad.device):
            for at, (stand, shared) in enumerate(self.shared):
                if not shared.live:
                    continue
                form = self.forms[at](axis) if at in self.forms else None
                if form is None:
                    graph.append((stand, shared))
                    continue
                gradient = form(rows)
                if owner is not None:
                    gradient = Owned(gradient, owner, self.pass_.n)
                (shared.narrow or shared).spread(self.pass_, gradient)
            if not graph:
                return
            each = alone(grad, owner, self.site, self.pass_.n)
            columns = by_sample(self.result, [stand for stand, _ in graph], each)
            for (_, shared), column in zip(graph, columns, strict=True):
                if column is not None:
                    take_back(self.pass_, shared.value, shared.sources, column)


def check_unchanged(
    shared: Iterable[Shared], versions: Sequence[int], names: Sequence[str]
) -> None:
    """Refuse shared values whose graph is another one than when they met the samples.

    Args:
        shared: The values.
        versions: How often each of them had been written to.
        names: The modules that computed them.
    """
    for each, before in zip(shared, versions, strict=True):
        if version(each.value) != before and each.value.grad_fn is not None:
            raise WrongSplitError(
                f"gradients cannot be split by sample: what {', '.join(names)} "
                "computed, the same for all samples, was written to after it had met them",
                reason="the way back to its parameters is not what it was",
                remedy="use an operation that is not in place, or leave these modules out with "
                "exclude=...",
            )


def owner_at(state: CaptureState, pass_: Pass, site: Site, grad: Tensor) -> Tensor | None:
    """Return the sample of each row of a gradient; None where rows are samples."""
    name = site.names[0]
    fold, rows = state.verifier.fold(name), site.axes.rows_first([grad])
    owner = owner_of_rows(state.tracked[name], site, rows, pass_.n, fold)
    return None if owner is None else owner.to(grad.device)


def alone(grad: Tensor, owner: Tensor | None, site: Site, n: int) -> Iterator[Tensor]:
    """Yield a gradient with that of each of n samples alone."""
    (axis,) = site.axes.outputs
    owner = torch.arange(n, device=grad.device) if owner is None else owner
    owner = owner.reshape([-1 if at == axis else 1 for at in range(grad.dim())])
    for sample in range(n):
        yield torch.where(owner == sample, grad, 0)


def give_up_costly(
    state: CaptureState,
    site: Site,
    met: Sequence[tuple[Tensor, Shared]],
    forms: Mapping[int, FormOn],
) -> None:
    """Run calls again that use their parameters in an operation without a closed form.

    Args:
        state: What the hooks on the model share.
        site: Where the result of the operation has its rows.
        met: The shared values and what stands for them.
        forms: The closed forms, by position among the shared values.
    """
    for at, (_, shared) in enumerate(met):
        if site.refusal is not None or at not in forms or forms[at](site.axes.outputs[0]) is None:
            state.give_up(shared.lifts())


def note_followed(
    followed: Followed,
    operation: str,
    met: Sequence[tuple[Tensor, Shared]],
    forms: Mapping[int, FormOn],
) -> None:
    """Note which parameters meet samples in an operation, and whether it has a closed form.

    Args:
        followed: What is known so far, which this adds to.
        operation: The operation.
        met: The shared values and what stands for them.
        forms: The closed forms, by position among the shared values.
    """
    operation = operation.rpartition(".")[2]
    for at, (_, shared) in enumerate(met):
        for source in shared.sources:
            entries = (shared.narrow or shared).as_it_was()
            closed = at in forms and has_entries_of(entries, source.tensor)
            for reached, direct in source.costs():
                if not reached.live:
                    continue
                known = followed if reached.lift is None else reached.lift.operations
                operations = known.setdefault(reached.parameter.name, {})
                operations[operation] = operations.get(operation, True) and closed and direct

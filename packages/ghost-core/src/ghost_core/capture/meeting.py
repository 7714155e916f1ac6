"""Where a value that is the same for all samples meets them, and each sample's part is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional

from ghost_core._torch import version
from ghost_core.algebra import Dense, Outer, Owned, PerSampleGradient, Tokens, full_precision
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.listener import Pass
from ghost_core.capture.sources import ParameterSource, Source, by_sample, take_back
from ghost_core.capture.state import Audience, CaptureState
from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.sampler import as_tokens
from ghost_core.split import Site, owner_of_rows
from ghost_core.tracking import Followed, TrackedParameter

ClosedForm = Callable[[Tensor], PerSampleGradient]
"""Makes the gradients of a shared value from that of a result, rows first `[R, ...]`."""

FormOn = Callable[[int], ClosedForm | None]
"""Returns the closed form, given the axis of the rows in the result; None if it has none there."""


@dataclass(frozen=True)
class Shared:
    """A value that is the same for all samples.

    Attributes:
        value: The value.
        sources: What it is computed from; itself, where it is a source.
    """

    value: Tensor
    sources: tuple[Source, ...]

    def spread(self, pass_: Pass, gradient: PerSampleGradient) -> None:
        """Hand on the gradient of each sample."""
        for source in self.sources:
            if source.tensor is self.value and len(self.sources) == 1:
                source.spread(pass_, gradient)
                return
        take_back(pass_, self.value, self.sources, gradient.materialize())


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
    ) -> Sequence[Tensor | None]:
        """Tell each sample's part of the gradient, and hand it to whom it is for."""
        (grad,) = grads
        assert grad is not None
        audience = self.state.audience
        if audience is Audience.PROBE:
            probe = self.state.verifier.probe
            assert probe is not None
            probe.see(self.site, [grad])
        elif audience is Audience.ENGINES:
            self._to_engines(grad)
            return [self._correction(source.parameter) for source in self.corrected]
        return [None] * len(self.corrected)

    def _correction(self, parameter: TrackedParameter) -> Tensor | None:
        correction = self.state.corrections.pop(parameter.name, None)
        return None if correction is None else correction.to(parameter.dtype)

    def _to_engines(self, grad: Tensor) -> None:
        if self.batch.closed:
            raise CaptureError(
                f"a gradient reached {self.site.names[0]} after its batch was closed: run "
                "backward() inside engine.batch()"
            )
        self._check_unchanged()
        (axis,) = self.site.axes.outputs
        (rows,), owner = self.site.axes.rows_first([grad]), self._owner(grad)
        made = {at: form for at, on in self.forms.items() if (form := on(axis)) is not None}
        graph = [at for at in range(len(self.shared)) if at not in made]
        # Not in silence: what is recomputed under checkpointing is to be as it was.
        with full_precision(grad.device):
            for at, form in made.items():
                gradient = form(rows)
                if owner is not None:
                    gradient = Owned(gradient, owner, self.pass_.n)
                self.shared[at][1].spread(self.pass_, gradient)
            stands = [self.shared[at][0] for at in graph]
            columns = by_sample(self.result, stands, self._alone(grad, owner))
            for at, column in zip(graph, columns, strict=True):
                if column is not None:
                    value = self.shared[at][1]
                    take_back(self.pass_, value.value, value.sources, column)

    def _check_unchanged(self) -> None:
        """Refuse shared values whose graph is another one than when they met the samples."""
        for (_, shared), before in zip(self.shared, self.versions, strict=True):
            if version(shared.value) != before and shared.value.grad_fn is not None:
                raise WrongSplitError(
                    f"gradients cannot be split by sample: what {', '.join(self.site.names)} "
                    "computed, the same for all samples, was written to after it had met them",
                    reason="the way back to its parameters is not what it was",
                    remedy="use an operation that is not in place, or leave these modules out with "
                    "exclude=...",
                )

    def _owner(self, grad: Tensor) -> Tensor | None:
        """Return the sample of each row; None where rows are samples."""
        state, n, name = self.state, self.pass_.n, self.site.names[0]
        fold, rows = state.verifier.fold(name), self.site.axes.rows_first([grad])
        owner = owner_of_rows(state.tracked[name], self.site, rows, n, fold)
        return None if owner is None else owner.to(grad.device)

    def _alone(self, grad: Tensor, owner: Tensor | None) -> Iterator[Tensor]:
        """Yield the gradient with that of each sample alone."""
        n, (axis,) = self.pass_.n, self.site.axes.outputs
        owner = torch.arange(n, device=grad.device) if owner is None else owner
        owner = owner.reshape([-1 if at == axis else 1 for at in range(grad.dim())])
        for sample in range(n):
            yield torch.where(owner == sample, grad, 0)


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
            closed = at in forms and source.tensor is shared.value
            for reached, direct in source.costs():
                name = reached.parameter.name
                before = followed.setdefault(name, {}).get(operation, True)
                followed[name][operation] = before and closed and direct


def closed_forms(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
    met: Sequence[tuple[Tensor, Shared]],
) -> dict[int, FormOn]:
    """Return the closed forms of an operation, by position of shared values in `met`.

    Most operations have none, and are differentiated once for each sample.

    Args:
        func: The operation.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        result: Its result.
        met: The shared values and what stands for them.
    """
    name = getattr(func, "__name__", "")
    forms: dict[int, FormOn] = {}
    for at, (stand, shared) in enumerate(met):
        position = next((place for place, arg in enumerate(args) if arg is stand), -1)
        if position < 0 or sum(arg is stand for arg in args) > 1:
            continue
        plain = len(args) == 2 and not kwargs  # add() takes a factor, alpha
        if name in _ADDITIONS and plain and stand.dtype == result.dtype:
            forms[at] = partial(_sum, stand.shape, result.dim())
        elif func is functional.linear and position == 2:
            forms[at] = partial(_bias, result.dim())
        elif name in _PRODUCTS and position == 1 and _multiplies(args[0], shared, result):
            inputs, is_linear = args[0].to(result.dtype), func is functional.linear
            forms[at] = partial(_product, inputs, is_linear, shared.value.shape)
    return forms


_ADDITIONS = {"add", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"linear", "matmul", "__matmul__", "mm"}


def _sum(shape: Size, dims: int, axis: int) -> ClosedForm:
    return partial(_added, shape, dims, axis)


def _added(shape: Size, dims: int, axis: int, rows: Tensor) -> PerSampleGradient:
    """Return the gradient of a value that was added: that of the sum, where it was broadcast."""
    aligned = [1] * (dims - len(shape)) + list(shape)
    moved = [aligned[axis], *aligned[:axis], *aligned[axis + 1 :]]
    if moved[0] != 1:  # it had rows already
        each = rows.new_zeros(len(rows), *rows.shape)
        each[torch.arange(len(rows)), torch.arange(len(rows))] = rows
        values = each
    else:
        values = rows.unsqueeze(1)
    summed = [at for at, size in enumerate(moved, 1) if size == 1 and values.shape[at] != 1]
    values = values.sum(summed, keepdim=True) if summed else values
    values = values.movedim(1, axis + 1).reshape(len(rows), *shape)
    return Dense(values.unsqueeze(1))


def _terms(rows: Tensor) -> PerSampleGradient:
    """Return the gradient of a bias: that of the result, token by token."""
    return Dense(as_tokens(rows).squeeze(2))


def _bias(dims: int, axis: int) -> ClosedForm | None:
    return _terms if axis < dims - 1 else None


def _multiplies(inputs: Any, shared: Shared, result: Tensor) -> bool:
    """Tell whether samples are multiplied with a matrix that is a source itself."""
    if not isinstance(inputs, Tensor) or inputs.dim() != result.dim() or inputs.dim() < 2:
        return False
    if shared.value.dim() != 2:
        return False
    return shared.value is shared.sources[0].tensor and len(shared.sources) == 1


def _product(inputs: Tensor, is_linear: bool, shape: Size, axis: int) -> ClosedForm | None:
    """Return the closed form of a matrix that samples are multiplied with, if there is one."""
    if axis == inputs.dim() - 1:
        return None
    factor = Tokens(as_tokens(inputs.movedim(axis, 0)), transposed=not is_linear)
    return lambda rows: Outer(factor, as_tokens(rows), shape)

"""Runs a recorded call again, as it was or sample by sample, and differentiates it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from ghost_core import Record, WrongSplitError
from ghost_core._torch import version, vmap
from ghost_core.restoring import restored
from ghost_core.state import RandomState
from ghost_layers.replay.before import conditions
from ghost_layers.replay.closeness import same_rows
from ghost_layers.replay.guard import writes
from ghost_layers.replay.linear_maps import WrittenOut
from ghost_layers.replay.module_copy import Template, own_copy
from ghost_layers.replay.recording import InputRows, OutputRows, TensorAt


class OtherOutputsError(Exception):
    """A call that ran again in the way that was found for its kind did not return what it had."""


class Way(Enum):
    """How a call is run again."""

    VMAP = "all samples at once, each by itself"
    REWRITTEN = "as it was, with a sampler's own code"
    BATCH = "as it was, with one backward pass for each sample"


Forward = Callable[..., Any]
"""Takes a module and its arguments."""

Formula = Callable[..., WrittenOut]
"""Takes a module and its arguments, and writes out what it computes."""


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module without its hooks."""
    return module.forward(*args, **kwargs)


def floating(output: Any) -> list[Tensor]:
    """Return the tensors in what a module returned that can have a gradient."""
    return [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


@dataclass(frozen=True)
class Plan:
    """How to run a call again: everything about it that is no tensor.

    Attributes:
        template: The module as it was before the call.
        wanted: First dotted name of each parameter asked for, by local name.
        written: Buffers that the call writes.
        spec: Structure of the inputs.
        slots: Their leaves, a `TensorAt` for each tensor.
        input_rows: Where the tensors have their samples.
        outputs: The outputs with rows.
        count: Number of rows R of the recorded outputs.
        way: How to run it.
        random: State of the generators before the call; None if nothing was drawn.
        devices: Where the module's tensors are.
        autocast: Device type, and dtype of the autocast region, if there was one.
        recurrent: Whether a recurrent layer of torch is inside.
        rewritten: Writes out what the module computes; None if the sampler has no formula.
    """

    template: Template
    wanted: dict[str, str]
    written: frozenset[str]
    spec: TreeSpec
    slots: tuple[Any, ...]
    input_rows: tuple[InputRows, ...]
    outputs: tuple[OutputRows, ...]
    count: int
    way: Way
    random: RandomState | None
    devices: frozenset[torch.device]
    autocast: tuple[str, torch.dtype | None]
    recurrent: bool
    rewritten: Formula | None = None

    @property
    def draws_nothing(self) -> bool:
        """Whether it is a formula that draws nothing, as was proven for the first of a kind."""
        return self.way is Way.REWRITTEN and self.random is None

    def conditions(self) -> Any:
        """Return a context in which the call runs as it did."""
        cudnn = self.way is Way.BATCH or not self.recurrent
        return conditions(self.random, self.devices, cudnn=cudnn)

    def called(
        self, function: Forward, values: Mapping[str, Tensor], inputs: Sequence[Tensor]
    ) -> Any:
        """Call a function with the module and its arguments.

        Args:
            function: Takes the module first.
            values: Parameters and buffers.
            inputs: The different input tensors, laid out for the module.
        """
        own = {key: values[key].clone() for key in self.written}
        module = self.template.fill({**values, **own})
        copies: dict[int, Any] = {}
        leaves = [
            inputs[slot.at] if isinstance(slot, TensorAt) else own_copy(slot, copies)
            for slot in self.slots
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        device, dtype = self.autocast
        cast = torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
        with restored() as stack:
            stack.enter_context(cast)
            return function(module, *args, **kwargs)

    def returned(self, values: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the module and return its floating tensors; see `called`."""
        if self.way is Way.REWRITTEN:
            return self.written_out(values, inputs).outputs
        return floating(self.called(forward, values, inputs))

    def written_out(self, values: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> WrittenOut:
        """Write the call out by the sampler's formula; see `called`."""
        assert self.rewritten is not None
        written: WrittenOut = self.called(self.rewritten, values, inputs)
        return written

    def whole(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Lay out the input tensors as the module got them."""
        return [rows.whole(value) for rows, value in zip(self.input_rows, inputs, strict=True)]

    def run_whole(self, values: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of the whole call, as the module lays them out."""
        returned = self.returned(values, self.whole(inputs))
        return [returned[output.at] for output in self.outputs]

    def run_one(
        self, values: Mapping[str, Tensor], inputs: Sequence[Tensor], own: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the rows of one sample.

        Args:
            values: Parameters and buffers.
            inputs: All input tensors, samples first.
            own: The sample's own part of those that have one.
        """
        rest = iter(own)
        given = [
            rows.single(next(rest)) if rows.own else rows.whole(value)
            for rows, value in zip(self.input_rows, inputs, strict=True)
        ]
        returned = self.returned(values, given)
        return [output.row(returned[output.at]) for output in self.outputs]

    def run(self, values: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the call in its way and return the outputs, rows first."""
        if self.way in (Way.BATCH, Way.REWRITTEN):
            return self.rows_first(self.run_whole(values, inputs))
        one = partial(self.run_one, values, inputs)
        return vmap(one, self.own(inputs), self.randomness)

    def rows_first(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Lay out the outputs of the whole call with their rows on axis 0."""
        rewritten = self.way is Way.REWRITTEN
        return [
            value.movedim(each.axis, 0).to(each.dtype if rewritten else None)
            for value, each in zip(outputs, self.outputs, strict=True)
        ]

    def own(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the input tensors that have a row for each sample."""
        return [value for value, rows in zip(inputs, self.input_rows, strict=True) if rows.own]

    @property
    def randomness(self) -> str:
        """What vmap is to do where random numbers are drawn."""
        return "error" if self.random is None else "different"


@dataclass(frozen=True)
class Replay(Record):
    """What a call needs to run again.

    Attributes:
        inputs: Its different input tensors, samples first.
        values: The module's parameters and buffers by first dotted name.
        count: Number of rows R of its outputs.
        rows: Rows of the call that are asked for; None for all.
        expected: Copies of its outputs, rows first, that a run has to return; nothing if any will
            do.
    """

    inputs: tuple[Tensor, ...]
    values: dict[str, Tensor]
    count: int
    rows: Tensor | None = None
    expected: tuple[Tensor, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        named = {f"input.{at}": value for at, value in enumerate(self.inputs)}
        named |= {f"value.{key}": value for key, value in self.values.items()}
        return named | {f"expected.{at}": value for at, value in enumerate(self.expected)}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some tensors or fields changed."""
        inputs = [changes.pop(f"input.{at}", value) for at, value in enumerate(self.inputs)]
        values = {key: changes.pop(f"value.{key}", value) for key, value in self.values.items()}
        expected = [changes.pop(f"expected.{at}", value) for at, value in enumerate(self.expected)]
        replaced = replace(self, inputs=tuple(inputs), values=values, expected=tuple(expected))
        return replace(replaced, **changes)

    def expand(self, n: int) -> Self:
        """Return it as it is: a call with one row is run once, whatever the number of samples."""
        return self

    def narrow(self, samples: slice | Tensor) -> Self:
        """Ask for some of the rows only; the call as a whole stays what it was."""
        return replace(self, rows=self.positions[samples])

    def in_rows(self, grad: Tensor) -> Tensor:
        """Give the gradient of the rows that are asked for zeros in all others."""
        if self.rows is None:
            return grad
        whole = grad.new_zeros(self.count, *grad.shape[1:])
        return whole.index_copy_(0, self.rows.to(grad.device), grad)

    @contextmanager
    def unproven(self) -> Iterator[None]:
        """Run the call in here, in a way that may not be its own.

        Raises:
            OtherOutputsError: If it fails, and was not proven to run in this way.
        """
        given = (*self.inputs, *self.values.values())
        versions = [version(value) for value in given] if self.expected else []
        try:
            yield
        except (WrongSplitError, OtherOutputsError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # no batching rule, control flow by value, a batch of one
            if not self.expected:
                raise
            raise OtherOutputsError from error
        if self.expected and versions != [version(value) for value in given]:
            raise writes("a run of it changed their version")

    def check(
        self, plan: Plan, outputs: Sequence[Tensor], rows: slice | Tensor = slice(None)
    ) -> None:
        """Assert that outputs are those of the call, as far as that is not proven.

        Args:
            plan: How they were made.
            outputs: Outputs, rows first.
            rows: Which rows of the call they are.

        Raises:
            OtherOutputsError: If they are not.
        """
        if self.expected:
            recorded = [self.expected[output.index] for output in plan.outputs]
            dtypes = self.dtypes(plan)
            for got, value in zip(outputs, recorded, strict=True):
                if not same_rows(got.detach(), value[rows] if len(value) > 1 else value, dtypes):
                    raise OtherOutputsError

    def dtypes(self, plan: Plan) -> set[torch.dtype]:
        """Return the dtypes that the call may have computed in."""
        tensors = (*self.values.values(), *self.inputs, *self.expected)
        dtypes = {value.dtype for value in tensors if value.is_floating_point()}
        return dtypes if plan.autocast[1] is None else {*dtypes, plan.autocast[1]}

    @property
    def positions(self) -> Tensor:
        """Positions of the rows that are asked for."""
        return torch.arange(self.count) if self.rows is None else self.rows

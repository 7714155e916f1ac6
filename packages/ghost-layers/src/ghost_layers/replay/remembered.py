"""Remembers how calls of a kind were run again, so that each kind is searched once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ghost_core import Call, WrongSplitError
from ghost_layers.replay.plan import Plan, Replay, Way
from ghost_layers.replay.prove import Search
from ghost_layers.replay.recording import InputRows, OutputRows, TensorAt
from ghost_layers.replay.trial import Trial

_KINDS = 64
"""How many kinds of calls of one module are remembered."""


@dataclass(frozen=True)
class _Finding:
    """How calls of a kind are run.

    Attributes:
        way: How.
        input_rows: Where their inputs have their samples.
        outputs: The outputs with rows.
        untold: First dotted names of parameters asked for whose gradients were zero.
        unmoved: The same of others, with what their values were.
    """

    way: Way
    input_rows: tuple[InputRows, ...]
    outputs: tuple[OutputRows, ...]
    untold: frozenset[str]
    unmoved: Mapping[str, Tensor]


_findings: WeakKeyDictionary[nn.Module, dict[object, _Finding]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Question:
    """How to run a call again: what is known of calls of its kind, and how to find it out.

    Attributes:
        plan: The call, with neither way nor positions of outputs decided.
        trained: First dotted names of the parameters, and whether they require grad.
        axes: Axis of the rows in each output as the module returned it; None for a scalar.
        kind: What may change the way that a call is run in.
        findings: What was found for the module, by kind.
        cache: Class of a cache that the call got; empty if there was none.
    """

    plan: Plan
    trained: Mapping[str, bool]
    axes: tuple[int | None, ...]
    kind: object
    findings: dict[object, _Finding]
    cache: str

    @classmethod
    def of(
        cls,
        call: Call,
        plan: Plan,
        trained: Mapping[str, bool],
        axes: tuple[int | None, ...],
        inputs: Sequence[Tensor],
        cache: str,
    ) -> Question:
        """Ask for a call, given its input tensors; see the attributes."""
        kind = (_signature(call, plan, inputs), tuple(trained.values()))
        findings = _findings.setdefault(call.module, {})
        return cls(plan, trained, axes, kind, findings, cache)

    def known(self, replay: Replay) -> tuple[Plan, frozenset[str]] | None:
        """Return the plan that was found for calls like this one, which may not hold for it.

        A call `x * a * b` that was seen with a = b = 0, where neither gradient tells anything:

            a = b = 0   the plan that was found, with both untold
            a = 1       the same: once the gradient of b is not zero, it is proven anew

        Returns:
            The plan, and the parameters whose gradients proved nothing of it, as they were zero:
            once one of them is not, it is to be proven anew. None if that is to be done now.
        """
        found = self.findings.get(self.kind)
        if found is None or not all(
            torch.equal(replay.values[key], value) for key, value in found.unmoved.items()
        ):
            return None
        plan = replace(self.plan, way=found.way, input_rows=found.input_rows, outputs=found.outputs)
        untold = (local for local, key in plan.wanted.items() if key in found.untold)
        return plan, frozenset(untold)

    def answered(self, replay: Replay, recorded: tuple[Tensor, ...]) -> Plan:
        """Find a plan and prove it.

        Args:
            replay: The call's tensors.
            recorded: Its outputs, rows first.

        Raises:
            WrongSplitError: If there is none.
        """
        search = Search(Trial(self.plan, replay, recorded, self.trained), self.axes)
        try:
            found = search.find()
        except WrongSplitError as refusal:
            if not self.cache:
                raise
            raise WrongSplitError(
                reason=f"it got a cache, {self.cache}, and without it: {refusal.reason}",
                remedy="call the model with use_cache=False",
            ) from refusal
        if len(self.findings) >= _KINDS:
            self.findings.clear()
        untold, asked = search.untold(found), set(self.plan.wanted.values())
        how = found.way, found.input_rows, found.outputs
        before = self.findings.get(self.kind)
        if before is not None and how == (before.way, before.input_rows, before.outputs):
            untold &= before.untold | before.unmoved.keys()
        unmoved = {key: replay.values[key].detach().clone() for key in untold - asked}
        self.findings[self.kind] = _Finding(*how, untold & asked, unmoved)
        return found


def _signature(call: Call, plan: Plan, inputs: Sequence[Tensor]) -> object:
    """Return what may change the way that a call is run in."""
    return (
        tuple(plan.wanted),
        plan.template.modes,
        str(plan.spec),
        tuple(value for value in plan.slots if isinstance(value, TensorAt | bool | int | str)),
        tuple(
            (rows, value.dim(), value.dtype, value.requires_grad)
            for rows, value in zip(plan.input_rows, inputs, strict=True)
        ),
        tuple((value.dim(), value.dtype) for value in call.outputs),
        plan.count == 1,
        plan.autocast,
        plan.random is None,
    )

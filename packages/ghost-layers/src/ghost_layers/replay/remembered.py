"""Remembers how calls of a kind were run again, so that each kind is searched once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ghost_core import Call
from ghost_layers.replay.plan import Plan, Way
from ghost_layers.replay.prove import Search
from ghost_layers.replay.recording import InputRows, OutputRows, TensorAt

_KINDS = 64
"""How many kinds of calls of one module are remembered."""

_Finding = tuple[Way, tuple[InputRows, ...], tuple[OutputRows, ...]]
_findings: WeakKeyDictionary[nn.Module, dict[object, _Finding]] = WeakKeyDictionary()


def remembered(module: nn.Module, plan: Plan, search: Search, kind: object) -> Plan:
    """Return the plan that was found for calls like this one if it holds, else a new one."""
    kinds = _findings.setdefault(module, {})
    if kind in kinds:
        way, input_rows, outputs = kinds[kind]
        old = replace(plan, way=way, input_rows=input_rows, outputs=outputs)
        if search.known(old):
            return old
    found = search.find()
    if len(kinds) >= _KINDS:
        kinds.clear()
    if search.tells_all(found):
        kinds[kind] = found.way, found.input_rows, found.outputs
    return found


def signature(call: Call, plan: Plan, inputs: Sequence[Tensor]) -> object:
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

"""Samplers that run a module's call again: exact for any module, at the price of running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    PastCall,
    PerSampleGradient,
    Record,
    WrongSplitError,
)
from ghost_core.tracking import dotted_name
from ghost_layers.replay.before import Before, RandomState, RefusalError
from ghost_layers.replay.gradients import gradients
from ghost_layers.replay.module_copy import why_not_copied
from ghost_layers.replay.plan import Forward, Leaf, Output, Place, Plan, Replay, Way
from ghost_layers.replay.prove import Search

_FINDINGS = 64
"""How many kinds of calls of one module are remembered."""

_Finding = tuple[Way, tuple[Leaf, ...], tuple[Output, ...]]
_findings: WeakKeyDictionary[nn.Module, dict[object, _Finding]] = WeakKeyDictionary()


class ReplaySampler(GradientSampler):
    """Per-sample gradients by running the recorded call again, on a copy of the module.

    Ways are tried in order: all samples at once, each by itself (`torch.vmap`), and the call as it
    was, with the random numbers and buffers of then and one backward pass for each sample, which
    serves control flow by value and whatever else belongs to the batch. The first one is taken that
    returns what the call returned, with the same gradients. Random numbers, buffers, modes and
    attributes are as the user left them afterwards.

    A call costs one more forward pass when it is recorded, and a forward and a backward pass of
    the module when its gradients arrive; in the last way, a backward pass for each sample. The
    first call of a kind costs a few more. Gradients are built: N times the parameters asked for.
    """

    parameters: ClassVar[tuple[str, ...] | None] = None

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse modules with hooks inside, which a copy would not run, and complex parameters."""
        for name in self.owns(module):
            if module.get_parameter(name).is_complex():
                return f"its parameter {name} is complex: exclude it"
        return why_not_copied(module)

    def prepare(self, module: nn.Module) -> object:
        """Keep the module's state and the random number generators."""
        return Before.of(module)

    def sides(self, call: Call) -> Mapping[int, Leaf] | None:
        """Say which input tensors belong to samples, where the layer itself defines it.

        Returns:
            Where tensors have their samples, by identity; samples share all others. By default
            None: tensors with as many rows as the outputs belong to samples, if they turn out to.

        Raises:
            RefusalError: If the layer was called in a way that cannot be split.
        """
        return None

    def rewritten(self, module: nn.Module, count: int) -> Forward | None:
        """Return code that computes what a module does, to run in its place; None if there is none.

        It is compared with the module as other ways are. A sampler that has one writes `gradients`.

        Args:
            module: The module.
            count: Number of rows R of its outputs.

        Returns:
            A function of a copy of the module and its inputs.
        """
        return None

    def record(self, call: Call) -> Mapping[str, Record]:
        """Find a way to run the call again, and keep what that takes.

        Raises:
            WrongSplitError: If there is none, naming the reason.
        """
        try:
            call.static, replay = self._planned(call, call.module)
        except RefusalError as refusal:
            raise WrongSplitError(
                f"gradients cannot be split by sample: {call.name or '(root)'} "
                f"({dotted_name(type(call.module))}) has to be run again for them, and cannot be\n"
                f"Reason: {refusal.reason.rstrip('.')}.\n"
                f"Remedy: {refusal.remedy}"
            ) from refusal
        return {next(iter(call.shapes)): replay}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Run the call again and differentiate it for each sample."""
        plan, replay = kept(call, records)
        slopes = {index: grad for index, grad in enumerate(grads) if grad is not None}
        made = gradients(plan, replay, slopes, call.shapes)
        return {local: Dense(gradient.unsqueeze(1)) for local, gradient in made.items()}

    def _planned(self, call: Call, module: nn.Module) -> tuple[Plan, Replay]:
        if reason := why_not_copied(module):
            raise RefusalError(reason)
        before = call.before if isinstance(call.before, Before) else Before.of(module)
        axes = self._axes(call, module)
        count = max(len(value) for value in call.outputs if value.dim())
        sides = self.sides(call)
        slots, spec, inputs, leaves = _taken_apart(call, sides, count)
        plan = Plan(
            template=before.template,
            wanted={local: before.template.key(module, local) for local in call.shapes},
            written=before.written(module),
            spec=spec,
            slots=slots,
            leaves=leaves,
            outputs=tuple(
                Output(index, index, axis) for index, axis in enumerate(axes) if axis is not None
            ),
            count=count,
            way=Way.BATCH,
            random=_drawn(before),
            devices=before.devices,
            autocast=(call.outputs[0].device.type, call.autocast),
            recurrent=any(isinstance(inside, nn.RNNBase) for inside in module.modules()),
            rewritten=self.rewritten(module, count),
        )
        parameters = before.template.tensors(module, "_parameters")
        detached = {id(value): value.detach() for value in parameters.values()}
        values = {key: detached[id(value)] for key, value in parameters.items()}
        replay = Replay(inputs, values | before.buffers, count)
        if not count:
            return plan, replay
        trained = {key: value.requires_grad for key, value in parameters.items()}
        search = Search(plan, replay, call.outputs, axes, trained, flexible=sides is None)
        signature = (_signature(call, plan, inputs), tuple(trained.values()))
        try:
            return _remembered(module, plan, search, signature), replay
        except RefusalError as refusal:
            caches = [value for value in tree_leaves((call.args, call.kwargs)) if _is_cache(value)]
            if not caches:
                raise
            raise RefusalError(
                f"it got a cache, {dotted_name(type(caches[0]))}, and without it: {refusal.reason}",
                "call the model with use_cache=False",
            ) from refusal

    def _axes(self, call: Call, module: nn.Module) -> tuple[int | None, ...]:
        """Return where the module has the rows of its outputs; None for scalars."""
        own = self.batch_dims(module, len(call.outputs)) or [call.batch_dim] * len(call.outputs)
        return tuple(
            dim if value.dim() else None for dim, value in zip(own, call.outputs, strict=True)
        )


class GenericSampler(ReplaySampler):
    """Per-sample gradients of any module's own parameters, those behind parametrisations included.

    It serves what no other sampler is for: class tokens, scales, parametrised layers, routers with
    banks of experts.
    """

    generic = True
    methods = ()


def kept(call: PastCall, records: Mapping[str, Record]) -> tuple[Plan, Replay]:
    """Return what a `ReplaySampler` kept of a call."""
    plan: Plan = call.static
    (replay,) = records.values()
    assert isinstance(replay, Replay)
    return plan, replay


def _drawn(before: Before) -> RandomState | None:
    """Return the generators' state before a call that drew numbers; None if it drew none."""
    return None if before.random.equals(RandomState.now(before.devices)) else before.random


def _taken_apart(
    call: Call, sides: Mapping[int, Leaf] | None, count: int
) -> tuple[tuple[Any, ...], Any, tuple[Tensor, ...], tuple[Leaf, ...]]:
    """Separate the inputs' tensors, each of them once and samples first, from everything else."""
    flat, spec = tree_flatten((call.args, call.kwargs), is_leaf=_is_packed)
    places: dict[object, Place] = {}
    slots: list[Any] = []
    inputs: list[Tensor] = []
    leaves: list[Leaf] = []
    for value in flat:
        _check_kind(value)
        if not isinstance(value, Tensor):
            # The call wrote to a cache. It runs again without one, which is the same if it was
            # empty; if not, what it returns differs.
            slots.append(None if _is_cache(value) else value)
            continue
        # Modules ask whether query, key and value are the same.
        view = value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype
        kind = (*view, value.shape, value.stride(), value.requires_grad, value.is_neg())
        if kind not in places:
            places[kind] = Place(len(inputs))
            if sides is None:
                mine = value.dim() > 0 and len(value) == count
                leaf = Leaf(mine, call.batch_dim if value.dim() > call.batch_dim else 0)
            else:
                leaf = sides.get(id(value), Leaf(False))
                value = leaf.first(value, count) if leaf.own else value
            inputs.append(value)
            leaves.append(leaf)
        slots.append(places[kind])
    return tuple(slots), spec, tuple(inputs), tuple(leaves)


def _is_packed(value: object) -> bool:
    return isinstance(value, PackedSequence)


def _check_kind(value: object) -> None:
    """Refuse inputs that hold samples in a way of their own, or a state."""
    if _is_packed(value):
        raise RefusalError("it got a PackedSequence", "give it padded tensors")
    if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
        raise RefusalError("it got a nested or sparse tensor", "give it padded, dense tensors")


def _is_cache(value: object) -> bool:
    """Tell a cache of transformers, which is never imported here, by its class."""
    name = "transformers.cache_utils.Cache"
    return any(dotted_name(kind) == name for kind in type(value).__mro__)


def _signature(call: Call, plan: Plan, inputs: Sequence[Tensor]) -> object:
    """Return what may change the way that a call is run in."""
    return (
        tuple(plan.wanted),
        plan.template.modes,
        str(plan.spec),
        tuple(value for value in plan.slots if isinstance(value, Place | bool | int | str)),
        tuple(
            (leaf, value.dim(), value.dtype, value.requires_grad)
            for leaf, value in zip(plan.leaves, inputs, strict=True)
        ),
        tuple((value.dim(), value.dtype) for value in call.outputs),
        plan.count == 1,
        plan.autocast,
        plan.random is None,
    )


def _remembered(module: nn.Module, plan: Plan, search: Search, signature: object) -> Plan:
    """Return the plan that was found for calls like this one if it holds, else a new one."""
    known = _findings.setdefault(module, {})
    if signature in known:
        way, leaves, outputs = known[signature]
        old = replace(plan, way=way, leaves=leaves, outputs=outputs)
        if search.known(old):
            return old
    found = search.find()
    if len(known) >= _FINDINGS:
        known.clear()
    if search.tells_all(found):
        known[signature] = found.way, found.leaves, found.outputs
    return found

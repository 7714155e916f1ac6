"""Samplers that run a module's call again: exact for any module, at the price of running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core import (
    Call,
    GradientSampler,
    PastCall,
    PerSampleGradient,
    Record,
    WrongSplitError,
)
from ghost_core.state import RandomState
from ghost_core.tracking import dotted_name
from ghost_layers.replay.before import Before
from ghost_layers.replay.gradients import gradients, written_gradients
from ghost_layers.replay.module_copy import why_not_copied
from ghost_layers.replay.plan import Formula, OtherOutputsError, Plan, Replay, Way
from ghost_layers.replay.recording import InputRows, OutputRows, is_cache, taken_apart
from ghost_layers.replay.remembered import Question


class ReplaySampler(GradientSampler):
    """Per-sample gradients by running the recorded call again, on a copy of the module.

    Ways are tried in order: all samples at once, each by itself (`torch.vmap`), and the call as it
    was, with the random numbers and buffers of then and one backward pass for each sample, which
    serves control flow by value and whatever else belongs to the batch. The first one is taken that
    returns what the call returned, with the same gradients. Random numbers, buffers, modes and
    attributes are as the user left them afterwards.

    A call costs a forward and a backward pass of the module more; in the last way, a backward pass
    for each sample. The first call of a kind costs a few more. Gradients are built: N times the
    parameters asked for.
    """

    parameters: ClassVar[tuple[str, ...] | None] = None
    replays = True

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse modules with hooks inside, which a copy would not run, and complex parameters."""
        for name in self.owns(module):
            if module.get_parameter(name).is_complex():
                return f"its parameter {name} is complex: exclude it"
        return why_not_copied(module)

    def prepare(self, module: nn.Module) -> object:
        """Keep the module's state and, where it may draw, the random number generators."""
        return Before.of(module, draws=self.draws(module))

    def draws(self, module: nn.Module) -> bool:
        """Tell whether a call may draw random numbers, for which the generators' state is kept.

        It takes longer to look at them than to run a small layer. A call that draws all the same
        does not return again what it returned, and is refused.

        Args:
            module: The module, before a call.
        """
        return True

    def sides(self, call: Call) -> Mapping[int, InputRows] | None:
        """Say which input tensors belong to samples, where the layer itself defines it.

        Returns:
            Where tensors have their samples, by identity; samples share all others. By default
            None: tensors with as many rows as the outputs belong to samples, if they turn out to.

        Raises:
            WrongSplitError: If the layer was called in a way that cannot be split.
        """
        return None

    def rewritten(self, module: nn.Module) -> Formula | None:
        """Return what writes out the linear maps that a module computes; None if nothing does.

        It is compared with the module as other ways are. It draws random numbers only where the
        module does, as many, and leaves alone whatever else is not its own: no state is put back
        after it.

        Args:
            module: The module.
        """
        return None

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep what running the call again takes, and find a way to where its kind is new.

        Calls of a kind that is known are compared with what they returned when they run again.

        Raises:
            WrongSplitError: If there is none, naming the reason.
        """
        what = f"{call.label} ({dotted_name(type(call.module))})"
        with _named(what):
            question, replay = self._taken_apart(call, call.module)
            known = question.known(replay) if replay.count else (question.plan, frozenset())
            if known is None:
                known = question.answered(replay, call.outputs), frozenset()
        # Also where that is proven by now: a checkpoint counts what is saved, the second time too.
        copies = tuple(value.detach().clone() for value in call.outputs)
        replay = replace(replay, expected=copies)
        call.static = Planned(*known, question, what)
        return {next(iter(call.shapes)): replay}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Run the call again and differentiate it for each sample.

        Raises:
            WrongSplitError: If it does not return what it did, in no way.
        """
        planned: Planned = call.static
        (replay,) = records.values()
        assert isinstance(replay, Replay)
        with suppress(OtherOutputsError), _named(planned.what):
            made = self._replayed(planned.plan, replay, call, grads)
            if not any(made[local].materialize().any() for local in planned.untold):
                return made
        with _named(planned.what):
            recorded, replay = replay.expected, replace(replay, expected=())
            plan = planned.question.answered(replace(replay, rows=None), recorded)
        return self._replayed(plan, replay, call, grads)

    def _replayed(
        self, plan: Plan, replay: Replay, call: PastCall, grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Run the call again as planned and differentiate it.

        Raises:
            OtherOutputsError: If it does not return what it did, as far as that is not proven.
        """
        if plan.way is Way.REWRITTEN:
            return written_gradients(plan, replay, grads, call.shapes)
        slopes = {index: grad for index, grad in enumerate(grads) if grad is not None}
        return gradients(plan, replay, slopes, call.shapes)

    def _taken_apart(self, call: Call, module: nn.Module) -> tuple[Question, Replay]:
        if reason := why_not_copied(module):
            raise WrongSplitError(reason=reason)
        before = call.before
        if not isinstance(before, Before):
            before = Before.of(module, draws=self.draws(module))
        axes = self._axes(call, module)
        count = max(len(value) for value in call.outputs if value.dim())
        slots, spec, inputs, input_rows = taken_apart(call, self.sides(call), count)
        plan = Plan(
            template=before.template,
            wanted={local: before.template.key(module, local) for local in call.shapes},
            written=before.written(module),
            spec=spec,
            slots=slots,
            input_rows=input_rows,
            outputs=tuple(
                OutputRows(index, index, axis)
                for index, axis in enumerate(axes)
                if axis is not None
            ),
            count=count,
            way=Way.BATCH,
            random=_drawn(before),
            devices=before.devices,
            autocast=(call.outputs[0].device.type, call.autocast),
            recurrent=any(isinstance(inside, nn.RNNBase) for inside in module.modules()),
            rewritten=self.rewritten(module),
        )
        parameters = before.template.tensors(module, "_parameters")
        detached = {id(value): value.detach() for value in parameters.values()}
        values = {key: detached[id(value)] for key, value in parameters.items()}
        trained = {key: value.requires_grad for key, value in parameters.items()}
        leaves = tree_leaves((call.args, call.kwargs))
        cache = next((dotted_name(type(value)) for value in leaves if is_cache(value)), "")
        question = Question.of(call, plan, trained, axes, inputs, cache)
        return question, Replay(inputs, values | before.buffers, count)

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


@dataclass(frozen=True, eq=False)
class Planned:
    """What a call's way back needs, besides tensors.

    Attributes:
        plan: How calls of its kind were run so far.
        untold: Parameters whose gradients proved nothing of that so far, as they were zero.
        question: How to find that out, if it is another.
        what: The module, for messages.
    """

    plan: Plan
    untold: frozenset[str]
    question: Question
    what: str


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Name the module in refusals of running it again."""
    try:
        yield
    except WrongSplitError as refusal:
        instead = f"{refusal.remedy}; or " if refusal.remedy else ""
        raise WrongSplitError(
            f"gradients cannot be split by sample: {what} has to be run again for them, and cannot "
            "be",
            reason=refusal.reason,
            remedy=f"{instead}leave the module out with exclude=...",
        ) from refusal


def _drawn(before: Before) -> RandomState | None:
    """Return the generators' state before a call that drew numbers; None if it drew none."""
    if before.random is None or before.random == RandomState.now(before.devices):
        return None
    return before.random

"""Runs a recorded call again in some way, and compares what it gives with what the call gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_core import WrongSplitError
from ghost_core.restoring import restored
from ghost_core.state import RandomState
from ghost_layers.replay.closeness import are_close, same_rows
from ghost_layers.replay.gradients import gradients
from ghost_layers.replay.guard import Guard
from ghost_layers.replay.plan import Plan, Replay, floating, forward

_SMALL = 2**16
"""Elements up to which gradients of parameters that are not asked for are compared, as of gates."""


@dataclass
class Trial:
    """A recorded call, with copies of its parameters to try ways on.

    Attributes:
        plan: The call, with neither way nor positions of outputs decided.
        replay: Its tensors.
        recorded: Its outputs, rows first, with what is no output with rows.
        trained: First dotted names of the parameters, and whether they require grad.
    """

    plan: Plan
    replay: Replay
    recorded: tuple[Tensor, ...]
    trained: Mapping[str, bool]

    def __post_init__(self) -> None:
        """Copy the parameters asked for, and what shares memory with them."""
        values, wanted = self.replay.values, set(self.plan.wanted.values())
        memory = {_memory(values[key]) for key in wanted}
        self._real = {key: value for key, value in values.items() if _memory(value) in memory}
        self.values = values | {
            key: (value.clone() if key in self._real else value.detach()).requires_grad_(
                self.trained.get(key, False)
            )
            for key, value in values.items()
            if key in self._real or key in self.trained
        }
        tied = {id(values[key]) for key in wanted}
        self._aliases = {key for key in self._real.keys() - wanted if id(values[key]) in tied}

    # Values

    def returned(self, plan: Plan, *, differentiable: bool) -> list[Tensor]:
        """Run the module as it was and return its floating tensors.

        Args:
            plan: The call.
            differentiable: Whether inputs require grad as those of the call did.

        Raises:
            WrongSplitError: If it cannot be run.
        """
        given = [value.detach() for value in plan.whole(self.replay.inputs)]
        if differentiable:
            for value, mine in zip(self.replay.inputs, given, strict=True):
                mine.requires_grad_(value.requires_grad)
        guard = self.guard({key: self.values[key] for key in self._aliases})
        owners = {key.rpartition(".")[0] for key in self._aliases}

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for owner in owners:
                guard.enter_with(module.get_submodule(owner))
            return forward(module, *args, **kwargs)

        with self.watched(plan, guard):
            try:
                made = floating(plan.called(run, self.values, given))
            except (WrongSplitError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise failed("running", error) from error
        return made if differentiable else [value.detach() for value in made]

    def run(self, plan: Plan, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Run the call in the way of a plan and return detached outputs, rows first.

        Raises:
            WrongSplitError: If a formula draws random numbers where the call drew none: later ones
                are not looked after.
        """
        with self.watched(plan, self.guard()):
            before = RandomState.now(plan.devices) if plan.draws_nothing else None
            given = [value.detach() for value in inputs or self.replay.inputs]
            outputs = [value.detach() for value in plan.run(self.values, given)]
            if before is not None and RandomState.now(plan.devices) != before:
                raise WrongSplitError(reason="its formula drew random numbers, and the call none")
            return outputs

    def guard(
        self, aliases: Mapping[str, Tensor] | None = None, *, differentiable: bool = False
    ) -> Guard:
        """Return what keeps a call that runs again off the user's tensors; see `Guard`."""
        real = {name: self._real[key] for name, key in self.plan.wanted.items()}
        return Guard(real, aliases or {}, differentiable=differentiable)

    @contextmanager
    def watched(self, plan: Plan, guard: Guard) -> Iterator[None]:
        """Run a call in here."""
        # Hooks of the user, such as checkpointing's, are for the graph of the call alone.
        hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
        with restored() as stack:
            stack.enter_context(plan.conditions())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(hooks)
            stack.enter_context(guard)
            yield

    def same_outputs(self, plan: Plan, got: Sequence[Tensor], rows: slice = slice(None)) -> bool:
        """Tell whether outputs are those of the call, or some rows of them."""
        expected = [self.recorded[output.index][rows] for output in plan.outputs]
        pairs = zip(got, expected, strict=True)
        return all(same_rows(value, other, self._dtypes) for value, other in pairs)

    # Gradients

    def gradients(self, plan: Plan, inputs: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
        """Return the gradients that the first and the last sample have for random slopes.

        They are those of the parameters asked for, and of small ones that training moves too.
        """
        moving = [
            key
            for key, trained in self.trained.items()
            if trained and self.values[key].is_floating_point()
            if self.values[key].numel() <= _SMALL
        ]
        compared = dict.fromkeys([*self.plan.wanted.values(), *moving])
        values = {key: value.detach() for key, value in self.replay.values.items()}
        replay = replace(self.replay, inputs=inputs or self.replay.inputs, values=values)
        generator = Generator().manual_seed(0)
        slopes = {}
        for output in plan.outputs:
            like = self.recorded[output.index]
            slopes[output.index] = torch.randn(2, *like.shape[1:], generator=generator).to(like)
        # In a thread of its own, where the user's hooks on saved tensors do not see this; in this
        # context, in which ghost's hooks are silent.
        with ThreadPoolExecutor(max_workers=1) as apart:
            made = apart.submit(
                copy_context().run,
                gradients,
                replace(plan, wanted={key: key for key in compared}),
                replay.narrow(torch.tensor([0, plan.count - 1])),
                slopes,
                {key: values[key].shape for key in compared},
            ).result()
        return {key: gradient.terms[:, 0] for key, gradient in made.items()}

    def same_gradients(self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
        """Tell whether gradients are the same but for rounding."""
        return are_close(got, expected, self._dtypes)

    @property
    def _dtypes(self) -> set[torch.dtype]:
        """Dtypes that the call may have computed in."""
        return replace(self.replay, expected=self.recorded).dtypes(self.plan)


def failed(doing: str, error: Exception) -> WrongSplitError:
    """Return the error that names what stopped a call from running again."""
    return WrongSplitError(reason=f"{doing} it again failed with {type(error).__name__}: {error}")


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr() if value.numel() else id(value)

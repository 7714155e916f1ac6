"""The Tap: an identity in the graph, right behind a tracked module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghost_core._torch import applied, backward_id, own, unwatched, without_gradients
from ghost_core.errors import CaptureError

Deliver = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None] | None]
"""Takes what was saved and the gradients of a call's outputs; returns those of parameters.

None where the Tap is to be as if it was not there.
"""


def tap(
    deliver: Deliver,
    seed: Tensor,
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    label: str = "",
) -> tuple[Tensor, ...]:
    """Return a module's outputs with a Tap behind them.

    Several outputs get a Tap each, joined by one that runs after those that the loss depends on.
    A single Tap for all of them would lead from any one to what only the others come from, and
    autograd runs all that a graph leads to: parameters there would get gradients of zero, where
    they have none without ghost, and so weight decay and momentum.

        y = linear(x)        one output: one Tap
        y, state = lstm(x)   two outputs: a Branch behind each, and one Tap before them, which runs
                             once, with both gradients, or with that of y alone

    Args:
        deliver: Takes the gradients.
        seed: A scalar that requires grad, so that the node is part of the graph even where nothing
            before it requires grad.
        outputs: The outputs.
        parameters: Those whose gradient `deliver` returns.
        saved: What it gets in the backward pass.
        label: What the outputs are of, for messages.
    """
    if len(outputs) == 1:
        ends = Ends(None, deliver, label, len(parameters))
        return (applied(Tap, ends, seed, outputs[0], *parameters, *saved),)
    arrived: dict[int, dict[int, Tensor]] = {}
    gather = partial(_gathered, arrived, len(outputs))
    ends = Ends(gather, deliver, label, len(parameters))
    head = outputs[0].new_empty(())
    tapped: Tensor = applied(Tap, ends, seed, head, *parameters, *saved)
    return tuple(
        Branch.apply(arrived, label, at, each, tapped)  # type: ignore[no-untyped-call]
        for at, each in enumerate(outputs)
    )


def _gathered(arrived: dict[int, dict[int, Tensor]], count: int) -> list[Tensor | None]:
    grads = arrived.pop(backward_id(), {})
    return [grads.get(at) for at in range(count)]


class Ends(NamedTuple):
    """What a Tap knows but tensors.

    Attributes:
        gather: Gathers the gradients of several outputs; None where there is one.
        deliver: Takes them.
        label: Whose they are.
        made: Number of parameters whose gradient is returned.
    """

    gather: Callable[[], list[Tensor | None]] | None
    deliver: Deliver
    label: str
    made: int


_FIXED_INPUTS = 2  # the ends, the seed


@own
class _Twice(torch.autograd.Function):
    """Passes a gradient through, and refuses to take gradients of it.

    Inputs are: what it is a gradient of; the gradient.
    """

    @staticmethod
    def forward(ctx: Any, label: str, gradient: Tensor) -> Tensor:
        """Return the gradient."""
        ctx.label = label
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse."""
        raise CaptureError(
            f"the loss depends on a gradient that was taken through {ctx.label or 'a module'}, "
            "with create_graph=True",
            reason="gradients of gradients do not pass through what modules return, where those "
            "of samples are told apart",
            remedy="leave the modules out with exclude=... that such a gradient is taken through",
        )


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let gradients be taken once, as torch's `once_differentiable` does, and say so by name."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # as nearly always
            return backward(ctx, grad)
        made = without_gradients(backward, ctx, grad)
        if grad is None or not grad.requires_grad or ctx.absent:
            return made
        return tuple(
            None if each is None else _Twice.apply(ctx.label, each.detach().requires_grad_())  # type: ignore[no-untyped-call]
            for each in made
        )

    return run


@own
class Tap(torch.autograd.Function):
    """Passes a module's output through unchanged, and its gradient back unchanged.

    Being a node of the graph, it survives what breaks tensor and module hooks: in-place operations
    on a view of the output, `x += f(x)` under autocast, checkpointing, several backward passes.
    What the backward needs is saved by autograd, never held from Python, so that its lifetime,
    recomputation and version checks are those of any activation.

    Inputs are: its ends; the seed; the output; the parameters whose gradient is returned; the
    tensors to save.
    """

    @staticmethod
    def forward(ctx: Any, ends: Ends, seed: Tensor, output: Tensor, *tensors: Tensor) -> Tensor:
        """Save the records and return the output."""
        ctx.ends, ctx.label, ctx.absent = ends, ends.label, False
        ctx.save_for_backward(*tensors[ends.made :])
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradients over and pass the output's own on."""
        ends: Ends = ctx.ends
        if ends.gather is None:
            grads, arrives = [grad], grad is not None
        else:
            grads = ends.gather()
            arrives = any(each is not None for each in grads)
        made: Sequence[Tensor | None] = (None,) * ends.made
        if arrives:
            delivered = unwatched(ends.deliver, ctx.saved_tensors, grads)
            ctx.absent, made = delivered is None, made if delivered is None else delivered
        needed = ctx.needs_input_grad
        passed = grad if needed[_FIXED_INPUTS] else None
        n_saved = len(needed) - _FIXED_INPUTS - 1 - ends.made
        return (*(None,) * _FIXED_INPUTS, passed, *made, *(None,) * n_saved)


@own
class Branch(torch.autograd.Function):
    """Passes one of several outputs through, and keeps its gradient for the Tap that joins them.

    Inputs are: gradients by backward pass and position; whose they are; the position; the output;
    what the Tap returned, so that it runs once all gradients that arrive are there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        arrived: dict[int, dict[int, Tensor]],
        label: str,
        at: int,
        output: Tensor,
        join: Tensor,
    ) -> Tensor:
        """Return the output."""
        ctx.arrived, ctx.label, ctx.absent, ctx.at = arrived, label, False, at
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Keep the gradient and pass it on."""
        grads = ctx.arrived.setdefault(backward_id(), {})
        if grad is not None:
            grads[ctx.at] = grad
        return None, None, None, grad if ctx.needs_input_grad[3] else None, None

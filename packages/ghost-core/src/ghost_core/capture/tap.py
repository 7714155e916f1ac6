"""The Tap: an identity in the graph, right behind a tracked module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Deliver = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None]]
"""Takes what was saved and the gradients of a call's outputs; returns those of parameters."""

_FIXED_INPUTS = 4  # deliver, seed, output count, parameter count


class Tap(torch.autograd.Function):
    """Passes a module's outputs through unchanged, and their gradients back unchanged.

    Being a node of the graph, it survives what breaks tensor and module hooks: in-place operations
    on a view of the output, `x += f(x)` under autocast, checkpointing, several backward passes.
    What the backward needs is saved by autograd, never held from Python, so that its lifetime,
    recomputation and version checks are those of any activation.

    Inputs are: who takes the gradients; a scalar that requires grad, so that the node is part of
    the graph even where nothing before it requires grad; how many outputs and parameters follow;
    the outputs; the parameters whose gradient `deliver` returns; the tensors to save.
    """

    @staticmethod
    def forward(
        ctx: Any,
        deliver: Deliver,
        seed: Tensor,
        n_outputs: int,
        n_parameters: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Save the records and return the outputs."""
        ctx.deliver, ctx.n_outputs, ctx.n_parameters = deliver, n_outputs, n_parameters
        ctx.save_for_backward(*tensors[n_outputs + n_parameters :])
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in tensors[:n_outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradients over and pass them on."""
        made: Sequence[Tensor | None] = [None] * ctx.n_parameters
        if any(grad is not None for grad in grads):
            made = ctx.deliver(ctx.saved_tensors, grads)
        wanted = ctx.needs_input_grad[_FIXED_INPUTS:][: ctx.n_outputs]
        passed = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        n_saved = len(ctx.needs_input_grad) - _FIXED_INPUTS - len(passed) - len(made)
        return (*[None] * _FIXED_INPUTS, *passed, *made, *[None] * n_saved)

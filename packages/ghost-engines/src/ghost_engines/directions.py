"""Directions: the gradients that per-sample gradients are multiplied with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, TrackedParameter, UnknownNameError
from ghost_core._torch import is_graph_gone
from ghost_core.algebra import accumulation_dtype
from ghost_core.state import untouched

Closure = Callable[[], Tensor]
"""Computes a scalar loss with the model; called with the model in evaluation mode."""


@dataclass
class Direction:
    """One direction.

    Attributes:
        name: Its name.
        closure: Computes the loss whose gradient it is; None if it was given as tensors.
        refresh: Batches after which the closure is called again.
        tensors: The direction by parameter name; empty before the first call.
        age: Batches since the closure was called.
    """

    name: str
    closure: Closure | None
    refresh: int
    tensors: dict[str, Tensor]
    age: int = 0

    def renew(self, model: nn.Module, parameters: Iterable[TrackedParameter]) -> bool:
        """Call the closure if it is time to, and count the batch.

        Returns:
            Whether the direction changed.
        """
        due = self.closure is not None and (not self.tensors or self.age >= self.refresh)
        if due:
            assert self.closure is not None
            self.tensors = gradient_of(self.name, self.closure, model, parameters)
            self.age = 0
        self.age += 1
        return due


def check_closure(name: str, closure: Closure) -> None:
    """Refuse a closure that cannot be called without arguments.

    Raises:
        CaptureError: If it needs some.
    """
    try:
        signature = inspect.signature(closure)
    except ValueError:  # some builtins do not tell
        return
    try:
        signature.bind()
    except TypeError as error:
        raise CaptureError(
            f"direction {name!r}: the closure takes arguments",
            reason=f"it is called without any, and there is a {error}",
            remedy="give a function of nothing, such as lambda: loss(model, validation_batch)",
        ) from error


def gradient_of(
    name: str, closure: Closure, model: nn.Module, parameters: Iterable[TrackedParameter]
) -> dict[str, Tensor]:
    """Return the gradient of a loss without touching the training around it.

    The closure runs in evaluation mode. Random number generators, buffers, modes and `.grad` are as
    before afterwards.

    Args:
        name: The direction's name, for errors.
        closure: Computes the loss.
        model: The model.
        parameters: The parameters to differentiate.

    Raises:
        CaptureError: If the loss is no finite scalar that depends on the parameters, or was
            backpropagated before.
    """
    parameters = list(parameters)
    leaves = [model.get_parameter(parameter.name) for parameter in parameters]
    with torch.enable_grad(), untouched(model):
        model.eval()
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CaptureError(
                f"direction {name!r}: the closure must return a scalar loss that depends on the "
                f"model's parameters, not {_described(loss)}"
            )
        try:
            gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        except RuntimeError as error:
            if not is_graph_gone(error):
                raise
            raise CaptureError(
                f"direction {name!r}: the gradient of the closure's loss cannot be computed",
                reason="it was backpropagated before, by the closure itself or where a loss that "
                "was computed earlier is returned",
                remedy="compute the loss in the closure, and return it without calling backward()",
            ) from error
    if all(gradient is None for gradient in gradients):
        raise CaptureError(
            f"direction {name!r}: the closure's loss depends on none of the selected parameters; "
            "does it call another model?"
        )
    found = {
        parameter.name: torch.zeros_like(leaf) if gradient is None else gradient.to_dense()
        for parameter, leaf, gradient in zip(parameters, leaves, gradients, strict=True)
    }
    return _finite(name, {key: _widened(value) for key, value in found.items()})


def given(
    name: str,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    parameters: Iterable[TrackedParameter],
) -> dict[str, Tensor]:
    """Check a direction given by parameter name, and copy it.

    Raises:
        UnknownNameError: If a name is no parameter of the model.
        CaptureError: If a tracked parameter is missing, or a shape or value is wrong.
    """
    known = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key in tensors:
        if key not in known:
            raise UnknownNameError("parameter", key, known, f"In direction {name!r}.")
    found = {}
    for parameter in parameters:
        aliases = [alias for alias in parameter.aliases if alias in tensors]
        if not aliases:
            raise CaptureError(
                f"direction {name!r} has no tensor for {parameter.name}; give zeros, or select "
                "parameters with layers=..."
            )
        alias = aliases[0]
        for other in aliases[1:]:
            if not torch.equal(tensors[alias], tensors[other]):
                raise CaptureError(
                    f"direction {name!r} has different tensors for {alias} and {other}, which are "
                    "one parameter"
                )
        if tensors[alias].shape != parameter.shape:
            raise CaptureError(
                f"direction {name!r} has shape {tuple(tensors[alias].shape)} for {alias}, whose "
                f"shape is {tuple(parameter.shape)}"
            )
        value = tensors[alias].detach().to(parameter.device, copy=True)
        found[parameter.name] = _widened(value)
    return _finite(name, found)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))


def _finite(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise CaptureError(f"direction {name!r} is not finite at {key}")
    return tensors


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        graph = "with" if value.requires_grad else "without"
        return f"a tensor of shape {tuple(value.shape)} {graph} a gradient"
    return type(value).__name__

"""Calls a user's closure for a direction, and differentiates the loss that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghost_core import CaptureError, TrackedParameter
from ghost_core._torch import accumulation_hooks, is_graph_gone, whole
from ghost_core.differentiation import check_differentiable
from ghost_core.ranks import ALONE, Ranks
from ghost_core.restoring import graphs_kept
from ghost_core.state import untouched
from ghost_engines.directions.given import finite, given, widened

Closure = Callable[[], Tensor | Mapping[str, Tensor]]
"""Computes a scalar loss with the model, or the direction itself by parameter name."""

_Own = tuple[dict[str, Tensor], bool]
"""What a process has made, and whether that is the mean over all already, as FSDP2 makes it."""


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
            reason=f"it is called without any: {error}",
            remedy="give a function of nothing, such as lambda: loss(model, validation_batch)",
        ) from error


@dataclass(frozen=True)
class ClosureSource:
    """A closure, and how it is called: without touching the training around it.

    Random number generators, buffers, modes and `.grad` are as before afterwards. Where several
    processes train the model, each calls its own, and what they give is averaged: they may have
    parts of the validation data, or all of it.

    Attributes:
        name: The direction's name, for errors.
        closure: The user's function.
        model: The model.
        parameters: The tracked parameters.
        training: Whether it runs with the model as it is, instead of in evaluation mode.
        ranks: The processes that train the model.
    """

    name: str
    closure: Closure
    model: nn.Module
    parameters: tuple[TrackedParameter, ...]
    training: bool = False
    ranks: Ranks = ALONE

    def tensors(self) -> dict[str, Tensor]:
        """Call the closure; return what it gives, or the gradient of the loss that it gives.

        Raises:
            CaptureError: If the loss is no finite scalar that depends on the parameters, or was
                backpropagated before, or what is returned is no direction, in any process.
            UnknownNameError: If a name that is returned is no parameter of the model.
        """
        return self._averaged(self._own_tensors)

    def _own_tensors(self) -> _Own:
        with self.called() as result:
            if isinstance(result, Mapping):
                named = self.ranks.inside(result)
                return given(self.name, named, self.model, self.parameters), False
            if self.ranks.sharded is None:
                gradients = self._differentiated(self.loss_of(result))
            else:
                # None begins what all take part in before each has a loss.
                what = f"direction {self.name!r}"
                loss = self.ranks.all_or_none(what, lambda: self.loss_of(result), lambda _: what)
                gradients = self._backpropagated(loss)
        found = finite(self.name, {key: widened(each) for key, each in gradients.items()})
        return found, self.ranks.sharded is not None

    def curvature(self, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `H step`, with the Hessian H of the closure's loss: one product with it.

        Several processes average the step, and then their products with it: the step that is made
        with averaged gradients is the average of those that each would make.

        Args:
            step: A change of each tracked parameter.

        Raises:
            UnknownNameError: If a name in the step is no parameter of the model.
            CaptureError: If the closure returns no loss, the step lacks a parameter or has another
                shape, or as `tensors` does.
        """
        step = self._averaged(partial(self._own_step, step))
        return self._averaged(partial(self._own_curvature, step))

    def _own_step(self, step: Mapping[str, Tensor]) -> _Own:
        name = f"{self.name}, along a step"
        return given(name, self.ranks.inside(step), self.model, self.parameters), False

    def _own_curvature(self, step: Mapping[str, Tensor]) -> _Own:
        # Torch's plain formula for attention is the one whose second derivative is known.
        with sdpa_kernel(SDPBackend.MATH), self.called(whole=True) as result:
            if isinstance(result, Mapping):
                raise CaptureError(
                    f"direction {self.name!r} has no second order",
                    reason="its closure returns tensors, and no loss that has a Hessian",
                    remedy="return the scalar loss, or use the first order",
                )
            gradients = self._differentiated(self.loss_of(result), create_graph=True)
            slope = sum((gradients[key] * step[key].to(gradients[key])).sum() for key in gradients)
            assert isinstance(slope, Tensor)
            leaves = self.leaves()
            products: Sequence[Tensor | None] = [None] * len(leaves)
            if slope.requires_grad:  # else the loss is linear
                products = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
        found = _filled(leaves, products)
        tensors = {key: widened(each.detach()) for key, each in found.items()}
        return finite(self.name, tensors), False

    def leaves(self) -> dict[str, nn.Parameter]:
        """Return the tracked parameters by name."""
        return {each.name: self.model.get_parameter(each.name) for each in self.parameters}

    def _averaged(self, make: Callable[[], _Own]) -> dict[str, Tensor]:
        """Return what all processes make, averaged; each of them calls this at the same place."""
        what = f"direction {self.name!r}"
        tensors, is_mean = self.ranks.all_or_none(what, make, lambda made: (what, made[1]))
        return tensors if is_mean else self.ranks.average(tensors)

    @contextmanager
    def called(self, *, whole: bool = False) -> Iterator[object]:
        """Call the closure, and undo afterwards what that did.

        Args:
            whole: Whether parameters in parts are whole before, and until it is undone.
        """
        with ExitStack() as stack:
            for each in (graphs_kept(True), self.ranks.apart(), untouched(self.model)):
                stack.enter_context(each)
            if whole:
                stack.enter_context(self.ranks.whole())
            if not self.training:
                self.model.eval()
            yield self.closure()

    def loss_of(self, result: object) -> Tensor:
        """Return what the closure gave as a scalar loss.

        Raises:
            CaptureError: If it is none, or is not finite, or was backpropagated.
        """
        if any(leaf.grad is not None for leaf in self.leaves().values()):  # they were set aside
            raise self.backpropagated()
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
            raise CaptureError(
                f"direction {self.name!r}: the closure must return a scalar loss that depends on "
                f"the model's parameters, or a direction by parameter name, not "
                f"{_described(result)}"
            )
        if not result.isfinite().all():
            raise CaptureError(
                f"direction {self.name!r}: the closure's loss is {result.item()}",
                reason="a loss that is not finite has no gradient to score against",
                remedy="look for what makes it so: the validation batch, or parameters that "
                "diverged",
            )
        return result.sum()

    def _backpropagated(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradients that FSDP2 makes, whole and averaged over processes."""
        for name, leaf in self.leaves().items():
            if accumulation_hooks(leaf):
                raise CaptureError(
                    f"{name} has a hook that runs when its gradient is there, and would run on "
                    f"that of direction {self.name!r}: give tensors in place of a closure"
                )
        loss.backward()
        leaves = self.leaves()
        if all(leaf.grad is None for leaf in leaves.values()):
            raise self.independent()
        return {
            name: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            if leaf.grad is None
            else whole(leaf.grad)
            for name, leaf in leaves.items()
        }

    def backpropagated(self) -> CaptureError:
        """Return the error about a closure that computed gradients itself."""
        return CaptureError(
            f"direction {self.name!r}: the closure called backward()",
            reason="its gradients are computed where the loss that it returns is",
            remedy="return the loss without calling backward()",
        )

    def independent(self) -> CaptureError:
        """Return the error about a loss that depends on nothing that is tracked."""
        return CaptureError(
            f"direction {self.name!r}: the closure's loss depends on none of the selected "
            "parameters; does it call another model?"
        )

    def _differentiated(self, loss: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        leaves = self.leaves()
        check_differentiable(loss)
        try:
            gradients = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, create_graph=create_graph
            )
        except RuntimeError as error:
            if not is_graph_gone(error):
                raise
            raise CaptureError(
                f"direction {self.name!r}: the gradient of the closure's loss cannot be computed",
                reason="it was backpropagated before, by the closure itself or where a loss that "
                "was computed earlier is returned",
                remedy="compute the loss in the closure, and return it without calling backward()",
            ) from error
        if all(gradient is None for gradient in gradients):
            raise self.independent()
        return _filled(leaves, gradients)


def _filled(
    leaves: Mapping[str, nn.Parameter], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Return gradients by name, zeros where there are none."""
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient.to_dense()
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        graph = "with" if value.requires_grad else "without"
        return f"a tensor of shape {tuple(value.shape)} {graph} a gradient"
    return type(value).__name__

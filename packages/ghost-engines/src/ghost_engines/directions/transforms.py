"""What can be made of a direction before gradients are multiplied with it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_core._torch import tells_of_steps, whole
from ghost_engines.directions.closures import ClosureSource

logger = logging.getLogger(__name__)


class Gradient(dict[str, Tensor]):
    """A direction by parameter name, as transforms get it.

    Args:
        tensors: The direction, of parameters' shapes.
        source: What it was made by; None if it was given as tensors.
        leaves: The parameters by the same names.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        source: ClosureSource | None,
        leaves: Mapping[str, nn.Parameter],
    ) -> None:
        super().__init__(tensors)
        self._source = source
        self.leaves = leaves
        """The tracked parameters by name."""

    def curvature(self, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `H step`, with the Hessian H of the loss that this is the gradient of.

        Args:
            step: A change of each tracked parameter, by name.

        Raises:
            CaptureError: If the direction was given as tensors.
        """
        if self._source is None:
            raise CaptureError(
                "the direction has no second order",
                reason="it was given as tensors, and has no loss that has a Hessian",
                remedy="give a closure that returns the loss",
            )
        return self._source.curvature(step)

    def replaced(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return another direction for the same parameters, to hand to another transform."""
        return type(self)(tensors, self._source, self.leaves)


Transform = Callable[[Gradient], Mapping[str, Tensor]]
"""Returns another direction, of the same names and shapes; called wherever one is renewed."""


def unit_norm(gradient: Gradient) -> Gradient:
    """Divide a direction by its norm, over all parameters: dots become lengths along it.

    Raises:
        CaptureError: If it is zero.
    """
    norms = torch.stack([torch.linalg.vector_norm(each).double() for each in gradient.values()])
    length = torch.linalg.vector_norm(norms)
    if not length:
        raise CaptureError("a direction of zeros has no unit norm")
    return gradient.replaced({name: each / length.to(each) for name, each in gradient.items()})


def second_order(step: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> Transform:
    """Look beyond the slope: at what a loss does on the way of a whole step.

    The direction is `g + H step / 2`, with the Hessian H of the closure's loss: then
    `⟨direction, step⟩` is the change of the loss to second order, and the parts that samples have
    in the step have theirs in that (In-Run Data Shapley: Wang et al., 2024). It costs one
    Hessian-vector product each time that the direction is renewed.

    Several processes that train the model average what each gives as the step.

    For the step that the optimizer makes with the batch itself, see `InRunValues(..., order=2)`.

    Args:
        step: The change of each tracked parameter by name, such as -η times a batch's gradient, or
            a function that returns it.
    """

    def transform(gradient: Gradient) -> Gradient:
        product = gradient.curvature(step() if callable(step) else step)
        return gradient.replaced(
            {name: each + product[name] / 2 for name, each in gradient.items()}
        )

    return transform


def adam_aware(optimizer: torch.optim.Adam) -> Transform:
    """Let directions see gradients as the steps of Adam or AdamW do.

    A step multiplies a gradient with `(1 - β₁) / (1 - β₁ᵗ) / (√v̂ + ε)`, element by element, and so
    does this transform with the direction: a sample's dot is then its own part in the step. The
    second moments v̂ are those of the last step, and are taken as given, though each sample has a
    part in them too; what a gradient does in later steps through the momentum is left out.

    Before the first step there are no moments: the direction is zero, so that nothing is credited
    in another unit, and this is logged once.

    Args:
        optimizer: An `Adam` or `AdamW`, or a wrapper that has one in `.optimizer`.

    Raises:
        CaptureError: If it is another optimizer.
    """
    adam = _adam(optimizer)
    said = False

    def transform(gradient: Gradient) -> Gradient:
        nonlocal said
        found = {
            name: each * _factor(adam, gradient.leaves[name]).to(each)
            for name, each in gradient.items()
        }
        if not said and not any(adam.state.get(leaf) for leaf in gradient.leaves.values()):
            said = True
            logger.warning(
                "%s has made no step yet, and has no second moments: directions made by adam_aware "
                "are zero until then, and the first step credits nothing",
                type(adam).__name__,
            )
        return gradient.replaced(found)

    return transform


def _adam(optimizer: Any) -> torch.optim.Adam:
    inner = optimizer
    while not tells_of_steps(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        return inner
    raise CaptureError(
        f"adam_aware is for Adam and AdamW, not for {type(optimizer).__name__}",
        reason="each optimizer makes another step of a gradient",
        remedy="give a transform of your own: a function of a direction by parameter name",
    )


def _factor(adam: torch.optim.Adam, leaf: nn.Parameter) -> Tensor:
    """Return what a step multiplies the gradient of a parameter with, but for the learning rate."""
    (group,) = [
        each for each in adam.param_groups if any(leaf is other for other in each["params"])
    ]
    state = adam.state.get(leaf)
    if not state:
        return torch.zeros((), device=leaf.device)
    first, second = (float(each) for each in group["betas"])
    steps = float(state["step"])
    moment: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = (whole(moment) / (1 - math.pow(second, steps))).sqrt() + float(group["eps"])
    return (1 - first) / (1 - math.pow(first, steps + 1)) / root

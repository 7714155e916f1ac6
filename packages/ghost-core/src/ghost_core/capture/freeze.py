"""What becomes of weight gradients while an engine is attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor, nn

from ghost_core.tracking import TrackedModule


class Freeze(Enum):
    """What happens to the weight gradients of tracked modules while an engine is attached."""

    NEVER = "never"
    """Autograd makes them as always: training is bit-identical."""
    CALL = "call"
    """The engine makes them: parameters do not require grad during the module's call, and the
    Tap returns their gradient, so that accumulation and tied weights keep working."""
    PASS = "pass"
    """Nobody makes them: all parameters are frozen while attached. For corpus passes."""


@dataclass
class Running:
    """A tracked module's call on its way.

    Attributes:
        tracked: The module.
        before: What its sampler kept before the call.
        withheld: The parameters withheld from autograd meanwhile.
    """

    tracked: TrackedModule
    before: object = None
    withheld: list[nn.Parameter] = field(default_factory=list)

    def withhold(self, parameter: nn.Parameter) -> None:
        """Keep autograd from making a parameter's gradient."""
        if parameter.requires_grad:
            self.withheld.append(parameter)
            parameter.requires_grad_(False)

    def restore(self) -> None:
        """Give withheld parameters back."""
        for parameter in self.withheld:
            parameter.requires_grad_(True)


def is_differentiable(leaf: object, frozen: bool) -> bool:
    """Tell whether gradients can arrive at an output; frozen ones get a graph from their Tap."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return False
    return leaf.requires_grad or frozen

"""What becomes of weight gradients while an engine is attached."""

from __future__ import annotations

from enum import Enum


class Freeze(Enum):
    """What happens to the weight gradients of tracked modules while an engine is attached."""

    NEVER = "never"
    """Autograd makes them as always: training is bit-identical."""
    CALL = "call"
    """The engine makes them: parameters do not require grad during the module's call, and the
    Tap returns their gradient, so that accumulation and tied weights keep working. In a batch that
    is watched autograd makes them, to be compared with."""
    PASS = "pass"
    """Nobody makes them: all parameters are frozen while attached. For corpus passes."""

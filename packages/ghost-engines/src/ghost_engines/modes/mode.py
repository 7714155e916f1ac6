"""The modes that there are, and what each does to weight gradients."""

from __future__ import annotations

from enum import Enum

from ghost_core import Freeze, UnknownNameError


class Mode(Enum):
    """How dots come about."""

    EXACT = "exact"
    """Beside the training, which is bit-identical."""
    CONCATENATED = "concatenated"
    """With validation samples that go through the model in the same batch."""
    FUSED = "fused"
    """While the weight gradient is formed, sample by sample."""

    @property
    def freeze(self) -> Freeze:
        """What happens to the weight gradients of the training."""
        return Freeze.NEVER if self is Mode.EXACT else Freeze.CALL


def as_mode(name: str) -> Mode:
    """Return the mode of a name.

    Raises:
        UnknownNameError: If there is none.
    """
    names = [mode.value for mode in Mode]
    if name not in names:
        raise UnknownNameError("mode", name, names)
    return Mode(name)

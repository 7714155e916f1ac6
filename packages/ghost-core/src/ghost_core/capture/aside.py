"""What a recorder puts back after it served a listener in place of the engines attached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ghost_core.capture.freeze import Freeze
from ghost_core.capture.fused import FusedModules
from ghost_core.capture.listener import Listener
from ghost_core.capture.own_run import OwnRun
from ghost_core.capture.state import CaptureState
from ghost_core.split import Verifier


@dataclass(frozen=True)
class Suspended:
    """What serves the engines that are attached.

    Attributes:
        attached: Listeners and what they do to weight gradients.
        verifier: Proves the split of their batches.
        own_run: Answers for frozen parameters; None where they are not frozen.
        frozen: Whether they are.
    """

    attached: tuple[tuple[Listener, Freeze], ...]
    verifier: Verifier
    own_run: OwnRun | None
    frozen: bool

    @classmethod
    def of(cls, state: CaptureState, own_run: OwnRun | None) -> Suspended:
        """Return what is in a state now."""
        return cls(tuple(state.attached), state.verifier, own_run, bool(state.flags))

    def restore(self, state: CaptureState) -> None:
        """Put it back; once more does no harm."""
        state.attached[:] = self.attached
        state.verifier = self.verifier
        if not self.frozen:
            state.thaw()


@dataclass(frozen=True)
class Spare:
    """What serves the other listener, kept from one time to the next, and what it holds for.

    A split that was verified while parameters were frozen was not compared with gradients that
    autograd makes, so those who train have a verifier of their own.

    Attributes:
        flags: What `requires_grad` was before parameters were frozen.
        verifier: Proves the split of its batches.
        own_run: Answers for frozen parameters.
    """

    flags: Mapping[nn.Parameter, bool]
    verifier: Verifier
    own_run: OwnRun

    @classmethod
    def of(cls, state: CaptureState, fused: FusedModules) -> Spare:
        """Return what has not served anybody yet, for parameters as they are frozen now."""
        verifier = Verifier(state.model, state.tracked, state.seed, state.dim)
        return cls(dict(state.flags), verifier, OwnRun.of(state, fused))

"""Hooks and Taps on a user's model during a batch."""

from ghost_core.capture.batch import Pass
from ghost_core.capture.freeze import Freeze
from ghost_core.capture.recorder import Recorder

__all__ = ["Freeze", "Pass", "Recorder"]

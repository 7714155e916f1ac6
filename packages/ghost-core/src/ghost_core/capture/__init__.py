"""Hooks and Taps on a user's model during a batch."""

from ghost_core.capture.freeze import Freeze
from ghost_core.capture.listener import Listener, Pass
from ghost_core.capture.recorder import Recorder
from ghost_core.capture.refusals import changed_since, not_attached, open_already

__all__ = [
    "Freeze",
    "Listener",
    "Pass",
    "Recorder",
    "changed_since",
    "not_attached",
    "open_already",
]

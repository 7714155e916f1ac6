"""Which gradients of a batch are whole as they arrive, and which are terms of a sum."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ghost_core import CaptureError, Pass, TrackedParameter
from ghost_engines.held import HeldGradients

_Samples = tuple[int, int]
"""Positions of the first of some samples, and of the one after the last."""


class Terms:
    """Tells what arrives alone for a parameter and a sample, and holds what does not.

    Products of sums need all pairs of terms: those of a parameter that is used several times are
    held until the last is there.

    Args:
        parameters: The tracked parameters.
        purpose: What is not known of terms that are gone, for errors.
        instead: What to do then.
    """

    def __init__(self, parameters: Iterable[TrackedParameter], purpose: str, instead: str) -> None:
        self._parameters = tuple(parameters)
        self._purpose, self._instead = purpose, instead
        self.held = HeldGradients(self._parameters)
        """Those that are held."""
        self._several: set[tuple[str, _Samples]] = set()
        self._alone: set[tuple[str, _Samples]] = set()
        self._squared: dict[str, dict[_Samples, Tensor]] = {}

    def arrives_alone(self, pass_: Pass, parameter: TrackedParameter) -> bool:
        """Note that a gradient arrives; return whether it is all that does for its samples.

        One that is not is to be held.

            a weight that is used once               true: it is reduced, and dropped
            a weight that is used twice              false, each time: both are held
            once, and once more in a further pass    true, then an error: the first is gone

        Raises:
            CaptureError: If another one arrived before that was not held.
        """
        key = parameter.name, (pass_.samples.start, pass_.samples.stop)
        if key in self._alone:
            raise CaptureError(
                f"gradients of the same samples arrived twice for {parameter.name}, so that "
                f"{self._purpose} is not known",
                reason="the first was dropped when it had been used, since the model uses the "
                "parameter once in a pass; samples went through the model twice, or there was a "
                "second backward pass",
                remedy=f"run one pass and one backward pass for each batch, or {self._instead}",
            )
        if parameter.name in pass_.several or key in self._several:
            self._several.add(key)
            return False
        self._alone.add(key)
        return True

    def add_norms(self, pass_: Pass, name: str, squared: Tensor) -> None:
        """Add squared norms of what was not held, `[N]`."""
        self._squared.setdefault(name, {})[pass_.samples.start, pass_.samples.stop] = squared

    def squared_norms(self, n: int) -> dict[str, Tensor]:
        """Return squared norms of sums by parameter, `[N]`, for a batch of n samples.

        Raises:
            CaptureError: If something that is held was overwritten.
        """
        total = self.held.squared_norms(n)
        for name, by_samples in self._squared.items():
            for (start, stop), squared in by_samples.items():
                total[name][start:stop] += squared
        return total

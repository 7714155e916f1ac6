"""Squared norms of contributions, added up while a batch runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ghost_core import CaptureError, Pass, PerSampleGradient, TrackedParameter
from ghost_engines.held import HeldGradients

_Rows = tuple[int, int]


class NormSums:
    """Squared norms of contributions by parameter.

    Where a single gradient arrives for a parameter and a sample, its norm is taken then and
    nothing is kept. Norms of a sum need all pairs of its terms: what a parameter that is used
    several times gets is held until the batch ends.

    Args:
        parameters: The tracked parameters.
    """

    def __init__(self, parameters: Iterable[TrackedParameter]) -> None:
        parameters = tuple(parameters)
        self._held = HeldGradients(parameters)
        self._several: set[tuple[str, _Rows]] = set()
        self._single: dict[str, dict[_Rows, Tensor]] = {each.name: {} for each in parameters}

    def holds(self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient) -> bool:
        """Hold a gradient if others may arrive for the same samples.

        Returns:
            Whether it is held; if not, `add` is to be called with its squared norms.

        Raises:
            CaptureError: If one arrived before that was not held.
        """
        name, rows = parameter.name, (pass_.samples.start, pass_.samples.stop)
        if rows in self._single[name]:
            raise CaptureError(
                f"gradients of the same samples arrived twice for {name}, so that the norm of "
                "their sum is not known",
                reason="the first was dropped when its norm was taken, since the model uses the "
                "parameter once in a pass; samples went through the model twice, or there was a "
                "second backward pass",
                remedy="run one pass and one backward() for each batch, or take norms from "
                "CosineEngine, which holds all gradients until a batch is closed",
            )
        if name in pass_.several or (name, rows) in self._several:
            self._several.add((name, rows))
            self._held.add(pass_, parameter, gradient)
            return True
        return False

    def add(self, pass_: Pass, name: str, squared: Tensor) -> None:
        """Add the squared norms of a gradient that is not held, `[N]`."""
        self._single[name][pass_.samples.start, pass_.samples.stop] = squared

    def squared(self, n: int, scale: float) -> dict[str, Tensor]:
        """Return squared norms by parameter, `[N]`.

        Args:
            n: Number of samples N of the batch.
            scale: What gradients were multiplied with.

        Raises:
            CaptureError: If something that is held was overwritten.
        """
        total = self._held.squared_norms(n)
        for name, by_rows in self._single.items():
            for (start, stop), squared in by_rows.items():
                total[name][start:stop] += squared
        return {name: squared / scale / scale for name, squared in total.items()}

"""Adds up dot products by parameter, as the gradients of a batch arrive."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class DotSums:
    """Sums of dots by parameter name, `[N, K]`.

    Most parameters get one gradient in a batch, of all samples: its dots are the sum, and nothing
    is made before they are there.

    Args:
        directions: The directions by parameter name, whose dtypes and devices the sums have.
        n: Number of samples N.
        k: Number of directions K.

    Attributes:
        arrived: The sums of what arrived so far.
    """

    def __init__(self, directions: Mapping[str, Tensor], n: int, k: int) -> None:
        self._directions, self._n, self._k = dict(directions), n, k
        self.arrived: dict[str, Tensor] = {}

    def add(self, name: str, samples: slice, dots: Tensor) -> None:
        """Add the dots of some samples with the directions for a parameter.

        Args:
            name: The parameter.
            samples: Their positions in the batch: of all of them, or of a micro-batch each time.
            dots: `[samples, K]`, which nobody writes to any more.
        """
        dots, before = dots.to(self._directions[name].dtype), self.arrived.get(name)
        if samples.stop - samples.start == self._n:
            self.arrived[name] = dots if before is None else before + dots
            return
        if before is None:
            before = self.arrived[name] = self._nothing(name)
        before[samples].add_(dots)

    def total(self) -> dict[str, Tensor]:
        """Return the sums, in the order of the directions; zeros where nothing arrived."""
        arrived = self.arrived
        return {n: arrived[n] if n in arrived else self._nothing(n) for n in self._directions}

    def _nothing(self, name: str) -> Tensor:
        return self._directions[name].new_zeros(self._n, self._k)

"""The interface of random projections."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Generator, Tensor


class Projection(ABC):
    """Draws random linear maps that keep inner products in expectation.

    `ghost_core.testing.check_projection` checks the contract.
    """

    @abstractmethod
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        """Draw a map P from n to k dimensions with `E[PᵀP] = I`.

        Args:
            k: Dimensions to project to, `1 <= k <= n`.
            n: Dimensions to project from.
            generator: The only source of randomness; a CPU generator.

        Returns:
            P as float32 `[k, n]` on the CPU. Equal generators give equal maps.
        """

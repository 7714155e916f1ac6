"""The interface of random projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

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

    def options(self) -> dict[str, Any]:
        """Return, as JSON-able values by name, what it was made with: by default its attributes.

        They are part of what a store knows of its rows, and go to the class by name when the
        projection is made again.
        """
        given = getattr(self, "__dict__", {})
        return {name: value for name, value in given.items() if not name.startswith("_")}

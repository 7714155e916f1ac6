"""The gradients of small parameters, which are multiplied with the directions together.

A norm or a bias has hardly any arithmetic: it takes less than to call what does it. A model has one
or two of them for each layer, nearly all of a few sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghost_core import Dense, PerSampleGradient
from ghost_core.algebra import accumulation_dtype

SMALL = 2**12
"""Elements of the directions for a parameter, above which it is multiplied alone."""

AT_ONCE = 2**20
"""Elements of gradients that wait at once: a few MiB."""


_Taker = Callable[[Tensor], object]

_Product = tuple[_Taker, Tensor, Tensor]
"""What takes dots `[N, K]`, of gradients `[N, *shape]` and directions `[K, *shape]`."""


class SmallOnes:
    """Gradients of small parameters that wait to be multiplied."""

    def __init__(self) -> None:
        self._waiting: list[_Product] = []
        self._elements = 0

    def takes(self, gradient: PerSampleGradient, directions: Tensor) -> bool:
        """Tell whether a gradient may wait.

        One that takes its sum along where it is reduced is of another type, and may not.

        Args:
            gradient: The gradients of N samples.
            directions: `[K, *shape]`.
        """
        return type(gradient) is Dense and directions.numel() <= SMALL

    def add(self, take: _Taker, gradients: Tensor, directions: Tensor) -> None:
        """Let gradients wait.

        Args:
            take: What adds up the dots, `[N, K]`.
            gradients: `[N, *shape]`, in memory that nobody writes to.
            directions: `[K, *shape]`.
        """
        self._waiting.append((take, gradients, directions))
        self._elements += gradients.numel()
        if self._elements > AT_ONCE:
            self.multiply()

    def multiply(self) -> None:
        """Multiply all that wait, those of a kind in one product."""
        kinds: dict[tuple[object, ...], list[_Product]] = {}
        for each in self._waiting:
            _, gradients, directions = each
            key = gradients.shape, gradients.dtype, directions.shape, directions.dtype
            kinds.setdefault((*key, gradients.device), []).append(each)
        for products in kinds.values():
            dtype = accumulation_dtype(*products[0][1:])
            rows = _stacked([gradients for _, gradients, _ in products], dtype)  # [P, N, S]
            columns = _stacked([directions for _, _, directions in products], dtype)  # [P, K, S]
            for (take, _, _), dots in zip(products, rows.bmm(columns.mT).unbind(), strict=True):
                take(dots)
        self.clear()

    def clear(self) -> None:
        """Let go of all that wait."""
        self._waiting.clear()
        self._elements = 0


def _stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return P tensors `[N, *shape]` of one shape as one, `[P, N, S]`."""
    stacked = torch.stack(tensors) if tensors[0].dtype is dtype else torch.stack(tensors).to(dtype)
    return stacked.flatten(2) if stacked.dim() > 2 else stacked.unsqueeze(2)

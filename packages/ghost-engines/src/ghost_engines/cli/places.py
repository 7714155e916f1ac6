"""Where and in which dtype a command computes, and with which random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghost_core.state import seed_generators
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import raised
from ghost_engines.cli.own import DType


@dataclass(frozen=True)
class Place:
    """A device and a dtype.

    Attributes:
        device: Name of the device.
        dtype: What to cast floating numbers to; "as-is" for not at all.
    """

    device: str
    dtype: DType

    def model(self, model: nn.Module) -> None:
        """Move a model there.

        Raises:
            CommandError: If it cannot be moved.
        """
        self._try(lambda: model.to(device=self.device, dtype=self._wanted))

    def batch(self, batch: Any) -> Any:
        """Return a batch with its tensors there.

        Raises:
            CommandError: If they cannot be moved.
        """
        return self._try(lambda: tree_map(self._moved, batch))

    @property
    def _wanted(self) -> torch.dtype | None:
        found: torch.dtype | None
        found = None if self.dtype == "as-is" else getattr(torch, self.dtype)
        return found

    def _moved(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(self.device, self._wanted if leaf.is_floating_point() else None)

    def _try(self, move: Any) -> Any:
        try:
            return move()
        except Exception as error:  # torch was built without the device, and says so in many ways
            what = f"--device {self.device}: moving model and batch there"
            raise CommandError(raised(what, error)) from error


def seed(number: int) -> None:
    """Seed every global random number generator.

    Raises:
        CommandError: If the number is too large for one of them, or negative.
    """
    if not 0 <= number < 2**32:
        raise CommandError(f"--seed must be from 0 to 2**32 - 1, not {number}")
    seed_generators(number)

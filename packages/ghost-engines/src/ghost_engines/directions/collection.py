"""The directions of an engine, by name, and all of them in one tensor for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, TrackedParameter, UnknownNameError
from ghost_core.algebra import accumulation_dtype
from ghost_core.ranks import ALONE, Ranks
from ghost_engines.directions.closures import Closure
from ghost_engines.directions.direction import Direction, direction_of
from ghost_engines.directions.factored import FactoredDirection, Uses
from ghost_engines.directions.transforms import Transform


class Directions:
    """Named directions for the same parameters.

    Args:
        model: The model that the parameters belong to.
        parameters: The tracked parameters.
        ranks: The processes that train it, over which directions are averaged.
    """

    def __init__(
        self, model: nn.Module, parameters: Iterable[TrackedParameter], ranks: Ranks = ALONE
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._parameters = tuple(parameters)
        self._by_name: dict[str, Direction] = {}
        self._stacked: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K directions, in the order of their columns."""
        return tuple(self._by_name)

    def __getitem__(self, name: str) -> Direction:
        if name not in self._by_name:
            raise UnknownNameError("direction", name, self._by_name)
        return self._by_name[name]

    def add(
        self,
        name: str,
        direction: Closure | FactoredDirection | Mapping[str, Tensor],
        *,
        refresh: int | None,
        transform: Transform | None,
        training: bool,
        factors: bool,
    ) -> None:
        """Add a direction, or replace the one of this name: see `ScoringEngine.add_direction`.

        Args:
            name: Its name.
            direction: What it is given as.
            refresh: Batches after which it is made anew.
            transform: What to make of it.
            training: Whether a closure runs with the model as it is.
            factors: Whether the engine can multiply with factors.
        """
        self._by_name[name] = direction_of(
            name,
            direction,
            self._model,
            self._parameters,
            refresh=refresh,
            transform=transform,
            training=training,
            ranks=self._ranks,
            factors=factors,
        )
        self._stacked = {}

    def remove(self, name: str) -> None:
        """Remove a direction.

        Raises:
            UnknownNameError: If there is none of this name.
        """
        del self._by_name[self[name].name]
        self._stacked = {}

    @property
    def due(self) -> bool:
        """Whether it is time to make any of them anew."""
        return any(each.due for each in self._by_name.values())

    def renewed(self) -> dict[str, Tensor]:
        """Renew the directions that are due, and count the batch.

        Returns:
            All directions by parameter name, `[K, *shape]`, but for those that have factors there.

        Raises:
            CaptureError: If there is no direction.
        """
        if not self._by_name:
            raise CaptureError("there is nothing to score against: call add_direction first")
        # All of them are asked: each counts its batches.
        changed = [each.renew() for each in self._by_name.values()]
        if any(changed) or not self._stacked:
            self._stacked = {each.name: self._stack(each.name) for each in self._parameters}
        return self._stacked

    @property
    def factored(self) -> tuple[Direction, ...]:
        """Those of which factors are to be captured before each batch."""
        return tuple(each for each in self._by_name.values() if each.factored is not None)

    @property
    def uses(self) -> dict[str, dict[int, Uses]]:
        """The factors by parameter, and by column of the direction that they are of."""
        found: dict[str, dict[int, Uses]] = {}
        for at, direction in enumerate(self._by_name.values()):
            for name, each in direction.uses.items():
                found.setdefault(name, {})[at] = each
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what another process needs to go on as this one would."""
        return {name: each.state_dict() for name, each in self._by_name.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the process did whose state it is.

        Raises:
            CaptureError: If it had other directions.
        """
        if tuple(state) != self.names:
            raise CaptureError(
                f"the state is of directions {', '.join(state) or 'none'}, and the engine has "
                f"{', '.join(self.names) or 'none'}: add the same, in the same order, first"
            )
        for name, each in self._by_name.items():
            each.load_state_dict(state[name])
        self._stacked = {}

    def _stack(self, parameter: str) -> Tensor:
        """Return all directions for a parameter, and let each have its part of that memory."""
        built = [each for each in self._by_name.values() if parameter not in each.uses]
        if not built:
            (one,) = [each for each in self._parameters if each.name == parameter]
            dtype = accumulation_dtype(one.dtype)
            return torch.empty(0, *one.shape, dtype=dtype, device=one.device)
        rows = [each.tensors[parameter] for each in built]
        stacked = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
        for each, row in zip(built, stacked.unbind(), strict=True):
            each.tensors[parameter] = row
        return stacked

"""Which of several processes this one is, as launchers such as torchrun say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from ghost_engines.cli.errors import CommandError


@dataclass(frozen=True)
class Ranks:
    """One of several processes.

    Attributes:
        rank: Its number.
        world: How many there are.
        local: Its number on this machine.
    """

    rank: int
    world: int
    local: int

    @classmethod
    def now(cls) -> Self:
        """Return what the environment says; without a launcher there is one process.

        Raises:
            CommandError: If it says nonsense.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = [os.environ.get(name, default) for name, default in zip(names, "010", strict=True)]
        try:
            rank, world, local = map(int, given)
        except ValueError:
            rank, world, local = -1, 0, 0
        if not 0 <= rank < world or local < 0:
            listed = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
            raise CommandError(f"the environment does not say which process this is: {listed}")
        return cls(rank, world, local)

    def device(self, name: str) -> str:
        """Return the device of this process: `cuda` stands for the one of its own number."""
        return f"cuda:{self.local}" if name == "cuda" and self.world > 1 else name

"""What all of ghost's own commands have in common: how they run, and types of their options."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

DType = Literal["float64", "float32", "bfloat16", "float16", "as-is"]
Named = tyro.conf.arg
Count = Annotated[int | None, Named(metavar="INT")]


class Own:
    """What it does is the function `run` of the module beside this one that has its name."""

    def run(self) -> int:
        """Do it, and return the exit status."""
        module = import_module(f"ghost_engines.cli.{type(self).__name__.lower()}")
        status: int = module.run(self)
        return status


@dataclass(frozen=True, kw_only=True)
class Configured:
    """What may have its options in a file.

    Args:
        config: File of YAML with any of these options, by name; what is given here too goes first.
    """

    config: Annotated[Path | None, Named(metavar="FILE")] = None

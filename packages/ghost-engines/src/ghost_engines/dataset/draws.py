"""Finds what draws random numbers while losses are computed, where no module says that it does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from ghost_core.restoring import graphs_kept
from ghost_core.state import RandomState, random_state_kept

logger = logging.getLogger(__name__)

_TORCH = str(Path(torch.__file__).parent)


class _Draws(TorchFunctionMode):
    """Notes the functions of torch's that draw, and where they are called.

    Attributes:
        found: What was noted, each once.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._devices = list(devices)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and look at the generators before and after."""
        before = RandomState.now(self._devices)
        result = func(*args, **({} if kwargs is None else kwargs))
        if RandomState.now(self._devices) != before:
            self.found[f"{resolve_name(func) or func} ({_caller()})"] = None
        return result


def _caller() -> str:
    """Return the file and line outside of torch that called what runs."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_TORCH) and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"


def warn_of_draws(run: Callable[[], object], devices: Iterable[torch.device]) -> None:
    """Say what draws random numbers in a computation that is known to; it runs once more.

    Args:
        run: The computation.
        devices: Where it may draw, beside the CPU.
    """
    devices = list(devices)
    with random_state_kept(devices):  # what is drawn later is what would have been drawn
        before = RandomState.now(devices).by_library
        with graphs_kept(False), _Draws(devices) as draws:
            run()
        after = RandomState.now(devices).by_library
    others = [f"{name}'s generator" for name in before if before[name] != after[name]]
    named = ", ".join([*draws.found] or others)
    logger.warning(
        "random numbers are drawn while losses are computed, by %s, though the model is in "
        "evaluation mode: rows are those of one draw, and others where a pass goes on or batches "
        "are other ones. If it is dropout, give it training=model.training",
        named,
    )

"""Where the tracked modules stand in a model, and whether they still do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from ghost_core._torch import direct_modules
from ghost_core.capture.refusals import moved


class _Place(NamedTuple):
    """A module in another one."""

    siblings: dict[str, nn.Module | None]
    key: str
    module: nn.Module
    name: str


class Places:
    """Remembers where modules stand, each of them in all its places, and what is around them.

    Args:
        root: The model.
        modules: The modules.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        wanted, named = set(modules), dict(root.named_modules(remove_duplicate=False))
        paths = {
            path
            for name, module in named.items()
            if module in wanted
            for path in accumulate(name.split("."), "{}.{}".format)
            if path
        }
        self._places = [
            _Place(direct_modules(named[parent]), key, named[path], path)
            for path in sorted(paths)
            for parent, _, key in [path.rpartition(".")]
        ]

    def check(self) -> None:
        """Refuse a model in which one of them was replaced or removed.

        Raises:
            CaptureError: Naming it.
        """
        for siblings, key, module, name in self._places:
            if siblings.get(key) is not module:
                raise moved(name, gone=siblings.get(key) is None)

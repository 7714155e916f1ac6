"""Values that can be written to a file: texts, numbers, lists and mappings of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ghost_core import CaptureError


def is_plain(value: Any) -> bool:
    """Tell whether `plain` can say a value, and JSON can."""
    try:
        json.dumps(plain(value), allow_nan=False)
    except (CaptureError, ValueError):
        return False
    return True


def plain(value: Any, where: str = "options") -> Any:
    """Return a value as lists, dictionaries, texts and numbers.

    Raises:
        CaptureError: If it is something else.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where) for each in value]
    raise CaptureError(
        f"{where} cannot be written to a file: {value!r}",
        reason="the config of a run is saved in its folder, and compared where it is resumed",
        remedy="give texts, numbers, lists and mappings of these",
    )

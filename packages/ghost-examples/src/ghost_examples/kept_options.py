"""The options that a run was begun with, which it goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ghost_core import CaptureError
from ghost_engines.files import make_root, write_json

OPTIONS = "options.json"


def check_options(
    asked: Any, folder: Path, *, free: Sequence[str], flag: str, begun: bool, writes: bool = True
) -> None:
    """Write down the options of a new run; refuse to go on with a run that had others.

    Options of a run that failed before it began bind nobody.

    Args:
        asked: The options, a dataclass.
        folder: Where the run writes to.
        free: Names of options that may differ where a run is gone on with.
        flag: The flag that names the folder, for the messages.
        begun: Whether a run was begun there.
        writes: Whether this process writes them down.

    Raises:
        CaptureError: If the run had others, or they cannot be written, or read.
    """
    content = {name: _plain(value) for name, value in asdict(asked).items() if name not in free}
    path = folder / OPTIONS
    if begun and path.exists():
        _check_same(_read(path), content, folder, flag)
    elif writes:
        try:
            make_root(folder)
            write_json(path, content, folder)
        except OSError as error:
            raise CaptureError(f"nothing can be written to {flag}: {error}") from error


def _check_same(found: dict[str, Any], now: dict[str, Any], folder: Path, flag: str) -> None:
    for name, value in now.items():
        if found.get(name) != value:
            raise CaptureError(
                f"the run in {folder} has {name}={found.get(name)!r}, and this one "
                f"{name}={value!r}",
                reason="what was measured would be of two different runs",
                remedy=f"go on with the same {name}, or choose another {flag}",
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        found, said = None, str(error)
    else:
        said = "it has no options by name"
    if isinstance(found, dict):
        return found
    raise CaptureError(
        f"{path} does not say what options the run beside it was begun with",
        reason=said,
        remedy="restore the file from a copy, or begin a run in another folder",
    )


def _plain(value: object) -> object:
    return str(value.absolute()) if isinstance(value, Path) else value

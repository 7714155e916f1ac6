"""What a run was: its config, model and versions, as they stand in its folder."""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ghost_core import CaptureError
from ghost_core.tracking import dotted_name
from ghost_engines.runs.config import RunConfig
from ghost_engines.values import stepping
from ghost_engines.versions import version

logger = logging.getLogger(__name__)

Description = dict[str, Any]

_MOVES = "folder"
"""The field that may change: a folder can be moved."""


def describe(
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    directions: Iterable[str],
) -> Description:
    """Return what a run is, as JSON can say it.

    Args:
        config: Its config; defaults are part of the description.
        model: The model, of which class and dtypes are described.
        optimizer: The optimizer, of which the class is.
        scaler: The gradient scaler, of which the class is.
        directions: Names of the directions.
    """
    dtypes = Counter(str(each.dtype).removeprefix("torch.") for each in model.parameters())
    return {
        "config": config.to_dict(),
        "model": dotted_name(type(model)),
        "dtypes": dict(sorted(dtypes.items())),
        "optimizer": dotted_name(type(stepping(optimizer))),
        "scaler": None if scaler is None else dotted_name(type(scaler)),
        "directions": list(directions),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # it is a str of its own kind
            "ghost-core": version("ghost-core"),
            "ghost-engines": version("ghost-engines"),
            "ghost-layers": version("ghost-layers"),
        },
    }


def check_same(found: Description, now: Description, where: str) -> None:
    """Refuse to go on with a run that was another; log where only versions differ.

    Args:
        found: What was saved.
        now: What is there.
        where: What it was saved in, for the message.

    Raises:
        CaptureError: If they differ, naming the field, or nothing of a run was saved.
    """
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), dict) for name in ("config", "versions")
    ):
        raise CaptureError(
            f"{where} does not say what a run was",
            reason="it is damaged, or of something else",
            remedy="restore it from a copy, or begin a run in another folder",
        )
    before, after = _fields(found), _fields(json.loads(json.dumps(now)))
    for name in [*after, *(before.keys() - after.keys())]:
        if before.get(name) != after.get(name):
            raise CaptureError(
                f"{where} is of a run with {name}={before.get(name)!r}, and this one has "
                f"{name}={after.get(name)!r}",
                reason="what was measured would be of two different runs",
                remedy=f"resume with the same {name}, or begin a run in another folder",
            )
    if found["versions"] != now["versions"]:
        logger.warning("%s was written with other versions: %s", where, found["versions"])


def _fields(description: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: each for name, each in description.items() if name not in ("config", "versions")}
    config = {name: each for name, each in description["config"].items() if name != _MOVES}
    return config | rest

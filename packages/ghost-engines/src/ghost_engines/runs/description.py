"""What a run was: its config, model and versions, as they stand in its folder."""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ghost_core import CaptureError
from ghost_core.tracking import dotted_name
from ghost_engines.runs.config import RunConfig
from ghost_engines.runs.engines import Engines, effective_options, scorer_of
from ghost_engines.runs.plain import is_plain, plain
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
    engines: Engines,
    credits: bool,
) -> Description:
    """Return what a run is, as JSON can say it.

    Args:
        config: Its config; defaults are part of the description.
        model: The model, of which class and dtypes are described.
        optimizer: The optimizer, of which the class is.
        scaler: The gradient scaler, of which the class is.
        engines: The engines, of which all options are described, and the scorer's directions.
        credits: Whether values are added up, which the config may leave open.
    """
    dtypes = Counter(str(each.dtype).removeprefix("torch.") for each in model.parameters())
    scorer = scorer_of(engines)
    options = _written(effective_options(config, engines))
    named = config.chooses
    policy = None if named is None else {named.name: plain(named.effective)}
    return {
        "config": config.to_dict(),
        "model": dotted_name(type(model)),
        "dtypes": dict(sorted(dtypes.items())),
        "optimizer": dotted_name(type(stepping(optimizer))),
        "scaler": None if scaler is None else dotted_name(type(scaler)),
        "directions": list(scorer.directions) if scorer else [],
        "effective": {"values": credits, "scales": _scales(scaler), "policy": policy} | options,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # it is a str of its own kind
            "ghost-core": version("ghost-core"),
            "ghost-engines": version("ghost-engines"),
            "ghost-layers": version("ghost-layers"),
        },
    }


def _scales(scaler: torch.amp.GradScaler | None) -> bool:
    """Tell whether losses are scaled: a scaler that is disabled leaves them."""
    if scaler is None:
        return False
    return scaler.is_enabled() if hasattr(scaler, "is_enabled") else True


def _written(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return options as JSON can say them, and the names of those that it cannot say."""
    said: dict[str, dict[str, Any]] = {}
    unsaid: dict[str, list[str]] = {}
    for engine, given in options.items():
        said[engine] = {}
        for name, value in given.items():
            if isinstance(value, torch.dtype):  # a config names it
                said[engine][name] = str(value).removeprefix("torch.")
            elif is_plain(value):
                said[engine][name] = plain(value)
            else:
                unsaid.setdefault(engine, []).append(name)
    return {"options": said, "not_written": unsaid}


def check_same(found: Description, now: Description, where: str) -> None:
    """Refuse to go on with a run that was another; log where only versions differ.

    Args:
        found: What was saved.
        now: What is there.
        where: What it was saved in, for the message.

    Raises:
        CaptureError: If they differ, naming the field, or nothing of a run was saved.
    """
    if not _is_whole(found):
        raise CaptureError(
            f"{where} does not say what a run was",
            reason="it is damaged, or of something else",
            remedy="restore it from a copy, or begin a run in another folder",
        )
    now = json.loads(json.dumps(now))
    before, after = _fields(found), _fields(now)
    names = [*after, *(before.keys() - after.keys())]
    # Another version may have other options, and an older one did not write any.
    before, after = before | (old := _effective(found)), after | (new := _effective(now))
    for name in [*names, *(name for name in new if name in old)]:
        if before.get(name) != after.get(name):
            raise CaptureError(
                f"{where} is of a run with {name}={before.get(name)!r}, and this one has "
                f"{name}={after.get(name)!r}",
                reason="what was measured would be of two different runs",
                remedy=f"resume with the same {name}, or begin a run in another folder",
            )
    if found["versions"] != now["versions"]:
        logger.warning("%s was written with other versions: %s", where, found["versions"])


def _is_whole(found: object) -> bool:
    """Tell whether this is a description, whatever it says."""
    if not isinstance(found, dict):
        return False
    effective = found.get("effective", {"options": {}})
    parts = [found.get("config"), found.get("versions"), effective]
    if not all(isinstance(each, dict) for each in parts):
        return False
    options = effective.get("options")
    return isinstance(options, dict) and all(isinstance(each, dict) for each in options.values())


def _effective(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has come of a config: options by `engine.option`."""
    found = description.get("effective", {"options": {}})
    options = {
        f"{engine}.{name}": value
        for engine, given in found["options"].items()
        for name, value in given.items()
    }
    known = {
        f"effective {name}": found[name] for name in ("values", "scales", "policy") if name in found
    }
    return known | options


def _fields(description: Mapping[str, Any]) -> dict[str, Any]:
    apart = ("config", "versions", "effective")
    rest = {name: each for name, each in description.items() if name not in apart}
    config = {name: each for name, each in description["config"].items() if name != _MOVES}
    return config | rest

"""Which projection is meant, and what a store remembers of it."""

from __future__ import annotations

import json
from typing import Any

from ghost_core import CaptureError, Projection, UnknownNameError
from ghost_core.plugins import installed
from ghost_core.tracking import dotted_name


def resolve(given: str | Projection | type[Projection]) -> tuple[str, Projection]:
    """Return a projection and its name: what a plugin offers it as, else that of its class.

    Args:
        given: A name, a projection, or a class of them.

    Raises:
        UnknownNameError: If no plugin offers one of that name, or it is none of these.
    """
    offered = installed()
    if isinstance(given, str):
        with offered.blame("projection", given):
            return given, offered.projection(given)()
    made = given() if isinstance(given, type) and issubclass(given, Projection) else given
    if not isinstance(made, Projection):
        hint = "Give the name of one, a Projection, or a class of them."
        raise UnknownNameError("projection", given, offered.projections, hint)
    kind = type(made)
    names = [name for name, each in offered.projections.items() if each is kind]
    return (names[0] if names else dotted_name(kind)), made


def described(name: str, projection: Projection) -> dict[str, Any]:
    """Return what a projection was made with, and the plugin or module that it is from.

    Args:
        name: Its name.
        projection: The projection.

    Raises:
        CaptureError: If what it was made with has no JSON form.
    """
    options = projection.options()
    try:
        plain = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"the options of the projection {name} have no JSON form: {error}",
            reason="a store compares them when it is gone on with",
            remedy="write its options(), which returns numbers, texts and lists of these by name",
        ) from error
    owner = installed().owner("projection", name)
    return {"options": plain, "source": owner or type(projection).__module__}

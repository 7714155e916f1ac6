"""Every hook that a plugin may implement, and the marker to implement it with.

A plugin is a module (or any object) with functions marked `@hookimpl`, named by an entry point in
the group `ghost`. Each hook takes nothing and returns a mapping of what the plugin offers.
"""

from __future__ import annotations

from collections.abc import Mapping

import pluggy
from torch import nn

from ghost_core.capture import Listener
from ghost_core.projection import Projection
from ghost_core.sampler import GradientSampler

GROUP = "ghost"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def ghost_samplers() -> Mapping[str | type[nn.Module], type[GradientSampler]]:  # type: ignore[empty-body]
    """Say which sampler handles which layer.

    Returns:
        Sampler classes by layer class, or by the class's dotted name where importing it would be
        costly. Subclasses that run the same methods are handled as well.
    """


@hookspec
def ghost_engines() -> Mapping[str, type[Listener]]:  # type: ignore[empty-body]
    """Offer engines.

    Returns:
        Subclasses of `ghost_core.Engine` by name.
    """


@hookspec
def ghost_projections() -> Mapping[str, type[Projection]]:  # type: ignore[empty-body]
    """Offer random projections.

    Returns:
        Projection classes by the name that `ProjectionEngine(init=...)` takes.
    """

"""Every hook that a plugin may implement, and the marker to implement it with.

A plugin is a module (or any object) with functions marked `@hookimpl`, named by an entry point in
the group `ghost`. Each hook takes nothing and returns a mapping of what the plugin offers: classes,
or an `Override` of one where ghost itself offers something under that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pluggy
from torch import nn

from ghost_core.capture import Listener
from ghost_core.projection import Projection
from ghost_core.sampler import GradientSampler

GROUP = "ghost"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True)
class Override:
    """Offers something in place of what ghost's own packages offer under the same name.

        @hookimpl
        def ghost_samplers():
            return {nn.Linear: Override(MyLinearSampler)}

    Of two plugins that override one name, neither does.

    Attributes:
        offer: What is offered instead: a class, as it would stand there alone.
    """

    offer: type[Any]


@hookspec
def ghost_samplers() -> Mapping[str | type[nn.Module], type[GradientSampler] | Override]:  # type: ignore[empty-body]
    """Say which sampler handles which layer.

    Returns:
        Sampler classes by layer class, or by the class's dotted name where importing it would be
        costly. Subclasses that run the same methods are handled as well.
    """


@hookspec
def ghost_engines() -> Mapping[str, type[Listener] | Override]:  # type: ignore[empty-body]
    """Offer engines.

    Returns:
        Subclasses of `ghost_core.Engine` by name.
    """


@hookspec
def ghost_projections() -> Mapping[str, type[Projection] | Override]:  # type: ignore[empty-body]
    """Offer random projections.

    Returns:
        Projection classes by the name that `ProjectionEngine(init=...)` takes.
    """

"""Every hook that a plugin may implement, and the marker to implement it with.

A plugin is a module (or any object) with functions marked `@hookimpl`, named by an entry point in
the group `ghost`. Each hook takes nothing and returns a mapping of what the plugin offers: classes,
or an `Override` of one where ghost itself offers something under that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pluggy
from torch import nn

from ghost_core.capture import Listener
from ghost_core.policy import Policy
from ghost_core.projection import Projection
from ghost_core.sampler import GradientSampler

GROUP = "ghost"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@runtime_checkable
class Command(Protocol):
    """A subcommand of `ghost`, with what it was told.

    Any class with this method is one. Make it a dataclass with a docstring: its fields are what
    can be told on the command line, by type, and the docstring is the help. tyro reads both.
    """

    def run(self) -> int:
        """Do it, and return the exit status: 0, or 2 if it could not be done."""


@dataclass(frozen=True, init=False)
class Override:
    """Offers something in place of what ghost's own packages offer under the same name.

        @hookimpl
        def ghost_samplers():
            return {nn.Linear: Override(MyLinearSampler)}

    Of two plugins that override one name, neither does.

    Attributes:
        offer: What is offered instead: a class, as it would stand there alone.
        unknown: What else was said of it, which only a newer version of ghost may know: an offer
            with such a field is reported and left out, and the plugin's others stand.
    """

    offer: type[Any]
    unknown: tuple[str, ...] = ()

    def __init__(self, offer: type[Any], **unknown: object) -> None:
        object.__setattr__(self, "offer", offer)
        object.__setattr__(self, "unknown", tuple(unknown))


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


@hookspec
def ghost_policies() -> Mapping[str, type[Policy] | Override]:  # type: ignore[empty-body]
    """Offer policies, which choose what to train on.

    Returns:
        Policy classes by the name that `CandidateScores.choose` takes.
    """


@hookspec
def ghost_commands() -> Mapping[str, type[Command] | Override]:  # type: ignore[empty-body]
    """Offer subcommands of `ghost`.

    Returns:
        Classes of commands by name: small letters, digits and hyphens.
    """

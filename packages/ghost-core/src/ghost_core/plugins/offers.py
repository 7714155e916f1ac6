"""Gathers what plugins offer, and decides who gives what several offer under one name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pluggy
from torch import nn

from ghost_core.errors import PluginError, told
from ghost_core.plugins.disabled import DISABLED_VARIABLE, Disabled
from ghost_core.plugins.hookspecs import Override
from ghost_core.tracking import dotted_name

_BASES = {
    "sampler": "GradientSampler",
    "engine": "Engine",
    "projection": "Projection",
    "policy": "Policy",
    "command": "Command",
}

_OWN = frozenset({"ghost-core", "ghost-layers", "ghost-engines", "ghost-examples"})
"""Distributions of ghost itself, whose offers are defaults: they stand until overridden."""


def plural(kind: str) -> str:
    """Return what several offers of a kind are called, as their hook is."""
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def _hook(kind: str) -> str:
    return f"ghost_{plural(kind)}"


@dataclass
class Plugin:
    """An installed entry point and how loading it went.

    Attributes:
        name: `distribution:entry`.
        version: Version of the distribution.
        offers: What it contributes, as `kind name`.
        problems: What went wrong; empty if nothing did.
        disabled: Whether the environment switches it off.
        withheld: Offers that the environment switches off, as `kind name`.
    """

    name: str
    version: str
    offers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    disabled: bool = False
    withheld: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """One line on how loading went."""
        if self.disabled:
            return f"disabled by {DISABLED_VARIABLE}"
        if self.problems:
            how = "loaded in part" if self.offers else "failed"
            return f"{how}: {'; '.join(self.problems)}"
        if self.withheld:
            return f"loaded, without {', '.join(self.withheld)} ({DISABLED_VARIABLE})"
        return "loaded"

    @property
    def is_own(self) -> bool:
        """Whether it is one of ghost's own."""
        return self.name.partition(":")[0] in _OWN


class Offer(NamedTuple):
    """What one plugin offers under a name."""

    value: type[Any]
    plugin: Plugin
    overrides: bool


@dataclass
class Offers:
    """Gathers the offers of each kind, and reports bad and contested ones to their plugins.

    Attributes:
        plugins: All plugins by name.
        disabled: What the environment switches off.
    """

    plugins: Mapping[str, Plugin]
    disabled: Disabled

    def gather(self, manager: pluggy.PluginManager, kind: str, base: type[Any]) -> dict[str, Offer]:
        """Return the offers of a kind that stand, by name."""
        found: dict[str, list[Offer]] = {}
        for impl in getattr(manager.hook, _hook(kind)).get_hookimpls():
            plugin = self.plugins[impl.plugin_name.rpartition(":")[0]]
            for name, (value, overrides) in _checked(impl.function, kind, base, plugin).items():
                if self.disabled.offer(plugin.name, kind, name):
                    plugin.withheld.append(f"{kind} {name}")
                else:
                    found.setdefault(name, []).append(Offer(value, plugin, overrides))
        accepted = {}
        for name, offers in found.items():
            if (chosen := _chosen(f"{kind} {name}", offers)) is not None:
                accepted[name] = chosen
                chosen.plugin.offers.append(f"{kind} {name}")
        return accepted


def _chosen(what: str, offers: Sequence[Offer]) -> Offer | None:
    """Return the offer that stands, if one does: an override, else ghost's own, else the only one.

    Everybody else who wants the name is told why they do not get it.
    """
    overrides = [offer for offer in offers if offer.overrides]
    defaults = [offer for offer in offers if not offer.overrides and offer.plugin.is_own]
    others = [offer for offer in offers if not offer.overrides and not offer.plugin.is_own]
    if len(overrides) > 1:
        _contest(what, overrides, "overridden")
    if len(overrides) == 1:
        _yield_to(what, others, overrides[0], "disable one")
        return overrides[0]
    if defaults:
        _yield_to(what, others, defaults[0], "offer an Override to take its place, or disable one")
        return defaults[0]
    if len(others) > 1:
        _contest(what, others, "offered")
    return others[0] if len(others) == 1 else None


def _contest(what: str, rivals: Sequence[Offer], how: str) -> None:
    names = [offer.plugin.name for offer in rivals]
    for offer in rivals:
        by = ", ".join(name for name in names if name != offer.plugin.name)
        offer.plugin.problems.append(
            f"PluginConflictError: {what} is also {how} by {by}; disable one by naming its "
            f"distribution or the offer in {DISABLED_VARIABLE}"
        )


def _yield_to(what: str, beaten: Sequence[Offer], winner: Offer, remedy: str) -> None:
    for offer in beaten:
        offer.plugin.problems.append(
            f"PluginConflictError: {what} is given by {winner.plugin.name}; {remedy} in "
            f"{DISABLED_VARIABLE}"
        )


def _checked(
    hook: Callable[[], Any], kind: str, base: type[Any], plugin: Plugin
) -> dict[str, tuple[type[Any], bool]]:
    """Return what a hook offers by name, and whether it overrides; what does not fit is reported.

    Args:
        hook: The plugin's function.
        kind: What it offers.
        base: What that is to be a class of.
        plugin: The plugin, which is told of its faults.
    """
    checked: dict[str, tuple[type[Any], bool]] = {}
    try:
        offered = hook()
        if not isinstance(offered, Mapping):
            raise PluginError(f"{_hook(kind)} returned {type(offered).__name__}, not a mapping")
        for key, given in offered.items():
            try:
                name = _name(key, kind)
                found = _value(given, kind, base)
                if name in checked:
                    raise PluginError(f"{_hook(kind)} offers {name} twice, by class and by name")
                checked[name] = found, isinstance(given, Override)
            except PluginError as error:
                plugin.problems.append(told(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may fail in any way at all
        plugin.problems.append(told(error))
    return checked


def _name(key: Any, kind: str) -> str:
    """Return the name that something is offered under."""
    if kind == "sampler" and isinstance(key, type) and issubclass(key, nn.Module):
        return dotted_name(key)
    if not isinstance(key, str):
        raise PluginError(f"{_hook(kind)} has the key {key!r}, not a name")
    if kind == "command" and not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise PluginError(
            f"ghost_commands has the key {key!r}; a command's name has small letters, digits, and "
            "hyphens"
        )
    return key


def _value(given: Any, kind: str, base: type[Any]) -> type[Any]:
    """Return the class that is offered."""
    if isinstance(given, Override) and given.unknown:
        fields = ", ".join(map(repr, given.unknown))
        raise PluginError(
            f"an Override has {fields}, which this version of ghost does not know: the offer of "
            f"{getattr(given.offer, '__name__', given.offer)} is left out"
        )
    value = given.offer if isinstance(given, Override) else given
    if not (isinstance(value, type) and issubclass(value, base)):
        raise PluginError(f"{_hook(kind)} offers {value!r}, which is no class of {_BASES[kind]}")
    if missing := getattr(value, "__abstractmethods__", None):
        raise PluginError(f"{value.__name__} does not implement {', '.join(sorted(missing))}")
    return value

"""Discovers plugins through entry points and collects what they offer.

A plugin that is broken, or that offers what another one offers, is reported and left out; all
others keep working. Pluggy's own loader would stop at the first broken plugin and silently skip
the second of two that chose the same entry point name, so plugins go by `distribution:entry`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from types import MappingProxyType
from typing import Any

import pluggy
from torch import nn

from ghost_core.capture import Listener
from ghost_core.errors import PluginError, UnknownNameError
from ghost_core.plugins import hookspecs
from ghost_core.projection import Projection
from ghost_core.sampler import GradientSampler
from ghost_core.tracking import Claim, Patterns, SamplerRegistry, Selection, dotted_name

logger = logging.getLogger(__name__)

_BASES = {"sampler": "GradientSampler", "engine": "Engine", "projection": "Projection"}

DISABLED_VARIABLE = "GHOST_DISABLED_PLUGINS"
"""Environment variable: names of distributions, separated by commas, whose plugins are skipped."""


@dataclass
class Plugin:
    """An installed entry point and how loading it went.

    Attributes:
        name: `distribution:entry`.
        version: Version of the distribution.
        offers: What it contributes, as `kind name`.
        problems: What went wrong; empty if nothing did.
        disabled: Whether the environment switches it off.
    """

    name: str
    version: str
    offers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    disabled: bool = False

    @property
    def status(self) -> str:
        """One line on how loading went."""
        if self.disabled:
            return f"disabled by {DISABLED_VARIABLE}"
        return f"failed: {'; '.join(self.problems)}" if self.problems else "loaded"


@dataclass(frozen=True)
class Contributions:
    """All that the working plugins offer.

    Attributes:
        plugins: Every installed plugin, working or not, in order of name.
        samplers: Samplers by module.
        engines: Engine classes by name.
        projections: Projection classes by name.
    """

    plugins: tuple[Plugin, ...]
    samplers: SamplerRegistry
    engines: Mapping[str, type[Listener]]
    projections: Mapping[str, type[Projection]]

    def projection(self, name: str) -> type[Projection]:
        """Return a projection class by name.

        Raises:
            UnknownNameError: If no plugin offers it.
        """
        if name not in self.projections:
            raise UnknownNameError("projection", name, self.projections, failure_note(self.plugins))
        return self.projections[name]


def select(
    layers: Patterns = "*",
    exclude: Patterns = (),
    *,
    generic: bool = True,
    lift: bool = True,
    batch_dim: Mapping[str, int] = MappingProxyType({}),
    row_owner: Mapping[str, str] = MappingProxyType({}),
    registry: SamplerRegistry | None = None,
) -> Selection:
    """Say what to track, and how; `ghost_core.Engine` describes the options.

    Args:
        layers: Globs over dotted names of modules or parameters: what to track.
        exclude: Globs over dotted names: what to leave out of it.
        generic: Whether layers without a sampler of their own may be replayed.
        lift: Whether shared values may be followed.
        batch_dim: Axis of the samples, by glob over names of modules.
        row_owner: Key of the batch that tells the sample of each row, by glob.
        registry: Where samplers are found; by default those of all installed plugins.
    """
    known = installed().samplers if registry is None else registry
    return Selection(known, layers, exclude, generic, batch_dim, row_owner, lift)


@functools.cache
def installed() -> Contributions:
    """Return what the installed plugins offer; discovery happens once in a process."""
    return collect(
        [
            (distribution, entry)
            for distribution in distributions()
            for entry in distribution.entry_points.select(group=hookspecs.GROUP)
        ]
    )


def collect(entries: list[tuple[Distribution, EntryPoint]]) -> Contributions:
    """Load plugins and gather their offers. One that fails is reported, never fatal."""
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    disabled = {_canonical(name) for name in os.environ.get(DISABLED_VARIABLE, "").split(",")}
    plugins: dict[str, Plugin] = {}
    # Distributions may be listed twice where sys.path names a folder twice.
    for distribution, entry in sorted(entries, key=lambda pair: (pair[0].name, pair[1].name)):
        name = f"{distribution.name}:{entry.name}"
        if name in plugins:
            continue
        plugin = plugins[name] = Plugin(name, distribution.version)
        if _canonical(distribution.name) in disabled:
            plugin.disabled = True
        else:
            _load(manager, plugin, entry)
    offers = _Offers(plugins)
    samplers = offers.gather(manager, "sampler", GradientSampler)
    engines = offers.gather(manager, "engine", Listener)
    projections = offers.gather(manager, "projection", Projection)
    for plugin in plugins.values():
        if plugin.problems:
            logger.warning("plugin %s %s %s", plugin.name, plugin.version, plugin.status)
    claims = [Claim(name, kind, owner) for name, (kind, owner) in samplers.items()]
    listed = tuple(sorted(plugins.values(), key=lambda plugin: plugin.name))
    return Contributions(
        listed,
        SamplerRegistry(claims, failure_note(listed)),
        {name: kind for name, (kind, _) in engines.items()},
        {name: kind for name, (kind, _) in projections.items()},
    )


def failure_note(plugins: tuple[Plugin, ...]) -> str:
    """Return a remark for error messages that names the plugins with problems."""
    broken = [plugin.name for plugin in plugins if plugin.problems or plugin.disabled]
    return f" (plugins left out: {', '.join(broken)}; see `ghost plugins`)" if broken else ""


def _canonical(name: str) -> str:
    """Return a distribution's name as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _load(manager: pluggy.PluginManager, plugin: Plugin, entry: EntryPoint) -> None:
    try:
        manager.register(entry.load(), plugin.name)
        misspelt = [
            impl.function.__name__
            for caller in (manager.get_hookcallers(manager.get_plugin(plugin.name)) or [])
            if not caller.has_spec()
            for impl in caller.get_hookimpls()
            if impl.plugin_name == plugin.name
        ]
        if misspelt:
            known = [name for name in vars(hookspecs) if name.startswith("ghost_")]
            raise UnknownNameError("hook", misspelt[0], known)
    except Exception as error:  # a plugin may fail in any way at all
        _leave_out(manager, plugin, error)


def _leave_out(manager: pluggy.PluginManager, plugin: Plugin, error: Exception) -> None:
    if manager.has_plugin(plugin.name):
        manager.unregister(name=plugin.name)
    plugin.problems.append(f"{type(error).__name__}: {error}")


class _Offers:
    """Gathers the offers of each kind, and reports bad and contested ones to their plugins."""

    def __init__(self, plugins: dict[str, Plugin]) -> None:
        self._plugins = plugins

    def gather(
        self, manager: pluggy.PluginManager, kind: str, base: type[Any]
    ) -> dict[str, tuple[type[Any], str]]:
        found: dict[str, list[tuple[type[Any], str]]] = {}
        for impl in getattr(manager.hook, f"ghost_{kind}s").get_hookimpls():
            plugin = self._plugins[impl.plugin_name]
            try:
                offered = _checked(impl.function(), kind, base)
            except Exception as error:  # a plugin may fail in any way at all
                plugin.problems.append(f"{type(error).__name__}: {error}")
                continue
            for name, value in offered.items():
                found.setdefault(name, []).append((value, plugin.name))
        accepted = {}
        for name, rivals in found.items():
            if len(rivals) == 1:
                accepted[name] = rivals[0]
                self._plugins[rivals[0][1]].offers.append(f"{kind} {name}")
                continue
            owners = [owner for _, owner in rivals]
            for owner in owners:
                others = ", ".join(other for other in owners if other != owner)
                self._plugins[owner].problems.append(
                    f"PluginConflictError: {kind} {name} is also offered by {others}; "
                    f"disable one by naming its distribution in {DISABLED_VARIABLE}"
                )
        return accepted


def _checked(offered: Any, kind: str, base: type[Any]) -> dict[str, type[Any]]:
    if not isinstance(offered, Mapping):
        raise PluginError(f"ghost_{kind}s returned {type(offered).__name__}, not a mapping")
    checked = {}
    for key, value in offered.items():
        is_layer = isinstance(key, type) and issubclass(key, nn.Module)
        if not isinstance(key, str) and not (kind == "sampler" and is_layer):
            raise PluginError(f"ghost_{kind}s has the key {key!r}, not a name")
        if not (isinstance(value, type) and issubclass(value, base)):
            raise PluginError(
                f"ghost_{kind}s offers {value!r}, which is no class of {_BASES[kind]}"
            )
        if missing := getattr(value, "__abstractmethods__", None):
            raise PluginError(f"{value.__name__} does not implement {', '.join(sorted(missing))}")
        name = key if isinstance(key, str) else dotted_name(key)
        if name in checked:
            raise PluginError(f"ghost_{kind}s offers {name} twice, by class and by name")
        checked[name] = value
    return checked

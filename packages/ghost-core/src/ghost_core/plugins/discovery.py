"""Discovers plugins through entry points and collects what they offer.

A plugin that is broken, or that offers what another one offers, is reported and left out; all
others keep working, and so do the hooks of a plugin that fit where one does not. Pluggy's own
loader would stop at the first broken plugin and silently skip the second of two that chose the same
entry point name, so plugins go by `distribution:entry`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from types import MappingProxyType, SimpleNamespace
from typing import TypeVar

import pluggy

from ghost_core.arguments import switch
from ghost_core.capture import Listener
from ghost_core.errors import CaptureError, UnknownNameError, told
from ghost_core.plugins import hookspecs
from ghost_core.plugins.disabled import Disabled
from ghost_core.plugins.hookspecs import Command
from ghost_core.plugins.offers import Offers, Plugin
from ghost_core.policy import Policy
from ghost_core.projection import Projection
from ghost_core.sampler import GradientSampler
from ghost_core.tracking import Blame, Claim, Patterns, SamplerRegistry, Selection

logger = logging.getLogger(__name__)

OfferT = TypeVar("OfferT")

NAMELESS = "(nameless)"
"""Stands for the name of a distribution whose metadata has none."""


@dataclass(frozen=True)
class Contributions:
    """All that the working plugins offer.

    Attributes:
        plugins: Every installed plugin, working or not, in order of name.
        samplers: Samplers by module.
        engines: Engine classes by name.
        projections: Projection classes by name.
        policies: Policy classes by name.
        commands: Subcommands of `ghost` by name.
    """

    plugins: tuple[Plugin, ...]
    samplers: SamplerRegistry
    engines: Mapping[str, type[Listener]]
    projections: Mapping[str, type[Projection]]
    policies: Mapping[str, type[Policy]]
    commands: Mapping[str, type[Command]]

    def owner(self, kind: str, name: str) -> str:
        """Return the plugin whose offer of a name stands; an empty name if there is none."""
        offer = f"{kind} {name}"
        return next((plugin.name for plugin in self.plugins if offer in plugin.offers), "")

    def blame(self, kind: str, name: str) -> Blame:
        """Return what names the plugin of an offer where it raises inside."""
        return Blame(f"raised by the {kind} {name} of the plugin {self.owner(kind, name)}")

    def engine(self, name: str) -> type[Listener]:
        """Return an engine class by name.

        Raises:
            UnknownNameError: If no plugin offers it.
        """
        return self._named("engine", name, self.engines)

    def projection(self, name: str) -> type[Projection]:
        """Return a projection class by name.

        Raises:
            UnknownNameError: If no plugin offers it.
        """
        return self._named("projection", name, self.projections)

    def policy(self, name: str) -> type[Policy]:
        """Return a policy class by name.

        Raises:
            UnknownNameError: If no plugin offers it.
        """
        return self._named("policy", name, self.policies)

    def _named(self, kind: str, name: str, offers: Mapping[str, OfferT]) -> OfferT:
        if name not in offers:
            raise UnknownNameError(kind, name, offers, failure_note(self.plugins))
        return offers[name]


def select(
    layers: Patterns = "*",
    exclude: Patterns = (),
    *,
    generic: bool = True,
    lift: bool = True,
    batch_dim: Mapping[str, int | None] = MappingProxyType({}),
    row_owner: Mapping[str, str] = MappingProxyType({}),
    units: Patterns = (),
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
        units: Globs over dotted names of modules that run again as one.
        registry: Where samplers are found; by default those of all installed plugins.

    Raises:
        CaptureError: If `generic`, `lift` or `registry` is of another kind.
    """
    known = installed().samplers if registry is None else registry
    if not isinstance(known, SamplerRegistry):
        raise CaptureError(
            f"registry must be a SamplerRegistry, not {registry!r}",
            reason=f"it is of type {type(registry).__name__}",
            remedy="make one of claims, or leave it out for the samplers of all plugins",
        )
    generic, lift = switch("generic", generic), switch("lift", lift)
    return Selection(known, layers, exclude, generic, batch_dim, row_owner, lift, units)


@functools.cache
def installed() -> Contributions:
    """Return what the installed plugins offer; discovery happens once in a process."""
    return collect(
        [
            (distribution, entry)
            for distribution in distributions()
            for entry in _entries(distribution)
        ]
    )


def _entries(distribution: Distribution) -> list[EntryPoint]:
    """Return a distribution's entry points for ghost; none if they cannot be read."""
    try:
        return list(distribution.entry_points.select(group=hookspecs.GROUP))
    except Exception as error:  # any package may be broken, also those that ghost has no part in
        logger.warning(
            "the entry points of %s cannot be read, so it has no plugins: %s",
            _name(distribution) or distribution.locate_file(""),
            told(error),
        )
        return []


def _name(distribution: Distribution) -> str:
    """Return a distribution's name; an empty one if its metadata has none."""
    try:
        return distribution.metadata["Name"] or ""
    except Exception:  # without a name, or without metadata: the caller reports it
        return ""


def collect(entries: list[tuple[Distribution, EntryPoint]]) -> Contributions:
    """Load plugins and gather their offers. One that fails is reported, never fatal."""
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    disabled = Disabled.now()
    plugins: dict[str, Plugin] = {}
    # Distributions may be listed twice where sys.path names a folder twice.
    for distribution, entry in sorted(entries, key=lambda pair: (_name(pair[0]), pair[1].name)):
        name = f"{_name(distribution) or NAMELESS}:{entry.name}"
        if name in plugins:
            continue
        plugin = plugins[name] = Plugin(name, _version(distribution))
        if not _name(distribution):
            plugin.problems.append("its distribution has no name in its metadata")
        elif disabled.plugin(_name(distribution), entry.name):
            plugin.disabled = True
        else:
            _load(manager, plugin, entry)
    offers = Offers(plugins, disabled)
    samplers = offers.gather(manager, "sampler", GradientSampler)
    engines = offers.gather(manager, "engine", Listener)
    projections = offers.gather(manager, "projection", Projection)
    policies = offers.gather(manager, "policy", Policy)
    commands = offers.gather(manager, "command", Command)
    disabled.warn()
    for plugin in plugins.values():
        if plugin.problems:
            logger.warning("plugin %s %s %s", plugin.name, plugin.version, plugin.status)
    claims = [Claim(name, offer.value, offer.plugin.name) for name, offer in samplers.items()]
    listed = tuple(sorted(plugins.values(), key=lambda plugin: plugin.name))
    return Contributions(
        listed,
        SamplerRegistry(claims, failure_note(listed)),
        {name: offer.value for name, offer in engines.items()},
        {name: offer.value for name, offer in projections.items()},
        {name: offer.value for name, offer in policies.items()},
        {name: offer.value for name, offer in commands.items()},
    )


def _version(distribution: Distribution) -> str:
    try:
        return distribution.metadata["Version"] or "(no version)"
    except Exception:  # what is in the metadata is not ours to judge
        return "(no version)"


def failure_note(plugins: tuple[Plugin, ...]) -> str:
    """Return a remark for error messages that names the plugins with problems."""
    broken = [plugin.name for plugin in plugins if plugin.problems or plugin.disabled]
    return f" (plugins left out: {', '.join(broken)}; see `ghost plugins`)" if broken else ""


def _load(manager: pluggy.PluginManager, plugin: Plugin, entry: EntryPoint) -> None:
    """Import a plugin and register its hooks one by one, so that each stands for itself."""
    try:
        loaded = entry.load()
        named = {name: manager.parse_hookimpl_opts(loaded, name) for name in dir(loaded)}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may fail in any way at all, sys.exit among them
        plugin.problems.append(told(error))
        return
    known = [each for each in vars(hookspecs) if each.startswith("ghost_")]
    for name, options in named.items():
        if options is None:
            continue
        hook = SimpleNamespace(**{name: getattr(loaded, name)})
        try:
            if (meant := options.get("specname") or name) not in known:
                raise UnknownNameError("hook", meant, known, "Is it of a newer ghost?")
            manager.register(hook, f"{plugin.name}:{name}")
        except (UnknownNameError, pluggy.PluginValidationError) as error:
            manager.unregister(hook, f"{plugin.name}:{name}")
            plugin.problems.append(told(error))

"""Which parameters are tracked, under which names, and who computes their gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Size, nn

from ghost_core.errors import CaptureError, UnknownNameError, UnsupportedLayerError
from ghost_core.registry import SamplerRegistry, dotted_name
from ghost_core.sampler import GradientSampler

Patterns = str | Sequence[str]
"""Globs over dotted names: one, several separated by commas, or a sequence."""


@dataclass(frozen=True)
class Site:
    """A tracked parameter.

    Attributes:
        parameter: Its first dotted name in `model.named_parameters()`.
        aliases: All its dotted names; several where modules share it.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.
    """

    parameter: str
    aliases: tuple[str, ...]
    shape: Size
    dtype: torch.dtype
    device: torch.device

    @property
    def kind(self) -> str:
        """Shape, dtype and device, for messages."""
        return f"{str(self.dtype).removeprefix('torch.')} {tuple(self.shape)} on {self.device}"


@dataclass(frozen=True)
class TrackedModule:
    """A module whose calls are captured.

    Attributes:
        name: Dotted name; the first, where the module stands in several places.
        module: The module.
        sampler: Its sampler.
        sites: The tracked parameters by local name.
    """

    name: str
    module: nn.Module
    sampler: GradientSampler
    sites: dict[str, Site]

    @property
    def label(self) -> str:
        """Name and tracked parameters, for messages."""
        return f"{self.name or '(root)'} [{', '.join(s.parameter for s in self.sites.values())}]"

    @property
    def shapes(self) -> dict[str, Size]:
        """Shapes of the tracked parameters by local name."""
        return {local: site.shape for local, site in self.sites.items()}


@dataclass(frozen=True)
class Tracking:
    """The tracked parameters in order of their names, and their modules in the model's order."""

    sites: tuple[Site, ...]
    modules: tuple[TrackedModule, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the tracked parameters."""
        return frozenset(site.parameter for site in self.sites)

    def difference(self, other: Tracking) -> str:
        """Say what is first found to differ; nothing if all is equal."""
        mine = {site.parameter: site for site in self.sites}
        theirs = {site.parameter: site for site in other.sites}
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in theirs:
                return f"{name} is not there or not trainable any more"
            if name not in mine:
                return f"{name} is new or trainable now"
            if mine[name] != theirs[name]:
                return f"{name}: {mine[name].kind} before, {theirs[name].kind} now"
        for before, after in zip(self.modules, other.modules, strict=False):
            if before != after:
                return f"{before.name or 'the root'} is another module now"
        return "" if len(self.modules) == len(other.modules) else "modules were added or removed"


def track(
    model: nn.Module,
    registry: SamplerRegistry,
    layers: Patterns = "*",
    exclude: Patterns = (),
    flags: Mapping[nn.Parameter, bool] = MappingProxyType({}),
) -> Tracking:
    """Find the selected trainable parameters and a sampler for each module that owns one.

    A pattern selects a parameter if it matches one of its dotted names or the dotted name of a
    module around it, so `h.0.attn` and `*attn*` both take all parameters inside.

    Args:
        model: The root module.
        registry: Where samplers are found.
        layers: What to track.
        exclude: What to leave out of it.
        flags: `requires_grad` of parameters that are frozen for the time being.

    Raises:
        UnknownNameError: If a pattern matches nothing.
        CaptureError: If no trainable parameter is selected, or a module has been compiled.
        UnsupportedLayerError: If no sampler handles an owner of a selected parameter.
    """
    _refuse_compiled(model)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    selected = _select(names.values(), layers)
    excluded = _select(names.values(), exclude)
    sites = {
        parameter: Site(
            aliases[0], tuple(aliases), parameter.shape, parameter.dtype, parameter.device
        )
        for parameter, aliases in names.items()
        if flags.get(parameter, parameter.requires_grad)
        and aliases[0] in selected
        and aliases[0] not in excluded
    }
    if not sites:
        trainable = sum(flags.get(parameter, parameter.requires_grad) for parameter in names)
        raise CaptureError(
            f"no trainable parameter is selected: {trainable} of {len(names)} parameters require "
            f"gradients, layers={layers!r}, exclude={exclude!r}"
        )
    modules: list[TrackedModule] = []
    unhandled: list[tuple[str, dict[str, Site], str]] = []
    for name, module in model.named_modules():
        own = {
            local: sites[parameter]
            for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter in sites
        }
        if own:
            found = registry.find(module)
            if isinstance(found, GradientSampler):
                modules.append(TrackedModule(name, module, found, own))
            else:
                unhandled.append((name, own, found))
    _check_handled(modules, unhandled)
    return Tracking(tuple(sorted(sites.values(), key=lambda site: site.parameter)), tuple(modules))


def _check_handled(
    modules: Iterable[TrackedModule], unhandled: Iterable[tuple[str, dict[str, Site], str]]
) -> None:
    """Raise if a parameter has no owner with a sampler.

    A module that only holds what another one uses, such as the bias of BERT's head, needs none;
    that it does not use it is for the verification to find.
    """
    handled = {site for tracked in modules for site in tracked.sites.values()}
    problems: list[str] = []
    parameters: list[str] = []
    for name, own, reason in unhandled:
        if missing := [site.parameter for site in own.values() if site not in handled]:
            problems.append(f"  {name or '(root)'} [{', '.join(missing)}]: {reason}")
            parameters += missing
    if problems:
        raise UnsupportedLayerError(
            "no per-sample gradients for these modules:\n"
            + "\n".join(problems)
            + f"\nLeave them out with exclude={','.join(parameters)!r}, or register a sampler for "
            "them as a plugin."
        )


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Split comma-separated globs."""
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


def _select(names: Iterable[list[str]], patterns: Patterns) -> set[str]:
    """Return the first names of the parameters that match one of the patterns."""
    groups = list(names)
    chosen: set[str] = set()
    for pattern in as_patterns(patterns):
        found = {
            aliases[0] for aliases in groups if any(_matches(pattern, alias) for alias in aliases)
        }
        if not found:
            known = {prefix for aliases in groups for alias in aliases for prefix in _paths(alias)}
            hint = "Patterns are globs over names of modules and parameters, as in '*attn*'."
            raise UnknownNameError("layer", pattern, known, hint)
        chosen |= found
    return chosen


def _matches(pattern: str, name: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in _paths(name))


def _paths(name: str) -> list[str]:
    """Return a dotted name and all its prefixes: `a.b.c` gives `a`, `a.b` and `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        original = getattr(module, "_orig_mod", None)
        if isinstance(original, nn.Module) or getattr(module, "_compiled_call_impl", None):
            raise CaptureError(
                f"{name or 'the model'} ({dotted_name(type(module))}) is compiled, and a compiled "
                "module ignores hooks added later. Give the engine the uncompiled model and "
                "attach it before torch.compile."
            )

"""Modules that run again as one unit, with all that is inside of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ghost_core.errors import CaptureError
from ghost_core.tracking.patterns import Patterns, as_patterns, by_module
from ghost_core.tracking.registry import Found, Refused, SamplerRegistry


def unit_names(model: nn.Module, patterns: Patterns, *, generic: bool) -> frozenset[str]:
    """Return the names of the modules that are units.

    Args:
        model: The root module.
        patterns: Globs over dotted names of modules.
        generic: Whether samplers that handle any module may be used.

    Raises:
        UnknownNameError: If a glob matches no module.
        CaptureError: If nothing may run them again.
    """
    globs = as_patterns(patterns, "units")
    if globs and not generic:
        raise CaptureError(
            f"units={patterns!r} and generic=False contradict each other",
            reason="a unit runs again, as any module can, for all parameters inside of it",
            remedy="leave one of them out",
        )
    return frozenset(by_module(model, "units", dict.fromkeys(globs, True), lambda _, each: each))


def find_unit(registry: SamplerRegistry, module: nn.Module) -> Found | Refused:
    """Return the sampler that runs a module again, whatever its class has for its formula."""
    found = registry.find_generic(module)
    if isinstance(found, Found) and any(each.is_complex() for each in module.parameters()):
        return Refused("a parameter inside of the unit is complex")
    return found


def whole(module: nn.Module) -> tuple[str, ...]:
    """Return the local names of all parameters inside of a module, all of them where several."""
    return tuple(name for name, _ in nn.Module.named_parameters(module, remove_duplicate=False))


def check_units(units: Iterable[str], names: Iterable[str]) -> None:
    """Refuse modules inside of a unit of another engine, whose gradients would arrive twice.

    Args:
        units: Names of units.
        names: Names of all modules that are captured.

    Raises:
        CaptureError: If there is one.
    """
    known = list(names)
    for unit in units:
        inside = [name for name in known if name != unit and name.startswith(unit and f"{unit}.")]
        if inside:
            raise CaptureError(
                f"engines on one model must agree on units: {unit or '(root)'} is one of some, "
                f"and {inside[0]} inside of it is captured by others"
            )

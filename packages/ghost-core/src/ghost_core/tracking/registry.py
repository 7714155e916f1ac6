"""Finds the sampler for a module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ghost_core.errors import GhostError, PluginConflictError, PluginError, told
from ghost_core.sampler import GradientSampler


class Claim(NamedTuple):
    """A plugin's offer to handle a kind of module."""

    module: str
    """Dotted name of the module's class."""
    sampler: type[GradientSampler]
    plugin: str


@dataclass(frozen=True)
class Found:
    """There is a sampler for a module, which a plugin offers."""

    sampler: GradientSampler
    claim: Claim

    def owns(self, module: nn.Module) -> tuple[str, ...]:
        """Return the local names of the parameters that the sampler handles.

        Raises:
            PluginError: If it fails.
        """
        with _blaming(self.claim, f"{self.claim.sampler.__name__}.owns raised"):
            return self.sampler.owns(module)


@dataclass(frozen=True)
class Refused:
    """There is no sampler for a module."""

    reason: str


class SamplerRegistry:
    """Maps modules to samplers by the class whose code they run.

    Classes go by dotted name, so that offering a sampler for a library's layer does not import
    the library.

    Args:
        claims: What the plugins offer.
        note: A remark for errors, such as which plugins failed to load.

    Raises:
        PluginConflictError: If a class is claimed twice.
    """

    def __init__(self, claims: Iterable[Claim], note: str = "") -> None:
        self._claims: dict[str, Claim] = {}
        self._samplers: dict[type[GradientSampler], GradientSampler] = {}
        self._note = note
        for claim in claims:
            rival = self._claims.setdefault(claim.module, claim)
            if rival is not claim:
                raise PluginConflictError(
                    f"plugins {rival.plugin!r} and {claim.plugin!r} both handle {claim.module}; "
                    "disable one by naming its distribution in GHOST_DISABLED_PLUGINS"
                )

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Every claim, in order of registration."""
        return tuple(self._claims.values())

    def find(
        self, module: nn.Module, wanted: Collection[str] = (), *, generic: bool = True
    ) -> Found | Refused:
        """Return the sampler for a module, or the reason why there is none.

        A subclass is handled by the sampler of the class whose methods it still runs. Being an
        instance of a known class is not enough: a subclass may compute something else. What fits no
        class falls to the sampler of a base class that handles any module, such as `nn.Module`.

        Args:
            module: The module.
            wanted: Local names of the module's own parameters that matter. What is behind a
                parametrisation makes a module another layer only if it matters.
            generic: Whether samplers that handle any module may be used.

        Raises:
            PluginError: If a sampler cannot be made, or fails.
        """
        kind, reason = type(module), ""
        for base in kind.__mro__:
            claim = self._claims.get(dotted_name(base))
            if claim is None or (claim.sampler.generic and not generic):
                continue
            sampler = self._sampler(claim)
            unfit = _unfit(sampler, module, base, wanted)
            if unfit is None:
                with _blaming(claim, f"{claim.sampler.__name__}.refuse raised"):
                    refusal = sampler.refuse(module)
                return Found(sampler, claim) if refusal is None else Refused(refusal)
            reason = reason or unfit
        return Refused(reason or f"no sampler is registered for {dotted_name(kind)}{self._note}")

    def find_generic(self, module: nn.Module) -> Found | Refused:
        """Return the sampler that handles any module of a kind, or the reason why there is none.

        Args:
            module: The module.

        Raises:
            PluginError: If the sampler cannot be made, or fails.
        """
        for base in type(module).__mro__:
            claim = self._claims.get(dotted_name(base))
            if claim is not None and claim.sampler.generic:
                sampler = self._sampler(claim)
                with _blaming(claim, f"{claim.sampler.__name__}.refuse raised"):
                    refusal = sampler.refuse(module)
                return Found(sampler, claim) if refusal is None else Refused(refusal)
        return Refused(f"no sampler is registered that runs any module again{self._note}")

    def _sampler(self, claim: Claim) -> GradientSampler:
        if claim.sampler not in self._samplers:
            with _blaming(claim, f"{claim.sampler.__name__} cannot be made:"):
                self._samplers[claim.sampler] = claim.sampler()
        return self._samplers[claim.sampler]


@contextmanager
def _blaming(claim: Claim, what: str) -> Iterator[None]:
    """Name the plugin of a sampler that raises."""
    try:
        yield
    except GhostError:
        raise
    except Exception as error:
        distribution = claim.plugin.partition(":")[0]
        raise PluginError(
            f"{what} {told(error)}",
            reason=f"it is the sampler of the plugin {claim.plugin} for {claim.module}",
            remedy="report it to the plugin's authors, or do without it: "
            f"GHOST_DISABLED_PLUGINS={distribution}:sampler:{claim.module}",
        ) from error


def _unfit(
    sampler: GradientSampler, module: nn.Module, base: type, wanted: Collection[str]
) -> str | None:
    """Say why a module is another layer than the class that a sampler is for."""
    kind = type(module)
    for method in ("__call__", *sampler.methods):
        if method in vars(module) or getattr(kind, method) is not getattr(base, method):
            return f"{dotted_name(kind)} replaces {method} of {base.__name__}"
    direct = {name for name, _ in module.named_parameters(recurse=False)}
    handled = sampler.parameters
    if handled is not None and (surplus := (direct | set(wanted)) - set(handled)):
        return (
            f"it owns {', '.join(sorted(surplus))}, which {base.__name__} does not "
            "(a parametrisation or weight norm?)"
        )
    return sampler.unfit(module)


def dotted_name(kind: type) -> str:
    """Return a class's dotted name."""
    return f"{kind.__module__}.{kind.__qualname__}"

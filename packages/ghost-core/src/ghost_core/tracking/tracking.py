"""Which parameters are tracked, under which names, and who computes their gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Size, nn
from torch.nn.parameter import is_lazy

from ghost_core._torch import direct_parameters, is_compiled, is_composed, is_plain_shard, shards
from ghost_core.arguments import text
from ghost_core.arguments import whole as whole_number
from ghost_core.errors import CaptureError, UnsupportedLayerError
from ghost_core.sampler import GradientSampler, own_parameters
from ghost_core.tracking.blame import Blame
from ghost_core.tracking.patterns import Patterns, by_module, select_parameters
from ghost_core.tracking.registry import Found, SamplerRegistry, dotted_name
from ghost_core.tracking.units import check_units, find_unit, unit_names, whole


@dataclass(frozen=True)
class TrackedParameter:
    """A tracked parameter.

    Attributes:
        name: Its first dotted name in `model.named_parameters()`.
        aliases: All its dotted names; several where modules share it.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.
    """

    name: str
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
        parameters: The tracked parameters by local name; dotted for those of modules inside.
        batch_dim: Axis on which it has its samples.
        row_owner: Key of the batch that says which sample each of its rows belongs to; None where
            it has one row per sample.
        plugin: The plugin that offers the sampler, for messages.
        shared: Whether it is declared to be called on nothing of the samples.
        unit: Whether it runs again as one, with all that is inside of it.
    """

    name: str
    module: nn.Module
    sampler: GradientSampler
    parameters: dict[str, TrackedParameter]
    batch_dim: int = 0
    row_owner: str | None = None
    plugin: str = ""
    shared: bool = False
    unit: bool = False

    @cached_property
    def blame(self) -> Blame:
        """Names plugin and module where the sampler raises inside."""
        kind = dotted_name(type(self.module))
        by = f"{type(self.sampler).__name__} of the plugin {self.plugin or '(none)'}"
        return Blame(f"raised by {by}, for {self.label}, a {kind}")

    def joined(self, other: TrackedModule) -> TrackedModule:
        """Return the module with what another engine tracks of it too.

        Raises:
            CaptureError: If the engines capture it in different ways.
        """
        if self.way != other.way:
            raise CaptureError(
                "engines on one model must agree on batch_dim, row_owner, units and the sampler of "
                f"{self.label}"
            )
        return replace(self, parameters={**self.parameters, **other.parameters})

    @property
    def way(self) -> tuple[object, ...]:
        """How it is captured."""
        kind = type(self.sampler)
        return self.module, kind, self.batch_dim, self.row_owner, self.shared, self.unit

    @cached_property
    def label(self) -> str:
        """Name and tracked parameters, for messages."""
        names = ", ".join(parameter.name for parameter in self.parameters.values())
        return f"{self.name or '(root)'} [{names}]"

    @cached_property
    def shapes(self) -> dict[str, Size]:
        """Shapes of the tracked parameters by local name."""
        return {local: parameter.shape for local, parameter in self.parameters.items()}


@dataclass(frozen=True)
class Tracking:
    """The tracked parameters in order of their names, and their modules in the model's order."""

    parameters: tuple[TrackedParameter, ...]
    modules: tuple[TrackedModule, ...]
    batch_dim: int = 0
    """Axis on which the model's inputs and outputs have their samples."""
    lift: bool = True
    """Whether values that are the same for all samples may be followed."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the tracked parameters."""
        return frozenset(parameter.name for parameter in self.parameters)

    def difference(self, other: Tracking) -> str:
        """Say what is first found to differ; nothing if all is equal."""
        mine = {parameter.name: parameter for parameter in self.parameters}
        theirs = {parameter.name: parameter for parameter in other.parameters}
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


@dataclass(frozen=True)
class Selection:
    """What an engine is to track, and how.

    Attributes:
        registry: Where samplers are found.
        layers: Globs over dotted names of modules or parameters: what to track.
        exclude: Globs: what to leave out of it.
        generic: Whether samplers that handle any module may be used.
        batch_dim: Axis of the samples by glob over names of modules, `""` for the model itself;
            None for modules that are called on nothing of the samples; later ones win.
        row_owner: Key of the batch by glob over names of modules.
        lift: Whether values that are the same for all samples may be followed.
        units: Globs over names of modules that run again as one.
    """

    registry: SamplerRegistry
    layers: Patterns = "*"
    exclude: Patterns = ()
    generic: bool = True
    batch_dim: Mapping[str, int | None] = field(default_factory=dict)
    row_owner: Mapping[str, str] = field(default_factory=dict)
    lift: bool = True
    units: Patterns = ()


def track(
    model: nn.Module,
    selection: Selection,
    flags: Mapping[nn.Parameter, bool] = MappingProxyType({}),
) -> Tracking:
    """Find the selected trainable parameters and a sampler for each module that owns one.

    A pattern selects a parameter if it matches one of its dotted names or the dotted name of a
    module around it, so `h.0.attn` and `*attn*` both take all parameters inside.

    Args:
        model: The root module.
        selection: What to track, and how.
        flags: `requires_grad` of parameters that are frozen for the time being.

    Raises:
        UnknownNameError: If a pattern matches nothing.
        CaptureError: If no trainable parameter is selected, one is made of other tensors, or a
            module has been compiled.
        UnsupportedLayerError: If no sampler handles an owner of a selected parameter.
    """
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, leaf in model.named_parameters(remove_duplicate=False):
        if is_lazy(leaf):
            raise CaptureError(f"{name} has no shape yet: run the model once before")
        names[leaf].append(name)
    selected = select_parameters(names.values(), selection.layers)
    selected -= select_parameters(names.values(), selection.exclude, "exclude")
    parameters = {
        leaf: TrackedParameter(aliases[0], tuple(aliases), leaf.shape, leaf.dtype, leaf.device)
        for leaf, aliases in names.items()
        if flags.get(leaf, leaf.requires_grad) and aliases[0] in selected
    }
    _refuse_compiled(model, parameters.keys())
    if not parameters:
        trainable = sum(flags.get(leaf, leaf.requires_grad) for leaf in names)
        raise CaptureError(
            f"no trainable parameter is selected: {trainable} of {len(names)} parameters require "
            f"gradients, layers={selection.layers!r}, exclude={selection.exclude!r}"
        )
    _refuse_composed(model, parameters)
    modules = _find_owners(model, parameters, selection)
    _refuse_replays(parameters, modules)
    ordered = tuple(sorted(parameters.values(), key=lambda parameter: parameter.name))
    axes = by_module(model, "batch_dim", selection.batch_dim, _axis)
    root = _axis_of(next((each for each in modules if not each.name), None))
    dim = axes.get("", root)
    if dim is None:
        raise CaptureError(
            "batch_dim of the model itself is None, which is for modules that are called on "
            "nothing of the samples: give their names"
        )
    return Tracking(ordered, tuple(modules), dim, selection.lift)


def _axis(what: str, value: int | None) -> int | None:
    """Return an axis as it is used; None for what has no samples."""
    return None if value is None else whole_number(what, value)


def _check_shared(name: str, owner: str | None, lift: bool) -> None:
    """Refuse options that contradict that a module is called on nothing of the samples."""
    if owner is not None or not lift:
        other = "lift=False" if owner is None else f"row_owner={{{name!r}: {owner!r}}}"
        raise CaptureError(
            f"batch_dim={{{name!r}: None}} and {other} contradict each other",
            reason="what is called on nothing of the samples has no rows of theirs, and is "
            "followed to where it meets them",
            remedy="leave one of them out",
        )


def joined(trackings: Iterable[Tracking]) -> dict[str, TrackedModule]:
    """Return what several engines on one model track, by name of the module.

    Raises:
        CaptureError: If they capture a module in different ways.
    """
    found: dict[str, TrackedModule] = {}
    for tracking in trackings:
        for each in tracking.modules:
            found[each.name] = found.get(each.name, each).joined(each)
    check_units((name for name, each in found.items() if each.unit), found)
    return found


def _axis_of(root: TrackedModule | None) -> int:
    """Return the axis of the samples in a model that is a layer with axes of its own."""
    dims = None if root is None else root.sampler.batch_dims(root.module, 1)
    return dims[0] if dims else 0


def _find_owners(
    model: nn.Module, parameters: Mapping[nn.Parameter, TrackedParameter], selection: Selection
) -> list[TrackedModule]:
    """Find the modules that own the tracked parameters, outer ones first, and their samplers."""
    axes = by_module(model, "batch_dim", selection.batch_dim, _axis)
    owners = by_module(model, "row_owner", selection.row_owner, text)
    units = unit_names(model, selection.units, generic=selection.generic)
    modules: list[TrackedModule] = []
    unhandled: list[tuple[str, Iterable[TrackedParameter], str]] = []
    taken: set[tuple[nn.Module, str]] = set()
    for name, module in model.named_modules():
        if parameters.keys().isdisjoint(module.parameters()):
            continue
        unit = name in units
        direct = whole(module) if unit else own_parameters(module)
        wanted = {local for local in direct if parameter_of(module, local) in parameters}
        found = (
            find_unit(selection.registry, module)
            if unit
            else selection.registry.find(module, wanted, generic=selection.generic)
        )
        own = {
            local: parameters[leaf]
            for local in (found.owns(module) if isinstance(found, Found) and not unit else direct)
            if owner_of(module, local) not in taken
            and (leaf := parameter_of(module, local)) in parameters
        }
        if not own:
            continue
        if isinstance(found, Found):
            axis, owner = axes.get(name, 0), owners.get(name)
            shared, plugin = axis is None, found.claim.plugin
            if shared:
                _check_shared(name, owner, selection.lift)
            given = name, module, found.sampler, own, axis or 0, owner, plugin, shared, unit
            modules.append(TrackedModule(*given))
            taken |= {owner_of(module, local) for local in own if "." in local}
        else:
            unhandled.append((name, own.values(), found.reason))
    _check_handled(modules, unhandled, selection.generic)
    return modules


def owner_of(module: nn.Module, local: str) -> tuple[nn.Module, str]:
    """Return the module inside that owns a parameter, and its name there."""
    if "." not in local:
        return module, local
    path, _, name = local.rpartition(".")
    return module.get_submodule(path), name


def parameter_of(module: nn.Module, local: str) -> nn.Parameter:
    """Return a parameter by its local name, whatever attribute its module shows under it."""
    if "." in local:
        module, local = owner_of(module, local)
    parameter = direct_parameters(module)[local]
    assert parameter is not None
    return parameter


def _check_handled(
    modules: Iterable[TrackedModule],
    unhandled: Iterable[tuple[str, Iterable[TrackedParameter], str]],
    generic: bool,
) -> None:
    """Raise if a parameter has no owner with a sampler.

    A module that only holds what another one uses, such as the bias of BERT's head, needs none;
    that it does not use it is for the verification to find.
    """
    handled = {parameter for tracked in modules for parameter in tracked.parameters.values()}
    problems: list[str] = []
    parameters: list[str] = []
    for name, own, reason in unhandled:
        if missing := [parameter.name for parameter in own if parameter not in handled]:
            problems.append(f"  {name or '(root)'} [{', '.join(missing)}]: {reason}")
            parameters += missing
    if problems:
        raise UnsupportedLayerError(
            "no per-sample gradients for these modules:\n"
            + "\n".join(problems)
            + f"\nLeave them out with exclude={','.join(dict.fromkeys(parameters))!r}, "
            + ("" if generic else "let modules be replayed, without generic=False, ")
            + "or register a sampler for them as a plugin."
        )


def _refuse_composed(model: nn.Module, parameters: Mapping[nn.Parameter, TrackedParameter]) -> None:
    """Refuse parameters that are made of other tensors, and are never whole."""
    known = {leaf for leaf, shard in shards(model).items() if is_plain_shard(shard)}
    found = {
        leaf: parameter.name
        for leaf, parameter in parameters.items()
        if is_composed(leaf) and leaf not in known
    }
    for leaf, name in found.items():
        raise CaptureError(
            f"{name} is a {type(leaf).__name__}, and so are {len(found) - 1} other parameters",
            reason="such a parameter, as tensor parallelism makes, is split, and its module "
            "computes with other tensors in its place",
            remedy="use a model whose parameters are whole, as under DistributedDataParallel, or "
            "while modules run, as under fully_shard, or leave them out with "
            f"exclude={','.join(found.values())!r}",
        )


def _refuse_replays(
    parameters: Mapping[nn.Parameter, TrackedParameter], modules: Iterable[TrackedModule]
) -> None:
    """Refuse to run modules again whose parameters are whole only while they run."""
    sharded = {parameter.name for leaf, parameter in parameters.items() if is_composed(leaf)}
    for tracked in modules:
        names = [each.name for each in tracked.parameters.values() if each.name in sharded]
        if names and tracked.sampler.replays:
            raise UnsupportedLayerError(
                f"{tracked.label} is under fully_shard, and has no formula for its gradients",
                reason="it would run again, when its parameters are in parts",
                remedy=f"leave it out with exclude={','.join(names)!r}, or register a sampler for "
                "it as a plugin",
            )


def _refuse_compiled(model: nn.Module, tracked: Collection[nn.Parameter]) -> None:
    """Refuse compiled modules with tracked parameters inside; others run as they are."""
    for name, module in model.named_modules():
        if is_compiled(module) and any(each in tracked for each in module.parameters()):
            raise CaptureError(
                f"{name or 'the model'} ({dotted_name(type(module))}) is compiled, and a compiled "
                "module ignores hooks added later. Give the engine the uncompiled model and "
                "attach it before torch.compile, or leave the compiled module's parameters out "
                "with exclude=..."
            )

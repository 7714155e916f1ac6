"""Copies of modules to run a call again on: the user's own are never run, nor changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ghost_core._torch import (
    backward_hooks,
    forward_hooks,
    forward_pre_hooks,
    renew_weights,
    tree_flatten,
)
from ghost_core.model_hooks import is_own
from ghost_core.tracking import dotted_name

_HOOKS = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
_TABLES = ("_parameters", "_buffers")
_OLD_NORMS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
_UNCHANGING = frozenset({int, float, bool, str, complex, type(None), torch.dtype, torch.device})
"""Classes of most attributes, which nobody can write to."""


class _Stale:
    """Stands for a tensor that an earlier call left behind with its graph. Any use is an error."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter or buffer goes.

    Attributes:
        module: Position among `modules()`.
        kind: `_parameters` or `_buffers`.
        name: Its name there.
        key: Its first dotted name.
    """

    module: int
    kind: str
    name: str
    key: str


@dataclass(frozen=True)
class Template:
    """A module as it was at some time, modules inside included, without parameters and buffers.

    Modes, attributes, containers and generators are those of that time, whatever happens to the
    module later. Hooks are left out.

    Attributes:
        module: The copy.
        slots: Where its tensors go.
    """

    module: nn.Module
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Template:
        """Copy a module as it is now."""
        slots: list[Slot] = []
        hollow = _copied(module)
        for at, (path, copied) in enumerate(hollow.named_modules()):
            for kind in _TABLES:
                tensors: dict[str, Tensor | None] = vars(copied)[kind]
                for name, value in tensors.items():
                    if value is not None:
                        slots.append(Slot(at, kind, name, f"{path}.{name}" if path else name))
                        tensors[name] = None
        return cls(hollow, tuple(slots))

    def fill(self, values: Mapping[str, Tensor]) -> nn.Module:
        """Return a module that runs with the parameters and buffers given, by first dotted name."""
        copied = _copied(self.module)
        modules = list(copied.modules())
        for slot in self.slots:
            vars(modules[slot.module])[slot.kind][slot.name] = values[slot.key]
        for module in modules:
            if isinstance(module, nn.RNNBase):
                renew_weights(module)
        return copied

    def tensors(self, module: nn.Module, kind: str) -> dict[str, Tensor]:
        """Return the parameters or buffers that a module like it has now, by first dotted name.

        A parameter that several modules share has the name of every one of them.
        """
        modules = list(module.modules())
        slots = [slot for slot in self.slots if slot.kind == kind and slot.module < len(modules)]
        found = {slot.key: vars(modules[slot.module])[kind].get(slot.name) for slot in slots}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def key(self, module: nn.Module, local: str) -> str:
        """Return the first dotted name of a parameter that may have several."""
        if any(slot.key == local for slot in self.slots):
            return local
        path, _, name = local.rpartition(".")
        owner = module.get_submodule(path)
        first = next(found for found, inside in module.named_modules() if inside is owner)
        return f"{first}.{name}" if first else name

    @property
    def modes(self) -> tuple[bool, ...]:
        """Whether each module inside is in training."""
        return tuple(module.training for module in self.module.modules())


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module, the modules inside and their containers, but no tensors and no hooks."""
    originals = list(module.modules())
    copies: dict[int, Any] = {id(each): object.__new__(type(each)) for each in originals}
    for each in originals:
        state = vars(copies[id(each)])
        for name, value in vars(each).items():
            if name in _HOOKS:
                none = _HOOKS[name]
                state[name] = type(none)() if isinstance(none, dict) else none
            elif type(value) in _UNCHANGING:  # as most are, which `own_copy` would say later
                state[name] = value
            elif name in _TABLES:
                state[name] = dict(value)
            elif name == "_modules":
                state[name] = {key: copies.get(id(inside)) for key, inside in value.items()}
            else:
                state[name] = own_copy(value, copies)
    copied: nn.Module = copies[id(module)]
    return copied


def own_copy(value: Any, copies: dict[int, Any]) -> Any:
    """Return what a copy has in place of a value: of whatever can be written to, another one.

        7, "relu", torch.float32   themselves
        {"steps": [1, 2]}          another dictionary, with another list in it
        torch.Generator()          another one in the same state
        self.last = layer(x)       something whose use is an error: it would keep the graph

    Args:
        value: The value of an attribute, or an argument that is no tensor.
        copies: Copies by the identity of what they are copies of.
    """
    kind = type(value)
    if kind in _UNCHANGING or (kind is tuple and all(type(each) in _UNCHANGING for each in value)):
        return value
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        # Keeping it would keep its graph, and so the one before, and so on.
        return value if value.grad_fn is None else _Stale()
    if type(value) is set:
        return {own_copy(each, copies) for each in value}
    if isinstance(value, torch.Generator):
        return copies.setdefault(id(value), value.clone_state())
    if isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random"):
        return copies.setdefault(id(value), copy.deepcopy(value))
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    leaves, spec = tree_flatten(value)  # containers, and what libraries return from their models
    if len(leaves) == 1 and leaves[0] is value:
        return _copied_object(value, copies)
    return tree_unflatten([own_copy(leaf, copies) for leaf in leaves], spec)


def _copied_object(value: Any, copies: dict[int, Any]) -> Any:
    """Copy an object that is no container known to torch, with the attributes it has."""
    if isinstance(value, type | ModuleType) or callable(value):
        return value
    attributes = getattr(value, "__dict__", None)
    if attributes is None and not hasattr(value, "__setitem__"):
        return value
    try:
        copied = copy.copy(value)
    except (TypeError, ValueError):  # locks, files and the like
        return value
    if copied is not value:
        copies[id(value)] = copied
        if attributes is not None:
            vars(copied).update({name: own_copy(each, copies) for name, each in attributes.items()})
    return copied


def why_not_copied(module: nn.Module) -> str | None:
    """Say why a copy of a module would compute something else, and what to do; else None.

    Ghost's own hooks do not count, and neither do hooks of the module itself that run after it.
    """
    for name, inside in module.named_modules():
        what = f"{name} ({dotted_name(type(inside))})" if name else dotted_name(type(inside))
        if isinstance(inside, torch.jit.ScriptModule):
            return f"{what} is a script, which cannot be run with other parameters: exclude it"
        hooks = [*forward_pre_hooks(inside).values()]
        if inside is not module:
            after, before = backward_hooks(inside)
            hooks += [*forward_hooks(inside).values(), *after.values(), *before.values()]
        for hook in hooks:
            if is_own(hook):
                continue
            kind = type(hook) if not hasattr(hook, "__qualname__") else hook
            label = f"{kind.__module__}.{kind.__qualname__}"
            remedy = "remove the hook, or exclude the module"
            if label.startswith(_OLD_NORMS):
                norm = label.split(".")[3]
                remedy = f"use torch.nn.utils.parametrizations.{norm} instead"
            return f"{what} has a hook, {label}, which may change what is computed: {remedy}"
    return None

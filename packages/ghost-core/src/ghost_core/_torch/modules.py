"""Modules and the hooks on them, as torch keeps them under private names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm

Hooks = dict[int, Callable[..., Any]]
"""Hooks by the id of their handle, in the order in which they run; writing changes what runs."""


def forward_hooks(module: nn.Module) -> Hooks:
    """Return the hooks that run after a module. Torch 2.11."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> Hooks:
    """Return the hooks that run before a module. Torch 2.11."""
    return module._forward_pre_hooks


def backward_hooks(module: nn.Module) -> tuple[Hooks, Hooks]:
    """Return the hooks that run after and before the backward pass of a module. Torch 2.11."""
    return module._backward_hooks, module._backward_pre_hooks


def any_backward_hooks(modules: Sequence[nn.Module]) -> bool:
    """Tell whether any module has hooks on its backward pass. Torch 2.11."""
    return any(map(_AFTER_BACKWARD, modules)) or any(map(_BEFORE_BACKWARD, modules))


_AFTER_BACKWARD = attrgetter("_backward_hooks")
_BEFORE_BACKWARD = attrgetter("_backward_pre_hooks")


def innermost_hooks(module: nn.Module) -> tuple[int | None, int | None]:
    """Return the ids of the last hook that runs before a module and of the first that does after.

    None where there is none; where a hook runs after all modules, none is the first. Torch 2.11.
    """
    after = None if _module._global_forward_hooks else next(iter(module._forward_hooks), None)
    return next(reversed(module._forward_pre_hooks), None), after


def gradient_hooks(tensor: Tensor) -> Hooks:
    """Return the hooks on a tensor's gradient; what is written is lost. Torch 2.11."""
    return dict(tensor._backward_hooks or {})


def any_gradient_hooks(tensors: Iterable[Tensor]) -> bool:
    """Tell whether any tensor has hooks on its gradient. Torch 2.11."""
    return any(map(_GRADIENT_HOOKS, tensors))


_GRADIENT_HOOKS = attrgetter("_backward_hooks")


def accumulation_hooks(tensor: Tensor) -> Hooks:
    """Return the hooks that run when a gradient is there; what is written is lost. Torch 2.11."""
    return dict(tensor._post_accumulate_grad_hooks or {})


def tidy_gradient_hooks(tensor: Tensor) -> None:
    """Let a tensor without hooks on its gradient be as if there never were any. Torch 2.11."""
    if not tensor._backward_hooks:
        tensor._backward_hooks = None


def tells_of_steps(optimizer: object) -> bool:
    """Tell whether an optimizer calls hooks at its steps. Torch 2.11.

    A wrapper may derive from `Optimizer` and never set itself up as one.
    """
    return isinstance(optimizer, torch.optim.Optimizer) and hasattr(
        optimizer, "_optimizer_step_post_hooks"
    )


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what torch's `named_parameters` yields, in a third of the time. Torch 2.11."""
    found: dict[str, nn.Parameter] = {}
    known: set[int] = set()  # ids, since the hashes of tensors are made in Python
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in known:
            continue
        known.add(id(module))
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known:
                known.add(id(parameter))
                found[prefix + key] = parameter
        for key, child in reversed(module._modules.items()):
            if child is not None:
                waiting.append((f"{prefix}{key}.", child))
    return found


def is_of_torch(module: nn.Module) -> bool:
    """Tell whether a module and all inside run torch's own code alone. Torch 2.11."""
    return all(type(each).__module__.startswith("torch.nn.modules.") for each in module.modules())


def direct_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's parameters without those inside; writing changes them. Torch 2.11."""
    return module._parameters


def direct_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's buffers without those inside; writing changes them. Torch 2.11."""
    return module._buffers


def direct_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's children by name; changes show in it. Torch 2.11."""
    return module._modules


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module was compiled, by `torch.compile` or in place. Torch 2.11."""
    original = getattr(module, "_orig_mod", None)
    return isinstance(original, nn.Module) or bool(getattr(module, "_compiled_call_impl", None))


def called_compiled() -> bool:
    """Tell whether what runs was called through something compiled. Torch 2.11."""
    if "torch._dynamo" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            return True
        # Looking at locals keeps them alive as long as the frame: not at those of the user's.
        if frame.f_globals.get("__name__") == _module.__name__:
            caller = frame.f_locals.get("self")
            if isinstance(caller, nn.Module) and is_compiled(caller):
                return True
        frame = frame.f_back
    return False


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's BatchNorms. Torch 2.11."""
    return isinstance(module, _BatchNorm)


def flat_weights(layer: nn.RNNBase) -> list[Tensor] | None:
    """Return a recurrent layer's weights, in its order; None if some are computed. Torch 2.11."""
    found = direct_parameters(layer)
    names = layer._flat_weights_names
    return [found[name] for name in names] if found.keys() >= set(names) else None  # type: ignore[misc]


def renew_weights(layer: nn.RNNBase) -> None:
    """Tell a recurrent layer, which keeps a list of its weights, that they are others. Torch 2.11.

    It is left alone if some are computed from other parameters.
    """
    if (weights := flat_weights(layer)) is not None:
        state: dict[str, Any] = vars(layer)
        state["_flat_weights"] = weights
        state["_flat_weight_refs"] = [None] * len(weights)


def own_padding(layer: Any) -> list[int]:
    """Return what a convolution that pads by itself puts around its input. Torch 2.11."""
    sides: list[int] = layer._reversed_padding_repeated_twice
    return sides


def rank_without_samples(norm: Any) -> int:
    """Return the number of axes of an instance norm's input without samples. Torch 2.11."""
    return int(norm._get_no_batch_dim())

"""What ghost asks of torch's wrappers for several processes, some of it by private names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ghost_core.restoring import restored, undo


def calling_wrapper() -> DistributedDataParallel | None:
    """Return the wrapper for several processes whose call is on its way. Torch 2.11."""
    return DistributedDataParallel._active_ddp_module


@contextmanager
def unreduced(wrapper: DistributedDataParallel) -> Iterator[None]:
    """Let a wrapper be called meanwhile without gradients being averaged afterwards. Torch 2.11.

    Beyond `no_sync()`, with `static_graph=True` it does not take the call for its first iteration;
    and buffers, which are not spread after a call without gradients to average, are as always.
    """
    passed = "_static_graph_delay_allreduce_enqueued"
    with restored() as stack:
        spread = wrapper.require_forward_param_sync
        undo(stack, setattr, wrapper, "require_forward_param_sync", spread)
        if wrapper.static_graph:
            undo(stack, setattr, wrapper, passed, getattr(wrapper, passed))
            setattr(wrapper, passed, True)
        stack.enter_context(wrapper.no_sync())
        yield


def is_joining(wrapper: DistributedDataParallel) -> bool:
    """Tell whether a wrapper is called inside its `join()`. Torch 2.11."""
    return bool(wrapper._join_config.enable)


_own: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def own_group(group: Any, theirs: torch.device, device: torch.device) -> Any:
    """Return a group of the same processes in which nobody but ghost speaks. Torch 2.11.

    All of them ask for it at the same place. It waits as long for an answer as theirs does.

    Args:
        group: Their group.
        theirs: Where the tensors are that it is for.
        device: Where those are that ghost exchanges; on the CPU by gloo, so that no GPU is waited
            for.
    """
    known = _own.setdefault(group, {})
    if device.type not in known:
        known[device.type] = distributed.new_group(
            distributed.get_process_group_ranks(group),
            timeout=group._get_backend(theirs).options._timeout,
            backend="gloo" if device.type == "cpu" else distributed.get_backend(group),
            use_local_synchronization=True,
        )
    return known[device.type]


# Shards of fully_shard


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules inside that `fully_shard` was called on. Public; torch 2.11 has it inside.

    They are known by name, since to import what makes them takes long.
    """
    return [
        module
        for module in model.modules()
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    ]


def shards(model: nn.Module) -> dict[nn.Parameter, Any]:
    """Return what `fully_shard` keeps of each parameter, by what is in its place. Torch 2.11."""
    return {shard.sharded_param: shard for group in _groups(model) for shard in group.fsdp_params}


def is_plain_shard(shard: Any) -> bool:
    """Tell whether a parameter was whole before it was sharded, over one axis. Torch 2.11."""
    return not shard.is_dtensor and shard.sharded_param.device_mesh.ndim == 1


def in_use(shard: Any) -> nn.Parameter | None:
    """Return the whole parameter that modules compute with; None before the first. Torch 2.11."""
    found: nn.Parameter | None = getattr(shard, "_unsharded_param", None)
    return found


def is_waiting(shard: Any) -> bool:
    """Tell whether a parameter has a gradient that was not averaged yet. Torch 2.11."""
    whole = in_use(shard)
    return shard.unsharded_accumulated_grad is not None or (
        whole is not None and whole.grad is not None
    )


def averages(model: nn.Module) -> bool:
    """Tell whether gradients are divided by the number of processes, and at once. Torch 2.11."""
    return all(
        group.reduce_grads and getattr(group, "gradient_divide_factor", None) is None
        for group in _groups(model)
    )


def _groups(model: nn.Module) -> list[Any]:
    """Return the groups of parameters that are sharded together: one for a module before 2.13."""
    states = [module._get_fsdp_state() for module in sharded_modules(model)]
    return [
        group
        for state in states
        for group in getattr(state, "_fsdp_param_groups", [state._fsdp_param_group])
        if group is not None
    ]


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Let all parameters be whole meanwhile, whatever passes run. Torch 2.11.

    All processes ask for it, and need nothing of each other inside.
    """
    groups = _groups(model)
    with restored() as stack:
        for group in groups:
            undo(stack, setattr, group, "reshard_after_backward", group.reshard_after_backward)
            group.reshard_after_backward = False
        for module in sharded_modules(model):
            undo(stack, module.reshard)
            module.unshard()
        for group in groups:  # from here on, not in parts after a forward pass either
            undo(stack, setattr, group, "post_forward_mesh_info", group.post_forward_mesh_info)
            group.post_forward_mesh_info = None
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose parts are in several processes, which all ask for it. Torch 2.11."""
    return cast(Any, tensor).full_tensor() if is_in_parts(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor. Torch 2.11."""
    return cast(Any, tensor).to_local() if is_in_parts(tensor) else tensor


def mesh_of(tensor: Tensor) -> Any:
    """Return the processes that have the parts of a tensor. Public."""
    return cast(Any, tensor).device_mesh


def is_in_parts(tensor: Tensor) -> bool:
    """Tell whether the parts of a tensor are in several processes. Public."""
    kind = type(tensor)
    plain = kind is nn.Parameter or kind is Tensor
    return not plain and any(each.__name__ == "DTensor" for each in kind.__mro__)

"""What autograd tells and does under private names: backward passes, checkpoints, versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ghost_core._torch.graph import own
from ghost_core._torch.modes import FunctionMode
from ghost_core._torch.trees import tree_map
from ghost_core.restoring import restored, undo

_Result = TypeVar("_Result")


class _StoresKept(FunctionMode):
    """Gives out copies of what selective checkpoints keep, which they give out once.

    A checkpoint computes again under a mode with the values in its `storage`: containers by
    operation, of wrappers with a tensor `val`. It is seen here at the first function that runs
    under it, before anything is taken. A tensor given out becomes part of a graph, so copies of
    it, which share the memory, take its place. Torch 2.11.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; see to the modes around it first."""
        modes: list[Any] = _python_dispatch._get_current_dispatch_mode_stack()
        for mode in modes:
            if type(mode).__module__ != "torch.utils.checkpoint":
                continue
            storage = mode.storage
            if not any(storage is each for each, _ in self._found):
                self._found.append((storage, dict(storage)))
                storage |= {key: tree_map(_given_out, kept) for key, kept in storage.items()}
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        """Put back what was taken."""
        for storage, kept in self._found:
            storage.clear()
            storage |= kept
        self._found.clear()


def _given_out(wrapper: Any) -> Any:
    if not isinstance(getattr(wrapper, "val", None), Tensor):
        return wrapper
    given = copy(wrapper)
    with torch._C._AutoDispatchBelowAutograd():  # no view of autograd's, whose graph it joins
        given.val = wrapper.val.detach()
    return given


# Autograd


def without_gradients(function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function without gradients; it is called for each call of a module. Torch 2.11.

    Put back twice, since an interrupt may end the first; see `ghost_core.restoring`.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    try:
        try:
            torch._C._set_grad_enabled(False)
            return function(*args)
        finally:
            torch._C._set_grad_enabled(True)
    finally:
        torch._C._set_grad_enabled(True)


def applied(function: type[torch.autograd.Function], known: object, *tensors: Tensor) -> Any:
    """Put a function into the graph, as its `apply` does with all that it looks for. Torch 2.11.

    That is called for each call of a module.

    Args:
        function: One without a `setup_context`, which cannot run inside of `torch.func`.
        known: What it is given first, which is no tensor.
        tensors: What it is given besides.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(known, *tensors)
    alive = map(torch._C._functorch.unwrap_if_dead, tensors)
    return super(torch.autograd.Function, function).apply(known, *alive)  # type: ignore[misc]


def in_backward() -> bool:
    """Tell whether autograd is running: then a forward pass is a recomputation. Torch 2.11."""
    return torch._C._current_graph_task_id() != -1


def backward_id() -> int:
    """Return a number of its own for the backward pass that runs; -1 if none does. Torch 2.11."""
    return int(torch._C._current_graph_task_id())


def after_backward(function: Callable[[], None]) -> None:
    """Call a function after the backward pass that runs, unless that fails. Torch 2.11."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_checkpoint() -> bool:
    """Tell whether what runs will be run again in the backward pass. Torch 2.11."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def saves_elsewhere() -> bool:
    """Tell whether what autograd saves is kept in another way, or not at all. Torch 2.11."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_checkpoint_error(error: BaseException) -> bool:
    """Tell whether what was run again did not do what it had done. Torch 2.11."""
    return isinstance(error, torch.utils.checkpoint.CheckpointError)


def in_function() -> bool:
    """Tell whether the forward pass of a `torch.autograd.Function` is running. Torch 2.11."""
    apply = torch.autograd.Function.apply.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not apply:
        frame = frame.f_back
    return frame is not None


def in_transform() -> bool:
    """Tell whether a function of `torch.func` runs, which sees parts of tensors. Torch 2.11."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def will_reach(node: torch.autograd.graph.Node) -> bool:
    """Tell whether the backward pass that runs goes on to a node of the graph. Torch 2.11.

    It is an error to ask for the node of a leaf where leaves were named, as in
    `autograd.grad(loss, inputs)`: such a pass reaches no other.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return False


def start_of_backward(outputs: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """Return a scalar whose backward pass starts with given gradients at several outputs.

    Public, but for what it is in place of: `torch.autograd.grad` takes gradients too, and imports
    sympy, for seconds, to compare their shapes. Seen in torch 2.13.
    """
    with torch.enable_grad():
        start: Tensor = _Start.apply(tuple(gradients), *outputs)  # type: ignore[no-untyped-call]
    return start


def taken_back(
    value: Tensor, gradient: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Differentiate as `torch.autograd.grad` does, and compare no shapes; see above. Torch 2.11."""
    found: tuple[Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
        (value,),
        (gradient,),
        True,  # keep the graph
        False,  # make none
        tuple(tensors),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def run_backward(start: Tensor, leaf: Tensor) -> None:
    """Run a backward pass from a scalar to a leaf alone, and leave all as it was, graph included.

    What selective checkpoints take from their store is put back. `torch.autograd.grad` is not
    used: it is a function like others to modes, which leave themselves while it runs. Torch 2.11.
    """
    with restored() as stack:
        mode = _StoresKept()
        undo(stack, mode.restore)
        stack.enter_context(mode)
        torch.autograd.Variable._execution_engine.run_backward(
            (start,),
            (torch.ones_like(start),),
            True,  # keep the graph
            False,  # make none
            (leaf,),
            allow_unreachable=True,
            accumulate_grad=False,
        )


def run_apart(function: Callable[[], None], device: torch.device) -> None:
    """Run a function in a backward pass of its own, for which a checkpoint computes anew."""
    with torch.enable_grad():
        leaf = torch.zeros((), device=device, requires_grad=True)
        start: Tensor = _Apart.apply(function, leaf)  # type: ignore[no-untyped-call]
    run_backward(start, leaf)


@own
class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[], None], leaf: Tensor) -> Tensor:
        ctx.function = function
        return leaf.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        ctx.function()
        return None, None


@own
class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def is_graph_gone(error: RuntimeError) -> bool:
    """Tell whether a backward pass failed since there was one before on its graph. Torch 2.11."""
    return "backward through the graph a second time" in str(error)


def is_reentrant(error: RuntimeError) -> bool:
    """Tell whether a checkpoint failed that knows nothing but whole backward passes. Torch 2.11."""
    return "use_reentrant" in str(error)


def is_composed(tensor: Tensor) -> bool:
    """Tell whether a tensor is made of others, as sharded and quantised ones are. Torch 2.11."""
    return is_traceable_wrapper_subclass(tensor)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; zero where torch does not count. Torch 2.11."""
    return 0 if tensor.is_inference() else tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that one is a view of for autograd; None for others. Torch 2.11."""
    return tensor._base


def address(value: object) -> int:
    """Return where a tensor's memory starts; 0 for what has none of its own. Torch 2.11."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        return 0
    if not value.numel():
        return 0
    if is_composed(value):
        return 0
    return value.untyped_storage().data_ptr()


def written_by(operation: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return what an operation writes to, of what it is given. Torch 2.11."""
    schema = operation._schema
    if not schema.is_mutable:
        return []
    given = {each.name: value for each, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = (each for each in schema.arguments if each.alias_info and each.alias_info.is_write)
    return [given.get(each.name) for each in written]


def norms(tensors: Iterable[Tensor], order: int) -> tuple[Tensor, ...]:
    """Return norms of tensors, each summed in float64, in few calls of a GPU. Torch 2.11."""
    return tuple(torch._foreach_norm(list(tensors), order, torch.float64))

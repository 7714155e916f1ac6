"""What ghost asks of torch's wrappers for several processes, some of it by private names.

Each tells where it was seen, as in `_torch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.parallel import DistributedDataParallel

from ghost_core.restoring import restored, undo


def calling_wrapper() -> DistributedDataParallel | None:
    """Return the wrapper for several processes whose call is on its way. Torch 2.5."""
    return DistributedDataParallel._active_ddp_module


@contextmanager
def unreduced(wrapper: DistributedDataParallel) -> Iterator[None]:
    """Let a wrapper be called meanwhile without gradients being averaged afterwards. Torch 2.5.

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
    """Tell whether a wrapper is called inside its `join()`. Torch 2.5."""
    return bool(wrapper._join_config.enable)

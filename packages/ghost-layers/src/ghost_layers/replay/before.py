"""What a call depends on besides its inputs: kept from before it, to run it again."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghost_layers.replay.module_copy import Template

_SMALL = 2**16
"""Elements up to which a buffer is copied before every call, in case that the call writes it."""


@dataclass(frozen=True)
class RandomState:
    """The global random number generators: torch's, Python's and numpy's.

    Attributes:
        cpu: Of torch on the CPU.
        cuda: Of torch by index of a CUDA device.
        python: Of `random`.
        numpy: Of `numpy.random`; None where numpy is not loaded.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls, devices: Collection[torch.device]) -> RandomState:
        """Return the present state, as far as these devices go."""
        loaded: Any = sys.modules.get("numpy")
        indices = {device.index for device in devices if device.type == "cuda"}
        return cls(
            torch.get_rng_state(),
            {index: torch.cuda.get_rng_state(index) for index in indices},
            random.getstate(),
            loaded.random.get_state(legacy=False) if loaded is not None else None,
        )

    def restore(self) -> None:
        """Put the generators back into this state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def equals(self, other: RandomState) -> bool:
        """Tell whether nothing was drawn between this state and another one."""
        return (
            torch.equal(self.cpu, other.cpu)
            and self.cuda.keys() == other.cuda.keys()
            and all(torch.equal(state, other.cuda[index]) for index, state in self.cuda.items())
            and self.python == other.python
            and _bytes(self.numpy) == _bytes(other.numpy)
        )


def _bytes(state: Any) -> list[Any]:
    return [part.tobytes() if hasattr(part, "tobytes") else part for part in tree_leaves(state)]


@dataclass(frozen=True)
class Before:
    """A module right before a call.

    Attributes:
        template: The module.
        buffers: Its buffers, as they were; large ones may have been written since.
        versions: The buffers themselves, with how often each had been written.
        random: The global random number generators.
        devices: Where the module's tensors are.
    """

    template: Template
    buffers: dict[str, Tensor]
    versions: dict[str, tuple[Tensor, int]]
    random: RandomState
    devices: frozenset[torch.device]

    @classmethod
    def of(cls, module: nn.Module) -> Before:
        """Keep a module as it is now."""
        template = Template.of(module)
        buffers = template.tensors(module, "_buffers")
        parameters = template.tensors(module, "_parameters")
        devices = frozenset(each.device for each in (*buffers.values(), *parameters.values()))
        return cls(
            template,
            {
                key: buffer.detach().clone() if buffer.numel() <= _SMALL else buffer.detach()
                for key, buffer in buffers.items()
            },
            {key: (buffer, _version(buffer)) for key, buffer in buffers.items()},
            RandomState.now(devices),
            devices,
        )

    def written(self, module: nn.Module) -> frozenset[str]:
        """Return which buffers were written or replaced since.

        Raises:
            RefusalError: If one of them was too large to be copied.
        """
        now = self.template.tensors(module, "_buffers")
        keys = frozenset(
            key
            for key, (buffer, version) in self.versions.items()
            if now.get(key) is not buffer or _version(buffer) != version
        )
        if large := [key for key in keys if self.versions[key][0].numel() > _SMALL]:
            raise RefusalError(
                f"it writes into its buffer {large[0]}, which is too large to be kept as it was"
            )
        return keys


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch does not count there


@contextmanager
def surroundings(
    random: RandomState | None, devices: Collection[torch.device], *, cudnn: bool
) -> Iterator[None]:
    """Run something as a call ran, and leave nothing behind.

    Args:
        random: State to start from, where the call drew random numbers.
        devices: Whose generators may be used.
        cudnn: Whether cuDNN may be used. Its recurrent layers have no batching rules, and no
            backward pass in evaluation.
    """
    found = RandomState.now(devices)
    fast, cached = torch.backends.mha.get_fastpath_enabled(), parametrize._cache_enabled
    try:
        if random is not None:
            random.restore()
        # Kernels without gradients, and values computed from other parameters.
        torch.backends.mha.set_fastpath_enabled(False)
        parametrize._cache_enabled = 0
        with warnings.catch_warnings(), _cudnn(cudnn):
            warnings.simplefilter("ignore")  # the user has seen them, or they are about vmap
            yield
    finally:
        parametrize._cache_enabled = cached
        torch.backends.mha.set_fastpath_enabled(fast)
        found.restore()


@contextmanager
def _cudnn(enabled: bool) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled
    cudnn.enabled = before and enabled
    try:
        yield
    finally:
        cudnn.enabled = before


class RefusalError(Exception):
    """A call cannot be run again.

    Args:
        reason: Why.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = f"{remedy}{'; or ' if remedy else ''}leave the module out with exclude=..."


class Guard(TorchDispatchMode):
    """Watches a call that runs again for uses of the user's own tensors.

    It may write only into what it makes itself.

    Args:
        parameters: The parameters that copies were given for, by name.
        aliases: The copies given to modules inside that share these parameters, by name.
        differentiable: Whether what runs is to be differentiated, which a kernel of recurrent
            layers asks for.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        aliases: Mapping[str, Tensor],
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._differentiable = differentiable
        self._names = {_address(tensor): name for name, tensor in parameters.items()}
        self._aliases = {_address(tensor): name for name, tensor in aliases.items()}
        self._made: set[int] = {0}
        self._depth = 0

    def enter_with(self, module: nn.Module) -> None:
        """Let a copy of a module use what it shares while it runs: ghost sees that by itself."""

        def enter(*_: Any) -> None:
            self._depth += 1

        def leave(*_: Any) -> None:
            self._depth -= 1

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, if it may run."""
        kwargs = kwargs or {}
        given = {_address(value) for value in tree_leaves((args, kwargs))} - {0}
        for address in given:
            self._check_use(address, func)
        if func._schema.is_mutable:
            self._check_writes(func, args, kwargs)
        # Modes below are for the user's own passes; autograd is done with the operation.
        kernel = self._differentiable and func is torch.ops.aten.mkldnn_rnn_layer.default
        with torch.set_grad_enabled(kernel):
            result = func(*args, **kwargs)
        made = {_address(value) for value in tree_leaves(result)}
        self._made |= made if func is torch.ops.aten.lift_fresh.default else made - given
        return result

    def _check_use(self, address: int, func: Any) -> None:
        if name := self._names.get(address):
            raise RefusalError(
                f"its code keeps {name} in another place than its parameters, so that it "
                f"cannot be run with a copy ({func})",
                f"use the parameter itself, self.{name}, in forward",
            )
        if not self._depth and (name := self._aliases.get(address)):
            raise RefusalError(
                f"it uses {name}, a parameter that it owns under another name, outside of the "
                f"module inside that has it ({func})",
                "use its own name for it, or call that module",
            )

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        arguments = func._schema.arguments
        values = {each.name: value for each, value in zip(arguments, args, strict=False)} | kwargs
        for each in arguments:
            if each.alias_info is None or not each.alias_info.is_write:
                continue
            if {_address(value) for value in tree_leaves(values.get(each.name))} - self._made:
                raise RefusalError(
                    f"it writes into its inputs, its parameters or tensors that it keeps ({func}), "
                    "which are not what they were before the call",
                    "use operations that are not in place, and buffers for what it keeps",
                )


def _address(value: object) -> int:
    """Return where a tensor's memory starts; 0 for what has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.numel():
        return 0
    return value.untyped_storage().data_ptr()

"""What a call depends on besides its inputs: kept from before it, to run it again."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core import WrongSplitError
from ghost_core._torch import parametrizations_computed, version
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
            {key: (buffer, version(buffer)) for key, buffer in buffers.items()},
            RandomState.now(devices),
            devices,
        )

    def written(self, module: nn.Module) -> frozenset[str]:
        """Return which buffers were written or replaced since.

        Raises:
            WrongSplitError: If one of them was too large to be copied.
        """
        now = self.template.tensors(module, "_buffers")
        keys = frozenset(
            key
            for key, (buffer, written) in self.versions.items()
            if now.get(key) is not buffer or version(buffer) != written
        )
        if large := [key for key in keys if self.versions[key][0].numel() > _SMALL]:
            raise WrongSplitError(
                reason=f"it writes into its buffer {large[0]}, which is too large to be kept as it "
                "was"
            )
        return keys


@contextmanager
def conditions(
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
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        if random is not None:
            random.restore()
        torch.backends.mha.set_fastpath_enabled(False)  # kernels without gradients
        # Cached values were computed from other parameters.
        with warnings.catch_warnings(), _cudnn(cudnn), parametrizations_computed():
            warnings.simplefilter("ignore")  # the user has seen them, or they are about vmap
            yield
    finally:
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

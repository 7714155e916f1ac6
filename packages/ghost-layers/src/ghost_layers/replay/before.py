"""What a call depends on besides its inputs: kept from before it, to run it again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghost_core import WrongSplitError
from ghost_core._torch import version
from ghost_core.process import parametrizations_computed, replayable, without_cudnn
from ghost_core.state import RandomState, random_state_kept
from ghost_layers.replay.module_copy import Template

_SMALL = 2**16
"""Elements up to which a buffer is copied before every call, in case that the call writes it."""


@dataclass(frozen=True)
class Before:
    """A module right before a call.

    Attributes:
        template: The module.
        buffers: Its buffers, as they were; large ones may have been written since.
        versions: The buffers themselves, with how often each had been written.
        random: The global random number generators; None if the call draws nothing from them.
        devices: Where the module's tensors are.
    """

    template: Template
    buffers: dict[str, Tensor]
    versions: dict[str, tuple[Tensor, int]]
    random: RandomState | None
    devices: frozenset[torch.device]

    @classmethod
    def of(cls, module: nn.Module, *, draws: bool = True) -> Before:
        """Keep a module as it is now.

        Args:
            module: The module.
            draws: Whether a call may draw random numbers.
        """
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
            RandomState.now(devices) if draws else None,
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
    with (
        random_state_kept(devices),
        replayable(),
        parametrizations_computed(),
        nullcontext() if cudnn else without_cudnn(),
    ):
        if random is not None:
            random.restore()
        yield

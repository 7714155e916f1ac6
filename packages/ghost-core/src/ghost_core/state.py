"""Saves and restores what a computation changes beside its results.

Each context manager here keeps one thing; `untouched` is all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core._torch import direct_buffers
from ghost_core.restoring import restored


@dataclass(frozen=True, eq=False)
class RandomState:
    """The global random number generators; equal to another if nothing was drawn in between.

    Attributes:
        cpu: Of torch on the CPU.
        cuda: Of torch by index of a CUDA device.
        python: Of `random`.
        numpy: Of `numpy.random`.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """Return the present state: on the CPU, and on these devices too."""
        indices = {device.index for device in devices if device.type == "cuda"}
        return cls(
            torch.get_rng_state(),
            {index: torch.cuda.get_rng_state(index) for index in indices},
            random.getstate(),
            np.random.get_state(legacy=False),
        )

    def restore(self) -> None:
        """Put the generators back into this state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RandomState) and self.by_library == other.by_library

    @property
    def by_library(self) -> dict[str, object]:
        """The same for torch, numpy and python, comparable by ==."""
        on_cpu = (self.cpu, *self.cuda.values())
        return {
            "torch": [state.numpy().tobytes() for state in on_cpu],
            "numpy": [np.asarray(part).tobytes() for part in tree_leaves(self.numpy)],
            "python": self.python,
        }


def generators_to_save() -> dict[str, Any]:
    """Return the states of torch's generators on all devices, as tensors that a file can hold."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": on_gpu}


def load_generators(state: Mapping[str, Any]) -> None:
    """Put torch's generators into the state that `generators_to_save` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_generators(seed: int) -> None:
    """Seed every global random number generator."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # where that one would format a stack trace for each kind of device
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # which takes no larger ones
    random.seed(seed)


@contextmanager
def random_state_kept(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Put the random number generators back afterwards: on the CPU, and on these devices too."""
    found = RandomState.now(devices)
    try:
        yield
    finally:
        found.restore()


@contextmanager
def values_kept(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Undo what is written into tensors; those that nobody writes to are not touched."""
    found = [(tensor, tensor.detach().clone()) for tensor in tensors if tensor is not None]
    try:
        yield
    finally:
        with restored() as stack:
            stack.enter_context(torch.no_grad())
            for tensor, value in found:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def buffers_kept(modules: Iterable[nn.Module], *, by_copies: bool = False) -> Iterator[None]:
    """Put buffers back afterwards, and the values in them.

    Args:
        modules: The modules that may write into their buffers, or replace them.
        by_copies: Whether they get copies to write into, where a graph needs the buffers as they
            are. What shares memory with a buffer is then not written.
    """
    tables = [direct_buffers(module) for module in modules]
    found = [(table, dict(table)) for table in tables if table]
    try:
        if by_copies:
            for table, buffers in found:
                table |= {
                    key: each if each is None else each.clone() for key, each in buffers.items()
                }
            yield
        else:
            with values_kept(buffer for _, buffers in found for buffer in buffers.values()):
                yield
    finally:
        for table, buffers in found:
            table |= buffers


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules back into training or evaluation mode afterwards, each as it was."""
    modes = {module: module.training for module in modules}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def gradients_set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters have no gradients meanwhile, and the ones they had afterwards."""
    found = {parameter: parameter.grad for parameter in parameters}
    try:
        for parameter in found:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in found.items():
            parameter.grad = gradient


@contextmanager
def flags_set(flags: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """Let parameters require gradients, or not, meanwhile."""
    found = {parameter: parameter.requires_grad for parameter in flags}
    try:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        yield
    finally:
        for parameter, flag in found.items():
            parameter.requires_grad_(flag)


def renormalised_tables(model: nn.Module) -> list[nn.Parameter]:
    """Return the tables of lookups with `max_norm`, which renormalise rows in place."""
    return [
        parameter
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
        for parameter in module.parameters(recurse=False)
    ]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore random number generators, buffers, gradients and training modes afterwards.

    Args:
        model: The model whose forward pass runs inside.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    with (
        modes_kept(modules),
        buffers_kept(modules),
        values_kept(renormalised_tables(model)),
        gradients_set_aside(parameters),
        random_state_kept({parameter.device for parameter in parameters}),
    ):
        yield

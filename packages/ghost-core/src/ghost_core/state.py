"""Runs a computation on a model under training without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ghost_core._torch import direct_buffers


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore random number generators, buffers, gradients and training modes afterwards.

    Args:
        model: The model whose forward pass runs inside.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in direct_buffers(module).items()
    ]
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    # Lookups with max_norm renormalise rows of the table in place.
    tables = [
        (parameter, parameter.detach().clone())
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
        for parameter in module.parameters(recurse=False)
    ]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        for parameter in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=_devices(model)):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for table, rows in tables:
                if not torch.equal(table, rows):
                    table.copy_(rows)
            for module, name, buffer, value in buffers:
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
                direct_buffers(module)[name] = buffer


def _devices(model: nn.Module) -> list[torch.device]:
    found = {parameter.device for parameter in model.parameters()}
    return [device for device in found if device.type == "cuda"]

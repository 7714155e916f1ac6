"""Watches which parameters a forward pass casts to other dtypes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CastMode(TorchDispatchMode):
    """Notes the floating dtypes that parameters are cast to, by autocast or by their module.

    Args:
        parameters: The parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[int, set[str]] = defaultdict(set)
        for name, parameter in parameters.items():
            if parameter.layout is torch.strided and parameter.numel():
                self._names[parameter.untyped_storage().data_ptr()].add(name)
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
        """Dtypes by name of the parameter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it is if it casts."""
        result = func(*args, **(kwargs or {}))
        casts = func is torch.ops.aten._to_copy.default and result.is_floating_point()
        if casts and args[0].layout is torch.strided:
            for name in self._names.get(args[0].untyped_storage().data_ptr(), ()):
                self.dtypes[name].add(result.dtype)
        return result

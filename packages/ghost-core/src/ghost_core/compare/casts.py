"""Watches which parameters a forward pass casts to other dtypes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ghost_core._torch import DispatchMode, address


class CastMode(DispatchMode):
    """Notes the floating dtypes that parameters are cast to, by autocast or by their module.

    Gemma's norms compute in float32, in a model of float64 too: an error of 1e-7 is rounding there.

    Args:
        parameters: The parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[int, set[str]] = defaultdict(set)
        for name, parameter in parameters.items():
            if at := address(parameter):
                self._names[at].add(name)
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
        """Dtypes by name of the parameter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it is if it casts."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.is_floating_point():
            for name in self._names.get(address(args[0]), ()):
                self.dtypes[name].add(result.dtype)
        return result

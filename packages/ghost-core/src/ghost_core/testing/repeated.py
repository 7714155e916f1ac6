"""An example made of a layer and inputs that somebody has, called once or several times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ghost_core.testing.examples import Draw, LayerExample
from ghost_core.testing.losses import is_floating


def repeated(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], n: int, uses: int
) -> LayerExample:
    """Return an example that calls a copy of a layer on differently transformed inputs.

    Args:
        module: The layer. Its own trainable parameters are checked, as `layer.NAME`.
        inputs: Positional and keyword inputs. Batches of n samples get these, smaller ones others.
        n: Number of samples N.
        uses: How often the layer is called.
    """
    args, kwargs = inputs
    own = {name for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    return LayerExample(
        type(module).__name__,
        lambda: Repeated(copy.deepcopy(module), uses),
        tuple(_rows(value, n) for value in args),
        {name: _rows(value, n) for name, value in kwargs.items()},
        n=n,
        frozen=tuple(f"layer.{name}" for name, _ in module.named_parameters() if name not in own),
        moved=False,
    )


class Repeated(nn.Module):
    """Calls a layer several times."""

    def __init__(self, layer: nn.Module, uses: int) -> None:
        super().__init__()
        self.layer = layer
        self.uses = uses

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what each call returned."""
        outputs = []
        for use in range(self.uses):
            given, named = transformed((args, kwargs), use)
            outputs.append(self.layer(*given, **named))
        return outputs


class Siblings(nn.Module):
    """Calls two layers, which have one parameter in common, on the same inputs."""

    def __init__(self, make: Callable[[], nn.Module], name: str) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        setattr(self.second, name, getattr(self.first, name))

    def forward(self, *inputs: Any) -> tuple[Any, Any]:
        """Return both outputs."""
        return self.first(*inputs), self.second(*inputs)


def leading_size(inputs: Any) -> int:
    """Return the first input's number of rows."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("no input is a tensor with samples on axis 0")


def transformed(inputs: Any, use: int) -> Any:
    """Return other inputs of the same kind: floats are bent, token ids reversed in each sample."""

    def transform(leaf: Any) -> Any:
        if use and is_floating(leaf):
            return (torch.sin((1 + use) * leaf.double()) + 0.5).to(leaf.dtype)
        if use and isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.dtype != torch.bool:
            return leaf.flip(-1)
        return leaf

    return tree_map(transform, inputs)


def _rows(value: Any, n: int) -> Draw:
    """Give the inputs as they are to n samples, and rows of others to fewer."""

    def first(count: int, leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n
        return leaf[:count] if has_rows else leaf

    def draw(count: int, generator: Generator) -> Any:
        if count == n:
            return value
        return tree_map(lambda leaf: first(count, leaf), transformed(value, 5))

    return draw

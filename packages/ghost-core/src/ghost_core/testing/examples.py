"""One layer configuration: how to make it, and what to call it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ghost_core.testing.losses import nonlinear_losses
from ghost_core.testing.snapshots import seeded

N: Final = -1
"""Stands for the number of samples in the shape of an input."""

VOCABULARY: Final = 7
"""Rows of the tables that `indices` are drawn for."""

Draw = Callable[[int, Generator], Any]
"""Draws one input for a number of samples."""


class Inputs(NamedTuple):
    """What a module is called on, and for how many samples N."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n: int


@dataclass(frozen=True)
class LayerExample:
    """One configuration of a layer, or of a model around it, with inputs of any batch size.

    Attributes:
        name: A unique name.
        make: Makes the module, in its modes of training and evaluation.
        args: Draw the positional inputs; see `normal` and `indices`.
        kwargs: Draw the keyword inputs.
        n: Number of samples N that it is usually run on.
        frozen: Parameters that do not require gradients, by dotted name; all others are checked.
        refusal: A regex that finds the reason in the message, where ghost must refuse to split the
            gradients by sample; None where it must be exact.
        generic: Whether no sampler has a formula for it, so that it takes one that replays modules.
        options: What engines need to be told about it, by keyword.
        moved: Whether parameters are moved away from zeros and ones after it was made.
        family: Where it belongs; the table fills it in.
    """

    name: str
    make: Callable[[], nn.Module]
    args: tuple[Draw, ...] = ()
    kwargs: Mapping[str, Draw] = field(default_factory=dict)
    n: int = 4
    frozen: tuple[str, ...] = ()
    refusal: str | None = None
    generic: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    moved: bool = True
    family: str = ""

    def build(self) -> nn.Module:
        """Return a new module in float64, as described by `moved` and `frozen`."""
        with seeded(0):
            module = self.make().double()
            if self.moved:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.25)
        for name in self.frozen:
            module.get_parameter(name).requires_grad_(False)
        return module

    def draw(self, n: int | None = None, seed: int = 0) -> Inputs:
        """Draw inputs for `n` samples, floating ones in float64; equal seeds draw equal inputs."""
        generator = Generator().manual_seed(seed)
        count = self.n if n is None else n
        args = tuple(draw(count, generator) for draw in self.args)
        kwargs = {name: draw(count, generator) for name, draw in self.kwargs.items()}
        return Inputs(args, kwargs, count)

    @property
    def dim(self) -> int:
        """Axis of the samples in the outputs, as engines are told by `batch_dim`."""
        axes = self.options.get("batch_dim", {}).items()
        found: list[int] = [axis for pattern, axis in axes if fnmatchcase("", pattern)]
        return found[-1] if found else 0


def outputs_of(example: LayerExample, module: nn.Module, inputs: Inputs) -> Any:
    """Run an example's module; its random operations draw the same numbers every time."""
    with seeded(1):
        return module(*inputs.args, **inputs.kwargs)


def losses(example: LayerExample, module: nn.Module, inputs: Inputs) -> Tensor:
    """Run an example's module and return a loss per sample, float64 `[N]`.

    Every output counts, and the loss is nonlinear in it. Random operations of the module draw the
    same numbers every time.

    Args:
        example: The example.
        module: What it built, or a module around that which returns the same.
        inputs: What it drew.

    Raises:
        AssertionError: If no output has N rows and requires a gradient.
    """
    return losses_of(example, outputs_of(example, module, inputs), inputs.n)


def losses_of(example: LayerExample, outputs: Any, n: int, *, draw: int = 0) -> Tensor:
    """Return the losses of `n` samples, float64 `[N]`, of what an example's module returned.

    Args:
        example: The example.
        outputs: What its module returned.
        n: Number of samples N.
        draw: Which random weights the outputs get; equal draws give equal weights.

    Raises:
        AssertionError: If no output has N rows and requires a gradient.
    """
    return nonlinear_losses(outputs, n, dim=example.dim, draw=draw, what=example.name)


def normal(*shape: int) -> Draw:
    """Draw normal numbers, float64 of the shape given, in which `N` stands for the samples."""

    def draw(n: int, generator: Generator) -> Tensor:
        return torch.randn(_sized(shape, n), dtype=torch.float64, generator=generator)

    return draw


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> Draw:
    """Draw indices below `VOCABULARY`, of the shape given; all occur where there is room."""

    def draw(n: int, generator: Generator) -> Tensor:
        size = torch.Size(_sized(shape, n))
        order = torch.randperm(size.numel(), generator=generator)
        return (order % VOCABULARY).reshape(size).to(dtype)

    return draw


def given(value: Any) -> Draw:
    """Give the same input whatever the number of samples."""
    return lambda n, generator: value


def named(family: str, examples: Iterable[LayerExample]) -> dict[str, LayerExample]:
    """Return examples of one family by name.

    Raises:
        ValueError: If two have one name.
    """
    table: dict[str, LayerExample] = {}
    for example in examples:
        if example.name in table:
            raise ValueError(f"two examples are called {example.name!r}")
        table[example.name] = replace(example, family=family)
    return table


def _sized(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    return tuple(n if size == N else size for size in shape)

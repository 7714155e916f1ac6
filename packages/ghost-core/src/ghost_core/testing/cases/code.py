"""Modules that do with their parameters what no formula foresees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ghost_core.testing.cases.bare import Owner
from ghost_core.testing.examples import LayerExample, N, given, named, normal

Example = partial(LayerExample, generic=True)


class Doubled(nn.Linear):
    """Overrides the forward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return twice the output."""
        return 2 * super().forward(inputs)


class Standardized(nn.Conv1d):
    """Standardises its kernels before it uses them."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output."""
        kernel = functional.layer_norm(self.weight, self.weight.shape[1:])
        return functional.conv1d(inputs, kernel, self.bias, self.stride, self.padding)


class Closure(nn.Module):
    """Calls a function of parameters and inputs."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for at, shape in enumerate(shapes):
            self.register_parameter(f"weight{at}", nn.Parameter(torch.randn(shape)))

    def forward(self, inputs: Tensor) -> Any:
        """Call the function."""
        return self.function(inputs, *self._parameters.values())


class Weighed(Owner):
    """Multiplies by a number for each sample."""

    def forward(self, inputs: Tensor, weights: Tensor) -> Any:
        """`[N, T, d]` and `[N]` to `[N, T, d]`."""
        return inputs * self.scale * weights[:, None, None]


class Switched(Owner):
    """Takes one of two ways, as an option says."""

    def forward(self, *, inputs: Tensor, flip: bool) -> Any:
        """`[N, ..., d]` to the same."""
        return inputs.flip(-1) * self.scale if flip else inputs * self.scale


class Either(Owner):
    """Scales each token by one of two parameters."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        chosen = inputs.mean(-1, keepdim=True) > 0
        return torch.where(chosen, inputs * self.scale, inputs * self.other)


class Counting(Owner):
    """Multiplies by the number of its calls, which is a buffer."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        self.get_buffer("count").add_(1)
        return inputs * self.scale * self.get_buffer("count").clone()


class Detaching(Owner):
    """Uses its parameter with gradients, detached, and with gradients disabled."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        with torch.no_grad():
            doubled = 2 * self.scale
        return (inputs * self.scale).sin() * doubled + inputs * self.scale.detach()


class Views(Owner):
    """Returns its input, its output, and parts of both."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to four tensors."""
        outputs = inputs * self.scale
        return inputs, outputs, {"first": outputs[:, 0], "last": [inputs[:, -1]]}


class Overwriting(Owner):
    """Builds its output in place."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to the same."""
        outputs = inputs.clone()
        outputs *= self.scale
        outputs[:, 0] += self.scale
        return outputs


class Recomputing(Owner):
    """Recomputes what it does in the backward pass."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        return checkpoint(lambda values: (values * self.scale).sin(), inputs, use_reentrant=False)


class Slope(Owner):
    """Returns a gradient with respect to its input, as energies do."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        energy = (inputs * self.scale).sin().sum()
        return torch.autograd.grad(energy, inputs, create_graph=True)[0]


class Reusing(Owner):
    """Calls the layer inside twice, and scales in between."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        return self.inner(torch.tanh(self.inner(inputs)) * self.scale)


class FromMapping(Owner):
    """Takes its inputs from a mapping."""

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """`[N, ..., d]` to the same."""
        return batch["inputs"] * self.scale + batch["others"][0]


def _gated(inputs: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return (inputs @ weight) * torch.sigmoid(inputs @ gate)


def _polynomial(inputs: Tensor, weights: Tensor) -> Tensor:
    return weights[0] + weights[1] * inputs + weights[2] * inputs**2


def _mapping(n: int, generator: Generator) -> dict[str, Any]:
    draw = normal(N, 3, 6)
    return {"inputs": draw(n, generator), "others": [draw(n, generator)], "name": "batch"}


_TOKENS = (normal(N, 3, 6),)


def _behaviours() -> Iterator[LayerExample]:
    scale: dict[str, tuple[int, ...]] = {"scale": (6,)}
    yield Example("a number for each sample", lambda: Weighed(scale), (*_TOKENS, normal(N)))
    yield Example(
        "a number for each sample, as many tokens as samples",
        lambda: Weighed(scale),
        (normal(N, N, 6), normal(N)),
    )
    for flip in (True, False):
        yield Example(
            f"keywords, {'flipped' if flip else 'straight'}",
            lambda: Switched(scale),
            kwargs={"inputs": normal(N, 3, 6), "flip": given(flip)},
        )
    yield Example("a mapping of inputs", lambda: FromMapping(scale), (_mapping,))
    yield Example("one of two parameters", lambda: Either(scale | {"other": (6,)}), _TOKENS)
    yield Example("a buffer that counts", lambda: Counting(scale), _TOKENS)
    yield Example("detached in part", lambda: Detaching(scale), _TOKENS)
    yield Example("views of inputs and outputs", lambda: Views(scale), _TOKENS)
    yield Example("overwritten output", lambda: Overwriting(scale), _TOKENS)
    yield Example("recomputed inside", lambda: Recomputing(scale), _TOKENS)
    yield Example("gradient as output", lambda: Slope(scale), _TOKENS)
    yield Example(
        "a layer inside, used twice", lambda: Reusing(scale, inner=nn.Linear(6, 6)), _TOKENS
    )


def _overridden() -> Iterator[LayerExample]:
    yield Example("linear, another forward", lambda: Doubled(6, 7), _TOKENS)
    yield Example("conv1d, standardised", lambda: Standardized(6, 5, 3), (normal(N, 6, 5),))
    yield Example("function, gated", lambda: Closure(_gated, (6, 7), (6, 7)), _TOKENS)
    yield Example("function, polynomial", lambda: Closure(_polynomial, (3,)), _TOKENS)
    yield Example(
        "function, of a class",
        lambda: nn.Sequential(Closure(_polynomial, (3,)), Doubled(6, 7), nn.Linear(7, 5)),
        _TOKENS,
    )


CODE = named("code", [*_behaviours(), *_overridden()])

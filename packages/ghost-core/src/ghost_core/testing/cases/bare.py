"""Modules that use parameters of their own in any way at all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import LayerExample, N, indices, named, normal

Example = partial(LayerExample, generic=True)


class Owner(nn.Module):
    """Owns parameters of the shapes given, and layers."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **layers: nn.Module) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def __getattr__(self, name: str) -> Any:
        """Return a parameter or a layer."""
        return super().__getattr__(name)


class ClassToken(Owner):
    """Puts a learned token before all others."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to `[N, T + 1, p]`."""
        token = self.token.expand(len(inputs), -1, -1)
        return self.head(torch.cat([token, inputs], dim=1))


class PositionTable(Owner):
    """Adds a learned vector to each position."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to `[N, T, p]`."""
        return self.head(inputs + self.table[: inputs.shape[1]])


class LayerScale(Owner):
    """Adds a scaled branch to its input."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        return inputs + self.scale * self.branch(inputs)


class Scale(Owner):
    """Multiplies by a vector, or by a scalar."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        return inputs.sin() * self.scale


class Temperature(Owner):
    """Scales cosine similarities to learned vectors by the exponential of a scalar."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, d]` to `[N, p]`."""
        vectors = functional.normalize(self.vectors, dim=-1)
        return self.temperature.exp() * functional.normalize(inputs, dim=-1) @ vectors.mT


class StateSpace(Owner):
    """Runs a linear recurrence whose decay is the exponential of a negative exponential."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to the same."""
        decay = torch.exp(-functional.softplus(self.step) * torch.exp(self.a_log))
        state, outputs = torch.zeros_like(inputs[:, 0]), []
        for token in inputs.unbind(1):
            state = decay * state + token
            outputs.append(state + self.skip * token)
        return torch.stack(outputs, dim=1)


class GlobalResponseNorm(Owner):
    """Scales features by their norm over positions, relative to the mean of all norms."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to the same."""
        norms = inputs.norm(dim=1, keepdim=True)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (inputs * relative) + self.beta + inputs


class ScalarMix(Owner):
    """Mixes the outputs of layers by a softmax of weights."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to `[N, ..., p]`."""
        weights = self.weights.softmax(0)
        return weights[0] * self.first(inputs) + weights[1] * self.second(inputs)


class RelativeBias(Owner):
    """Adds a bias of the distance to attention logits."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to the same."""
        places = torch.arange(inputs.shape[1])
        distances = (places[:, None] - places).abs()
        logits = inputs @ inputs.mT + self.bias[distances]
        return logits.softmax(-1) @ inputs


class LearnedQueries(Owner):
    """Pools tokens by attention from learned queries."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to `[N, q, d]`."""
        return (self.queries @ inputs.mT).softmax(-1) @ inputs


class ZeroGate(Owner):
    """Adds a branch behind the hyperbolic tangent of a scalar."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        return inputs + self.gate.tanh() * self.branch(inputs)


class LowRank(Owner):
    """Adds a product of two factors to a frozen weight."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to `[N, ..., p]`."""
        return functional.linear(inputs, self.weight + self.up @ self.down)


class Experts(Owner):
    """Weighs experts, kept in one tensor, by a softmax of each token."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, T, d]` to `[N, T, p]`."""
        weights = (inputs @ self.router).softmax(-1)
        return torch.einsum("nte,ntd,edp->ntp", weights, inputs, self.experts)


class Squeeze(Owner):
    """Scales channels by a function of their means over positions."""

    def forward(self, inputs: Tensor) -> Any:
        """`[N, C, T]` to the same."""
        means = inputs.mean(-1) @ self.down
        return inputs * torch.sigmoid(means.relu() @ self.up).unsqueeze(-1)


class InList(nn.Module):
    """Owns parameters through a list, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., 6]` to the same."""
        for scale in self.scales:
            inputs = torch.tanh(inputs * scale)
        return inputs


class InDict(nn.Module):
    """Owns parameters through a dictionary, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({"weight": torch.randn(6, 7), "bias": torch.randn(7)})

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., 6]` to `[N, ..., 7]`."""
        return inputs @ self.parts["weight"] + self.parts["bias"]


class RandomScale(Owner):
    """Drops entries of its parameter's products in training."""

    dropout = 0.5

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        return functional.dropout(inputs * self.scale, self.dropout, self.training)


class Lookup(Owner):
    """Looks up rows of a parameter by index, and multiplies by another one."""

    def forward(self, index: Tensor) -> Any:
        """`[N, T]` to `[N, T, d]`."""
        return self.table[index] * self.scale


class PrivateNoise(Owner):
    """Draws from a generator of its own."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.generator = Generator().manual_seed(0)

    def forward(self, inputs: Tensor) -> Any:
        """`[N, ..., d]` to the same."""
        noise = torch.rand(inputs.shape, dtype=inputs.dtype, generator=self.generator)
        return inputs * self.scale * noise


_TOKENS, _FLAT = (normal(N, 3, 6),), (normal(N, 6),)


def _parameters() -> Iterator[LayerExample]:
    scales: dict[str, tuple[int, ...]] = {"scale": (6,)}
    head = partial(nn.Linear, 6, 7)
    branch = partial(nn.Linear, 6, 6)
    yield Example("class token", lambda: ClassToken({"token": (1, 1, 6)}, head=head()), _TOKENS)
    yield Example(
        "class token, only this",
        lambda: ClassToken({"token": (1, 1, 6)}, head=head()),
        _TOKENS,
        frozen=("head.weight", "head.bias"),
    )
    yield Example("position table", lambda: PositionTable({"table": (12, 6)}, head=head()), _TOKENS)
    yield Example(
        "position table, as many tokens as samples",
        lambda: PositionTable({"table": (12, 6)}, head=head()),
        (normal(N, N, 6),),
    )
    yield Example("layer scale", lambda: LayerScale(scales, branch=branch()), _TOKENS)
    yield Example(
        "layer scale, used twice",
        lambda: roots.Repeated(LayerScale(scales, branch=branch())),
        _TOKENS,
    )
    yield Example("scale", lambda: Scale(scales), _TOKENS)
    yield Example("scale, no tokens", lambda: Scale(scales), _FLAT)
    yield Example("scale, a scalar", lambda: Scale({"scale": ()}), _TOKENS)
    yield Example("scale, twice", lambda: roots.Repeated(Scale(scales)), _TOKENS)
    yield Example("scale, two names", lambda: roots.TwoNames(Scale(scales)), _TOKENS)
    yield Example("scale, recomputed", lambda: roots.Checkpointed(Scale(scales)), _TOKENS)
    yield Example("scale, with dropout in training", lambda: RandomScale(scales), _TOKENS)
    yield Example("scale, with dropout in evaluation", lambda: RandomScale(scales).eval(), _TOKENS)
    yield Example("scale, private generator", lambda: PrivateNoise(scales), _TOKENS)
    yield Example(
        "scale, before a linear layer", lambda: nn.Sequential(Scale(scales), head()), _TOKENS
    )
    yield Example("temperature", lambda: Temperature({"temperature": (), "vectors": (7, 6)}), _FLAT)
    yield Example(
        "temperature, only this",
        lambda: Temperature({"temperature": (), "vectors": (7, 6)}),
        _FLAT,
        frozen=("vectors",),
    )
    yield Example(
        "state space", lambda: StateSpace({"a_log": (6,), "step": (6,), "skip": (6,)}), _TOKENS
    )
    yield Example(
        "global response norm", lambda: GlobalResponseNorm({"gamma": (6,), "beta": (6,)}), _TOKENS
    )
    yield Example(
        "scalar mix", lambda: ScalarMix({"weights": (2,)}, first=head(), second=head()), _TOKENS
    )
    yield Example("relative bias", lambda: RelativeBias({"bias": (3,)}), _TOKENS)
    yield Example("learned queries", lambda: LearnedQueries({"queries": (2, 6)}), _TOKENS)
    yield Example("gate", lambda: ZeroGate({"gate": ()}, branch=branch()), _TOKENS)
    yield Example(
        "low rank",
        lambda: LowRank({"weight": (7, 6), "up": (7, 2), "down": (2, 6)}),
        _TOKENS,
        frozen=("weight",),
    )
    yield Example("experts", lambda: Experts({"router": (6, 3), "experts": (3, 6, 7)}), _TOKENS)
    yield Example("squeeze", lambda: Squeeze({"down": (6, 2), "up": (2, 6)}), (normal(N, 6, 5),))
    yield Example("list of parameters", InList, _TOKENS)
    yield Example("dictionary of parameters", InDict, _TOKENS)
    yield Example("lookup", lambda: Lookup({"table": (7, 6), "scale": (6,)}), (indices(N, 5),))
    yield Example(
        "parameter shared with a linear layer",
        lambda: roots.Sharing(
            LowRank({"weight": (6, 6), "up": (6, 2), "down": (2, 6)}), branch(), "weight"
        ),
        _TOKENS,
    )


BARE = named("bare parameter", _parameters())

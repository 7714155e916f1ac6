"""One layer, one batch of inputs, and a small model that trains on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ghost_core import GradientSampler, SamplerRegistry, UnbalancedError
from ghost_core.testing.holder import GradientHolder, Held
from ghost_core.testing.losses import is_floating, losses_by_token, nonlinear_losses
from ghost_core.testing.operations import Gradients, failing_as
from ghost_core.testing.oracle import norms, per_sample_gradients
from ghost_core.testing.snapshots import seeded
from ghost_core.tracking import Claim, dotted_name

HolderT = TypeVar("HolderT", bound=GradientHolder)


@dataclass(frozen=True)
class LayerCase:
    """A sampler, a layer, and a batch of inputs for it.

    Attributes:
        kind: The sampler's class.
        module: The layer; every run copies it.
        inputs: Positional and keyword inputs.
        n: Number of samples N.
        uses: How often a model calls the layer.
        names: Trainable parameters by local name; all others are frozen.
        label: What is special about the case, for messages.
        autocast: Whether to run under bfloat16 autocast.
    """

    kind: type[GradientSampler]
    module: nn.Module
    inputs: Any
    n: int
    uses: int
    names: tuple[str, ...]
    label: str = ""
    autocast: bool = False

    def cast(self, dtype: torch.dtype, label: str = "") -> LayerCase:
        """Return the case with a copy of the layer, and inputs, in another dtype."""
        module = copy.deepcopy(self.module).to(dtype)
        inputs = tree_map(lambda leaf: leaf.to(dtype) if is_floating(leaf) else leaf, self.inputs)
        return replace(self, module=module, inputs=inputs, label=label)

    def take(self, samples: slice, label: str) -> LayerCase:
        """Return the case for some of the samples."""
        n = len(range(*samples.indices(self.n)))
        inputs = tree_map(
            lambda leaf: leaf[samples] if _has_rows(leaf, self.n) else leaf, self.inputs
        )
        return replace(self, inputs=inputs, n=n, label=label)

    def another_batch(self) -> LayerCase:
        """Return other inputs, one sample fewer."""
        others = replace(self, inputs=_transformed(self.inputs, 5))
        return others.take(slice(0, max(1, self.n - 1)), self.label)

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the results."""
        dtypes = {parameter.dtype for parameter in self.module.parameters()}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def of(self, name: str) -> str:
        """Name a parameter in a message."""
        return f"{type(self.module).__name__}.{name} {self.label}".rstrip()

    def run(self) -> LayerRun:
        """Put a copy of the layer into a model, with leaves as inputs."""
        model = _Root(copy.deepcopy(self.module), self.uses)
        for name, parameter in model.layer.named_parameters(recurse=False):
            parameter.requires_grad_(name in self.names)
        return LayerRun(model, tree_map(_leaf, self.inputs), self.n, self.autocast)

    def runs(self) -> bool:
        """Tell whether the layer itself runs on these inputs."""
        try:
            self.run().losses().sum().backward()
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        return True

    def oracle(self, draw: int = 0) -> dict[str, Tensor]:
        """Return the gradients by local name, in float64 `[N, *shape]`, for a draw of the loss."""
        run = replace(self.cast(torch.float64), autocast=False).run()
        gradients = per_sample_gradients(run.model, run.losses(draw))
        return {name: gradients[f"layer.{name}"] for name in self.names}

    def scales(self) -> dict[str, Tensor]:
        """Return how large gradients are where tokens and uses do not cancel, `[N]` by name.

        Rounding errors do not cancel with what they are errors of. In reduced precision they are
        measured against the root mean square norm over several random losses.
        """
        draws = [self.oracle(draw) for draw in range(8)]
        squares = {name: torch.stack([norms(d[name]) for d in draws]) ** 2 for name in self.names}
        return {name: torch.maximum(s[0], s.mean(0)).sqrt() for name, s in squares.items()}

    def engine(self, kind: type[HolderT], model: nn.Module, *, verify: bool) -> HolderT:
        """Return an engine that knows the sampler and nothing else."""
        claim = Claim(dotted_name(type(self.module)), self.kind, "ghost_core.testing")
        layers = [f"layer.{name}" for name in self.names]
        return kind(model, layers=layers, registry=SamplerRegistry([claim]), verify=verify)

    def hold(self, run: LayerRun, engine: GradientHolder) -> Held:
        """Run forward and backward inside a batch.

        Raises:
            AssertionError: If either fails, or not every use arrives.
        """
        with engine, engine.batch(range(self.n)) as batch:
            with failing_as(f"{self.kind.__name__} in the forward pass {self.label}".rstrip()):
                losses = run.losses()
            with failing_as(f"{self.kind.__name__} in the backward pass {self.label}".rstrip()):
                losses.sum().backward()
        held = batch.result
        for parameter, arrived in held.uses.items():
            if len(arrived) != self.uses:
                raise AssertionError(
                    f"{parameter}: {len(arrived)} gradients arrived for {self.uses} uses"
                )
        return held

    def capture(self, *, verify: bool = False) -> dict[str, Gradients]:
        """Return what the sampler finds and what it should find, by local name."""
        run = self.run()
        try:
            held = self.hold(run, self.engine(GradientHolder, run.model, verify=verify))
        except UnbalancedError:  # whose cause the comparison with autograd shows in detail
            run = self.run()
            held = self.hold(run, self.engine(GradientHolder, run.model, verify=False))
        scales = {} if self.wide == torch.float64 else self.scales()
        return {
            name: Gradients(held.gradients(f"layer.{name}"), expected, scales.get(name))
            for name, expected in self.oracle().items()
        }


@dataclass(frozen=True)
class LayerRun:
    """A model that calls a layer, and inputs that are leaves of the graph."""

    model: _Root
    inputs: Any
    n: int
    autocast: bool

    def losses(self, draw: int = 0) -> Tensor:
        """Return the losses `[N]`; equal draws have equal weights and dropout masks."""
        args, kwargs = self.inputs
        with seeded(0), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            outputs = self.model(*args, **kwargs)
        return nonlinear_losses(outputs, self.n, draw=draw)

    def losses_by_token(self) -> Iterator[Tensor]:
        """Yield the losses split by position of the output, `[N, T]`, for each way to see it.

        Features may be on the last axis or on the second; nothing is yielded where an output has
        neither, or there are several outputs.
        """
        args, kwargs = self.inputs
        outputs = [leaf for leaf in tree_leaves(self.model(*args, **kwargs)) if is_floating(leaf)]
        if len(outputs) == 1 and outputs[0].dim() > 2 and _has_rows(outputs[0], self.n):
            yield from losses_by_token(outputs[0])

    def gradients(self) -> list[Tensor | None]:
        """Return `.grad` of the parameters and of the inputs."""
        leaves = [*self.model.parameters(), *filter(is_floating, tree_leaves(self.inputs))]
        return [leaf.grad for leaf in leaves]


class _Root(nn.Module):
    """Calls a layer several times."""

    def __init__(self, layer: nn.Module, uses: int) -> None:
        super().__init__()
        self.layer = layer
        self.uses = uses

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        outputs = []
        for use in range(self.uses):
            given, named = _transformed((args, kwargs), use)
            outputs.append(self.layer(*given, **named))
        return outputs


def leading_size(inputs: Any) -> int:
    """Return the first input's number of rows."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("no input is a tensor with samples on axis 0")


def _transformed(inputs: Any, use: int) -> Any:
    """Return other inputs of the same kind: floats are bent, token ids reversed in each sample."""

    def transform(leaf: Any) -> Any:
        if use and is_floating(leaf):
            return (torch.sin((1 + use) * leaf.double()) + 0.5).to(leaf.dtype)
        if use and isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.dtype != torch.bool:
            return leaf.flip(-1)
        return leaf

    return tree_map(transform, inputs)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(is_floating(value))


def _has_rows(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == n

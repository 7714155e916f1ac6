"""Runs an example inside a batch and by autograd alone: what ghost finds, and what it should."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghost_core.testing.examples import Inputs, LayerExample, losses, losses_of, outputs_of
from ghost_core.testing.holder import GradientHolder, Held
from ghost_core.testing.losses import is_floating
from ghost_core.testing.operations import Gradients, failing_as
from ghost_core.testing.oracle import norms, per_sample_gradients
from ghost_core.tracking import SamplerRegistry

HolderT = TypeVar("HolderT", bound=GradientHolder)


@dataclass(frozen=True)
class Trial:
    """How an example is run.

    Attributes:
        example: The example.
        registry: Where samplers are found; by default those of all installed plugins.
        dtype: Dtype of parameters and floating inputs.
        autocast: Whether to run under bfloat16 autocast; values are then those of bfloat16, so that
            nothing but arithmetic is less exact.
        blamed: Whose fault an exception in the forward or the backward pass is: it becomes an
            `AssertionError` that says so. By default exceptions are left as they are.
        label: What is special about the trial, for messages.
    """

    example: LayerExample
    registry: SamplerRegistry | None = None
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    blamed: str = ""
    label: str = ""

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the results."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def module(self) -> nn.Module:
        """Return a new module."""
        module = self.example.build()
        return (module.bfloat16() if self.autocast else module).to(self.dtype)

    def inputs(self, n: int) -> Inputs:
        """Draw inputs for `n` samples, of which floating ones require gradients."""

        def leaf(value: object) -> object:
            if not is_floating(value):
                return value
            assert isinstance(value, Tensor)
            rounded = value.bfloat16() if self.autocast else value
            return rounded.to(self.dtype, copy=True).detach().requires_grad_()

        drawn = self.example.draw(n, seed=n)
        return drawn._replace(args=tree_map(leaf, drawn.args), kwargs=tree_map(leaf, drawn.kwargs))

    def losses(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Return the losses `[N]`."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return losses(self.example, module, inputs)

    def runs(self, n: int) -> bool:
        """Tell whether the module itself runs on `n` samples."""
        try:
            self.losses(self.module(), self.inputs(n)).sum().backward()
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        return True

    def engine(self, kind: type[HolderT], *, verify: bool) -> HolderT:
        """Return an engine for a new module."""
        options = self.example.options
        return kind(self.module(), registry=self.registry, verify=verify, **options)

    def hold(self, engine: GradientHolder, inputs: Inputs) -> Held:
        """Run forward and backward in a batch of an attached engine.

        Raises:
            AssertionError: If the batch is not verified though the engine verifies, or no
                gradient arrives for a parameter.
        """
        with engine.batch(range(inputs.n)) as batch:
            with self._blaming("forward"):
                total = self.losses(engine.model, inputs).sum()
            with self._blaming("backward"):
                total.backward()
        name, held = self.example.name, batch.result
        if engine.verifies and not batch.verified:
            raise AssertionError(f"{name}: the batch was not verified")
        if missing := [parameter for parameter, uses in held.uses.items() if not uses]:
            raise AssertionError(f"{name}: no gradient arrived for {', '.join(missing)}")
        return held

    def expected(self, module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Return each sample's gradient by autograd in float64, `[N, *shape]` by name.

        Args:
            module: The module in the state before the call, which may change it; it is copied.
            inputs: The inputs.
        """
        (gradients,) = self._expected(module, inputs, draws=1)
        return gradients

    def _expected(self, module: nn.Module, inputs: Inputs, draws: int) -> list[dict[str, Tensor]]:
        """Return the gradients of several losses, whose weights differ, of the same outputs."""
        copied = dense(copy.deepcopy(module).double())
        args, kwargs = tree_map(_double, inputs.args), tree_map(_double, inputs.kwargs)
        outputs = outputs_of(self.example, copied, inputs._replace(args=args, kwargs=kwargs))
        return [
            per_sample_gradients(copied, losses_of(self.example, outputs, inputs.n, draw=draw))
            for draw in range(draws)
        ]

    def capture(self, engine: GradientHolder, n: int) -> dict[str, Gradients]:
        """Return what an attached engine finds, and what it should find, by parameter name."""
        inputs = self.inputs(n)
        # Before the call, which may change buffers and, for a table with `max_norm`, parameters.
        before = copy.deepcopy(engine.model)
        uses = self.hold(engine, inputs).uses
        exact = self.dtype == torch.float64
        expected, *others = self._expected(before, inputs, draws=1 if exact else 8)
        if uses.keys() != expected.keys():
            raise AssertionError(
                f"{self.example.name}: {sorted(uses)}, expected {sorted(expected)}"
            )
        scales = {} if exact else _scales([expected, *others])
        return {
            name: Gradients([use.gradient for use in uses[name]], gradient, scales.get(name))
            for name, gradient in expected.items()
        }

    def _blaming(self, where: str) -> AbstractContextManager[None]:
        if not self.blamed:
            return nullcontext()
        return failing_as(f"{self.blamed} in the {where} pass {self.label}".rstrip())


def capture(
    example: LayerExample,
    sizes: Sequence[int],
    registry: SamplerRegistry | None = None,
    *,
    verify: bool = True,
) -> list[dict[str, Gradients]]:
    """Return what ghost finds in batches of an example, beside what it should find.

    Args:
        example: The example.
        sizes: Number of samples of each batch. One engine captures them all.
        registry: Where samplers are found; by default those of all installed plugins.
        verify: Whether the split by sample is verified.

    Returns:
        For each batch, gradients by parameter name, to be compared by `check_operations`.

    Raises:
        AssertionError: If a parameter is missing, or no gradient arrived for it.
        GhostError: If ghost refuses the example.
    """
    trial = Trial(example, registry)
    with trial.engine(GradientHolder, verify=verify) as engine:
        return [trial.capture(engine, n) for n in sizes]


def _scales(draws: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return how large gradients are where tokens and uses do not cancel, `[N]` by name.

    Rounding errors do not cancel with what they are errors of. In reduced precision they are
    measured against the root mean square norm over several random losses, the first one included.
    """
    squares = {name: torch.stack([norms(d[name]) for d in draws]) ** 2 for name in draws[0]}
    return {name: torch.maximum(s[0], s.mean(0)).sqrt() for name, s in squares.items()}


def dense(module: nn.Module) -> nn.Module:
    """Let tables make dense gradients, which are the same numbers: for autograd's own calls."""
    for each in module.modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag):
            each.sparse = False
    return module


def _double(value: object) -> object:
    if not is_floating(value):
        return value
    assert isinstance(value, Tensor)
    return value.detach().double().requires_grad_(value.requires_grad)

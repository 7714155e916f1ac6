"""A backward pass with NaN in one sample's output, to see which rows of a module it reaches.

NaN survives multiplication by zero, so mixing behind a zero-initialised gate is found as well; in
half precision, only where it mixes the first sample into others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core._torch import Hooks, backward_hooks, run_backward, start_of_backward
from ghost_core.errors import CaptureError
from ghost_core.split.axes import RowAxes
from ghost_core.split.owners import Hit
from ghost_core.split.reasons import no_samples
from ghost_core.state import buffers_kept

Kind = tuple[str, bool]
"""A module's name, and whether its rows are folded: what a verification holds for."""


@dataclass
class Probe:
    """What one backward pass from one sample reached.

    Attributes:
        sample: The sample whose output gradient is not zero.
        n: Number of samples.
        reached: The modules that any gradient reached.
        hits: Rows that NaN or anything else reached.
        scalars: Names of modules of which a scalar output was reached.
        half: Whether any gradient was in half precision.
    """

    sample: int
    n: int
    reached: set[Kind] = field(default_factory=set)
    hits: list[Hit] = field(default_factory=list)
    scalars: set[str] = field(default_factory=set)
    half: bool = False

    def see(self, name: str, axes: RowAxes, grads: Sequence[Tensor | None]) -> None:
        """Note which rows of a call's output gradients, rows on the first axis, are not zero."""
        self.reached.add((name, axes.is_folded(self.n)))
        for grad in grads:
            if grad is None:
                continue
            self.half |= grad.dtype in (torch.bfloat16, torch.float16)
            hit = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
            if not grad.dim():
                if hit:
                    self.scalars.add(name)
            elif rows := hit.nonzero().flatten().tolist():
                self.hits.append(Hit(name, axes, rows, self.sample, self.n))

    @property
    def mixed(self) -> dict[str, Sequence[int]]:
        """Rows reached, by name of a module where these are not just the sample's own."""
        mixed: dict[str, Sequence[int]] = {name: [] for name in self.scalars}
        return mixed | {hit.name: hit.rows for hit in self.hits if hit.is_mixed}


class Prober:
    """Sends gradients through all Taps of a model, and through nothing else.

    Args:
        model: The root module.
        seed: A scalar that every Tap depends on.
        dim: Axis of the samples in the model's outputs.
    """

    def __init__(self, model: nn.Module, seed: Tensor, dim: int) -> None:
        self._modules = list(model.modules())
        self._seed = seed
        self._dim = dim
        self._shielded: list[tuple[Hooks, Hooks]] = []
        self.running: Probe | None = None
        """The probe that is running; gradients that arrive meanwhile are its alone."""

    def run(self, output: Any, sample: int, n: int) -> Probe:
        """Return what NaN in one sample of the model's output reaches.

        Raises:
            WrongSplitError: If no output has one entry per sample.
            CaptureError: If the graph cannot be probed.
        """
        leaves = _differentiable(output)
        axes = {leaf: axis for leaf in leaves if (axis := self._axis(leaf, n)) is not None}
        if not axes:
            raise no_samples(output, leaves, n, self._dim)
        probe = self._backward(
            Probe(sample, n), {leaf: nan_in(leaf, sample, axis) for leaf, axis in axes.items()}
        )
        if probe.mixed and probe.half and sample > 0:
            # Half-precision kernels of some CPUs load the head of the next row behind the tail of
            # a row, times zero. NaN leaks to the row before; numbers do not, and row 0 has none.
            reached = probe.reached
            probe = self._backward(
                Probe(sample, n),
                {leaf: numbers_in(leaf, sample, axis) for leaf, axis in axes.items()},
            )
            probe.reached |= reached
        return probe

    def run_from_others(self, output: Any, n: int) -> Probe:
        """Return what gradients reach from outputs that do not have one entry per sample."""
        others = [leaf for leaf in _differentiable(output) if self._axis(leaf, n) is None]
        ones = {leaf: torch.ones_like(leaf) for leaf in others}
        return self._backward(Probe(0, n), ones) if ones else Probe(0, n)

    def shield_hooks(self) -> None:
        """Keep the user's backward hooks from seeing probes.

        Modules take their hooks into the graph when they run; for this forward pass they get some
        that do nothing while a probe runs.
        """
        for module in self._modules:
            for hooks in backward_hooks(module):
                if hooks:
                    self._shielded.append((hooks, dict(hooks)))
                    hooks.update({key: self._shield(hook) for key, hook in hooks.items()})

    def restore_hooks(self) -> None:
        """Give modules their own backward hooks back."""
        for hooks, found in self._shielded:
            hooks.update({key: hook for key, hook in found.items() if key in hooks})
        self._shielded.clear()

    def _shield(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def shielded(*args: Any) -> Any:
            return hook(*args) if self.running is None else None

        return shielded

    def _axis(self, output: Tensor, n: int) -> int | None:
        """Return the axis of an output with one entry per sample: the one expected, or the first.

        A model that is sequence-first inside may return one row per sample all the same.
        """
        for axis in (self._dim, 0):
            if output.dim() > axis and output.shape[axis] == n:
                return axis
        return None

    def _backward(self, probe: Probe, gradients: Mapping[Tensor, Tensor]) -> Probe:
        """Run a backward pass that starts with the gradients of some outputs; return the probe."""
        self.running = probe
        try:
            with (
                # What is recomputed under checkpointing may write buffers.
                buffers_kept(self._modules, by_copies=True),
                torch.autograd.set_detect_anomaly(False),  # which takes NaN for a mistake
            ):
                start = start_of_backward(gradients, gradients.values())
                run_backward(start, self._seed)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise CaptureError(
                    "reentrant activation checkpointing hides calls from the graph: use "
                    "torch.utils.checkpoint with use_reentrant=False"
                ) from error
            raise
        finally:
            self.running = None
        return probe


def nan_in(output: Tensor, sample: int, dim: int) -> Tensor:
    """Return an output's gradient that is NaN for one sample and zero for all others."""
    gradient = torch.zeros_like(output)
    gradient.select(dim, sample).fill_(torch.nan)
    return gradient


def numbers_in(output: Tensor, sample: int, dim: int) -> Tensor:
    """Return an output's gradient that is random for one sample and zero for all others."""
    gradient = torch.zeros_like(output)
    part = gradient.select(dim, sample)
    part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
    return gradient


def probed_samples(n: int) -> list[int]:
    """Choose samples to probe: first, middle and last find mixing with any one of them."""
    return sorted({0, n // 2, n - 1})


def _differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors in an output that gradients can start from."""
    return [
        leaf
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]

"""A backward pass with NaN in one sample's output, to see which rows of a module it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ghost_core.errors import WrongSplitError
from ghost_core.split.axes import Layout

Kind = tuple[str, bool]
"""A module's name, and whether its rows are folded: what a verification holds for."""


@dataclass
class Probe:
    """One backward pass with NaN in one sample.

    Attributes:
        sample: The sample whose output gradient is NaN.
        n: Number of samples.
        reached: The modules that any gradient reached.
        hits: Rows that NaN or anything else reached: module, layout of the call, rows.
        scalars: Names of modules of which a scalar output was reached.
        half: Whether any gradient was in half precision.
    """

    sample: int
    n: int
    reached: set[Kind] = field(default_factory=set)
    hits: list[tuple[str, Layout, list[int]]] = field(default_factory=list)
    scalars: set[str] = field(default_factory=set)
    half: bool = False

    def see(self, name: str, layout: Layout, grads: Sequence[Tensor | None]) -> None:
        """Note which rows of a call's output gradients, rows on the first axis, are not zero."""
        self.reached.add((name, layout.is_folded(self.n)))
        for grad in grads:
            if grad is None:
                continue
            self.half |= grad.dtype in (torch.bfloat16, torch.float16)
            hit = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
            if not grad.dim():
                if hit:
                    self.scalars.add(name)
            elif rows := hit.nonzero().flatten().tolist():
                self.hits.append((name, layout, rows))

    @property
    def mixed(self) -> dict[str, list[int]]:
        """Rows reached, by name of a module where these are not just the sample's own."""
        mixed: dict[str, list[int]] = {name: [] for name in self.scalars}
        for name, layout, rows in self.hits:
            if not layout.are_of(rows, self.sample, self.n):
                mixed[name] = rows
        return mixed


def probed_samples(n: int) -> list[int]:
    """Choose samples to probe: first, middle and last find mixing with any one of them."""
    return sorted({0, n // 2, n - 1})


def differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors in an output that gradients can start from."""
    return [
        leaf
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]


def samples_axis(output: Tensor, n: int, dim: int) -> int | None:
    """Return the axis of an output with one entry per sample: the one expected, or the first.

    A model that is sequence-first inside may return one row per sample all the same.
    """
    for axis in (dim, 0):
        if output.dim() > axis and output.shape[axis] == n:
            return axis
    return None


def outputs_by_sample(outputs: Any, n: int, dim: int) -> list[Tensor]:
    """Return the outputs of a model that have one entry per sample.

    Raises:
        WrongSplitError: If there is none.
    """
    leaves = differentiable(outputs)
    found = [leaf for leaf in leaves if samples_axis(leaf, n, dim) is not None]
    if not found:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or type(outputs).__name__
        expected = ", ".join([*[":"] * dim, str(n), "..."])
        raise WrongSplitError(
            f"the model's output does not tell {n} samples apart",
            reason=f"there is no tensor of shape [{expected}] that requires a gradient, only "
            f"{shapes}",
            remedy="let the model return its outputs and compute the loss outside of it"
            + ("" if dim else "; say which axis holds the samples, as in batch_dim={'': 1}")
            + "; or pass verify=False, which every result records",
        )
    return found


def nan_in(output: Tensor, sample: int, dim: int) -> Tensor:
    """Return an output's gradient that is NaN for one sample and zero for all others."""
    gradient = torch.zeros_like(output)
    gradient.select(dim, sample).fill_(float("nan"))
    return gradient


def numbers_in(output: Tensor, sample: int, dim: int) -> Tensor:
    """Return an output's gradient that is random for one sample and zero for all others."""
    gradient = torch.zeros_like(output)
    generator = torch.Generator().manual_seed(0)
    part = gradient.select(dim, sample)
    part.copy_(torch.randn(part.shape, generator=generator))
    return gradient

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

from ghost_core._torch import (
    Hooks,
    any_backward_hooks,
    backward_hooks,
    own_mode_left,
    run_backward,
    start_of_backward,
)
from ghost_core.differentiation import reentrant_refused
from ghost_core.split.axes import RowAxes
from ghost_core.split.owners import Fold, Hit
from ghost_core.split.sites import Rows, Site
from ghost_core.state import buffers_kept, random_state_kept

Kind = tuple[str, bool]
"""A module's name, and whether its rows are folded: what a verification holds for."""


@dataclass
class Probe:
    """What one backward pass from one sample, or from several, reached.

    Attributes:
        samples: The samples whose output gradient is not zero; one, but where rows are routed.
        n: Number of samples.
        sites: The sites that any gradient reached.
        rows: Rows that NaN or anything else reached, by site, for each of its alternatives.
        scalars: Names of modules of which a scalar output was reached.
        half: Whether any gradient was in half precision.
    """

    samples: tuple[int, ...]
    n: int
    sites: dict[Site, None] = field(default_factory=dict)
    rows: list[tuple[Site, Rows]] = field(default_factory=list)
    scalars: set[str] = field(default_factory=set)
    half: bool = False

    def see(self, site: Site, grads: Sequence[Tensor | None]) -> None:
        """Note which rows of a site's gradients are not zero."""
        self.sites[site] = None
        site.probed = True
        given = [grad for grad in grads if grad is not None]
        self.half |= any(grad.dtype in (torch.bfloat16, torch.float16) for grad in given)
        if any(not grad.dim() and bool(grad != 0) for grad in given):
            self.scalars.update(site.names)
        self.rows += [(site, rows) for rows in site.reached(grads)]

    @property
    def reached(self) -> set[Kind]:
        """The modules that any gradient reached."""
        return {kind for site in self.sites for kind in site.kinds(self.n)}

    @property
    def hits(self) -> list[Hit]:
        """The rows reached, where sites have theirs as far as is known."""
        (sample,) = self.samples
        return [
            Hit(name, axes, rows, sample, self.n)
            for site, (axes, rows) in self.rows
            if axes is site.axes
            for name in site.names
        ]

    @property
    def mixed(self) -> dict[str, Sequence[int]]:
        """Rows reached, by name of a module where these are not just the sample's own."""
        mixed: dict[str, Sequence[int]] = {name: [] for name in self.scalars}
        for site in self.mixed_sites():
            rows = next(rows for other, (axes, rows) in self.rows if other is site)
            mixed |= dict.fromkeys(site.names, rows)
        return mixed

    def mixed_sites(self) -> list[Site]:
        """Return the sites where no alternative has the sample's own rows only."""
        return [site for site in self.sites if not self._fitting(site)]

    def narrow(self) -> None:
        """Leave sites the alternatives that fit."""
        for site in self.sites:
            site.keep(self._fitting(site))

    def _fitting(self, site: Site) -> list[RowAxes]:
        (sample,) = self.samples
        wrong = {
            id(axes)
            for other, (axes, rows) in self.rows
            if other is site and Hit("", axes, rows, sample, self.n).is_mixed
        }
        return [axes for axes in site.alternatives if id(axes) not in wrong]


@dataclass(frozen=True)
class Place:
    """Where an output of the model has its samples.

    Attributes:
        axis: Their axis.
        fold: How they are folded with another one; None where each has one entry.
    """

    axis: int
    fold: Fold | None = None

    def rows(self, output: Tensor, samples: Sequence[int], n: int) -> list[int]:
        """Return the entries of some samples."""
        if self.fold is None:
            return list(samples)
        owners = self.fold.owners(n, output.shape[self.axis]).tolist()
        return [row for row, owner in enumerate(owners) if owner in samples]


Places = dict[Tensor, Place]
Slope = Callable[[Tensor, Sequence[int], int], Tensor]
"""Makes the gradient of an output that is not zero in some rows of an axis."""


class Prober:
    """Sends gradients through all Taps of a model, and through nothing else.

    Args:
        model: The root module.
        seed: A scalar that every Tap depends on.
    """

    def __init__(self, model: nn.Module, seed: Tensor) -> None:
        self._modules = list(model.modules())
        self._seed = seed
        self._shielded: list[tuple[Hooks, Hooks]] = []
        self.running: Probe | None = None
        """The probe that is running; gradients that arrive meanwhile are its alone."""

    def run_from(self, places: Places, sample: int, n: int) -> Probe:
        """Return what NaN in one sample reaches, given where outputs have their samples."""
        probe = self.send(places, (sample,), n, nan_in)
        if probe.half and sample > 0 and probe.mixed:
            # Half-precision kernels of some CPUs load the head of the next row behind the tail of
            # a row, times zero. NaN leaks to the row before; numbers do not, and row 0 has none.
            reached = probe.sites
            probe = self.send(places, (sample,), n, numbers_in)
            probe.sites |= reached
        return probe

    def send(self, places: Places, samples: tuple[int, ...], n: int, slope: Slope) -> Probe:
        """Return what gradients that start at some samples of the outputs reach."""
        return self._backward(
            Probe(samples, n),
            {
                leaf: slope(leaf, place.rows(leaf, samples, n), place.axis)
                for leaf, place in places.items()
            },
        )

    def run_from_all(self, outputs: Sequence[Tensor], n: int) -> Probe:
        """Return what gradients reach that start everywhere in some outputs."""
        ones = {leaf: torch.ones_like(leaf) for leaf in outputs}
        return self._backward(Probe((0,), n), ones) if ones else Probe((0,), n)

    def shield_hooks(self) -> None:
        """Keep the user's backward hooks from seeing probes.

        Modules take their hooks into the graph when they run; for this forward pass they get some
        that do nothing while a probe runs.
        """
        if not any_backward_hooks(self._modules):
            return
        self.restore_hooks()  # if a pass failed before
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

    def _backward(self, probe: Probe, gradients: Mapping[Tensor, Tensor]) -> Probe:
        """Run a backward pass that starts with the gradients of some outputs; return the probe."""
        self.running = probe
        try:
            with (
                reentrant_refused(),
                # What is recomputed under checkpointing may write buffers.
                buffers_kept(self._modules, by_copies=True),
                random_state_kept({leaf.device for leaf in gradients}),  # functions may draw
                torch.autograd.set_detect_anomaly(False),  # which takes NaN for a mistake
                own_mode_left(),
            ):
                start = start_of_backward(gradients, gradients.values())
                run_backward(start, self._seed)
        finally:
            self.running = None
        return probe


def nan_in(output: Tensor, rows: Sequence[int], dim: int) -> Tensor:
    """Return an output's gradient that is NaN in some rows of an axis and zero in all others."""
    index = torch.tensor(rows, device=output.device)
    return torch.zeros_like(output).index_fill_(dim, index, torch.nan)


def numbers_in(output: Tensor, rows: Sequence[int], dim: int) -> Tensor:
    """Return an output's gradient that is random in some rows of an axis, zero in all others."""
    shape = [len(rows) if axis == dim else size for axis, size in enumerate(output.shape)]
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(output)
    return torch.zeros_like(output).index_copy_(
        dim, torch.tensor(rows, device=output.device), numbers
    )


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

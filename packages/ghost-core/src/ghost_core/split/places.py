"""Where a model's outputs have their samples: on which axis, and in which order.

Sizes may allow several places, as where samples have several entries each. For 3 samples of 2:

    entries    0 1 2 3 4 5
    [N, k]     0 0 1 1 2 2    flattened
    [k, N]     0 1 2 0 1 2

Gradients that start at the entries of one sample tell: in a wrong place, these are entries of
several. A row that all entries of its sample depend on is reached from several places then, and a
layer with one row per sample is reached in other rows. A layer behind what picks rows may have as
many by chance. What was told in a proven pass holds for those after it: samples that a model begins
to mix may look as if they were apart in the other order.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghost_core._torch import tensors_in
from ghost_core.split.moves import Moves, find_moves
from ghost_core.split.owners import Fold
from ghost_core.split.probe import Kind, Place, Places, Prober, differentiable, probed_samples
from ghost_core.split.refusals import no_samples, reached_elsewhere, unclear_output
from ghost_core.split.routes import Census
from ghost_core.split.sites import Site
from ghost_core.tracking import TrackedModule


@dataclass(frozen=True)
class Outputs:
    """What a model returned in a pass.

    Attributes:
        output: What it returned.
        n: Number of samples.
        dim: Axis of the samples in its tensors.
        prober: Sends gradients through the pass.
        sites: Where gradients are told apart in it.
        tracked: The tracked modules by name.
        start: The node of the graph that all Taps lead to.
        leading: Whether samples are on the first axis of the model's inputs and of all modules.
        known: Where tensors had their samples in proven passes, by what tells them from others.
    """

    output: Any
    n: int
    dim: int
    prober: Prober
    sites: Sequence[Site]
    tracked: Mapping[str, TrackedModule]
    start: Any
    leading: bool
    known: MutableMapping[object, Place]

    def moves(self) -> Moves:
        """Return what moves rows on their way from modules to the tensors."""
        return find_moves(
            tensors_in(self.output), self.start, self.n, dim=self.dim, leading=self.leading
        )

    def places(self) -> Places:
        """Return where tensors have their samples, as far as they have them.

        Raises:
            WrongSplitError: If none has samples, or none of which it can be told where.
        """
        leaves = differentiable(self.output)
        plain = {leaf: places for leaf in leaves if (places := self._plain(leaf))}
        if plain:
            return {leaf: self._told(leaf, each) or each[0] for leaf, each in plain.items()}
        folded = {leaf: places for leaf in leaves if (places := self._folded(leaf))}
        if not folded:
            raise no_samples(self.output, leaves, self.n, self.dim)
        told = {leaf: self._told(leaf, places) for leaf, places in folded.items()}
        known = {leaf: place for leaf, place in told.items() if place is not None}
        lost = [leaf for leaf in folded if leaf not in known and self._key(leaf) in self.known]
        if lost or not known:
            raise unclear_output(leaves, self.n)
        return known

    def learn(self, places: Places) -> None:
        """Remember where tensors have their samples, once that is proven."""
        self.known.update({self._key(leaf): place for leaf, place in places.items()})

    def check_others(self, missed: set[Kind]) -> None:
        """Raise if tensors without one entry per sample reach modules that places did not.

        Args:
            missed: The modules that ran and were not reached.

        Raises:
            WrongSplitError: Naming the modules.
        """
        others = [leaf for leaf in differentiable(self.output) if not self._plain(leaf)]
        if missed and (found := missed & self.prober.run_from_all(others, self.n).reached):
            raise reached_elsewhere(self.tracked[name] for name, _ in sorted(found))

    def _key(self, leaf: Tensor) -> object:
        """Return what tells a tensor from others of a pass, and is the same in passes like it."""
        leaves = differentiable(self.output)
        return len(leaves), next(at for at, each in enumerate(leaves) if each is leaf), leaf.dim()

    def _plain(self, leaf: Tensor) -> list[Place]:
        """Return the axes of a tensor with one entry per sample, the expected one first.

        A model that is sequence-first inside may return one row per sample all the same.
        """
        return [Place(axis) for axis in self._axes(leaf) if leaf.shape[axis] == self.n]

    def _folded(self, leaf: Tensor) -> list[Place]:
        """Return the axes of a tensor with several entries per sample, in either order."""
        return [
            Place(axis, fold)
            for axis in self._axes(leaf)
            if leaf.shape[axis] and not leaf.shape[axis] % self.n
            for fold in Fold
        ]

    def _axes(self, leaf: Tensor) -> list[int]:
        return [axis for axis in dict.fromkeys((self.dim, 0)) if leaf.dim() > axis]

    def _told(self, leaf: Tensor, places: Sequence[Place]) -> Place | None:
        """Return the place of samples that probes of one tensor tell; None if it is unclear."""
        if len(places) == 1 or self.n == 1:
            return places[0]
        apart = [place for place in places if self._are_apart(leaf, place)]
        before = self.known.get(self._key(leaf))
        if not apart or (before in places and before not in apart):
            return None
        if len(apart) == 1:
            return apart[0]
        if places[0].fold is not None and self.moves().picks:
            return None
        wrong = [self._out_of_order(leaf, place) for place in apart]
        for place, sites in zip(apart, wrong, strict=True):
            if all(sites < others for others in wrong if others is not sites):
                return place
        return None

    def _are_apart(self, leaf: Tensor, place: Place) -> bool:
        """Tell whether each row belongs to one sample at most, if samples are in some place."""
        census = Census(self.prober, {leaf: place}, self.n, self.tracked)
        return census.keeps_apart(self.sites)

    def _out_of_order(self, leaf: Tensor, place: Place) -> set[Site]:
        """Return the sites with one row per sample that have others, if samples are there.

        All of them, but for rows that were moved, are in order where samples are; and no less.
        """
        probes = (self.prober.run_from({leaf: place}, at, self.n) for at in probed_samples(self.n))
        mixed = {site for probe in probes for site in probe.mixed_sites()}
        return {site for site in mixed if not any(a.is_folded(self.n) for a in site.alternatives)}

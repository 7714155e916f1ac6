"""Whose is each row of a pass: asked of every pass of a model that routes rows, as experts do.

    sites    gate    expert 0    expert 1
    rows     0..7    2 3 5 7     0 1 4 6      which sample each one comes from, the batch decides

NaN goes into the outputs of half of the samples, those whose number has a certain bit, and then
into those of the others: 2 log2(N) backward passes through the Taps. A row that one sample alone
depends on is reached in one of the two passes of every bit, and these bits spell the sample. A row
that two samples depend on is reached in both passes of some bit, and is refused. So owners are
found and proven, for all samples and for this pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghost_core.errors import WrongSplitError
from ghost_core.split.axes import RowAxes
from ghost_core.split.probe import Places, Probe, Prober, Slope, nan_in, numbers_in
from ghost_core.split.refusals import routed_wrong, scalar_output
from ghost_core.split.sites import Site
from ghost_core.tracking import TrackedModule


@dataclass
class _Spelling:
    """What the passes say of the rows of one alternative.

    Attributes:
        sample: The sample that the bits spell, int64 `[R]`.
        reached: Whether any sample reached a row.
        several: Whether several did.
    """

    sample: Tensor
    reached: Tensor
    several: Tensor

    @classmethod
    def of(cls, rows: int) -> _Spelling:
        nothing = torch.zeros(rows, dtype=torch.bool)
        return cls(torch.zeros(rows, dtype=torch.int64), nothing, nothing.clone())

    def add(self, bit: int, without: Tensor, with_it: Tensor) -> None:
        """Add the rows reached by samples without a bit and with it."""
        self.sample += with_it.long() << bit
        self.reached |= without | with_it
        self.several |= without & with_it

    @property
    def owner(self) -> Tensor:
        """Sample of each row; -1 for those that no sample reached."""
        return torch.where(self.reached, self.sample, -1)

    def wrong(self, told: Tensor | None) -> list[int]:
        """Return rows of several samples, or of another one than the engine was told."""
        wrong = self.several
        if told is not None:
            wrong = wrong | (self.reached & (self.sample != told.to(wrong.device)))
        rows: list[int] = wrong.nonzero().flatten().tolist()
        return rows


@dataclass
class Census:
    """Finds the sample of each row at all sites of one pass.

    Attributes:
        prober: Sends gradients through the graph.
        places: Where the model's outputs have their samples.
        n: Number of samples.
        tracked: The tracked modules by name.
    """

    prober: Prober
    places: Places
    n: int
    tracked: Mapping[str, TrackedModule]
    _spelt: dict[int, _Spelling] = field(default_factory=dict, init=False)

    def find(self, sites: Collection[Site]) -> Probe:
        """Tell each site whose its rows are, and return all that was reached.

        Raises:
            WrongSplitError: If rows belong to several samples.
        """
        if self.n == 1:
            for site in sites:
                site.found = torch.zeros(site.axes.count, dtype=torch.int64)
            return self.prober.run_from(self.places, 0, 1)
        whole = self._ask(sites, nan_in)
        if whole.scalars:
            raise scalar_output(self.tracked[min(whole.scalars)])
        problems = self._settle(sites)
        if problems and whole.half:  # see `Prober.run_from`
            self._spelt.clear()
            whole.sites |= self._ask(sites, numbers_in).sites
            problems = self._settle(sites) or self._mixed_with_the_first()
        if problems:
            raise problems[0]
        return whole

    def keeps_apart(self, sites: Collection[Site]) -> bool:
        """Tell whether each row belongs to one sample at most, wherever sites have theirs."""
        half = self._ask(sites, nan_in).half
        if half and not self._are_apart(sites):  # see `Prober.run_from`
            self._spelt.clear()
            self._ask(sites, numbers_in)
        return self._are_apart(sites)

    def _are_apart(self, sites: Collection[Site]) -> bool:
        return all(not all(map(self._wrong, site.everywhere)) for site in sites)

    def _mixed_with_the_first(self) -> list[WrongSplitError]:
        """Return where NaN in the first sample reaches rows of others, as behind a gate of zero."""
        probe = self.prober.send(self.places, (0,), self.n, nan_in)
        return [
            routed_wrong(self.tracked[site.names[0]], rows)
            for site, (axes, rows) in probe.rows
            if axes is site.axes and site.found is not None and (site.found[rows] != 0).any()
        ]

    def _ask(self, sites: Collection[Site], slope: Slope) -> Probe:
        """Run the passes, and return one probe with all sites that they reached."""
        whole = Probe((), self.n)
        for bit in range((self.n - 1).bit_length()):
            without, with_it = (
                self.prober.send(self.places, self._samples(bit, side), self.n, slope)
                for side in (0, 1)
            )
            for each in (without, with_it):
                whole.sites |= each.sites
                whole.scalars |= each.scalars
                whole.half |= each.half
            before, after = _reached(without), _reached(with_it)
            for site in sites:
                for axes in site.everywhere:
                    spelt = self._spelt.setdefault(id(axes), _Spelling.of(axes.count))
                    nothing = torch.zeros(axes.count, dtype=torch.bool)
                    spelt.add(bit, before.get(id(axes), nothing), after.get(id(axes), nothing))
        return whole

    def _samples(self, bit: int, side: int) -> tuple[int, ...]:
        return tuple(sample for sample in range(self.n) if sample >> bit & 1 == side)

    def _settle(self, sites: Collection[Site]) -> list[WrongSplitError]:
        """Take the first alternative without wrong rows, and return what is wrong elsewhere."""
        problems: list[WrongSplitError] = []
        for site in sites:
            fitting = [axes for axes in site.alternatives if not self._wrong(axes)]
            if fitting:
                site.keep(fitting[:1])
                site.found = self._spelt[id(site.axes)].owner
            elif site.refusal is not None:
                problems.insert(0, site.refusal)
            else:
                problems.append(routed_wrong(self.tracked[site.names[0]], self._wrong(site.axes)))
        return problems

    def _wrong(self, axes: RowAxes) -> Sequence[int]:
        return self._spelt[id(axes)].wrong(axes.owner)


def _reached(probe: Probe) -> dict[int, Tensor]:
    """Return the rows that a probe reached, bool `[R]`, by identity of an alternative's axes."""
    found: dict[int, Tensor] = {}
    for _, (axes, rows) in probe.rows:
        hit = found.setdefault(id(axes), torch.zeros(axes.count, dtype=torch.bool))
        hit[torch.tensor(rows)] = True
    return found

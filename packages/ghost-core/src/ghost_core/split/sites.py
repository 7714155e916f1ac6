"""Where gradients are told apart by sample in a pass: a module's call, or where samples are met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ghost_core.errors import WrongSplitError
from ghost_core.split.axes import RowAxes
from ghost_core.split.lifts import Lift

Rows = tuple[RowAxes, Sequence[int]]
"""Rows that a gradient reached, if they are where these axes say."""


@dataclass(eq=False)
class Site:
    """A place in one pass where a Tap stands.

    In a pass of 4 samples:

        linear(x)        a call, rows on axis 0: one alternative
        pos + x          samples are met in `add`, of 4 positions: rows on axis 0 or 1
        expert(x[idx])   a call with 5 rows: routed, and `found` says 2 0 3 3 1

    Attributes:
        names: The modules whose parameters it is about.
        operation: The operation whose result it is; empty for a module's call.
        alternatives: Where the rows may be, the likeliest first. Probes leave those that fit.
        refusal: What to say where none does; None for what probes say of all.
        spare: Where they may be besides, if rows turn out to be routed.
        place: Which of the module's sites it is in a pass, for those of operations.
        lifts: The calls that it is about, where it may turn out that they run again; none, if
            gradients are told apart here in any case.
        probed: Whether a probe reached it.
        found: Sample of each row as found for this pass alone, int64 `[R]`, -1 where no sample
            reached it; None where nobody had to look.
    """

    names: tuple[str, ...]
    operation: str
    alternatives: list[RowAxes]
    refusal: WrongSplitError | None = None
    spare: Sequence[RowAxes] = ()
    place: object = None
    lifts: tuple[Lift, ...] = ()
    probed: bool = False
    found: Tensor | None = None

    @property
    def counts(self) -> bool:
        """Whether gradients are told apart here."""
        return not self.lifts or not all(lift.given_up for lift in self.lifts)

    @property
    def axes(self) -> RowAxes:
        """Where the rows are, as far as is known."""
        return self.alternatives[0]

    def kinds(self, n: int) -> set[tuple[str, bool]]:
        """Return the modules, with whether rows are folded: what a verification holds for."""
        folded = self.found is None and self.alternatives[0].is_folded(n)
        if len(self.names) == 1:  # as nearly all have; it is asked of each call in each pass
            return {(self.names[0], folded)}
        return {(name, folded) for name in self.names}

    @property
    def everywhere(self) -> list[RowAxes]:
        """All places where the rows may be."""
        return [*self.alternatives, *self.spare]

    def spread_out(self) -> None:
        """Take all places into account where rows may be."""
        self.alternatives, self.spare = self.everywhere, ()

    def keep(self, fitting: Sequence[RowAxes]) -> None:
        """Keep the alternatives that fit, unless none does."""
        left = [each for each in self.alternatives if any(each is other for other in fitting)]
        self.alternatives = left or self.alternatives

    def reached(self, grads: Sequence[Tensor | None]) -> list[Rows]:
        """Return the rows of gradients that are not zero, for each place where they may be."""
        return [
            (axes, rows)
            for axes in self.everywhere
            for grad in axes.rows_first(grads)
            if grad is not None and grad.dim() and (rows := _rows_of(grad))
        ]


def are_told(sites: Iterable[Site]) -> bool:
    """Tell whether it was told whose each row is, so that no graph has to show it."""
    return all(axes.owner is not None for site in sites for axes in site.everywhere)


def _rows_of(grad: Tensor) -> list[int]:
    """Return the rows that are not zero; NaN is not."""
    if not grad.numel():
        return []
    # The largest of a row is NaN if any entry is, and takes an eighth of looking at each.
    largest = grad.abs().amax(tuple(range(1, grad.dim()))) if grad.dim() > 1 else grad
    rows: list[int] = (largest != 0).nonzero().flatten().tolist()
    return rows


class KnownAxes:
    """Remembers where rows were in passes that were proven, by what happened in them.

    A value `[T, N, d]` does not tell where its samples are once T = N; that an earlier pass did
    the same, operation by operation, does.
    """

    def __init__(self) -> None:
        self._known: dict[object, list[tuple[tuple[int, ...], bool]]] = {}

    def learn(self, sites: Sequence[Site], n: int) -> None:
        """Remember a proven pass."""
        if any(site.operation for site in sites):
            self._known[_course(sites)] = [_where(site.axes, n) for site in sites]

    def recall(self, sites: Sequence[Site], n: int) -> bool:
        """Choose among alternatives as in a pass before; tell whether nothing is left to choose."""
        for site in sites:
            if len(site.alternatives) != 1:
                break
        else:
            return True
        known = self._known.get(_course(sites))
        if known is None:
            return False
        for site, where in zip(sites, known, strict=True):
            fitting = [each for each in site.alternatives if _where(each, n) == where]
            if not fitting:
                return False
            site.keep(fitting)
        return True


def _course(sites: Sequence[Site]) -> object:
    return tuple((site.names, site.operation) for site in sites)


def _where(axes: RowAxes, n: int) -> tuple[tuple[int, ...], bool]:
    return axes.outputs, axes.is_folded(n)

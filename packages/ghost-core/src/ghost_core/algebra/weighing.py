"""Gradients whose sum and norms are wanted besides what an engine reduces them to.

To build the gradients of samples gives dots, norms and the sum for little more than one of them. So
where the sum is compared with the gradient that autograd makes, it comes from the engine's own
reduction, if the engine reduces at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from ghost_core.algebra.dense import Dense
from ghost_core.algebra.gradients import PerSampleGradient
from ghost_core.algebra.outer import Outer
from ghost_core.algebra.owned import Owned
from ghost_core.algebra.reduced import Reduced


class _Weighed(PerSampleGradient):
    """What a reduction leaves besides: its sum and norms, for `weight_of` to take."""

    left: list[Reduced]

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        """Reduce to what is asked for, and the first time to the sum and to norms as well."""
        if self.left or directions is None:
            return super().reduce(directions, norms=norms, total=total)
        found = super().reduce(directions, norms=True, total=True)
        own = found.total.clone() if total and found.total is not None else found.total
        self.left.append(Reduced(own, None, found.squared_norms))
        return Reduced(
            found.total if total else None, found.dots, found.squared_norms if norms else None
        )


@dataclass(frozen=True)
class _WeighedOuter(_Weighed, Outer):
    left: list[Reduced] = field(default_factory=list, repr=False, compare=False)


@dataclass(frozen=True)
class _WeighedDense(_Weighed, Dense):
    left: list[Reduced] = field(default_factory=list, repr=False, compare=False)


def weighed(gradient: PerSampleGradient) -> PerSampleGradient:
    """Return a gradient that takes its sum and norms along where it is reduced to dots.

    Args:
        gradient: The gradient; of a type that cannot or need not, it stays as it is.
    """
    kind = type(gradient)  # a subclass of someone else's may reduce in its own way
    if isinstance(gradient, Owned) and kind is Owned:
        return replace(gradient, rows=weighed(gradient.rows))
    if isinstance(gradient, Outer) and kind is Outer:
        return _WeighedOuter(gradient.factor, gradient.grad, gradient.shape)
    if isinstance(gradient, Dense) and kind is Dense:
        # Of one term, nothing is built that could be taken along.
        return gradient if gradient.terms.shape[1] == 1 else _WeighedDense(gradient.terms)
    return gradient


def weight_of(gradient: PerSampleGradient) -> Reduced:
    """Return the sum and the squared norms of a gradient; those of rows, where samples own some.

    What was taken along is given out once, so that nothing of it is kept with the gradient.
    """
    each = gradient.rows if isinstance(gradient, Owned) else gradient
    if isinstance(each, _Weighed) and each.left:
        return each.left.pop()
    return each.reduce(norms=True, total=True)

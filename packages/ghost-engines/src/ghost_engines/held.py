"""Per-sample gradients held until a batch ends, for whatever needs all uses of a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor

from ghost_core import (
    CaptureError,
    Dense,
    Outer,
    Owned,
    Pass,
    PerSampleGradient,
    TrackedParameter,
    accumulation_dtype,
    full_precision,
)


@dataclass(frozen=True)
class _Factors:
    """A gradient as it arrived, its tensors, and the versions that these had then."""

    gradient: PerSampleGradient
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    squared: Tensor | None = None
    """Squared norms `[N]`, if they were taken when it arrived."""

    @classmethod
    def of(cls, gradient: PerSampleGradient, squared: Tensor | None = None) -> _Factors | None:
        """Take a gradient apart; None if it is not made of factors."""
        tensors = _tensors(gradient)
        if not tensors:
            return None
        return cls(gradient, tensors, tuple(tensor._version for tensor in tensors), squared)

    @property
    def overwritten(self) -> bool:
        """Whether a tensor has another value than on arrival."""
        return tuple(tensor._version for tensor in self.tensors) != self.versions

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def copy(self) -> _Factors:
        """Return the same with memory of its own."""
        copied = _Factors.of(_copied(self.gradient), self.squared)
        assert copied is not None
        return copied


def _tensors(gradient: PerSampleGradient) -> tuple[Tensor, ...]:
    """Return the tensors of factors; none where a gradient is of another kind."""
    if isinstance(gradient, Outer):
        return (*gradient.factor.tensors().values(), gradient.grad)
    if isinstance(gradient, Owned) and isinstance(gradient.rows, Outer):
        return (*_tensors(gradient.rows), gradient.owner)
    return ()


def _copied(gradient: PerSampleGradient) -> PerSampleGradient:
    if isinstance(gradient, Owned):
        return Owned(_copied(gradient.rows), gradient.owner.clone(), gradient.samples)
    assert isinstance(gradient, Outer)
    tensors = {name: tensor.clone() for name, tensor in gradient.factor.tensors().items()}
    return Outer(gradient.factor.replace(**tensors), gradient.grad.clone(), gradient.shape)


class _Uses:
    """The gradient of one parameter for some rows of a batch: the sum of its uses.

    Factors are held as they arrive, as long as they take less memory than the sum itself; then
    multiplying all pairs of them takes less work as well.
    """

    def __init__(self, parameter: TrackedParameter, rows: slice) -> None:
        self.rows = rows
        self._parameter = parameter
        self._factors: list[_Factors] = []
        self._built: Tensor | None = None

    def add(self, gradient: PerSampleGradient, squared: Tensor | None) -> None:
        """Add a use, with its squared norms if they are known."""
        waiting = [*self._checked(), gradient]
        factors = _Factors.of(gradient, squared)
        if factors is not None and self._built is None:
            self._factors.append(factors)
            itemsize = accumulation_dtype(*factors.tensors).itemsize
            built = gradient.n * gradient.shape.numel() * itemsize
            if sum(each.size for each in self._factors) <= built:
                return
        self._factors.clear()
        for each in waiting:
            sum_of_tokens = each.materialize()
            self._built = sum_of_tokens if self._built is None else self._built + sum_of_tokens

    def summands(self) -> list[PerSampleGradient]:
        """Return gradients that add up to that of the parameter.

        Raises:
            CaptureError: If a tensor was overwritten since it arrived.
        """
        if self._built is not None:
            return [Dense(self._built.unsqueeze(1))]
        return self._checked()

    def squared_norms(self) -> Tensor:
        """Return squared norms of the sum, `[N]`.

        Raises:
            CaptureError: If a tensor was overwritten since it arrived.
        """
        known = [None] if self._built is not None else [each.squared for each in self._factors]
        terms = list(zip(self.summands(), known, strict=True))
        parts = [one.paired(one) if squared is None else squared for one, squared in terms]
        parts += [2 * one.paired(other) for (one, _), (other, _) in combinations(terms, 2)]
        return torch.stack(parts).sum(0)

    def copy(self) -> _Uses:
        """Return the same with memory of its own."""
        self._checked()
        copied = _Uses(self._parameter, self.rows)
        copied._factors = [factors.copy() for factors in self._factors]
        copied._built = self._built  # nobody else has it
        return copied

    def _checked(self) -> list[PerSampleGradient]:
        for factors in self._factors:
            if factors.overwritten:
                raise CaptureError(
                    f"an input or gradient of the module that owns {self._parameter.name} was "
                    "overwritten before its batch was closed, and is needed until then: give each "
                    "pass tensors of its own, or open a batch for each micro-batch"
                )
        return [factors.gradient for factors in self._factors]


class HeldGradients:
    """The per-sample gradients of a batch, parameter by parameter.

    Norms and inner products of a sum need all pairs of its terms. So the gradients of all uses are
    held until the last of them is there, in factors or built, whichever takes less memory.

    Args:
        parameters: The tracked parameters.
    """

    def __init__(self, parameters: Iterable[TrackedParameter]) -> None:
        self._parameters = tuple(parameters)
        self._uses: dict[str, dict[tuple[int, int], _Uses]] = {
            parameter.name: {} for parameter in self._parameters
        }

    def add(
        self,
        pass_: Pass,
        parameter: TrackedParameter,
        gradient: PerSampleGradient,
        squared: Tensor | None = None,
    ) -> None:
        """Hold the gradients of one use of a parameter.

        Args:
            pass_: The pass; passes cover the same rows of the batch, or none in common.
            parameter: The parameter.
            gradient: The gradients of the pass's samples.
            squared: Their squared norms `[N]`, where they were taken already.
        """
        rows = pass_.samples
        by_rows = self._uses[parameter.name]
        by_rows.setdefault((rows.start, rows.stop), _Uses(parameter, rows)).add(gradient, squared)

    def sum(self) -> dict[str, Tensor]:
        """Return `Σ_n g_n` by parameter, of its shape.

        Raises:
            CaptureError: If an input was overwritten meanwhile.
        """
        return {parameter.name: self._sum(parameter) for parameter in self._parameters}

    def dot(self, directions: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """Return `⟨v_k, g_n⟩` by parameter, `[N, K]`, for a batch of n samples.

        Args:
            directions: The directions v, `[K, *shape]` by parameter name; others are left out.
            n: Number of samples N.

        Raises:
            CaptureError: If an input was overwritten meanwhile.
        """
        return {
            parameter.name: self._dot(parameter, directions[parameter.name], n)
            for parameter in self._parameters
            if parameter.name in directions
        }

    def squared_norms(self, n: int) -> dict[str, Tensor]:
        """Return `‖g_n‖²` by parameter, `[N]`, for a batch of n samples.

        Raises:
            CaptureError: If an input was overwritten meanwhile.
        """
        return {parameter.name: self._squared_norms(parameter, n) for parameter in self._parameters}

    def gram(self, n: int) -> dict[str, Tensor]:
        """Return `⟨g_n, g_m⟩` by parameter, `[N, N]`, for a batch of n samples.

        Raises:
            CaptureError: If an input was overwritten meanwhile.
        """
        return {parameter.name: self._gram(parameter, n) for parameter in self._parameters}

    def gram_with(self, other: HeldGradients, n: int, m: int) -> dict[str, Tensor]:
        """Return `⟨g_n, h_m⟩` by parameter, `[N, M]`, with the gradients of another batch.

        Args:
            other: The gradients h of the other batch, for the same parameters.
            n: Number of samples N of this batch.
            m: Number of samples M of the other.

        Raises:
            CaptureError: If an input was overwritten meanwhile.
        """
        return {
            parameter.name: self._gram_with(other, parameter, n, m)
            for parameter in self._parameters
        }

    def copy(self) -> HeldGradients:
        """Return the same with memory of its own, to be kept for longer than the batch.

        Raises:
            CaptureError: If an input was overwritten meanwhile.
        """
        copied = HeldGradients(self._parameters)
        copied._uses = {
            parameter: {rows: uses.copy() for rows, uses in by_rows.items()}
            for parameter, by_rows in self._uses.items()
        }
        return copied

    def _sum(self, parameter: TrackedParameter) -> Tensor:
        total = _zeros(parameter, *parameter.shape)
        with full_precision(parameter.device):
            for _, gradient in self._parts(parameter):
                total += gradient.sum()
        return total

    def _dot(self, parameter: TrackedParameter, directions: Tensor, n: int) -> Tensor:
        dots = _zeros(parameter, n, len(directions))
        with full_precision(parameter.device):
            for rows, gradient in self._parts(parameter):
                dots[rows] += gradient.dot(directions)
        return dots

    def _squared_norms(self, parameter: TrackedParameter, n: int) -> Tensor:
        squared = _zeros(parameter, n)
        with full_precision(parameter.device):
            for uses in self._uses[parameter.name].values():
                squared[uses.rows] += uses.squared_norms()
        # Rounding may leave a little less than zero. NaN stays.
        return squared.clamp(min=0)

    def _gram(self, parameter: TrackedParameter, n: int) -> Tensor:
        gram = _zeros(parameter, n, n)
        with full_precision(parameter.device):
            for one, other in combinations_with_replacement(list(self._parts(parameter)), 2):
                (rows, gradient), (others, other_gradient) = one, other
                block = gradient.gram(other_gradient)
                gram[rows, others] += block
                if one is not other:
                    gram[others, rows] += block.mT
        return gram

    def _gram_with(
        self, other: HeldGradients, parameter: TrackedParameter, n: int, m: int
    ) -> Tensor:
        gram = _zeros(parameter, n, m)
        with full_precision(parameter.device):
            for rows, gradient in self._parts(parameter):
                for others, other_gradient in other._parts(parameter):
                    gram[rows, others] += gradient.gram(other_gradient)
        return gram

    def _parts(self, parameter: TrackedParameter) -> Iterator[tuple[slice, PerSampleGradient]]:
        for uses in self._uses[parameter.name].values():
            for gradient in uses.summands():
                yield uses.rows, gradient


def _zeros(parameter: TrackedParameter, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=accumulation_dtype(parameter.dtype), device=parameter.device)

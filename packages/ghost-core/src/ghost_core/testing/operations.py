"""Compares every operation on per-sample gradients with the gradients themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import methodcaller

import torch
from torch import Generator, Size, Tensor

from ghost_core.algebra import PerSampleGradient, gram_of_uses, matrix_shape, paired_of_uses
from ghost_core.errors import WrongSplitError
from ghost_core.testing.oracle import assert_within, norms, per_row


@dataclass(frozen=True)
class Gradients:
    """Per-sample gradients of one parameter, and what they should be.

    Attributes:
        uses: One entry for each use of the parameter; their sum is what should be expected.
        expected: Float64 `[N, *shape]`.
        scale: What errors are relative to, `[N]`; by default the norms of what is expected.
    """

    uses: Sequence[PerSampleGradient]
    expected: Tensor
    scale: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.expected.shape[0]

    @property
    def shape(self) -> Size:
        """Shape of the parameter."""
        return self.expected.shape[1:]

    @property
    def matrices(self) -> Tensor:
        """The expected gradients as matrices, `[N, shape[0], prod(shape[1:])]`."""
        return self.expected.reshape(self.n, *matrix_shape(self.shape))

    @property
    def norms(self) -> Tensor:
        """What errors are relative to, `[N]`."""
        return norms(self.expected) if self.scale is None else self.scale

    @property
    def flat(self) -> Tensor:
        """The expected gradients as vectors, `[N, prod(shape)]`."""
        return self.expected.reshape(self.n, self.shape.numel())


def check_operations(
    gradients: Gradients,
    others: Gradients,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    what: str = "gradients",
) -> None:
    """Assert that every operation on per-sample gradients agrees with the gradients themselves.

    Args:
        gradients: The gradients of N samples.
        others: The gradients of another batch, of M samples, for the same parameter.
        dtype: Of directions, projections, weights and results; float32 or float64.
        tolerance: Error allowed relative to the norms of what is multiplied.
        what: The parameter, for messages.

    Raises:
        AssertionError: Naming parameter, operation, worst entry, error and bound.
    """
    check = _Checker(gradients, dtype, tolerance, what, Generator().manual_seed(0))
    check.materialize()
    check.dots()
    check.sums()
    check.narrowed()
    check.pairs()
    check.reductions()
    check.grams("itself", gradients)
    check.grams("another batch", others)
    check.projections()


def draw_projections(
    shape: Size, dtype: torch.dtype, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Draw maps for both axes of a parameter as a matrix, `[k, rows]` and `[k', columns]`."""
    rows, columns = matrix_shape(shape)
    left = torch.randn(min(2, rows), rows, dtype=torch.float64, generator=generator)
    right = torch.randn(min(3, columns), columns, dtype=torch.float64, generator=generator)
    return left.to(dtype), right.to(dtype)


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn exceptions inside into assertions that say where they came from."""
    try:
        yield
    except (AssertionError, WrongSplitError):
        raise
    except Exception as error:  # a sampler under test may fail in any way at all
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@dataclass
class _Checker:
    gradients: Gradients
    dtype: torch.dtype
    tolerance: float
    what: str
    generator: Generator

    def materialize(self) -> None:
        expected = self.gradients.expected
        scale = per_row(self.gradients.norms, expected)
        self._compare("materialize", methodcaller("materialize"), expected, scale)

    def dots(self) -> None:
        flat, scale = self.gradients.flat, self.gradients.norms
        for k in (1, 3):
            directions = self._draw(k, *self.gradients.shape)
            vectors = directions.double().reshape(k, flat.shape[1])
            expected, scales = flat @ vectors.mT, scale[:, None] * norms(vectors)
            self._compare(f"dot, K={k}", methodcaller("dot", directions), expected, scales)
            token_dot = partial(self._token_dot, directions)
            self._compare(f"token_dot summed over tokens, K={k}", token_dot, expected, scales)

    def sums(self) -> None:
        flat, scale = self.gradients.flat, self.gradients.norms
        weights, shape = self._draw(self.gradients.n), self.gradients.shape
        self._compare("sum", methodcaller("sum"), flat.sum(0).reshape(shape), scale.sum())
        expected = (weights.double() @ flat).reshape(shape)
        scale = weights.double().abs() @ scale
        self._compare("sum with weights", methodcaller("sum", weights), expected, scale)

    def narrowed(self) -> None:
        for part in (slice(1, None), slice(0, 1)):
            rows, scale = self.gradients.expected[part], self.gradients.norms[part]
            what = f"materialize after narrow({part.start}, {part.stop})"
            self._compare(what, partial(_narrowed, part), rows, per_row(scale, rows))

    def pairs(self) -> None:
        squared, scale = norms(self.gradients.flat) ** 2, self.gradients.norms**2
        uses = self.gradients.uses
        got = self._run("paired", partial(paired_of_uses, uses, uses))
        self._assert("paired", got, squared, scale)

    def reductions(self) -> None:
        """Compare what comes in one go, in the ways that engines ask for it."""
        flat, scale = self.gradients.flat, self.gradients.norms
        for k, norms_too, total in ((1, True, True), (3, False, True), (2, True, False)):
            directions = self._draw(k, *self.gradients.shape)
            vectors = directions.double().reshape(k, flat.shape[1])
            what = f"reduce, K={k}, norms={norms_too}, total={total}"
            with failing_as(f"{self.what}, {what}"), torch.no_grad():
                found = [
                    use.reduce(directions, norms=norms_too, total=total)
                    for use in self.gradients.uses
                ]
            scales = scale[:, None] * norms(vectors)
            self._assert_each(f"dots of {what}", [r.dots for r in found], flat @ vectors.mT, scales)
            if total:
                whole = flat.sum(0).reshape(self.gradients.shape)
                self._assert_each(f"sum of {what}", [r.total for r in found], whole, scale.sum())
            if norms_too and len(found) == 1:
                squares, single = norms(flat) ** 2, [r.squared_norms for r in found]
                self._assert_each(f"norms of {what}", single, squares, scale**2)
            if any((r.total is None) is total for r in found) or any(
                (r.squared_norms is None) is norms_too for r in found
            ):
                raise AssertionError(f"{self.what}, {what}: something else than asked for came")

    def grams(self, whom: str, others: Gradients) -> None:
        mine, theirs = self.gradients, others
        expected = mine.flat @ theirs.flat.mT
        scale = mine.norms[:, None] * theirs.norms
        what = f"gram with {whom}"
        got = self._run(what, partial(gram_of_uses, mine.uses, theirs.uses))
        self._assert(what, got, expected, scale)
        what = f"gram of {whom} with this"
        got = self._run(what, partial(gram_of_uses, theirs.uses, mine.uses))
        self._assert(what, got, expected.mT, scale.mT)

    def projections(self) -> None:
        left, right = draw_projections(self.gradients.shape, self.dtype, self.generator)
        matrices, scale = self.gradients.matrices, self.gradients.norms
        for p, q in ((left, right), (left, None), (None, right), (None, None)):
            expected, scales = project(matrices, scale, p, q)
            names = f"{'left' if p is not None else None}, {'right' if q is not None else None}"
            self._compare(f"project({names})", methodcaller("project", p, q), expected, scales)

    def _token_dot(self, directions: Tensor, use: PerSampleGradient) -> Tensor:
        dots = use.token_dot(directions)
        if dots.dim() != 3 or dots.shape[::2] != (self.gradients.n, len(directions)):
            raise AssertionError(
                f"{self.what}, token_dot: shape {tuple(dots.shape)}, expected "
                f"[{self.gradients.n}, T, {len(directions)}]"
            )
        return dots.sum(1)

    def _compare(
        self,
        operation: str,
        function: Callable[[PerSampleGradient], Tensor],
        expected: Tensor,
        scale: Tensor,
    ) -> None:
        """Compare the sum over uses; dtypes are checked use by use."""
        got = [self._run(operation, partial(function, use)) for use in self.gradients.uses]
        for value in got:
            if value.shape != expected.shape:
                self._assert(operation, value, expected, scale)
        self._assert(operation, torch.stack(got).sum(0), expected, scale)

    def _run(self, operation: str, function: Callable[[], Tensor]) -> Tensor:
        with failing_as(f"{self.what}, {operation}"), torch.no_grad():
            got = function()
        if got.dtype != self.dtype:
            raise AssertionError(
                f"{self.what}, {operation}: dtype {got.dtype}, expected {self.dtype}"
            )
        return got

    def _assert_each(
        self,
        operation: str,
        found: Sequence[Tensor | None],
        expected: Tensor,
        scale: Tensor,
    ) -> None:
        """Compare the sum over uses of what may be missing."""
        if any(value is None for value in found):
            raise AssertionError(f"{self.what}, {operation}: missing")
        there = [value for value in found if value is not None]
        for value in there:
            if value.dtype != self.dtype:
                raise AssertionError(
                    f"{self.what}, {operation}: dtype {value.dtype}, expected {self.dtype}"
                )
        self._assert(operation, torch.stack(there).sum(0), expected, scale)

    def _assert(self, operation: str, got: Tensor, expected: Tensor, scale: Tensor) -> None:
        assert_within(got, expected, scale, self.tolerance, f"{self.what}, {operation}")

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return drawn.to(self.dtype)


def project(
    matrices: Tensor, scale: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `L g_n Rᵀ` and what its error is relative to; `matrices` is `[N, rows, columns]`."""
    expected = matrices
    if left is not None:
        expected = left.double() @ expected
        scale = scale * torch.linalg.matrix_norm(left.double(), 2)
    if right is not None:
        expected = expected @ right.double().mT
        scale = scale * torch.linalg.matrix_norm(right.double(), 2)
    return expected, scale[:, None, None]


def _narrowed(samples: slice, use: PerSampleGradient) -> Tensor:
    return use.narrow(samples).materialize()

"""The algebra against gradients that are built entry by entry."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ghost_core.algebra.gradients
import ghost_core.algebra.outer
from ghost_core import Dense, Lookups, Outer, PerSampleGradient, Tokens
from ghost_core.algebra import building_at_most, chunks, gram_of_uses, matrix_shape, paired_of_uses
from ghost_core.algebra.numerics import at_once
from ghost_core.testing import Gradients, assert_within, check_operations

N, M = 4, 3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tokens(n: int, t: int, d: int, p: int, g: int = 1, shape: tuple[int, ...] = ()) -> Outer:
    return Outer(Tokens(random(n, t, g, d)), random(n, t, g, p), Size(shape or (g * p, d)))


def transposed(n: int, t: int, d: int, p: int) -> Outer:
    return Outer(Tokens(random(n, t, 1, d), True), random(n, t, 1, p), Size((d, p)))


def channels_first(n: int, t: int, d: int, p: int, g: int) -> Outer:
    grad = random(n, g, p, t).permute(0, 3, 1, 2)  # as that of a convolution lies in memory
    return Outer(Tokens(random(n, t, g, d)), grad, Size((g * p, d)))


def rows(n: int, t: int, size: int, p: int, weighted: bool = False) -> Outer:
    index = torch.randint(0, size, (n, t))
    weight = (torch.rand(n, t) > 0.4).double() if weighted else None
    return Outer(Lookups(index, size, weight), random(n, t, 1, p), Size((size, p)))


def dense(n: int, t: int, *shape: int) -> Dense:
    return Dense(random(n, t, *shape))


# Sizes make each operation take both of its routes, by tokens and through built gradients.
CASES: dict[str, Callable[[int], PerSampleGradient]] = {
    "one token": lambda n: tokens(n, 1, 5, 6),
    "few tokens": lambda n: tokens(n, 2, 5, 6),
    "many tokens": lambda n: tokens(n, 40, 2, 3),
    "one unit": lambda n: tokens(n, 3, 4, 1),
    "groups": lambda n: tokens(n, 2, 5, 3, g=2),
    "groups, many tokens": lambda n: tokens(n, 30, 2, 2, g=3),
    "channels first": lambda n: channels_first(n, 4, 3, 5, g=2),
    "kernel": lambda n: tokens(n, 3, 8, 4, shape=(4, 2, 2, 2)),
    "kernel, more outputs": lambda n: tokens(n, 3, 4, 7, shape=(7, 1, 2, 2)),
    "more outputs, transposed": lambda n: transposed(n, 3, 4, 7),
    "grouped kernel": lambda n: tokens(n, 3, 8, 2, g=2, shape=(4, 2, 2, 2)),
    "transposed": lambda n: transposed(n, 2, 5, 6),
    "transposed, many tokens": lambda n: transposed(n, 40, 2, 3),
    "rows": lambda n: rows(n, 3, 7, 4),
    "rows with duplicates": lambda n: rows(n, 20, 2, 3),
    "rows with padding": lambda n: rows(n, 6, 5, 4, weighted=True),
    "rows of a long table, with padding": lambda n: rows(n, 6, 9, 4, weighted=True),
    "dense": lambda n: dense(n, 1, 3, 4),
    "dense, many terms": lambda n: dense(n, 5, 3, 4),
    "vector": lambda n: dense(n, 4, 6),
    "kernel, dense": lambda n: dense(n, 2, 3, 2, 2),
    "scalar": lambda n: dense(n, 2),
}


def built(gradient: PerSampleGradient) -> Tensor:
    """Build gradients entry by entry."""
    result = torch.zeros(gradient.n, *gradient.shape, dtype=torch.float64)
    if isinstance(gradient, Dense):
        for n in range(gradient.n):
            for term in gradient.terms[n]:
                result[n] += term
        return result
    assert isinstance(gradient, Outer)
    factor, grad = gradient.factor, gradient.grad.double()
    n, t, groups, p = grad.shape
    for sample in range(n):
        for token in range(t):
            if isinstance(factor, Lookups):
                weight = 1 if factor.weight is None else factor.weight[sample, token]
                row = factor.index[sample, token]
                result[sample, row] += weight * grad[sample, token, 0]
                continue
            for group in range(groups):
                a, b = factor.dense()[sample, token, group].double(), grad[sample, token, group]
                if factor.transposed:
                    result[sample] += a[:, None] * b
                else:
                    block = (b[:, None] * a).reshape(p, *gradient.shape[1:])
                    result[sample, group * p : (group + 1) * p] += block
    return result


def of(*uses: PerSampleGradient) -> Gradients:
    return Gradients(uses, torch.stack([built(use) for use in uses]).sum(0))


@pytest.mark.parametrize("case", CASES)
def test_every_operation_is_that_of_the_gradients(case: str) -> None:
    make = CASES[case]
    check_operations(of(make(N)), of(make(M)), what=case)


@pytest.mark.parametrize("few", [0, ghost_core.algebra.outer.FEW])
@pytest.mark.parametrize("case", CASES)
def test_every_operation_adds_up_over_uses(
    case: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ghost_core.algebra.outer, "FEW", few)
    make = CASES[case]
    check_operations(of(make(N), make(N)), of(make(M), make(M), make(M)), what=case)


@pytest.mark.parametrize("case", CASES)
def test_chunks_do_not_change_results(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ghost_core.algebra.gradients, ghost_core.algebra.outer):
        monkeypatch.setattr(module, "chunks", partial(chunks, limit=1))
    monkeypatch.setattr(ghost_core.algebra.outer, "at_once", partial(at_once, limit=1))
    for name, most in {"ALONE": 1, "AT_ONCE": 1, "FEW": 0}.items():
        monkeypatch.setattr(ghost_core.algebra.outer, name, most)
    make = CASES[case]
    check_operations(of(make(N)), of(make(M)), what=case)


@pytest.mark.parametrize("case", ["few tokens", "channels first", "rows with padding"])
def test_each_sample_is_multiplied_with_its_own(case: str) -> None:
    gradient = CASES[case](N)
    direction = random(1, *gradient.shape)
    each = built(gradient).flatten(1)
    expected, scale = each @ direction.flatten(), each.norm(dim=1) * direction.norm()
    assert_within(gradient.dot(direction)[:, 0], expected, scale)


@pytest.mark.parametrize("make", [transposed, tokens])
def test_a_sum_lies_in_memory_as_the_parameter(make: Callable[..., Outer]) -> None:
    assert make(N, 3, 5, 6).sum().is_contiguous()


def test_no_samples_have_no_dots() -> None:
    assert tokens(0, 2, 5, 6).dot(random(1, 6, 5)).shape == (0, 1)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_one_sample_and_none_are_batches_too(case: str, n: int) -> None:
    make = CASES[case]
    check_operations(of(make(n)), of(make(M)), what=case)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    t=st.integers(1, 12),
    s=st.integers(1, 12),
    d=st.integers(1, 6),
    p=st.integers(1, 6),
    g=st.integers(1, 3),
)
def test_every_operation_for_any_shape(
    n: int, m: int, t: int, s: int, d: int, p: int, g: int
) -> None:
    check_operations(of(tokens(n, t, d, p, g)), of(tokens(m, s, d, p, g)))


@pytest.mark.parametrize("tokens_of_head", [1, 3, 30])
def test_a_tied_head_and_embedding_have_a_cross_term(tokens_of_head: int) -> None:
    def tied(n: int) -> Gradients:
        head = tokens(n, tokens_of_head, 4, 7)
        return of(head, rows(n, 5, 7, 4, weighted=True), rows(n, 2, 7, 4))

    gradients, others = tied(N), tied(M)
    check_operations(gradients, others, what="tied")
    without = sum(use.paired(use) for use in gradients.uses)
    assert not torch.allclose(without, paired_of_uses(gradients.uses, gradients.uses))


def test_a_transposed_use_meets_one_that_is_not() -> None:
    def uses(n: int) -> Gradients:
        return of(tokens(n, 2, 5, 6), transposed(n, 3, 6, 5), dense(n, 2, 6, 5))

    check_operations(uses(N), uses(M))


def test_uses_with_other_groups_meet() -> None:
    def uses(n: int) -> Gradients:
        return of(tokens(n, 2, 5, 6), tokens(n, 2, 5, 3, g=2))

    check_operations(uses(N), uses(M))


def test_grams_of_uses_have_all_cross_terms() -> None:
    left, right = of(tokens(N, 2, 3, 4), tokens(N, 3, 3, 4)), of(tokens(M, 2, 3, 4))
    expected = left.flat @ right.flat.mT
    torch.testing.assert_close(gram_of_uses(left.uses, right.uses), expected)


@pytest.mark.parametrize(("t", "d", "p"), [(3, 20, 20), (60, 3, 3)])
def test_a_large_mean_does_not_cancel(t: int, d: int, p: int) -> None:
    inputs = (1000 + torch.randn(N, t, 1, d)).float()
    grads = torch.randn(N, t, 1, p).float()
    grads -= grads.mean(1, keepdim=True)  # what a normalisation behind the layer does
    gradient = Outer(Tokens(inputs), grads, Size((p, d)))
    exact = Gradients([gradient], built(gradient)).flat
    scale = exact.norm(dim=1)
    assert_within(gradient.paired(gradient), scale**2, scale**2, 1e-3, "paired")
    gram = gradient.gram(gradient)
    assert_within(gram, exact @ exact.mT, scale[:, None] * scale, 1e-3, "gram")


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_widened_before_any_product(case: str) -> None:
    def narrow(gradient: PerSampleGradient) -> PerSampleGradient:
        if isinstance(gradient, Dense):
            return Dense(gradient.terms.bfloat16())
        assert isinstance(gradient, Outer)
        factor = gradient.factor
        if isinstance(factor, Tokens):
            factor = factor.replace(x=factor.x.bfloat16())
        elif isinstance(factor, Lookups) and factor.weight is not None:
            factor = factor.replace(weight=factor.weight.bfloat16())
        return Outer(factor, gradient.grad.bfloat16(), gradient.shape)

    make = CASES[case]
    check_operations(
        of(narrow(make(N))),
        of(narrow(make(M))),
        dtype=torch.float32,
        tolerance=1e-5,
        what=case,
    )


OPERATIONS: dict[str, Callable[[PerSampleGradient], Tensor]] = {
    "dot": lambda g: g.dot(random(2, *g.shape)),
    "token_dot": lambda g: g.token_dot(random(2, *g.shape)),
    "sum": lambda g: g.sum(random(g.n)),
    "project left": lambda g: g.project(random(2, matrix_shape(g.shape)[0]), None),
    "project right": lambda g: g.project(None, random(2, matrix_shape(g.shape)[1])),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", ["few tokens", "many tokens", "rows", "dense", "vector"])
def test_a_float64_argument_makes_the_result_float64(case: str, operation: str) -> None:
    gradient = CASES[case](N)
    single: PerSampleGradient
    if isinstance(gradient, Dense):
        single = Dense(gradient.terms.float())
    else:
        assert isinstance(gradient, Outer)
        factor = gradient.factor
        if isinstance(factor, Tokens):
            factor = factor.replace(x=factor.x.float())
        single = Outer(factor, gradient.grad.float(), gradient.shape)
    assert OPERATIONS[operation](single).dtype == torch.float64


def test_a_projection_after_compression_is_that_of_the_gradient() -> None:
    gradient = tokens(N, 3, 5, 6)
    left, right = random(2, 6), random(3, 5)
    compressed = Outer(Tokens(gradient.factor.mix(right[None])), gradient.grad, gradient.shape)
    torch.testing.assert_close(compressed.project(left, None), gradient.project(left, right))


def test_matrix_shapes() -> None:
    assert matrix_shape(Size((4, 2, 3))) == (4, 6)
    assert matrix_shape(Size((4,))) == (4, 1)
    assert matrix_shape(Size(())) == (1, 1)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest result of an operation had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("k", [1, 2])
def test_intermediates_are_as_large_as_told(k: int) -> None:
    gradient, directions = tokens(64, 8, 5, 32), random(k, 32, 5)
    with Largest() as freely:
        expected = gradient.dot(directions)
    with Largest() as told, building_at_most(4 * 2048):
        found = gradient.dot(directions)
    torch.testing.assert_close(found, expected)
    assert told.elements <= 2 * 2048 < freely.elements  # about

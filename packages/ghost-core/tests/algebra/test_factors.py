"""Every operation of an input factor against its dense form."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ghost_core import InputFactor, Lookups, Outer, Record, Tokens

N, M, T, S, D, P, K = 3, 2, 4, 5, 6, 2, 3

Make = Callable[[int, int], InputFactor]

FACTORS: dict[str, Make] = {
    "tokens": lambda n, t: Tokens(random(n, t, 1, D)),
    "groups": lambda n, t: Tokens(random(n, t, 2, D)),
    "rows": lambda n, t: Lookups(torch.randint(0, D, (n, t)), D),
    "weighted rows": lambda n, t: Lookups(torch.randint(0, D, (n, t)), D, random(n, t)),
    "one row": lambda n, t: Lookups(torch.full((n, t), 1), D),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=FACTORS)
def make(request: pytest.FixtureRequest) -> Make:
    return FACTORS[request.param]


def test_mix_is_a_product_with_the_dense_factor(make: Make) -> None:
    factor = make(N, T)
    weight = random(factor.groups, K, D)
    expected = torch.einsum("ntgd,gkd->ntgk", factor.dense().double(), weight)
    torch.testing.assert_close(factor.mix(weight), expected)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("one", "other"),
    [pair for pair in itertools.product(FACTORS, repeat=2) if pair.count("groups") != 1],
)
def test_inner_is_a_product_of_tokens(one: str, other: str, paired: bool) -> None:
    left = FACTORS[one](N, T)
    right = FACTORS[other](N if paired else M, S)
    pattern = "ntgd,nsgd->ngts" if paired else "ntgd,msgd->nmgts"
    expected = torch.einsum(pattern, left.dense().double(), right.dense().double())
    torch.testing.assert_close(left.inner(right, paired=paired), expected)
    torch.testing.assert_close(left.inner(right.dense(), paired=paired), expected)


def test_outer_sums_over_tokens(make: Make) -> None:
    factor = make(N, T)
    grad = random(N, T, factor.groups, P)
    expected = torch.einsum("ntgp,ntgd->ngpd", grad, factor.dense().double())
    torch.testing.assert_close(factor.outer(grad), expected)
    torch.testing.assert_close(factor.sum_outer(grad), expected.sum(0))


def test_a_factor_without_shortcuts_works_through_its_dense_form() -> None:
    class Plain(InputFactor):
        transposed = False
        groups = 1

        def dense(self) -> Tensor:
            return dense

    dense, weight = random(N, T, 1, D), random(1, K, D)
    factor = Plain()
    torch.testing.assert_close(factor.mix(weight), Tokens(dense).mix(weight))
    grad = random(N, T, 1, P)
    torch.testing.assert_close(factor.outer(grad), Tokens(dense).outer(grad))


@pytest.mark.parametrize("size", [1, D])
def test_dots_are_written_to_no_memory_that_others_have(size: int) -> None:
    class Ones(InputFactor):
        transposed = False
        groups = 1

        def dense(self) -> Tensor:
            return torch.ones(size, size, 1, 1)

        def mix(self, weight: Tensor) -> Tensor:
            return weight[:, None, :, 0].expand(size, size, 1, -1)

    class Same(Tokens):
        def mix(self, weight: Tensor) -> Tensor:
            return weight[:, None, :, 0].expand(size, size, 1, -1)

    class Mixing:
        mix = Same.mix

    class Mixed(Mixing, Tokens):
        pass

    tokens, ones = Tokens(random(size, size, 1, 1)), torch.ones(size, size, 1, 1)
    factors = [Ones(), Same(ones), Mixed(ones), tokens, Lookups(torch.zeros(2, size).long(), 1)]
    for factor in factors:
        shape = torch.Size((1, P) if factor.transposed else (P, 1))
        grad, directions = random(len(factor.dense()), size, 1, P), random(1, *shape)
        held = *factor.tensors().values(), grad, directions
        before = [each.clone() for each in held]
        outer = Outer(factor, grad, shape)
        for _ in range(2):
            expected = outer.materialize().flatten(1) @ directions.flatten()
            torch.testing.assert_close(outer.dot(directions)[:, 0], expected)
            torch.testing.assert_close(outer.token_dot(directions).sum(1)[:, 0], expected)
        assert all(map(torch.equal, held, before))


def test_rows_of_one_sample_count_every_time() -> None:
    factor = Lookups(torch.tensor([[1, 1, 1]]), 3)
    grad = torch.tensor([[[[1.0]], [[10.0]], [[100.0]]]])
    assert factor.outer(grad).flatten().tolist() == [0, 111, 0]
    assert factor.sum_outer(grad).flatten().tolist() == [0, 111, 0]


@pytest.mark.parametrize(("size", "row"), [(2, -1), (2, 2), (9, -1), (9, 9)])
def test_rows_that_the_table_does_not_have_are_no_other_samples(size: int, row: int) -> None:
    index = torch.zeros(3, 3, dtype=torch.int64)
    index[1, 2] = row
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        Lookups(index, size).outer(torch.ones(3, 3, 1, 2))


def test_padding_weighs_nothing() -> None:
    factor = Lookups(torch.tensor([[1, 2]]), 3, torch.tensor([[1.0, 0.0]]))
    grad = torch.ones(1, 2, 1, 1)
    assert factor.outer(grad).flatten().tolist() == [0, 1, 0]
    assert factor.mix(torch.ones(1, 1, 3)).flatten().tolist() == [1, 0]
    assert factor.inner(factor, paired=True).flatten().tolist() == [1, 0, 0, 0]


def test_narrow_takes_samples(make: Make) -> None:
    factor = make(N, T)
    torch.testing.assert_close(factor.narrow(slice(1, 3)).dense(), factor.dense()[1:3])


def test_expand_repeats_the_one_sample(make: Make) -> None:
    factor = make(1, T)
    assert factor.expand(N).dense().shape[0] == N
    torch.testing.assert_close(factor.expand(N).dense()[2], factor.dense()[0])


def test_a_record_lists_its_tensors_and_keeps_the_rest() -> None:
    rows = Lookups(torch.zeros(2, 3, dtype=torch.int64), 7)
    assert rows.tensors().keys() == {"index"}
    changed = rows.replace(index=torch.ones(2, 3, dtype=torch.int64))
    assert changed.size == 7
    assert rows.index.sum() == 0
    assert Record().tensors() == {}
    with pytest.raises(TypeError):
        rows.replace(indices=rows.index)


def test_a_record_that_computes_a_field_computes_it_anew() -> None:
    @dataclass(frozen=True)
    class Counted(Record):
        x: Tensor
        count: int = field(init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "count", len(self.x))

    assert Counted(torch.zeros(2)).replace(x=torch.zeros(5)).count == 5

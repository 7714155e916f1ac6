"""Scores of tiny and huge rows: right, or refused, and never a row of zeros in any order."""

import pytest
import torch
from search_kit import BLOCKS, K, best_of, columns_of, stored, whitened

from ghost_engines.search import Whitening, group_scores, score_parts, scores, search
from ghost_engines.store import StoreError

SIZES = [(1e-25, 1e10), (1e-36, 1e20), (1e-10, 1e-20), (1e10, 1e-35), (1e20, 1e-40)]
"""Sizes of rows and of queries of which float32 holds the products, though not all on the way."""


def exact(rows, queries):
    return queries.double() @ rows.double().T


@pytest.mark.parametrize(("size", "asked"), SIZES)
@pytest.mark.parametrize("largest", [True, False])
def test_products_in_range_are_right(tmp_path, size, asked, largest):
    rows, queries = torch.randn(60, K) * size, torch.randn(3, K) * asked
    found = stored(tmp_path, rows).search(queries, k=9, largest=largest)
    wanted = exact(rows, queries)
    assert torch.equal(found.ordinals, best_of(wanted, 9, 1 if largest else -1))
    torch.testing.assert_close(found.scores.double(), wanted.gather(1, found.ordinals))


@pytest.mark.parametrize(("size", "asked"), [(1e-25, 1e-25), (1e-40, 1.0), (1e-30, 1e-44)])
def test_scores_that_float32_cannot_hold_are_refused_and_float64_finds_them(tmp_path, size, asked):
    rows, queries = torch.randn(60, K) * size, torch.randn(3, K) * asked
    store = stored(tmp_path, rows)
    for ask in (store.search, lambda q: scores(store, q)):
        with pytest.raises(StoreError, match=r"underflow torch\.float32.*float64"):
            ask(queries)
    found = store.search(queries.double(), k=4)
    assert torch.equal(found.ordinals, best_of(exact(rows, queries), 4))
    sums = group_scores(store, queries, torch.arange(60) % 2)  # are float64 in any case
    wanted = exact(rows, queries).reshape(3, 30, 2).sum(1)
    torch.testing.assert_close(sums.scores, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "asked"), [(1e-150, 1e-155), (1e150, 1e160)])
def test_beyond_float64_they_are_refused(tmp_path, size, asked):
    rows, queries = torch.randn(60, K).double() * size, torch.randn(3, K).double() * asked
    with pytest.raises(StoreError, match=r"flow torch\.float64"):
        stored(tmp_path, rows).search(queries * 1e-10 if size < 1 else queries)


def test_zeros_and_lost_digits_beside_larger_scores_are_none(tmp_path):
    rows = torch.zeros(6, K)
    rows[0, 0], rows[1, 0], rows[2, 1] = 1.0, 1e-39, 1.0
    queries = torch.zeros(2, K)
    queries[0, 0] = 1.0
    found = stored(tmp_path, rows).search(queries, k=6)
    assert found.ordinals.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert found.scores[1].tolist() == [0.0] * 6
    assert found.scores[0, 0] == 1


def test_whitened_queries_are_scaled_before_they_are_rounded(tmp_path):
    rows, queries = torch.randn(50, K) * 1e15, torch.randn(2, K) * 1e-14
    store = stored(tmp_path, rows)
    found = store.search(queries, k=5, by=Whitening.of(store))
    wanted = whitened(rows, queries, 0.1, [columns_of(name) for name in BLOCKS])
    assert torch.equal(found.ordinals, best_of(wanted, 5))
    torch.testing.assert_close(found.scores.double(), wanted.gather(1, found.ordinals))


def test_stores_and_weights_of_other_sizes_add_up(tmp_path):
    rows = [torch.randn(40, K) * 1e20, torch.randn(40, K)]
    stores = [stored(tmp_path / f"{at}", each) for at, each in enumerate(rows)]
    queries, weights = [torch.randn(3, K) * 1e-35, torch.randn(3, K) * 1e-30], [1e-10, 1e5]
    queries[1][2] = 0  # and the other store's are 1e-45, once weighted
    found = search(stores, queries, k=5, weights=weights)
    wanted = sum(
        exact(each, asked) * weight
        for each, asked, weight in zip(rows, queries, weights, strict=True)
    )
    assert torch.equal(found.ordinals, best_of(wanted, 5))
    torch.testing.assert_close(found.scores.double(), wanted.gather(1, found.ordinals))


def test_parts_of_scores_add_up(tmp_path):
    rows, queries = torch.randn(20, K) * 1e15, torch.randn(2, K) * 1e-14
    store = stored(tmp_path, rows)
    by = Whitening.of(store)
    near = store.search(queries, k=3, by=by)
    parts = score_parts(store, queries, near.ordinals, by)
    assert {part.dtype for part in parts.values()} == {torch.float32}
    torch.testing.assert_close(sum(parts.values()), near.scores)
    with pytest.raises(StoreError, match=r"overflow torch\.float32"):
        score_parts(store, torch.randn(2, K) * 1e30, near.ordinals)


@pytest.mark.parametrize(("size", "asked"), [(1e-50, 1e30), (1e50, 1e-30), (1.0, 1.0), (5e-324, 1)])
def test_weights_of_rows_beyond_float32_are_right_or_refused(tmp_path, size, asked):
    rows, queries = torch.randn(60, K), torch.randn(3, K) * asked
    weights = torch.rand(60).double() + 0.5
    weights[7] = 0
    store = stored(tmp_path, rows)
    if size == 5e-324:
        with pytest.raises(StoreError, match=r"underflow torch\.float32"):
            search(store, queries, 9, row_weights=weights * size)
        return
    wanted = exact(rows, queries) * weights * size
    found = search(store, queries, 9, row_weights=weights * size)
    assert torch.equal(found.ordinals, best_of(wanted, 9))
    torch.testing.assert_close(
        found.scores.double(), wanted.gather(1, found.ordinals), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        scores(store, queries, row_weights=weights * size).scores.double(), wanted,
        rtol=1e-4, atol=1e-7 * wanted.abs().max().item(),
    )  # fmt: skip


def test_weights_of_rows_that_lie_too_far_apart_are_refused(tmp_path):
    rows, queries = torch.randn(60, K), torch.randn(3, K)
    weights = torch.ones(60, dtype=torch.float64)
    weights[3] = 1e-39
    store = stored(tmp_path, rows)
    with pytest.raises(StoreError, match="row_weights lie too far apart") as caught:
        search(store, queries, 3, row_weights=weights)
    assert "float64" in caught.value.remedy
    found = scores(store, queries.double(), row_weights=weights)
    assert (found.scores[:, 3] != 0).all()
    assert not scores(store, queries, row_weights=0 * weights).scores.any()

"""The least, parts of rows and sums over stores, against a comparison of everything."""

import pytest
import torch
from search_kit import PLACES, K, Rows, best_of, columns_of, stored

from ghost_core import CaptureError, UnknownNameError
from ghost_engines.search import RowScores, Whitening, score_parts, scores, search
from ghost_engines.store import GradientStore, StoreError


def exact(rows, queries, by):
    rows, queries = rows.double(), queries.double()
    if by == "cosine":
        rows, queries = (each / each.norm(dim=1, keepdim=True) for each in (rows, queries))
    return queries @ rows.T


@pytest.mark.parametrize("by", ["dot", "cosine"])
def test_the_smallest_come_smallest_first(tmp_path, by):
    rows, queries = torch.randn(60, K), torch.randn(4, K)
    found = stored(tmp_path / "g", rows).search(queries, 7, by, largest=False, block=9)
    expected = exact(rows, queries, by)
    assert torch.equal(found.ordinals, best_of(expected, 7, sign=-1))
    torch.testing.assert_close(
        found.scores.double(), expected.gather(1, found.ordinals), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("largest", [True, False])
def test_equal_scores_come_in_order_of_the_rows(tmp_path, largest):
    rows = torch.randint(-1, 2, (50, K)).float()  # exact, and full of ties
    queries = torch.randint(-1, 2, (3, K)).float()
    store = stored(tmp_path / "g", rows, unit=11)
    for block in (1, 4, 50):
        found = store.search(queries, 20, largest=largest, block=block)
        assert torch.equal(found.ordinals, best_of(queries @ rows.T, 20, sign=1 if largest else -1))
    zero = store.search(torch.zeros(1, K), 2, largest=False).scores
    assert str(zero) == str(torch.zeros(1, 2))  # and not -0


@pytest.mark.parametrize("by", ["dot", "cosine"])
@pytest.mark.parametrize(
    ("globs", "names"),
    [("b.*", ("b.0.weight", "b.1.weight")), ("a,c", ("a.weight", "c.weight")),
     (["c.weight", "*.0"], ("b.0.weight", "c.weight"))],
)  # fmt: skip
def test_parameters_are_compared_as_if_rows_had_no_others(tmp_path, by, globs, names):
    rows, queries = torch.randn(40, K), torch.randn(3, K)
    found = stored(tmp_path / "g", rows).search(queries, 5, by, parameters=globs)
    columns = columns_of(*names)
    expected = exact(rows[:, columns], queries[:, columns], by)
    assert torch.equal(found.ordinals, best_of(expected, 5))


def test_a_query_that_is_zero_where_it_is_compared_has_no_cosine(tmp_path):
    queries = torch.ones(1, K)
    queries[:, columns_of("a.weight")] = 0
    with pytest.raises(StoreError, match=r"queries \[0\] are zero"):
        stored(tmp_path / "g", torch.randn(4, K)).search(queries, by="cosine", parameters="a")


@pytest.mark.parametrize("by", ["dot", "cosine"])
def test_scores_of_several_stores_are_added_up_with_their_weights(tmp_path, by):
    rows = [torch.randn(50, K), torch.randn(50, K).half(), torch.randn(50, 5)]
    queries = [torch.randn(3, K), torch.randn(3, K), torch.randn(3, 5)]
    stores = [
        stored(tmp_path / f"{at}", each, unit=unit)
        for at, (each, unit) in enumerate(zip(rows, (16, 7, 50), strict=True))
    ]
    weights = [0.5, -2.0, 1.0]
    expected = sum(
        weight * exact(*pair, by)
        for weight, *pair in zip(weights, rows, queries, strict=True)
    )  # fmt: skip
    found = search(stores, queries, 8, by, weights=weights, block=10)
    assert torch.equal(found.ordinals, best_of(expected, 8))
    assert torch.equal(found.ids, found.ordinals * 10 + 7)
    table = scores(stores, queries, by, weights=weights, block=10)
    assert isinstance(table, RowScores)
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(table.ids, stores[0].ids)
    whole = [Whitening.of(store, blocks="all") for store in stores]
    apart = sum(
        weight * scores(store, asked, how).scores
        for store, asked, how, weight in zip(stores, queries, whole, weights, strict=True)
    )
    torch.testing.assert_close(scores(stores, queries, whole, weights=weights).scores, apart)


def test_what_cannot_be_added_up_is_refused(tmp_path):
    a, b = stored(tmp_path / "a", torch.randn(9, K)), stored(tmp_path / "b", torch.randn(8, K))
    query = torch.randn(1, K)
    for given, message in [
        ({"stores": [a, b], "queries": [query, query]}, r"have \[9, 8\] rows"),
        ({"stores": [a, a], "queries": [query]}, "1 queries for 2 stores"),
        ({"stores": [a, a], "queries": query}, "queries must be a list, one for each of 2"),
        ({"stores": [a, a], "queries": [query, query.expand(2, K)]}, r"not \[1, 2\]"),
        ({"stores": [a], "queries": [query], "weights": [float("nan")]}, "must be finite"),
        ({"stores": [a], "queries": [query], "by": ["dot", "dot"]}, "2 by for 1 stores"),
        ({"stores": [], "queries": []}, r"have \[\] rows"),
    ]:
        with pytest.raises(StoreError, match=message):
            search(**given)
    with GradientStore.create(tmp_path / "c", Rows()) as other:
        batch = next(a.blocks())
        batch.ids[4] = 0
        other.append(batch)
    with pytest.raises(StoreError, match="different samples, or in another order, from row 4"):
        search([a, other], [query, query], block=4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"parameters": "d.*"}, UnknownNameError, "unknown layer 'd"),
        ({"parameters": 3}, CaptureError, "parameters must be a glob"),
        ({"parameters": ""}, StoreError, "names none"),
        ({"largest": 1}, CaptureError, "largest must be True or False"),
        ({"by": "dott"}, UnknownNameError, "cosine, dot"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        stored(tmp_path / "g", torch.randn(3, K)).search(torch.randn(1, K), **given)


def test_rows_of_which_nobody_says_the_parameters_are_compared_as_a_whole(tmp_path):
    store = stored(tmp_path / "g", torch.randn(3, 5))
    with pytest.raises(StoreError, match="does not say which columns") as caught:
        store.search(torch.randn(1, 5), parameters="a")
    assert 'blocks="all"' in caught.value.remedy


@pytest.mark.parametrize("by", ["dot", "cosine", "whitened"])
@pytest.mark.parametrize("parameters", [None, "a,c"])
def test_what_parameters_add_makes_up_the_score(tmp_path, by, parameters):
    rows, queries = torch.randn(20, K), torch.randn(3, K)
    store = stored(tmp_path / "g", rows)
    how = Whitening.of(store) if by == "whitened" else by
    near = store.search(queries, 4, how, parameters=parameters)
    found = score_parts(store, queries, near.ordinals, how, parameters=parameters)
    assert list(found) == list(PLACES if parameters is None else ("a.weight", "c.weight"))
    torch.testing.assert_close(sum(found.values()), near.scores)
    if by == "dot":
        columns = columns_of("c.weight")
        expected = (queries[:, columns] @ rows[:, columns].T).gather(1, near.ordinals)
        torch.testing.assert_close(found["c.weight"], expected)
    with pytest.raises(StoreError, match=r"ordinals must be int64 \[3, k\], not .*\[2, 4\]"):
        score_parts(store, queries, near.ordinals[:2], how)

"""Near-duplicates and scores by group against loops over all rows."""

import itertools

import numpy as np
import pytest
import torch
from search_kit import K, columns_of, stored

from ghost_core import UnknownNameError
from ghost_engines.search import group_scores, near_duplicates
from ghost_engines.store import Labels, StoreError


def with_twins(n=40, dtype=torch.float32):
    """Return rows of which some are nearly others, scaled, one is another's opposite, one zero."""
    rows = torch.randn(n, K)
    rows[5], rows[39], rows[17] = rows[3] * 2, rows[3] + 1e-3, -rows[3]
    rows[20], rows[21] = rows[19], 0
    return rows.to(dtype)


def twins_of(rows, threshold):
    rows = rows.double().numpy()
    lengths = np.linalg.norm(rows, axis=1)
    products, bound = rows @ rows.T, threshold * np.outer(lengths, lengths)
    pairs = itertools.combinations(range(len(rows)), 2)
    return [pair for pair in pairs if products[pair] >= bound[pair] > 0]


@pytest.mark.parametrize(("dtype", "block"), [(torch.float16, 7), (torch.float64, 64)])
@pytest.mark.parametrize("threshold", [0.3, 0.999])
def test_every_pair_of_near_duplicates_is_found_once(tmp_path, dtype, block, threshold):
    rows = with_twins(dtype=dtype)
    found = near_duplicates(stored(tmp_path / "g", rows, unit=16), threshold, block=block)
    expected = twins_of(rows, threshold)
    assert [tuple(pair) for pair in found.ordinals.tolist()] == expected
    assert {(3, 5), (3, 39), (5, 39), (19, 20)} <= set(expected)
    assert torch.equal(found.ids, found.ordinals * 10 + 7)
    cosines = torch.cosine_similarity(*rows.double()[found.ordinals].unbind(1))
    assert (found.scores.double() - cosines).abs().max() < 1e-5
    assert len(found) == len(expected)


def test_near_duplicates_in_some_parameters(tmp_path):
    rows = with_twins()
    found = near_duplicates(stored(tmp_path / "g", rows), 0.99, parameters="a")
    expected = twins_of(rows[:, columns_of("a.weight")], 0.99)
    assert [tuple(pair) for pair in found.ordinals.tolist()] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_found_with_a_threshold_of_1(tmp_path, dtype):
    rows = torch.randn(60, K, dtype=dtype).repeat(2, 1)
    rows = torch.cat([rows, torch.zeros(2, K, dtype=dtype)])
    found = near_duplicates(stored(tmp_path / "g", rows), 1, block=50)
    assert found.ordinals.tolist() == [[at, at + 60] for at in range(60)]


def test_no_pairs_of_no_rows(tmp_path):
    found = near_duplicates(stored(tmp_path / "g", torch.empty(0, K)), 0.5)
    assert found.ids.shape == found.ordinals.shape == (0, 2)
    assert len(found) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [({"threshold": "x"}, "threshold must be a number"),
     ({"threshold": 0.5, "device": "nope"}, "device"),
     ({"threshold": 0.0}, "above 0"), ({"threshold": 1.5}, "at most 1"),
     ({"threshold": 0.9, "block": 0}, "block"), ({"threshold": 0.9, "most": 5}, "more than 5")],
)  # fmt: skip
def test_a_threshold_that_is_none_or_finds_too_many_is_refused(tmp_path, given, message):
    with pytest.raises(StoreError, match=message):
        near_duplicates(stored(tmp_path / "g", torch.ones(4, K)), **given)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_scores_are_added_up_by_group(tmp_path, reduce):
    rows, queries = torch.randn(50, K), torch.randn(3, K)
    groups = torch.randint(-2, 3, (50,)) * 100
    found = group_scores(
        stored(tmp_path / "g", rows), queries, groups, "cosine", reduce=reduce, block=7
    )
    cosines = torch.cosine_similarity(queries[:, None].double(), rows.double(), dim=2)
    assert found.groups.tolist() == sorted(set(groups.tolist()))
    for at, group in enumerate(found.groups):
        own = cosines[:, groups == group]
        assert found.counts[at] == own.shape[1]
        expected = own.mean(1) if reduce == "mean" else own.sum(1)
        torch.testing.assert_close(found.scores[:, at], expected, rtol=1e-5, atol=1e-5)


def test_groups_may_have_names(tmp_path):
    rows, query = torch.randn(5, K), torch.randn(1, K)
    groups = Labels(torch.tensor([2, 0, 2, 2, 0], dtype=torch.int32), ("a", "b", "c"))
    found = group_scores(stored(tmp_path / "g", rows), query, groups)
    assert found.names == ("a", "c")
    expected = (query @ rows.T)[0]
    torch.testing.assert_close(
        found.scores[0].float(), torch.stack([expected[[1, 4]].sum(), expected[[0, 2, 3]].sum()])
    )


def test_groups_that_do_not_fit_are_refused(tmp_path):
    store, query = stored(tmp_path / "g", torch.randn(4, K)), torch.randn(1, K)
    for groups, found in [(torch.ones(4), "float32"), (torch.ones(3).long(), r"\[3\]"),
                          ([0] * 4, "list")]:  # fmt: skip
        with pytest.raises(StoreError, match=rf"int64 \[4\], one for each row, not .*{found}"):
            group_scores(store, query, groups)
    for codes, names in [([0, 0, 1, 2], "ab"), ([0, -1, 0, 0], "ab"), ([0, 1, 0, 1], "aa")]:
        with pytest.raises(StoreError, match="names of groups do not fit their numbers"):
            group_scores(store, query, Labels(torch.tensor(codes).int(), tuple(names)))
    with pytest.raises(UnknownNameError, match="mean, sum"):
        group_scores(store, query, torch.ones(4).long(), reduce="max")

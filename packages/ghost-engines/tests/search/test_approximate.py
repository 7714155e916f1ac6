"""The approximate index against the exact search. FAISS is slow to import: stress tests alone."""

import sys

import pytest
import torch
from search_kit import K, stored

from ghost_core import MissingExtraError, UnknownNameError
from ghost_engines.search import ApproximateIndex, Whitening
from ghost_engines.store import StoreError

faiss = [pytest.mark.stress, pytest.mark.filterwarnings("ignore:builtin type .* has no __module__")]


def test_without_faiss_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"ghost-engines\[faiss\]"):
        ApproximateIndex.of(stored(tmp_path / "g", torch.randn(3, K)))


class TestWithFaiss:
    pytestmark = faiss

    @pytest.fixture(autouse=True)
    def _faiss(self):
        pytest.importorskip("faiss")

    @pytest.mark.parametrize("by", ["dot", "cosine"])
    @pytest.mark.parametrize("parameters", [None, "a,c"])
    def test_with_all_cells_it_finds_what_the_store_does(self, tmp_path, by, parameters):
        store = stored(tmp_path / "g", torch.randn(500, K).half())
        queries = torch.randn(5, K)
        index = ApproximateIndex.of(store, by, parameters=parameters)
        found = index.search(queries, 7, probes=index.cells)
        exact = store.search(queries, 7, by, parameters=parameters)
        torch.testing.assert_close(found.scores, exact.scores, rtol=2e-3, atol=2e-3)
        if by == "dot":  # of unit length, rows are rounded to float16
            assert torch.equal(found.ids, exact.ids)
            assert torch.equal(found.ordinals, exact.ordinals)

    @pytest.mark.parametrize("size", [1e-38, 1e-9, 1e6, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_of_any_size_are_found(self, tmp_path, size, dtype):
        rows, queries = (torch.randn(300, K).double() * size).to(dtype), torch.randn(3, K)
        queries = queries.double() / size
        store = stored(tmp_path / "g", rows)
        index = ApproximateIndex.of(store)
        found, exact = index.search(queries, 5, probes=index.cells), store.search(queries, 5)
        torch.testing.assert_close(found.scores, exact.scores, rtol=2e-3, atol=2e-3)
        assert torch.equal(found.ids, exact.ids)
        if dtype == torch.float32 and size > 1e29:
            with pytest.raises(StoreError, match=r"scores overflow torch\.float32"):
                index.search(torch.full((1, K), 1e30), 5)

    def test_rows_beyond_float32_are_found(self, tmp_path):
        for size in (1e-170, 1e160):
            rows = torch.randn(100, K, dtype=torch.float64) * size
            store, queries = stored(tmp_path / str(size), rows), torch.randn(2, K).double() / size
            found = ApproximateIndex.of(store, cells=2).search(queries, 5)
            assert torch.equal(found.ids, store.search(queries, 5).ids)

    def test_whitened_queries_beyond_float32_find_scores_within(self, tmp_path):
        store = stored(tmp_path / "g", torch.randn(100, K) * 1e-25)
        index, by = ApproximateIndex.of(store, cells=2), Whitening.of(store)
        queries = torch.randn(3, K)  # times 1e50, when whitened
        found = index.search(queries, 5, by, probes=2)
        assert torch.equal(found.ids, store.search(queries, 5, by).ids)
        with pytest.raises(StoreError, match=r"scores overflow torch\.float32"):
            index.search(queries * 1e20, 5, by)

    def test_with_few_cells_it_finds_most(self, tmp_path):
        centres = torch.randn(20, K) * 4
        rows = centres.repeat(100, 1) + torch.randn(2000, K)
        store, queries = stored(tmp_path / "g", rows, unit=512), centres[:10]
        exact = store.search(queries, 10, "cosine").ids.tolist()
        found = ApproximateIndex.of(store, "cosine").search(queries, 10, probes=8).ids.tolist()
        hits = sum(len(set(a) & set(b)) for a, b in zip(exact, found, strict=True))
        assert hits >= 80

    def test_a_whitening_goes_with_an_index_by_dot(self, tmp_path):
        store, queries = stored(tmp_path / "g", torch.randn(300, K).half()), torch.randn(2, K)
        by, index = Whitening.of(store), ApproximateIndex.of(store, cells=4)
        found = index.search(queries, 5, by, probes=4)
        assert torch.equal(found.ids, store.search(queries, 5, by).ids)
        with pytest.raises(StoreError, match="the index is by cosine, not by <Whitening"):
            ApproximateIndex.of(store, "cosine").search(queries, by=by)

    def test_what_does_not_fit_is_refused(self, tmp_path):
        store = stored(tmp_path / "g", torch.full((4, K), 1e6) * torch.logspace(0, -12, 4)[:, None])
        with pytest.raises(StoreError, match="some rows underflow float16"):
            ApproximateIndex.of(store)
        assert ApproximateIndex.of(store, "cosine").search(torch.ones(1, K), 4).scores.min() > 0.99
        with pytest.raises(StoreError, match="4 rows for 5 cells"):
            ApproximateIndex.of(store, cells=5)
        with pytest.raises(UnknownNameError, match="cosine, dot"):
            ApproximateIndex.of(store, "l2")
        rows = torch.cat([torch.eye(K), -torch.eye(K)])
        index = ApproximateIndex.of(stored(tmp_path / "h", rows), cells=6)
        with pytest.raises(StoreError, match="1 cells hold fewer than 20 rows"):
            index.search(torch.ones(1, K), 20, probes=1)

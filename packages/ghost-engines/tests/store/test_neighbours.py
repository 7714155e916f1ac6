"""The search against a comparison of everything with everything."""

from dataclasses import dataclass
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_engines.store import GradientStore, Neighbours, StoredRows, StoreError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass
class FakeEngine:
    k_total: int
    dtype: torch.dtype

    def manifest(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def stored(tmp_path):
    """Return a function that stores rows and opens the store."""

    def store(rows: Tensor, unit: int = 16) -> GradientStore:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with GradientStore.create(path, FakeEngine(rows.shape[1], rows.dtype), unit=unit) as made:
            made.append(StoredRows(torch.arange(len(rows)) * 10 + 7, rows, None))
        return GradientStore.open(path)

    return store


def scores_of(rows: Tensor, queries: Tensor, metric: str) -> Tensor:
    rows, queries = rows.double(), queries.double()
    if metric == "cosine":
        rows = rows / rows.norm(dim=1, keepdim=True)
        queries = queries / queries.norm(dim=1, keepdim=True)
    return queries @ rows.T


def best_of(scores: Tensor, k: int) -> Tensor:
    """Return ordinals `[Q, k]`, best first, of equal scores the lower ordinal first."""
    return torch.tensor(
        [sorted(range(len(row)), key=lambda at: (-row[at], at))[:k] for row in scores.tolist()]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("block", [1, 7, 16, 1000])
def test_it_finds_what_comparing_everything_finds(stored, dtype, metric, block):
    rows, queries = torch.randn(200, 24).to(dtype), torch.randn(5, 24)
    store = stored(rows, unit=48)
    found = store.search(queries, k=9, by=metric, block=block)
    expected = scores_of(rows, queries, metric)
    assert torch.equal(found.ordinals, best_of(expected, 9))
    assert torch.equal(found.ids, found.ordinals * 10 + 7)
    wide = dtype == torch.float64
    assert found.scores.dtype == (torch.float64 if wide else torch.float32)
    scale = 1.0 if metric == "cosine" else queries.norm() * rows.double().norm(dim=1).max()
    error = (found.scores.double() - expected.gather(1, found.ordinals)).abs().max()
    assert error <= scale * (1e-14 if wide else 1e-6)


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(4, 20))]
)
def test_equal_scores_come_in_order_of_the_rows(stored, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, 3, (60, 3), generator=generator).float()  # exact, and full of ties
    queries = torch.randint(-2, 3, (4, 3), generator=generator).float()
    store = stored(rows, unit=int(torch.randint(1, 70, (), generator=generator)))
    for k in (1, 5, 59, 60):
        for block in (1, 4, 13, 60):
            found = store.search(queries, k=k, block=block)
            assert torch.equal(found.ordinals, best_of(queries @ rows.T, k))


@pytest.mark.parametrize("order", [1, -1, 0])
def test_the_order_of_the_rows_does_not_matter(stored, order):
    rows = torch.arange(100.0)[:, None] * order
    found = stored(rows).search(torch.tensor([[1.0], [-1.0]]), k=30, block=8)
    assert torch.equal(found.ordinals, best_of(torch.tensor([[1.0], [-1.0]]) @ rows.T, 30))


def test_rows_that_are_not_committed_are_searched_too(tmp_path):
    rows = torch.randn(11, 4)
    with GradientStore.create(tmp_path / "g", FakeEngine(4, torch.float32), unit=4) as store:
        store.append(StoredRows(torch.arange(11), rows, None))
        found = store.search(rows[10:], k=1, by="cosine")
    assert found.ids.tolist() == [[10]]


@pytest.mark.parametrize("n", [0, 3])
def test_more_neighbours_than_rows_are_all_rows(stored, n):
    found = stored(torch.randn(n, 4)).search(torch.randn(2, 4), k=10)
    assert found.scores.shape == found.ids.shape == found.ordinals.shape == (2, n)


def test_no_queries_have_no_neighbours(stored):
    found = stored(torch.randn(5, 4)).search(torch.empty(0, 4), k=3)
    assert isinstance(found, Neighbours)
    assert found.scores.shape == found.ids.shape == (0, 3)


def test_queries_in_float64_are_not_rounded(stored):
    rows = torch.randn(30, 8)
    queries = torch.randn(3, 8, dtype=torch.float64)
    found = stored(rows).search(queries, k=4)
    assert found.scores.dtype == torch.float64
    expected = scores_of(rows, queries, "dot").gather(1, found.ordinals)
    torch.testing.assert_close(found.scores, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e30])
def test_the_cosine_of_tiny_and_huge_rows_is_right(stored, scale):
    rows, queries = torch.randn(30, 8), torch.randn(3, 8)
    found = stored(rows * scale).search(queries * scale, k=30, by="cosine")
    expected = scores_of(rows, queries, "cosine").gather(1, found.ordinals)
    tolerance = 1e-6 if scale > 1e-37 else 1e-4  # there the rows themselves are rounded
    assert (found.scores.double() - expected).abs().max() < tolerance


def test_a_row_of_zeros_has_cosine_0(stored):
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = stored(rows).search(torch.tensor([[2.0, 0.0]]), k=3, by="cosine")
    assert found.scores.tolist() == [[1.0, 0.0, -1.0]]
    assert found.ordinals.tolist() == [[0, 1, 2]]


def test_an_unknown_metric_lists_those_that_exist(stored):
    with pytest.raises(UnknownNameError, match=r"'dott'.*'dot'.*cosine, dot"):
        stored(torch.randn(3, 2)).search(torch.randn(1, 2), by="dott")


@pytest.mark.parametrize(
    ("queries", "given", "message"),
    [
        (torch.randn(2, 3), {}, r"must be floating point \[Q, 4\], not torch.float32 of shape"),
        (torch.randn(4), {}, r"must be floating point \[Q, 4\]"),
        (torch.ones(1, 4).to(torch.float8_e5m2), {}, r"must be .* not torch.float8_e5m2"),
        (torch.ones(1, 4).long(), {}, r"must be floating point \[Q, 4\]"),
        (torch.tensor([[0.0] * 4, [float("nan")] * 4]), {}, r"queries \[1\] are not finite"),
        (torch.tensor([[1.0] * 4, [0.0] * 4]), {"by": "cosine"}, r"queries \[1\] are zero"),
        (torch.randn(2, 4), {"k": 0}, "k must be at least 1"),
        (torch.randn(2, 4), {"block": 0}, "rows of a block must be at least 1"),
        (torch.full((2, 4), 1e38), {}, "overflow"),
    ],
)
def test_what_cannot_be_answered_is_refused(stored, queries, given, message):
    with pytest.raises(StoreError, match=message):
        stored(torch.full((3, 4), 1e3)).search(queries, **given)


def test_the_users_settings_do_not_change_the_scores(stored):
    rows, queries = torch.randn(40, 64), torch.randn(3, 64, requires_grad=True)
    store = stored(rows)
    expected = store.search(queries, k=5)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = store.search(queries, k=5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.scores, expected.scores)
    assert not found.scores.requires_grad


def test_the_progress_bar_is_off_unless_someone_sees_it(stored, capsys):
    store = stored(torch.randn(40, 4))
    store.search(torch.randn(1, 4))
    store.verify()
    assert capsys.readouterr() == ("", "")
    store.search(torch.randn(1, 4), progress=True)
    assert "40.0/40.0" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_search_runs_where_the_queries_are(stored):
    rows, queries = torch.randn(100, 8).half(), torch.randn(4, 8)
    found = stored(rows).search(queries.cuda(), k=5, by="cosine")
    assert found.scores.is_cuda
    assert torch.equal(found.ordinals.cpu(), best_of(scores_of(rows, queries, "cosine"), 5))


def test_queries_that_are_no_tensor_are_refused(stored):
    store = stored(torch.eye(3))
    with pytest.raises(StoreError, match=r"such as engine\.collect\(\), not list"):
        store.search([[1.0, 0.0, 0.0]])


def test_two_searches_at_once_leave_the_precision_of_products_as_it_was(stored):
    """The first to come is the first to go, while the second is still inside."""
    store, queries, failed = stored(torch.randn(8, 4)), torch.randn(1, 4), []
    step = Barrier(2, timeout=60)

    def products() -> list[object]:
        newer = hasattr(torch.backends, "fp32_precision")
        return [torch.backends.mkldnn.matmul.fp32_precision] if newer else []

    class Waiting:
        def __init__(self, late: bool) -> None:
            self.late = late

        def transform(self, store: object, queries: Tensor, columns: object) -> Tensor:
            step.wait()  # both are inside
            if self.late:
                step.wait()  # the first has left
            return queries

    def run(late: bool) -> None:
        try:
            store.search(queries, k=1, by=Waiting(late), progress=False)
            if not late:
                step.wait()
        except BaseException as error:
            failed.append(error)
            step.abort()

    before = torch.get_float32_matmul_precision(), products()
    threads = [Thread(target=run, args=(late,)) for late in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (torch.get_float32_matmul_precision(), products()) == before

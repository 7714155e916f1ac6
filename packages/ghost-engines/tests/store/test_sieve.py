"""The sieve of a search: no row is left out that counts, and most that do not count are."""

import pytest
import torch
from search_kit import Rows, best_of, stored
from sieve_kit import CASES, just_exceeded, scored_rows

from ghost_engines.store import GradientStore, Scorer, StoredRows, StoreError
from ghost_engines.store.sieve import TILE, Sieve

Q = 30


@pytest.fixture
def forced(monkeypatch):
    """Use the sieve whatever the CPU does well; return how many rows were scored all the same."""
    monkeypatch.setattr(Sieve, "pays", staticmethod(lambda *_, **known: True))
    return scored_rows(monkeypatch)


def without(monkeypatch):
    monkeypatch.setattr(Sieve, "pays", staticmethod(lambda *_, **known: False))


# The bound


def assert_each_passes(path, rows, queries, by, ats):
    """Compare thresholds that each row just exceeds, for all queries and for one alone."""
    scorer = Scorer(stored(path, rows), queries, by, 1.0, None, None)
    scorer.scale(20 - queries.abs().amax(1, keepdim=True).frexp().exponent)
    for smallest in (False, True):
        sieve = Sieve(scorer._asked, scorer.columns, 99, cosine=by == "cosine", smallest=smallest)
        scores = scorer(rows) * (-1 if smallest else 1)
        for at, limit in just_exceeded(scores, ats):
            sieve.raise_to(limit)
            sieve.passing_of(rows * 2.0**-9)  # what shorter rows need is not enough
            passing = sieve.passing_of(rows)
            assert passing is None or at in passing


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("c", [17, 257])
@pytest.mark.parametrize("by", ["dot", "cosine"])
def test_a_row_that_scores_the_least_bit_more_passes(tmp_path, case, c, by):
    rows, queries = case(c)
    assert_each_passes(tmp_path, rows.half(), queries, by, range(0, len(rows), 5))


@pytest.mark.stress
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("c", [1, 2, 31, 255, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_each_row_passes_in_every_dtype(tmp_path, case, c, dtype, seed):
    torch.manual_seed(seed)
    rows, queries = case(c)
    queries[(queries == 0).all(1)] = 1
    for by in ("dot", "cosine"):
        assert_each_passes(tmp_path / by, rows.to(dtype), queries, by, range(len(rows)))


def test_rows_without_a_bound_all_pass():
    for rows in (torch.full((3, 4), 1e30), torch.tensor([[torch.nan, 0, 0, 0]])):
        sieve = Sieve(torch.ones(2, 4), slice(0, 4), 4, cosine=False, smallest=False)
        sieve.raise_to(torch.zeros(2, 1))
        assert sieve.passing(rows) is None
    sieve = Sieve(torch.ones(2, 4), slice(0, 4), 4, cosine=True, smallest=False)
    sieve.raise_to(torch.zeros(2, 1))
    assert sieve.passing(torch.eye(4) * 1e-13) is None


# Searches


@pytest.mark.parametrize(
    ("by", "largest", "dtype"),
    [  # by default, any two of them meet
        pytest.param(by, largest, dtype, marks=() if quick == largest else pytest.mark.stress)
        for largest in (True, False)
        for by, dtype, quick in (
            ("dot", torch.float16, True),
            ("cosine", torch.float16, False),
            ("dot", torch.bfloat16, False),
            ("cosine", torch.bfloat16, True),
            ("dot", torch.float32, True),
            ("cosine", torch.float32, False),
        )
    ],
)
def test_a_search_finds_what_comparing_everything_finds(tmp_path, forced, by, largest, dtype):
    rows = (torch.randn(3000, 64) * torch.rand(3000, 1).add(0.2)).to(dtype)
    queries = torch.randn(Q, 64)
    found = stored(tmp_path, rows, unit=800).search(queries, k=7, by=by, largest=largest)
    exact = queries.double() @ rows.double().T
    if by == "cosine":
        exact /= queries.double().norm(dim=1, keepdim=True) * rows.double().norm(dim=1)
    assert torch.equal(found.ordinals, best_of(exact, 7, 1 if largest else -1))
    wanted = exact.gather(1, found.ordinals)
    torch.testing.assert_close(found.scores.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.ids, found.ordinals * 10 + 7)
    assert sum(forced) < 0.8 * len(rows)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 4))]
)
def test_equal_scores_come_in_order_with_and_without_it(tmp_path, forced, monkeypatch, seed):
    torch.manual_seed(seed)
    rows = torch.randint(-2, 3, (2000, 16)).half()
    rows[torch.randint(0, 2000, (300,))] = rows[5].clone()
    queries = torch.randint(-2, 3, (Q, 16)).float()
    queries[3] = 0
    store = stored(tmp_path, rows, unit=int(torch.randint(50, 700, ())))
    found = {k: store.search(queries, k=k, block=300) for k in (1, 9, 40)}
    expected = best_of(queries @ rows.float().T, 40)
    for k, near in found.items():
        assert torch.equal(near.ordinals, expected[:, :k])
    without(monkeypatch)
    plain = store.search(queries, k=9, block=300)
    assert torch.equal(plain.scores, found[9].scores)


def test_where_all_rows_are_alike_it_rests(tmp_path, forced, monkeypatch):
    looks, look = [], Sieve.passing_of
    monkeypatch.setattr(Sieve, "passing_of", lambda *given: looks.append(1) or look(*given))
    rows = torch.randn(16).expand(10_000, 16).half()
    queries = torch.randn(Q, 16)
    found = stored(tmp_path, rows, unit=100).search(queries, k=3)
    assert torch.equal(found.ordinals, torch.arange(3).expand(Q, 3))
    assert len(looks) < 10  # of 100
    assert sum(forced) == 10_000


def test_a_query_of_zeros_and_long_rows_do_not_open_it_for_all(tmp_path, forced):
    rows, queries = torch.randn(8 * TILE, 32), torch.randn(Q, 32)
    rows[::TILE] *= 3e3
    rows[:, 0] = 0
    rows[::TILE, 1:] = 0  # orthogonal to all rows but each other
    rows[::TILE, 0] = 1e4
    queries[0], queries[1:, 0] = 0, 0
    found = stored(tmp_path, rows.half(), unit=3 * TILE).search(queries, k=2)
    exact = queries.double() @ rows.half().double().T
    assert torch.equal(found.ordinals, best_of(exact, 2))
    assert sum(forced) < len(rows) / 2


def test_scores_that_overflow_are_refused_though_they_are_not_the_best(tmp_path, forced):
    rows = torch.randn(2000, 16)
    rows[1500] = -3e38
    with pytest.raises(StoreError, match="overflow"):
        stored(tmp_path, rows, unit=300).search(torch.ones(Q, 16), k=3)


def test_rows_in_memory_and_rows_that_replace_others_are_sieved_too(tmp_path, forced, monkeypatch):
    queries = torch.randn(Q, 16)
    with GradientStore.create(
        tmp_path, Rows(torch.float16, 16), unit=400, duplicates="replace"
    ) as store:
        for _ in range(2):
            ids = torch.randperm(2000)[:1500]
            store.append(StoredRows(ids, torch.randn(1500, 16).half(), None))
        written = store.search(queries, k=5)
        of_writer = best_of(queries.double() @ store.rows().double().T, 5)
    assert torch.equal(written.ordinals, of_writer)
    store = GradientStore.open(tmp_path)
    assert len(store) < 3000
    found = store.search(queries, k=5)
    assert torch.equal(found.ordinals, best_of(queries.double() @ store.rows().double().T, 5))
    without(monkeypatch)
    assert torch.equal(store.search(queries, k=5).ids, found.ids)


def test_it_is_left_alone_where_it_does_not_pay(monkeypatch):
    queries = torch.randn(100, 64)
    has, before = "ghost_engines.store.sieve._multiplies_bfloat16", torch.backends.mkldnn.enabled
    monkeypatch.setattr(has, lambda: True)
    try:
        torch.backends.mkldnn.enabled = True
        assert Sieve.pays(torch.float16, queries, 4096)
        assert not Sieve.pays(torch.float64, queries, 4096)
        assert not Sieve.pays(torch.float16, queries.double(), 4096)
        assert not Sieve.pays(torch.float16, queries[:9], 4096)
        assert Sieve.pays(torch.float16, queries[:9], 4096, known=True)
        assert not Sieve.pays(torch.float16, queries, 10)
        assert not Sieve.pays(torch.float16, queries[:, :3], 4096)
        torch.backends.mkldnn.enabled = False
        assert not Sieve.pays(torch.float16, queries, 4096)
        torch.backends.mkldnn.enabled = True
        monkeypatch.setattr(has, lambda: False)
        assert not Sieve.pays(torch.float16, queries, 4096)
    finally:
        torch.backends.mkldnn.enabled = before

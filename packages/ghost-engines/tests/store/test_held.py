"""Stores in memory: what is found is what the files have, and no row is left out that counts."""

import shutil

import pytest
import torch
from search_kit import Rows, best_of, columns_of, stored, whitened
from sieve_kit import CASES, just_exceeded, scored_rows

from ghost_engines.search import Whitening, group_scores, scores, search
from ghost_engines.store import DamagedStoreError, GradientStore, Scorer, StoredRows, StoreError
from ghost_engines.store.half_sieve import HalfSieve, adds_up_in_float32
from ghost_engines.store.sieve import Sieve

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def forced(monkeypatch):
    """Use sieves whatever the CPU does well; return how many rows were scored all the same."""
    if not all(map(adds_up_in_float32, HALF)):
        pytest.skip("this torch adds up in half precision on this CPU, and no sieve is used")
    monkeypatch.setattr(HalfSieve, "pays", staticmethod(lambda rows, *_: rows in HALF))
    monkeypatch.setattr(
        Sieve, "pays", staticmethod(lambda rows, asked, *_, **known: len(asked) > 9)
    )
    return scored_rows(monkeypatch)


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("scores", "ids", "ordinals")
    )


# The bound


def queries_rounded_down(c):
    """Return queries of which rounding takes the most, and rows along what it takes."""
    signs = torch.randn(c).sign()
    rows = torch.stack([signs, -signs]).repeat(8, 1)
    return rows, torch.stack([signs * (1 + 2.0**-11), signs * (1 + 2.0**-8)])


def far_too_long(c):
    rows = torch.randn(60, c).sign() * 65504 * torch.rand(60, 1).round(decimals=1)
    return rows, torch.cat([rows[:3], torch.randn(3, c)])


def products_below_the_least(c):
    rows, queries = torch.zeros(9, c), torch.zeros(2, c)
    rows[:, 1] = 2.0**-24
    queries[:, 0], queries[:, 1] = 1, torch.tensor([1, -1]) * 2.0**-16
    return rows, queries


ALL = [*CASES, queries_rounded_down, far_too_long]


def assert_each_passes(path, rows, queries, by, ats):
    """Compare thresholds that each row just exceeds."""
    scorer = Scorer(stored(path, rows), queries, by, 1.0, None, None)
    scorer.scale(20 - queries.abs().amax(1, keepdim=True).frexp().exponent)
    lengths = rows.float().norm(dim=1)
    longest = lengths.max().item()
    kinds = {"cosine": by == "cosine"}
    for smallest in (False, True):
        sieve = HalfSieve(
            scorer._asked, scorer.columns, rows.dtype, longest, smallest=smallest, **kinds
        )
        found = scorer(rows) * (-1 if smallest else 1)
        for at, limit in just_exceeded(found, ats):
            sieve.raise_to(limit)
            passing = sieve.passing(rows, lengths)
            assert passing is None or at in passing
            few = slice(at, at + 1 + at % 3)
            passing = sieve.passing(rows[few].repeat(3, 1), lengths[few].repeat(3))
            assert passing is None or 0 in passing
            assert sieve.passing(rows[at : at + 1], lengths[at : at + 1]) is None


@pytest.mark.parametrize(
    ("case", "c"), [*((case, 257) for case in ALL), (products_below_the_least, 17)]
)
@pytest.mark.parametrize(
    ("by", "dtype"),
    [
        ("dot", HALF[0]),
        ("cosine", HALF[1]),
        pytest.param("dot", HALF[1], marks=pytest.mark.stress),
        pytest.param("cosine", HALF[0], marks=pytest.mark.stress),
    ],
)
def test_a_row_that_scores_the_least_bit_more_passes(tmp_path, forced, case, c, dtype, by):
    rows, queries = case(c)
    assert_each_passes(tmp_path, rows.to(dtype), queries, by, range(0, len(rows), 4))


@pytest.mark.stress
@pytest.mark.parametrize("case", [*ALL, products_below_the_least])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("c", [2, 31, 256, 1000])
@pytest.mark.parametrize("scale", [1, 2.0**-9, 2.0**9])
def test_each_row_passes_at_every_scale(tmp_path, forced, case, dtype, c, scale):
    for seed in range(3):
        torch.manual_seed(seed)
        rows, queries = case(c)
        queries[(queries == 0).all(1)] = 1
        rows = (rows * scale).clamp(-65504, 65504).to(dtype)
        for by in ("dot", "cosine"):
            assert_each_passes(tmp_path / f"{seed}{by}", rows, queries, by, range(len(rows)))


def test_sums_in_half_precision_are_noticed(monkeypatch):
    def added_in_half(rows, query):
        total = torch.zeros(len(rows), dtype=rows.dtype)
        for column in range(rows.shape[1]):
            total += rows[:, column] * query[column]
        return total

    monkeypatch.setattr(torch, "mv", added_in_half)
    for dtype in HALF:
        assert not adds_up_in_float32.__wrapped__(dtype)
    monkeypatch.setattr(torch, "mv", lambda rows, query: (rows.float() @ query.float()).to(rows))
    for dtype in HALF:
        assert adds_up_in_float32.__wrapped__(dtype)


# Searches


@pytest.mark.parametrize(
    ("by", "largest", "dtype"),
    [  # by default, any two of them meet
        pytest.param(by, largest, dtype, marks=() if quick == largest else pytest.mark.stress)
        for largest in (True, False)
        for by, dtype, quick in (
            ("dot", HALF[0], True),
            ("cosine", HALF[0], False),
            ("dot", HALF[1], False),
            ("cosine", HALF[1], True),
            ("dot", torch.float32, True),
            ("cosine", torch.float32, False),
        )
    ],
)
def test_it_finds_what_comparing_everything_finds(tmp_path, forced, by, largest, dtype):
    rows = (torch.randn(3000, 64) * torch.rand(3000, 1).add(0.2)).to(dtype)
    store = stored(tmp_path, rows, unit=800)
    held = store.held()
    for q in (1, 2, 30):
        queries = torch.randn(q, 64)
        forced.clear()
        found = held.search(queries, k=7, by=by, largest=largest, block=300)
        assert dtype not in HALF or sum(forced) < 0.8 * len(rows)
        exact = queries.double() @ rows.double().T
        if by == "cosine":
            exact /= queries.double().norm(dim=1, keepdim=True) * rows.double().norm(dim=1)
        assert torch.equal(found.ordinals, best_of(exact, 7, 1 if largest else -1))
        assert same(found, store.search(queries, k=7, by=by, largest=largest))


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(2, 60))]
)
def test_equal_scores_and_odd_rows_come_as_from_the_files(tmp_path, forced, seed):
    torch.manual_seed(seed)
    dtype = HALF[seed % 2]
    rows = torch.randint(-2, 3, (2000, 16)) * 2.0 ** torch.randint(-24, 12, ()).item()
    rows[torch.randint(0, 2000, (300,))] = rows[5].clone()
    rows[torch.randint(0, 2000, (300,))] = 0
    rows[torch.randint(0, 2000, (3,))] *= 2.0 ** torch.randint(0, 5, ()).item()
    store = stored(tmp_path, rows.clamp(-65504, 65504).to(dtype), unit=300 + 200 * (seed % 5))
    held = store.held()
    for q in (1, 2, 30):
        queries = torch.randint(-2, 3, (q, 16)) * 2.0 ** torch.randint(-99, 99, ()).item()
        queries[0, 0] = queries[0, 0].where(queries.any(), 1)
        for by in ("dot", "cosine"):
            queries[(queries == 0).all(1)] = float(by == "cosine")
            for k, largest in ((1, True), (9, False), (40, True)):
                given = {"k": k, "by": by, "largest": largest, "block": 300}
                assert same(held.search(queries, **given), store.search(queries, **given))


def test_a_query_of_zeros_is_no_hindrance(tmp_path, forced):
    rows = torch.randn(2000, 16).half()
    found = stored(tmp_path, rows).held().search(torch.zeros(1, 16), k=2, block=300)
    assert found.ordinals.tolist() == [[0, 1]]
    assert found.scores.tolist() == [[0, 0]]
    assert sum(forced) == 300


def test_what_else_compares_rows_takes_those_in_memory(tmp_path, forced):
    rows, queries = torch.randn(400, 12).half(), torch.randn(1, 12)
    store = stored(tmp_path, rows, unit=150)
    held = store.held()
    groups = torch.arange(400) % 3
    white = Whitening.of(held, damping=0.1, blocks="all", save=False)
    exact = whitened(rows, queries, 0.1, [list(range(12))])
    assert torch.equal(held.search(queries, 5, white).ordinals, best_of(exact, 5))
    some = columns_of("b.0.weight", "b.1.weight")
    for by in ("dot", "cosine"):
        for parameters in ("b.*", ["a.*", "c.*"]):
            given = {"by": by, "parameters": parameters, "k": 5}
            assert same(held.search(queries, **given), store.search(queries, **given))
    exact = queries[:, some].double() @ rows[:, some].double().T
    assert torch.equal(held.search(queries, 5, parameters="b.*").ordinals, best_of(exact, 5))
    assert torch.equal(scores(held, queries).scores, scores(store, queries).scores)
    grouped = [group_scores(each, queries, groups).scores for each in (held, store)]
    assert torch.equal(*grouped)
    both = search([held, store], [queries, queries], k=3)
    assert same(both, search([store, store], [queries, queries], k=3))


# What is held


def test_it_reads_nothing_more_and_is_let_go(tmp_path):
    store = stored(tmp_path / "store", torch.randn(50, 12))
    queries = torch.randn(2, 12)
    found, held = store.search(queries), store.held(progress=False)
    assert "held in memory" in repr(held)
    assert "held" not in repr(store)
    assert held.held() is held
    shutil.rmtree(tmp_path / "store")
    assert same(held.search(queries), found)
    assert len(held) == 50
    with pytest.raises(DamagedStoreError):
        store.search(queries)


def test_rows_that_replace_others_and_no_rows_can_be_held(tmp_path):
    with GradientStore.create(
        tmp_path / "twice", Rows(torch.float16, 16), unit=40, duplicates="replace"
    ) as store:
        for _ in range(2):
            ids = torch.randperm(200)[:150]
            store.append(StoredRows(ids, torch.randn(150, 16).half(), None))
    store = GradientStore.open(tmp_path / "twice")
    queries = torch.randn(3, 16)
    assert same(store.held().search(queries), store.search(queries))
    empty = stored(tmp_path / "empty", torch.empty(0, 16).half()).held()
    assert empty.search(queries[:1]).ids.shape == (1, 0)


def test_rows_that_were_altered_are_not_held(tmp_path):
    store = stored(tmp_path, torch.randn(50, 12))
    shard = max((tmp_path / "shards").rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedStoreError, match="altered"):
        store.held()


def test_a_store_that_is_written_is_not_held(tmp_path):
    with GradientStore.create(tmp_path, Rows()) as store:
        store.append(StoredRows(torch.arange(3), torch.randn(3, 12), None))
        with pytest.raises(StoreError, match=r"(?s)open for writing.*held\(\)"):
            store.held()
    assert store.held().search(torch.randn(1, 12)).ids.shape == (1, 3)

"""Whitened scores against the inverse itself, in float64."""

import pytest
import torch
from search_kit import BLOCKS, K, Rows, best_of, columns_of, stored, whitened

from ghost_core import UnknownNameError
from ghost_engines.search import Whitening, scores
from ghost_engines.store import (
    DamagedStoreError,
    GradientStore,
    StoredRows,
    StoreError,
    export,
    merge,
)

GROUPS = {"parameter": [columns_of(name) for name in BLOCKS], "all": [list(range(K))]}


def skewed(n, dtype=torch.float32):
    """Return rows that are long in some directions and correlated."""
    return (torch.randn(n, K) @ torch.randn(K, K) * torch.logspace(-1, 1, K)).to(dtype)


@pytest.mark.parametrize("blocks", GROUPS)
@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_it_is_the_inverse_of_the_second_moments(tmp_path, blocks, damping, dtype):
    rows, queries = skewed(70, dtype), torch.randn(4, K, dtype=torch.float64)
    before = queries.clone()
    store = stored(tmp_path / "g", rows)
    whitening = Whitening.of(store, damping, blocks)
    expected = whitened(rows, queries, damping, GROUPS[blocks])
    found = scores(store, queries, whitening).scores.double()
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert torch.equal(queries, before)
    assert torch.equal(store.search(queries, 6, whitening).ordinals, best_of(expected, 6))
    own = whitened(rows, rows, damping, GROUPS[blocks]).diagonal()
    torch.testing.assert_close(whitening.self_influence(store, block=9), own)


@pytest.mark.parametrize("blocks", GROUPS)
def test_of_some_parameters_it_is_that_of_their_columns_alone(tmp_path, blocks):
    rows, queries = skewed(50, torch.float64), torch.randn(2, K, dtype=torch.float64)
    store = stored(tmp_path / "g", rows)
    whitening = Whitening.of(store, 0.1, blocks)
    whitening.self_influence(store)  # factors of whole blocks are kept
    names = ("b.0.weight", "c.weight")
    groups = [columns_of(*names)] if blocks == "all" else [columns_of(name) for name in names]
    expected = whitened(rows, queries, 0.1, groups)
    found = scores(store, queries, whitening, parameters=list(names)).scores
    torch.testing.assert_close(found, expected)
    own = whitening.self_influence(store, parameters=list(names))
    torch.testing.assert_close(own, whitened(rows, rows, 0.1, groups).diagonal())


def test_it_is_kept_beside_the_store_for_every_damping(tmp_path, monkeypatch):
    rows, queries = skewed(30), torch.randn(2, K)
    store = stored(tmp_path / "g", rows)
    Whitening.of(store)
    again = GradientStore.open(tmp_path / "g")
    monkeypatch.setattr(GradientStore, "scan", None)
    kept = Whitening.of(again, 2.0)
    monkeypatch.undo()
    expected = whitened(rows, queries, 2.0, GROUPS["parameter"])
    torch.testing.assert_close(
        scores(again, queries, kept).scores.double(), expected, rtol=1e-4, atol=1e-4
    )
    again.verify()


def test_what_is_of_other_rows_is_refused_until_it_is_renewed(tmp_path):
    store = stored(tmp_path / "g", skewed(20))
    Whitening.of(store)
    with GradientStore.resume(tmp_path / "g", Rows()) as more:
        more.append(StoredRows(torch.arange(3), torch.randn(3, K), None))
        with pytest.raises(StoreError, match="not committed") as caught:
            Whitening.of(more)
        assert "commit()" in caught.value.remedy
    grown = GradientStore.open(tmp_path / "g")
    with pytest.raises(StoreError, match="is of other rows") as caught:
        Whitening.of(grown)
    assert "20 rows" in caught.value.reason
    new = Whitening.of(grown, renew=True)
    queries = torch.randn(1, K)
    expected = whitened(grown.rows(), queries, 0.1, GROUPS["parameter"])
    torch.testing.assert_close(
        scores(grown, queries, new).scores.double(), expected, rtol=1e-4, atol=1e-4
    )
    assert not list(tmp_path.glob("g/whitening/*tmp*"))


def test_a_merge_and_an_export_leave_it_behind_and_one_of_fewer_rows_is_refused(tmp_path):
    first, second, queries = skewed(20), skewed(15), torch.randn(2, K)
    Whitening.of(stored(tmp_path / "a", first))
    with GradientStore.create(tmp_path / "b", Rows(), unit=16) as other:
        other.append(StoredRows(torch.arange(15) * 10, second, None))
    merge([tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m/whitening").exists()
    Whitening.of(GradientStore.open(tmp_path / "m"))
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")  # goes on
    with pytest.raises(StoreError, match="is of other rows") as caught:
        Whitening.of(merged)
    kept = tmp_path / "m/whitening/parameter.safetensors"
    assert f"remove {kept}" in caught.value.remedy
    kept.unlink()
    expected = whitened(torch.cat([first, second]), queries, 0.1, GROUPS["parameter"])
    torch.testing.assert_close(
        scores(merged, queries, Whitening.of(merged)).scores.double(),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    export(merged, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["ids.npy", "rows.npy"]


def test_a_reader_keeps_the_digest_of_the_rows_that_it_was_opened_with(tmp_path):
    first, second = skewed(10), skewed(30)
    writer = GradientStore.create(tmp_path / "g", Rows())
    writer.append(StoredRows(torch.arange(10), first, None))
    writer.commit()
    old = GradientStore.open(tmp_path / "g")
    digest = old.digest()
    assert digest == writer.digest()
    writer.append(StoredRows(torch.arange(10, 40), second, None))
    writer.close()
    assert old.digest() == digest
    Whitening.of(old)
    assert torch.equal(
        Whitening.of(old).moments["a.weight"], Whitening.of(old, save=False).moments["a.weight"]
    )
    grown = GradientStore.open(tmp_path / "g")
    assert grown.digest() == writer.digest() != digest
    with pytest.raises(StoreError, match="is of other rows") as caught:
        Whitening.of(grown)
    assert "10 rows" in caught.value.reason
    with GradientStore.resume(tmp_path / "g", Rows()) as more:
        more.append(StoredRows(torch.arange(40, 50), first, None))
    with pytest.raises(StoreError, match="had 40 rows and has 50 now"):
        writer.digest()


def test_what_is_kept_of_fewer_rows_is_refused_whatever_its_digest(tmp_path):
    store = stored(tmp_path / "g", skewed(20))
    Whitening.of(store)
    path = tmp_path / "g/whitening/parameter.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"n":"20"', b'"n":"10"'))
    assert path.read_bytes() != content
    with pytest.raises(StoreError, match="is of other rows"):
        Whitening.of(store)


def test_rows_that_later_ones_replace_do_not_count_where_they_are_not_read(tmp_path):
    rows = skewed(30)
    with GradientStore.create(tmp_path / "g", Rows(), unit=16, duplicates="replace") as writer:
        writer.append(StoredRows(torch.arange(30) % 20, rows, None))
        writer.commit()
        Whitening.of(writer)
    store = GradientStore.open(tmp_path / "g")
    with pytest.raises(StoreError, match="is of other rows"):
        Whitening.of(store)
    found = Whitening.of(store, renew=True).moments["a.weight"]
    part = rows[10:, :3].double()
    torch.testing.assert_close(found, part.mT @ part / 20)
    assert torch.equal(Whitening.of(GradientStore.open(store.path)).moments["a.weight"], found)


def test_second_moments_of_other_blocks_are_refused(tmp_path):
    store = stored(tmp_path / "g", skewed(20))
    Whitening.of(store)
    folder = tmp_path / "g/whitening"
    (folder / "parameter.safetensors").rename(folder / "all.safetensors")
    with pytest.raises(StoreError, match="blocks='parameter', not of 'all'"):
        Whitening.of(store, blocks="all")


def test_second_moments_may_be_those_of_another_store_of_the_kind(tmp_path):
    rows, others, queries = skewed(20), skewed(30, torch.float64), torch.randn(2, K)
    store, other = stored(tmp_path / "g", rows), stored(tmp_path / "h", others)
    found = scores(store, queries, Whitening.of(other)).scores.double()
    whole = whitened(others, queries, 0.1, GROUPS["parameter"], rows)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    strange = stored(tmp_path / "i", rows, seed=1)
    with pytest.raises(StoreError, match=r"of another kind than .*seed: 0 in the store, 1 now"):
        store.search(queries, by=Whitening.of(strange))
    later = stored(tmp_path / "j", rows, info={"model": "b"})
    first = stored(tmp_path / "k", rows, info={"model": "a"})
    with pytest.raises(StoreError, match=r"info\.model"):
        Whitening.of(later).self_influence(first)


def test_nothing_is_kept_on_request(tmp_path):
    store = stored(tmp_path / "g", skewed(20))
    Whitening.of(store, save=False)
    assert not (tmp_path / "g/whitening").exists()


def test_a_file_that_was_altered_is_damaged(tmp_path):
    store = stored(tmp_path / "g", skewed(20))
    Whitening.of(store)
    path = tmp_path / "g/whitening/parameter.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedStoreError, match="was altered"):
        Whitening.of(store)


def test_what_has_no_inverse_is_refused(tmp_path):
    rows = torch.ones(5, K)
    rows[:, columns_of("a.weight")] = 0
    store = stored(tmp_path / "g", rows)
    with pytest.raises(StoreError, match=r"moments of b\.0\.weight cannot") as caught:
        store.search(rows, by=Whitening.of(store, 0.0))
    assert "raise the damping" in caught.value.remedy
    zero = Whitening.of(store, 0.1).self_influence(store, parameters="a")
    assert zero.tolist() == [0.0] * 5


def test_a_direction_that_rounding_alone_fills_is_refused_and_damping_helps(tmp_path):
    rows = torch.randn(200, K, dtype=torch.float64)
    rows[:, 2] = 0.3 * rows[:, 0] + 0.7 * rows[:, 1]
    rows[:, 8] = rows[:, 7] / 3
    store = stored(tmp_path / "g", rows)
    for blocks, name in (("parameter", r"a\.weight"), ("all", "all columns")):
        with pytest.raises(StoreError, match=f"moments of {name} cannot .* damping=0"):
            store.search(rows[:2], by=Whitening.of(store, 0, blocks))
        found = scores(store, rows[:2], Whitening.of(store, 1e-3, blocks)).scores
        torch.testing.assert_close(found, whitened(rows, rows[:2], 1e-3, GROUPS[blocks]))
    steep = stored(tmp_path / "h", torch.randn(50, K).double() * torch.logspace(0, -10, K).double())
    assert Whitening.of(steep, 0, "all").self_influence(steep).mean() == pytest.approx(K)


@pytest.mark.parametrize(("size", "reason"), [(1e-170, "underflows"), (1e160, "overflows")])
def test_rows_whose_squares_leave_float64_are_refused(tmp_path, size, reason):
    rows = torch.randn(20, K, dtype=torch.float64)
    rows[:, columns_of("c.weight")] *= size
    store = stored(tmp_path / "g", rows)
    with pytest.raises(StoreError, match=r"in c\.weight") as caught:
        Whitening.of(store)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"damping": "x"}, StoreError, "damping must be a number"),
        ({"device": "nope"}, StoreError, "device must be one that is there, not 'nope'"),
        ({"blocks": "layer"}, UnknownNameError, "all, parameter"),
        ({"damping": -1.0}, StoreError, "damping must be 0 or more"),
        ({"damping": float("nan")}, StoreError, "damping must be 0 or more"),
    ],
)
def test_unknown_options_are_refused(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        Whitening.of(stored(tmp_path / "g", skewed(5)), **given)


def test_a_store_without_rows_has_no_second_moments(tmp_path):
    with pytest.raises(StoreError, match="without rows"):
        Whitening.of(stored(tmp_path / "g", torch.empty(0, K)))


def test_what_a_whitening_knows_nothing_of_adds_nothing_or_is_refused(tmp_path):
    known, rows, queries = torch.randn(40, K), torch.randn(40, K), torch.randn(2, K)
    known[:, columns_of("b.0.weight")] = 0
    own, other = stored(tmp_path / "own", known), stored(tmp_path / "other", rows)
    by, here = Whitening.of(own), [columns_of(name) for name in BLOCKS if name != "b.0.weight"]
    found = scores(own, queries, by=by).scores.double()
    torch.testing.assert_close(found, whitened(known, queries, 0.1, here), rtol=1e-4, atol=1e-4)
    for ask in (lambda: other.search(queries, by=by), lambda: by.self_influence(other)):
        with pytest.raises(StoreError, match=r"only zeros in b\.0\.weight"):
            ask()
    queries[:, columns_of("b.0.weight")] = 0  # so that no row adds anything there
    found = scores(other, queries, by=by).scores.double()
    expected = whitened(known, queries, 0.1, here, searched=rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = stored(tmp_path / "again", torch.cat([known, known]))
    assert torch.equal(by.self_influence(again)[:40], by.self_influence(own))


@pytest.mark.parametrize(
    ("old", "new"), [("a.weight", "a.weighs"), ("[3,3]", "[9,1]"), ("F64", "I64")]
)
def test_moments_under_another_name_or_of_another_kind_are_damaged(tmp_path, old, new):
    store = stored(tmp_path, torch.randn(20, K))
    Whitening.of(store)
    path = tmp_path / "whitening/parameter.safetensors"
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(DamagedStoreError, match="it has no moments of a"):
        Whitening.of(store)

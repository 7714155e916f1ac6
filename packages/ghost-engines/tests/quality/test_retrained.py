"""LDS and removal curves of trainings of which everything is known."""

from functools import partial

import numpy as np
import pytest
import torch
from quality_kit import (
    Additive,
    N,
    Q,
    dies,
    effects,
    returns_nan,
    returns_too_few,
    returns_words,
    weighed,
)

from ghost_engines.quality import QualityError, lds, removal_curve
from ghost_engines.quality.datamodeling import rank_correlation
from ghost_engines.search import RowScores

IDS = np.arange(N) * 10


def spearman(a, b):
    """Return the correlation of ranks: how many are less, and half of those that are equal."""
    ranks = [[(x < each).sum() + (x == each).sum() / 2 for each in x] for x in (a, b)]
    return np.corrcoef(ranks)[0, 1]


def test_right_scores_have_an_lds_of_one_and_opposite_ones_of_minus_one():
    found = lds(effects(), Additive(), ids=IDS, subsets=30)
    np.testing.assert_allclose(found.by_query, np.ones(Q))
    assert found.mean == pytest.approx(1)
    assert repr(found) == "LDS(1.000 ± 0.000, 30 subsets, Q=3)"
    np.testing.assert_allclose(5 - found.predicted, found.losses)
    table = RowScores(torch.from_numpy(IDS), -torch.from_numpy(effects()))
    np.testing.assert_allclose(lds(table, Additive(), subsets=30).by_query, -np.ones(Q))


def test_it_is_spearmans_correlation_over_subsets_of_the_share():
    scores, seen = np.random.default_rng(1).normal(size=(Q, N)).round(1), []

    def train(ids, seed):
        seen.append((ids, seed))
        return Additive(noise=1.0)(ids, seed)

    found = lds(scores, train, ids=IDS, subsets=25, share=0.3, seeds=2, seed=7)
    assert [seed for _, seed in seen] == [7, 8] * 25
    for m, (ids, _) in enumerate(seen[::2]):
        assert len(ids) == len(set(ids)) == 6
        np.testing.assert_array_equal(ids, seen[2 * m + 1][0])
        np.testing.assert_allclose(found.predicted[m], scores[:, ids // 10].sum(1))
        both = [Additive(noise=1.0)(ids, seed) for seed in (7, 8)]
        np.testing.assert_allclose(found.losses[m], np.mean(both, 0))
    expected = [spearman(*pair) for pair in zip(found.predicted.T, -found.losses.T, strict=True)]
    np.testing.assert_allclose(found.by_query, expected)


def test_equal_values_share_a_rank():
    a, b = np.array([1.0, 2, 2, 3, 3, 3, 0]), np.array([5.0, 1, 5, 5, 2, 2, 2])
    assert rank_correlation(a, b) == pytest.approx(spearman(a, b))
    assert np.isnan(rank_correlation(a, np.ones(7)))


def test_what_is_done_is_not_done_again(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "kept"
    given = {"ids": IDS, "subsets": 8, "folder": folder}
    log.with_suffix(".limit").write_text("5")
    with pytest.raises(QualityError, match=r"train on 10 samples from seed 0 raised .*machine"):
        lds(effects(), Additive(log), **given)
    assert len(list(folder.glob("*.json"))) == 5 + 1
    log.unlink()
    log.with_suffix(".limit").unlink()
    found = lds(effects(), Additive(log), **given)
    assert len(log.read_text().splitlines()) == 3
    np.testing.assert_array_equal(found.losses, lds(effects(), Additive(log), **given).losses)
    assert len(log.read_text().splitlines()) == 3
    np.testing.assert_array_equal(
        found.losses, lds(effects(), Additive(), **given | {"folder": None}).losses
    )
    removal_curve(effects(), Additive(log), ids=IDS, shares=[0.5], seeds=1, folder=folder)
    assert len(log.read_text().splitlines()) == 6
    with pytest.raises(QualityError, match="has trainings by quality_kit:Add") as caught:
        lds(effects(), returns_nan, **given)
    assert "another folder" in caught.value.remedy
    with pytest.raises(QualityError, match="has 3 losses, not 2"):
        lds(effects()[:2], Additive(log), **given)
    for path in set(folder.glob("*.json")) - {folder / "train.json"}:
        path.write_text("[1")
    with pytest.raises(QualityError, match="does not hold a training: remove it"):
        lds(effects(), Additive(log), **given)


def test_a_folder_belongs_to_one_function_with_its_arguments(tmp_path):
    given = {"subsets": 3, "folder": tmp_path}
    one, other = (partial(weighed, weight=torch.tensor(each)) for each in (2.0, 3.0))
    first = lds(effects(), one, **given).losses
    same = partial(weighed, weight=torch.tensor(2.0))  # its memory has another address
    np.testing.assert_array_equal(lds(effects(), same, **given).losses, first)
    with pytest.raises(QualityError, match="kit:weighed with other arguments") as caught:
        lds(effects(), other, **given)
    assert "another folder" in caught.value.remedy
    assert "sets" in caught.value.reason
    with pytest.raises(QualityError, match="by quality_kit:weighed, not by quality_kit:Add"):
        removal_curve(effects(), Additive(), folder=tmp_path)
    nested = {"folder": tmp_path / "nested", "subsets": 3}
    with pytest.raises(QualityError, match="cannot be told from other functions"):
        lds(effects(), lambda ids, seed: weighed(ids, seed), **nested)
    for text in ("[]", "{", "[[1, 2]]"):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(QualityError, match=r"train\.json does not say whose"):
            lds(effects(), one, **given)


@pytest.mark.stress  # each imports torch
def test_several_processes_do_what_one_does(tmp_path):
    alone = lds(effects(), Additive(noise=1.0), ids=IDS, subsets=5)
    both = lds(effects(), Additive(noise=1.0), ids=IDS, subsets=5, processes=2, folder=tmp_path)
    np.testing.assert_array_equal(alone.losses, both.losses)
    assert len(list(tmp_path.glob("*.json"))) == 5 + 1
    with pytest.raises(QualityError, match="needed is the loss"):
        lds(effects(), returns_too_few, ids=IDS, subsets=5, processes=2)
    with pytest.raises(QualityError, match="has died") as caught:
        lds(effects(), dies, subsets=5, processes=2)
    assert "__main__" in caught.value.remedy


def test_a_function_that_other_processes_cannot_import_is_refused():
    with pytest.raises(QualityError, match="cannot be sent to other processes") as caught:
        lds(effects(), lambda ids, seed: Additive()(ids, seed), ids=IDS, processes=2)
    assert "processes=1" in caught.value.remedy


def test_losses_rise_as_the_highest_scores_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    found = removal_curve(effects(), Additive(noise=0.1), ids=IDS, shares=[0.1, 0.5], seeds=4)
    totals = effects().sum(0)
    order = (-totals).argsort()
    shaken = np.array([np.random.default_rng(s).normal(size=Q).mean() * 0.1 for s in range(4)])
    for count, losses in zip((2, 10), found.by_score, strict=True):
        np.testing.assert_allclose(losses, 5 - totals[order[count:]].sum() / Q + shaken)
    np.testing.assert_allclose(found.whole, 5 - totals.sum() / Q + shaken)
    rest = ((found.at_random - 5 - shaken) * -Q).round(9)
    assert len(set(rest[0])) > 1  # drawn anew for each seed
    for count, sums in zip((2, 10), rest, strict=True):
        draws = [np.random.default_rng(s).permutation(N)[count:] for s in range(4)]
        np.testing.assert_allclose(sums, [totals[kept].sum() for kept in draws], atol=1e-8)
    assert (found.gap > 0).all()
    found.plot(tmp_path / "curve.svg")
    assert "highest scores" in (tmp_path / "curve.svg").read_text()
    assert repr(found).startswith("RemovalCurve(10%: +")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scores": np.zeros(N)}, r"floating \[Q, N\].*\[20\]"),
        ({"scores": np.zeros((Q, N), dtype=int)}, "int64"),
        ({"scores": [[1.0]]}, "not a list"),
        ({"scores": np.full((Q, N), np.nan)}, "60 scores are not finite"),
        ({"ids": np.zeros(N, dtype=int)}, "more than once"),
        ({"ids": np.arange(N - 1)}, "20 integers"),
        ({"ids": np.arange(N) / 2}, "20 integers"),
        ({"train": 3}, "must be a function"),
        ({"train": returns_too_few}, r"returned float64 of shape \[2\]"),
        ({"train": returns_nan}, "not finite"),
        ({"train": returns_words}, "<U1"),
        ({"subsets": 2}, "subsets must be at least 3"),
        ({"share": 1.0}, "some must be in a subset, not all"),
        ({"share": 0.01}, "is 0"),
        ({"share": float("nan")}, "share must be a number above 0 and below 1, not nan"),
        ({"share": "x"}, "share must be a number"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(QualityError, match=message):
        lds(**{"scores": effects(), "train": Additive(), "ids": IDS, "subsets": 3} | given)


@pytest.mark.parametrize("shares", [[float("nan")], [float("inf")], ["a"], 0.5, "a", [], [0.0]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(QualityError, match="shares"):
        removal_curve(effects(), Additive(), ids=IDS, shares=shares, seeds=1)


def test_equal_scores_have_no_correlation():
    found = lds(np.ones((Q, N)), Additive(), ids=IDS, subsets=4)
    assert np.isnan(found.by_query).all()
    assert np.isnan([found.mean, found.error]).all()
    assert repr(found).startswith("LDS(none: all predictions or all losses of a query are equal")


def test_ids_are_given_once():
    table = RowScores(torch.from_numpy(IDS), torch.from_numpy(effects()))
    with pytest.raises(QualityError, match="has ids of its own"):
        lds(table, Additive(), ids=IDS)
    with pytest.raises(QualityError, match="keep some"):
        removal_curve(table, Additive(), shares=[1.0])

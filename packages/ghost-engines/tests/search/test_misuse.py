"""What is no store, metric, weight, device or position is refused by its name."""

import pytest
import torch
from search_kit import K, stored

from ghost_engines.search import (
    ApproximateIndex,
    Whitening,
    near_duplicates,
    score_parts,
    scores,
    search,
)
from ghost_engines.store import GradientStore, StoreError

ASKED = torch.ones(1, K)

NO_STORE = {
    "whitening": Whitening.of,
    "near_duplicates": lambda store: near_duplicates(store, 0.5),
    "score_parts": lambda store: score_parts(store, ASKED, torch.zeros(1, 1, dtype=torch.int64)),
    "search": lambda store: search(store, ASKED),
    "several": lambda store: search([store], [ASKED]),
    "approximate": ApproximateIndex.of,
}


@pytest.mark.parametrize("ask", NO_STORE.values(), ids=NO_STORE)
@pytest.mark.parametrize("given", ["path", GradientStore], ids=["path", "class"])
def test_what_is_no_store_is_refused(ask, given):
    with pytest.raises(StoreError, match="is no store") as caught:
        ask(given)
    assert "GradientStore.open" in caught.value.remedy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": Whitening}, "Whitening is a class"),
        ({"device": "nope"}, "device must be one that is there, not 'nope'"),
        ({"device": 1.5}, "device must be one that is there"),
    ],
)
def test_options_that_are_none_are_refused(tmp_path, given, message):
    store = stored(tmp_path / "g", torch.randn(5, K))
    for ask in (store.search, lambda *asked, **options: scores(store, *asked, **options)):
        with pytest.raises(StoreError, match=message):
            ask(ASKED, **given)


def test_weights_are_numbers(tmp_path):
    store = stored(tmp_path / "g", torch.randn(5, K))
    with pytest.raises(StoreError, match="weights must be a number, not 'x'"):
        search([store], [ASKED], weights=["x"])
    found = search([store], [ASKED], weights=[torch.tensor(2.0)])
    assert torch.equal(found.scores, 2 * store.search(ASKED).scores)


@pytest.mark.parametrize("ordinals", [[[0]], torch.zeros(1, 1), torch.zeros(1).long()])
def test_positions_are_whole_numbers_for_each_query(tmp_path, ordinals):
    store = stored(tmp_path / "g", torch.randn(5, K))
    with pytest.raises(StoreError, match=r"ordinals must be int64 \[1, k\]"):
        score_parts(store, ASKED, ordinals)

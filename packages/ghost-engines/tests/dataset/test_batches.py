"""Batches of any kind of data set, and the ids of their samples."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from dataset_kit import MapStyle, Streamed, classifier, draw, losses, samples
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ghost_core import CaptureError
from ghost_engines import score_dataset, with_ids
from ghost_engines.dataset.batches import Batches

DATA = draw(11)
PARTS = [(DATA[0][at : at + 4], DATA[1][at : at + 4]) for at in (0, 4, 8)]
Pair = namedtuple("Pair", "inputs labels")


@pytest.mark.parametrize(
    ("data", "total"),
    [
        (samples(DATA), 11),
        (MapStyle(DATA), 11),
        (Streamed(DATA), None),
        (DataLoader(samples(DATA), batch_size=4), 11),
        (DataLoader(Streamed(DATA), batch_size=4), None),
        (PARTS, 11),
        (iter(PARTS), None),
        (DATA, 11),
    ],
    ids=lambda each: type(each).__name__,
)
def test_every_kind_of_data_gives_the_same_samples(data, total):
    batches = Batches(data, "train", 4)
    assert batches.total == total
    random_state = torch.get_rng_state()
    found = list(batches.with_ids(None))
    assert [ids.tolist() for ids, _ in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for at in (0, 1):
        assert torch.equal(torch.cat([batch[at] for _, batch in found]), DATA[at])
    if not isinstance(data, DataLoader):  # a loader of the user's draws a number of its own
        assert torch.equal(torch.get_rng_state(), random_state)


def test_a_whole_batch_is_cut_with_all_that_is_in_it():
    whole = {
        "inputs": DATA[0],
        "nested": (DATA[1], [list("abcdefghijk"), 3]),
        "array": np.arange(11),
        "scale": torch.tensor(2.0),
        "name": "none",
    }
    first, *_, last = Batches(whole, "train", 4)
    assert torch.equal(last["inputs"], DATA[0][8:])
    assert torch.equal(last["nested"][0], DATA[1][8:])
    assert last["nested"][1] == [["i", "j", "k"], 3]
    assert last["array"].tolist() == [8, 9, 10]
    assert (first["scale"], first["name"]) == (torch.tensor(2.0), "none")
    (pair,) = Batches(Pair(*DATA), "train", 32)
    assert isinstance(pair, Pair)
    assert [type(part) for part in Batches(UserDict(inputs=DATA[0]), "train", 6)] == [UserDict] * 2


def test_ids_are_under_a_key_or_what_a_function_returns():
    batches = [{"id": torch.tensor([7, 3]), "x": torch.zeros(2, 5)}, {"id": [5], "x": [0]}]
    assert [ids.tolist() for ids, _ in Batches(batches, "train", 4).with_ids("id")] == [[7, 3], [5]]
    ((_, batch),) = Batches([{"sample_id": [5]}], "train", 4).with_ids("sample_id")
    assert batch == {"sample_id": [5]}  # the user names it, and has it
    pairs = [([4, 2], DATA[0][:2])]
    ((ids, batch),) = Batches(pairs, "train", 4).with_ids(lambda batch: batch[0])
    assert ids.tolist() == [4, 2]
    assert batch is pairs[0]


@pytest.mark.parametrize("as_dict", [False, True])
def test_ids_that_samples_carry_are_theirs_and_losses_do_not_see_them(as_dict):
    """Also where a loader shuffles, and of targets."""
    data = [{"x": DATA[0][at], "y": DATA[1][at]} for at in range(11)] if as_dict else samples(DATA)
    numbered = with_ids(data)
    order = torch.Generator().manual_seed(4)
    shuffled = DataLoader(numbered, batch_size=4, shuffle=True, generator=order)

    def loss(model, batch):
        if as_dict:
            assert batch.keys() == {"x", "y"}
        return losses(model, tuple(batch.values()) if as_dict else batch)

    model = classifier()
    table = score_dataset(model, loss, shuffled, {"val": numbered})
    plain = score_dataset(model, losses, DATA, {"val": DATA})
    assert table.ids.tolist() != plain.ids.tolist() == sorted(table.ids.tolist())
    np.testing.assert_allclose(table.scores, plain.scores[table.ids], rtol=1e-12)


def test_ids_go_with_the_scores_of_their_samples():
    model = classifier()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    plain = score_dataset(model, losses, DATA, {"val": PARTS[0]})
    shuffled = [(order[at : at + 3], (DATA[0][order[at : at + 3]], DATA[1][order[at : at + 3]]))
                for at in range(0, 11, 3)]  # fmt: skip
    table = score_dataset(
        model, lambda model, batch: losses(model, batch[1]), shuffled,
        {"val": [(None, PARTS[0])]}, ids=lambda batch: batch[0],
    )  # fmt: skip
    assert table.ids.tolist() == order.tolist()
    np.testing.assert_allclose(table.scores, plain.scores[order], rtol=1e-12)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(samples(DATA), batch_size=4, shuffle=True),
        DataLoader(samples(DATA), sampler=RandomSampler(samples(DATA))),
        DataLoader(
            samples(DATA), batch_sampler=type("Own", (BatchSampler,), {})(range(11), 4, False)
        ),
    ],
)
def test_a_loader_that_shuffles_needs_ids(loader):
    with pytest.raises(CaptureError, match=r"does not go through .*\nReason: .*\nRemedy: "):
        list(Batches(loader, "train", 4).with_ids(None))
    assert len(list(Batches(loader, "train", 4).with_ids(lambda batch: batch[1]))) >= 3


@pytest.mark.parametrize(
    ("data", "ids", "what"),
    [
        ([(DATA[0], DATA[1][:3])], None, "type tuple does not tell .*\nReason: .* are 3, 11"),
        ({"a": torch.tensor(3)}, None, "type dict does not tell .*\nReason: .* are none"),
        ([{"a": DATA[1]}], "id", "no ids under 'id'\nReason: it is a dict with a"),
        ([DATA], "id", "no ids under 'id'\nReason: it is a tuple"),
        ([DATA], lambda batch: batch[0], "ids"),
    ],
)
def test_batches_that_do_not_tell_their_samples_are_refused(data, ids, what):
    with pytest.raises(CaptureError, match=what):
        list(Batches(data, "train", 4).with_ids(ids))


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_a_batch_has_a_whole_number_of_samples(size):
    with pytest.raises(CaptureError, match="batch_size must be at least 1"):
        score_dataset(classifier(), losses, DATA, {"val": DATA}, batch_size=size)

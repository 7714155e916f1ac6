"""The set of stored ids against python's."""

import random

import pytest
import torch

from ghost_engines.store.seen import SeenIds, twice


@pytest.mark.parametrize("seed", range(5))
def test_known_ids_are_those_of_a_set(seed):
    draw = random.Random(seed)
    start = draw.sample(range(-50, 50), draw.choice([0, 1, 20]))
    seen, expected = SeenIds(torch.tensor(start, dtype=torch.int64)), set(start)
    found = 0
    for _ in range(60):
        ids = torch.tensor([draw.randint(-300, 300) for _ in range(draw.randint(0, 6))])
        ids = ids.to(torch.int64)
        known = seen.known(ids).tolist()
        assert known == [each for each in ids.tolist() if each in expected]
        found += len(known)
        seen.add(ids)
        expected.update(ids.tolist())
    assert found


def test_the_least_and_the_greatest_id_are_known():
    seen = SeenIds(torch.tensor([5, 3, 9]))
    assert seen.known(torch.tensor([9, 10])).tolist() == [9]
    assert seen.known(torch.tensor([3, 2])).tolist() == [3]
    assert seen.known(torch.tensor([10, 2])).tolist() == []
    assert len(seen) == 3


def test_what_becomes_of_the_memory_of_ids_does_not_matter():
    ids = torch.arange(3)
    seen = SeenIds(ids)
    ids += 10
    assert seen.known(torch.arange(20)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("ids", [[], [4], [1, 2, 3], [3, 1, 2], [1, 1], [5, 2, 5, 3, 2, 5]])
def test_ids_that_stand_more_than_once(ids):
    found = twice(torch.tensor(ids, dtype=torch.int64)).tolist()
    assert set(found) == {each for each in ids if ids.count(each) > 1}

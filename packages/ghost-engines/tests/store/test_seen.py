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


@pytest.mark.parametrize("seed", range(4))
def test_only_ids_greater_than_all_before_extend_it(seed):
    draw = random.Random(seed)
    seen, expected, extended = SeenIds(torch.tensor([4, -7])), {4, -7}, 0
    for at in range(400):
        start = max(expected) + draw.randint(0, 9) if at % 40 else draw.randint(-99, 99)
        ids = sorted(draw.randint(start, start + 9) for _ in range(draw.randint(0, 4)))
        ids = torch.tensor(ids[:: draw.choice([1, 1, 1, -1])], dtype=torch.int64)
        in_order = len(set(ids.tolist())) == len(ids) > 0 and ids.tolist() == sorted(ids.tolist())
        assert seen.extend(ids) == (in_order and ids[0].item() > max(expected))
        if not (in_order and ids[0].item() > max(expected)):
            continue
        expected.update(ids.tolist())
        ids += 1000
        extended += 1
        assert len(seen) == len(expected)
        if at % 90 == 0:
            asked = torch.arange(-100, max(expected) + 9)
            assert seen.known(asked).tolist() == sorted(expected)
    assert extended > 100
    assert seen.known(torch.arange(-100, max(expected) + 9)).tolist() == sorted(expected)

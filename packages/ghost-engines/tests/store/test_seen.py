"""The set of stored ids against python's."""

import random

import pytest
import torch

from ghost_engines.store.seen import SeenIds


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

"""A batch that is verified has the numbers of later ones bit for bit: runs are resumed in it."""

import pytest
import torch
from torch import nn

from ghost_engines import DotProductEngine


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("k", [1, 2])
def test_dots_are_rounded_in_one_way(mode, k):
    torch.manual_seed(0)
    parts = nn.Linear(24, 96), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 24), nn.PReLU()
    model = nn.Sequential(nn.Embedding(11, 24), *parts)
    ids = torch.randint(11, (4, 40))
    engine, found = DotProductEngine(model, mode=mode), []
    for at in range(k):
        directions = {name: torch.randn_like(each) for name, each in model.named_parameters()}
        engine.add_direction(f"{at}", directions)
    with engine:
        for _ in range(2):
            with engine.batch(range(4)) as batch:
                model(ids).square().mean((1, 2)).sum().backward()
            found.append(batch.result)
            model.zero_grad()
    assert found[0].verified
    for name, dots in found[0].by_parameter.items():
        assert torch.equal(dots, found[1].by_parameter[name]), name

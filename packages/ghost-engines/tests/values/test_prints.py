"""Prints of gradients that are looked at together, beside those of one alone."""

import pytest
import torch

from ghost_engines.values import prints as module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_small_gradients_have_the_prints_that_they_have_alone(dtype, monkeypatch):
    gradients = {
        str(size): torch.randn(size, dtype=dtype) for size in [(3, 4), (7,), (), (0,), (2, 1, 3)]
    }
    gradients["sparse"] = torch.randn(4, 2).relu().to_sparse(1)
    (together,) = module.read(module.prints(gradients))
    monkeypatch.setattr(module, "_SMALL", -1)
    (alone,) = module.read(module.prints(gradients))
    assert together.keys() == alone.keys() == gradients.keys()
    for name, found in together.items():
        assert found == pytest.approx(alone[name], rel=1e-12)
        assert found == alone[name] or module.ratio(alone[name], found, dtype) == 1
    assert together["(7,)"].filled

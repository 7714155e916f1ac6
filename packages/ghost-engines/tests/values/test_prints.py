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


@pytest.mark.parametrize("shape", [(8, 24), (96, 384)], ids=["small", "large"])
@pytest.mark.parametrize("factor", [0.633, -0.633])
def test_the_sign_is_told_of_a_gradient_whose_columns_add_up_to_nothing(shape, factor):
    """As behind a norm; every third element lies in the same columns."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient -= gradient.mean(0)
    assert abs(float(gradient.sum())) < 1e-12 > abs(float(gradient.flatten()[::3].sum()))
    before, after = module.read(
        module.prints({"g": gradient}), module.prints({"g": gradient * factor})
    )
    assert module.ratio(before["g"], after["g"], torch.float64) == pytest.approx(factor)


def test_the_sign_is_not_that_of_rounding():
    before, after = module.Print(1.0, 0.1, 1e-17), module.Print(0.5, 0.05, -2e-17)
    assert module.ratio(before, after, torch.float64) == 0.5


@pytest.mark.parametrize("factor", [-1.0, -0.25, 0.25])
@pytest.mark.parametrize("first", [-0.6796875, -0.6640625], ids=["in a sum", "in each"])
def test_the_sign_is_told_where_nothing_is_rounded(first, factor):
    """Gradients of few bits add up to less than their rounding now and then."""
    gradient = torch.tensor([first, 1.421875], dtype=torch.bfloat16)
    before, after = module.read(
        module.prints({"g": gradient}), module.prints({"g": gradient * factor})
    )
    assert module.ratio(before["g"], after["g"], torch.bfloat16) == factor


def test_another_gradient_is_no_multiple_in_few_bits_either():
    """Its sums are like those of the first, as both are drawn alike; few happen to be near."""
    generator = torch.Generator().manual_seed(0)
    unseen = 0
    for _ in range(20):
        one, other = torch.randn(2, 4096, generator=generator).bfloat16()
        before, after = module.read(module.prints({"g": one}), module.prints({"g": other}))
        unseen += module.ratio(before["g"], after["g"], torch.bfloat16) is not None
        clipped = module.read(module.prints({"g": one * 0.37}))[0]
        found = module.ratio(before["g"], clipped["g"], torch.bfloat16)
        assert found == pytest.approx(0.37, rel=0.01)
    assert unseen < 10

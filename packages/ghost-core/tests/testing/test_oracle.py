"""The oracle, and how errors are measured."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

import ghost_core.testing
from ghost_core.testing import (
    TinyTransformer,
    agreeing_gradients,
    assert_within,
    next_token_losses,
    per_sample_gradients,
)


def test_the_oracle_takes_one_sample_at_a_time() -> None:
    model = TinyTransformer().double().eval()
    ids = torch.randint(0, 19, (3, 5))
    gradients = agreeing_gradients(
        model,
        next_token_losses(model(ids), ids),
        lambda n: next_token_losses(model(ids[n : n + 1]), ids[n : n + 1]).sum(),
    )
    assert "last.bias" not in gradients
    assert "head.weight" not in gradients
    next_token_losses(model(ids), ids).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.sum(0), model.get_parameter(name).grad)


def test_the_oracles_disagree_where_samples_are_coupled() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    model.eval()
    alone = [model(x[n : n + 1]).square().sum() for n in range(4)]
    model.train()
    with pytest.raises(AssertionError, match=r"0\.weight, alone against in a batch"):
        agreeing_gradients(model, model(x).square().sum(1), lambda n: alone[n])


def test_the_oracle_knows_zero_and_names() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    losses = model["used"](torch.ones(3, 2)).sum(1)
    gradients = per_sample_gradients(model, losses, ["used.bias", "unused.bias"])
    assert gradients["used.bias"].tolist() == [[1], [1], [1]]
    assert gradients["unused.bias"].tolist() == [[0], [0], [0]]
    with pytest.raises(ValueError, match="no_such: not the first name"):
        per_sample_gradients(model, losses, ["no_such"])
    with pytest.raises(ValueError, match=r"losses must be \[N\]"):
        per_sample_gradients(model, losses[None])
    with pytest.raises(ValueError, match="number of samples"):
        per_sample_gradients(model, lambda n: losses[n])
    assert per_sample_gradients(model, torch.ones(2))["used.bias"].shape == (2, 1)


def test_the_bound_is_relative_to_the_scale() -> None:
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert_within(expected + 1e-10, expected, 1.0)
    assert_within(expected + 1e-7, expected, torch.tensor([200.0, 1000.0]))
    with pytest.raises(
        AssertionError, match=r"what: 1 of 2 .* worst at \[1\]: got 1e-07.* = 1e-09"
    ):
        assert_within(expected + 1e-7, expected, torch.tensor([1000.0, 1.0]), what="what")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_never_pass(bad: float) -> None:
    good = torch.ones(2)
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_within(torch.tensor([1.0, bad]), good, 1.0)
    for reference, scale in ((good * bad, 1.0), (good, bad)):
        with pytest.raises(AssertionError, match="is not finite"):
            assert_within(good, reference, scale)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"shape \(2, 1\), expected \(2,\)"):
        assert_within(torch.ones(2, 1), torch.ones(2), 1.0)
    assert_within(torch.ones(0), torch.ones(0), 1.0)


def test_every_public_name_has_a_docstring() -> None:
    for name in ghost_core.testing.__all__:
        each = getattr(ghost_core.testing, name)
        assert isinstance(each, Mapping) or each.__doc__, name

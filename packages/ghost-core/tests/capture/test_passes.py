"""Several passes and backward passes in a batch, empty ones, and those that do not count."""

import pytest
import torch

from ghost_core import CaptureError
from ghost_core.testing import TinyTransformer, next_token_losses, per_sample_gradients

from .reused import D, Exact, Hold, N, Reused, T, inputs, squares


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_micro_batches_follow_one_another(hold: Hold, assert_held, sizes: list[int]) -> None:
    model, x = Reused().double(), inputs()
    expected = per_sample_gradients(model, squares(model(x)))
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        for part in x.split(sizes):
            squares(model(part)).sum().backward()
    assert_held(batch.result, expected)


def test_passes_of_all_samples_add_up(assert_exact: Exact) -> None:
    model, x, y = Reused().double(), inputs(), inputs()
    assert_exact(model, lambda: squares(model(x)) * squares(model(y)))


def test_a_second_backward_adds(hold: Hold) -> None:
    model, x = Reused().double(), inputs()
    once, twice = hold(model), hold(model)
    with once, once.batch(range(N)) as first:
        squares(model(x)).sum().backward()
    with twice, twice.batch(range(N)) as second:
        losses = squares(model(x)).sum()
        losses.backward(retain_graph=True)
        losses.backward()
    for name, gradient in first.result.materialize().items():
        torch.testing.assert_close(second.result.materialize()[name], 2 * gradient)


def test_integer_inputs_with_everything_frozen(hold: Hold, assert_held) -> None:
    model = TinyTransformer().double().eval()
    ids = torch.randint(0, 19, (N, 6))
    expected = per_sample_gradients(model, next_token_losses(model(ids), ids))
    engine = hold(model)
    with engine.frozen(), engine.batch(range(N)) as batch:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        next_token_losses(model(ids), ids).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.attend.weight.requires_grad
    assert not model.last.bias.requires_grad
    assert_held(batch.result, expected)


def test_an_empty_batch(hold: Hold) -> None:
    model = Reused().double()
    engine = hold(model)
    with engine, engine.batch([]) as batch:
        squares(model(inputs(0, T, D))).sum().backward()
    assert batch.n == 0
    assert batch.result.materialize()["layer.weight"].shape == (0, D, D)


def test_gradients_of_inputs_are_no_contributions(hold: Hold, assert_held) -> None:
    model, x = Reused().double(), inputs().requires_grad_()
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        (gradient,) = torch.autograd.grad(squares(model(x)).sum(), x)
        moved = (x + 0.1 * gradient.sign()).detach()
        squares(model(moved)).sum().backward()
    assert_held(batch.result, per_sample_gradients(model, squares(model(moved))))


def test_gradients_that_reach_no_parameter_are_refused(hold: Hold) -> None:
    model = Reused().double()
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(N)):
        squares(model(inputs())).sum().backward(inputs=list(model.parameters()))

"""Products with the gradients of a reference batch."""

import pytest
import torch
from engine_kit import WEIGHTS, check_gram, multiply, squares, sum_of_squares

from ghost_core import CaptureError
from ghost_core.testing import next_token_losses, per_sample_gradients
from ghost_engines.gram import GramEngine

# Reference


@pytest.mark.parametrize("m", [1, 3, 7])
@pytest.mark.parametrize("reference_tokens", [1, 30])
@pytest.mark.parametrize("n", [1, 4])
def test_reference_of_another_size(m, n, reference_tokens, mlp):
    inputs = torch.randn(n, 2, 5, dtype=torch.float64)
    reference = torch.randn(m, reference_tokens, 5, dtype=torch.float64)
    of_reference = per_sample_gradients(mlp, squares(mlp(reference)))
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = GramEngine(mlp, loss_weights="mean")
    with engine:
        with engine.reference(range(100, 100 + m)) as kept:
            squares(mlp(reference)).mean().backward()
        with engine.batch(range(n)) as batch:
            squares(mlp(inputs)).mean().backward()
    check_gram(kept.result, of_reference)
    check_gram(batch.result, expected, of_reference)
    assert batch.result.between.reference_ids.tolist() == list(range(100, 100 + m))
    assert batch.result.ids.tolist() == list(range(n))


@pytest.mark.parametrize("length", [3, 7])
def test_reference_with_micro_batches_uses_and_weights_of_its_own(length, transformer, tokens):
    tokens, others = tokens[:, :length], tokens.flip(0)[:4, : length - 1]
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    of_others = per_sample_gradients(transformer, next_token_losses(transformer(others), others))
    engine = GramEngine(transformer, loss_weights="given")
    with engine.frozen():
        weights = torch.tensor([3.0, 0.1, -2.0, 1.0])
        with engine.reference(range(4), loss_weights=weights):
            for part, part_weights in zip(others.split([1, 3]), weights.split([1, 3]), strict=True):
                (part_weights * next_token_losses(transformer(part), part)).sum().backward()
        with engine.batch(range(5), loss_weights=WEIGHTS) as batch:
            for part, part_weights in zip(tokens.split([3, 2]), WEIGHTS.split([3, 2]), strict=True):
                (part_weights * next_token_losses(transformer(part), part)).sum().backward()
    check_gram(batch.result, expected, of_others)


def test_reference_belongs_to_the_parameters_and_inputs_of_its_time(mlp):
    """Steps of the optimizer and tensors that are filled again do not reach it."""
    buffer = torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    of_reference = per_sample_gradients(mlp, squares(mlp(buffer)))
    engine = GramEngine(mlp, loss_weights="sum")
    with engine, engine.reference(range(4)):
        squares(mlp(buffer)).sum().backward()
    for _ in range(2):
        optimizer.step()
        buffer.normal_()
        expected = per_sample_gradients(mlp, squares(mlp(buffer)))
        with engine, engine.batch(range(4)) as batch:
            squares(mlp(buffer)).sum().backward()
        check_gram(batch.result, expected, of_reference)


def test_reference_is_replaced_and_cleared(mlp, inputs):
    others = inputs.flip(1)[:3]
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    of_others = per_sample_gradients(mlp, squares(mlp(others)))
    engine = GramEngine(mlp, loss_weights="sum")
    engine.clear_reference()
    with engine:
        for data in (inputs, others):
            with engine.reference(range(len(data))) as kept:
                squares(mlp(data)).sum().backward()
            assert kept.result.reference is None
            assert engine.has_reference
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        check_gram(batch.result, expected, of_others)
        engine.clear_reference()
        assert not engine.has_reference
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
    check_gram(batch.result, expected)


def test_reference_that_fails_leaves_the_one_before(mlp, inputs):
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = GramEngine(mlp, loss_weights="sum")
    with engine:
        with engine.reference(range(10, 14)):
            squares(mlp(inputs)).sum().backward()
        with pytest.raises(ZeroDivisionError), engine.reference(range(4)):
            fail_after(squares(mlp(inputs + 1)).sum())
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
            with pytest.raises(CaptureError, match="open already"):
                engine.reference(range(4)).__enter__()
    check_gram(batch.result, expected, expected)
    assert batch.result.between.reference_ids.tolist() == [10, 11, 12, 13]


def fail_after(loss):
    loss.backward()
    raise ZeroDivisionError


def test_products_with_no_reference_are_refused(mlp, inputs):
    gram = multiply(mlp, inputs, sum_of_squares)
    with pytest.raises(CaptureError, match=r"no reference.*with engine\.reference"):
        _ = gram.between


def test_products_are_verified_if_both_batches_are(mlp, inputs):
    verified = []
    for verify in (True, False):
        engine = GramEngine(mlp, loss_weights="sum", verify=verify)
        with engine, engine.reference(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        verified.append(batch.result.verified)
        engine.verifies = True
        with engine, engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        verified.append(batch.result.verified)
    assert verified == [True, True, False, False]

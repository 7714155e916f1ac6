"""Inner products between gradients of samples against those of autograd's gradients."""

import copy

import pytest
import torch
from engine_kit import (
    Repeated,
    check_cosines,
    check_gram,
    check_products,
    multiply,
    rows,
    squares,
    sum_of_squares,
)
from torch import nn

from ghost_core import CaptureError, UnknownOptionError
from ghost_core.testing import assert_within, next_token_losses, per_sample_gradients
from ghost_core.testing.snapshots import Watched
from ghost_engines import NormEngine
from ghost_engines.gram import GramEngine

WEIGHTS = torch.tensor([0.25, -3.0, 1e-3, 0.5, 1.5], dtype=torch.float64)

# Exact


@pytest.mark.parametrize("length", [3, 7])
def test_language_model_with_a_tied_head(length, transformer, tokens):
    """The tied weight's uses meet across samples: a Gram of each for itself would be wrong.

    Three tokens are held as rows and gradients of the table, seven as its built gradient.
    """
    tokens = tokens[:, :length]
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = GramEngine(transformer, loss_weights="sum")
    with engine, engine.batch(tokens[:, 0]) as batch:
        next_token_losses(transformer(tokens), tokens).sum().backward()
    check_gram(batch.result, expected)
    assert torch.equal(batch.result.ids, tokens[:, 0])
    assert batch.result.verified
    assert batch.result.total.dtype == torch.float64
    assert engine.collect() is batch.result


@pytest.mark.parametrize(
    ("kind", "given", "weights"),
    [
        ("mean", None, torch.full((5,), 0.2, dtype=torch.float64)),
        ("given", WEIGHTS, WEIGHTS),
        ("given", -0.1, torch.full((5,), -0.1, dtype=torch.float64)),
    ],
)
def test_the_weights_of_both_losses_are_divided_out(kind, given, weights, transformer, tokens):
    def losses():
        return next_token_losses(transformer(tokens), tokens)

    expected = per_sample_gradients(transformer, losses())
    engine = GramEngine(transformer, loss_weights=kind)
    with engine, engine.batch(range(5), loss_weights=given) as batch:
        (weights * losses()).sum().backward()
    check_gram(batch.result, expected)


def test_cosines_of_contributions_are_those_of_own_gradients_but_for_signs(transformer, tokens):
    def losses():
        return next_token_losses(transformer(tokens), tokens)

    whole = rows(per_sample_gradients(transformer, losses()))
    engine = GramEngine(transformer, loss_weights="sum")
    with engine, engine.batch(range(5)) as batch:
        (WEIGHTS * losses()).sum().backward()
    whole *= WEIGHTS.sign()[:, None]
    check_cosines(batch.result.cosines, whole, whole, 1e-9, "cosine")


@pytest.mark.parametrize("times", [1, 2, 9])
@pytest.mark.parametrize("tokens_each", [1, 3, 40])
def test_layer_used_several_times(times, tokens_each):
    """Few tokens are held as factors, many as the built gradient; uses of both add up."""
    model = Repeated(nn.Linear(5, 5), times).double()
    inputs = torch.randn(4, tokens_each, 5, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    check_gram(multiply(model, inputs, sum_of_squares), expected)


def test_images_and_gradients_without_factors():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2)
    ).double()
    inputs = torch.randn(3, 3, 6, 7, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    check_gram(multiply(model, inputs, sum_of_squares), expected)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 3), (3, 2)])
@pytest.mark.parametrize("weights", [torch.ones(5), WEIGHTS])
def test_micro_batches_are_multiplied_with_one_another(sizes, weights, transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = GramEngine(transformer, loss_weights="given")
    with engine, engine.batch(range(5), loss_weights=weights) as batch:
        for part, part_weights in zip(
            tokens.split(list(sizes)), weights.split(list(sizes)), strict=True
        ):
            (part_weights * next_token_losses(transformer(part), part)).sum().backward()
    check_gram(batch.result, expected)


def test_micro_batches_may_have_other_lengths(transformer, tokens):
    """Some are held as factors then, others built."""
    parts = [tokens[:1, :2], tokens[1:3], tokens[3:, :3]]
    each = [per_sample_gradients(transformer, next_token_losses(transformer(p), p)) for p in parts]
    expected = {name: torch.cat([part[name] for part in each]) for name in each[0]}
    engine = GramEngine(transformer, loss_weights="sum")
    with engine, engine.batch(range(5)) as batch:
        for part in parts:
            next_token_losses(transformer(part), part).sum().backward()
    check_gram(batch.result, expected)


@pytest.mark.parametrize("passes_first", [True, False])
def test_two_passes_on_the_same_samples_are_one_gradient(passes_first, mlp, inputs):
    others = inputs.flip(1) + 1
    expected = per_sample_gradients(mlp, squares(mlp(inputs)) + 3 * squares(mlp(others)))
    engine = GramEngine(mlp, loss_weights="mean")
    with engine, engine.batch(range(4)) as batch:
        if passes_first:
            (squares(mlp(inputs)) + 3 * squares(mlp(others))).mean().backward()
        else:
            squares(mlp(inputs)).mean().backward()
            (3 * squares(mlp(others))).mean().backward()
    check_gram(batch.result, expected)


def test_backward_twice_over_one_graph_adds(mlp, inputs):
    expected = per_sample_gradients(mlp, 3 * squares(mlp(inputs)))
    engine = GramEngine(mlp, loss_weights="mean")
    with engine, engine.batch(range(4)) as batch:
        loss = squares(mlp(inputs)).mean()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    check_gram(batch.result, expected)


def test_frozen_gives_the_same_products(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = GramEngine(transformer, loss_weights="mean")
    with engine.frozen(), engine.batch(range(5)) as batch:
        next_token_losses(transformer(tokens), tokens).mean().backward()
    check_gram(batch.result, expected)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_every_batch_may_have_another_shape(mlp):
    engine = GramEngine(mlp, loss_weights="mean")
    for shape in [(4, 5), (7, 5), (2, 30, 5), (1, 5), (3, 2, 5), (40, 5), (3, 1, 2, 5)]:
        inputs = torch.randn(shape, dtype=torch.float64)
        expected = per_sample_gradients(mlp, squares(mlp(inputs)))
        with engine, engine.batch(range(len(inputs))) as batch:
            squares(mlp(inputs)).mean().backward()
        check_gram(batch.result, expected)


def test_batch_without_samples(mlp):
    gram = multiply(mlp, torch.zeros(0, 5, dtype=torch.float64), sum_of_squares, "mean")
    assert gram.total.shape == gram.cosines.shape == (0, 0)


def test_selected_layers_only(transformer, tokens):
    names = ["before_mlp.bias", "before_mlp.weight", "tokens.weight"]
    losses = next_token_losses(transformer(tokens), tokens)
    gram = multiply(
        transformer,
        tokens,
        lambda logits: next_token_losses(logits, tokens).sum(),
        layers="tokens,before_*",
        exclude=["*_attention"],
    )
    check_gram(gram, per_sample_gradients(transformer, losses, names))


def test_engines_of_several_kinds_at_once(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    gram = GramEngine(transformer, loss_weights="mean")
    norms = NormEngine(transformer, loss_weights="mean")
    with gram, norms, gram.batch(range(5)) as first, norms.batch(range(5)) as second:
        next_token_losses(transformer(tokens), tokens).mean().backward()
    check_gram(first.result, expected)
    norm = second.result.total
    assert_within(norm.square(), first.result.total.diagonal(), norm.square())


def test_rows_that_are_not_samples():
    """Rows of one sample follow one another; held until the end, they are still its rows."""

    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 8)

        def forward(self, inputs):
            folded = torch.tanh(self.inner(inputs.flatten(0, 1)))
            return folded.unflatten(0, inputs.shape[:2])

    model, inputs = Folds().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = GramEngine(model, loss_weights="sum")
    with engine:
        with engine.reference(range(4)) as first:
            squares(model(inputs)).sum().backward()
        inputs.normal_()
        with engine.batch(range(2)) as second:
            squares(model(inputs[2:])).sum().backward()
    check_gram(first.result, expected)
    of_second = per_sample_gradients(model, squares(model(inputs[2:])))
    check_gram(second.result, of_second, expected)


# Precision and loss scaling


def test_float32_model_is_multiplied_in_float32_and_close(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    single = copy.deepcopy(transformer).float()
    gram = multiply(single, tokens, lambda logits: next_token_losses(logits, tokens).mean(), "mean")
    check_gram(gram, expected, tolerance=1e-4)
    assert gram.total.dtype == torch.float32
    assert gram.cosines.abs().max() <= 1


def backpropagate_without_autocast(model, inputs):
    with torch.autocast("cpu", enabled=False):
        squares(model(inputs)).sum().backward()


def test_autocast_around_a_batch_does_not_reach_the_products(mlp):
    model, inputs = mlp.float(), torch.randn(6, 4, 5)
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = GramEngine(model, loss_weights="sum")
    with engine, torch.autocast("cpu", torch.bfloat16), engine.batch(range(6)) as batch:
        backpropagate_without_autocast(model, inputs)
    check_gram(batch.result, expected, tolerance=1e-5)


def test_bfloat16_model_is_within_the_rounding_of_its_own_gradients(transformer, tokens):
    rounded = transformer.bfloat16()
    exact = copy.deepcopy(rounded).double()
    whole = rows(per_sample_gradients(exact, next_token_losses(exact(tokens), tokens)))
    gram = multiply(rounded, tokens, lambda logits: next_token_losses(logits.float(), tokens).sum())
    check_products(gram.total, whole, whole, 5e-2, "total")
    check_cosines(gram.cosines, whole, whole, 5e-2, "cosine")


def test_the_scale_of_a_grad_scaler_is_divided_out(mlp, inputs):
    """Also that of the reference, whose scale was another."""
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    engine = GramEngine(mlp, loss_weights="mean", grad_scaler=scaler)
    with engine:
        with engine.reference(range(4)):
            scaler.scale(squares(mlp(inputs)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        with engine.batch(range(4)) as batch:
            scaler.scale(squares(mlp(inputs)).mean()).backward()
    check_gram(batch.result, expected, expected)


def test_overflow_gives_products_that_are_not_finite(mlp, inputs):
    mlp.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    engine = GramEngine(mlp, loss_weights="sum", grad_scaler=scaler)
    with engine:
        with engine.batch(range(4)) as batch:
            scaler.scale((100 * squares(mlp(inputs.float()))).sum()).backward()
        refused = pytest.raises(CaptureError, match=r"samples \[0, 1, 2, 3\] are not finite")
        with refused, engine.reference(range(4)):
            scaler.scale((100 * squares(mlp(inputs.float()))).sum()).backward()
    assert not batch.result.finite.any()
    assert batch.result.cosines.isnan().all()
    assert not engine.has_reference


# Weights


def test_weight_zero_gives_nan(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    whole = rows(per_sample_gradients(mlp, squares(mlp(inputs))))
    engine = GramEngine(mlp, loss_weights="given")
    with engine:
        with engine.batch(range(4), loss_weights=weights) as batch:
            (weights * squares(mlp(inputs))).sum().backward()
        refused = pytest.raises(CaptureError, match=r"\[1, 3\].*loss_weights are zero.*reference")
        with refused, engine.reference(range(4), loss_weights=weights):
            (weights * squares(mlp(inputs))).sum().backward()
    gram = batch.result
    known = torch.tensor([True, False, True, False])
    assert torch.equal(gram.finite, known)
    for values in (gram.total, gram.cosines):
        assert torch.equal(values.isnan(), ~(known[:, None] & known))
    check_products(gram.total[::2, ::2], whole[::2], whole[::2], 1e-9, "total")
    check_cosines(gram.cosines[::2, ::2], whole[::2], whole[::2], 1e-9, "cosine")


def test_gradient_zero_has_no_cosine(mlp, inputs):
    """It has products, which are zero."""
    used = torch.tensor([1.0, 0.0, 2.0, 1.0])
    gram = multiply(mlp, inputs, lambda outputs: (used * squares(outputs)).sum())
    assert gram.cosines.isnan().tolist() == [[n == 1 or m == 1 for m in range(4)] for n in range(4)]
    assert gram.finite.all()
    assert not gram.total[1].any()


def test_weight_zero_of_a_sample_with_a_gradient_is_refused(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    with pytest.raises(CaptureError, match=r"zero for samples \[1\], whose gradients are not"):
        multiply(mlp, inputs, sum_of_squares, "given", weights)


def test_mean_is_refused_where_micro_batches_leave_it_open(mlp, inputs):
    engine = GramEngine(mlp, loss_weights="mean")
    refused = pytest.raises(CaptureError, match=r"which mean, in a batch of 4 .* of 2")
    with engine, refused, engine.batch(range(4)):
        squares(mlp(inputs[:2])).mean().backward()


# What is held


def test_nothing_is_held_but_a_reference(inputs):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    engine = GramEngine(model, loss_weights="sum")
    with engine:
        for _ in range(2):
            watched = Watched(model)
            with watched, engine.reference(range(4)):
                squares(model(inputs)).sum().backward()
            assert watched.count
            assert watched.alive() == ["input of 0"]  # which this test has; the rest are copies
            with watched, engine.batch(range(4)) as batch:
                squares(model(inputs)).sum().backward()
            assert watched.alive() == ["input of 0"]
    assert batch.result.between.total.shape == (4, 4)


def test_tensors_overwritten_before_the_batch_is_closed_are_refused(mlp, inputs):
    engine, buffer = GramEngine(mlp, loss_weights="sum"), inputs[:2].clone()
    for opened in (engine.batch, engine.reference):
        refused = pytest.raises(CaptureError, match=r"owns 0\.weight was overwritten")
        with engine, refused, opened(range(4)):
            for part in inputs.split(2):
                buffer.copy_(part)
                squares(mlp(buffer)).sum().backward()
    assert not engine.has_reference


def test_unknown_option_is_a_type_error(mlp):
    with pytest.raises(UnknownOptionError, match="layer_names"):
        GramEngine(mlp, loss_weights="sum", layer_names="0")

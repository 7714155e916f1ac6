"""Norms of per-sample gradients against those of autograd's gradients."""

import copy

import pytest
import torch
from engine_kit import WEIGHTS, Repeated, check_norms, measure, rows, squares, sum_of_squares
from torch import nn
from torch.nn import functional

from ghost_core import CaptureError, UnknownOptionError
from ghost_core.testing import (
    assert_within,
    next_token_losses,
    per_sample_gradients,
)
from ghost_core.testing.snapshots import Watched
from ghost_engines import NormEngine

# Exact


@pytest.mark.parametrize("length", [3, 7])
def test_language_model_with_a_tied_head(length, transformer, tokens):
    """The tied weight's two uses overlap, so that a norm without their product would be wrong.

    Three tokens are held as rows and gradients of the table, seven as its built gradient.
    """
    tokens = tokens[:, :length]
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = NormEngine(transformer, loss_weights="sum")
    with engine, engine.batch(tokens[:, 0]) as batch:
        next_token_losses(transformer(tokens), tokens).sum().backward()
    check_norms(batch.result, expected)
    assert torch.equal(batch.result.ids, tokens[:, 0])
    assert batch.result.verified
    assert batch.result.total.dtype == torch.float64
    assert engine.collect() is batch.result


@pytest.mark.parametrize(
    ("kind", "given", "weights"),
    [
        ("sum", None, torch.ones(5)),
        ("mean", None, torch.full((5,), 0.2, dtype=torch.float64)),
        ("given", WEIGHTS, WEIGHTS),
        ("given", WEIGHTS.float(), WEIGHTS.float()),
        ("given", -WEIGHTS, -WEIGHTS),
        ("given", 0.1, torch.full((5,), 0.1, dtype=torch.float64)),
        ("given", 3, torch.full((5,), 3)),
        ("given", torch.tensor(3), torch.full((5,), 3)),
    ],
)
def test_the_weight_of_each_loss_is_divided_out(kind, given, weights, transformer, tokens):
    def losses():
        return next_token_losses(transformer(tokens), tokens)

    expected = per_sample_gradients(transformer, losses())
    engine = NormEngine(transformer, loss_weights=kind)
    with engine, engine.batch(range(5), loss_weights=given) as batch:
        (weights * losses()).sum().backward()
    check_norms(batch.result, expected)


def test_token_mean_with_padding_takes_the_tokens_of_each_sample_as_weights(transformer, tokens):
    targets, lengths = tokens.clone(), torch.tensor([7, 2, 4, 6, 3])
    for sample, length in enumerate(lengths):
        targets[sample, length:] = -100
    each = functional.cross_entropy(transformer(tokens).mT, targets, reduction="none")
    expected = per_sample_gradients(transformer, each.sum(1) / lengths)
    engine = NormEngine(transformer, loss_weights="given")
    with engine, engine.batch(range(5), loss_weights=lengths / lengths.sum().double()) as batch:
        functional.cross_entropy(transformer(tokens).flatten(0, 1), targets.flatten()).backward()
    check_norms(batch.result, expected)


@pytest.mark.parametrize("times", [1, 2, 9])
@pytest.mark.parametrize("tokens_each", [1, 3, 40])
def test_layer_used_several_times(times, tokens_each):
    """Few tokens are held as factors, many as the built gradient; uses of both add up."""
    model = Repeated(nn.Linear(5, 5), times).double()
    inputs = torch.randn(4, tokens_each, 5, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    check_norms(measure(model, inputs, sum_of_squares), expected)


def test_images_and_gradients_without_factors():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2)
    ).double()
    inputs = torch.randn(3, 3, 6, 7, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    check_norms(measure(model, inputs, sum_of_squares), expected)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 3), (3, 2)])
@pytest.mark.parametrize("given", [None, WEIGHTS])
def test_micro_batches_follow_one_another(sizes, given, transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    weights = torch.ones(5) if given is None else given
    engine = NormEngine(transformer, loss_weights="sum" if given is None else "given")
    with engine, engine.batch(range(5), loss_weights=given) as batch:
        for part, part_weights in zip(
            tokens.split(list(sizes)), weights.split(list(sizes)), strict=True
        ):
            (part_weights * next_token_losses(transformer(part), part)).sum().backward()
    check_norms(batch.result, expected)


@pytest.mark.parametrize("passes_first", [True, False])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_two_passes_on_the_same_samples_are_one_gradient(passes_first, kind, mlp, inputs):
    others = inputs.flip(1) + 1
    expected = per_sample_gradients(mlp, squares(mlp(inputs)) + 3 * squares(mlp(others)))
    engine = NormEngine(mlp, loss_weights=kind)
    with engine, engine.batch(range(4)) as batch:
        if passes_first:
            losses = squares(mlp(inputs)) + 3 * squares(mlp(others))
            getattr(losses, kind)().backward()
        else:
            getattr(squares(mlp(inputs)), kind)().backward()
            (3 * getattr(squares(mlp(others)), kind)()).backward()
    check_norms(batch.result, expected)


def test_backward_twice_over_one_graph_adds(mlp, inputs):
    expected = per_sample_gradients(mlp, 3 * squares(mlp(inputs)))
    engine = NormEngine(mlp, loss_weights="mean")
    with engine, engine.batch(range(4)) as batch:
        loss = squares(mlp(inputs)).mean()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    check_norms(batch.result, expected)


def test_frozen_gives_the_same_norms(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = NormEngine(transformer, loss_weights="mean")
    with engine.frozen(), engine.batch(range(5)) as batch:
        next_token_losses(transformer(tokens), tokens).mean().backward()
    check_norms(batch.result, expected)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_every_batch_may_have_another_shape(mlp):
    engine = NormEngine(mlp, loss_weights="mean")
    for shape in [(4, 5), (7, 5), (2, 30, 5), (1, 5), (3, 2, 5), (40, 5), (3, 1, 2, 5)]:
        inputs = torch.randn(shape, dtype=torch.float64)
        expected = per_sample_gradients(mlp, squares(mlp(inputs)))
        with engine, engine.batch(range(len(inputs))) as batch:
            squares(mlp(inputs)).mean().backward()
        check_norms(batch.result, expected)


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_batch_without_samples(kind, mlp):
    norms = measure(mlp, torch.zeros(0, 5, dtype=torch.float64), sum_of_squares, kind)
    assert norms.total.shape == (0,)
    assert all(squared.shape == (0,) for squared in norms.squared.values())


def test_selected_layers_only(transformer, tokens):
    names = ["before_mlp.bias", "before_mlp.weight", "tokens.weight"]
    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses, names)
    norms = measure(
        transformer,
        tokens,
        lambda logits: next_token_losses(logits, tokens).sum(),
        layers="tokens,before_*",
        exclude=["*_attention"],
    )
    check_norms(norms, expected)


def test_parameter_that_the_loss_does_not_depend_on_has_norm_zero(mlp, inputs):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = mlp, nn.Linear(5, 2).double()

        def forward(self, inputs):
            return self.used(inputs)

    norms = measure(Spare(), inputs, sum_of_squares)
    assert norms.by_parameter["spare.weight"].tolist() == [0.0] * 4
    assert norms.by_layer["used.0"].all()


def test_gradients_that_cancel_have_norm_zero_and_not_nan():
    """The sum over pairs of tokens is rounded, to a little less than zero."""
    model = nn.Linear(50, 50, bias=False).double()
    inputs = (1e3 + torch.randn(20, 1, 50, dtype=torch.float64)).expand(20, 3, 50)
    signs = torch.randn(20, 3, 50, dtype=torch.float64)
    signs[:, 2] = -signs[:, 0] - signs[:, 1]
    norms = measure(model, inputs, lambda outputs: (signs * outputs).sum())
    scale = signs.flatten(1).norm(dim=1) * inputs.flatten(1).norm(dim=1)
    assert_within(norms.total, torch.zeros(20), scale, 1e-7)
    assert (norms.total == 0).any()


def test_two_engines_at_once(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    mean, weights = (
        NormEngine(transformer, loss_weights="mean"),
        NormEngine(transformer, loss_weights="given", layers="*.weight"),
    )
    with (
        mean,
        weights,
        mean.batch(range(5)) as first,
        weights.batch(range(5), loss_weights=0.2) as second,
    ):
        next_token_losses(transformer(tokens), tokens).mean().backward()
    check_norms(first.result, expected)
    check_norms(second.result, {n: g for n, g in expected.items() if n.endswith("weight")})


# Precision


def test_float32_model_is_measured_in_float32_and_close(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    single = copy.deepcopy(transformer).float()
    norms = measure(single, tokens, lambda logits: next_token_losses(logits, tokens).mean(), "mean")
    check_norms(norms, expected, 1e-4)
    assert norms.total.dtype == torch.float32


@pytest.mark.parametrize("whole_batch", [True, False])
def test_autocast_does_not_reach_the_norms(whole_batch, mlp):
    """Factors are rounded to bfloat16; products of them are not, wherever the batch is closed."""
    model, inputs = mlp.float(), torch.randn(6, 4, 5)
    engine = NormEngine(model, loss_weights="sum")
    held = []
    engine_add = engine.on_gradient

    def spy(pass_, parameter, gradient):
        held.append((parameter.name, gradient.materialize().double()))
        engine_add(pass_, parameter, gradient)

    engine.on_gradient = spy
    around = torch.autocast("cpu", torch.bfloat16, enabled=whole_batch)
    with engine, around, engine.batch(range(6)) as batch:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        squares(outputs.float()).sum().backward()
    check_norms(batch.result, dict(held), 1e-5)


def test_bfloat16_model_is_within_the_rounding_of_its_own_gradients(transformer, tokens):
    rounded = transformer.bfloat16()
    exact = copy.deepcopy(rounded).double()
    expected = rows(per_sample_gradients(exact, next_token_losses(exact(tokens), tokens)))
    norms = measure(rounded, tokens, lambda logits: next_token_losses(logits.float(), tokens).sum())
    assert_within(norms.total, expected.norm(dim=1), expected.norm(dim=1), 5e-2)
    assert norms.total.dtype == torch.float32


# What is held


def test_tensors_overwritten_before_the_batch_is_closed_are_refused(mlp, inputs):
    """A loader may fill one tensor again and again."""
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine, buffer = NormEngine(mlp, loss_weights="sum"), inputs[:2].clone()
    refused = pytest.raises(CaptureError, match=r"owns 0\.weight was overwritten")
    with engine:
        with refused, engine.batch(range(4)):
            for part in inputs.split(2):
                buffer.copy_(part)
                squares(mlp(buffer)).sum().backward()
        for part in (slice(0, 2), slice(2, 4)):
            buffer.copy_(inputs[part])
            with engine.batch(range(2)) as batch:
                squares(mlp(buffer)).sum().backward()
            check_norms(batch.result, {name: g[part] for name, g in expected.items()})


def test_token_ids_overwritten_before_the_batch_is_closed_are_refused():
    model, ids = nn.Sequential(nn.Embedding(50, 4), nn.Tanh()), torch.randint(0, 50, (3, 2))
    engine = NormEngine(model, loss_weights="sum")
    refused = pytest.raises(CaptureError, match=r"owns 0\.weight was overwritten")
    with engine, refused, engine.batch(range(3)):
        squares(model(ids)).sum().backward()
        ids.zero_()


def test_parameters_as_inputs_may_change_after_the_batch_only():
    model = nn.Sequential(nn.Linear(5, 5)).double()
    given = nn.Parameter(torch.randn(4, 2, 5, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), given], lr=0.1)
    engine = NormEngine(model, loss_weights="sum", verify=False)
    refused = pytest.raises(CaptureError, match=r"owns 0\.weight was overwritten")
    with engine, refused, engine.batch(range(4)):
        squares(model(given)).sum().backward()
        optimizer.step()
    expected = per_sample_gradients(model, squares(model(given)), ["0.weight", "0.bias"])
    with engine, engine.batch(range(4)) as batch:
        squares(model(given)).sum().backward()
    optimizer.step()
    check_norms(batch.result, {name: expected[name] for name in batch.result.squared})


def test_no_activation_is_held_where_the_gradient_is_smaller():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for tokens, held in ((100, False), (1, True)):
        inputs = torch.randn(4, tokens, 5)
        expected = per_sample_gradients(model, squares(model(inputs)))
        engine, watched = NormEngine(model, loss_weights="sum"), Watched(model)
        with engine, engine.batch(range(4)) as batch:
            with watched:
                squares(model(inputs)).sum().backward()
            alive = [what for what in watched.alive() if what != "input of 0"]
            assert bool(alive) is held
        assert watched.alive() == ["input of 0"]  # which this test has
        check_norms(batch.result, expected, 1e-5)


def test_unknown_option_is_a_type_error(mlp):
    with pytest.raises(UnknownOptionError, match="layer_names"):
        NormEngine(mlp, loss_weights="sum", layer_names="0")


def test_norms_say_whether_the_split_was_verified(mlp, inputs):
    for verify in (True, False):
        assert measure(mlp, inputs, sum_of_squares, verify=verify).verified is verify

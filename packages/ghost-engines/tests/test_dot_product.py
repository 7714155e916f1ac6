"""Dot products against those of autograd's gradients."""

import copy

import pytest
import torch
from engine_kit import gradient, squares, train
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import CaptureError, UnbalancedError, UnknownNameError
from ghost_core.testing import assert_within, next_token_losses, per_sample_gradients
from ghost_engines import DotProductEngine

# Exact


def test_language_model_with_all_kinds_of_directions(
    transformer, tokens, draw_directions, assert_scores
):
    validation = tokens[:3].roll(2, 1)

    def validation_loss():
        return next_token_losses(transformer(validation), validation).mean()

    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses)
    directions = {
        "validation": gradient(transformer, validation_loss()),
        **draw_directions(transformer, 2),
    }
    engine = DotProductEngine(transformer)
    engine.add_direction("validation", validation_loss)
    engine.add_direction("random 0", directions["random 0"])
    engine.add_direction("random 1", directions["random 1"])
    assert engine.directions == ("validation", "random 0", "random 1")
    with engine, engine.batch(tokens[:, 0]) as batch:
        next_token_losses(transformer(tokens), tokens).sum().backward()
    assert_scores(batch.result, expected, directions)
    assert torch.equal(batch.ids, tokens[:, 0])
    assert torch.equal(batch.result.total, engine.collect().total)
    assert batch.result.by_layer.keys() == engine.collect().by_layer.keys()
    assert torch.equal(
        batch.result.by_parameter["leave.bias"], engine.collect().by_parameter["leave.bias"]
    )
    assert engine.collect().verified


def test_dropout_in_training_mode(transformer, tokens, draw_directions, assert_scores):
    transformer.train()
    directions = draw_directions(transformer, 1)
    state = torch.get_rng_state()
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = DotProductEngine(transformer)
    engine.add_direction("random 0", directions["random 0"])
    torch.set_rng_state(state)
    scores = train(engine, transformer, tokens, lambda logits: next_token_losses(logits, tokens))
    assert_scores(scores, expected, directions)


def test_direction_is_linear_in_its_validation_samples(mlp, inputs, assert_scores):
    """A direction of several samples is ΣAB, not ΣA·ΣB."""
    validation = torch.randn(6, 5, dtype=torch.float64)
    each = per_sample_gradients(mlp, squares(mlp(validation)))
    direction = {name: gradients.mean(0) for name, gradients in each.items()}
    engine = DotProductEngine(mlp)
    engine.add_direction("mean of six", lambda: squares(mlp(validation)).mean())
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    assert_scores(train(engine, mlp, inputs), expected, {"mean of six": direction})


def test_tokens_of_three_and_more_axes(mlp, draw_directions, assert_scores):
    inputs = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    directions = draw_directions(mlp, 2)
    engine = DotProductEngine(mlp)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    assert_scores(train(engine, mlp, inputs), expected, directions)


def test_module_used_twice(draw_directions, assert_scores):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, inputs):
            return self.inner(torch.tanh(self.inner(inputs)))

    model, inputs = Twice().double(), torch.randn(4, 3, 5, dtype=torch.float64)
    directions = draw_directions(model, 1)
    engine = DotProductEngine(model)
    engine.add_direction("random 0", directions["random 0"])
    expected = per_sample_gradients(model, squares(model(inputs)))
    assert_scores(train(engine, model, inputs), expected, directions)


def test_every_coordinate_as_a_direction_gives_the_contributions(mlp, inputs):
    """With K unit vectors the scores are the contributions, and these sum to `.grad`."""
    shapes = {name: p.shape for name, p in mlp.named_parameters()}
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    engine = DotProductEngine(mlp)
    places = [(name, at) for name, shape in shapes.items() for at in range(shape.numel())]
    for name, at in places:
        unit = zeros[name].clone()
        unit.view(-1)[at] = 1.0
        engine.add_direction(f"{name} {at}", {**zeros, name: unit})
    expected = per_sample_gradients(mlp, squares(mlp(inputs)) / len(inputs))
    scores = train(engine, mlp, inputs, lambda outputs: squares(outputs) / len(inputs))
    flat = torch.cat([expected[name].flatten(1) for name in shapes], 1)
    assert_within(scores.total, flat, flat.norm(dim=1)[:, None], what="contributions")
    grad = torch.cat([mlp.get_parameter(name).grad.flatten() for name in shapes])
    assert_within(scores.total.sum(0), grad, grad.norm(), what="sum of the contributions")


def test_token_mean_loss_with_padding(transformer, tokens, draw_directions, assert_scores):
    targets = tokens.clone()
    for sample, length in enumerate((7, 2, 4, 6, 3)):
        targets[sample, length:] = -100

    def token_mean():
        logits = transformer(tokens)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    sums = functional.cross_entropy(transformer(tokens).mT, targets, reduction="none").sum(1)
    expected = per_sample_gradients(transformer, sums / (targets != -100).sum())
    directions = draw_directions(transformer, 2)
    engine = DotProductEngine(transformer)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    with engine, engine.batch(range(5)) as batch:
        token_mean().backward()
    assert_scores(batch.result, expected, directions)
    for at, direction in enumerate(directions.values()):
        for name, dots in batch.result.by_parameter.items():
            grad = transformer.get_parameter(name).grad
            bound = grad.norm() * direction[name].norm() * 10
            assert_within(dots[:, at].sum(), (grad * direction[name]).sum(), bound, what=name)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 3), (3, 2)])
def test_micro_batches_follow_one_another(
    sizes, transformer, tokens, draw_directions, assert_scores
):
    directions = draw_directions(transformer, 1)
    expected = per_sample_gradients(
        transformer, next_token_losses(transformer(tokens), tokens) / len(tokens)
    )
    engine = DotProductEngine(transformer)
    engine.add_direction("random 0", directions["random 0"])
    with engine, engine.batch(range(5)) as batch:
        for part in tokens.split(list(sizes)):
            (next_token_losses(transformer(part), part).sum() / len(tokens)).backward()
    assert_scores(batch.result, expected, directions)


def test_two_passes_on_the_same_samples_add(mlp, inputs, draw_directions, assert_scores):
    others = inputs.flip(1) + 1
    directions = draw_directions(mlp, 1)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)) + 3 * squares(mlp(others)))
    engine = DotProductEngine(mlp)
    engine.add_direction("random 0", directions["random 0"])
    with engine, engine.batch(range(4)) as batch:
        (squares(mlp(inputs)) + 3 * squares(mlp(others))).sum().backward()
    assert_scores(batch.result, expected, directions)
    with engine, engine.batch(range(4)) as batch:
        squares(mlp(inputs)).sum().backward()
        (3 * squares(mlp(others))).sum().backward()
    assert_scores(batch.result, expected, directions)


def test_backward_twice_over_one_graph_adds(mlp, inputs, draw_directions, assert_scores):
    directions = draw_directions(mlp, 1)
    engine = DotProductEngine(mlp)
    engine.add_direction("random 0", directions["random 0"])
    losses = squares(mlp(inputs))
    expected = {name: 3 * g for name, g in per_sample_gradients(mlp, losses).items()}
    with engine, engine.batch(range(4)) as batch:
        loss = squares(mlp(inputs)).sum()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    assert_scores(batch.result, expected, directions)


def test_every_batch_may_have_another_shape(mlp, draw_directions, assert_scores):
    """Nothing is remembered of the first one: not the sizes, nor what was cheapest for them."""
    directions = draw_directions(mlp, 3)
    engine = DotProductEngine(mlp)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    for shape in [(4, 5), (7, 5), (2, 30, 5), (1, 5), (3, 2, 5), (40, 5), (3, 1, 2, 5)]:
        inputs = torch.randn(shape, dtype=torch.float64)
        expected = per_sample_gradients(mlp, squares(mlp(inputs)))
        assert_scores(train(engine, mlp, inputs), expected, directions)


def test_batch_without_samples_has_no_scores(mlp, engine):
    scores = train(engine, mlp, torch.zeros(0, 5, dtype=torch.float64))
    assert scores.total.shape == (0, 1)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in mlp.parameters())


def test_selected_layers_only(transformer, tokens, draw_directions, assert_scores):
    names = ["before_mlp.bias", "before_mlp.weight", "tokens.weight"]
    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses, names)
    direction = draw_directions(transformer, 1)["random 0"]  # of all parameters
    engine = DotProductEngine(transformer, layers="tokens,before_*", exclude=["*_attention"])
    engine.add_direction("random 0", direction)
    scores = train(engine, transformer, tokens, lambda logits: next_token_losses(logits, tokens))
    assert_scores(scores, expected, {"random 0": direction})


def test_frozen_parameters_are_left_out_and_left_frozen(mlp, inputs, engine):
    mlp[0].bias.requires_grad_(False)
    engine = DotProductEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs)).mean())
    scores = train(engine, mlp, inputs)
    assert list(scores.by_parameter) == ["0.weight", "2.bias", "2.weight"]
    assert not mlp[0].bias.requires_grad
    assert mlp[0].bias.grad is None


@pytest.mark.parametrize("mapped_name", ["tokens.weight", "head.weight"])
def test_tied_parameter_takes_a_direction_under_either_name(
    mapped_name, transformer, tokens, draw_directions, assert_scores
):
    direction = draw_directions(transformer, 1)["random 0"]
    renamed = {mapped_name if k == "tokens.weight" else k: v for k, v in direction.items()}
    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses)
    engine = DotProductEngine(transformer)
    engine.add_direction("random 0", renamed)
    scores = train(engine, transformer, tokens, lambda logits: next_token_losses(logits, tokens))
    assert_scores(scores, expected, {"random 0": direction})


def test_tied_parameter_with_two_different_tensors_is_refused(transformer, draw_directions):
    direction = draw_directions(transformer, 1)["random 0"]
    engine = DotProductEngine(transformer)
    engine.add_direction("equal", {**direction, "head.weight": direction["tokens.weight"].clone()})
    with pytest.raises(CaptureError, match=r"head\.weight"):
        engine.add_direction("torn", {**direction, "head.weight": -direction["tokens.weight"]})


def test_frozen_gives_the_same_scores(transformer, tokens, draw_directions, assert_scores):
    direction = draw_directions(transformer, 1)["random 0"]

    def validation_loss():
        return next_token_losses(transformer(tokens[:2]), tokens[:2]).mean()

    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses)
    directions = {"loss": gradient(transformer, validation_loss()), "random 0": direction}
    engine = DotProductEngine(transformer)
    engine.add_direction("loss", validation_loss)
    engine.add_direction("random 0", direction)
    flags = [parameter.requires_grad for parameter in transformer.parameters()]
    with engine.frozen(), engine.batch(range(5)) as batch:
        next_token_losses(transformer(tokens), tokens).sum().backward()
    assert_scores(batch.result, expected, directions)
    assert [parameter.requires_grad for parameter in transformer.parameters()] == flags
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_direction_keeps_its_values_when_the_given_tensors_change(mlp, inputs, draw_directions):
    direction = draw_directions(mlp, 1)["random 0"]
    engines = [DotProductEngine(mlp), DotProductEngine(mlp)]
    for engine in engines:
        engine.add_direction("given", direction)
    before = train(engines[0], mlp, inputs).total
    for tensor in direction.values():
        tensor.zero_()
    for engine in engines:
        assert torch.equal(train(engine, mlp, inputs).total, before)
    assert before.any()


def test_directions_are_replaced_and_removed_by_name(mlp, inputs, draw_directions, assert_scores):
    first, second = draw_directions(mlp, 2).values()
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = DotProductEngine(mlp)
    engine.add_direction("a", first)
    engine.add_direction("b", first)
    train(engine, mlp, inputs)
    engine.add_direction("a", second)
    assert_scores(train(engine, mlp, inputs), expected, {"a": second, "b": first})
    engine.remove_direction("a")
    assert_scores(train(engine, mlp, inputs), expected, {"b": first})
    with pytest.raises(UnknownNameError, match="Available: b"):
        engine.remove_direction("a")


def test_float32_model_is_scored_in_float32_and_close(mlp, inputs, draw_directions):
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    direction = draw_directions(mlp, 1)["random 0"]
    single = copy.deepcopy(mlp).float()
    engine = DotProductEngine(single)
    engine.add_direction("random 0", {name: tensor.float() for name, tensor in direction.items()})
    scores = train(engine, single, inputs.float())
    for name, dots in scores.by_parameter.items():
        assert dots.dtype == torch.float32
        rows = expected[name].flatten(1)
        bound = rows.norm(dim=1) * direction[name].norm()
        assert_within(dots[:, 0], rows @ direction[name].flatten(), bound, 1e-5, name)


# Loss scaling


def test_the_scale_of_a_grad_scaler_is_divided_out(mlp, inputs, draw_directions, assert_scores):
    directions = draw_directions(mlp, 1)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    engine = DotProductEngine(mlp, grad_scaler=scaler)
    engine.add_direction("random 0", directions["random 0"])
    with engine:
        for scale in (1024.0, 2048.0):
            assert scaler.get_scale() == scale
            optimizer.zero_grad()
            with engine.batch(range(4)) as batch:
                scaler.scale(squares(mlp(inputs)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_scores(batch.result, expected, directions)


def test_the_scale_is_that_of_the_backward_pass(mlp, inputs, draw_directions, assert_scores):
    """The scaler may be updated before the batch is closed."""
    directions = draw_directions(mlp, 1)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    engine = DotProductEngine(mlp, grad_scaler=scaler)
    engine.add_direction("random 0", directions["random 0"])
    with engine, engine.batch(range(4)) as batch:
        scaler.scale(squares(mlp(inputs)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_scores(batch.result, expected, directions)


def test_a_disabled_grad_scaler_has_no_scale(mlp, inputs, draw_directions, assert_scores):
    directions = draw_directions(mlp, 1)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    engine = DotProductEngine(mlp, grad_scaler=scaler)
    engine.add_direction("random 0", directions["random 0"])
    with engine, engine.batch(range(4)) as batch:
        scaler.scale(squares(mlp(inputs)).sum()).backward()
    assert_scores(batch.result, expected, directions)


def test_overflow_gives_scores_that_are_not_finite(mlp, inputs, draw_directions):
    mlp.float()
    direction = {name: value.float() for name, value in draw_directions(mlp, 1)["random 0"].items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = DotProductEngine(mlp, grad_scaler=scaler)
    engine.add_direction("given", direction)
    before = mlp[0].weight.clone()
    with engine, engine.batch(range(4)) as batch:
        scaler.scale((100 * squares(mlp(inputs.float()))).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(mlp[0].weight, before)
    assert not batch.result.total.isfinite().any()


class Scaled(nn.Module):
    """A linear layer and a bare scale, whose gradients are compared with autograd's always."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_what_is_missing_is_found_where_dots_are_taken():
    model, x = Scaled(), torch.randn(5, 3)
    engine = DotProductEngine(model)
    engine.add_direction("one", {name: torch.randn_like(p) for name, p in model.named_parameters()})

    def step(*penalties: Tensor) -> None:
        with engine.batch(range(5)):
            (model(x).square().sum() + sum(penalties)).backward()

    with engine:
        step()
        step()
        with pytest.raises(UnbalancedError, match="scale"):
            step(model.scale.sum())

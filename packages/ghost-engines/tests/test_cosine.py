"""Cosines with directions, against those of autograd's gradients."""

import pytest
import torch
from engine_kit import WEIGHTS, Repeated, by_layer, rows, squares
from torch import nn
from torch.nn import functional

from ghost_core.testing import assert_within, next_token_losses, per_sample_gradients
from ghost_engines import CosineEngine, InRunValues

# Cosines with directions


def check_cosines(cosines, gradients, directions):
    assert cosines.directions == tuple(directions)
    columns = [{name: each[name][None] for name in gradients} for each in directions.values()]
    mine = [("total", cosines.cosines, rows(gradients), torch.cat([rows(c) for c in columns]))]
    layers, of_columns = by_layer(gradients), [by_layer(each) for each in columns]
    assert cosines.cosines_by_layer.keys() == layers.keys()
    for name, layer in layers.items():
        others = torch.cat([each[name] for each in of_columns])
        mine.append((name, cosines.cosines_by_layer[name], layer, others))
    for name, got, left, right in mine:
        expected = functional.normalize(left) @ functional.normalize(right).mT
        assert_within(got, expected, 1.0, what=name)


@pytest.mark.parametrize("weights", [torch.ones(5), torch.full((5,), 0.2), WEIGHTS])
def test_cosines_do_not_depend_on_weights(
    weights, transformer, tokens, draw_directions, assert_scores
):
    validation = tokens[:3].roll(2, 1)

    def validation_loss():
        return next_token_losses(transformer(validation), validation).mean()

    def losses():
        return next_token_losses(transformer(tokens), tokens)

    directions = draw_directions(transformer, 2)
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    of_loss = torch.autograd.grad(validation_loss(), list(named.values()))
    directions["loss"] = dict(zip(named, of_loss, strict=True))
    engine = CosineEngine(transformer)
    for name in ("random 0", "random 1"):
        engine.add_direction(name, directions[name])
    engine.add_direction("loss", validation_loss)
    own = per_sample_gradients(transformer, losses())
    with engine, engine.batch(range(5)) as batch:
        (weights * losses()).sum().backward()
    check_cosines(batch.result, own, directions)
    shape = [(-1, *[1] * (gradient.dim() - 1)) for gradient in own.values()]
    contributions = {
        name: weights.reshape(axes) * gradient
        for (name, gradient), axes in zip(own.items(), shape, strict=True)
    }
    assert_scores(batch.result, contributions, directions)
    assert batch.result.cosines_by_layer.keys() == batch.result.by_layer.keys()


def test_cosines_over_passes_and_uses(draw_directions):
    model = Repeated(nn.Linear(5, 5), 3).double()
    inputs, directions = torch.randn(4, 2, 5, dtype=torch.float64), draw_directions(model, 2)
    engine = CosineEngine(model)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    expected = per_sample_gradients(model, squares(model(inputs)))
    with engine.frozen(), engine.batch(range(4)) as batch:
        for part in inputs.split([1, 3]):
            squares(model(part)).mean().backward()
    check_cosines(batch.result, expected, directions)


def test_cosine_with_itself_is_one_and_never_more(mlp, inputs):
    mlp.float()
    engine = CosineEngine(mlp)
    engine.add_direction("same", lambda: squares(mlp(inputs[:1].float())).sum())
    with engine, engine.batch(range(1)) as batch:
        squares(mlp(inputs[:1].float())).sum().backward()
    assert_within(batch.result.cosines, torch.ones(1, 1), 1.0, 1e-6)
    assert (batch.result.cosines <= 1).all()


def test_cosine_of_nothing_is_nan(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    engine = CosineEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs + 1)).mean())
    zeros = {name: torch.zeros_like(p) for name, p in mlp.named_parameters()}
    engine.add_direction("zero", zeros)
    with engine, engine.batch(range(4)) as batch:
        (weights * squares(mlp(inputs))).sum().backward()
    assert batch.result.cosines.isnan().tolist() == [[weight == 0, True] for weight in weights]
    assert batch.result.finite.all()


def test_cosines_with_a_grad_scaler(mlp, inputs, draw_directions):
    directions = draw_directions(mlp, 1)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = CosineEngine(mlp, grad_scaler=scaler)
    engine.add_direction("random 0", directions["random 0"])
    with engine, engine.batch(range(4)) as batch:
        scaler.scale(squares(mlp(inputs)).mean()).backward()
    check_cosines(batch.result, expected, directions)


def test_overflow_gives_no_cosine(mlp, inputs):
    """Finite dots over infinite norms would be zero."""
    mlp.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80)
    engine = CosineEngine(mlp, grad_scaler=scaler)
    engine.add_direction("loss", lambda: squares(mlp(inputs.float() + 1)).mean())
    with engine, engine.batch(range(4)) as batch:
        scaler.scale(squares(mlp(inputs.float())).sum()).backward()
    assert batch.result.finite.all()
    assert batch.result.cosines.isnan().all()


def test_in_run_values_follow_an_engine_of_cosines(mlp, inputs):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = CosineEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs + 1)).mean())
    with InRunValues(engine, optimizer) as values, engine:
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        optimizer.step()
    for sample in range(4):
        dot = batch.result.total[sample, 0].item()
        assert values[sample] == pytest.approx(0.1 * dot, rel=1e-12)

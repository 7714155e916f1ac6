"""Dot products against per-sample autograd in float64, and everything that must be refused."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ghost_core import CaptureError, UnknownNameError
from ghost_core.testing import assert_within, check_engine, next_token_losses, per_sample_gradients
from ghost_engines import DotProductEngine


def squares(outputs):
    """Return a loss per sample, `[N]`, from outputs `[N, ...]`."""
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


def gradient(model, loss):
    """Return the gradient of a loss by name of the trainable parameters."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def train(engine, model, inputs, losses=squares):
    """Score one batch with the sum of the samples' losses."""
    with engine, engine.batch(range(len(inputs))) as batch:
        losses(model(inputs)).sum().backward()
    return batch.result


@pytest.fixture
def engine(mlp, draw_directions):
    """An engine with one direction of tensors."""
    engine = DotProductEngine(mlp)
    engine.add_direction("given", draw_directions(mlp, 1)["random 0"])
    return engine


@pytest.fixture
def inputs():
    return torch.randn(4, 5, dtype=torch.float64)


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


# Renewal of closures


class Counted:
    """A validation loss that counts its calls."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.calls = model, inputs, 0

    def __call__(self):
        self.calls += 1
        return squares(self.model(self.inputs)).mean()


@pytest.mark.parametrize(
    ("refresh", "calls"), [(None, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 1, 1, 2, 2, 2, 3]), (9, [1] * 7)]
)
def test_refresh_renews_every_so_many_batches(refresh, calls, mlp, inputs, assert_scores):
    closure, seen, direction = Counted(mlp, inputs + 1), [], {}
    engine = DotProductEngine(mlp)
    engine.add_direction("loss", closure, refresh=refresh)
    with engine:
        for step in range(7):
            if step == 0 or calls[step] != calls[step - 1]:
                direction = gradient(mlp, squares(mlp(inputs + 1)).mean())
            expected = per_sample_gradients(mlp, squares(mlp(inputs)))
            with engine.batch(range(4)) as batch:
                squares(mlp(inputs)).sum().backward()
            seen.append(closure.calls)
            assert_scores(batch.result, expected, {"loss": direction})
            with torch.no_grad():
                for parameter in mlp.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    assert seen == calls


def test_each_direction_is_renewed_in_its_own_time(mlp, inputs):
    often, seldom = Counted(mlp, inputs), Counted(mlp, inputs)
    engine = DotProductEngine(mlp)
    engine.add_direction("often", often, refresh=2)
    engine.add_direction("seldom", seldom, refresh=3)
    for _ in range(7):
        train(engine, mlp, inputs)
    assert (often.calls, seldom.calls) == (4, 3)


def test_failing_closure_leaves_no_half_renewed_directions(mlp, inputs, assert_scores):
    fails = [False]

    def sometimes():
        if fails[0]:
            raise OSError("no validation data")
        return squares(mlp(inputs + 2)).mean()

    engine = DotProductEngine(mlp)
    engine.add_direction("steady", lambda: squares(mlp(inputs + 1)).mean())
    engine.add_direction("sometimes", sometimes)
    train(engine, mlp, inputs)
    with torch.no_grad():
        mlp[0].weight.mul_(2.0)
    fails[0] = True
    with pytest.raises(OSError, match="no validation data"):
        train(engine, mlp, inputs)
    fails[0] = False
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    directions = {
        "steady": gradient(mlp, squares(mlp(inputs + 1)).mean()),
        "sometimes": gradient(mlp, squares(mlp(inputs + 2)).mean()),
    }
    assert_scores(train(engine, mlp, inputs), expected, directions)


def test_closure_leaves_no_trace_on_the_training():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)
    ).double()
    model[1].eval()  # in training mode it would mix the samples
    inputs = torch.randn(8, 5, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    modes = []

    def noisy():
        modes.append([module.training for module in model.modules()])
        model.train()
        random.random()
        noise = torch.as_tensor(np.random.normal(size=(8, 5)))
        return squares(model(inputs + noise + torch.randn(8, 5))).mean()

    engine = DotProductEngine(model, exclude="1")
    engine.add_direction("noisy", noisy)
    before = {
        "torch": torch.get_rng_state(),
        "numpy": torch.as_tensor(np.random.get_state()[1].astype(np.int64)),
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
        **{name: p.grad.clone() for name, p in model.named_parameters()},
    }
    python = random.getstate()
    with engine, engine.batch(range(8)):
        after = {
            "torch": torch.get_rng_state(),
            "numpy": torch.as_tensor(np.random.get_state()[1].astype(np.int64)),
            **dict(model.named_buffers()),
            **{name: p.grad for name, p in model.named_parameters()},
        }
        assert after.keys() == before.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        assert random.getstate() == python
        assert [model.training, model[1].training, model[2].training] == [True, False, True]
        squares(model(inputs)).sum().backward()
    assert modes == [[False] * 5]


def test_closure_is_left_alone_by_other_engines(mlp, inputs, engine, assert_scores):
    """A closure runs the model while another engine has a batch open."""
    closure = Counted(mlp, inputs + 1)
    renewed = DotProductEngine(mlp)
    renewed.add_direction("loss", closure)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    direction = gradient(mlp, squares(mlp(inputs + 1)).mean())
    with engine, renewed, engine.batch(range(4)) as first, renewed.batch(range(4)) as second:
        squares(mlp(inputs)).sum().backward()
    assert_scores(second.result, expected, {"loss": direction})
    assert torch.equal(first.result.total, train(engine, mlp, inputs).total)


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


# Refusals


def test_no_direction_is_refused(mlp, inputs):
    engine = DotProductEngine(mlp)
    with pytest.raises(CaptureError, match="add_direction"):
        train(engine, mlp, inputs)


def test_unknown_parameter_lists_what_exists(mlp, draw_directions):
    direction = draw_directions(mlp, 1)["random 0"]
    direction["0.wieght"] = direction.pop("0.weight")
    with pytest.raises(UnknownNameError) as error:
        DotProductEngine(mlp).add_direction("typo", direction)
    assert "did you mean '0.weight'?" in str(error.value)
    assert "0.bias, 0.weight, 2.bias, 2.weight" in str(error.value)


def without(direction, name):
    return {key: value for key, value in direction.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: without(given, "2.bias"), r"no tensor for 2\.bias"),
        (lambda given: {**given, "2.bias": torch.zeros(4)}, r"shape \(4,\) for 2\.bias"),
        (lambda given: {**given, "2.bias": torch.zeros(1, 3)}, r"shape \(1, 3\) for 2\.bias"),
        (lambda given: {**given, "2.bias": torch.full((3,), torch.nan)}, r"not finite at 2\.bias"),
        (lambda given: {**given, "2.bias": torch.full((3,), torch.inf)}, r"not finite at 2\.bias"),
        (lambda given: list(given.values()), "a closure or a mapping of tensors, not list"),
    ],
    ids=["missing", "shape", "axes", "nan", "inf", "list"],
)
def test_wrong_tensors_are_refused(change, message, mlp, draw_directions):
    engine = DotProductEngine(mlp)
    with pytest.raises(CaptureError, match=message):
        engine.add_direction("wrong", change(draw_directions(mlp, 1)["random 0"]))
    assert engine.directions == ()


@pytest.mark.parametrize(
    ("closure", "described"),
    [
        (lambda model, inputs: model(inputs), r"shape \(4, 3\) with a gradient"),
        (lambda model, inputs: model(inputs).sum().detach(), "without a gradient"),
        (lambda model, inputs: torch.tensor(1.0), "without a gradient"),
        (lambda model, inputs: model(inputs).sum().item(), "float"),
        (lambda model, inputs: None, "NoneType"),
    ],
    ids=["not a scalar", "detached", "constant", "number", "nothing"],
)
def test_losses_without_a_gradient_are_refused(closure, described, mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("wrong", lambda: closure(mlp, inputs))
    with pytest.raises(CaptureError, match=f"direction 'wrong'.*{described}"):
        train(engine, mlp, inputs)


def test_loss_of_another_model_is_refused(mlp, inputs):
    other = copy.deepcopy(mlp)
    engine = DotProductEngine(mlp)
    engine.add_direction("other", lambda: squares(other(inputs)).mean())
    with pytest.raises(CaptureError, match="direction 'other'"):
        train(engine, mlp, inputs)


def test_closure_whose_gradient_is_not_finite_is_refused(mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("nan", lambda: squares(mlp(inputs)).mean() * torch.nan)
    with pytest.raises(CaptureError, match="direction 'nan' is not finite at"):
        train(engine, mlp, inputs)


@pytest.mark.parametrize("refresh", [0, -1])
def test_refresh_must_be_positive(refresh, mlp):
    with pytest.raises(CaptureError, match=f"not {refresh}"):
        DotProductEngine(mlp).add_direction("loss", lambda: torch.zeros(()), refresh=refresh)


def test_refresh_goes_with_closures_only(mlp, draw_directions):
    with pytest.raises(CaptureError, match="refresh goes with a closure"):
        DotProductEngine(mlp).add_direction("given", draw_directions(mlp, 1)["random 0"], refresh=2)


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_wrong_number_of_ids_is_refused(count, mlp, inputs, engine):
    with pytest.raises(CaptureError), engine, engine.batch(range(count)):
        squares(mlp(inputs)).sum().backward()


@pytest.mark.parametrize(
    "ids",
    [
        [0.0, 1.0, 2.0, 3.0],
        [True, False, True, False],
        torch.zeros(4, 1, dtype=torch.int64),
        torch.tensor(3),
        ["a", "b", "c", "d"],
        np.zeros(4),
        None,
    ],
    ids=["floats", "flags", "column", "scalar", "strings", "array of floats", "none"],
)
def test_ids_must_be_one_integer_per_sample(ids, mlp, inputs, engine):
    with pytest.raises(CaptureError, match="one integer per sample"), engine, engine.batch(ids):
        squares(mlp(inputs)).sum().backward()


@pytest.mark.parametrize(
    "ids",
    [[7, -5, 7, 2**40], (7, -5, 7, 2**40), torch.tensor([7, -5, 7, 2**40])],
    ids=["list", "tuple", "tensor"],
)
def test_ids_come_back_as_given(ids, mlp, inputs, engine):
    with engine, engine.batch(ids) as batch:
        squares(mlp(inputs)).sum().backward()
    assert batch.result.ids.tolist() == [7, -5, 7, 2**40]
    assert batch.result.ids.dtype == torch.int64


def test_ids_are_copied(mlp, inputs, engine):
    ids = np.arange(4, dtype=np.int32)
    with engine, engine.batch(ids) as batch:
        squares(mlp(inputs)).sum().backward()
        ids[:] = 9
    assert batch.result.ids.tolist() == [0, 1, 2, 3]


def test_unknown_option_is_a_type_error(mlp):
    with pytest.raises(TypeError, match="layer_names"):
        DotProductEngine(mlp, layer_names="0")


def test_unknown_layer_lists_what_exists(mlp):
    with pytest.raises(UnknownNameError, match=r"Available: 0, 0\.bias, 0\.weight, 2"):
        DotProductEngine(mlp, layers="1")


def test_batch_needs_the_engine_attached(mlp, inputs, engine):
    with pytest.raises(CaptureError, match="attach the engine first"), engine.batch(range(4)):
        squares(mlp(inputs)).sum().backward()
    with engine:
        pass
    with pytest.raises(CaptureError, match="attach the engine first"), engine.batch(range(4)):
        squares(mlp(inputs)).sum().backward()


def test_attaching_twice_is_refused_and_harmless(mlp, inputs, engine, assert_scores):
    with engine:
        with pytest.raises(CaptureError, match="attached already"), engine:
            pass
        with pytest.raises(CaptureError), engine.frozen():
            pass
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
    assert torch.equal(batch.result.total, train(engine, mlp, inputs).total)
    assert not any(module._forward_hooks for module in mlp.modules())


def test_opening_a_batch_twice_is_refused(mlp, inputs, engine):
    with engine:
        with engine.batch(range(4)) as outer:
            with pytest.raises(CaptureError, match="open already"), engine.batch(range(4)):
                pass
            squares(mlp(inputs)).sum().backward()
        assert torch.equal(outer.result.total, train_attached(engine, mlp, inputs))


def train_attached(engine, model, inputs):
    with engine.batch(range(len(inputs))) as batch:
        squares(model(inputs)).sum().backward()
    return batch.result.total


def test_parameter_frozen_after_attaching_is_refused(mlp, inputs, engine):
    with engine:
        train_attached(engine, mlp, inputs)
        mlp[2].bias.requires_grad_(False)
        with pytest.raises(CaptureError, match=r"2\.bias no longer require"):
            train_attached(engine, mlp, inputs)


def test_parameter_unfrozen_after_attaching_is_refused(mlp, inputs):
    mlp[2].bias.requires_grad_(False)
    engine = DotProductEngine(mlp)
    engine.add_direction("val", lambda: squares(mlp(inputs + 1)).mean())
    with engine:
        train_attached(engine, mlp, inputs)
        mlp[2].bias.requires_grad_(True)
        with pytest.raises(CaptureError, match=r"2\.bias requires gradients"):
            train_attached(engine, mlp, inputs)


def test_flags_of_parameters_left_out_may_change(mlp, inputs):
    engine = DotProductEngine(mlp, exclude="2.bias")
    engine.add_direction("val", lambda: squares(mlp(inputs + 1)).mean())
    with engine:
        before = train_attached(engine, mlp, inputs)
        mlp[2].bias.requires_grad_(False)
        assert torch.equal(train_attached(engine, mlp, inputs), before)


def change_module(model):
    model[2] = nn.Linear(7, 3).double()


def change_parameter(model):
    model[2].weight = nn.Parameter(torch.zeros(3, 7, dtype=torch.float64))


def freeze(model):
    model[2].bias.requires_grad_(False)


def add_module(model):
    model.append(nn.Linear(3, 3).double())


# A parameter of the same shape in the same module is found by its name: nothing to refuse.
@pytest.mark.parametrize("change", [change_module, freeze, add_module])
def test_model_changed_after_the_engine_was_made_is_refused(change, mlp, engine):
    change(mlp)
    with pytest.raises(CaptureError, match="make a new engine"), engine:
        pass


@pytest.mark.parametrize("change", [change_module, freeze, add_module])
def test_model_changed_is_refused_beside_another_engine_too(change, mlp, inputs, engine):
    change(mlp)
    current = DotProductEngine(mlp)
    current.add_direction("loss", lambda: squares(mlp(inputs)).mean())
    alone = train(current, mlp, inputs).total
    with current:
        with pytest.raises(CaptureError), engine:
            train_attached(engine, mlp, inputs)
        assert torch.equal(train_attached(current, mlp, inputs), alone)


def test_replaced_parameter_is_scored(mlp, inputs, engine, draw_directions, assert_scores):
    change_parameter(mlp)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)), ["2.bias", "2.weight"])
    scores = train(engine, mlp, inputs)
    direction = draw_directions(mlp, 1)["random 0"]
    for name, gradients in expected.items():
        dots = gradients.flatten(1) @ direction[name].flatten()
        assert_within(scores.by_parameter[name][:, 0], dots, dots.norm(), what=name)


def test_collect_before_any_batch_is_refused(engine):
    with pytest.raises(CaptureError, match="no batch yet"):
        engine.collect()


def fail_after(loss):
    loss.backward()
    raise ZeroDivisionError


def test_result_of_an_open_or_failed_batch_is_refused(mlp, inputs, engine):
    with engine:
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
            for read in (lambda: batch.result, engine.collect):
                with pytest.raises(CaptureError, match="no result"):
                    read()
        assert batch.result.total.any()
        with pytest.raises(ZeroDivisionError), engine.batch(range(4)) as failed:
            fail_after(squares(mlp(inputs)).sum())
        for read in (lambda: failed.result, engine.collect):
            with pytest.raises(CaptureError, match="no result"):
                read()


def test_batch_without_backward_or_forward_is_refused(mlp, inputs, engine):
    with engine:
        with pytest.raises(CaptureError, match="was not called"), engine.batch(range(4)):
            pass
        with pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(4)):
            mlp(inputs)
        with pytest.raises(CaptureError, match="outside a call"), engine.batch(range(4)):
            mlp[2](mlp[0](inputs))


def test_backward_after_the_batch_is_refused(mlp, inputs, engine):
    with engine:
        with pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(4)):
            loss = squares(mlp(inputs)).sum()
        with pytest.raises(CaptureError, match="after its batch was closed"):
            loss.backward()


def test_scores_say_whether_the_split_was_verified(mlp, inputs):
    for verify in (True, False):
        engine = DotProductEngine(mlp, verify=verify)
        engine.add_direction("loss", lambda: squares(mlp(inputs)).mean())
        assert train(engine, mlp, inputs).verified is verify


def test_keeps_what_every_engine_promises():
    def make_engine(model):
        ids = torch.arange(12).view(2, 6)
        engine = DotProductEngine(model)
        engine.add_direction("loss", lambda: next_token_losses(model(ids), ids).mean(), refresh=3)
        return engine

    check_engine(make_engine)

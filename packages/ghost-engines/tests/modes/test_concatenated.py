"""The concatenated mode: validation samples go through the model with those of training."""

import copy

import pytest
import torch
from engine_kit import gradient, squares
from mode_kit import check_grads, check_norms_of, concatenated
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ghost_core import CaptureError
from ghost_core.testing import next_token_losses, per_sample_gradients
from ghost_engines import DotProductEngine, InRunValues


@pytest.fixture
def others():
    """Validation samples for `transformer`, shorter than those of training."""
    return torch.randint(1, 19, (7, 5), generator=torch.Generator().manual_seed(2))


def padded_losses(logits, ids, padding=0):
    """Return the mean loss of each sample's own tokens; id 0 stands for padding."""
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == padding, -100)
    each = functional.cross_entropy(logits[:, :-1].mT, targets, reduction="none")
    return each.sum(1) / (targets != -100).sum(1)


# As training goes


@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("verify", [True, False])
def test_padded_batches_and_a_tied_head(m, verify, transformer, tokens, others, assert_scores):
    """With weights that differ, and a model whose positions are the same for all samples."""
    others, weights = (
        functional.pad(others[:m], (0, 2)),
        torch.linspace(0.5, 2, 5, dtype=torch.float64),
    )
    plain = copy.deepcopy(transformer)
    own = per_sample_gradients(plain, weights * padded_losses(plain(tokens), tokens))
    direction = gradient(plain, 3 * padded_losses(plain(others), others).sum())
    (weights * padded_losses(plain(tokens), tokens)).sum().backward()
    engine = concatenated(transformer, norms=True, verify=verify)
    both = engine.concatenate({"ids": tokens}, {"ids": others[:, :5]}, pad={"ids": 0})["ids"]
    assert both.shape == (5 + m, 7)
    with engine, engine.batch(range(5)) as batch:
        each = padded_losses(transformer(both), both)
        engine.backward(each, train_weight=weights, validation_weight=3)
    assert_scores(batch.result, own, {"validation": direction})
    check_norms_of(batch.result, own, {"validation": direction})
    check_grads(plain, transformer)


class Positions(nn.Module):
    """Learned positions that are looked up once, and a head tied by a function."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(19, 6), nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, ids):
        x = self.tokens(ids) + 2 * self.positions(torch.arange(ids.shape[1]))
        return functional.linear(torch.tanh(self.inner(x)), self.tokens.weight)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Positions()

    def forward(self, ids):
        return self.inner(ids) + checkpoint(self.inner, ids, use_reentrant=False)


@pytest.mark.parametrize("setting", ["plain", "checkpointing", "bfloat16", "scaler"])
def test_accumulation_and_clipping(setting, tokens):
    """Two micro-batches a step, each with validation samples, then clipping."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=setting == "scaler")
    model = Checkpointed() if setting == "checkpointing" else Positions()
    plain, parts, held_out = copy.deepcopy(model), tokens.split([2, 3]), tokens.flip(0)[:2] % 11
    engine = concatenated(model, norms=True, grad_scaler=scaler)

    def losses_of(model, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bfloat16"):
            return next_token_losses(model(ids).float(), ids)

    found = []
    with engine:
        for _ in range(2):
            model.zero_grad()
            for part in parts:
                both = engine.concatenate(part, held_out)
                with engine.batch(range(len(part))) as batch:
                    each = losses_of(model, both)
                    engine.backward(each, train_weight=1, validation_weight=0.5)
                found.append(batch.result)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for part in parts:
        scaler.scale(losses_of(plain, part).sum()).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    narrow = setting == "bfloat16"
    check_grads(plain, model, 2e-2 if narrow else 1e-6)
    direction = gradient(plain, 0.5 * losses_of(plain, held_out).sum())
    for part, scores in zip((*parts, *parts), found, strict=True):
        own = per_sample_gradients(plain, losses_of(plain, part))
        dots = sum((own[at].flatten(1) @ direction[at].flatten()).double() for at in own)
        error = (scores.total[:, 0] - dots).abs().max()
        assert error <= (5e-2 if narrow else 1e-4) * dots.abs().max()


def test_values_of_a_run(mlp, inputs):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = concatenated(mlp)
    with engine, InRunValues(engine, optimizer) as values:
        both = engine.concatenate(inputs, inputs.flip(0)[:2])
        with engine.batch([3, 1, 4, 1]) as batch:
            engine.backward(squares(mlp(both)), train_weight=1 / 4, validation_weight=1 / 2)
        optimizer.step()
    table = values.to_dict()
    assert table.keys() == {1, 3, 4}
    assert table[4] == pytest.approx(0.1 * batch.result.total[2, 0].item())


def test_a_frozen_pass(transformer, tokens, assert_scores):
    own = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    train = {at: each[:3] for at, each in own.items()}
    direction = {at: each[3:].sum(0) for at, each in own.items()}
    engine = concatenated(transformer, norms=True)
    both = engine.concatenate(tokens[:3], tokens[3:])
    with engine.frozen(), engine.batch(range(3)) as batch:
        each = next_token_losses(transformer(both), both)
        engine.backward(each, train_weight=1, validation_weight=1)
    assert_scores(batch.result, train, {"validation": direction})
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_a_direction_is_dropped_with_its_layer(mlp, inputs):
    """When the gradient of a layer has been used, none of those behind it is held."""
    seen = []

    class Looking(DotProductEngine):
        def multiply(self, pass_, parameter, gradient):
            kept = {name for name, each in self._stacked.items() if each.numel()}
            seen.append((parameter.name, kept, len(self._both._kept)))
            return super().multiply(pass_, parameter, gradient)

    engine = Looking(mlp, mode="concatenated")
    both = engine.concatenate(inputs, inputs)
    with engine, engine.batch(range(4)):
        engine.backward(squares(mlp(both)), train_weight=1, validation_weight=1)
    assert [each[0] for each in seen] == ["2.weight", "2.bias", "0.weight", "0.bias"]
    assert all(kept == {name} and not others for name, kept, others in seen)


# Refused


def step(engine, model, both, n=4, change=lambda losses: losses, times=1, **weights):
    """Score one batch of n training samples, whose losses are changed first."""
    with engine.batch(range(n)):
        each = change(squares(model(both)))
        for _ in range(times):
            engine.backward(each, **({"train_weight": 1, "validation_weight": 1} | weights))


def test_calls_in_other_modes_and_outside_of_batches_are_refused(mlp, inputs, engine):
    both = concatenated(mlp)
    with pytest.raises(CaptureError, match="mode='concatenated'"):
        engine.concatenate(inputs, inputs)
    with pytest.raises(CaptureError, match="mode='concatenated'"):
        engine.backward(inputs[:, 0], train_weight=1, validation_weight=1)
    with pytest.raises(CaptureError, match=r"inside engine\.batch"):
        both.backward(inputs[:, 0], train_weight=1, validation_weight=1)
    with both, pytest.raises(CaptureError, match="no validation batch"), both.batch(range(4)):
        pass
    both.concatenate(inputs, inputs)
    with both, pytest.raises(CaptureError, match=r"before engine\.batch"), both.batch(range(4)):
        both.concatenate(inputs, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 6}, "6 ids for 4 training samples"),
        ({"change": torch.mean}, "one loss for each of 4 training and 2 validation"),
        ({"change": lambda each: each[:4]}, "one loss for each of 4 training and 2 validation"),
        ({"validation_weight": torch.ones(3)}, "validation_weight must be one number"),
        ({"train_weight": torch.ones(2)}, "train_weight must be one number"),
        ({"times": 2}, "called before"),
    ],
)
def test_batches_that_do_not_fit_are_refused(options, message, mlp, inputs):
    engine = concatenated(mlp)
    both = engine.concatenate(inputs, inputs[:2])
    with engine, pytest.raises(CaptureError, match=message):
        step(engine, mlp, both, **options)
    both = engine.concatenate(inputs, inputs[:2])
    with engine:
        step(engine, mlp, both)


def test_an_own_backward_pass_is_refused(mlp, inputs):
    engine = concatenated(mlp)
    both = engine.concatenate(inputs, inputs)
    own = pytest.raises(CaptureError, match=r"in place of loss\.backward\(\)")
    with engine, own, engine.batch(range(4)):
        squares(mlp(both)).sum().backward()


def test_micro_batches_and_second_passes_are_refused(mlp, inputs):
    engine, other = concatenated(mlp), lambda each: each + squares(mlp(both.flip(1)))
    parts = Parts(mlp)
    both = engine.concatenate(inputs, inputs[:2])
    with engine, pytest.raises(CaptureError, match="concatenate each micro-batch"):
        step(engine, parts, both)
    both = engine.concatenate(inputs, inputs[:2])
    with engine, pytest.raises(CaptureError, match=r"arrived twice for \d"):
        step(engine, mlp, both, change=other)


class Parts:
    """Calls a model on two halves of a batch."""

    def __init__(self, model):
        self.model = model

    def __call__(self, both):
        return torch.cat([self.model(part) for part in both.split(3)])


def test_what_has_no_tap_is_refused_by_name(mlp, inputs):
    with pytest.raises(CaptureError, match=r"0\.bias, 2\.weight, 2\.bias are not selected"):
        concatenated(mlp, layers="0.weight")
    mlp[2].requires_grad_(False)
    engine = concatenated(mlp, layers="0")
    both = engine.concatenate(inputs, inputs)
    with engine:
        mlp[2].bias.requires_grad_(True)
        with pytest.raises(CaptureError, match=r"2\.bias"):
            step(engine, mlp, both)


def test_other_options_and_directions_are_refused(mlp, draw_directions):
    engine = concatenated(mlp)
    assert engine.directions == ("validation",)
    with pytest.raises(CaptureError, match="cannot be added in concatenated mode"):
        engine.add_direction("other", draw_directions(mlp, 1)["random 0"])
    with pytest.raises(CaptureError, match="no direction 'validation' to look at"):
        engine.direction("validation")
    other = concatenated(mlp)
    other.load_state_dict(engine.state_dict())
    with pytest.raises(CaptureError, match="per_token"):
        concatenated(mlp, per_token=True)


# Broken on purpose


@pytest.fixture
def run(transformer, tokens, others, assert_scores):
    """Compare one batch of an engine of a class with autograd."""
    plain = copy.deepcopy(transformer)
    own = per_sample_gradients(plain, padded_losses(plain(tokens), tokens))
    others = functional.pad(others, (0, 2))
    direction = gradient(plain, padded_losses(plain(others), others).sum())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(padded_losses(plain(tokens), tokens).sum()).backward()

    def compare(kind, verify=False):
        transformer.zero_grad()
        engine = kind(
            transformer, mode="concatenated", norms=True, verify=verify, grad_scaler=scaler
        )
        both = engine.concatenate(tokens, others[:, :5], pad=0)
        with engine, engine.batch(range(5)) as batch:
            each = padded_losses(transformer(both), both)
            engine.backward(each, train_weight=1, validation_weight=1)
        assert_scores(batch.result, own, {"validation": direction})
        check_norms_of(batch.result, own, {"validation": direction})
        check_grads(plain, transformer)

    compare(DotProductEngine)
    return compare


class ValidationInGrad(DotProductEngine):
    """Leaves the gradient of validation samples in `.grad`."""

    def on_gradient(self, pass_, parameter, gradient):
        super().on_gradient(pass_, parameter, gradient)
        return gradient.sum()


class LiftedInGrad(DotProductEngine):
    """Leaves it where autograd makes the gradient, as of positions that all samples share."""

    plain_sums = True

    def __setattr__(self, name, value):
        super().__setattr__(name, True if name == "plain_sums" else value)


class OneRowOff(DotProductEngine):
    """Takes the last training sample for one of validation."""

    def concatenate(self, train, validation, *, pad=None):
        split = self._both.split

        def off(pass_, gradient):
            train, rows, direction = split(pass_, gradient)
            return train, rows, direction + rows.narrow(slice(-1, None)).sum()

        self._both.split = off
        return super().concatenate(train, validation, pad=pad)


class CrossTermDropped(DotProductEngine):
    """Multiplies each use of a tied head with the direction of that use alone."""

    def multiply(self, pass_, parameter, gradient):
        pass_.several.clear()
        self._terms._alone.clear()
        return super().multiply(pass_, parameter, gradient)


class ScaleForgotten(DotProductEngine):
    """Divides by the scale once, where both sides had it."""

    def _unscaled(self, values, times, scale):
        return super()._unscaled(values, times - 1, scale)


FAULTS = [ValidationInGrad, OneRowOff, CrossTermDropped, ScaleForgotten]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found(kind, run):
    with pytest.raises(AssertionError, match="entries are off"):
        run(kind)


def test_a_fault_with_shared_values_is_found(tokens):
    def grads(kind):
        torch.manual_seed(0)
        model = Positions().double()
        engine = kind(model, mode="concatenated", verify=False)
        both = engine.concatenate(tokens[:3], tokens[3:])
        with engine, engine.batch(range(3)):
            each = next_token_losses(model(both), both)
            engine.backward(each, train_weight=1, validation_weight=1)
        plain = copy.deepcopy(model)
        plain.zero_grad()
        next_token_losses(plain(tokens[:3]), tokens[:3]).sum().backward()
        check_grads(plain, model)

    grads(DotProductEngine)
    with pytest.raises(AssertionError, match=r"(tokens|positions)\.weight\.grad.*entries are off"):
        grads(LiftedInGrad)

"""The fused mode: dots, norms and `.grad`, where ghost forms the weight gradients itself."""

import copy

import pytest
import torch
from engine_kit import Repeated, squares
from mode_kit import beside, check_grads, check_norms_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghost_core import CaptureError, UnknownNameError
from ghost_core.testing import (
    assert_within,
    check_engine,
    next_token_losses,
    per_sample_gradients,
)
from ghost_engines import CosineEngine, DotProductEngine


def fused(model, directions, **options):
    return beside(model, "fused", directions, **options)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tokens", [1, 40])
def test_either_way_of_reducing(k, tokens, draw_directions, assert_scores):
    """Few tokens are contracted; of many, gradients are built: small ones together, others not."""
    model = nn.Sequential(nn.Linear(150, 120), nn.Tanh(), nn.Linear(120, 3)).double()
    inputs = torch.randn(4, tokens, 150, dtype=torch.float64)
    directions, plain = draw_directions(model, k), copy.deepcopy(model)
    gradients = per_sample_gradients(plain, squares(plain(inputs)))
    squares(plain(inputs)).sum().backward()
    engine = fused(model, directions, norms=True, verify=False)
    with engine, engine.batch(range(4)) as batch:
        squares(model(inputs)).sum().backward()
    assert_scores(batch.result, gradients, directions)
    check_norms_of(batch.result, gradients, directions)
    check_grads(plain, model)


# As training goes


@pytest.mark.stress
def test_it_keeps_what_every_engine_promises(draw_directions):
    def make(model, **options):
        return fused(model, draw_directions(model, 1), norms=True, **options)

    check_engine(make, gradient_error=1e-6, steps=2)


@pytest.mark.parametrize("setting", ["plain", "checkpointing", "bfloat16", "scaler"])
def test_accumulation_and_clipping(setting, transformer, tokens, draw_directions):
    """Two micro-batches, clipped; the second step's gradient is made by the engine alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=setting == "scaler")
    model = transformer.float()
    model = Checkpointed(model) if setting == "checkpointing" else model
    plain = copy.deepcopy(model)
    engine = fused(model, draw_directions(model, 1), norms=True, grad_scaler=scaler)

    def backward(model):
        for part in tokens.split([2, 3]):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bfloat16"):
                logits = model(part)
            scaler.scale(next_token_losses(logits.float(), part).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    with engine:
        for _ in range(2):
            model.zero_grad()
            with engine.batch(range(5)) as batch:
                backward(model)
    backward(plain)
    narrow = setting == "bfloat16"
    check_grads(plain, model, 2e-2 if narrow else 1e-6)
    own = torch.cat([next_token_losses(plain(part), part) for part in tokens.split([2, 3])])
    expected = per_sample_gradients(plain, own)
    norms = torch.cat([each.flatten(1) for each in expected.values()], 1).double().norm(dim=1)
    assert_within(batch.result.norms, norms, norms, 2e-2 if narrow else 1e-4)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return checkpoint(self.inner, ids, use_reentrant=False)


class CheckpointedInside(nn.Module):
    """A parameter of its own is used in what runs again, when the module itself is over."""

    def __init__(self, use):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.own, self.use = nn.Parameter(torch.randn(3, 6)), use

    def inner(self, x):
        return self.use(self.first(x), self.own).tanh()

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


def bent(hidden, own):
    return hidden * own.exp()


def projected(hidden, own):
    return hidden @ own.T @ own


@pytest.mark.parametrize("use", [torch.mul, torch.sub, bent, projected])
def test_what_a_checkpoint_inside_of_a_module_runs_again(use, draw_directions, assert_scores):
    model = CheckpointedInside(use).double()
    directions, plain = draw_directions(model, 2), copy.deepcopy(model)
    engine = fused(model, directions, norms=True)
    with engine:
        for _ in range(3):
            x = torch.randn(4, 3, 6, dtype=torch.float64)
            gradients = per_sample_gradients(plain, squares(plain(x)))
            for each in (model, plain):
                each.zero_grad()
            with engine.batch(range(4)) as batch:
                squares(model(x)).sum().backward()
            squares(plain(x)).sum().backward()
            assert_scores(batch.result, gradients, directions)
            check_norms_of(batch.result, gradients, directions)
            check_grads(plain, model)


def test_parameters_that_are_left_out_train_as_ever(transformer, tokens, draw_directions):
    plain = copy.deepcopy(transformer)
    next_token_losses(plain(tokens), tokens).sum().backward()
    engine = fused(transformer, draw_directions(transformer, 1), exclude="attend", verify=False)
    with engine, engine.batch(range(5)):
        next_token_losses(transformer(tokens), tokens).sum().backward()
    check_grads(plain, transformer)


def test_a_frozen_pass_and_tokens(transformer, tokens, draw_directions, assert_scores):
    directions = draw_directions(transformer, 1)
    gradients = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = fused(transformer, directions, norms=True)
    with engine.frozen(), engine.batch(range(5)) as batch:
        next_token_losses(transformer(tokens), tokens).sum().backward()
    assert_scores(batch.result, gradients, directions)
    check_norms_of(batch.result, gradients, directions)
    assert all(parameter.grad is None for parameter in transformer.parameters())
    model = nn.Sequential(nn.Linear(5, 4)).double()
    inputs, plain = torch.randn(3, 6, 5, dtype=torch.float64), copy.deepcopy(model)
    squares(plain(inputs)).sum().backward()
    engine = fused(model, draw_directions(model, 2), per_token=True, verify=False)
    with engine, engine.batch(range(3)) as batch:
        squares(model(inputs)).sum().backward()
    assert batch.result.by_token.shape == (3, 6, 2)
    check_grads(plain, model)


# Refused


def test_modes_that_do_not_exist_are_refused(mlp):
    with pytest.raises(UnknownNameError, match=r"fussed.*exact, fused"):
        DotProductEngine(mlp, mode="fussed")


@pytest.mark.parametrize("twice", ["a pass", "a backward pass"])
def test_norms_of_what_arrives_twice_are_refused(twice, mlp, inputs, draw_directions):
    engine = fused(mlp, draw_directions(mlp, 1), norms=True)
    named = pytest.raises(CaptureError, match=r"arrived twice for \d\.(weight|bias)")
    with engine, named, engine.batch(range(4)):
        loss = squares(mlp(inputs)).sum()
        loss.backward(retain_graph=True)
        loss = squares(mlp(inputs)).sum() if twice == "a pass" else loss
        loss.backward()
    without = fused(mlp, draw_directions(mlp, 1))
    with without, without.batch(range(4)):
        loss = squares(mlp(inputs)).sum()
        loss.backward(retain_graph=True)
        loss.backward()


def test_norms_have_to_be_asked_for(mlp, inputs, engine):
    with engine, engine.batch(range(4)) as batch:
        squares(mlp(inputs)).sum().backward()
    for name in (
        "norms",
        "cosines",
        "norms_by_parameter",
        "cosines_by_parameter",
        "cosines_by_layer",
    ):
        with pytest.raises(CaptureError, match="norms=True"):
            getattr(batch.result, name)


# In exact mode


def test_norms_beside_exact_dots(transformer, tokens, draw_directions, assert_scores):
    directions, plain = draw_directions(transformer, 2), copy.deepcopy(transformer)
    gradients = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    for _ in range(2):
        next_token_losses(plain(tokens), tokens).sum().backward()
    engine = DotProductEngine(transformer, norms=True)
    other = CosineEngine(transformer)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
        other.add_direction(name, direction)
    with engine, other:
        for _ in range(2):
            with engine.batch(range(5)) as batch, other.batch(range(5)) as cosines:
                next_token_losses(transformer(tokens), tokens).sum().backward()
    assert_scores(batch.result, gradients, directions)
    check_norms_of(batch.result, gradients, directions)
    torch.testing.assert_close(batch.result.cosines, cosines.result.cosines)
    check_grads(plain, transformer, 0.0)


# Broken on purpose


@pytest.fixture
def off():
    return pytest.raises(AssertionError, match="entries are off")


@pytest.fixture
def run(transformer, tokens, draw_directions, assert_scores):
    """Compare one batch of an engine of a class, which makes the gradients itself."""
    plain, directions = copy.deepcopy(transformer), draw_directions(transformer, 2)
    gradients = per_sample_gradients(plain, next_token_losses(plain(tokens), tokens))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(next_token_losses(plain(tokens), tokens).sum()).backward()

    def compare(kind):
        transformer.zero_grad()
        engine = kind(transformer, mode="fused", norms=True, verify=False, grad_scaler=scaler)
        for name, direction in directions.items():
            engine.add_direction(name, direction)
        with engine, engine.batch(range(5)) as batch:
            scaler.scale(next_token_losses(transformer(tokens), tokens).sum()).backward()
        assert_scores(batch.result, gradients, directions)
        check_norms_of(batch.result, gradients, directions)
        check_grads(plain, transformer)

    compare(DotProductEngine)
    return compare


class DroppedCrossTerm(DotProductEngine):
    """Takes the norm of each use of a tied head alone."""

    def multiply(self, pass_, parameter, gradient):
        pass_.several.clear()
        self._terms._alone.clear()
        found = super().multiply(pass_, parameter, gradient)
        sums = self.__dict__.setdefault("sums", {})
        for rows, squared in self._terms._squared[parameter.name].items():
            sums[parameter.name] = sums.get(parameter.name, 0) + squared
            self._terms._squared[parameter.name][rows] = sums[parameter.name]
        return found


class OneUse(DotProductEngine):
    """Hands on the gradient of the first use only."""

    def multiply(self, pass_, parameter, gradient):
        made = super().multiply(pass_, parameter, gradient)
        before = self.__dict__.setdefault("before", set())
        if parameter.name in before:
            return torch.zeros_like(made)
        before.add(parameter.name)
        return made


class WithoutLast(DotProductEngine):
    """Leaves a sample out of the sum."""

    def multiply(self, pass_, parameter, gradient):
        return super().multiply(pass_, parameter, gradient) - gradient.materialize()[-1]


class ScaleForgotten(DotProductEngine):
    """Leaves the scale of the loss in the norms."""

    def _unscaled(self, values, times, scale):
        return super()._unscaled(values, times - 1, scale)


class Mixed(DotProductEngine):
    """Adds the dots of each sample to the next."""

    def multiply(self, pass_, parameter, gradient):
        made = super().multiply(pass_, parameter, gradient)
        sums, name = self._dots.arrived, parameter.name
        sums |= {name: sums[name].roll(1, 0)} if name in sums else {}
        return made


@pytest.mark.parametrize("kind", [DroppedCrossTerm, OneUse, WithoutLast, ScaleForgotten, Mixed])
def test_a_fault_is_found(kind, run, off):
    with off:
        run(kind)


def test_a_layer_used_several_times_holds_what_it_needs(draw_directions):
    model = Repeated(nn.Linear(4, 4), 3).double()
    inputs = torch.randn(3, 2, 4, dtype=torch.float64)
    directions = draw_directions(model, 1)
    gradients = per_sample_gradients(model, squares(model(inputs)))
    engine = fused(model, directions, norms=True, verify=False)
    with engine, engine.batch(range(3)) as batch:
        squares(model(inputs)).sum().backward()
    check_norms_of(batch.result, gradients, directions)

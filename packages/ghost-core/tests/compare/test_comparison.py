"""The comparison with autograd finds wrong gradients, says where, and leaves no trace."""

import inspect
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ghost_core import CaptureError, Dense, Outer, SamplerRegistry, WrongSplitError
from ghost_core.algebra import PRECISIONS
from ghost_core.compare import check_losses, choose_samples, compare, comparison
from ghost_core.plugins import select
from ghost_core.state import RandomState
from ghost_core.testing import (
    GradientHolder,
    PlainEmbedding,
    PlainLayerNorm,
    PlainLinear,
    TinyTransformer,
    next_token_losses,
    plain_registry,
)
from ghost_core.testing.snapshots import assert_untouched, traces
from ghost_core.tracking import Claim, dotted_name

N, T, D = 6, 5, 4


class Layers(nn.Module):
    """Maps `[N, T, D]` to itself: a linear layer, something between, and another one."""

    def __init__(self, between=None):
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.between = between or nn.Tanh()

    def forward(self, inputs):
        return self.second(self.between(self.first(inputs)))


@pytest.fixture
def model():
    return Layers().double()


@pytest.fixture
def inputs():
    return torch.randn(N, T, D, dtype=torch.float64)


def own(outputs):
    """Return a loss per sample, `[N]`, in which tokens meet."""
    each = outputs.sin().flatten(1).sum(1)
    return each + each.square()


def check(model, losses, **options):
    known = set(inspect.signature(select).parameters)
    chosen = {name: options.pop(name) for name in known & options.keys()}
    selection = select(**{"registry": plain_registry(), **chosen})
    return compare(model, losses, selection, **options)


def registry_with(linear):
    """Return a registry with another sampler for linear layers."""
    layers = {nn.Linear: linear, nn.Embedding: PlainEmbedding, nn.LayerNorm: PlainLayerNorm}
    return SamplerRegistry(
        Claim(dotted_name(layer), sampler, "tests") for layer, sampler in layers.items()
    )


# Right numbers


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_is_exact_and_every_parameter_is_compared(training):
    model = TinyTransformer().double().train(training)
    ids = torch.randint(0, 19, (9, 7))
    found = check(model, lambda: next_token_losses(model(ids), ids))
    assert found.ok
    assert found.verified
    assert found.n == 9
    assert found.samples == (0, 1, 2, 3, 5, 6, 7, 8)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {each.parameter for each in found.parameters} == trainable
    assert all(each.tested and each.error < 1e-13 for each in found.parameters)
    tied = next(each for each in found.parameters if each.parameter == "tokens.weight")
    assert (tied.module, tied.sampler) == ("Embedding, Linear", "PlainEmbedding, PlainLinear")
    assert tied.shape == (19, 8)
    found.raise_if_wrong()


def test_norms_are_those_of_autograd(model, inputs):
    found = check(model, lambda: own(model(inputs)), samples=2)
    parameter = model.first.weight
    losses = own(model(inputs))
    expected = max(
        torch.autograd.grad(losses[row], parameter, retain_graph=True)[0].norm() for row in (0, -1)
    )
    norm = next(each.norm for each in found.parameters if each.parameter == "first.weight")
    assert norm == pytest.approx(float(expected), rel=1e-12)


def test_micro_batches_are_compared_row_by_row(model, inputs):
    found = check(model, lambda: torch.cat([own(model(part)) for part in inputs.split(2)]))
    assert found.ok
    assert found.samples == tuple(range(N))


def test_a_part_of_the_parameters(model, inputs):
    found = check(model, lambda: own(model(inputs)), layers="first", exclude="*.bias")
    assert [each.parameter for each in found.parameters] == ["first.weight"]
    assert found.ok


def test_rows_that_samples_own_in_another_number():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.each, self.last = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, samples, parts):
            hidden = torch.tanh(self.each(parts))
            return self.last(samples.index_add(0, owner, hidden))

    owner = torch.tensor([0, 2, 2, 1, 0, 2, 3])
    model, samples = Pooled().double(), torch.randn(4, D, dtype=torch.float64)
    parts = torch.randn(7, D, dtype=torch.float64)

    def found(owner):
        return check(
            model,
            lambda: own(model(samples, parts)),
            row_owner={"each": "owner"},
            owners={"owner": owner},
            verify=False,
        )

    assert found(owner).ok
    assert {each.parameter for each in found(owner.flip(0)).wrong} == {"each.weight", "each.bias"}


def test_one_sample(model, inputs):
    found = check(model, lambda: own(model(inputs[:1])))
    assert found.ok
    assert found.samples == (0,)


def test_losses_that_share_a_value_but_no_gradient_are_exact(model, inputs):
    def losses():
        outputs = model(inputs)
        return own(outputs / outputs.detach().abs().max())

    assert check(model, losses).ok


def test_groups_of_samples_give_what_all_at_once_do(model, inputs, monkeypatch):
    def losses():
        return own(model(inputs))

    def faulty():
        return check(model, losses, registry=registry_with(scaled(N - 1)))

    at_once = check(model, losses), faulty()
    monkeypatch.setattr(comparison, "_ELEMENTS", 100)  # two samples' gradients, 40 numbers each
    in_groups = check(model, losses), faulty()
    for found, wanted in zip(in_groups, at_once, strict=True):
        assert found.samples == wanted.samples
        by_name = {each.parameter: each for each in wanted.parameters}
        for each in found.parameters:
            other = by_name[each.parameter]
            assert each.error == pytest.approx(other.error, abs=1e-14)
            assert each.norm == pytest.approx(other.norm, rel=1e-12)
    assert in_groups[1].parameters[0].sample == N - 1


def test_progress_counts_samples(model, inputs):
    counted = []
    check(model, lambda: own(model(inputs)), samples=4, progress=counted.append)
    assert counted == [1] * 4


@pytest.mark.parametrize(
    ("n", "samples", "expected"),
    [
        (1, 8, (0,)),
        (5, 8, (0, 1, 2, 3, 4)),
        (100, 1, (0,)),
        (100, 2, (0, 99)),
        (100, 4, (0, 33, 66, 99)),
        (9, 8, (0, 1, 2, 3, 5, 6, 7, 8)),
    ],
)
def test_samples_are_spread_from_first_to_last(n, samples, expected):
    assert choose_samples(n, samples) == expected


@pytest.mark.parametrize("n", range(1, 30))
def test_as_many_samples_as_asked_for_all_different(n):
    for samples in range(1, 12):
        chosen = choose_samples(n, samples)
        assert len(set(chosen)) == len(chosen) == min(n, samples)


# Wrong numbers


class Faulty(PlainLinear):
    """A sampler whose gradients are changed."""

    def gradients(self, call, records, grads):
        made = dict(super().gradients(call, records, grads))
        return {name: self.change(name, gradient) for name, gradient in made.items()}

    def change(self, name, gradient):
        raise NotImplementedError


def scaled(row, factor=1.01):
    class Scaled(Faulty):
        """Scales one sample's gradients."""

        def change(self, name, gradient):
            terms = gradient.materialize()[:, None].clone()
            terms[row] *= factor
            return Dense(terms)

    return Scaled


class Transposed(Faulty):
    def change(self, name, gradient):
        return Dense(gradient.materialize().mT[:, None]) if name == "weight" else gradient


class DropsToken(Faulty):
    def change(self, name, gradient):
        if name == "bias":
            return gradient
        grad = gradient.grad.clone()
        grad[:, -1] = 0
        return replace(gradient, grad=grad)


class NotANumber(Faulty):
    def change(self, name, gradient):
        return Dense(torch.full_like(gradient.materialize()[:, None], torch.nan))


class OneNotANumber(Faulty):
    def change(self, name, gradient):
        terms = gradient.materialize()[:, None].clone()
        terms[2].view(-1)[0] = torch.nan
        return Dense(terms)


class Nothing(Faulty):
    def change(self, name, gradient):
        return Dense(torch.zeros_like(gradient.materialize()[:, None]))


class Twice(Faulty):
    def change(self, name, gradient):
        return Dense(2 * gradient.materialize()[:, None])


class Negated(Faulty):
    def change(self, name, gradient):
        return Dense(-gradient.materialize()[:, None])


class NextRow(Faulty):
    """Gives each sample what is another's."""

    def change(self, name, gradient):
        return Dense(gradient.materialize().roll(1, 0)[:, None])


class DotsAreOff(Faulty):
    class Gradient(Outer):
        def narrow(self, samples):
            return type(self)(self.factor.narrow(samples), self.grad[samples], self.shape)

        def dot(self, directions):
            return 1.001 * super().dot(directions)

    def change(self, name, gradient):
        if name == "bias":
            return gradient
        return self.Gradient(gradient.factor, gradient.grad, gradient.shape)


class DotsAreSmall(DotsAreOff):
    class Gradient(DotsAreOff.Gradient):
        def dot(self, directions):
            return 0.9 * super().dot(directions)


class ProjectionsAreOff(DotsAreOff):
    class Gradient(DotsAreOff.Gradient):
        def dot(self, directions):
            return Outer.dot(self, directions)

        def project(self, left, right):
            return super().project(left, right.flip(1))


FAULTS = {
    "transposed": (Transposed, "weight"),
    "a token dropped": (DropsToken, "weight"),
    "not a number": (NotANumber, "bias"),
    "one number is none": (OneNotANumber, "weight"),
    "zero": (Nothing, "weight"),
    "twice as much": (Twice, "bias"),
    "negated": (Negated, "weight"),
    "rows exchanged": (NextRow, "weight"),
    "dots that are off": (DotsAreOff, "weight"),
    "dots that are too small": (DotsAreSmall, "weight"),
    "projections that are off": (ProjectionsAreOff, "weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_sampler_is_found(fault, model, inputs):
    sampler, local = FAULTS[fault]
    found = check(model, lambda: own(model(inputs)), registry=registry_with(sampler))
    assert not found.ok
    wrong = {each.parameter for each in found.wrong}
    assert {f"first.{local}", f"second.{local}"} <= wrong
    worst = found.parameters[0]
    assert worst.sampler == sampler.__name__
    assert worst.module == "Linear"
    with pytest.raises(WrongSplitError, match=rf"(?s)^wrong: .*  .*{sampler.__name__}"):
        found.raise_if_wrong()


@pytest.mark.parametrize("row", range(N))
def test_one_wrong_sample_is_found_with_its_row_and_error(row, model, inputs):
    found = check(model, lambda: own(model(inputs)), registry=registry_with(scaled(row)))
    assert len(found.wrong) == 4
    for each in found.parameters:
        assert each.sample == row
        assert each.error == pytest.approx(0.01, rel=1e-6)
        assert not each.ok
    assert found.reason.startswith(f"Reason: the loss of sample {row} reaches its own row only")


def test_a_small_fault_is_within_a_large_tolerance_only(model, inputs):
    registry = registry_with(scaled(0, 1 + 1e-6))
    losses = lambda: own(model(inputs))  # noqa: E731
    assert not check(model, losses, registry=registry).ok
    assert not check(model, losses, registry=registry, tolerance=9e-7).ok
    found = check(model, losses, registry=registry, tolerance=2e-6)
    assert found.ok
    assert {each.tolerance for each in found.parameters} == {2e-6}


def test_a_fault_of_one_use_is_found(inputs):
    """The parameter has two uses; what is compared is their sum."""
    shared = Layers().double()
    shared.second = shared.first
    assert check(shared, lambda: own(shared(inputs))).ok
    calls = []

    class SecondUseOnly(Faulty):
        def change(self, name, gradient):
            calls.append(name)
            return Dense(gradient.materialize()[:, None] * (1 if len(calls) > 2 else 1.1))

    found = check(
        shared, lambda: own(shared(inputs)), registry=registry_with(SecondUseOnly), verify=False
    )
    assert {each.parameter for each in found.wrong} == {"first.weight", "first.bias"}


def test_a_parameter_that_nothing_arrives_for_is_wrong(inputs):
    class Outside(Layers):
        def forward(self, inputs):
            return super().forward(inputs) + nn.functional.linear(inputs, self.second.weight)

    model = Outside().double()
    found = check(model, lambda: own(model(inputs)), verify=False)
    assert [each.parameter for each in found.wrong] == ["second.weight"]
    assert "used outside of them as well" in found.reason
    assert not found.verified


# Losses that depend on each other


def by_the_maximum(outputs):
    each = outputs.flatten(1).sum(1).exp()
    return each / each.max()


def contrastive(outputs):
    rows = nn.functional.normalize(outputs.flatten(1), dim=1)
    return nn.functional.cross_entropy(rows @ rows.mT, torch.arange(len(rows)), reduction="none")


def centred(outputs):
    each = outputs.sin().flatten(1).sum(1)
    return (each - each.mean()).square()


@pytest.mark.parametrize("coupled", [by_the_maximum, contrastive, centred])
def test_losses_that_depend_on_each_other_are_found(coupled, model, inputs):
    found = check(model, lambda: coupled(model(inputs)))
    assert not found.ok
    assert found.verified, "the split by row is right; only the values tell"
    assert len(found.wrong) == 4
    assert "at every module. The losses depend on each other" in found.reason


def test_a_loss_that_also_takes_anothers_row_is_found(model, inputs):
    """No loss but its own reaches the row of the sample that is compared."""

    def losses():
        each = own(model(inputs))
        return torch.cat([each[:1] + each[3:4], each[1:]])

    found = check(model, losses, samples=1)
    assert len(found.wrong) == 4
    assert "the loss of sample 0 reaches the rows of 3, at every module" in found.reason


def test_losses_that_depend_on_each_other_are_found_among_identical_samples(model, inputs):
    """Their gradients are all the same, whoever they belong to."""
    alike = inputs[:1].expand(N, T, D)

    def losses():
        each = own(model(alike))
        return each + each.sum()

    assert not check(model, losses).ok
    assert check(model, lambda: own(model(alike))).ok


def test_normalisation_over_the_batch_is_refused_or_found():
    inputs = torch.randn(N, D, dtype=torch.float64)
    model = Layers(nn.BatchNorm1d(D, affine=False)).double()
    with pytest.raises(WrongSplitError, match=r"normalises over the batch"):
        check(model, lambda: own(model(inputs)))
    found = check(model, lambda: own(model(inputs)), verify=False)
    assert {each.parameter for each in found.wrong} == {"first.weight", "first.bias"}
    assert "Something behind it mixes samples" in found.reason
    assert "first." in found.reason
    model.eval()
    assert check(model, lambda: own(model(inputs))).ok


def test_a_sequence_first_model_is_found_without_verification(inputs):
    class SequenceFirst(Layers):
        def forward(self, inputs):
            return super().forward(inputs.transpose(0, 1)).transpose(0, 1)

    model, square = SequenceFirst().double(), torch.randn(N, N, D, dtype=torch.float64)
    found = check(model, lambda: own(model(square)), verify=False)
    assert len(found.wrong) == 4


# Precision


class Attention(nn.Module):
    """The gradient of the keys' bias is zero but for rounding: it shifts all scores alike."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, inputs):
        weights = torch.softmax(self.query(inputs) @ self.key(inputs).mT, -1)
        return weights @ self.value(inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_error_where_the_true_gradient_is_zero(dtype, inputs):
    model, given = Attention().to(dtype), inputs.to(dtype)
    found = check(model, lambda: own(model(given).float() if dtype.itemsize == 2 else model(given)))
    by_name = {each.parameter: each for each in found.parameters}
    assert found.ok
    assert {each.tolerance for each in found.parameters} == {PRECISIONS[dtype].tolerance}
    assert 0 < by_name["key.bias"].norm < PRECISIONS[dtype].floor * by_name["value.bias"].norm
    assert [name for name, each in by_name.items() if not each.tested] == ["key.bias"]
    assert "(1 of them too small to tell)" in found.verdict
    assert "too small to tell" in found.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_are_found_in_lower_precision(dtype, inputs):
    model, given = Layers().to(dtype), inputs.to(dtype)
    for sampler in (scaled(3, 1.2), DropsToken, NextRow):
        found = check(model, lambda: own(model(given).float()), registry=registry_with(sampler))
        assert not found.ok


def test_tolerance_is_that_of_the_narrowest_dtype_under_autocast(inputs):
    model = Layers(nn.LayerNorm(D))
    given = inputs.float()

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return own(model(given).float())

    found = check(model, losses)
    assert found.ok
    assert {each.tolerance for each in found.parameters} == {PRECISIONS[torch.bfloat16].tolerance}
    assert not check(model, losses, tolerance=1e-7).ok
    (alone,) = check(model, losses, layers="between.bias").parameters
    assert alone.tolerance == PRECISIONS[torch.bfloat16].tolerance, "only its gradient is narrow"


class Narrow(nn.Linear):
    """Computes in float32, as the norms of some models do."""

    def forward(self, inputs):
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.linear(inputs.float(), weight, bias).to(inputs.dtype)


class NarrowOutput(nn.Linear):
    """Loses digits that no parameter is cast for."""

    def forward(self, inputs):
        return super().forward(inputs).float().to(inputs.dtype)


def narrow(kind):
    model = Layers().double()
    model.first = kind(D, D).double()
    claims = [Claim(dotted_name(layer), PlainLinear, "tests") for layer in (nn.Linear, kind)]
    return model, SamplerRegistry(claims)


def test_tolerance_is_that_of_the_dtype_which_parameters_are_cast_to(inputs):
    model, registry = narrow(Narrow)
    found = check(model, lambda: own(model(inputs)), registry=registry)
    assert found.ok
    by_name = {each.parameter: each for each in found.parameters}
    assert {name: each.tolerance for name, each in by_name.items()} == {
        "first.weight": 1e-4, "first.bias": 1e-4, "second.weight": 1e-9, "second.bias": 1e-9
    }  # fmt: skip
    assert 1e-9 < by_name["first.weight"].error < 1e-5
    assert not check(model, lambda: own(model(inputs)), registry=registry, tolerance=1e-9).ok


def test_errors_that_may_be_rounding_are_said_to_be(inputs):
    model, registry = narrow(NarrowOutput)
    found = check(model, lambda: own(model(inputs)), registry=registry)
    assert {each.parameter for each in found.wrong} == {"first.weight", "first.bias"}
    assert found.reason.startswith("Reason: errors this small are rounding, if these modules")
    assert check(model, lambda: own(model(inputs)), registry=registry, tolerance=1e-4).ok
    other = check(model, lambda: own(model(inputs)), registry=registry_with(Twice), exclude="first")
    assert "rounding" not in other.reason


def test_parameters_of_several_dtypes_have_tolerances_of_their_own(inputs):
    class Mixed(Layers):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs.float()).double()))

    model = Mixed()
    model.second.double()
    found = check(model, lambda: own(model(inputs)))
    by_name = {each.parameter: each.tolerance for each in found.parameters}
    assert by_name == {"first.weight": 1e-4, "first.bias": 1e-4} | {
        "second.weight": 1e-9, "second.bias": 1e-9
    }  # fmt: skip


def test_a_sample_without_a_gradient_is_compared_too(model, inputs):
    """A sample that is all padding has a loss of zero; ghost must find zero as well."""

    def losses():
        return own(model(inputs)) * (torch.arange(N) != 2)

    assert check(model, losses).ok

    class Leaks(Faulty):
        def change(self, name, gradient):
            terms = gradient.materialize()[:, None].clone()
            terms[2] += 1e-15
            return Dense(terms)

    found = check(model, losses, registry=registry_with(Leaks))
    assert found.parameters[0].error == torch.inf
    assert found.parameters[0].sample == 2


# No trace


def everything(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return state, gradients, RandomState.now(), traces(model)


def assert_as_before(before, model):
    state, gradients, randomness, found = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(each.grad is gradients[name] for name, each in model.named_parameters())
    assert RandomState.now() == randomness
    assert_untouched(found, model, "after a comparison")


@pytest.fixture
def noisy(inputs):
    """A model in training with dropout, running statistics, a frozen parameter and gradients."""
    between = nn.Sequential(nn.Dropout(0.3), nn.InstanceNorm1d(T, track_running_stats=True))
    model = Layers(between).double()
    model.second.bias.requires_grad_(False)
    model.first.weight.grad = torch.ones(D, D, dtype=torch.float64)
    random.random(), np.random.rand(), torch.rand(1)
    return model


@pytest.mark.parametrize("how", ["detached", "attached", "frozen"])
@pytest.mark.parametrize("sampler", [PlainLinear, Twice])
def test_nothing_stays(how, sampler, noisy, inputs):
    registry = registry_with(sampler)
    engine = GradientHolder(noisy, registry=registry)
    contexts = {"detached": torch.enable_grad, "attached": lambda: engine, "frozen": engine.frozen}
    outside = everything(noisy)
    with contexts[how]():
        before = everything(noisy)
        found = check(noisy, lambda: own(noisy(inputs)), registry=registry)
        if how == "detached":
            assert_as_before(before, noisy)
        else:
            assert {name: each.requires_grad for name, each in noisy.named_parameters()} == {
                name: before[3][f"requires_grad of {name}"] for name, _ in noisy.named_parameters()
            }
    assert found.ok == (sampler is PlainLinear)
    assert {each.parameter for each in found.parameters} == {
        "first.weight", "first.bias", "second.weight"
    }  # fmt: skip
    assert_as_before(outside, noisy)


def test_nothing_stays_after_an_exception(noisy, inputs):
    before, calls = everything(noisy), []

    def losses():
        calls.append(0)
        found = own(noisy(inputs))
        if len(calls) == 3:
            raise KeyError("broken")
        return found

    with pytest.raises(KeyError, match="broken"):
        check(noisy, losses)
    assert_as_before(before, noisy)


def test_an_attached_engine_goes_on_as_before(model, inputs, hold, assert_held):
    engine = hold(model)
    with engine:
        with engine.batch(range(N)) as first:
            own(model(inputs)).sum().backward()
        found = check(model, lambda: own(model(inputs)))
        with engine.batch(range(N)) as second:
            own(model(inputs)).sum().backward()
    assert found.ok
    assert_held(second.result, first.result.materialize())


def test_it_works_where_gradients_are_disabled(model, inputs):
    with torch.no_grad():
        assert check(model, lambda: own(model(inputs))).ok


def test_hooks_on_accumulated_gradients_do_not_run(model, inputs, hold):
    """An optimizer may step in one."""
    seen = []
    model.first.weight.register_post_accumulate_grad_hook(seen.append)
    assert check(model, lambda: own(model(inputs))).ok
    assert not seen
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match=r"first\.weight has a hook that runs when"):
        check(model, lambda: own(model(inputs)))
    assert not seen


def test_a_hook_on_a_gradient_is_refused(model, inputs):
    model.first.bias.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(CaptureError, match=r"first\.bias has a hook on its gradient"):
        check(model, lambda: own(model(inputs)))
    assert check(model, lambda: own(model(inputs)), exclude="first.bias").ok


def test_an_open_batch_is_refused(model, inputs, hold):
    with hold(model) as engine, engine.batch(range(N)) as batch:
        with pytest.raises(CaptureError, match="while a batch is open"):
            check(model, lambda: own(model(inputs)))
        own(model(inputs)).sum().backward()
    assert batch.result.n == N


# Losses that cannot be compared


def test_losses_that_are_not_one_per_sample_are_refused(model, inputs):
    for losses, what in {
        lambda: own(model(inputs)).sum(): r"losses are float64 of shape \(\)",
        lambda: model(inputs): r"losses are float64 of shape \(6, 5, 4\)",
        lambda: own(model(inputs))[:0]: r"losses are float64 of shape \(0,\)",
        lambda: own(model(inputs)).tolist(): r"losses are a list",
        lambda: own(model(inputs)).detach(): r"losses do not depend on any trainable parameter",
        lambda: torch.arange(N): r"losses are int64 of shape \(6,\)",
        lambda: own(model(inputs)) / torch.tensor([1, 1, 0, 1, 1, 1]): r"sample 2 is not finite",
    }.items():
        with pytest.raises(CaptureError, match=what):
            check(model, losses)


def test_losses_of_other_samples_than_the_model_ran_on_are_refused(model, inputs):
    with pytest.raises(CaptureError, match=r"6 of 30 samples went through the model"):
        check(model, lambda: model(inputs).sin().sum(2).flatten())


@pytest.mark.parametrize("change", [1.1, slice(0, 3)])
def test_losses_that_differ_from_call_to_call_are_refused(change, model, inputs):
    calls = []

    def losses():
        calls.append(0)
        found = own(model(inputs))
        if len(calls) < 2:
            return found
        return found * change if isinstance(change, float) else found[change]

    with pytest.raises(CaptureError, match="losses are others each time they are computed"):
        check(model, losses)


def test_losses_as_before_are_returned():
    losses = torch.rand(3, requires_grad=True)
    assert check_losses(losses, losses.detach() * (1 + 1e-6)) is losses
    with pytest.raises(CaptureError, match="others each time"):
        check_losses(losses, losses.detach() * (1 + 1e-3))


def test_random_numbers_are_the_same_each_time(model, inputs):
    drawn = []

    def losses():
        noise = torch.rand(N) + random.random() + np.random.rand()
        drawn.append(noise)
        return own(model(inputs)) * noise

    assert check(model, losses).ok
    assert len(drawn) >= 3
    assert all(torch.equal(noise, drawn[0]) for noise in drawn)


def test_gradients_that_are_not_finite_without_ghost_are_refused(model, inputs):
    def losses():
        return own(model(inputs)) + (model(inputs) * 0).abs().sqrt().flatten(1).sum(1)

    with pytest.raises(CaptureError, match=r"gradient of .* is not finite .* also without ghost"):
        check(model, losses)


def test_gradients_that_are_all_zero_prove_nothing(model, inputs):
    with pytest.raises(CaptureError, match="there is nothing to compare"):
        check(model, lambda: own(model(inputs)) * 0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"tolerance": 0.0}, r"tolerance must be between 0 and 1, not 0\.0"),
        ({"tolerance": 1.0}, r"tolerance must be between 0 and 1, not 1\.0"),
        ({"tolerance": float("nan")}, "tolerance must be between 0 and 1, not nan"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, what, model, inputs):
    with pytest.raises(CaptureError, match=what):
        check(model, lambda: own(model(inputs)), **options)


# Words


def test_the_table_is_aligned_and_sorted_worst_first(model, inputs):
    class OneLayer(Faulty):
        def change(self, name, gradient):
            return Dense(gradient.materialize()[:, None] * 3) if name == "bias" else gradient

    found = check(model, lambda: own(model(inputs)), registry=registry_with(OneLayer))
    lines = found.table().splitlines()
    assert lines[0].split() == [
        "parameter", "class", "sampler", "shape", "error", "sample", "tolerance", "ok"
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[1:]] == ["WRONG", "WRONG", "yes", "yes"]
    assert {lines[1].split()[0], lines[2].split()[0]} == {"first.bias", "second.bias"}
    assert lines[1].split()[3:5] == ["4", "2.0e+00"]
    assert len({line.index("Linear ") for line in lines[1:]}) == 1
    ratios = [each.error / each.tolerance for each in found.parameters]
    assert ratios == sorted(ratios, reverse=True)
    assert found.rows()[1][3] == "4"
    assert "4×4" in found.table()


def test_the_verdict_is_a_sentence(model, inputs):
    found = check(model, lambda: own(model(inputs)), samples=3)
    assert re.fullmatch(
        r"exact: the gradients of 3 of 6 samples agree with one autograd call each at all 4 "
        r"parameters; the largest error is \d\.\de-1\d of the norm, at \w+\.\w+, sample \d "
        r"\(tolerance 1e-09\)",
        found.verdict,
    )
    wrong = check(model, lambda: own(model(inputs)), registry=registry_with(Twice), samples=3)
    assert re.fullmatch(
        r"wrong: the gradients of 3 of 6 samples differ from one autograd call each at 4 of 4 "
        r"parameters, at most by 1\.0e\+00 of the norm, at \w+\.\w+, sample \d "
        r"\(tolerance 1e-09\)",
        wrong.verdict,
    )
    with pytest.raises(WrongSplitError) as caught:
        wrong.raise_if_wrong()
    first, *listed, reason, remedy = str(caught.value).splitlines()
    assert first == wrong.verdict
    assert len(listed) == 4
    assert reason.startswith("Reason: ")
    assert remedy.startswith("Remedy: ")


def test_the_error_lists_ten_parameters_at_most(inputs):
    model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(12))).double()
    found = check(model, lambda: own(model(inputs)), registry=registry_with(Twice))
    with pytest.raises(WrongSplitError, match=r"(?s)and 2 more\nReason: ") as caught:
        found.raise_if_wrong()
    assert str(caught.value).count("(Linear, Twice)") == 10


def test_gradients_are_those_that_an_engine_gets(model, inputs, registry):
    """The comparison is right about an engine of another kind as well."""
    engine = GradientHolder(model, registry=registry)
    with engine, engine.batch(range(N)) as batch:
        own(model(inputs)).sum().backward()
    losses = own(model(inputs))
    for name, gradients in batch.result.materialize().items():
        for row in range(N):
            expected = torch.autograd.grad(
                losses[row], model.get_parameter(name), retain_graph=True
            )[0]
            assert torch.dist(gradients[row], expected) <= 1e-9 * expected.norm()

"""The comparison finds wrong gradients, and losses that couple samples, and says where."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ghost_core import Dense, Outer, WrongSplitError

N, T, D = 6, 5, 4


def scaled(row, factor=1.01):
    """Scale one sample's gradients."""

    def change(name, gradient):
        terms = gradient.materialize()[:, None].clone()
        terms[row] *= factor
        return Dense(terms)

    return change


def transposed(name, gradient):
    return Dense(gradient.materialize().mT[:, None]) if name == "weight" else gradient


def drops_token(name, gradient):
    if name == "bias":
        return gradient
    grad = gradient.grad.clone()
    grad[:, -1] = 0
    return replace(gradient, grad=grad)


def not_a_number(name, gradient):
    return Dense(torch.full_like(gradient.materialize()[:, None], torch.nan))


def one_not_a_number(name, gradient):
    terms = gradient.materialize()[:, None].clone()
    terms[2].view(-1)[0] = torch.nan
    return Dense(terms)


def nothing(name, gradient):
    return Dense(torch.zeros_like(gradient.materialize()[:, None]))


def twice(name, gradient):
    return Dense(2 * gradient.materialize()[:, None])


def negated(name, gradient):
    return Dense(-gradient.materialize()[:, None])


def next_row(name, gradient):
    """Give each sample what is another's."""
    return Dense(gradient.materialize().roll(1, 0)[:, None])


class DotsAreOff(Outer):
    def narrow(self, samples):
        return type(self)(self.factor.narrow(samples), self.grad[samples], self.shape)

    def dot(self, directions):
        return 1.001 * super().dot(directions)


class DotsAreSmall(DotsAreOff):
    def dot(self, directions):
        return 0.9 * super().dot(directions)


class ProjectionsAreOff(DotsAreOff):
    def dot(self, directions):
        return Outer.dot(self, directions)

    def project(self, left, right):
        return super().project(left, right.flip(1))


def made_of(kind):
    """Give weights gradients of another class."""

    def change(name, gradient):
        if name == "bias":
            return gradient
        return kind(gradient.factor, gradient.grad, gradient.shape)

    return change


FAULTS = {
    "transposed": (transposed, "weight"),
    "a token dropped": (drops_token, "weight"),
    "not a number": (not_a_number, "bias"),
    "one number is none": (one_not_a_number, "weight"),
    "zero": (nothing, "weight"),
    "twice as much": (twice, "bias"),
    "negated": (negated, "weight"),
    "rows exchanged": (next_row, "weight"),
    "dots that are off": (made_of(DotsAreOff), "weight"),
    "dots that are too small": (made_of(DotsAreSmall), "weight"),
    "projections that are off": (made_of(ProjectionsAreOff), "weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_sampler_is_found(fault, model, inputs, check, own, faulty):
    change, local = FAULTS[fault]
    found = check(model, lambda: own(model(inputs)), registry=faulty(change))
    assert not found.ok
    wrong = {each.parameter for each in found.wrong}
    assert {f"first.{local}", f"second.{local}"} <= wrong
    worst = found.parameters[0]
    assert worst.sampler == "Faulty"
    assert worst.module == "Linear"
    with pytest.raises(WrongSplitError, match=r"(?s)^wrong: .*  .*Faulty"):
        found.raise_if_wrong()


@pytest.mark.parametrize("row", range(N))
def test_one_wrong_sample_is_found_with_its_row_and_error(row, model, inputs, check, own, faulty):
    found = check(model, lambda: own(model(inputs)), registry=faulty(scaled(row)))
    assert len(found.wrong) == 4
    for each in found.parameters:
        assert each.sample == row
        assert each.error == pytest.approx(0.01, rel=1e-6)
        assert not each.ok
    assert found.reason.startswith(f"the loss of sample {row} reaches its own row only")


def test_a_small_fault_is_within_a_large_tolerance_only(model, inputs, check, own, faulty):
    registry = faulty(scaled(0, 1 + 1e-6))
    losses = lambda: own(model(inputs))  # noqa: E731
    assert not check(model, losses, registry=registry).ok
    assert not check(model, losses, registry=registry, tolerance=9e-7).ok
    found = check(model, losses, registry=registry, tolerance=2e-6)
    assert found.ok
    assert {each.tolerance for each in found.parameters} == {2e-6}


def test_a_fault_of_one_use_is_found(inputs, check, own, layers, faulty):
    """The parameter has two uses; what is compared is their sum."""
    shared = layers().double()
    shared.second = shared.first
    assert check(shared, lambda: own(shared(inputs))).ok
    calls = []

    def second_use_only(name, gradient):
        calls.append(name)
        return Dense(gradient.materialize()[:, None] * (1 if len(calls) > 2 else 1.1))

    found = check(
        shared, lambda: own(shared(inputs)), registry=faulty(second_use_only), verify=False
    )
    assert {each.parameter for each in found.wrong} == {"first.weight", "first.bias"}


def test_a_parameter_that_nothing_arrives_for_is_wrong(inputs, check, own, layers):
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, weight):
            ctx.save_for_backward(inputs, weight)
            return inputs @ weight.T

        @staticmethod
        def backward(ctx, grad):
            inputs, weight = ctx.saved_tensors
            return grad @ weight, grad.flatten(0, -2).T @ inputs.flatten(0, -2)

    class Outside(layers):
        def forward(self, inputs):
            return super().forward(inputs) + Hidden.apply(inputs, self.second.weight)

    model = Outside().double()
    found = check(model, lambda: own(model(inputs)), verify=False)
    assert [each.parameter for each in found.wrong] == ["second.weight"]
    assert "used outside of them as well" in found.reason
    assert not found.verified


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_are_found_in_lower_precision(dtype, inputs, check, own, layers, faulty):
    model, given = layers().to(dtype), inputs.to(dtype)
    for change in (scaled(3, 1.2), drops_token, next_row):
        found = check(model, lambda: own(model(given).float()), registry=faulty(change))
        assert not found.ok


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
def test_losses_that_depend_on_each_other_are_found(coupled, model, inputs, check):
    found = check(model, lambda: coupled(model(inputs)))
    assert not found.ok
    assert found.verified, "the split by row is right; only the values tell"
    assert len(found.wrong) == 4
    assert "at every module. The losses depend on each other" in found.reason


def test_a_loss_that_also_takes_anothers_row_is_found(model, inputs, check, own):
    """No loss but its own reaches the row of the sample that is compared."""

    def losses():
        each = own(model(inputs))
        return torch.cat([each[:1] + each[3:4], each[1:]])

    found = check(model, losses, samples=1)
    assert len(found.wrong) == 4
    assert "the loss of sample 0 reaches the rows of 3, at every module" in found.reason


def test_losses_that_depend_on_each_other_are_found_among_identical_samples(
    model, inputs, check, own
):
    """Their gradients are all the same, whoever they belong to."""
    alike = inputs[:1].expand(N, T, D)

    def losses():
        each = own(model(alike))
        return each + each.sum()

    assert not check(model, losses).ok
    assert check(model, lambda: own(model(alike))).ok


def test_normalisation_over_the_batch_is_refused_or_found(check, own, layers):
    inputs = torch.randn(N, D, dtype=torch.float64)
    model = layers(nn.BatchNorm1d(D, affine=False)).double()
    with pytest.raises(WrongSplitError, match=r"normalises over the batch"):
        check(model, lambda: own(model(inputs)))
    found = check(model, lambda: own(model(inputs)), verify=False)
    assert {each.parameter for each in found.wrong} == {"first.weight", "first.bias"}
    assert "Something behind it mixes samples" in found.reason
    assert "first." in found.reason
    model.eval()
    assert check(model, lambda: own(model(inputs))).ok


def test_a_sequence_first_model_is_found_without_verification(inputs, check, own, layers):
    class SequenceFirst(layers):
        def forward(self, inputs):
            return super().forward(inputs.transpose(0, 1)).transpose(0, 1)

    model, square = SequenceFirst().double(), torch.randn(N, N, D, dtype=torch.float64)
    found = check(model, lambda: own(model(square)), verify=False)
    assert len(found.wrong) == 4

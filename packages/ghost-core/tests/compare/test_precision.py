"""What is rounding, and what is an error, by the dtypes in which gradients are made."""

import pytest
import torch
from torch import nn

from ghost_core import Dense, SamplerRegistry
from ghost_core.algebra import PRECISIONS
from ghost_core.testing import PlainLinear
from ghost_core.tracking import Claim, dotted_name

N, T, D = 6, 5, 4


class Attention(nn.Module):
    """The gradient of the keys' bias is zero but for rounding: it shifts all scores alike."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, inputs):
        weights = torch.softmax(self.query(inputs) @ self.key(inputs).mT, -1)
        return weights @ self.value(inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_error_where_the_true_gradient_is_zero(dtype, inputs, check, own):
    model, given = Attention().to(dtype), inputs.to(dtype)
    found = check(model, lambda: own(model(given).float() if dtype.itemsize == 2 else model(given)))
    by_name = {each.parameter: each for each in found.parameters}
    assert found.ok
    assert {each.tolerance for each in found.parameters} == {PRECISIONS[dtype].tolerance}
    assert 0 < by_name["key.bias"].norm < PRECISIONS[dtype].floor * by_name["value.bias"].norm
    assert [name for name, each in by_name.items() if not each.tested] == ["key.bias"]
    assert "(1 of them too small to tell)" in found.verdict
    assert "too small to tell" in found.table()


def test_tolerance_is_that_of_the_narrowest_dtype_under_autocast(inputs, check, own, layers):
    model = layers(nn.LayerNorm(D))
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


@pytest.fixture
def narrow(layers):
    """Make a model whose first layer is of another kind, and a registry that knows it."""

    def make(kind):
        model = layers().double()
        model.first = kind(D, D).double()
        claims = [Claim(dotted_name(layer), PlainLinear, "tests") for layer in (nn.Linear, kind)]
        return model, SamplerRegistry(claims)

    return make


def test_tolerance_is_that_of_the_dtype_which_parameters_are_cast_to(inputs, check, own, narrow):
    model, registry = narrow(Narrow)
    found = check(model, lambda: own(model(inputs)), registry=registry)
    assert found.ok
    by_name = {each.parameter: each for each in found.parameters}
    assert {name: each.tolerance for name, each in by_name.items()} == {
        "first.weight": 1e-4, "first.bias": 1e-4, "second.weight": 1e-9, "second.bias": 1e-9
    }  # fmt: skip
    assert 1e-9 < by_name["first.weight"].error < 1e-5
    assert not check(model, lambda: own(model(inputs)), registry=registry, tolerance=1e-9).ok


def test_errors_that_may_be_rounding_are_said_to_be(inputs, check, own, doubled, narrow):
    model, registry = narrow(NarrowOutput)
    found = check(model, lambda: own(model(inputs)), registry=registry)
    assert {each.parameter for each in found.wrong} == {"first.weight", "first.bias"}
    assert found.reason.startswith("errors this small are rounding, if these modules")
    assert check(model, lambda: own(model(inputs)), registry=registry, tolerance=1e-4).ok
    other = check(model, lambda: own(model(inputs)), registry=doubled, exclude="first")
    assert "rounding" not in other.reason


def test_parameters_of_several_dtypes_have_tolerances_of_their_own(inputs, check, own, layers):
    class Mixed(layers):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs.float()).double()))

    model = Mixed()
    model.second.double()
    found = check(model, lambda: own(model(inputs)))
    by_name = {each.parameter: each.tolerance for each in found.parameters}
    assert by_name == {"first.weight": 1e-4, "first.bias": 1e-4} | {
        "second.weight": 1e-9, "second.bias": 1e-9
    }  # fmt: skip


def test_a_sample_without_a_gradient_is_compared_too(model, inputs, check, own, faulty):
    """A sample that is all padding has a loss of zero; ghost must find zero as well."""

    def losses():
        return own(model(inputs)) * (torch.arange(N) != 2)

    assert check(model, losses).ok

    def leaks(name, gradient):
        terms = gradient.materialize()[:, None].clone()
        terms[2] += 1e-15
        return Dense(terms)

    found = check(model, losses, registry=faulty(leaks))
    assert found.parameters[0].error == torch.inf
    assert found.parameters[0].sample == 2

"""Where ghost is right, the comparison says so, whatever is compared and how."""

import pytest
import torch
from torch import nn

from ghost_core import Dense
from ghost_core.compare import choose_samples, comparison
from ghost_core.testing import (
    GradientHolder,
    TinyTransformer,
    next_token_losses,
)

N, T, D = 6, 5, 4


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_is_exact_and_every_parameter_is_compared(training, check):
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


def test_norms_are_those_of_autograd(model, inputs, check, own):
    found = check(model, lambda: own(model(inputs)), samples=2)
    parameter = model.first.weight
    losses = own(model(inputs))
    expected = max(
        torch.autograd.grad(losses[row], parameter, retain_graph=True)[0].norm() for row in (0, -1)
    )
    norm = next(each.norm for each in found.parameters if each.parameter == "first.weight")
    assert norm == pytest.approx(float(expected), rel=1e-12)


def test_micro_batches_are_compared_row_by_row(model, inputs, check, own):
    found = check(model, lambda: torch.cat([own(model(part)) for part in inputs.split(2)]))
    assert found.ok
    assert found.samples == tuple(range(N))


def test_a_part_of_the_parameters(model, inputs, check, own):
    found = check(model, lambda: own(model(inputs)), layers="first", exclude="*.bias")
    assert [each.parameter for each in found.parameters] == ["first.weight"]
    assert found.ok


def test_rows_that_samples_own_in_another_number(check, own):
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


def test_one_sample(model, inputs, check, own):
    found = check(model, lambda: own(model(inputs[:1])))
    assert found.ok
    assert found.samples == (0,)


def test_losses_that_share_a_value_but_no_gradient_are_exact(model, inputs, check, own):
    def losses():
        outputs = model(inputs)
        return own(outputs / outputs.detach().abs().max())

    assert check(model, losses).ok


def test_groups_of_samples_give_what_all_at_once_do(model, inputs, monkeypatch, check, own, faulty):
    def losses():
        return own(model(inputs))

    def last_is_larger(name, gradient):
        terms = gradient.materialize()[:, None].clone()
        terms[-1] *= 1.01
        return Dense(terms)

    def off():
        return check(model, losses, registry=faulty(last_is_larger))

    at_once = check(model, losses), off()
    monkeypatch.setattr(comparison, "_ELEMENTS", 100)  # two samples' gradients, 40 numbers each
    in_groups = check(model, losses), off()
    for found, wanted in zip(in_groups, at_once, strict=True):
        assert found.samples == wanted.samples
        by_name = {each.parameter: each for each in wanted.parameters}
        for each in found.parameters:
            other = by_name[each.parameter]
            assert each.error == pytest.approx(other.error, abs=1e-14)
            assert each.norm == pytest.approx(other.norm, rel=1e-12)
    assert in_groups[1].parameters[0].sample == N - 1


def test_progress_counts_samples(model, inputs, check, own):
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


def test_gradients_are_those_that_an_engine_gets(model, inputs, registry, own):
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

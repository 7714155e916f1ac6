"""Values where gradients are scaled, or changed in other ways, between batch and step.

The oracle is the step itself: how far it moved the parameters along the sum of contributions.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import DotProductEngine, InRunValues
from ghost_engines.values import prints

N, RATE = 6, 0.05


class Loop:
    """A loop of a few steps, whose values are computed again from how parameters moved."""

    def __init__(self, kind=torch.float64, fused=False, scaler=None, told=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(kind)
        self.leaves = dict(self.model.named_parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, fused=fused)
        self.scaler = scaler
        self.direction = {name: torch.randn_like(leaf) for name, leaf in self.leaves.items()}
        self.engine = DotProductEngine(self.model, grad_scaler=scaler if told else None)
        self.engine.add_direction("fixed", self.direction)
        self.values = InRunValues(self.engine, self.optimizer)
        self.expected = {}

    def losses(self, x):
        return (self.model(x) - 1).square().sum(1)

    def step(self, at, act, unscale=False):
        torch.manual_seed(at)
        x = torch.randn(N, 4, dtype=self.leaves["0.bias"].dtype)
        ids = range(at * N, at * N + N)
        each = per_sample_gradients(self.model, self.losses(x))
        before = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        self.optimizer.zero_grad()
        with self.engine.batch(ids):
            loss = self.losses(x).sum()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
        act(self.leaves)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        moved = {name: leaf.detach() - before[name] for name, leaf in self.leaves.items()}
        credit = torch.zeros(N, dtype=torch.float64)
        for name, gradients in each.items():
            whole = gradients.sum(0)
            along = -(moved[name] * whole).sum() / whole.square().sum()  # rate times factor
            credit += (along * gradients.flatten(1) @ self.direction[name].flatten()).double()
        self.expected |= dict(zip(ids, credit.tolist(), strict=True))

    def check(self, tolerance=1e-9):
        found = self.values.to_dict()
        assert found.keys() == self.expected.keys()
        got = torch.tensor(list(found.values()), dtype=torch.float64)
        expected = torch.tensor(list(self.expected.values()), dtype=torch.float64)
        assert_within(got, expected, expected.norm(), tolerance)

    def run(self, act, steps=3, **options):
        with self.engine, self.values:
            for at in range(steps):
                self.step(at, act, **options)


def nothing(leaves):
    pass


def clip(leaves):
    assert clip_grad_norm_(leaves.values(), 1e-3) > 1


def clip_by_layer(leaves):
    for layer in ("0", "2"):
        parts = [leaf for name, leaf in leaves.items() if name.startswith(layer)]
        assert clip_grad_norm_(parts, 0.1) > 0.1


def through_data(leaves):
    """Write past autograd's counters, as older code does."""
    for leaf in leaves.values():
        leaf.grad.data.mul_(0.25)


def average(leaves):
    for leaf in leaves.values():
        leaf.grad = leaf.grad / 4


@pytest.mark.parametrize("act", [clip, clip_by_layer, through_data, average])
def test_scaled_gradients_credit_what_the_step_did(act, caplog):
    loop = Loop()
    loop.run(act)
    loop.check()
    assert not caplog.records
    assert not any(loop.values.columns()["altered"])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_scaling_is_told_from_other_changes_in_narrow_dtypes(kind, caplog):
    loop = Loop(kind)
    with loop.engine, loop.values:
        for at in range(3):
            loop.step(at, lambda leaves: clip_grad_norm_(leaves.values(), 0.3))
    loop.check(1e-5 if kind == torch.float32 else 0.05)
    assert not caplog.records


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_values_with_a_scaler_are_those_of_the_step(unscale, told, fused):
    """Whether the engine knows of it or not, and whoever divides by the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    loop = Loop(torch.float32, fused, scaler, told)
    loop.run(clip_by_layer if unscale else nothing, unscale=unscale)
    loop.check(1e-5)


def test_micro_batches_scaled_in_between_have_the_factor_of_their_own():
    loop = Loop()
    x = torch.randn(4, 4, dtype=torch.float64)
    with loop.engine, loop.values:
        for at in range(2):
            with loop.engine.batch([2 * at, 2 * at + 1]):
                loop.losses(x[:2]).sum().backward()
            clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.optimizer.step()
    first, second = (loop.values[0], loop.values[1]), (loop.values[2], loop.values[3])
    assert all(0 < abs(one) < abs(other) for one, other in zip(first, second, strict=True))
    assert first[0] / second[0] == pytest.approx(first[1] / second[1])


def clip_elements(leaves):
    clip_grad_value_(leaves.values(), 1e-2)


def add_noise(leaves):
    for leaf in leaves.values():
        leaf.grad += 1e-3 * torch.randn_like(leaf)


def turn_some(leaves):
    for leaf in leaves.values():
        leaf.grad.flatten()[::2].neg_()


def add_to_one(leaves):
    leaves["0.weight"].grad += leaves["0.weight"].detach()


@pytest.mark.parametrize("act", [clip_elements, add_noise, turn_some, add_to_one])
def test_other_changes_are_said_once_in_the_log_and_by_sample_in_the_table(act, caplog):
    plain = Loop()
    loop = Loop()
    told = []
    loop.values.on_credit(told.append)
    with plain.engine, plain.values:
        plain.step(0, nothing)
    with loop.engine, loop.values:
        loop.step(0, act)
        assert caplog.text.count("were changed between the batch") == 1
        assert "0.weight" in caplog.text
        loop.step(1, nothing)
        loop.step(2, act)
    assert caplog.text.count("were changed between the batch") == 1
    assert [step.altered for step in told] == [True, False, True]
    columns = loop.values.columns()
    altered = dict(zip(columns["id"].tolist(), columns["altered"].tolist(), strict=True))
    assert [altered[sample] for sample in range(3 * N)] == [1] * N + [0] * N + [1] * N
    # Values of such a step are those of the gradients as they were backpropagated.
    assert {sample: loop.values[sample] for sample in range(N)} == plain.values.to_dict()


def test_a_backward_pass_outside_of_a_batch_is_said(caplog):
    loop = Loop()

    def unscored(leaves):
        loop.losses(torch.ones(2, 4, dtype=torch.float64)).sum().backward()

    loop.run(unscored, steps=1)
    assert "a backward pass outside of a batch" in caplog.text
    assert loop.values.columns()["altered"].all()


@pytest.mark.parametrize("element", [0, 7, 19])
def test_large_gradients_are_looked_at_in_pieces(element, monkeypatch):
    monkeypatch.setattr(prints, "_PIECE", 7)
    loop = Loop()

    def clip_and_turn_one(leaves):
        clip(leaves)
        leaves["0.weight"].grad.view(-1)[element].neg_()

    loop.run(clip)
    loop.check()
    with InRunValues(loop.engine, loop.optimizer) as values, loop.engine:
        loop.step(3, clip_and_turn_one)
    assert values.columns()["altered"].all()

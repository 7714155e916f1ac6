"""A step credits the batches whose gradients it is made with, parameter by parameter."""

import random

import pytest
import torch
from torch import nn

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import DotProductEngine, InRunValues

N, RATE = 3, 0.1


class Ledger:
    """Trains, and keeps for every parameter what its `.grad` is the sum of.

    Values come from autograd and this list alone. The direction does not change, so that they
    differ by who is credited only.
    """

    def __init__(self, model):
        self.model = model
        self.leaves = dict(model.named_parameters())
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.direction = {name: torch.randn_like(leaf) for name, leaf in self.leaves.items()}
        self.engine = DotProductEngine(model)
        self.engine.add_direction("fixed", self.direction)
        self.values = InRunValues(self.engine, self.optimizer)
        self.held = {name: [] for name in self.leaves}
        self.expected, self.batches, self.credited = {}, 0, set()

    def batch(self, inside=()):
        """Run a batch of new samples; what is `inside` runs between forward and backward pass."""
        x = torch.randn(N, 4, dtype=torch.float64)
        ids = range(self.batches * N, self.batches * N + N)
        each = per_sample_gradients(self.model, self.losses(x))
        with self.engine.batch(ids):
            losses = self.losses(x)
            for act in inside:
                act(self)
            losses.sum().backward()
        for name, gradient in each.items():
            dots = gradient.flatten(1) @ self.direction[name].flatten()
            self.held[name].append((self.batches, ids, dots))
        self.batches += 1

    def losses(self, x):
        return (self.model(x) - 1).square().sum(1)

    def zero(self, names, to_none):
        """Throw the gradients of some parameters away."""
        for name in names:
            self.held[name].clear()
            if to_none:
                self.leaves[name].grad = None
            elif self.leaves[name].grad is not None:
                self.leaves[name].grad.zero_()

    def move(self):
        """Put gradients into other tensors."""
        for leaf in self.leaves.values():
            leaf.grad = None if leaf.grad is None else leaf.grad.clone()

    def scale(self, factor, names=None):
        """Multiply gradients, as clipping does."""
        for name in names or self.leaves:
            self.held[name] = [(batch, ids, factor * dots) for batch, ids, dots in self.held[name]]
            if self.leaves[name].grad is not None:
                self.leaves[name].grad.mul_(factor)

    def step(self):
        """Make a step with what is held, and begin anew."""
        for name, held in self.held.items():
            for batch, ids, dots in held:
                self.credited.add(batch)
                for sample, dot in zip(ids, dots.tolist(), strict=True):
                    self.expected[sample] = self.expected.get(sample, 0.0) + RATE * dot
            assert (self.leaves[name].grad is not None) >= bool(held)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for held in self.held.values():
            held.clear()

    def check(self):
        found = self.values.to_dict()
        assert found.keys() == self.expected.keys()
        expected = torch.tensor(list(self.expected.values()), dtype=torch.float64)
        got = torch.tensor([found[sample] for sample in self.expected], dtype=torch.float64)
        assert_within(got, expected, expected.norm())
        assert self.values.skipped_batches == self.batches - len(self.credited)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


ALL = ("0.weight", "0.bias", "2.weight", "2.bias")
WHAT = {"everything": ALL, "a layer": ALL[2:], "a parameter": ALL[:1]}
ACTS = {
    f"zero {what} to {'None' if to_none else 'zeros'}": (
        lambda ledger, names=names, to_none=to_none: ledger.zero(names, to_none)
    )
    for what, names in WHAT.items()
    for to_none in (True, False)
} | {
    "move": Ledger.move,
    "clip": lambda ledger: ledger.scale(0.5),
    "clip a layer": lambda ledger: ledger.scale(1e-3, ALL[2:]),
    "turn a parameter": lambda ledger: ledger.scale(-3.0, ALL[:1]),
}


@pytest.fixture
def ledger():
    ledger = Ledger(net())
    with ledger.engine, ledger.values:
        yield ledger


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ACTS)
def test_what_happens_between_two_batches(name, inside, ledger):
    ledger.batch()
    if not inside:
        ACTS[name](ledger)
    ledger.batch([ACTS[name]] if inside else [])
    ledger.step()
    ledger.batch()
    ledger.step()
    assert len(ledger.expected) == (2 if "everything" in name else 3) * N
    ledger.check()


@pytest.mark.parametrize("name", ACTS)
def test_what_happens_before_a_step(name, ledger):
    ledger.batch()
    ledger.batch()
    ACTS[name](ledger)
    ledger.step()
    assert len(ledger.expected) == (0 if "everything" in name else 2) * N
    ledger.check()


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_batches_and_discards(seed, ledger):
    draw = random.Random(seed)
    for _ in range(4):
        for _ in range(draw.randint(1, 4)):
            for _ in range(draw.randint(0, 2)):
                draw.choice(list(ACTS.values()))(ledger)
            ledger.batch(draw.choices(list(ACTS.values()), k=draw.randint(0, 2)))
        if draw.random() < 0.3:
            draw.choice(list(ACTS.values()))(ledger)
        ledger.step()
    ledger.check()


@pytest.mark.parametrize("to_none", [False, True])
def test_gradients_that_are_zero_anyway_are_not_taken_for_thrown_away(to_none):
    """Samples that cancel each other leave a gradient of zeros, and each has a value."""
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine = DotProductEngine(model)
    engine.add_direction("ones", {"weight": torch.ones(1, 2)})
    x, weights = torch.ones(2, 2, dtype=torch.float64), torch.tensor([[1.0], [-1.0]])
    with engine, InRunValues(engine, optimizer) as values:
        for at in range(2):
            with engine.batch([2 * at, 2 * at + 1]):
                (model(x) * weights).sum().backward()
            assert not model.weight.grad.any()
            if to_none and not at:
                optimizer.zero_grad()
        optimizer.step()
    expected = {0: 0.2, 1: -0.2, 2: 0.2, 3: -0.2}
    assert values.to_dict() == pytest.approx({k: expected[k] for k in range(2 * to_none, 4)})


def test_a_parameter_without_gradients_does_not_keep_a_batch():
    """A layer behind a gate of zero has zeros for gradients, thrown away or not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    nn.init.zeros_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = DotProductEngine(model)
    engine.add_direction("ones", {n: torch.ones_like(p) for n, p in model.named_parameters()})
    with engine, InRunValues(engine, optimizer) as values:
        for at in range(2):
            with engine.batch([at]):
                model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
            if not at:
                optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert values.to_dict().keys() == {1}
    assert values.skipped_batches == 1


def test_sparse_gradients():
    model = nn.Embedding(4, 2, sparse=True).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine = DotProductEngine(model)
    engine.add_direction("ones", {"weight": torch.ones(4, 2)})
    with engine, InRunValues(engine, optimizer) as values:
        for at in range(3):
            with engine.batch([at]):
                model(torch.tensor([[at]])).sum().backward()
            if not at:
                optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert values.to_dict() == pytest.approx({1: 0.2, 2: 0.2})


def test_a_frozen_batch_is_credited_with_nothing(ledger):
    x = torch.randn(N, 4, dtype=torch.float64)
    ledger.engine.__exit__(None, None, None)
    with ledger.engine.frozen(), ledger.engine.batch(range(N)):
        for _ in range(2):
            ledger.losses(x).sum().backward()
    ledger.engine.__enter__()
    ledger.optimizer.step()
    assert ledger.values.to_dict() == {}
    assert ledger.values.skipped_batches == 1


def test_gradients_thrown_away_between_two_backward_passes_of_a_batch_are_refused(ledger):
    def run(model, x):
        model(x[:2]).sum().backward()
        ledger.optimizer.zero_grad()
        model(x[2:]).sum().backward()

    x = torch.randn(4, 4, dtype=torch.float64)
    with (
        pytest.raises(CaptureError, match=r"2\.weight were taken out"),
        ledger.engine.batch(range(4)),
    ):
        run(ledger.model, x)
    ledger.optimizer.step()
    assert ledger.values.to_dict() == {}


def test_gradients_moved_out_of_a_batch_are_refused(ledger):
    def run():
        ledger.losses(torch.randn(N, 4, dtype=torch.float64)).sum().backward()
        ledger.model[2].bias.grad = None

    with (
        pytest.raises(CaptureError, match=r"of 2\.bias were taken out"),
        ledger.engine.batch(range(N)),
    ):
        run()


def test_two_backward_passes_of_a_batch_add_up(ledger):
    x = torch.randn(N, 4, dtype=torch.float64)
    each = per_sample_gradients(ledger.model, 2 * ledger.losses(x))
    with ledger.engine.batch(range(N)):
        for _ in range(2):
            ledger.losses(x).sum().backward()
    ledger.optimizer.step()
    expected = sum(RATE * g.flatten(1) @ ledger.direction[n].flatten() for n, g in each.items())
    got = torch.tensor([ledger.values[at] for at in range(N)], dtype=torch.float64)
    assert_within(got, expected, expected.norm())


def test_values_made_inside_a_batch_are_refused(ledger):
    x = torch.randn(N, 4, dtype=torch.float64)
    with ledger.engine.batch(range(N)):
        with pytest.raises(CaptureError, match="outside of a batch"):
            InRunValues(ledger.engine, ledger.optimizer)
        ledger.losses(x).sum().backward()


def test_a_parameter_used_twice_in_a_pass_is_looked_at_once():
    layer = nn.Linear(4, 4)
    ledger = Ledger(nn.Sequential(layer, nn.Tanh(), layer).double())
    with ledger.engine, ledger.values:
        for _ in range(2):
            ledger.batch()
            ledger.batch([ACTS["move"]])
            ledger.step()
    assert len(ledger.expected) == 4 * N
    ledger.check()

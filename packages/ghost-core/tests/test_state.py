"""Computations beside the training leave no trace on it."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from ghost_core.state import RandomState, buffers_kept, flags_set, random_state_kept, untouched


class Counting(nn.Module):
    """Keeps how often it ran, once in place and once by replacing the buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, inputs):
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.late = torch.ones(())
        return inputs


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    return model


def states():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


def draw():
    torch.rand(3)
    np.random.rand(3)
    random.random()


def test_random_number_generators_are_restored(model):
    draw()
    before = states()
    with untouched(model):
        draw()
        np.random.randn()  # leaves a cached second value behind
        assert states() != before
    assert states() == before


def test_seeds_set_inside_do_not_stay(model):
    draw()
    before = states()
    with untouched(model):
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
    assert states() == before


def test_modes_are_restored_module_by_module(model):
    with untouched(model):
        model.eval()
        assert not model[2].training
        model.train()
        model[0].eval()
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_batch_norm_statistics_are_restored(model):
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with untouched(model):
        model.train()
        model(torch.randn(8, 3) + 5)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert before.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_buffers_are_the_same_objects_afterwards(model):
    before = dict(model.named_buffers())
    with untouched(model):
        model.train()(torch.randn(8, 3))
    assert all(buffer is before[name] for name, buffer in model.named_buffers())


def test_replaced_buffers_are_restored():
    module = Counting()
    in_place, replaced = module.in_place, module.replaced
    with untouched(module):
        module(torch.zeros(1))
        assert (module.in_place.item(), module.replaced.item()) == (1, 1)
    assert module.in_place is in_place
    assert module.replaced is replaced
    assert module.late is None
    assert (module.in_place.item(), module.replaced.item()) == (0, 0)


def test_gradients_are_restored(model):
    """Also where the computation itself runs `backward`."""
    model[0].weight.grad = torch.ones(4, 3)
    with untouched(model):
        model(torch.randn(8, 3)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert model[0].bias.grad is None


def test_everything_is_restored_after_an_exception(model):
    draw()
    before = states()
    mean = model[1].running_mean.clone()

    def fail():
        draw()
        model.train()(torch.randn(8, 3) + 5)
        model.eval()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), untouched(model):
        fail()
    assert states() == before
    assert torch.equal(model[1].running_mean, mean)
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_buffers_that_are_not_finite_stay(model):
    model[1].running_mean.fill_(torch.nan)
    with untouched(model):
        model[1].running_mean.zero_()
    assert model[1].running_mean.isnan().all()


@pytest.mark.parametrize(
    "generator",
    [
        lambda: torch.rand(1),
        lambda: np.random.rand(),
        lambda: random.random(),
    ],
    ids=["torch", "numpy", "python"],
)
def test_a_state_of_the_generators_differs_once_something_was_drawn(generator):
    draw()
    before = RandomState.now()
    assert before == RandomState.now()
    with random_state_kept():
        drawn = generator()
        assert before != RandomState.now()
    assert before == RandomState.now()
    before.restore()
    assert generator() == drawn


def test_copies_of_buffers_leave_a_graph_what_it_saved():
    module = Counting()
    module.in_place.fill_(3)
    weight = torch.ones((), requires_grad=True)
    product = weight * module.in_place
    in_place = module.in_place
    with buffers_kept([module], by_copies=True):
        module(torch.zeros(1))
        assert (module.in_place.item(), module.replaced.item()) == (4, 1)
    assert module.in_place is in_place
    assert (module.in_place.item(), module.replaced.item(), module.late) == (3, 0, None)
    product.backward()
    assert weight.grad == 3


def test_flags_are_set_and_put_back(model):
    model[0].bias.requires_grad_(False)
    with flags_set({model[0].weight: False, model[0].bias: True}):
        assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)

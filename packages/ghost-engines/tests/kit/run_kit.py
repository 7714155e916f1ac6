"""A training loop that the tests of runs share, with and without ghost."""

import torch
from torch import nn

from ghost_engines import DotProductEngine, InRunValues

STEPS = 6
INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VALIDATION = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def make(dropout=0.2):
    """Return a model and its optimizer, the same each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def losses_of(model, inputs):
    """Return `[N]`."""
    return model(inputs).square().sum(1)


def validation_of(model):
    """Return a closure."""
    return lambda: losses_of(model, VALIDATION).mean()


def ids_of(step):
    """Return the ids of a step's batch."""
    return [(7 * step + at) % len(INPUTS) for at in range(4)]


def plain(dropout=0.2, steps=STEPS):
    """Train without a run; return the model and its values."""
    model, optimizer = make(dropout)
    engine = DotProductEngine(model)
    engine.add_direction("val", validation_of(model))
    values = InRunValues(engine, optimizer)
    with engine, values:
        for step in range(steps):
            with engine.batch(ids_of(step)):
                losses_of(model, INPUTS[ids_of(step)]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, values


def same_parameters(one, other):
    """Tell whether two models have equal parameters, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)

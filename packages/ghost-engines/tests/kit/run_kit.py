"""A training loop that the tests of runs share, with and without ghost."""

import torch
from torch import nn

from ghost_engines import DotProductEngine, InRunValues, Run, RunConfig

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


def trained(folder, before_save=None, after_step=None, save_every=2, **fields):
    """Train on a run, from the checkpoint in the folder if there is one.

    Args:
        folder: The folder of the run.
        before_save: Called on the run after each step, before it may be saved.
        after_step: Called on it when that has happened.
        save_every: Steps between checkpoints.
        fields: More of its configuration. With a policy, it chooses among the samples of each step.

    Returns:
        The model and the run.
    """
    model, optimizer = make()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule}
    config = RunConfig(**({"folder": folder, "log_every": 1, "history": 2, "refresh": 4} | fields))
    run = Run(model, optimizer, config, directions={"val": validation_of(model)})
    with run:
        for step in range(run.resume(**saved), STEPS):
            ids = torch.tensor(ids_of(step))
            if config.policy is not None:
                ids = run.select(lambda ids=ids: losses_of(model, INPUTS[ids]), ids).ids
            with run.batch(ids):
                loss = losses_of(model, INPUTS[ids]).mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            run.record(loss=loss)
            if before_save is not None:
                before_save(run)
            if run.steps % save_every == 0:
                run.save(**saved)
            if after_step is not None:
                after_step(run)
    return model, run


def same_parameters(one, other):
    """Tell whether two models have equal parameters, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)

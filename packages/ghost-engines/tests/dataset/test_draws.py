"""Losses that draw random numbers where no module says so, which rows then depend on."""

import logging
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ghost_core.state import RandomState
from ghost_engines import project_dataset

DATA = torch.arange(24.0).view(8, 3) / 24


class Always(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return functional.dropout(self.linear(x), 0.5)  # training=True, whatever the mode


LINE = Always.forward.__code__.co_firstlineno + 1


def of_the_model(model, batch):
    return model(batch).square().sum(1)


def dropped(model, batch):
    return functional.dropout(model(batch), 0.5).square().sum(1)


def noise(model, batch):
    return (model(batch) + torch.randn(2)).square().sum(1)


def by_numpy(model, batch):
    return model(batch).square().sum(1) * np.random.rand()


def by_python(model, batch):
    return model(batch).square().sum(1) * random.random()


@pytest.mark.parametrize(
    ("model", "loss", "named"),
    [
        (
            Always,
            of_the_model,
            rf"nn\.functional\.dropout \(test_draws\.py, line {LINE}\)",
        ),
        (lambda: nn.Linear(3, 2), dropped, r"nn\.functional\.dropout \(test_draws\.py, line \d+\)"),
        (lambda: nn.Linear(3, 2), noise, r"torch\.randn \(test_draws\.py"),
        (lambda: nn.Linear(3, 2), by_numpy, "numpy's generator"),
        (lambda: nn.Linear(3, 2), by_python, "python's generator"),
    ],
)
def test_what_draws_is_named_once_and_generators_are_left_alone(
    model, loss, named, tmp_path, caplog
):
    made = model()
    before = RandomState.now()
    with caplog.at_level(logging.WARNING):
        project_dataset(made, loss, DATA, tmp_path / "g", batch_size=2, dim=4)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert re.search(named, caplog.text)
    assert RandomState.now() == before


def test_modules_that_drop_in_training_alone_are_passed_over(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    project_dataset(model, of_the_model, DATA, tmp_path / "g", batch_size=2, dim=4)
    assert not caplog.records


def test_modules_that_a_loss_sets_to_training_are_named_by_the_store(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    project_dataset(
        model, lambda model, batch: of_the_model(model.train(), batch), DATA, tmp_path / "g", dim=4
    )
    assert [("dropout at work in 1" in each.message) for each in caplog.records] == [True]
